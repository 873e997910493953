"""Who owns which block. Plain Python: no tensor, no third-party import, so that it is read in an evening,
proved by state machines, run by the simulator at 10^5 requests, and run in a browser."""
