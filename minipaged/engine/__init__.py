"""Chapter 10. The serving engine: requests, sampling, the scheduler, and `LLM` on top.

Nothing is imported here: the scheduler is plain Python, and a program that wants only that does not wait for torch.
"""
