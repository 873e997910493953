"""Chapter 13. Rank 0's connections to the others: send messages, find the rank that failed, leave no process behind.

Messages go over a socket to each worker, tensors over torch.distributed. The two fail in different ways, and that is
how the rank that failed is found. When a collective fails, every healthy rank that took part reports it on its socket,
and one that was through with it answers a ping. A rank that died has a closed socket. One that was stopped, or hangs,
sends nothing.
"""

import json
import os
import shutil
import subprocess
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from minipaged.distributed.group import Group

Processes = dict[int, subprocess.Popen]  # by rank; empty under torchrun, which looks after them
GRACE_SECONDS = 2.0  # after a collective failed, for healthy ranks to say that theirs did too
STOP_SECONDS = 3.0  # for a worker to end by itself


class WorkerError(ConnectionError):
    """A rank failed, died, or did not answer in time: the message names it. The whole team is gone then."""


class Team:
    """Invariant: open, with every worker waiting for a message or at work on one; or closed, with none left."""

    def __init__(
        self,
        size: int,
        connections: dict[int, Connection],
        processes: Processes,
        connect: Callable[[float, torch.device], Group],
        folder: Path | None = None,
    ):
        self.size, self.connect = size, connect
        self.connections, self.processes = connections, processes
        # Whichever comes first: close(), this object's end, or the interpreter's.
        self._finalizer = weakref.finalize(self, shut_down, os.getpid(), connections, processes, folder)

    def tell(self, message: bytes | dict[str, Any]) -> None:
        """One message to every worker. Raises WorkerError where one is gone."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        for connection in self.connections.values():
            try:
                connection.send_bytes(data)
            except OSError as error:
                raise self.blame(str(error), 0.0) from error

    def answers(self, seconds: float) -> dict[int, dict[str, Any]]:
        """One answer of every worker. Raises WorkerError where one fails, dies or lets the time pass."""
        words = self._listen(seconds, lambda words: any(word["kind"] in ("died", "failed") for word in words.values()))
        if len(words) < self.size - 1 or any(word["kind"] in ("died", "failed", "lost") for word in words.values()):
            raise self._culprit(words, f"no answer within {seconds:g} s")
        return words

    def blame(self, what: str, grace: float = GRACE_SECONDS) -> WorkerError:
        """Who is to blame that `what` happened: an error to raise. The team is closed."""
        for connection in self.connections.values():
            with suppress(OSError):
                connection.send_bytes(b'{"do": "ping"}')
        words = self._listen(grace, lambda words: any(word["kind"] in ("died", "failed") for word in words.values()))
        return self._culprit(words, what)

    def close(self, *, kill: bool = False) -> None:
        """End all workers, at once if kill. Does nothing the second time."""
        if kill:
            for process in self.processes.values():
                process.kill()
        self._finalizer()

    def _listen(self, seconds: float, enough: Callable[[dict[int, dict[str, Any]]], bool]) -> dict[int, dict[str, Any]]:
        """The next word of each worker, as far as they come; a closed connection is a word too."""
        deadline, words = time.monotonic() + seconds, dict[int, dict[str, Any]]()
        while len(words) < len(self.connections) and not enough(words):
            silent = {c: rank for rank, c in self.connections.items() if rank not in words}
            ready = wait(list(silent), max(0.0, deadline - time.monotonic()))
            for connection in ready:
                try:
                    words[silent[connection]] = json.loads(connection.recv_bytes())  # type: ignore[index, union-attr]
                except (EOFError, OSError):
                    words[silent[connection]] = {"kind": "died"}  # type: ignore[index]
            if not ready and time.monotonic() >= deadline:
                break
        return words

    def _culprit(self, words: dict[int, dict[str, Any]], what: str) -> WorkerError:
        by_kind: dict[str, list[int]] = {"died": [], "failed": [], "silent": []}
        for rank in self.connections:
            by_kind.setdefault(words.get(rank, {"kind": "silent"})["kind"], []).append(rank)
        if by_kind["failed"]:
            rank = by_kind["failed"][0]
            message = f"rank {rank} failed: {words[rank]['why']} ({words[rank]['where']})"
        elif by_kind["died"]:
            rank = by_kind["died"][0]
            message = f"rank {rank} died{how_it_ended(self.processes.get(rank))}"
        elif by_kind["silent"]:
            names = " and ".join(str(rank) for rank in by_kind["silent"])
            message = f"rank {names} did not answer: stopped, or at work for longer than the timeout ({what})"
        else:
            message = f"ranks lost each other: {what}"
        self.close(kill=True)
        return WorkerError(f"{message}; all {self.size} ranks have ended their work")


def how_it_ended(process: subprocess.Popen | None) -> str:
    """How a process ended, as far as it is ours."""
    if process is None:
        return ""
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return ""
    return f" (signal {-code})" if code < 0 else f" (exit code {code})"


def shut_down(
    owner: int,
    connections: dict[int, Connection],
    processes: Processes,
    folder: Path | None,
) -> None:
    if os.getpid() != owner:  # a fork of rank 0's process: not its team
        return
    for connection in connections.values():
        with suppress(OSError):
            connection.send_bytes(b'{"do": "stop"}')
        connection.close()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes.values():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
