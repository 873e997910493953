"""Chapter 13. How ranks find each other: started by rank 0, or by torchrun.

    spawn()     subprocesses of this one, for LLM(tensor_parallel_size=2): they meet through a file in a private folder
    torchrun()  processes that torchrun started with this one: they meet through its store

Either way rank 0 opens a socket and leaves its address, and a secret word, at the meeting place. A worker knocks with
the word and its rank.
"""

import hmac
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from minipaged.distributed.group import Group, process_group
from minipaged.distributed.team import Processes, Team, WorkerError, how_it_ended, shut_down
from minipaged.distributed.worker import run_rank

START_SECONDS = 120.0  # for a worker to import torch and to knock, and again to load its slice


def spawn(size: int) -> Team:
    """Start size - 1 workers on this machine, in sessions of their own, so that a Ctrl-C reaches rank 0 alone."""
    folder = Path(tempfile.mkdtemp(prefix="minipaged-"))  # readable by this user alone
    processes, connections = Processes(), dict[int, Connection]()
    try:
        store = FileStore(str(folder / "store"), size)
        threads = max(1, torch.get_num_threads() // size)
        env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **_LOOPBACK, **os.environ}
        with _listener(store, "127.0.0.1") as (listener, word):
            for rank in range(1, size):
                command = [sys.executable, "-m", "minipaged.distributed.worker", str(folder / "store"), str(rank)]
                processes[rank] = subprocess.Popen(
                    [*command, str(size), str(START_SECONDS)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=env,
                    start_new_session=True,
                )
            _let_in(listener, word, connections, processes, size)
    except BaseException:
        for process in processes.values():
            process.kill()
        shut_down(os.getpid(), connections, processes, folder)
        raise

    def connect(limit: float, device: torch.device) -> Group:
        with _loopback():
            return process_group(store, 0, size, limit, device)

    return Team(size, connections, processes, connect, folder)


def torchrun() -> Team:
    """Rank 0's team of the processes that torchrun started with it."""
    _, size = torchrun_rank_and_size()
    store, connections = _torchrun_store(), dict[int, Connection]()
    with _listener(store, os.environ["MASTER_ADDR"]) as (listener, word):
        _let_in(listener, word, connections, Processes(), size)
    return Team(size, connections, Processes(), lambda limit, device: process_group(store, 0, size, limit, device))


def torchrun_rank_and_size() -> tuple[int, int]:
    """(0, 1) where torchrun did not start this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def serve_if_worker() -> None:
    """Under torchrun, on every rank but 0: be a worker, and then end this process. Elsewhere nothing."""
    rank, size = torchrun_rank_and_size()
    if rank > 0:
        sys.exit(run_rank(_torchrun_store(), rank, size, START_SECONDS))


# ---- at the meeting place --------------------------------------------------------------------------------------------


def _torchrun_store() -> Store:
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
    return PrefixStore("minipaged", store)


@contextmanager
def _listener(store: Store, host: str) -> Iterator[tuple[socket.socket, str]]:
    """A socket to knock at, and the word that lets in. The store says both."""
    with socket.create_server((host, 0)) as listener:
        word = secrets.token_hex(16)
        store.set("rank 0", f"{host} {listener.getsockname()[1]} {word}")
        yield listener, word


def _let_in(
    listener: socket.socket, word: str, connections: dict[int, Connection], processes: Processes, size: int
) -> None:
    """Wait until every worker has knocked. Raises WorkerError where one has ended, or the time is up."""
    listener.settimeout(0.2)
    deadline = time.monotonic() + START_SECONDS
    while len(connections) < size - 1:
        missing = [rank for rank in range(1, size) if rank not in connections]
        for rank in missing:
            if rank in processes and processes[rank].poll() is not None:
                raise WorkerError(f"rank {rank} ended before it could begin{how_it_ended(processes[rank])}")
        if time.monotonic() > deadline:
            raise WorkerError(f"rank {missing[0]} did not come within {START_SECONDS:g} s")
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            continue
        sock.settimeout(None)
        connection = Connection(sock.detach())
        said = connection.recv_bytes(100).decode(errors="replace").split() if connection.poll(5.0) else []
        if len(said) == 2 and hmac.compare_digest(said[0], word):
            connections[int(said[1])] = connection
        else:
            connection.close()  # not one of our workers


_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


@contextmanager
def _loopback() -> Iterator[None]:
    """gloo asks for the address of this host's name, and in a container it may have none. These ranks are on one host,
    so unless the user says otherwise they take the loopback device."""
    added = {name: value for name, value in _LOOPBACK.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
