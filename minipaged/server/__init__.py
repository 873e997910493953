"""A server: the engine behind OpenAI's API, and a page that shows the block tables while they change.

    client --HTTP--> app.py --calls--> engine_loop.py (a thread: step after step) --trace--> live.py --events--> page/
                     protocol.py                                                             metrics.py

No chapter and nothing else of the course depends on this package. `minipaged serve` starts it.
"""
