"""Ours beside transformers and vLLM, in one run: every system in a process of its own, taking turns.

Figures of two runs cannot be compared on a machine that others use too. So all systems are loaded first, then each
workload goes round them again and again, and what is reported is the median, and the ratio to the first system.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from minipaged.bench.export import exported_model
from minipaged.bench.timing import Settings, bar, numbers_table, save, this_machine, turns
from minipaged.bench.workloads import Workload, workload

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
        with bar(f"loading in {dtype}", len(systems)) as advance:
            for system in systems:
                model = str(exported_model()) if system in PEERS else "smollm2-135m"
                running[system] = Worker(system, model, dtype, pythons.get(system, sys.executable), threads)
                running[system].ask()
                advance()
        yield running
    finally:
        for worker in running.values():
            worker.close()


def installed_peers(pythons: dict[str, str]) -> list[str]:
    """The peers that can be run: in this interpreter, or in one that was named."""
    return [peer for peer in PEERS if peer in pythons or find_spec(peer)]


def run(
    console: Console, out: Path | None, settings: Settings, works: list[str], dtypes: list[str], pythons: dict[str, str]
) -> None:
    """Every workload through every system, and a table of each. pythons: interpreters of peers."""
    for dtype in dtypes:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if unknown := set(settings.systems) - {*OURS, *PEERS}:
        raise ValueError(f"system must be one of {', '.join((*OURS, *PEERS))}, got {min(unknown)!r}")
    workloads = [workload(name, settings.scale) for name in works]
    systems = list(settings.systems) or ["paged", "paged, prefix cache", "contiguous", *installed_peers(pythons)]
    for work in workloads:
        if work.arrivals and set(systems) <= set(ALL_AT_ONCE):
            raise ValueError(f"requests of workload {work.name} arrive one by one: {', '.join(systems)} cannot run it")
    threads = settings.threads or os.cpu_count() or 1
    found: dict[str, Any] = {"machine": this_machine(), "threads": threads, "rounds": settings.rounds, "timings": []}
    console.print(f"{found['machine']['processor']}, {threads} threads", highlight=False)
    for dtype in dtypes:
        with workers(systems, dtype, pythons, threads) as running:
            for work in workloads:
                timings: list[Timing] = []
                before = found["timings"]
                for timings in measured(work, systems, dtype, settings.rounds, running):
                    rates = [vars(timing) | {"tokens_per_second": timing.tokens_per_second} for timing in timings]
                    found["timings"] = before + rates
                    save(out, found)  # after each round: an interrupt loses none that is measured
                title = f"Workload {work.name}, {dtype}, {len(work.prompts)} prompts, {work.num_new} new tokens"
                console.print(_table(title, timings))


def measured(
    work: Workload, systems: list[str], dtype: str, rounds: int, running: dict[str, Worker]
) -> Iterator[list[Timing]]:
    """The timings of a workload so far, after each of its rounds."""
    timings = {
        system: Timing(work.name, system, dtype, work.num_new)
        for system in systems
        if not (work.arrivals and system in ALL_AT_ONCE)
    }
    line, tokens = json.dumps(asdict(work)), dict[str, list[list[int]]]()
    for number, system in turns(timings, rounds, f"workload {work.name}, {dtype}"):
        found, timing = running[system].ask(line), timings[system]
        tokens[system] = found["tokens"]
        if not number:
            continue
        timing.seconds.append(found["seconds"])
        timing.peak_bytes = max(timing.peak_bytes, found["peak_bytes"])
        if "first_token_seconds" in found:
            timing.first_token_seconds.append(found["first_token_seconds"])
        timing.slots_with_tokens = found.get("slots_with_tokens")
        timing.scheduler_share = found.get("scheduler_share")
        if all(len(each.seconds) == number for each in timings.values()):
            slow = tokens.get("recompute") or tokens.get("contiguous") or tokens[next(iter(timings))]
            for name, theirs in tokens.items():
                pairs = [pair for a, b in zip(slow, theirs, strict=True) for pair in zip(a, b, strict=False)]
                timings[name].equal_tokens = sum(a == b for a, b in pairs) / len(pairs)
            yield [*timings.values()]


def _table(title: str, timings: list[Timing]) -> Table:
    columns = "tokens/s", "slowest to quickest", "ours is", "first token", "equal tokens", "peak memory"
    table = numbers_table(title, "system", *columns)
    for timing in timings:
        rates = [timing.num_new / seconds for seconds in timing.seconds]
        first = timing.first_token_seconds
        table.add_row(
            timing.system,
            f"{timing.tokens_per_second:.1f}",
            f"{min(rates):.1f} to {max(rates):.1f}",
            f"{timings[0].tokens_per_second / timing.tokens_per_second:.2f} x",
            f"{median(first):.2f} s" if first else "-",
            f"{timing.equal_tokens:.1%}",
            f"{timing.peak_bytes / 2**20:.0f} MiB",
        )
    return table
