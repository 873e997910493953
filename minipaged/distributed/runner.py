"""Chapter 13. Rank 0: the runner of chapter 10 with one line more: it sends each step to all other ranks first.

    schedule  ->  forward_batch  ->  send to all ranks  ->  run, all ranks at once  ->  logits at rank 0  ->  sample

Only rank 0 has a scheduler, block tables, sequences, a tokenizer and samplers. So there is nothing that ranks could
disagree about: the others get block numbers and tokens, and no request.
"""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipaged.distributed import launch
from minipaged.distributed.group import CollectiveError, collective
from minipaged.distributed.launch import Ranks, WorkerError
from minipaged.distributed.load import load_slice
from minipaged.distributed.message import HEADER_LENGTH, encode
from minipaged.distributed.worker import Links, rank_device, report, serve
from minipaged.engine.arguments import number
from minipaged.engine.cache_config import CacheConfig
from minipaged.engine.runner import Runner
from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.model.batch import ForwardBatch
from minipaged.model.load import Model, default_device, named_dtype

GRACE_SECONDS = 4.0  # after a collective failed: for a process to have ended, or for all to have hung up


class ShardedModel:
    """A model that is to be divided: rank 0's part of it, and what others need to load theirs. On other ranks that
    torchrun started, this is where they serve rank 0, and end."""

    def __init__(
        self, model: str | Path | Model, size: int, dtype: str | None, seed: int, device: str | None, timeout: float
    ):
        """timeout: seconds that a rank may let the others wait, once all are there.

        Raises ValueError where the model, the ranks or the devices do not go together. Starts nothing."""
        timeout = number("distributed_timeout", timeout)
        rank, world = launch.torchrun_rank_and_size()
        device = device or default_device()
        gpus = size if world > 1 or not device.startswith("cuda") else torch.cuda.device_count()
        needs = f"tensor_parallel_size {size} needs"
        if isinstance(model, Model):
            raise ValueError(f"{needs} the model's name, file or folder: each rank loads its own slice")
        if not 0.0 < timeout < 1e6:
            raise ValueError(f"distributed_timeout must be a number of seconds above 0, got {timeout!r}")
        if world not in (1, size):
            raise ValueError(f"torchrun started {world} processes, and tensor_parallel_size is {size}")
        if gpus < size:
            raise ValueError(f"{needs} as many GPUs, and there are {gpus}: take fewer ranks, or device='cpu'")
        name = str(Path(model).resolve()) if Path(model).exists() else str(model)  # a worker may stand elsewhere
        self.size, self.timeout, self.ranks = size, timeout, launch.torchrun() if world > 1 else None
        if self.ranks and rank > 0:
            serve(self.ranks.store, rank, size)
            sys.exit()
        dtype = "float32" if dtype is None else dtype
        dtype = named_dtype(dtype, device)  # decided here: two ranks might measure otherwise
        self.order = {"model": name, "dtype": dtype, "seed": seed, "device": device, "timeout": timeout}
        self.loaded = load_slice(name, 0, size, dtype, seed, rank_device(device, 0))

    @property
    def model(self) -> Model:
        assert self.loaded.tokenizer
        return Model(self.loaded.transformer, self.loaded.tokenizer)


class ParallelRunner(Runner):
    """Invariant: between two calls of `run` all ranks have run the same steps, or they are gone for good."""

    def __init__(self, sharded: ShardedModel, cache_config: CacheConfig):
        super().__init__(sharded.loaded.transformer, cache_config)
        self.sharded = sharded
        self.ranks: Ranks | None = None
        self.links: Links | None = None
        self.over: Exception = ValueError("this engine has not started its other ranks")  # why there are none
        self.num_reports = 0

    def start(self) -> None:
        """Start the others, and wait until each has loaded its slice and all are connected. Raises WorkerError."""
        sharded, size = self.sharded, self.sharded.size
        with _interrupts_wait():
            self.ranks = ranks = sharded.ranks or launch.spawn(size)
        with self._or_close():
            ranks.load({**sharded.order, "cache_config": asdict(self.cache_config)})
            self.links = Links(self, sharded.loaded, ranks.store, 0, size, sharded.timeout)

    def run(self, output: SchedulerOutput, batch: ForwardBatch) -> Tensor:
        """One step on all ranks. Returns logits [num_sampled, vocab_size].

        Raises WorkerError, which names the rank, where one died, failed, or let the others wait for too long. Then all
        of them are gone, and every later step raises it too.
        """
        links, _ = self._open()
        with _interrupts_wait(), self._or_close():
            for tensor in encode(output, batch):
                links.broadcast(tensor)
            return super().run(output, batch)

    def reports(self) -> list[dict[str, Any]]:
        """What each rank holds and exchanged, by rank: see `worker.report`."""
        links, ranks = self._open()
        self.num_reports += 1
        with _interrupts_wait(), self._or_close(), collective("reports"):
            links.broadcast(torch.tensor([0, self.num_reports] + [0] * (HEADER_LENGTH - 2), dtype=torch.int32))
            names = [f"report {self.num_reports} of rank {rank}" for rank in range(1, ranks.size)]
            ranks.store.wait(names, timedelta(seconds=self.sharded.timeout))
            return [report(self, links), *(json.loads(ranks.store.get(name)) for name in names)]

    def close(self) -> None:
        """End the workers. Also done when this object goes, and at the interpreter's end."""
        if self.links and self.ranks and not self.ranks.processes:
            with suppress(CollectiveError):
                self.links.broadcast(torch.full((HEADER_LENGTH,), -1, dtype=torch.int32))  # goodbye
        self._end(ValueError("this engine was closed, and has no other ranks any more"))

    def _open(self) -> tuple[Links, Ranks]:
        if self.links is None or self.ranks is None:
            raise self.over
        return self.links, self.ranks

    @contextmanager
    def _or_close(self) -> Iterator[None]:
        """An exception inside leaves ranks at different places: then all are ended, and none goes on."""
        try:
            yield
        except BaseException as error:
            found = self._culprit(error) if isinstance(error, CollectiveError) else error
            self._end(found if isinstance(found, WorkerError) else WorkerError(f"rank 0 failed in a step: {found!r}"))
            if found is error:
                raise
            raise found from error

    def _culprit(self, error: CollectiveError) -> WorkerError:
        """The rank that has ended, or else the one that does not hang up when the others do."""
        if self.links:
            self.links.close()  # who waits for this rank learns of it
        if self.ranks and (ended := self.ranks.ended(GRACE_SECONDS)):
            return ended
        if self.ranks and (silent := self.ranks.missing("has hung up")):
            named = ", ".join(map(str, silent))
            why = f"stopped, or at work for longer than the timeout ({error})"
            return WorkerError(f"rank {named} did not answer: {why}")
        return WorkerError(f"ranks lost each other: {error}")

    def _end(self, why: Exception) -> None:
        if self.ranks:
            self.ranks.close()
            if self.links:
                self.links.close()
            self.ranks, self.links, self.over = None, None, why


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C is raised after the step: all ranks have run it then, and the next call can go on."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])
