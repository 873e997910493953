"""Chapter 8. What the compiler makes of each kernel, for eight kinds of GPU and on a machine that has none.

    python -m minipaged.bench.kernel_report --targets sm_90,gfx942 --head-dim 64,128

A launcher is called as on a GPU, with tensors of device `meta` that have shapes and strides and no memory. Triton's own
launch code then reads the types of the arguments and which of them 16 divides, and compiles; only the last step, the
launch, is left out. So the table shows the code that the launcher would run: its tile, warps and stages.

    registers   of one thread. 255 is the most there is, 512 on AMD
    spills      bytes of a thread's stack. Registers that did not fit go there and back, through memory
    shared      bytes of shared memory of one program
    loads       width in bits of the loads from global memory, and how many instructions have it. 128 is the widest
                before Blackwell: 16 bytes a thread, and a warp reads 512 bytes with one instruction
    mma         the tensor-core instruction, and how many. HGMMA is wgmma, Hopper's, which takes 64 rows or more;
                UTCHMMA is Blackwell's (sm_100); HMMA is that of all others, and takes 16.
                On sm_75 Triton has none: products are multiply-adds. bfloat16, which has no instructions, is converted
    buffers     how many tiles of K, or of V, shared memory holds. More than one: the next is on its way already

Registers and spills come from cuobjdump, instructions from nvdisasm (Triton brings both); AMD's from its assembly.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
HEADS, KV_HEADS, BLOCK_SIZE = 32, 8, 16  # Llama 3 8B
SEQS, CONTEXT, NEW_TOKENS = 64, 2048, 512  # 512 new tokens a sequence in prefill
SPLITS, COPIES = 8, 2


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. The counts are of instructions in the program, not of how often they run."""

    kernel: str
    head_dim: int
    target: str
    warps: int
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    loads: dict[int, int]  # width in bits -> instructions
    mma: dict[str, int]  # name -> instructions
    buffers: int  # 0: shared memory holds no tile of a loop


def compile_all(targets: list[str], head_dims: list[int], keep: Path | None = None) -> Iterator[Compiled]:
    """Every kernel of every launcher, in float16. keep: a folder for TTIR, TTGIR, PTX and assembly of each."""
    for head_dim in head_dims:
        for target in targets:
            with _compiling_for(target) as compiled:
                for launch in _launches(head_dim):
                    compiled.clear()
                    launch()
                    for kernel in compiled:
                        split = "_split" if kernel is not compiled[-1] else ""  # decode, where a merge follows
                        yield _inspect(kernel, kernel.metadata.name + split, head_dim, target, keep)


def _launches(head_dim: int) -> list[Callable[[], object]]:
    """Each launcher once, with a batch of Llama 3 8B's shape in a pool of real size (none of it exists)."""
    import torch

    from minipaged.kernels.block_copy import copy_blocks
    from minipaged.kernels.kv_write import write_kv
    from minipaged.kernels.paged_decode import paged_decode
    from minipaged.kernels.paged_prefill import paged_prefill

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    key_cache = empty(100_000, KV_HEADS, BLOCK_SIZE, head_dim)  # 3.3 GB at head size 128
    value_cache = torch.empty_like(key_cache)
    tables = empty(SEQS, CONTEXT // BLOCK_SIZE, dtype=torch.int32)
    seq_lens, starts = empty(SEQS, dtype=torch.int32), empty(SEQS + 1, dtype=torch.int32)
    context = key_cache, value_cache, tables, seq_lens
    query, prompt = empty(SEQS, HEADS, head_dim), empty(SEQS * NEW_TOKENS, HEADS, head_dim)
    key, value = empty(SEQS, KV_HEADS, head_dim), empty(SEQS, KV_HEADS, head_dim)
    slots, copies = empty(SEQS, dtype=torch.int64), empty(COPIES, 2, dtype=torch.int64)
    scale = head_dim**-0.5
    return [
        lambda: write_kv(key, value, key_cache, value_cache, slots),
        lambda: copy_blocks(key_cache, value_cache, copies),
        lambda: paged_decode(query, *context, scale=scale),
        lambda: paged_decode(query, *context, scale=scale, num_splits=SPLITS),
        lambda: paged_prefill(prompt, *context, starts, scale=scale, max_query_len=NEW_TOKENS),
    ]


class _NoDriver:
    """As much of a driver as Triton asks while it compiles."""

    def __init__(self, target: Any):
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend}:{self._target.arch}"  # kernels are cached by device, so by target here

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _compiling_for(target: str) -> Iterator[list[Any]]:
    """Inside, a launch compiles for `target`, adds to the list, and does not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    before = driver._active
    driver.set_active(_NoDriver(gpu))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before


def _inspect(kernel: Any, name: str, head_dim: int, target: str, keep: Path | None) -> Compiled:
    code = dict(kernel.asm)
    if "cubin" in code:
        code["sass"], usage = _disassemble(code["cubin"])
        registers, spills = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    else:
        code["sass"] = code["amdgcn"]
        found = {word: int(n) for word, n in re.findall(r"\.(\w+):\s+(\d+)\s*$", code["amdgcn"], re.MULTILINE)}
        registers, spills = found["vgpr_count"], found["private_segment_fixed_size"]
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        for kind in ("ttir", "ttgir", "ptx", "sass"):
            if kind in code:
                (keep / f"{name}.{head_dim}.{target}.{kind}").write_text(code[kind])
    return Compiled(
        kernel=name,
        head_dim=head_dim,
        target=target,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        loads=_load_widths(code["sass"]),
        mma=dict(Counter(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma)(?=[_.\s])", code["sass"]))),
        buffers=_buffers(code["ttgir"]),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The instructions, and the line of resource usage."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ["nvdisasm", "-c"], ["cuobjdump", "--dump-resource-usage"]
        sass, usage = (
            subprocess.run([str(tools / name), flag, file.name], check=True, capture_output=True, text=True).stdout
            for name, flag in commands
        )
    return sass, usage


def _load_widths(assembly: str) -> dict[int, int]:
    """LDG loads into registers, LDGSTS straight into shared memory (cp.async). 32 bits where nothing is said."""
    widths: Counter[int] = Counter()
    for modifiers in re.findall(r"\bLDG(?:STS)?\.E([.\w]*)", assembly):
        said = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        widths[int(said[1]) if said else 32] += 1
    for said in re.findall(r"\b(?:global|buffer)_load_(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte)", assembly):
        many = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ubyte": 8}
        widths[many.get(said, 16)] += 1
    return dict(sorted(widths.items(), reverse=True))


def _buffers(ttgir: str) -> int:
    """A loop's tiles are allocated before it as [buffers, rows, columns]."""
    found = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)
    return max(map(int, found), default=0)


def _print_table(rows: list[Compiled]) -> None:
    from rich.console import Console
    from rich.table import Table

    def counts(found: dict[Any, int]) -> str:
        return "  ".join(f"{name}:{count}" for name, count in found.items()) or "-"

    table = Table(title="float16, 32 query heads, 8 KV heads", title_justify="left")
    for name in ("kernel", "head size", "target", "warps", "registers", "spills", "shared", "loads", "mma", "buffers"):
        words = name in ("kernel", "target", "loads", "mma")
        table.add_column(name, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        numbers = map(str, (row.warps, row.registers, row.spills, row.shared))
        made = counts(row.loads), counts(row.mma), str(row.buffers or "-")
        table.add_row(row.kernel, str(row.head_dim), row.target, *numbers, *made)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(
    targets: Annotated[str, typer.Option(help="separated by commas")] = ",".join(TARGETS),
    head_dim: Annotated[str, typer.Option(help="separated by commas")] = "64,128",
    json_out: Annotated[Path | None, typer.Option("--json", help="write the rows here too")] = None,
    keep: Annotated[Path | None, typer.Option(help="a folder for TTIR, TTGIR, PTX and assembly of each kernel")] = None,
) -> None:
    """Compile every kernel, with no GPU, and print registers, spills, shared memory, loads, mma and buffers."""
    chosen = targets.split(",")
    for target in chosen:
        if not re.fullmatch(r"sm_\d+|gfx\w+", target):
            raise typer.BadParameter(f"{target!r} is no target; known ones are {', '.join(TARGETS)}")
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):  # it is read when Triton is imported, below
        said = "TRITON_INTERPRET is set, and what is interpreted cannot be compiled: going on without it"
        print(said, file=sys.stderr)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    rows = list(compile_all(chosen, [int(size) for size in head_dim.split(",")], keep))
    kernels = list(dict.fromkeys(row.kernel for row in rows))  # in the order of the launches
    rows.sort(key=lambda row: (kernels.index(row.kernel), row.head_dim, chosen.index(row.target)))
    _print_table(rows)
    if json_out:
        json_out.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    typer.run(main)
