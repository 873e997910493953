"""Chapter 13. What ranks 1, 2, ... do: load a slice, then run every step that rank 0 describes. They hold no allocator.

A step of no token asks for a report instead, and one of -1 says goodbye. A worker waits for the next step without a
limit, since there may be no request, and ends when rank 0 hangs up, for whatever reason.
"""

import json
import os
import shutil
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import record

from minipaged.distributed.group import CollectiveError, Group, collective, gloo
from minipaged.distributed.layers import parallelise
from minipaged.distributed.load import RankModel, load_slice
from minipaged.distributed.message import HEADER_LENGTH, decode
from minipaged.engine.cache_config import CacheConfig
from minipaged.engine.runner import Runner

NO_LIMIT = timedelta(days=1_000)


class Links(Group):
    """One rank's ways to the others: for the steps, and for what each step exchanges. Made when its part of a model is
    loaded, and joins it to the others' parts."""

    def __init__(self, runner: Runner, loaded: RankModel, store: Store, rank: int, size: int, timeout: float):
        super().__init__(store, rank, size, timeout, runner.device)
        self._steps = gloo(PrefixStore("step", store), rank, size, timeout)
        parallelise(runner.transformer, loaded.share, loaded.config.vocab_size, self)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's int32 tensor, on every rank."""
        options = dist.BroadcastOptions()
        if self.rank > 0:
            options.timeout = NO_LIMIT
        with collective("sending a step"):
            self._steps.broadcast([tensor], options).wait()
        return tensor

    def close(self) -> None:
        self._backend = self._steps = None


@record  # torch's launcher reads why a rank failed
def serve(store: Store, rank: int, size: int) -> None:
    """The life of a worker."""
    order = json.loads(store.get("order"))
    loaded = load_slice(order["model"], rank, size, order["dtype"], order["seed"], rank_device(order["device"], rank))
    runner = Runner(loaded.transformer, CacheConfig(**order["cache_config"]))
    store.set(f"rank {rank} has loaded", "")
    links = Links(runner, loaded, store, rank, size, order["timeout"])
    try:
        while (header := links.broadcast(torch.empty(HEADER_LENGTH, dtype=torch.int32)))[0] >= 0:
            if header[0] > 0:
                body = links.broadcast(torch.empty(int(header[:-1].sum()), dtype=torch.int32))
                runner.run(*decode(header, body, runner.device))
            else:
                store.set(f"report {header[1]} of rank {rank}", json.dumps(report(runner, links)))
    except CollectiveError:  # rank 0 is gone, or asks who is there
        links.close()
        store.set_timeout(timedelta(seconds=1.0))  # its folder may be gone, too
        with suppress(RuntimeError):
            store.set(f"rank {rank} has hung up", "")


def report(runner: Runner, group: Group) -> dict[str, Any]:
    """Bytes that this rank holds (of a packed weight, those of its plain form), and what it exchanged so far."""
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
    return f"cuda:{rank % max(1, torch.cuda.device_count())}" if device.startswith("cuda") else device


def main(arguments: list[str]) -> None:
    path, rank, size, owner = arguments
    serve(FileStore(path, int(size)), int(rank), int(size))
    while os.getppid() == int(owner):  # rank 0 asks at the store who has hung up, and ends this process then
        time.sleep(0.1)
    shutil.rmtree(Path(path).parent, ignore_errors=True)  # rank 0 does, unless it was killed


if __name__ == "__main__":
    main(sys.argv[1:])
