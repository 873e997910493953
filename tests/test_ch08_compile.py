"""Chapter 8. What the compiler makes of the kernels, on a machine with no GPU: the report, held to what a GPU wants.

The report runs once, in a process of its own: here the kernels are interpreted, and what is interpreted cannot be
compiled. Its counts are of the code that the launchers would run.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

os.environ.update({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})  # before triton is imported
pytest.importorskip("triton", reason="the kernels need Triton, which runs on Linux")

from minipaged.kernels.launch import TARGETS

pytestmark = [pytest.mark.ch08, pytest.mark.slow]

HEAD_DIMS = (64, 128)
DECODE = ("paged_decode_kernel", "paged_decode_kernel_split")
ATTENTION = (*DECODE, "paged_prefill_kernel")
IDS = re.compile(r"block_tables_ptr|slot_mapping_ptr|copies_ptr")

for_each = pytest.mark.parametrize(("target", "head_dim"), [(t, d) for t in TARGETS for d in HEAD_DIMS])
on_tensor_cores = pytest.mark.parametrize(
    ("target", "head_dim"), [(t, d) for t in ("sm_80", "sm_90") for d in HEAD_DIMS]
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(kernel, target, head_dim) -> the row, and the folder of the code."""
    folder = tmp_path_factory.mktemp("code")
    command = [sys.executable, "-m", "minipaged.bench.kernel_report", "--targets", ",".join(TARGETS)]
    command += ["--head-dim", ",".join(map(str, HEAD_DIMS)), "--json", str(folder / "rows.json"), "--keep", str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    assert "going on without it" in done.stderr, "the report says that it does not use the interpreter"
    rows = json.loads((folder / "rows.json").read_text())
    return {(row["kernel"], row["target"], row["head_dim"]): row for row in rows}, folder


@for_each
def test_no_kernel_spills(report, target, head_dim):
    """A spilled register goes through memory in every step of the loop."""
    rows = [row for (_, *where), row in report[0].items() if where == [target, head_dim]]
    assert {row["kernel"] for row in rows} >= {
        *ATTENTION,
        "merge_splits_kernel",
        "write_kv_kernel",
        "copy_blocks_kernel",
    }
    assert {row["kernel"]: row["spills"] for row in rows if row["spills"]} == {}


@for_each
def test_shared_memory_fits_the_target(report, target, head_dim):
    """More than the target has, and the launch is refused."""
    rows = [row for (_, *where), row in report[0].items() if where == [target, head_dim]]
    assert {row["kernel"]: row["shared"] for row in rows if row["shared"] > TARGETS[target].shared} == {}


@on_tensor_cores
@pytest.mark.parametrize("kernel", ATTENTION)
def test_attention_runs_on_tensor_cores_with_wide_loads_and_more_than_one_buffer(report, kernel, target, head_dim):
    row = report[0][kernel, target, head_dim]
    assert sum(row["mma"].values()) > 0, "no tensor-core instruction"
    assert row["buffers"] > 1, "the loads of a tile wait until the tile before it is done"
    loads = {int(width): count for width, count in row["loads"].items()}
    assert set(loads) <= {128, 32}, f"loads of {loads} bits: K and V 128, and int32 block numbers and lengths"
    # A tile of K and one of V are 16 KiB each or more, and a warp reads 512 bytes at once.
    assert loads[128] * row["warps"] * 512 >= 2 * 16_384


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_prefill_uses_the_warpgroup_instruction_on_hopper(report, head_dim):
    """wgmma reads K and V from shared memory itself, and takes 64 rows or more; decode has 16."""
    rows, folder = report
    ttir = (folder / f"paged_prefill_kernel.{head_dim}.sm_90.ttir").read_text()
    assert re.search(r"tt\.dot .*-> tensor<128x", ttir), "prefill of long prompts has 128 rows"
    assert set(rows["paged_prefill_kernel", "sm_90", head_dim]["mma"]) == {"HGMMA"}


def test_a_block_number_is_64_bits_wide_before_it_meets_a_stride(report):
    """In a pool of 2**31 elements and more, the product does not fit 32 bits: it would wrap, and read another block."""
    rows, folder = report
    for kernel, target, head_dim in rows:
        if kernel == "merge_splits_kernel":
            continue  # knows no block
        ttir = (folder / f"{kernel}.{head_dim}.{target}.ttir").read_text()
        products = list(products_of_ids(ttir))
        assert products, f"{kernel}: no block number is multiplied with anything?"
        assert {width for width, _ in products} == {"i64"}, f"{kernel}: {[line for w, line in products if w != 'i64']}"


def products_of_ids(ttir):
    """(integer type, line) of each product with a factor that comes from a table of block numbers or slots.

    Values are followed by name from the table's pointer to what is loaded through it, and on through any arithmetic
    and into loops. A product with a constant stays within a block or a row, and is left out.
    """
    pointers, ids, constants = set(), set(), set()
    for line in ttir.splitlines():
        if "=" not in line:
            continue
        result, _, rest = line.partition("=")
        results = re.findall(r"%[\w#:]+", result)
        operands = set(re.findall(r"%\w+", rest.split(" loc(")[0]))
        if "scf.for" in line:
            for carried, start in re.findall(r"(%\w+) = (%\w+)", rest):
                ids |= {carried} if start in ids else set()
                pointers |= {carried} if start in pointers else set()
        elif "arith.constant" in line:
            constants |= set(results)
        elif "tt.load" in line and operands & pointers:
            ids |= set(results)
        elif "tt.addptr" in line or "!tt.ptr" in rest:
            reached = {name for name in operands if IDS.fullmatch(name[1:])} | operands & pointers
            pointers |= set(results) if reached and "tt.load" not in line else set()
        elif operands & ids:
            ids |= set(results)
            if "arith.muli" in line and not operands & constants:
                yield re.search(r"(i\d+)>?(?: loc|$)", line)[1], line.strip()
