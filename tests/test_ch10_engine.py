"""Chapter 10. One text, whatever the engine does: in any batch, any cache, any pool, preempted or not.

The model is `tiny` in float64: random weights, and every greedy token depends on all tokens before it.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from alone import alone as answer_alone
from minipaged import LLM, SamplingParams
from minipaged.cdiv import cdiv
from minipaged.model.load import TINY, Model, load_model, tiny_transformer
from minipaged.model.tokenizer import TextTokenizer
from minipaged.model.tokenizer_files import byte_tokenizer
from strategies import costly

pytestmark = pytest.mark.ch10

CONTEXT = 48  # max_model_len of every engine here


@cache
def tiny():
    return load_model("tiny", dtype="float64")


def engine(**settings):
    return LLM(tiny(), max_model_len=CONTEXT, **settings)


@cache
def alone(prompt: tuple[int, ...], max_tokens: int, ignore_eos: bool) -> list[int]:
    """The tokens of one request by itself, with no cache: nothing can go wrong there but the model."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    return answer_alone(tiny(), prompt, params, max_model_len=CONTEXT).outputs[0].token_ids


@st.composite
def engines(draw):
    """An engine that may run short of everything: a small pool, a small budget, few sequence slots.

    It takes any single request, of any number of samples."""
    kind = draw(st.sampled_from(("paged", "paged", "contiguous")), label="cache")
    max_num_seqs = draw(st.integers(1, 6), label="max_num_seqs")
    block_size = draw(st.sampled_from((1, 2, 3, 16)), label="block_size")
    fewest = cdiv(CONTEXT, block_size)  # the smallest pool that takes any single sequence
    settings = {
        "cache": kind,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(max_num_seqs, 60), label="token budget"),
        "block_size": block_size,
        "num_blocks": draw(st.integers(fewest, 3 * fewest), label="num_blocks"),
        "watermark": draw(st.sampled_from((0.0, 0.01, 0.2)), label="watermark"),
    }
    if kind == "paged":
        settings["enable_prefix_caching"] = draw(st.booleans(), label="prefix caching")
        if draw(st.booleans(), label="swap"):
            settings |= {"preemption": "swap", "num_host_blocks": draw(st.integers(1, fewest), label="host blocks")}
    llm = engine(**settings)
    for tensor in (llm.runner.cache.key_cache, llm.runner.cache.value_cache):
        tensor.fill_(torch.nan)
    return llm


def is_empty(llm):
    """Nothing is unfinished, and every block is back."""
    assert not llm.has_unfinished() and not llm.requests
    assert not llm.scheduler.running and not llm.scheduler.waiting
    assert not llm.blocks.tables and llm.blocks.num_free == llm.blocks.num_blocks
    assert llm.blocks.host is None or llm.blocks.host.num_free == llm.blocks.num_host_blocks
    return True


_tokens = st.integers(0, 256)
prompts = (
    st.lists(_tokens, min_size=1, max_size=CONTEXT - 1) | st.lists(_tokens, min_size=CONTEXT - 3, max_size=CONTEXT - 1)
).map(tuple)


@costly(1 / 2)
@given(llm=engines(), texts=st.lists(prompts, min_size=1, max_size=6), max_tokens=st.integers(1, 12), eos=st.booleans())
def test_greedy_tokens_equal_those_of_the_request_alone(llm, texts, max_tokens, eos):
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=not eos)
    outputs = llm.generate([{"prompt_token_ids": list(text)} for text in texts], params)
    assert [tuple(output.prompt_token_ids) for output in outputs] == texts
    for text, output in zip(texts, outputs, strict=True):
        answer = output.outputs[0]
        assert answer.token_ids == alone(text, max_tokens, not eos)
        assert answer.finish_reason in ("stop", "length")
        assert len(text) + len(answer.token_ids) <= CONTEXT, "it outgrew the context"
        full = len(answer.token_ids) == max_tokens or len(text) + len(answer.token_ids) == CONTEXT
        assert full or answer.finish_reason == "stop", "it ended before its time"
    assert is_empty(llm)


@costly(1 / 2)
@given(
    llm=engines(),
    texts=st.lists(prompts, min_size=1, max_size=5),
    n=st.integers(1, 4),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_seed_gives_the_same_text_in_any_batch(llm, texts, n, seed, data):
    params = SamplingParams(n=n, max_tokens=5, temperature=1.5, top_p=0.9, top_k=40, seed=seed, ignore_eos=True)
    together = llm.generate([{"prompt_token_ids": list(text)} for text in texts], params)
    chosen = data.draw(st.integers(0, len(texts) - 1))
    apart = answer_alone(tiny(), texts[chosen], params, max_model_len=CONTEXT)
    assert [o.token_ids for o in together[chosen].outputs] == [o.token_ids for o in apart.outputs]


@costly(1 / 2)
@given(llm=engines(), texts=st.lists(prompts, min_size=1, max_size=5), after=st.integers(1, 12))
def test_leaving_a_stream_early_gives_back_all_memory(llm, texts, after):
    stream = llm.stream([{"prompt_token_ids": list(text)} for text in texts], SamplingParams(max_tokens=8))
    for _, _ in zip(range(after), stream, strict=False):
        pass
    stream.close()
    assert is_empty(llm)
    # The engine is as good as new.
    text = texts[0]
    assert llm.generate({"prompt_token_ids": list(text)}, SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[
        0
    ].token_ids == alone(text, 4, True)


@costly(1 / 2)
@given(llm=engines(), fail_at=st.integers(0, 5), texts=st.lists(prompts, min_size=1, max_size=4))
def test_a_model_that_fails_leaves_no_memory_behind(llm, fail_at, texts):
    steps = 0
    attend = llm.runner.cache.attend

    def failing(*arguments):
        nonlocal steps
        steps += 1
        if steps > fail_at:
            raise RuntimeError("injected")
        return attend(*arguments)

    llm.runner.cache.attend = failing
    requests = [{"prompt_token_ids": list(text)} for text in texts]
    try:
        llm.generate(requests, SamplingParams(max_tokens=4, ignore_eos=True))
    except RuntimeError as error:
        assert str(error) == "injected"
    else:
        assert steps <= fail_at, "the failure was swallowed"
    assert is_empty(llm)
    llm.runner.cache.attend = attend
    answer = llm.generate(requests[0], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0]
    assert answer.token_ids == alone(texts[0], 4, True), "the engine is not as good as new"


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_small_pool_preempts_and_changes_no_text(preemption):
    """Not a property, but a check on the properties: preemption does happen in such engines."""
    llm = engine(block_size=4, num_blocks=12, max_num_seqs=4, preemption=preemption)
    texts = [(i, i + 1, i + 2) for i in range(4)]
    outputs = llm.generate(
        [{"prompt_token_ids": list(t)} for t in texts], SamplingParams(max_tokens=20, ignore_eos=True)
    )
    assert llm.metrics().preemptions[preemption] > 0
    assert [o.outputs[0].token_ids for o in outputs] == [alone(t, 20, True) for t in texts]


@costly(1 / 2)
@given(
    llm=engines(),
    texts=st.lists(prompts, min_size=1, max_size=4),
    stop=st.none() | st.text("abc\ufffd\x00", min_size=1),
)
def test_streamed_pieces_join_to_the_final_text(llm, texts, stop):
    params = SamplingParams(max_tokens=10, ignore_eos=True, stop=stop)
    requests = [{"prompt_token_ids": list(text)} for text in texts]
    pieces = [""] * len(texts)
    for new in llm.stream(requests, params):
        pieces[int(new.request_id)] += new.text
    assert pieces == [output.outputs[0].text for output in llm.generate(requests, params)]


@costly(1 / 2)
@given(llm=engines(), texts=st.lists(prompts, min_size=2, max_size=4), turns=st.lists(st.booleans(), max_size=20))
def test_two_streams_that_take_turns_lose_no_token(llm, texts, turns):
    """A step of the one computes for both; each counts the pieces that it has read."""
    half = len(texts) // 2
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    streams = [
        llm.stream([{"prompt_token_ids": list(text)} for text in part], params) for part in (texts[:half], texts[half:])
    ]
    tokens: dict[str, list[int]] = {}
    for first in turns:
        if new := next(streams[0 if first else 1], None):
            tokens.setdefault(new.request_id, []).append(new.token_id)
    for new in (new for stream in streams for new in stream):
        tokens.setdefault(new.request_id, []).append(new.token_id)
    assert [tokens[str(i)] for i in range(len(texts))] == [alone(text, 6, True) for text in texts]
    assert is_empty(llm)


def test_a_stream_that_is_never_read_holds_nothing():
    llm = engine()
    llm.stream({"prompt_token_ids": [1, 2]})
    assert is_empty(llm)


@costly(1 / 2)
@given(text=prompts.filter(lambda text: len(text) < 30), at=st.integers(0, 7))
def test_the_end_of_text_token_ends_it(text, at):
    """`tiny` hardly ever ends a text by itself, so call one of the tokens that it does write the end."""
    request = {"prompt_token_ids": list(text)}
    whole = alone(text, 8, True)
    tokenizer = TextTokenizer(byte_tokenizer()._tokenizer, eos_token_ids=[whole[at]])
    llm = LLM(tiny()._replace(tokenizer=tokenizer), max_model_len=CONTEXT)
    answer = llm.generate(request, SamplingParams(max_tokens=8))[0].outputs[0]
    assert answer.token_ids == whole[: whole.index(whole[at]) + 1]
    assert answer.finish_reason == "stop"
    ignoring = llm.generate(request, SamplingParams(max_tokens=8, ignore_eos=True))[0].outputs[0]
    assert ignoring.token_ids == whole


@costly(1 / 2)
@given(text=prompts.filter(lambda text: len(text) < 30), at=st.integers(0, 9), length=st.integers(1, 3))
def test_a_stop_string_ends_the_text_before_it(text, at, length):
    llm = engine()
    request = {"prompt_token_ids": list(text)}
    whole = llm.generate(request, SamplingParams(max_tokens=12, ignore_eos=True))[0].outputs[0].text
    stop = whole[at : at + length]
    if not stop:
        return
    params = SamplingParams(max_tokens=12, ignore_eos=True, stop=stop)
    answer = llm.generate(request, params)[0].outputs[0]
    assert "".join(new.text for new in llm.stream(request, params)) == answer.text
    assert stop not in answer.text
    assert whole.startswith(answer.text)
    assert answer.finish_reason == "stop"


WORDS = ["<s>", "\u2581the", "\u2581cat", "\u2581sat", "s", "\u2581"]


@cache
def spaced():
    """`tiny` over words that bring the space before them, which a decoder strips where a text begins (Llama 2)."""
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(WORDS[:1])
    transformer = tiny_transformer(torch.float64, config=replace(TINY, vocab_size=len(WORDS)))
    return Model(transformer, TextTokenizer(made))


@given(prompt=st.lists(st.integers(1, 5), min_size=1, max_size=5), fails=st.booleans(), seed=st.integers(0, 99))
def test_the_text_is_what_its_tokens_add_to_the_prompt(prompt, fails, seed):
    """The space before the first word too, and also where a step fails and the texts are written again."""
    llm = LLM(spaced(), max_model_len=CONTEXT, num_blocks=8)
    request = llm.add_request({"prompt_token_ids": prompt}, SamplingParams(temperature=3.0, seed=seed, max_tokens=4))
    llm.step()
    if fails:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(llm.runner, "run", lambda *_: 1 / 0)
            llm.step()
    while llm.has_unfinished():
        llm.step()
    answer, decode = request.output().outputs[0], spaced().tokenizer.decode
    assert decode(prompt) + answer.text == decode(prompt + answer.token_ids)
    assert "".join(piece.text for piece in request.seqs[0].pieces(0)) == answer.text


# ---- what can never run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "prompt", "max_tokens", "numbers"),
    [
        ({}, [], 4, ["empty"]),
        ({}, [1] * CONTEXT, 4, ["48 tokens", "holds 48", "47"]),
        ({}, [1, 257], 4, ["257", "0 to 256"]),
        ({}, [1, -1], 4, ["-1"]),
        ({}, [1, 2.5], 4, ["prompt_token_ids", "2.5"]),
        ({}, None, 4, ["prompt_token_ids", "None"]),
        ({"num_blocks": 2, "block_size": 4}, [1] * 6, 4, ["9 stored", "6 of prompt", "8 slots"]),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(settings, prompt, max_tokens, numbers):
    llm = engine(**settings)
    fine = {"prompt_token_ids": [1, 2]}
    with pytest.raises(ValueError) as error:
        llm.generate([fine, {"prompt_token_ids": prompt}], SamplingParams(max_tokens=max_tokens))
    assert all(number in str(error.value) for number in ["prompt 1", *numbers]), error.value
    assert is_empty(llm)


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        LLM("tiny", device=device)


def test_token_ids_may_be_numpy_integers():
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    answer = engine().generate({"prompt_token_ids": np.array([3, 1, 4])}, params)[0].outputs[0]
    assert answer.token_ids == alone((3, 1, 4), 2, True)


def test_a_request_that_just_fits_the_pool_runs():
    llm = engine(num_blocks=2, block_size=4)  # 8 slots; the last token of 9 is never stored
    answer = llm.generate({"prompt_token_ids": [1] * 6}, SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0]
    assert answer.token_ids == alone((1,) * 6, 3, True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache": "disk"}, "contiguous, paged"),
        ({"cache": "recompute"}, "minipaged demo"),
        ({"dtype": "float32"}, "dtype 'float32' was asked for, and the loaded model has 'float64'"),
        ({"device": "meta"}, "device 'meta' was asked for, and the loaded model has 'cpu'"),
        ({"backend": "cuda"}, "'cuda'"),
        ({"block_size": 0}, "got 0"),
        ({"num_blocks": 10**12}, "give it fewer blocks"),
        ({"num_blocks": 10**12, "cache": "contiguous"}, "give it fewer blocks"),
        ({"num_blocks": 0}, "got 0"),
        ({"num_host_blocks": 0, "preemption": "swap"}, "at least 1, got 0"),
        ({"num_host_blocks": 8}, "preemption is 'recompute'"),
        ({"num_host_blocks": 10**12, "preemption": "swap"}, "give it fewer blocks"),
        ({"preemption": "hope"}, "'hope'"),
        ({"preemption": "swap", "cache": "contiguous"}, "cache is 'contiguous'"),
        ({"watermark": 1.0}, "1.0"),
        ({"trace": True, "cache": "contiguous"}, "cache is 'contiguous'"),
        ({"max_model_len": 513}, "2 to 512, got 513"),
        ({"max_model_len": 1}, "got 1"),
        ({"cache": "contiguous", "num_blocks": 2, "max_model_len": 64}, "2 * 16 = 32 slots"),
        ({"max_num_seqs": 0}, "0"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "7, got 8"),
    ],
)
def test_engine_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError) as error:
        LLM(tiny(), **settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 0}, "n must"),
        ({"temperature": -0.1}, "-0.1"),
        ({"temperature": float("nan")}, "nan"),
        ({"top_p": 0.0}, "0.0"),
        ({"top_p": 1.1}, "1.1"),
        ({"top_k": 0}, "got 0"),
        ({"max_tokens": 0}, "got 0"),
        ({"n": 2}, "got 2"),
        ({"min_p": 1.5}, "1.5"),
        ({"repetition_penalty": 0.0}, "0.0"),
        ({"logprobs": -1}, "-1"),
        ({"stop": ["a", ""]}, "empty"),
    ],
)
def test_sampling_fields_out_of_range_are_refused(fields, said):
    with pytest.raises(ValueError) as error:
        SamplingParams(**fields)
    assert said in str(error.value)
