"""Chapter 13. What ranks 1, 2, ... do: load a slice, then run every step that rank 0 describes. They hold no allocator.

    load      the slice of the weights, and the pool, of which only the heads are fewer        -> "ready"
    connect   join the group of collectives                                                    -> "ready"
    STEP ...  the step; its answer is what rank 0 gathers
    report    bytes of weights and K/V, and what passed through the group                      -> "report"
    ping      rank 0 looks for the rank that failed                                            -> "alive"
    stop      the end

A worker waits for the next message without a limit, since there may be no request. It ends when rank 0 does: the system
closes rank 0's end of the connection, whatever killed it. The answers behind the arrows, and the reason if the worker
fails, are JSON. They go to rank 0, which tells the user.
"""

import json
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from minipaged.distributed.group import CollectiveError, Group, process_group
from minipaged.distributed.layers import parallelise
from minipaged.distributed.load import load_slice
from minipaged.distributed.message import TAG, decode
from minipaged.engine.cache_config import CacheConfig
from minipaged.engine.runner import Runner

Connect = Callable[[float, torch.device], Group]  # seconds to wait for others, this rank's device


def serve(connection: Connection, rank: int, size: int, connect: Connect) -> int:
    """Do what rank 0 says until it says stop (returns 0) or something fails (returns 1)."""

    def say(kind: str, **fields: Any) -> None:
        connection.send_bytes(json.dumps({"kind": kind, **fields}).encode())

    runner, group = None, None
    try:
        while True:
            message = connection.recv_bytes()
            if message[: len(TAG)] == TAG:
                assert runner
                runner.run(*decode(message, runner.device))
                continue
            order = json.loads(message)
            match order["do"]:
                case "load":
                    device = rank_device(order["device"], rank)
                    loaded = load_slice(order["model"], rank, size, order["dtype"], order["seed"], device)
                    runner = Runner(loaded.transformer, CacheConfig(**order["cache_config"]))
                    say("ready")
                case "connect":
                    assert runner
                    group = connect(order["timeout"], runner.device)
                    parallelise(runner.transformer, loaded.share, loaded.config.vocab_size, group)
                    say("ready")
                case "report":
                    assert runner and group
                    say("report", **report(runner, group))
                case "ping":
                    say("alive")
                case "stop":
                    return 0
    except (EOFError, ConnectionError):
        print(f"minipaged: rank {rank} ends: rank 0 is gone", file=sys.stderr)
        return 1
    except BaseException as error:
        kind = "lost" if isinstance(error, CollectiveError) else "failed"
        last = traceback.extract_tb(error.__traceback__)[-1]
        try:
            say(kind, why=f"{type(error).__name__}: {error}", where=f"{last.filename}:{last.lineno}")
        except OSError:  # rank 0 is gone
            print(f"minipaged: rank {rank} ends, and rank 0 is gone: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()


def report(runner: Runner, group: Group) -> dict[str, Any]:
    """Bytes that this rank holds, as they lie in memory, and what it exchanged so far."""
    return {
        "rank": group.rank,
        "weight_bytes": sum(parameter.nbytes for parameter in runner.transformer.parameters()),
        "kv_bytes": runner.cache.key_cache.nbytes + runner.cache.value_cache.nbytes,
        "kv_bytes_per_token": runner.bytes_per_token,
        "calls": dict(group.calls),
        "bytes": dict(group.bytes),
    }


def rank_device(device: str, rank: int) -> str:
    """Each rank has a GPU of its own: "cuda" on rank 1 is "cuda:1". On several hosts, of its own host."""
    if not device.startswith("cuda"):
        return device
    local = rank % max(1, torch.cuda.device_count())
    return f"cuda:{local}"


def connect_to_rank_0(store: Store, rank: int, timeout: float) -> Connection:
    """The connection that messages come through. Rank 0 wrote its address, and a word to be known by, in the store."""
    store.set_timeout(timedelta(seconds=timeout))
    host, port, word = store.get("rank 0").decode().split()
    sock = socket.create_connection((host, int(port)), timeout)
    sock.settimeout(None)
    connection = Connection(sock.detach())
    connection.send_bytes(f"{word} {rank}".encode())
    return connection


def run_rank(store: Store, rank: int, size: int, timeout: float) -> int:
    """The life of a worker process. Returns its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; rank 0 decides
    try:
        connection = connect_to_rank_0(store, rank, timeout)
    except (OSError, RuntimeError) as error:
        print(f"minipaged: rank {rank} ends: rank 0 cannot be reached: {error}", file=sys.stderr)
        return 1
    return serve(connection, rank, size, lambda limit, device: process_group(store, rank, size, limit, device))


if __name__ == "__main__":  # python -m minipaged.distributed.worker FILE RANK SIZE SECONDS: what `team.spawn` starts
    path, rank, size, seconds = sys.argv[1:]
    sys.exit(run_rank(FileStore(path, int(size)), int(rank), int(size), float(seconds)))
