"""Ours beside transformers and vLLM, in one run: every system in a process of its own, taking turns.

Figures of two runs cannot be compared on a machine that others use too. So all systems are loaded first, then each
workload goes round them again and again, and what is reported is the median, and the ratio to the first system.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from minipaged.bench.export import exported_model
from minipaged.bench.workloads import Workload
from minipaged.processor import processor

OURS = ("paged", "contiguous", "recompute", "paged, prefix cache", "paged, static batches")
PEERS = ("transformers", "vllm")
ALL_AT_ONCE = (*PEERS, "recompute")  # called once, with all prompts
WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Timing:
    """One system on one workload: a number for each round."""

    workload: str
    system: str
    dtype: str
    num_new: int
    seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    equal_tokens: float | None = None  # share of tokens equal to those of the slowest of our ways, position by position
    slots_with_tokens: float | None = None
    scheduler_share: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.num_new / median(self.seconds)


class Worker:
    """A system in its process. Invariant: it answers one line for each line that it is sent."""

    def __init__(self, system: str, model: str, dtype: str, python: str, threads: int):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if system in PEERS:  # what `import minipaged` asks of idle threads is ours: a peer runs as its users run it
            env.pop("GOMP_SPINCOUNT", None)
        self.system, self.words = system, tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed below)
        self.process = subprocess.Popen(
            [python, str(WORKER), system, model, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,  # a file takes whatever a peer says; a pipe would be full at some point
            text=True,
            env=env,
        )

    def ask(self, line: str | None = None) -> dict[str, Any]:
        """Send a workload; without one, wait until it is ready. Raises ValueError, with its last words, if it died."""
        assert self.process.stdin and self.process.stdout
        if line is not None:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.words.seek(0)
            said = self.words.read().strip().splitlines()
            raise ValueError(f"{self.system} ended: {said[-1] if said else 'without a word'}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.words.close()


@contextmanager
def workers(systems: list[str], dtype: str, pythons: dict[str, str], threads: int) -> Iterator[dict[str, Worker]]:
    """All systems, loaded one after the other. However this ends, no process is left."""
    running: dict[str, Worker] = {}
    try:
        for system in systems:
            model = str(exported_model()) if system in PEERS else "smollm2-135m"
            running[system] = Worker(system, model, dtype, pythons.get(system, sys.executable), threads)
            running[system].ask()
        yield running
    finally:
        for worker in running.values():
            worker.close()


def this_machine() -> dict[str, Any]:
    """What a file of figures says of where they were taken."""
    return {
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "processor": processor(),
    }


def installed_peers(pythons: dict[str, str]) -> list[str]:
    """The peers that can be run: in this interpreter, or in one that was named."""
    return [peer for peer in PEERS if peer in pythons or find_spec(peer)]


def compare(
    workloads: list[Workload],
    systems: list[str],
    dtype: str,
    rounds: int,
    pythons: dict[str, str],
    threads: int,
    tell: Callable[[str], None],
) -> Iterator[list[Timing]]:
    """Every workload through every system, `rounds` times, taking turns; a first round warms up and is not counted.

    Yields the timings of a workload so far, after each of its rounds.
    """
    with workers(systems, dtype, pythons, threads) as running:
        for work in workloads:
            line = json.dumps(asdict(work))
            these = {
                system: Timing(work.name, system, dtype, work.num_new)
                for system in systems
                if not (work.arrivals and system in ALL_AT_ONCE)
            }
            for number in range(rounds + 1):
                tokens: dict[str, list[list[int]]] = {}
                for system, timing in these.items():
                    tell(f"{dtype}, workload {work.name}: {system}, " + (f"round {number}" if number else "warming up"))
                    found = running[system].ask(line)
                    tokens[system] = found["tokens"]
                    if number:
                        timing.seconds.append(found["seconds"])
                        timing.peak_bytes = max(timing.peak_bytes, found["peak_bytes"])
                        if "first_token_seconds" in found:
                            timing.first_token_seconds.append(found["first_token_seconds"])
                        timing.slots_with_tokens = found.get("slots_with_tokens")
                        timing.scheduler_share = found.get("scheduler_share")
                if number and these:
                    slow = tokens.get("recompute") or tokens.get("contiguous") or next(iter(tokens.values()))
                    for system, theirs in tokens.items():
                        pairs = [pair for a, b in zip(slow, theirs, strict=True) for pair in zip(a, b, strict=False)]
                        these[system].equal_tokens = sum(a == b for a, b in pairs) / len(pairs)
                    yield [*these.values()]
