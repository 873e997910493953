"""Chapter 11. What did it buy? The paper's figures again, from the allocator and the scheduler of the other chapters.

Only time is simulated. Who enters, who waits, which block goes where: all of that is decided by the classes that serve
the real model (`engine/scheduler.py`, `memory/`). The forward pass is replaced by a formula for its seconds (cost.py).
No tensor library is imported, so a laptop runs 10^5 requests in a minute or two.
"""
