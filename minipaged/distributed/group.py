"""Chapter 13. What ranks do together: add up a tensor that each has a part of, and hand tensors to rank 0.

    all_reduce    every rank brings a tensor of one shape, and every rank leaves with their sum
    gather        every rank brings a tensor of one shape, and rank 0 leaves with all of them

A `Group` is one rank's end of it, over torch.distributed: gloo on CPUs, NCCL between GPUs. It counts what passes.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]


class CollectiveError(RuntimeError):
    """A collective did not come about: another rank is gone, or did not come in time."""


class Group:
    """Invariant: all ranks call the same methods in the same order with the same shapes, or none returns.

    It is a group of its own and not torch's default one: a process may hold several. Each rank makes one, and waits for
    the others there. timeout: seconds that a collective waits for the others.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float, device: str | torch.device = "cpu"):
        self.rank, self.size = rank, size
        self.calls = Counter[str]()  # "all_reduce", "gather" -> how often
        self.bytes = Counter[str]()  # and bytes of the tensors that this rank brought
        self._backend: Any = None
        if torch.device(device).type == "cuda":
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else no rank learns that the time is up
            limit: Any = timedelta(seconds=timeout)
            self._backend = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, limit)
        elif size > 1:
            self._backend = gloo(PrefixStore("gloo", store), rank, size, timeout)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place. Raises CollectiveError."""
        if self.size > 1:
            with self._counted("all_reduce", tensor):
                self._backend.allreduce([tensor]).wait()
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """At rank 0 the tensors of all ranks, by rank; elsewhere nothing. Raises CollectiveError."""
        if self.size == 1:
            return [tensor]
        outputs = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else []
        with self._counted("gather", tensor):
            self._backend.gather([outputs] if outputs else [], [tensor], dist.GatherOptions()).wait()
        return outputs

    def close(self) -> None:
        """Hang up: a collective in which others wait for this rank fails for them at once."""
        self._backend = None

    @contextmanager
    def _counted(self, name: str, tensor: Tensor) -> Iterator[None]:
        self.calls[name] += 1
        self.bytes[name] += tensor.nbytes
        with collective(name):
            yield


def gloo(store: Store, rank: int, size: int, timeout: float) -> Any:
    """torch's collectives between processes. Ranks of one host meet on its loopback address."""
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._timeout = timedelta(seconds=timeout)
    is_one_host = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"  # torchrun's number of hosts
    device = backend.create_device(hostname="127.0.0.1") if is_one_host else backend.create_default_device()
    options._devices = [device]
    with collective("connecting"):
        return backend(store, rank, size, options)


@contextmanager
def collective(what: str) -> Iterator[None]:
    """torch raises RuntimeError for all that goes wrong between ranks."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0].rpartition("] ")[2]  # without the line of gloo's source, and its advice
        said = said.partition(". This is typically")[0]
        raise CollectiveError(f"{what}: {said}") from error
