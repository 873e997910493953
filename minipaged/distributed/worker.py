"""Chapter 13. What ranks 1, 2, ... do: load a slice, then run every step that rank 0 describes. They hold no allocator.

A step in which no token is computed asks for a report instead. A worker waits for the next step without a limit, since
there may be no request, and ends when rank 0 hangs up, for whatever reason.
"""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import record

from minipaged.distributed.group import CollectiveError, Group, collective, gloo
from minipaged.distributed.layers import parallelise
from minipaged.distributed.load import RankModel, load_slice
from minipaged.distributed.message import HEADER_LENGTH, body_sizes, decode
from minipaged.engine.cache_config import CacheConfig
from minipaged.engine.runner import Runner

NO_LIMIT = timedelta(days=1_000)


@dataclass
class Links:
    """One rank's two ways to the others: steps come through `steps`, and a step's sums and scores through `group`."""

    steps: dist.ProcessGroupGloo
    group: Group
    store: Store

    def close(self) -> None:
        """Hang up."""
        del self.steps
        self.group.close()

    def send(self, *tensors: Tensor) -> None:
        """From rank 0 to all others, one by one: one that is stopped keeps no other from its message."""
        with collective("sending a step"):
            for rank in range(1, self.group.size):
                for tensor in tensors:
                    self.steps.send([tensor], rank, 0).wait()

    def receive(self, length: int) -> Tensor:
        """From rank 0, int32 [length]."""
        tensor = torch.empty(length, dtype=torch.int32)
        with collective("waiting for a step"):
            self.steps.recv([tensor], 0, 0).wait(NO_LIMIT)
        return tensor

    def meet(self, limit: timedelta) -> None:
        """Wait until all ranks call this. Raises CollectiveError: at rank 0 it names the ranks that have not."""
        with collective("meeting"):
            self.steps.monitored_barrier(limit, True)


def link(runner: Runner, loaded: RankModel, store: Store, rank: int, size: int, timeout: float) -> Links:
    """Join a rank's part of a model to the others. Returns when all ranks do."""
    with collective("connecting"):
        steps = gloo(PrefixStore("steps", store), rank, size, timedelta(seconds=timeout))
    group = Group(store, rank, size, timeout, runner.device)
    parallelise(runner.transformer, loaded.share, loaded.config.vocab_size, group)
    return Links(steps, group, store)


@record  # torch's launcher says why a rank failed
def serve(store: Store, rank: int, size: int) -> None:
    """The life of a worker."""
    order = json.loads(store.get("order"))
    loaded = load_slice(order["model"], rank, size, order["dtype"], order["seed"], rank_device(order["device"], rank))
    runner = Runner(loaded.transformer, CacheConfig(**order["cache_config"]))
    store.set(f"rank {rank} has loaded", "")
    links = link(runner, loaded, store, rank, size, order["timeout"])
    while True:
        try:
            header = links.receive(HEADER_LENGTH)
            if header[0] == 0:
                store.set(f"report of rank {rank}", json.dumps(report(runner, links.group)))
                links.meet(NO_LIMIT)
                continue
            body = links.receive(sum(body_sizes(header)))
        except CollectiveError:
            return  # rank 0 has hung up
        with suppress(CollectiveError):  # rank 0 sees it too, and asks all ranks for a report
            runner.run(*decode(header, body, runner.device))


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
    return f"cuda:{rank % max(1, torch.cuda.device_count())}"


def main(arguments: list[str]) -> None:
    path, rank, size = arguments
    serve(FileStore(path, int(size)), int(rank), int(size))


if __name__ == "__main__":
    main(sys.argv[1:])
