"""Chapter 8. The model of the three GPUs, and what `make colab-check` writes."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

os.environ.update({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})  # before triton is imported
pytest.importorskip("triton", reason="the kernels need Triton, which runs on Linux")

from minipaged.bench import colab_check, kernels
from minipaged.bench.kernel_model import GPUS, REGISTERS, bytes_moved, predicted, programs_at_once
from minipaged.bench.kernel_report import CONTEXT, KV_HEADS, SEQS

pytestmark = pytest.mark.ch08
DECODE = ["paged_decode_kernel", "paged_decode_kernel_split"]
KERNELS = ["write_kv_kernel", "copy_blocks_kernel", *DECODE, "merge_splits_kernel", "paged_prefill_kernel"]


@given(
    st.sampled_from(list(GPUS.values())),
    st.integers(16, 255),
    st.integers(0, 232_448),
    st.sampled_from([1, 2, 4, 8]),
)
def test_as_many_programs_as_fit_and_no_more(gpu, registers, shared, warps):
    def fit(programs):
        given_out = -(-registers // 8) * 8 * 32 * warps  # 256 registers a warp are 8 a thread
        return (
            programs <= gpu.programs
            and programs * warps <= gpu.warps
            and programs * given_out <= REGISTERS
            and programs * (shared + gpu.reserved) <= gpu.shared
        )

    programs = programs_at_once(gpu, registers, shared, warps)
    assert programs == 0 or fit(programs)
    assert not fit(programs + 1)


def test_a_bound_is_the_bytes_over_the_bandwidth():
    row = {"head_dim": 128, "target": "sm_75", "registers": 128, "shared": 16_384, "warps": 4}
    rows = predicted([{**row, "kernel": name} for name in KERNELS])
    names = [found["kernel"] for found in rows]
    assert names == [name.replace("_kernel", "") for name in KERNELS] and {found["GPU"] for found in rows} == {"T4"}
    key_and_value = 2 * SEQS * CONTEXT * KV_HEADS * 128 * 2
    for name in (*DECODE, "paged_prefill_kernel"):
        assert bytes_moved(name, 128) > key_and_value
    decode = rows[KERNELS.index("paged_decode_kernel")]
    assert decode["bound [us]"] >= key_and_value / 320e9 * 1e6
    assert decode["occupancy"] == "50%"  # 4 programs of 4 warps, of 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU checks them before it times them")
def test_the_benchmark_checks_every_kernel_before_it_times_them(capsys):
    kernels.check("cpu", torch.bfloat16)
    assert "split decode" in capsys.readouterr().out


def test_the_table_has_the_card_and_every_decode():
    row = {"shape": "Llama", "num_seqs": 64, "context": 2048, "num_queries": 1, "kv_bytes": 250e6, "ms": {}}
    rows = [row | {"ms": {"minipaged": 1.25}}, row | {"num_queries": 512, "ms": {"minipaged": 9.0}}, row]
    text = colab_check.report({"machine": "Tesla T4", "copy": 250e9, "rows": rows}, "300 passed", "")
    assert "Tesla T4; copy 250 GB/s" in text and "300 passed" in text
    assert "| Llama | 64 | 2048 | 1,250 | 200 | 80% |" in text
    assert len([line for line in text.splitlines() if line.startswith("| Llama")]) == 1
    assert "out of memory" in colab_check.report(None, "1 failed", "out of memory\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says where there is no GPU")
def test_without_a_gpu_one_line_says_so(capsys, tmp_path):
    colab_check.main(out=tmp_path / "table.md")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no GPU" in said
    assert not list(tmp_path.iterdir())
