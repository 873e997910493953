"""Chapter 8. What the compile report predicts on three GPUs. All of it is computed: nothing here was measured.

    bytes        what the launch must move at least: each byte of its tensors once
    bound        that, at the memory's speed. Prefill computes longer than it reads: its bound is far below its time
    occupancy    warps that a multiprocessor holds at once, of those it could: as many programs as registers, shared
                 memory, warps and the limit of programs allow

Registers are given to a warp in steps of 256, and from sm_80 on each program takes 1 KiB of shared memory more.
Sources: CUDA C++ Programming Guide, compute capabilities; NVIDIA's data sheets of T4, A100 40 GB SXM and H100 SXM.
"""

from dataclasses import dataclass
from typing import Any

from minipaged.bench.kernel_report import BLOCK_SIZE, CONTEXT, COPIES, HEADS, KV_HEADS, NEW_TOKENS, SEQS, SPLITS
from minipaged.cdiv import cdiv

REGISTERS = 65_536  # of a multiprocessor, on all three


@dataclass(frozen=True)
class GPU:
    target: str
    bandwidth: float  # bytes a second
    shared: int  # bytes of a multiprocessor
    reserved: int  # bytes of them that each program takes beside its own
    warps: int  # at most, on a multiprocessor
    programs: int


GPUS = {
    "T4": GPU("sm_75", 320e9, 64 << 10, 0, 32, 16),
    "A100": GPU("sm_80", 1555e9, 164 << 10, 1 << 10, 64, 32),
    "H100": GPU("sm_90", 3350e9, 228 << 10, 1 << 10, 64, 32),
}


def bytes_moved(kernel: str, head_dim: int) -> int:
    """Of the report's launch of this kernel, in float16; the splits' partial results are float32."""
    row = head_dim * 2
    context = 2 * SEQS * CONTEXT * KV_HEADS * row  # K and V
    queries_and_answers = 2 * SEQS * HEADS * row
    partial = SEQS * HEADS * SPLITS * (head_dim + 2) * 4
    return {
        "write_kv_kernel": 4 * SEQS * KV_HEADS * row,  # K and V, read and written
        "copy_blocks_kernel": 4 * COPIES * KV_HEADS * BLOCK_SIZE * row,
        "paged_decode_kernel": context + queries_and_answers,
        "paged_decode_kernel_split": context + queries_and_answers // 2 + partial,
        "merge_splits_kernel": partial + queries_and_answers // 2,
        "paged_prefill_kernel": context + NEW_TOKENS * queries_and_answers,
    }[kernel]


def programs_at_once(gpu: GPU, registers: int, shared: int, warps: int) -> int:
    """Of one multiprocessor; 0 where not even one fits."""
    a_warp = cdiv(max(registers, 1) * 32, 256) * 256
    limits = [gpu.programs, gpu.warps // warps, REGISTERS // a_warp // warps]
    if shared + gpu.reserved > 0:
        limits.append(gpu.shared // (shared + gpu.reserved))
    return min(limits)


def predicted(report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kernel of the report (the JSON of `minipaged.bench.kernel_report`) and each of the three GPUs."""
    rows = []
    for name, gpu in GPUS.items():
        for found in report:
            if found["target"] != gpu.target:
                continue
            moved = bytes_moved(found["kernel"], found["head_dim"])
            programs = programs_at_once(gpu, found["registers"], found["shared"], found["warps"])
            rows.append(
                {
                    "GPU": name,
                    "kernel": found["kernel"].replace("_kernel", ""),
                    "moved [MB]": round(moved / 1e6, 2),
                    "bound [us]": round(moved / gpu.bandwidth * 1e6, 1),
                    "programs at once": programs,
                    "occupancy": f"{programs * found['warps'] / gpu.warps:.0%}",
                }
            )
    return rows
