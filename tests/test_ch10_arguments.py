"""Chapter 10. What users bring: any object in any argument is refused at once, or the request ends."""

import math
from dataclasses import fields
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.engine.sampling import probabilities, sample
from minipaged.engine.sequence import Sequence
from minipaged.model.load import load_model

pytestmark = pytest.mark.ch10

NUMBERS = [True, np.int64(5), np.int32(0), np.float32(0.5), np.float64("nan"), np.bool_(True), 1e-320, 1e308]
NUMBERS += [10**30, -(10**30), math.inf, -math.inf, 2.0, 1000.0, 1.5, 1j, np.array(3), torch.tensor(2)]
OBJECTS = [[1], ["a"], [[1]], (), {}, {"a": 1}, b"a", object(), type, range(3), np.arange(2), torch.tensor([1, 2])]
OBJECTS += ["", "a", "never", None, [None], [True], [2.0]]
SPECIAL = st.sampled_from(NUMBERS + OBJECTS)
ANYTHING = SPECIAL | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(-1, 300), max_size=3)
PLAIN = {"max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", dtype="float64")


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, max_model_len=64, num_blocks=64, block_size=4)


def ends(llm):
    """Whether everything that was admitted ends, and leaves nothing behind."""
    for _ in range(200):
        if not llm.has_unfinished():
            break
        llm.step()
    return not llm.has_unfinished() and llm.blocks.num_free == llm.blocks.num_blocks


@given(name=st.sampled_from([field.name for field in fields(SamplingParams)]), value=ANYTHING, n=st.integers(1, 2))
def test_any_object_in_any_field_is_refused_or_the_request_ends(llm, name, value, n):
    beside = llm.add_request({"prompt_token_ids": [7, 8]}, SamplingParams(max_tokens=3, ignore_eos=True))
    try:
        params = SamplingParams(**PLAIN | {"temperature": 1.0, "n": n} | {name: value})
        if params.n > 64:  # it is admitted, and would take long
            params = SamplingParams(**PLAIN)
        request = llm.add_request({"prompt_token_ids": [1, 2, 3]}, params)
    except ValueError as error:
        assert name in str(error), "it is not said which argument is wrong"
    else:
        assert ends(llm) and request.finished
    assert ends(llm)
    assert [seq.finish_reason for seq in beside.seqs] == ["length"], "one request's fault is another's"


@given(name=st.sampled_from([field.name for field in fields(BeamSearchParams)]), value=ANYTHING)
def test_any_object_in_any_field_of_a_search(llm, name, value):
    try:
        params = BeamSearchParams(**{"max_tokens": 3, "beam_width": 2, "ignore_eos": True} | {name: value})
        if params.max_tokens > 60:
            params = BeamSearchParams(2, max_tokens=60)
        outputs = llm.beam_search({"prompt_token_ids": [1, 2, 3]}, params)[0].outputs
    except ValueError as error:
        assert name in str(error) or "beam" in str(error), "it is not said which argument is wrong"
    else:
        assert all(output.finish_reason for output in outputs)
    assert ends(llm)


OPTIONAL = {"cache_salt": ANYTHING, "prompt": ANYTHING}


def test_a_long_list_as_a_prompt_is_refused_in_a_line(llm):
    with pytest.raises(ValueError, match=r"prompt 0: .* got \[0, 1, ") as error:
        llm.generate([list(range(1_000))])
    assert len(str(error.value)) < 200


@given(prompt=ANYTHING | st.fixed_dictionaries({"prompt_token_ids": ANYTHING}, optional=OPTIONAL))
def test_any_object_as_a_prompt(llm, prompt):
    for ask in (llm.add_request, lambda prompt: llm.generate([prompt], SamplingParams(max_tokens=2), progress=False)):
        try:
            ask(prompt)
        except ValueError as error:
            assert "prompt" in str(error) or "token" in str(error) or "cache_salt" in str(error)
        assert ends(llm)


@given(value=ANYTHING)
def test_any_object_as_parameters_or_messages(llm, value):
    for ask in (
        lambda: llm.generate("a", value if value is not None else 5, progress=False),
        lambda: llm.beam_search("a", value if value is not None else 5, progress=False),
        lambda: llm.chat(value, SamplingParams(max_tokens=1), progress=False),
    ):
        with pytest.raises(ValueError):
            ask()
        assert ends(llm)


WHOLE = (
    "block_size",
    "num_blocks",
    "num_host_blocks",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "seed",
)
OTHERS = ("cache", "backend", "preemption", "enable_prefix_caching", "watermark", "trace", "dtype", "device")


@given(name=st.sampled_from(WHOLE + OTHERS), value=SPECIAL)
@example(name="cache", value=np.arange(2))
@example(name="device", value=np.arange(2))
@example(name="dtype", value=[1])
def test_any_object_in_any_argument_of_the_engine(model, name, value):
    if name == "trace" and isinstance(value, str):
        return  # the path of a file
    swap = {"preemption": "swap"} if name == "num_host_blocks" else {}
    try:
        llm = LLM(model, **{"num_blocks": 16, "block_size": 4, "max_model_len": 32} | swap | {name: value})
    except ValueError as error:
        assert name in str(error) or "blocks" in str(error) or "max_" in str(error)
    else:
        assert not (name in WHOLE and isinstance(value, bool | float)), "it is no whole number"
        assert len(llm.generate("a", SamplingParams(max_tokens=2), progress=False)[0].outputs) == 1


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=repr)
def test_a_device_is_its_name_or_torchs_object(model, device):
    for name in ("tiny", model):
        assert LLM(name, device=device, max_model_len=32, num_blocks=4).runner.device.type == "cpu"


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "a", None, [1], np.arange(2)], ids=repr)
def test_a_number_of_ranks_is_a_number(model, size):
    with pytest.raises(ValueError, match="tensor_parallel_size must be a whole number, at least 1"):
        LLM(model, tensor_parallel_size=size)


def test_numbers_of_numpy_are_numbers(llm):
    plain = SamplingParams(max_tokens=5, temperature=0.5, seed=5, top_k=20, logprobs=2, stop_token_ids=[3])
    numpy = SamplingParams(
        max_tokens=np.int64(5),
        temperature=np.float64(0.5),
        seed=np.int64(5),
        top_k=np.uint8(20),
        logprobs=np.int32(2),
        stop_token_ids=np.array([3]),
    )
    assert plain == numpy
    prompts = [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": np.array([1, 2])}]
    first, second = (llm.generate(prompt, plain, progress=False)[0].outputs for prompt in prompts)
    assert first == second


# ---- logits that are not finite -----------------------------------------------------------------------------------


@given(
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    everywhere=st.booleans(),
    bad=st.integers(0, 2),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_logits_that_are_not_finite_fail_their_sequence_alone(value, everywhere, bad, temperature):
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(bad))
    seqs = [Sequence(str(i), 0, [1], SamplingParams(temperature=temperature)) for i in range(3)]
    whole = sample(logits, seqs)
    logits[bad, slice(None) if everywhere else 4] = value
    for i, found in enumerate(sample(logits, seqs)):
        if i == bad:
            assert isinstance(found, FloatingPointError)
        else:
            assert found.token_id == whole[i].token_id


def test_a_damaged_weight_ends_the_request_with_its_reason():
    llm = LLM("tiny", num_blocks=16)
    llm.runner.transformer.norm.weight.data[0] = math.nan
    for ask, params in ((llm.generate, SamplingParams(max_tokens=4)), (llm.beam_search, BeamSearchParams(2))):
        outputs = ask("abc", params, progress=False)[0].outputs
        assert outputs[0].finish_reason == "error" and "not finite" in outputs[0].error
        assert ends(llm)


@given(bad=st.integers(0, 2), width=st.integers(1, 3))
def test_a_search_whose_logits_are_not_finite_fails_alone(llm, bad, width):
    """The searches beside it find what they find without it."""
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    params = BeamSearchParams(width, max_tokens=3, ignore_eos=True)
    ask = [{"prompt_token_ids": prompt} for prompt in prompts]
    expected = llm.beam_search(ask, params, progress=False)
    run = llm.runner.run

    def damaged(output, batch):
        logits = run(output, batch).clone()
        for beam, row in output.sampled.items():
            if beam.prompt_token_ids == prompts[bad]:
                logits[row] = math.nan
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.runner, "run", damaged)
        found = llm.beam_search(ask, params, progress=False)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if i == bad:
            assert [output.finish_reason for output in one.outputs] == ["error"]
        else:
            assert [output.token_ids for output in one.outputs] == [output.token_ids for output in other.outputs]
    assert ends(llm)


@given(
    top_p=st.sampled_from([5e-324, 1e-300, 1e-30, 1e-9, 0.5, 1.0]),
    top_k=st.sampled_from([-1, 1, 3, 50]),
    min_p=st.sampled_from([0.0, 0.5, 1.0]),
    spread=st.sampled_from([0.0, 0.1, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_likeliest_token_always_stays(top_p, top_k, min_p, spread, seed):
    logits = torch.randn(1, 11, generator=torch.Generator().manual_seed(seed)) * spread
    found = probabilities(logits, [SamplingParams(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)])[0]
    assert found.sum() == pytest.approx(1.0) and found[logits[0] == logits[0].max()].max() > 0


def test_triton_on_a_cpu_refuses_bfloat16():
    with pytest.raises(ValueError, match="bfloat16"):
        LLM("tiny", dtype="bfloat16", backend="triton", device="cpu")


# ---- two threads ---------------------------------------------------------------------------------------------------


def test_threads_that_share_an_engine_get_the_answers_of_one(model):
    prompts = [[{"prompt_token_ids": [i + 1, j + 1, i + j]} for j in range(8)] for i in range(4)]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    alone = LLM(model, max_model_len=64, num_blocks=40, block_size=4)
    expected = [
        [out.outputs[0].token_ids for out in alone.generate(batch, params, progress=False)] for batch in prompts
    ]
    shared, found = LLM(model, max_model_len=64, num_blocks=40, block_size=4), [None] * 4

    def ask(i):
        if i == 3:
            found[i] = []
            for prompt in prompts[i]:
                found[i].append([piece.token_id for piece in shared.stream(prompt, params)])
        else:
            found[i] = [out.outputs[0].token_ids for out in shared.generate(prompts[i], params, progress=False)]

    threads = [Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert ends(shared)
