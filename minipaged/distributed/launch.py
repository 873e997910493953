"""Chapter 13. The other ranks' processes: torch's own launcher starts, watches and ends them.

    spawn()      for LLM(tensor_parallel_size=2): this process is rank 0 and starts the others
    torchrun()   torchrun started all of them, and looks after them

Ranks meet at torch's key-value store: a file in a private folder, or torchrun's server. Rank 0 says there what to load.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, Std, start_processes
from torch.distributed.rendezvous import rendezvous

WORKER = ("-m", "minipaged.distributed.worker")  # behind it: the store's file, rank, size, process of rank 0
START_SECONDS = 120.0  # for a worker to import torch and to load its slice


class WorkerError(ConnectionError):
    """A rank failed, died, or did not answer in time: the message names it. All other ranks are gone then."""


class Ranks:
    """Ranks 1, 2, ...: the store where they are met, and their processes where these are ours to end."""

    def __init__(self, store: Store, size: int, processes: PContext | None = None, folder: Path | None = None):
        self.store, self.size, self.processes = store, size, processes
        # Whichever comes first: close(), this object's end, or the interpreter's.
        self.close = weakref.finalize(self, _end, os.getpid(), processes, folder)

    def load(self, order: dict[str, Any]) -> None:
        """Say what to load, and wait until all have. Raises WorkerError where one cannot."""
        self.store.set("order", json.dumps(order))
        deadline = time.monotonic() + START_SECONDS
        while missing := self.missing("has loaded"):
            if error := self.ended(0.0):
                raise error
            if time.monotonic() > deadline:
                raise WorkerError(f"rank {missing[0]} has not loaded its slice within {START_SECONDS:g} s")
            time.sleep(0.02)

    def missing(self, what: str) -> list[int]:
        """The ranks that have not said so at the store."""
        return [rank for rank in range(1, self.size) if not self.store.check([f"rank {rank} {what}"])]

    def ended(self, seconds: float) -> WorkerError | None:
        """What ended the first rank that failed, if one does within so many seconds; all others are ended then."""
        result = self.processes.wait(seconds, 0.02) if self.processes else None
        if result is None or not result.failures:
            return None
        first = min(result.failures.values(), key=lambda failure: failure.timestamp)
        said: Any = first.message  # a dictionary where the rank wrote it
        why = f"failed: {said['message'] if isinstance(said, dict) else f'exit code {first.exitcode}'}"
        if first.exitcode < 0:
            why = f"died (signal {-first.exitcode})"
        return WorkerError(f"rank {first.local_rank + 1} {why}")


def spawn(size: int) -> Ranks:
    """Start size - 1 workers on this machine, in sessions of their own, so that a Ctrl-C reaches rank 0 alone."""
    folder = Path(tempfile.mkdtemp(prefix="minipaged-"))  # readable by this user alone
    threads = max(1, torch.get_num_threads() // size)
    env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    args = {i: (*WORKER, folder / "store", i + 1, size, os.getpid()) for i in range(size - 1)}
    logs = DefaultLogsSpecs(str(folder / "logs"), redirects=Std.OUT)
    # Its messages say what our errors say, and count our ranks from 0.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    with ThreadPoolExecutor(1) as thread:  # in the main thread it would replace the program's signal handlers
        processes = thread.submit(
            start_processes, "minipaged", sys.executable, args, {i: dict(env) for i in args}, logs
        ).result()
    return Ranks(FileStore(str(folder / "store"), size), size, processes, folder)


def torchrun_rank_and_size() -> tuple[int, int]:
    """(0, 1) where torchrun did not start this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def torchrun() -> Ranks:
    store, _, size = next(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
    return Ranks(PrefixStore("minipaged", store), size)


def _end(owner: int, processes: PContext | None, folder: Path | None) -> None:
    if os.getpid() == owner and processes and folder:  # and not a fork of rank 0's process
        processes.close(signal.SIGKILL)  # a stopped one too; a worker has nothing to save
        shutil.rmtree(folder, ignore_errors=True)
