"""Chapter 13. Rank 0: the runner of chapter 10 with one line more: it sends each step to all other ranks first.

    schedule  ->  forward_batch  ->  tell all ranks  ->  run, all ranks at once  ->  logits at rank 0  ->  sample

Only rank 0 has a scheduler, block tables, sequences, a tokenizer and samplers. So there is nothing that ranks could
disagree about: the others get block numbers and tokens, and no request.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipaged.distributed import launch
from minipaged.distributed.group import CollectiveError, Group
from minipaged.distributed.layers import parallelise
from minipaged.distributed.load import RankModel, load_slice
from minipaged.distributed.message import encode
from minipaged.distributed.team import Team, WorkerError
from minipaged.distributed.worker import rank_device, report
from minipaged.engine.cache_config import CacheConfig
from minipaged.engine.runner import Runner
from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.model.batch import ForwardBatch
from minipaged.model.load import Model, default_device, named_dtype


class ShardedModel:
    """A model that is to be divided: rank 0's part of it, and what others need to load theirs."""

    def __init__(
        self,
        model: str | Path | Model,
        size: int,
        dtype: str | None,
        seed: int,
        device: str | None,
        timeout: float = 60.0,
    ):
        """timeout: seconds that a rank may let the others wait, once all are there.

        Raises ValueError where the model, the ranks or the devices do not go together. Starts nothing."""
        if isinstance(model, Model):
            raise ValueError(
                f"tensor_parallel_size {size} needs the model's name, file or folder: each rank loads its own slice, "
                "and what is loaded already lies in one process"
            )
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"tensor_parallel_size must be a whole number, at least 1, got {size!r}")
        if not 0.0 < timeout < 1e6:
            raise ValueError(f"distributed_timeout must be a number of seconds above 0, got {timeout!r}")
        rank, world = launch.torchrun_rank_and_size()
        if world > 1 and world != size:
            raise ValueError(f"torchrun started {world} processes, and tensor_parallel_size is {size}")
        device = device or default_device()
        if device.startswith("cuda") and world == 1 and torch.cuda.device_count() < size:
            raise ValueError(
                f"tensor_parallel_size {size} needs as many GPUs, and there are {torch.cuda.device_count()}: "
                "ask for fewer ranks, or for device='cpu'"
            )
        name = str(Path(model).resolve()) if Path(model).exists() else str(model)  # a worker may stand elsewhere
        self.size, self.is_torchrun, self.timeout = size, world > 1, timeout
        dtype = named_dtype(dtype or "float32", device)  # decided here: two ranks might measure otherwise
        self.order = {"do": "load", "model": name, "dtype": dtype, "seed": seed, "device": device}
        self.loaded: RankModel = load_slice(name, rank, size, dtype, seed, rank_device(device, rank))

    @property
    def model(self) -> Model:
        assert self.loaded.tokenizer
        return Model(self.loaded.transformer, self.loaded.tokenizer)


class ParallelRunner(Runner):
    """Invariant: between two calls of `run` all ranks have run the same steps, or the team is closed for good."""

    def __init__(self, sharded: ShardedModel, cache_config: CacheConfig):
        super().__init__(sharded.loaded.transformer, cache_config)
        self.sharded = sharded
        self.team: Team | None = None
        self.group: Group | None = None
        self.over: Exception = ValueError("this engine has not started its other ranks")  # why there is no team

    def start(self) -> None:
        """Start the others, and wait until each has loaded its slice and all are connected. Raises WorkerError."""
        sharded, timeout = self.sharded, self.sharded.timeout
        self.team = launch.torchrun() if sharded.is_torchrun else launch.spawn(sharded.size)
        with self._or_close():
            self.team.tell({**sharded.order, "cache_config": asdict(self.cache_config)})
            self.team.answers(launch.START_SECONDS)
            self.team.tell({"do": "connect", "timeout": timeout})
            self.group = self.team.connect(timeout, self.device)
            self.team.answers(timeout)
            parallelise(self.transformer, sharded.loaded.share, sharded.loaded.config.vocab_size, self.group)

    def run(self, output: SchedulerOutput, batch: ForwardBatch) -> Tensor:
        """One step on all ranks. Returns logits [num_sampled, vocab_size].

        Raises WorkerError, which names the rank, where one died, failed, or let the others wait for too long. Then all
        of them are gone, and every later step raises it too.
        """
        team = self._open()
        with _interrupts_wait(), self._or_close():
            team.tell(encode(output, batch))
            return super().run(output, batch)

    def reports(self) -> list[dict[str, Any]]:
        """What each rank holds and exchanged, by rank: see `worker.report`."""
        team = self._open()
        assert self.group
        team.tell({"do": "report"})
        answers = team.answers(launch.START_SECONDS)
        return [report(self, self.group), *(answers[rank] for rank in sorted(answers))]

    def close(self) -> None:
        """End the workers. Also done when this object goes, and at the interpreter's end."""
        if self.team is not None:
            self.team.close()
            self.team, self.over = None, ValueError("this engine was closed, and has no other ranks any more")

    def _open(self) -> Team:
        if self.team is None:
            raise self.over
        return self.team

    @contextmanager
    def _or_close(self) -> Iterator[None]:
        """An exception inside leaves ranks at different places: then the team is closed, and none goes on."""
        assert self.team is not None
        try:
            yield
        except BaseException as error:
            team, self.team = self.team, None
            found = team.blame(str(error)) if isinstance(error, CollectiveError) else error
            team.close(kill=True)
            self.over = found if isinstance(found, WorkerError) else WorkerError(f"rank 0 failed in a step: {found!r}")
            if found is error:
                raise
            raise found from error


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
