"""Chapter 8. The engine over the Triton kernels: the tokens of every request equal those of running it alone."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton runs on Linux")

from hypothesis import given
from hypothesis import strategies as st

from minipaged import LLM, SamplingParams
from minipaged.model.load import load_model
from minipaged.model.recompute import generate
from strategies import costly

pytestmark = pytest.mark.ch08

prompts = st.lists(st.integers(0, 256), min_size=1, max_size=12)


@given(
    texts=st.lists(prompts, min_size=1, max_size=3),
    block_size=st.sampled_from((1, 3, 16)),
    budget=st.integers(3, 30),
)
@costly(1 / 8)  # each runs a whole model in the interpreter
def test_triton_writes_the_same_tokens_as_no_cache(texts, block_size, budget):
    model = load_model("tiny", dtype="float32")
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    requests = [{"prompt_token_ids": text} for text in texts]
    paged = LLM(
        model,
        backend="triton",
        block_size=block_size,
        num_blocks=48 // block_size,
        max_model_len=32,
        max_num_seqs=3,
        max_num_batched_tokens=budget,
    )
    paged.runner.cache.key_cache.fill_(torch.nan)
    paged.runner.cache.value_cache.fill_(torch.nan)
    expected = [[token for [token] in generate(model.transformer, [text], params.max_tokens)] for text in texts]
    assert [output.outputs[0].token_ids for output in paged.generate(requests, params)] == expected


def test_triton_is_of_the_paged_cache():
    with pytest.raises(ValueError, match="backend 'triton' is of the paged cache, and cache is 'contiguous'"):
        LLM("tiny", cache="contiguous", backend="triton")
