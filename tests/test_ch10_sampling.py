"""Chapters 2 and 10. Which token comes next: distributions, draws, penalties, stops, and beam search."""

from dataclasses import replace
from functools import cache
from itertools import product
from math import log

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alone import alone, beams_alone
from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.cdiv import cdiv
from minipaged.engine import sampling
from minipaged.engine.sampling import draw, logprobs, penalised, probabilities, sample, uniform
from minipaged.engine.sequence import Sequence, Token
from minipaged.model.load import TINY, Model, load_model, tiny_transformer
from minipaged.model.recompute import next_logits
from minipaged.model.tokenizer import TextTokenizer
from minipaged.model.tokenizer_files import byte_tokenizer
from minipaged.viz.replay import at

pytestmark = pytest.mark.ch10


def numbers(low, high):
    """Numbers a step apart: two logits are equal or clearly not."""
    return st.integers(int(low * 8), int(high * 8)).map(lambda n: n / 8)


@given(
    logits=st.lists(st.floats(-20, 20), min_size=1, max_size=12),
    temperature=st.sampled_from((1e-308, 1e-6)) | st.floats(0.1, 5.0),
    top_p=st.just(1.0) | st.floats(0.01, 1.0),
    top_k=st.just(-1) | st.integers(1, 14),
)
def test_the_distribution_is_the_likeliest_part_of_softmax(logits, temperature, top_p, top_k):
    scores = torch.tensor(logits, dtype=torch.float64)
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    other = SamplingParams(temperature=1.0, top_k=2, min_p=0.5)  # a row beside it that has nothing to do with it
    kept, beside = probabilities(torch.stack([scores, -scores]), [params, other])
    torch.testing.assert_close(kept, probabilities(scores[None], [params])[0], rtol=0.0, atol=0.0)
    torch.testing.assert_close(beside, probabilities(-scores[None], [other])[0], rtol=0.0, atol=0.0)
    full = ((scores - scores.max()) / temperature).softmax(-1)
    support = kept > 0
    assert float(kept.sum()) == pytest.approx(1.0)
    assert full[support].max() == full.max(), "the likeliest token was dropped"
    # What is kept keeps its proportions, and is at least as likely as what is dropped.
    torch.testing.assert_close(kept[support], full[support] / full[support].sum(), rtol=1e-9, atol=1e-12)
    if not support.all():
        assert full[support].min() >= full[~support].max() - 1e-12
    if top_k != -1:
        assert int(support.sum()) <= top_k
    elif top_p < 1.0:
        # The least likely token that is kept is needed: without it, less than top_p would be kept.
        assert float(full[support].sum() - full[support].min()) < top_p + 1e-9
        assert float(full[support].sum()) >= top_p - 1e-9


@given(
    logits=st.lists(numbers(-9, 9), min_size=1, max_size=12),
    temperature=st.floats(0.1, 5.0),
    min_p=st.floats(0.0, 1.0),
)
def test_min_p_keeps_what_is_so_many_times_as_likely_as_the_likeliest(logits, temperature, min_p):
    scores = torch.tensor(logits, dtype=torch.float64)
    kept = probabilities(scores[None], [SamplingParams(temperature=temperature, min_p=min_p)])[0]
    full = (scores / temperature).softmax(-1)
    ratio = full / full.max()
    assert (kept[ratio > min_p + 1e-9] > 0).all()
    assert (kept[ratio < min_p - 1e-9] == 0).all()
    support = kept > 0
    torch.testing.assert_close(kept[support], full[support] / full[support].sum(), rtol=1e-9, atol=1e-12)


@given(
    logits=st.lists(numbers(-1, 1), min_size=1, max_size=3, unique=True)
    | st.lists(numbers(-1, 1), min_size=6, max_size=12, unique=True),
    top_p=st.just(1.0) | st.floats(0.5, 1.0) | st.floats(0.01, 1.0),
    top_k=st.just(-1) | st.integers(1, 14) | st.integers(1, 5),
    min_p=st.just(0.0) | st.floats(0.0, 0.5),
    candidates=st.sampled_from((1, 2, 1024)),
)
def test_min_p_comes_first_then_top_k_and_top_p_is_a_share_of_what_is_left(logits, top_p, top_k, min_p, candidates):
    """Token by token, however many of the likeliest are sorted at first."""
    full = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    likeliest = sorted(range(len(logits)), key=lambda token: -full[token])
    left = [token for token in likeliest if full[token] >= min_p * full.max()]
    left = left if top_k == -1 else left[:top_k]
    total, kept, share = sum(float(full[token]) for token in left), [], 0.0
    for token in left:
        assume(not top_p - 1e-9 < share / total < top_p + 1e-9)  # on the edge a rounded sum decides
        if share < top_p * total or top_p == 1.0:
            kept.append(token)
        share += float(full[token])
    expected = torch.zeros_like(full)
    expected[kept] = full[kept] / full[kept].sum()
    params = SamplingParams(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CANDIDATES", candidates)
        found = probabilities(torch.tensor([logits], dtype=torch.float64), [params])[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@given(bits=st.integers(0, 4), data=st.data(), top_k=st.sampled_from((-1, 16)))
def test_tokens_that_make_up_top_p_exactly_are_enough(bits, data, top_k):
    """2^bits equally likely tokens, whose sums are exact: k of them make up k / 2^bits."""
    count = data.draw(st.integers(1, 2**bits), label="k")
    params = SamplingParams(temperature=1.0, top_p=count / 2**bits, top_k=top_k)
    kept = probabilities(torch.zeros(1, 2**bits), [params])[0]
    assert int((kept > 0).sum()) == count


def test_who_asks_for_all_tokens_keeps_the_least_likely_one():
    """However little a rounded sum sees of it, and whatever the row beside it keeps."""
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)]
    scores = torch.linspace(0.0, -600.0, 2 * sampling.CANDIDATES, dtype=torch.float64)
    kept = probabilities(torch.stack([scores, scores]), params)
    assert (kept[0] > 0).all() and int((kept[1] > 0).sum()) < 10


def test_a_long_tail_is_sorted_as_far_as_top_p_needs():
    """A vocabulary of 5,000 nearly equal tokens: the first 1,024 that are sorted do not make up 90 %."""
    scores = torch.linspace(0.0, 0.001, 5000, dtype=torch.float64)
    kept = probabilities(scores[None], [SamplingParams(temperature=1.0, top_p=0.9)])[0]
    assert abs(int((kept > 0).sum()) - 4500) < 5
    assert float(kept.sum()) == pytest.approx(1.0)


@given(
    weights=st.lists(st.sampled_from((0.0, 1e-30, 0.1, 0.3, 1.0)), min_size=1, max_size=8).filter(any),
    number=st.floats(0.0, 1.0, exclude_max=True) | st.just(1.0 - 2.0**-53),
    dtype=st.sampled_from((torch.float64, torch.float32)),
)
def test_a_draw_is_where_the_running_sum_passes_the_number(weights, number, dtype):
    """In float32 the last number below 1 is rounded to 1, which no running sum passes."""
    row = torch.tensor(weights, dtype=dtype) / sum(weights)
    token = draw(row[None], [number])[0]
    near = 1e-12 if dtype == torch.float64 else 1e-6
    assert row[token] > 0, "a token of no probability was drawn"
    assert float(row[:token].sum()) <= number + near
    assert number <= float(row[: token + 1].sum()) + near


def test_what_is_drawn_follows_the_distribution():
    """10,000 positions of one request. A share of p has a spread of sqrt(p (1 - p) / 10,000), at most 0.005."""
    row = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    tokens = draw(row.expand(10_000, -1), [uniform(1, 0, position) for position in range(10_000)])
    shares = np.bincount(tokens, minlength=4) / 10_000
    assert np.abs(shares - row.numpy()).max() < 5 * 0.005


@given(
    st.integers(-(2**70), 2**70),
    st.integers(0, 100),
    st.integers(0, 10_000),
    st.integers(0, 63).map(lambda bit: 2**bit) | st.integers(1, 2**64 - 1),
)
def test_every_token_has_a_random_number_of_its_own(seed, index, position, other):
    """`other` is added: seeds may differ in any of their 64 bits."""
    number = uniform(seed, index, position)
    assert 0.0 <= number < 1.0
    assert number == uniform(seed, index, position)
    others = (
        uniform(seed + other, index, position),
        uniform(seed, index + 1 + other % 1000, position),
        uniform(seed, index, position + 1 + other % 1000),
    )
    assert number not in others


def tokens(token_ids):
    return [Token(token_id, None, 0.0) for token_id in token_ids]


@given(
    logits=st.lists(numbers(-9, 9), min_size=4, max_size=4),
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    output=st.lists(st.integers(0, 3), max_size=5),
    penalty=st.sampled_from((0.5, 1.0, 2.0)),
)
def test_the_penalty_makes_what_was_seen_less_likely_once(logits, prompt, output, penalty):
    before = torch.tensor([logits, logits], dtype=torch.float64)
    seqs = [
        Sequence("0", 0, prompt, SamplingParams(repetition_penalty=penalty), outputs=tokens(output)),
        Sequence("1", 0, prompt, SamplingParams(), outputs=tokens(output)),
    ]
    original = before.clone()
    after = penalised(before, seqs)
    assert torch.equal(before, original), "the model's logits were changed: logprobs read them later"
    assert torch.equal(after[1], before[1]), "it asked for no penalty"
    for token in range(4):
        old = float(before[0, token])
        seen = token in prompt or token in output
        assert float(after[0, token]) == pytest.approx((old / penalty if old > 0 else old * penalty) if seen else old)


@given(st.lists(numbers(-9, 9), min_size=5, max_size=5), st.integers(0, 4), st.integers(0, 7))
def test_logprobs_are_the_chosen_token_and_the_likeliest(logits, token, number):
    scores = torch.tensor(logits, dtype=torch.float64)
    found = logprobs(scores[None], [token], [number])[0]
    expected = scores.log_softmax(-1)
    assert token in found
    assert len(found) in (min(number, 5), min(number, 5) + 1)
    assert all(value == pytest.approx(float(expected[i])) for i, value in found.items())
    if number:
        worst = min(value for i, value in found.items() if i != token or len(found) == min(number, 5))
        assert all(float(expected[i]) <= worst + 1e-9 for i in range(5) if i not in found)


@given(data=st.data(), num_seqs=st.integers(1, 5), seed=st.integers(0, 99))
def test_each_sequence_of_a_step_is_sampled_as_it_asks(data, num_seqs, seed):
    """A second writing, sequence by sequence: greedy ones beside drawn ones, with logprobs and without."""
    logits = torch.randn(num_seqs, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    some = st.builds(
        SamplingParams,
        temperature=st.sampled_from((0.0, 0.7, 3.0)),
        repetition_penalty=st.sampled_from((1.0, 5.0)),
        logprobs=st.none() | st.integers(0, 3),
        top_k=st.sampled_from((-1, 1, 3)),
        top_p=st.sampled_from((0.5, 1.0)),
        min_p=st.sampled_from((0.0, 0.5)),
    )
    seqs = [
        Sequence(str(i), data.draw(st.integers(0, 2)), data.draw(st.lists(st.integers(0, 5), min_size=1)), params, i)
        for i, params in enumerate(data.draw(st.lists(some, min_size=num_seqs, max_size=num_seqs), label="params"))
    ]
    for row, seq, found in zip(logits, seqs, sample(logits, seqs), strict=True):
        after = penalised(row[None], [seq])
        if seq.params.temperature == 0.0:
            assert found.token_id == int(after[0].argmax())
        else:
            number = uniform(seq.seed, seq.index, len(seq.prompt_token_ids))
            assert [found.token_id] == draw(probabilities(after, [seq.params]), [number])
        if seq.params.logprobs is None:
            assert found.logprobs is None
        else:  # the model's own, which neither penalty nor temperature moves
            assert found.logprobs == logprobs(row[None], [found.token_id], [seq.params.logprobs])[0]


class Refused:
    """Among the stop tokens or temperatures of one sequence: whatever is asked of it fails."""

    def __gt__(self, other):
        raise LookupError("injected")

    __ne__ = __gt__


@given(
    logits=st.lists(st.lists(numbers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    failing=st.sets(st.integers(0, 4)),
    temperature=st.sampled_from((0.0, 1.0)),
)
def test_a_sequence_that_fails_fails_alone(logits, failing, temperature):
    """The others get the tokens that they get without it."""
    scores = torch.tensor(logits, dtype=torch.float64)
    seqs = [
        Sequence(str(i), 0, [i % 4], SamplingParams(temperature=temperature, logprobs=2), seed=i)
        for i in range(len(logits))
    ]
    expected = [token[:2] for token in sample(scores, seqs)]
    for i in failing & set(range(len(seqs))):
        object.__setattr__(seqs[i].params, "repetition_penalty", Refused())
    found = sample(scores, seqs)
    for i, token in enumerate(found):
        assert isinstance(token, LookupError) if i in failing else token[:2] == expected[i]


# ---- in the engine ----------------------------------------------------------------------------------------------


@cache
def tiny():
    return load_model("tiny", dtype="float64")


def engine(model=None, **settings):
    return LLM(model or tiny(), **{"max_model_len": 64, "block_size": 4, **settings})


prompts = st.lists(st.integers(0, 255), min_size=1, max_size=12)


def test_logprobs_add_up_and_greedy_takes_the_best():
    answer = engine().generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=6, logprobs=3))[0].outputs[0]
    assert [max(found, key=found.get) for found in answer.logprobs] == answer.token_ids
    assert [len(found) for found in answer.logprobs] == [3] * 6
    total = sum(found[token] for found, token in zip(answer.logprobs, answer.token_ids, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)


def test_a_strong_penalty_repeats_no_token():
    params = SamplingParams(max_tokens=40, repetition_penalty=1e6, ignore_eos=True)
    answer = engine().generate({"prompt_token_ids": [1, 2, 3]}, params)[0].outputs[0]
    assert len({1, 2, 3, *answer.token_ids}) == 43


@given(prompt=prompts, at=st.integers(0, 7))
def test_a_stop_token_ends_the_answer_and_is_no_part_of_its_text(prompt, at):
    request = {"prompt_token_ids": prompt}
    whole = engine().generate(request, SamplingParams(max_tokens=8, ignore_eos=True))[0].outputs[0].token_ids
    params = SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=[whole[at]])
    answer = engine().generate(request, params)[0].outputs[0]
    end = whole.index(whole[at])
    assert answer.token_ids == whole[: end + 1]
    assert answer.text == tiny().tokenizer.decode(whole[:end])
    assert answer.finish_reason == "stop"


@given(prompt=prompts, n=st.integers(1, 4), seed=st.integers(0, 99))
def test_each_sample_of_a_request_is_what_it_is_alone(prompt, n, seed):
    """Sample i of n is sample i of more than n: what others draw does not matter."""
    params = SamplingParams(n=n, temperature=2.0, seed=seed, max_tokens=5, ignore_eos=True)
    request = {"prompt_token_ids": prompt}
    some = engine().generate(request, params)[0].outputs
    more = alone(tiny(), prompt, replace(params, n=n + 1)).outputs
    assert [o.token_ids for o in some] == [o.token_ids for o in more[:n]]


# ---- beam search ------------------------------------------------------------------------------------------------

VOCABULARY = 5
END = 0


@cache
def small_model():
    """`tiny` with five tokens, one of which ends a text: all texts can be written down."""
    config = replace(TINY, vocab_size=VOCABULARY, max_position=16)
    tokenizer = TextTokenizer(byte_tokenizer()._tokenizer, eos_token_ids=[END])
    return Model(tiny_transformer(torch.float64, config=config), tokenizer)


@cache
def next_logprobs(text):
    return next_logits(small_model().transformer, [text])[0].log_softmax(-1).tolist()


def all_texts(prompt, max_tokens):
    """Every text of at most max_tokens tokens that ends where it may, with its sum of log-probabilities."""
    for length in range(1, max_tokens + 1):
        for text in product(range(VOCABULARY), repeat=length):
            ends = text[-1] == END or length == max_tokens
            if ends and END not in text[:-1]:
                yield list(text), sum(next_logprobs(prompt + text[:i])[text[i]] for i in range(length))


@pytest.mark.parametrize("cache", ["paged", "contiguous"])
@given(
    prompt=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=4).map(tuple),
    length_penalty=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
)
def test_a_search_that_is_wide_enough_finds_the_best_of_all_texts(cache, prompt, length_penalty):
    """3 tokens over 5: with 64 beams nothing is ever given up, so beam search is exhaustive search."""
    llm = engine(small_model(), max_model_len=16, cache=cache, num_blocks=400, max_num_seqs=64)
    params = BeamSearchParams(64, max_tokens=3, length_penalty=length_penalty, early_stopping="never")
    found = llm.beam_search({"prompt_token_ids": list(prompt)}, params)[0].outputs
    expected = sorted(
        ((total / len(text) ** length_penalty, text) for text, total in all_texts(prompt, 3)), reverse=True
    )
    assert [o.score for o in found] == pytest.approx([score for score, _ in expected[:64]])
    assert found[0].token_ids == expected[0][1]
    for output in found:
        assert output.finish_reason == ("stop" if output.token_ids[-1] == END else "length")
        total = sum(next_logprobs(prompt + tuple(output.token_ids[:i]))[t] for i, t in enumerate(output.token_ids))
        assert output.cumulative_logprob == pytest.approx(total)


@given(prompt=prompts, width=st.integers(1, 5), max_tokens=st.integers(1, 8), block_size=st.sampled_from((1, 3, 16)))
def test_beams_that_share_blocks_find_what_beams_without_a_cache_find(prompt, width, max_tokens, block_size):
    params = BeamSearchParams(width, max_tokens=max_tokens, ignore_eos=True)
    paged = engine(block_size=block_size)
    found = paged.beam_search({"prompt_token_ids": prompt}, params)[0].outputs
    expected = beams_alone(tiny(), prompt, params, 64)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert [o.score for o in found] == pytest.approx([o.score for o in expected])
    assert [o.index for o in found] == list(range(width))
    assert not paged.blocks.tables and paged.blocks.num_free == paged.blocks.num_blocks


def test_one_beam_is_greedy():
    request = {"prompt_token_ids": [3, 1, 4]}
    found = engine().beam_search(request, BeamSearchParams(1, max_tokens=8, ignore_eos=True))[0].outputs
    greedy = engine().generate(request, SamplingParams(max_tokens=8, ignore_eos=True))[0].outputs
    assert found[0].token_ids == greedy[0].token_ids


def test_early_stopping_ends_with_the_first_hypotheses():
    """With an end token that is as likely as any, the first five texts are complete long before the last token."""
    llm = engine(small_model(), max_model_len=16)
    at_once = llm.beam_search({"prompt_token_ids": [1]}, BeamSearchParams(2, max_tokens=12, early_stopping=True))[0]
    never = llm.beam_search({"prompt_token_ids": [1]}, BeamSearchParams(2, max_tokens=12, early_stopping="never"))[0]
    assert max(len(o.token_ids) for o in at_once.outputs) <= max(len(o.token_ids) for o in never.outputs)
    assert never.outputs[0].score >= at_once.outputs[0].score - log(1 + 1e-9)


def test_beams_live_in_fewer_blocks_than_as_many_samples():
    llm = engine(block_size=2, max_num_seqs=8, trace=True)
    llm.beam_search({"prompt_token_ids": list(range(9))}, BeamSearchParams(4, max_tokens=12, ignore_eos=True))
    shared = 0
    for place, event in enumerate(llm.trace.events):
        if event["event"] == "schedule" and len(event["seqs"]) == 4:
            tables = at(llm.trace, place).tables
            entries = [block for table in tables.values() for block in table]
            shared = max(shared, 1 - len(set(entries)) / len(entries))
    assert shared > 0.4, f"only {shared:.0%} of the entries of four tables name a shared block"


@given(
    texts=st.lists(prompts, min_size=1, max_size=3),
    width=st.integers(1, 3),
    max_tokens=st.integers(1, 6),
    cache=st.sampled_from(("paged", "contiguous")),
    spare=st.integers(0, 10),
    after=st.integers(0, 4),
)
@settings(max_examples=max(1, settings().max_examples // 2))
def test_searches_beside_a_request_find_what_they_find_alone(texts, width, max_tokens, cache, spare, after):
    """In a pool that is hardly larger than what the request and the longest search need: searches are preempted, and
    the request keeps its blocks, and its text."""
    block_size = 64 if cache == "contiguous" else 2
    longest = max(map(len, texts)) + max_tokens - 1
    llm = engine(
        cache=cache, block_size=block_size, num_blocks=cdiv(9, block_size) + width * cdiv(longest, block_size) + spare
    )
    prompt, params = [5, 6, 7], SamplingParams(max_tokens=6, ignore_eos=True)
    request = llm.add_request({"prompt_token_ids": prompt}, params)
    for _ in range(after):
        llm.step()
    held = llm.blocks.blocks(request.seqs[0].seq_id)
    search = BeamSearchParams(width, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.beam_search([{"prompt_token_ids": text} for text in texts], search)
    for text, output in zip(texts, outputs, strict=True):
        found, expected = output.outputs, beams_alone(tiny(), text, search, 64)
        assert [o.token_ids for o in found] == [o.token_ids for o in expected]
        assert [o.score for o in found] == pytest.approx([o.score for o in expected])
        assert [o.text for o in found] == [o.text for o in expected]
    assert llm.blocks.blocks(request.seqs[0].seq_id) == held
    while llm.has_unfinished():
        llm.step()
    assert request.output().outputs[0].token_ids == alone(tiny(), prompt, params).outputs[0].token_ids
    assert not llm.blocks.tables


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"beam_width": 0}, "got 0"),
        ({"max_tokens": 0}, "got 0"),
        ({"length_penalty": float("nan")}, "nan"),
        ({"early_stopping": "soon"}, "'soon'"),
    ],
)
def test_search_fields_out_of_range_are_refused(fields, said):
    with pytest.raises(ValueError) as error:
        BeamSearchParams(**fields)
    assert said in str(error.value)


def test_a_search_is_refused_with_the_numbers_where_the_blocks_do_not_suffice():
    llm = engine(num_blocks=5)
    with pytest.raises(
        ValueError, match="2 beams of up to 9 stored tokens may take 6 blocks of 4 tokens, and 5 are free"
    ):
        llm.beam_search({"prompt_token_ids": [1] * 4}, BeamSearchParams(2, max_tokens=6))
    with pytest.raises(ValueError, match="beam_width is 9, and at most 8"):
        engine(max_num_seqs=8).beam_search("a", BeamSearchParams(9))
