"""Chapter 8. How fast the kernels are, beside what the machine can do and beside other kernels. Checks come first.

    python -m minipaged.kernels.bench                       everything; --quick for the figures that matter most
    python -m minipaged.kernels.bench --check-only          no timing
    python -m minipaged.kernels.bench --peers "torch SDPA"  ours and one peer

Decode reads K and V once and does next to nothing with them. So its measure is bytes of K and V a second, and its
ceiling what a copy on this device reaches, both directions counted. Prefill computes: its measure is the share of the
rate of a large matrix product in the same type. Both ceilings are measured here, before anything else.

Every call is timed by `triton.testing.do_bench`, which empties the L2 cache in between, and takes its turn on several
copies of its tensors, so that no cache flatters it: median of 100 ms. A launch from Python takes tens of microseconds,
and where a call is shorter than that, the time is the launch's.

With no GPU the checks run in Triton's interpreter, at tiny sizes, and no time is taken: it would be the interpreter's.
"""

import gc
import json
import os
import sys
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from minipaged.kernels.bench_peers import PEERS, Call, Problem, Shape, minipaged
from minipaged.reference import masked_attention

LLAMA, SMOLLM2 = Shape("Llama 3 8B", 32, 8, 128), Shape("SmolLM2 135M", 9, 3, 64)
DECODE = [(n, c) for n in (1, 16, 64, 256) for c in (512, 1024, 2048, 4096, 8192, 16384, 32768)]  # sequences, context
QUICK_DECODE = [(1, 8192), (16, 2048), (64, 2048), (64, 8192)]
PREFILL = [(16, 512, 512), (4, 2048, 2048), (1, 8192, 8192), (1, 512, 8192)]  # sequences, queries, context
ROTATE_BYTES = 512 << 20  # the copies of a problem together: several times any L2 cache
SPARE_BYTES = 2 << 30  # left to workspaces

Row = dict[str, Any]


def half_type() -> torch.dtype:
    """bfloat16; float16 on a GPU without bfloat16 instructions (before sm_80), and a line says so."""
    if torch.cuda.is_available() and torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        print(f"{torch.cuda.get_device_name()} has no bfloat16 instructions: float16 is used instead")
        return torch.float16
    return torch.bfloat16


def check(device: str, half: torch.dtype) -> None:
    """Decode, split decode, prefill, a mix and a window against the oracle, over what `write_kv` wrote."""
    from minipaged.kernels import paged_attention
    from minipaged.kernels.paged_decode_split import paged_decode_split

    def split(query: Tensor, *context: Tensor, **options: Any) -> Tensor:
        return paged_decode_split(query, *context[:-1], num_splits=4, **options)  # all but query_start_loc

    rng = np.random.default_rng(0)
    # Interpreted bfloat16 is wrong.
    dtypes = list(dict.fromkeys([torch.float16, half])) if device == "cuda" else [torch.float16]
    cases: list[tuple[Any, int | None, tuple[int, ...], tuple[int, ...]]] = [
        (paged_attention, None, (1, 17, 300), (1, 1, 1)),
        (split, None, (1, 17, 300), (1, 1, 1)),
        (split, 100, (1, 17, 300), (1, 1, 1)),
        (paged_attention, None, (40, 33, 7), (40, 5, 1)),
        (paged_attention, 20, (40, 33, 7), (40, 5, 1)),
    ]
    for shape in (LLAMA, SMOLLM2) if device == "cuda" else (SMOLLM2,):
        for dtype in dtypes:
            for attend, window, lens, counts in cases:
                error = _error(attend, rng, shape, dtype, device, window, lens, counts)
                if not error <= (2e-3 if dtype == torch.float16 else 2e-2):
                    raise SystemExit(f"WRONG: {shape.name}, {dtype}, window {window}, {lens}: off by {error:.2g}")
    print(f"checked on {device} against the oracle: decode, split decode, prefill, mix, window, write")


def _error(
    attend: Any, rng: np.random.Generator, shape: Shape, dtype: torch.dtype, device: str,
    window: int | None, lens: tuple[int, ...], counts: tuple[int, ...],
) -> float:  # fmt: skip
    """The largest difference from the oracle. Slots that no token owns are NaN, and the output before the call."""
    from minipaged.kernels import write_kv

    page, scale = 16, shape.head_dim**-0.5

    def random(tokens: int, heads: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((tokens, heads, shape.head_dim))).to(dtype)

    pages = [-(-n // page) for n in lens]
    order = rng.permutation(sum(pages) + 3).tolist()
    tables = torch.full((len(lens), max(pages)), -1, dtype=torch.int32)
    caches = torch.full((2, len(order), shape.num_kv_heads, page, shape.head_dim), torch.nan, dtype=dtype).to(device)
    queries, expected = [], []
    for seq, (seq_len, count) in enumerate(zip(lens, counts, strict=True)):
        tables[seq, : pages[seq]] = torch.tensor([order.pop() for _ in range(pages[seq])])
        query = random(count, shape.num_heads)
        key, value = random(seq_len, shape.num_kv_heads), random(seq_len, shape.num_kv_heads)
        position = torch.arange(seq_len)
        slots = tables[seq].long()[position // page] * page + position % page
        write_kv(key.to(device), value.to(device), caches[0], caches[1], slots.to(device))
        queries.append(query)
        arrays = (tensor.double().numpy() for tensor in (query, key, value))
        expected.append(masked_attention(*arrays, scale=scale, sliding_window=window))
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    query = torch.cat(queries).to(device)
    out = torch.full_like(query, torch.nan)
    arguments = [tensor.to(device) for tensor in (tables, seq_lens, starts)]
    attend(query, caches[0], caches[1], *arguments, scale=scale, sliding_window=window, out=out, check=True)
    return float((out.double().cpu() - torch.from_numpy(np.concatenate(expected))).abs().max())


def milliseconds(calls: list[Call]) -> float:
    """Median time of a call; the calls take turns."""
    from triton.testing import do_bench

    turn = cycle(calls)
    return float(do_bench(lambda: next(turn)(), warmup=25, rep=100, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds([lambda: target.copy_(source)]) * 1e3


def matmul_rate(dtype: torch.dtype, n: int = 8192) -> float:
    """Operations a second of an n x n x n product."""
    left, right = torch.randn(2, n, n, dtype=dtype, device="cuda")
    return 2 * n**3 / milliseconds([lambda: left @ right]) * 1e3


def measure(problem: Problem, peers: list[str], told: set[str]) -> Row:
    """Milliseconds of ours and of each peer. A peer that is absent, wrong or too large is left out; it is said once."""
    row: Row = {"shape": problem.shape.name, "num_seqs": problem.num_seqs, "context": problem.context}
    row |= {"num_queries": problem.num_queries, "kv_bytes": problem.kv_bytes, "flops": problem.flops, "ms": {}}
    copies = max(1, min(32, -(-ROTATE_BYTES // problem.kv_bytes)))
    ours: Tensor | None = None
    for name, prepare in {"minipaged": minipaged, **{name: PEERS[name] for name in peers}}.items():
        calls: list[Call] = []
        try:
            gc.collect()
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            if copies * problem.kv_bytes + SPARE_BYTES > free:
                raise MemoryError(f"{copies * problem.kv_bytes / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB")
            calls = [prepare(problem, seed) for seed in range(copies)]
            out = calls[0]().float()
            if ours is None:
                ours = out
            elif not (worst := float((out - ours).abs().max())) <= 0.05 * float(ours.abs().max()):
                raise ArithmeticError(f"its answer differs from ours by {worst:.2g}")
            row["ms"][name] = milliseconds(calls)
        except Exception as error:  # whatever a peer raises, the others are timed
            reason = f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            if reason not in told:
                told.add(reason)
                print(f"  skipped at {problem.num_seqs} x {problem.context}: {reason}", file=sys.stderr)
    return row


def print_table(rows: list[Row], title: str, ceiling: float, amount: str, unit: str, names: list[str]) -> None:
    """One line a problem: our rate and its share of the ceiling, then the peers' rates. amount: kv_bytes or flops."""
    from rich.console import Console
    from rich.table import Table

    scale = 1e9 if unit == "GB/s" else 1e12
    table = Table(title=f"{title}; ceiling {ceiling / scale:,.0f} {unit}", title_justify="left")
    for name in ("sequences", "queries", "context", "minipaged, us", unit, "of ceiling", *names[1:]):
        table.add_column(name, justify="right")
    for row in rows:
        rate = {name: row[amount] / ms * 1e3 for name, ms in row["ms"].items()}
        cells = [str(row["num_seqs"]), str(row["num_queries"]), str(row["context"]), "-", "-", "-"]
        if "minipaged" in rate:
            mine, us = rate["minipaged"], row["ms"]["minipaged"] * 1e3
            cells[3:] = f"{us:,.0f}", f"{mine / scale:,.0f}", f"{mine / ceiling:.0%}"
        table.add_row(*cells, *(f"{rate[name] / scale:,.0f}" if name in rate else "-" for name in names[1:]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="few sizes")] = False,
    check_only: Annotated[bool, typer.Option("--check-only", help="no timing")] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="write every figure here too")] = None,
    peers: Annotated[str, typer.Option(help="separated by commas")] = ",".join(PEERS),
) -> None:
    """Check the kernels, then time decode and prefill against a copy, a matrix product and other kernels."""
    wanted = [name for name in peers.split(",") if name]
    for name in wanted:
        if name not in PEERS:
            raise typer.BadParameter(f"{name!r} is no peer; there are {', '.join(PEERS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # triton is not imported yet: the kernels are, in check()
    elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set: unset it, or the interpreter is what is timed")
    half = half_type()
    check(device, half)
    if device == "cpu" or check_only:
        print("no timing was taken" + (": there is no GPU" if device == "cpu" else ""))
        return
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    machine = f"{torch.cuda.get_device_name()}, {versions}"
    bandwidth, matmul = copy_bandwidth(), matmul_rate(half)
    print(f"{machine}: copy {bandwidth / 1e9:,.0f} GB/s, {half} matmul {matmul / 1e12:,.0f} TFLOP/s")
    told: set[str] = set()
    rows: list[Row] = []
    for shape in (LLAMA, SMOLLM2):
        problems = [Problem(shape, n, c, half, device) for n, c in (QUICK_DECODE if quick else DECODE)]
        decode = [measure(problem, wanted, told) for problem in problems]
        print_table(decode, f"decode, {shape.name}", bandwidth, "kv_bytes", "GB/s", ["minipaged", *wanted])
        problems = [Problem(shape, n, c, half, device, q) for n, q, c in PREFILL]
        prefill = [measure(problem, wanted, told) for problem in problems]
        print_table(prefill, f"prefill, {shape.name}", matmul, "flops", "TFLOP/s", ["minipaged", *wanted])
        rows += decode + prefill
        if json_out:  # after each shape: a run that is cut short leaves what it has
            figures = {"machine": machine, "copy": bandwidth, "matmul": matmul, "rows": rows}
            json_out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
