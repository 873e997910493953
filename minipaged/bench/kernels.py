"""Chapter 8. How fast the kernels are, beside what the machine can do and beside other kernels. Checks come first.

    minipaged bench kernels                               everything; --scale 0.1 for the figures that matter most
    minipaged bench kernels --system "torch SDPA"         ours and one peer

Decode reads K and V once and does next to nothing with them. So its measure is bytes of K and V a second, and its
ceiling what a copy on this device reaches, both directions counted. Prefill computes: its measure is the share of the
rate of a large matrix product in the same type. Both ceilings are measured here, before anything else.

A call is timed by `triton.testing.do_bench`, which empties the L2 cache in between, and takes its turn on several
copies of its tensors, so that no cache flatters it. Ours and its peers take turns; in each, 100 ms are shared out over
the rounds. A launch from Python takes tens of microseconds, and where a call is shorter than that, the time is the
launch's.

With no GPU the checks run in Triton's interpreter, at tiny sizes, and no time is taken: it would be the interpreter's.
"""

import gc
import os
import sys
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from minipaged.bench.kernel_peers import PEERS, Call, Problem, Shape, minipaged
from minipaged.bench.timing import Settings, numbers_table, save, turns
from minipaged.cdiv import cdiv
from minipaged.reference import masked_attention

LLAMA, SMOLLM2 = Shape("Llama 3 8B", 32, 8, 128), Shape("SmolLM2 135M", 9, 3, 64)
DECODE = [(n, c) for n in (1, 16, 64, 256) for c in (512, 1024, 2048, 4096, 8192, 16384, 32768)]  # sequences, context
QUICK_DECODE = [(1, 8192), (16, 2048), (64, 2048), (64, 8192)]
PREFILL = [(16, 512, 512), (4, 2048, 2048), (1, 8192, 8192), (1, 512, 8192)]  # sequences, queries, context
ROTATE_BYTES = 512 << 20  # the copies of a problem together: several times any L2 cache
SPARE_BYTES = 2 << 30  # left to workspaces

Row = dict[str, Any]
PICKED: dict[str, Any] = {"ms": median, "best": min, "worst": max}  # of a problem's times


def half_type() -> torch.dtype:
    """bfloat16; float16 on a GPU without bfloat16 instructions (before sm_80), and a line says so."""
    if torch.cuda.is_available() and torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        print(f"{torch.cuda.get_device_name()} has no bfloat16 instructions: float16 is used instead")
        return torch.float16
    return torch.bfloat16


def check(device: str, half: torch.dtype) -> None:
    """Decode, split decode, prefill, a mix and a window against the oracle, over what `write_kv` wrote."""
    from minipaged.kernels import paged_attention
    from minipaged.kernels.paged_decode import paged_decode

    def split(query: Tensor, *context: Tensor, check: bool, **options: Any) -> Tensor:  # its numbers are not checked
        return paged_decode(query, *context[:-1], num_splits=4, **options)  # all but query_start_loc

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

    pages = [cdiv(n, page) for n in lens]
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


def milliseconds(calls: list[Call], rounds: int = 1) -> list[float]:
    """Times of calls that take turns: a round's share of 100 ms."""
    from triton.testing import do_bench

    turn = cycle(calls)
    times: list[float] = do_bench(lambda: next(turn)(), warmup=25, rep=max(1, 100 // rounds), return_mode="all")
    return times


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(milliseconds([lambda: target.copy_(source)])) * 1e3


def matmul_rate(dtype: torch.dtype, n: int = 8192) -> float:
    """Operations a second of an n x n x n product."""
    left, right = torch.randn(2, n, n, dtype=dtype, device="cuda")
    return 2 * n**3 / median(milliseconds([lambda: left @ right])) * 1e3


def measure(problem: Problem, peers: list[str], rounds: int, told: set[str]) -> Row:
    """Milliseconds of ours and of each peer, and the best and worst of them. A peer that is absent, wrong or too large
    is left out; it is said once."""
    copies = max(1, min(32, cdiv(ROTATE_BYTES, problem.kv_bytes)))
    makers = {"minipaged": minipaged, **{name: PEERS[name] for name in peers}}
    times: dict[str, list[float]] = {name: [] for name in makers}
    ours: Tensor | None = None
    for number, name in turns(makers, rounds, f"{problem.shape.name}, {problem.num_seqs} x {problem.context}"):
        if number and not times[name]:
            continue  # it failed
        calls: list[Call] = []
        try:
            gc.collect()
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            if copies * problem.kv_bytes + SPARE_BYTES > free:
                raise MemoryError(f"{copies * problem.kv_bytes / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB")
            ours = minipaged(problem, 0)().float() if ours is None else ours
            calls = [makers[name](problem, seed) for seed in range(copies)]
            if not (worst := float((calls[0]().float() - ours).abs().max())) <= 0.05 * float(ours.abs().max()):
                raise ArithmeticError(f"its answer differs from ours by {worst:.2g}")
            found = milliseconds(calls, rounds)
            times[name] = found if number <= 1 else times[name] + found
        except Exception as error:  # whatever a peer raises, the others are timed
            times[name] = []
            reason = f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            if reason not in told:
                told.add(reason)
                print(f"  skipped at {problem.num_seqs} x {problem.context}: {reason}", file=sys.stderr)
    row: Row = {"shape": problem.shape.name, "num_seqs": problem.num_seqs, "context": problem.context}
    row |= {"num_queries": problem.num_queries, "kv_bytes": problem.kv_bytes, "flops": problem.flops}
    return row | {key: {name: pick(found) for name, found in times.items() if found} for key, pick in PICKED.items()}


def print_table(console: Console, rows: list[Row], title: str, ceiling: float, amount: str, unit: str) -> None:
    """One line a problem: our rate and its share of the ceiling, then the peers' rates. amount: kv_bytes or flops."""
    scale, names = 1e9 if unit == "GB/s" else 1e12, list(dict.fromkeys(name for row in rows for name in row["ms"]))
    columns = ("sequences", "queries", "context", "minipaged, us", "best to worst", "of ceiling")
    table = numbers_table(f"{title}, {unit}; ceiling {ceiling / scale:,.0f}", *columns, *names, words=0)
    for row in rows:
        rate = {name: row[amount] / ms * 1e3 for name, ms in row["ms"].items()}
        cells = [str(row["num_seqs"]), str(row["num_queries"]), str(row["context"]), "-", "-", "-"]
        if "minipaged" in rate:
            ms, best, worst = (f"{1e3 * row[key]['minipaged']:,.0f}" for key in PICKED)
            cells[3:] = ms, f"{best} to {worst}", f"{rate['minipaged'] / ceiling:.0%}"
        table.add_row(*cells, *(f"{rate[name] / scale:,.0f}" if name in rate else "-" for name in names))
    console.print(table)


def run(console: Console, out: Path | None, settings: Settings) -> None:
    """Check the kernels, then time decode and prefill against a copy, a matrix product and other kernels."""
    peers = list(settings.systems or PEERS)
    if unknown := [name for name in peers if name not in PEERS]:
        raise ValueError(f"system must be one of {', '.join(PEERS)}, got {unknown[0]!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # triton is not imported yet: the kernels are, in check()
    elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set: unset it, or the interpreter is what is timed")
    half = half_type()
    check(device, half)
    if device == "cpu":
        print("no timing was taken: there is no GPU")
        return
    import triton

    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    bandwidth, matmul = copy_bandwidth(), matmul_rate(half)
    print(f"{machine}: copy {bandwidth / 1e9:,.0f} GB/s, {half} matmul {matmul / 1e12:,.0f} TFLOP/s")
    told: set[str] = set()
    rows: list[Row] = []
    for shape in (LLAMA, SMOLLM2):
        decode = [Problem(shape, n, c, half, device) for n, c in (QUICK_DECODE if settings.scale < 1 else DECODE)]
        prefill = [Problem(shape, n, c, half, device, q) for n, q, c in PREFILL]
        for title, problems, ceiling, amount, unit in (
            ("decode", decode, bandwidth, "kv_bytes", "GB/s"),
            ("prefill", prefill, matmul, "flops", "TFLOP/s"),
        ):
            found = [measure(problem, peers, settings.rounds, told) for problem in problems]
            print_table(console, found, f"{title}, {shape.name}", ceiling, amount, unit)
            rows += found
            # After each table: a run that is cut short leaves what it has.
            save(out, {"machine": machine, "copy": bandwidth, "matmul": matmul, "rows": rows})
