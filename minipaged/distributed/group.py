"""Chapter 13. What ranks can do together: add up a tensor that each has a part of, and hand tensors to rank 0.

    all_reduce    every rank brings a tensor of one shape, and every rank leaves with their sum
    gather        every rank brings a tensor of one shape, and rank 0 leaves with all of them

A `Group` is one rank's end of it. It counts what passes through. Below it is torch.distributed (gloo between processes
on CPUs, NCCL between GPUs), or threads of one process, which is enough to watch the algebra and to test it.
"""

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A collective did not come about: another rank is gone, or did not come in time."""


class Group:
    """Invariant: all ranks call the same methods in the same order with the same shapes, or none returns."""

    def __init__(
        self,
        rank: int,
        size: int,
        all_reduce: Callable[[Tensor], None],
        gather: Callable[[Tensor], list[Tensor]],
    ):
        self.rank, self.size = rank, size
        self._all_reduce, self._gather = all_reduce, gather
        self.calls = Counter[str]()  # "all_reduce", "gather" -> how often
        self.bytes = Counter[str]()  # and bytes of the tensors that this rank brought

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place. Raises CollectiveError."""
        if self.size > 1:
            self._count("all_reduce", tensor)
            with _named("all_reduce"):
                self._all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """At rank 0 the tensors of all ranks, by rank; elsewhere nothing. Raises CollectiveError."""
        if self.size == 1:
            return [tensor]
        self._count("gather", tensor)
        with _named("gather"):
            return self._gather(tensor)

    def _count(self, name: str, tensor: Tensor) -> None:
        self.calls[name] += 1
        self.bytes[name] += tensor.numel() * tensor.itemsize


def process_group(store: Store, rank: int, size: int, timeout: float, device: torch.device) -> Group:
    """Ranks that are processes: NCCL where the device is a GPU, else gloo. Waits until all are there.

    It is a group of its own and not torch's default one, so that one process may hold several, one after another or
    side by side. timeout: seconds that a collective waits for the others.
    """
    limit = timedelta(seconds=timeout)
    backend: Any
    with _named("connecting"):
        if device.type == "cuda":
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else no rank learns that the time is up
            backend = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, limit)  # type: ignore[arg-type]
        else:
            backend = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, limit)
    to_rank_0 = dist.GatherOptions()
    to_rank_0.rootRank = 0

    def all_reduce(tensor: Tensor) -> None:
        backend.allreduce([tensor]).wait()

    def gather(tensor: Tensor) -> list[Tensor]:
        outputs = [torch.empty_like(tensor) for _ in range(size)] if rank == 0 else []
        backend.gather([outputs] if rank == 0 else [], [tensor], to_rank_0).wait()
        return outputs

    return Group(rank, size, all_reduce, gather)


def thread_groups(size: int, timeout: float = 60.0) -> list[Group]:
    """Ranks that are threads of this process: each takes one of these, and uses it as it would the other kind."""
    return _groups_at(threading.Barrier(size, timeout=timeout))


def on_threads(size: int, work: Callable[[Group], T], timeout: float = 60.0) -> list[T]:
    """work(group) on every rank at once, each a thread. Returns what each returned, by rank.

    Raises what the first rank raised that failed by itself; CollectiveError where ranks did not call the same.
    """
    barrier = threading.Barrier(size, timeout=timeout)
    found: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(group: Group) -> None:
        try:
            found[group.rank] = work(group)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(group,)) for group in _groups_at(barrier)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.02)
            has_ended = not all(other.is_alive() for other in threads)
            if has_ended and barrier.n_waiting:  # in this order: what waits now waits for a rank that will not come
                barrier.abort()
    for error in sorted(errors, key=lambda error: isinstance(error, CollectiveError)):
        raise error
    return [found[rank] for rank in range(size)]


def _groups_at(barrier: threading.Barrier) -> list[Group]:
    """One group for each party of a barrier."""
    brought: list[Tensor] = [torch.empty(0)] * barrier.parties

    def meet() -> None:
        try:
            barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RuntimeError("another rank did not come") from error

    def group(rank: int) -> Group:
        def gather(tensor: Tensor) -> list[Tensor]:
            brought[rank] = tensor
            meet()
            found = list(brought) if rank == 0 else []
            meet()  # no rank overwrites what rank 0 has not taken
            return found

        def all_reduce(tensor: Tensor) -> None:
            brought[rank] = tensor.clone()
            meet()
            tensor.copy_(torch.stack(brought).sum(dim=0))
            meet()

        return Group(rank, barrier.parties, all_reduce, gather)

    return [group(rank) for rank in range(barrier.parties)]


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])  # without the line of gloo's source
        raise CollectiveError(f"{what}: {said}") from error
