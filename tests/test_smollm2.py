"""The real model writes the same tokens with no cache, a contiguous cache and a paged cache, alone and in a batch."""

import re
from pathlib import Path

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.model import fetch, load
from minipaged.model.compiled_ops import CompiledTransformer
from minipaged.model.recompute import generate
from minipaged.model.transformer import Transformer
from minipaged.model.weights import source_from_gguf
from minipaged.viz.metrics_table import metrics_table

pytestmark = pytest.mark.smollm2

PROMPTS = (
    "The",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "In 2026, 17 + 25 =",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Liberté, égalité, fraternité: c'est la devise de la République",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "An operating system divides memory into pages of equal size, and a page table says where each page lies. "
    "The main advantage of paging is that",
)
STEPS = 32
HANDFUL, FEW_STEPS = PROMPTS[:3], 6  # what `make test` runs
ENGINE = {"max_model_len": 64, "num_blocks": 4 * len(PROMPTS)}  # 8 slabs of 64 tokens, or 32 blocks of 16
ODD = {"block_size": 7, "num_blocks": 30, "max_num_batched_tokens": 11, "max_num_seqs": 8}  # 210 slots for all


def without_a_cache(model, prompts, steps):
    """All prompts in one ragged batch, all of their tokens computed at every step: nothing can be kept wrongly."""
    texts = [model.tokenizer.encode(prompt) for prompt in prompts]
    return [list(written) for written in zip(*generate(model.transformer, texts, steps), strict=True)]


def tokens(llm, prompts, steps):
    outputs = llm.generate(list(prompts), SamplingParams(max_tokens=steps, ignore_eos=True), progress=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((HANDFUL, FEW_STEPS), id="a handful"),
        pytest.param((PROMPTS, STEPS), id="all", marks=pytest.mark.slow),
    ],
)
def texts(smollm2, request):
    """Prompts, steps and tokens."""
    prompts, steps = request.param
    found = without_a_cache(smollm2, prompts, steps)
    assert [len(token_ids) for token_ids in found] == [steps] * len(prompts)
    return prompts, steps, found


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_a_ragged_batch_writes_the_same_tokens(smollm2, texts, cache):
    prompts, steps, expected = texts
    assert tokens(LLM(smollm2, cache=cache, **ENGINE), prompts, steps) == expected


def test_odd_blocks_chunks_of_prompts_and_preemption_change_nothing(smollm2, texts):
    prompts, steps, expected = texts
    num_blocks = 4 if prompts is HANDFUL else ODD["num_blocks"]  # too few for all of them at once
    llm = LLM(smollm2, cache="paged", **{**ENGINE, **ODD, "num_blocks": num_blocks})
    assert tokens(llm, prompts, steps) == expected
    assert llm.metrics().preemptions["recompute"] > 0, "the pool was not too small: this test shows less than it says"


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_a_prompt_alone_writes_the_same_tokens(smollm2, texts, cache):
    prompts, steps, expected = texts
    llm = LLM(smollm2, cache=cache, **ENGINE)
    assert [tokens(llm, [prompt], steps)[0] for prompt in prompts] == expected


@pytest.mark.slow
def test_a_prompt_alone_writes_the_same_tokens_without_a_cache(smollm2, texts):
    prompts, steps, expected = texts
    assert [without_a_cache(smollm2, [prompt], steps)[0] for prompt in prompts] == expected


def test_the_formulas_and_plain_products_write_the_same_tokens(smollm2, texts):
    """What `optimize_for_cpu` puts in their places is faster, and nothing else."""
    prompts, steps, expected = texts
    plain = load.read_model(source_from_gguf(fetch.smollm2_path()), torch.float32)
    assert (type(plain.transformer), type(smollm2.transformer)) == (Transformer, CompiledTransformer)
    assert tokens(LLM(plain, **ENGINE), prompts, steps) == expected


def test_the_text_is_what_a_trained_model_writes(smollm2, texts):
    """Equal tokens could be equal nonsense."""
    prompts, _, expected = texts
    assert "Paris" in smollm2.tokenizer.decode(expected[prompts.index("The capital of France is")])


# ---- everything at once -----------------------------------------------------------------------------------------

SYSTEM = "<|im_start|>system\nYou are a helpful assistant. Answer in one short sentence.<|im_end|>\n"
QUESTIONS = ("Why is the sky blue?", "What is a page table?", "Name three rivers.", "How far is the moon?")


def mixed_requests():
    """32 requests: plain texts and a shared system prompt, short and long, 4 to 40 new tokens."""
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(16)]
    texts += [f"{SYSTEM}<|im_start|>user\n{QUESTIONS[i % 4]}<|im_end|>\n<|im_start|>assistant\n" for i in range(16)]
    return [
        (text, SamplingParams(max_tokens=4 + 36 * (i * 7 % 32) // 31, ignore_eos=True)) for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def expected_of_mixed(smollm2):
    """Each alone, with no cache: its first tokens are those of the same text with more of them."""
    longest = {}
    for text, params in mixed_requests():
        longest[text] = max(longest.get(text, 0), params.max_tokens)
    return {text: without_a_cache(smollm2, [text], count)[0] for text, count in longest.items()}


@pytest.mark.slow
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_thirty_two_mixed_requests_in_too_small_a_pool(smollm2, expected_of_mixed, preemption, enable_prefix_caching):
    llm = LLM(
        smollm2,
        max_model_len=160,
        num_blocks=24 if enable_prefix_caching else 40,  # shared blocks leave more room
        max_num_seqs=16,
        max_num_batched_tokens=100,
        preemption=preemption,
        enable_prefix_caching=enable_prefix_caching,
        watermark=0.0,
    )
    requests = [llm.add_request(text, params) for text, params in mixed_requests()]
    while not all(request.finished for request in requests):
        llm.step()
    for request, (text, params) in zip(requests, mixed_requests(), strict=True):
        assert request.output().outputs[0].token_ids == expected_of_mixed[text][: params.max_tokens]
    metrics = llm.metrics()
    print(f"\n{preemption}, prefix caching {enable_prefix_caching}:", *metrics_table(metrics), sep="\n    ")
    assert metrics.preemptions[preemption] > 0, "the pool was not too small: this test shows less than it says"
    assert (metrics.prefix_tokens_found > 0) == enable_prefix_caching


def test_the_program_of_the_readme_runs(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    exec(program, {})
    assert "The moon is" in capsys.readouterr().out
