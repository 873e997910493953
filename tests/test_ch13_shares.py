"""Chapter 13. Which rank holds what, and layers that are divided: the algebra, on ranks that are threads.

Processes, files and the engine are in test_ch13_tensor_parallel.py.
"""

import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from minipaged.cdiv import cdiv
from minipaged.distributed.group import CollectiveError
from minipaged.distributed.layers import RowParallelLinear, VocabParallelEmbedding, VocabParallelHead, parallelise
from minipaged.distributed.load import slice_of
from minipaged.distributed.shares import INNER_UNIT, local_config, parts, shares, step_traffic, weight_bytes
from minipaged.model.batch import make_batch
from minipaged.model.load import tiny_transformer
from minipaged.model.recompute import RecomputeCache
from minipaged.model.transformer import Transformer
from minipaged.model.weights import source_from_transformer
from rank_models import config, in_words, models_and_ranks, real_models_and_ranks
from rank_threads import Turns, on_threads

pytestmark = pytest.mark.ch13

PATIENCE = 60.0  # seconds, ten times what a busy machine needs; a call that another rank does not make is told at once


# ---- which rank holds what -------------------------------------------------------------------------------------------


def dealt_out(ranges, total):
    """Whether the ranges are 0 to total - 1, one behind the other."""
    return [i for part in ranges for i in part] == list(range(total))


@given(st.integers(0, 40) | st.sampled_from((1_536, 11_009, 49_152)), st.integers(1, 9))
def test_parts_are_runs_without_a_gap_as_equal_as_can_be(total, size):
    found = parts(total, size)
    assert len(found) == size
    assert dealt_out(found, total), f"parts({total}, {size}) is {found}"
    lengths = [len(part) for part in found]
    assert max(lengths) - min(lengths) <= 1, f"parts({total}, {size}): lengths {lengths}"
    assert lengths == sorted(lengths, reverse=True), (
        f"parts({total}, {size}): the longer ones come first, not {lengths}"
    )


@given(models_and_ranks() | real_models_and_ranks())
def test_shares_partition_heads_inner_columns_and_words(drawn):
    model, size = drawn
    found = shares(model, size)
    assert len(found) == size
    for name, total in (("heads", model.num_heads), ("inner", model.intermediate_size), ("vocab", model.vocab_size)):
        ranges = [getattr(share, name) for share in found]
        assert dealt_out(ranges, total), f"{in_words(model, size)}: {name} 0 to {total - 1} are dealt out as {ranges}"
        assert all(ranges), f"{in_words(model, size)}: a rank has nothing of {name}: {ranges}"
    lengths = [len(share.vocab) for share in found]
    assert lengths == [len(part) for part in parts(model.vocab_size, size)], f"words are dealt out as {lengths}"
    units, rest = divmod(model.intermediate_size, INNER_UNIT)
    if rest == 0 and units >= size:
        starts = [share.inner.start for share in found]
        assert not any(start % INNER_UNIT for start in starts), f"a unit of {INNER_UNIT} columns is cut: {starts}"


@given(models_and_ranks() | real_models_and_ranks())
def test_a_rank_has_the_kv_head_that_each_of_its_query_heads_reads(drawn):
    """Attention on a rank knows places and no numbers: its i-th query head reads KV head i // (its group)."""
    model, size = drawn
    group = model.num_heads // model.num_kv_heads
    for rank, share in enumerate(shares(model, size)):
        count = len(share.kv_heads)
        where = f"{in_words(model, size)}: rank {rank} holds query heads {share.heads} and KV heads {share.kv_heads}"
        assert count and len(share.heads) % count == 0, f"{where}, which do not form groups"
        for i, head in enumerate(share.heads):
            read = share.kv_heads[i // (len(share.heads) // count)]
            assert read == head // group, f"{where}: query head {head} reads KV head {read}, not {head // group}"


@given(models_and_ranks() | real_models_and_ranks())
def test_a_kv_head_is_replicated_only_where_there_are_fewer_than_ranks(drawn):
    model, size = drawn
    held = [head for share in shares(model, size) for head in share.kv_heads]
    assert set(held) == set(range(model.num_kv_heads)), f"{in_words(model, size)}: KV heads {held} are held"
    assert len(held) == max(size, model.num_kv_heads), f"{in_words(model, size)}: KV heads {held} are held"
    copies = [held.count(head) for head in range(model.num_kv_heads)]
    assert max(copies) - min(copies) <= 1, f"{in_words(model, size)}: KV heads {held} are held"


def test_smollm2_on_two_ranks_is_divided_by_groups():
    two = shares(config(3, 3), 2)
    assert [share.heads for share in two] == [range(6), range(6, 9)]
    assert [share.kv_heads for share in two] == [range(2), range(2, 3)]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(-2, 40))
def test_a_world_size_that_leaves_a_rank_without_work_is_refused_with_the_numbers(kv_heads, group, size):
    model = config(kv_heads, group, vocab=30)
    most = min(model.num_heads, model.intermediate_size, model.vocab_size)
    assume(not 1 <= size <= most)
    with pytest.raises(ValueError, match=rf"(?<!\d){re.escape(str(size))}(?!\d)") as refused:
        shares(model, size)
    if size > model.num_heads:
        assert re.search(rf"\b{model.num_heads}\b", str(refused.value)), (
            "the message does not say how many heads there are"
        )


@given(models_and_ranks(), st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
def test_a_ranks_shape_and_its_bytes_are_those_of_what_it_holds(drawn, dtype):
    model, size = drawn
    whole = Transformer(model, dtype)
    assert weight_bytes(model, dtype) == sum(p.nbytes for p in whole.parameters()), f"of the whole: {model}"
    source = source_from_transformer(whole, lambda: None)
    for share in shares(model, size):
        local = local_config(model, share)
        found = (local.num_heads, local.num_kv_heads, local.intermediate_size, local.vocab_size)
        assert found == (len(share.heads), len(share.kv_heads), len(share.inner), len(share.vocab))
        assert (local.hidden_size, local.num_layers) == (model.hidden_size, model.num_layers)
        held = sum(p.nbytes for p in slice_of(source, share, dtype).parameters())
        assert weight_bytes(local, dtype) == held, f"{in_words(model, size)}: {share}"


# ---- one layer -------------------------------------------------------------------------------------------------------


def numbers(rows, columns, seed):
    """Whole numbers, so that sums are exact in any order."""
    return torch.randint(-4, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)).double()


def linear_of(weight):
    made = nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
    made.weight.data = weight.contiguous()
    return made.requires_grad_(False)


sizes = st.integers(1, 4)
seeds = st.integers(0, 9)


@given(sizes, st.integers(1, 3), st.integers(4, 9), seeds)
def test_a_row_parallel_layer_adds_up_once_and_every_rank_has_the_sum(size, rows, columns, seed):
    weight, input = numbers(3, columns, seed), numbers(rows, columns, seed + 1)
    cut = parts(columns, size)

    def rank_runs(group):
        mine = slice(cut[group.rank].start, cut[group.rank].stop)
        return RowParallelLinear(linear_of(weight[:, mine]), group)(input[:, mine]), group.calls["all_reduce"]

    for rank, (output, calls) in enumerate(on_threads(size, rank_runs, PATIENCE)):
        where = f"{size} ranks with {[len(part) for part in cut]} of {columns} inputs: rank {rank}"
        assert torch.equal(output, input @ weight.T), (
            f"{where} has {output.tolist()}, not {(input @ weight.T).tolist()}"
        )
        assert calls == (size > 1), f"{where} calls all_reduce {calls} times"


@given(sizes, st.integers(4, 9), st.data())
def test_every_rank_gets_the_row_of_every_word(size, words, data):
    table = numbers(words, 2, 1) + 10 * torch.arange(words)[:, None]  # each row is another one
    token_ids = torch.tensor(data.draw(st.lists(st.integers(0, words - 1), max_size=4)), dtype=torch.long)
    cut = parts(words, size)

    def rank_runs(group):
        mine = cut[group.rank]
        weight = nn.Parameter(table[mine.start : mine.stop].clone(), requires_grad=False)
        return VocabParallelEmbedding(weight, mine.start, group)(token_ids), group.calls["all_reduce"]

    for rank, (rows, calls) in enumerate(on_threads(size, rank_runs, PATIENCE)):
        where = f"{words} words on {size} ranks, {cut}: rank {rank} looks up {token_ids.tolist()}"
        assert torch.equal(rows, table[token_ids]), f"{where}, gets {rows.tolist()}, not {table[token_ids].tolist()}"
        assert calls == (size > 1), f"{where} and calls all_reduce {calls} times"


@given(sizes, st.integers(4, 9), st.integers(0, 2), seeds)
def test_rank_0_gets_the_score_of_every_word_in_order(size, words, rows, seed):
    weight, hidden = numbers(words, 3, seed), numbers(rows, 3, seed + 1)
    cut = parts(words, size)

    def rank_runs(group):
        mine = cut[group.rank]
        head = VocabParallelHead(linear_of(weight[mine.start : mine.stop]), words, group)
        return head(hidden), group.calls["gather"]

    found = on_threads(size, rank_runs, PATIENCE)
    where = f"{words} words on {size} ranks, {cut}, {rows} rows"
    scores, right = found[0][0], hidden @ weight.T
    assert scores.shape == right.shape, f"{where}: scores of shape {list(scores.shape)}, not {list(right.shape)}"
    assert torch.equal(scores, right), f"{where}: {scores.tolist()}, not {right.tolist()}"
    for rank, (_, calls) in enumerate(found):
        assert calls == (size > 1 and rows > 0), f"{where}: rank {rank} calls gather {calls} times"


# ---- a whole model ---------------------------------------------------------------------------------------------------

WATCHED = re.compile(r"^(embed_tokens|layers\.\d+\.(o_proj|down_proj))$")


def run(transformer, batch):
    """One step. Returns (what each of the layers gave that end in a sum, hidden states, logits of the batch's rows)."""
    seen = {}
    for name, module in transformer.named_modules():
        if WATCHED.match(name):
            module.register_forward_hook(lambda _module, _input, output, name=name: seen.update({name: output.clone()}))
    with torch.no_grad():
        hidden = transformer(batch, RecomputeCache())
        return seen, hidden, transformer.logits(hidden[batch.logits_rows])


@given(models_and_ranks(), st.integers(0, 3), st.booleans())
def test_ranks_together_compute_what_one_does_and_exchange_what_the_formula_says(drawn, seed, ends):
    model, size = drawn
    whole = tiny_transformer(torch.float64, seed, model)
    source, found = source_from_transformer(whole, lambda: None), shares(model, size)
    words = [(model.vocab_size - 1) * i // 6 for i in range(7)]  # of all ranks, the first and the last word among them
    batch = make_batch([words[:5], words[5:]], [0, 0], sampled=[0, 1] if ends else [])

    turns = Turns()

    def rank_runs(group):
        with turns.of(group.rank):
            part = slice_of(source, found[group.rank], torch.float64)
            parallelise(part, found[group.rank], model.vocab_size, group)
        return group, *run(part, batch)

    seen, hidden, logits = run(whole, batch)
    results = on_threads(size, rank_runs, PATIENCE)
    expected = step_traffic(model, size, 7, len(batch.logits_rows), torch.float64)
    for group, seen_there, hidden_there, _ in results:
        where = f"{in_words(model, size)}: rank {group.rank}"
        for name in seen:
            wrong = rows_that_differ(seen_there.get(name), seen[name])
            assert not wrong, f"{where} differs first after {name}, in rows {wrong} of 7"
        assert close(hidden_there, hidden), f"{where} has other hidden states"
        calls, brought = dict(group.calls), dict(group.bytes)
        assert calls.get("all_reduce", 0) == expected.all_reduces, f"{where} calls {calls}"
        assert brought.get("all_reduce", 0) == expected.all_reduce_bytes, f"{where} brings {brought}"
        assert calls.get("gather", 0) == expected.gathers, f"{where} calls {calls}"
        assert brought.get("gather", 0) == expected.gather_bytes, f"{where} brings {brought}"
    assert close(results[0][3], logits), f"{in_words(model, size)}: rank 0 has other logits"


def close(there, here):
    return there is not None and there.shape == here.shape and torch.allclose(there, here, rtol=1e-9, atol=1e-9)


def rows_that_differ(there, here):
    if there is None or there.shape != here.shape:
        return list(range(len(here)))
    return [row for row in range(len(here)) if not close(there[row], here[row])]


@given(models_and_ranks(), st.integers(0, 99), st.integers(0, 9))
def test_what_a_step_exchanges_is_the_pages_formula(drawn, tokens, ends):
    """docs/tensor_parallel.md: 2 L + 1 all-reduces of T x H numbers, and one gather of E x ceil(V / R)."""
    model, size = drawn
    found = step_traffic(model, size, tokens, ends, torch.float32)
    number, words = (2 * model.num_layers + 1, cdiv(model.vocab_size, size)) if size > 1 else (0, 0)
    assert (found.all_reduces, found.all_reduce_bytes) == (number, number * tokens * model.hidden_size * 4)
    assert (found.gathers, found.gather_bytes) == (int(size > 1 and ends > 0), ends * words * 4)


# ---- ranks that are threads ------------------------------------------------------------------------------------------


def test_of_ranks_that_fail_the_one_that_did_so_by_itself_is_heard():
    def fails_on_rank_1(group):
        if group.rank == 1:
            raise KeyError("no such word")
        group.all_reduce(torch.ones(1))

    with pytest.raises(KeyError, match="no such word"):
        on_threads(3, fails_on_rank_1)


def test_a_rank_that_leaves_others_waiting_is_noticed_at_once():
    def rank_0_asks_once_more(group):
        group.all_reduce(torch.ones(1))
        if group.rank == 0:
            group.all_reduce(torch.ones(1))

    with pytest.raises(CollectiveError, match=r"all_reduce: .*onnection (closed|reset) by peer"):
        on_threads(3, rank_0_asks_once_more, timeout=600.0)
    assert on_threads(3, lambda group: group.all_reduce(torch.tensor([group.rank])).item()) == [3, 3, 3]
