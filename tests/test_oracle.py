"""A second opinion: transformers loads the same GGUF file, and must say the same, number by number.

    pytest -m oracle -s        prints the figures

Ten prompts of 16 to 256 tokens. Logits in float32, at every position; greedy tokens for 64 steps; ids of any text.
"""

import os
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.model import fetch
from minipaged.model.batch import make_batch
from minipaged.model.recompute import RecomputeCache

pytestmark = pytest.mark.oracle

LARGEST_DIFFERENCE = 1e-3
STEPS = 64

PROSE = """An operating system gives every process an address space of its own. The process sees one long row of
bytes, numbered from zero, and nothing of the other processes. The memory of the machine is another row of bytes,
and the system divides both rows into pieces of equal size: pages on the one side, frames on the other. A table says
which page lies in which frame. Two neighbours in the first row need not be neighbours in the second; a page that
nobody has touched need not lie anywhere; and two processes may share a frame without knowing it. Before paging,
every process was given one piece of memory, large enough for whatever it might come to need. Most of it was never
used, and what was left between two pieces was often too small for a third. In 2023 the same idea was carried over
to the servers of language models, which keep two vectors for every token, in every layer and every head, for as
long as a text grows. Nobody knows how long that will be. The old servers reserved room for 2,048 tokens at once,
and filled a fifth or a third of it. Now memory is cut into blocks of 16 tokens, and a block table says where the
next block lies. The answer does not change; only its place does."""

CODE = '''def translate(table, position, block_size=16):
    """Slot of a token: the number of its block times the size of a block, plus its offset."""
    block, offset = divmod(position, block_size)
    if block >= len(table):
        raise IndexError(f"position {position} lies past the {len(table)} blocks of this sequence")
    return table[block] * block_size + offset


assert [translate([7, 1], p) for p in (0, 15, 16, 31)] == [112, 127, 16, 31]
'''

CHAT = (
    "<|im_start|>system\nYou answer briefly.<|im_end|>\n<|im_start|>user\nWie heißt die Hauptstadt von Österreich, und "
    "wie viele Menschen leben dort (2024)? 日本語でもいいです 😀<|im_end|>\n<|im_start|>assistant\n"
)

# text, first token, number of tokens
SLICES = (
    (PROSE, 0, 16),
    (CHAT, 0, 32),
    (PROSE, 31, 47),
    (CODE, 0, 64),
    (PROSE, 5, 96),
    (CODE, 20, 100),
    (PROSE, 60, 128),
    (PROSE, 11, 177),
    (PROSE, 1, 255),
    (PROSE, 0, 256),
)


@pytest.fixture(scope="module")
def theirs():
    """transformers' model and tokenizer, from the very file that ours come from."""
    pytest.importorskip(
        "accelerate", reason="transformers reads GGUF files with accelerate: pip install -e '.[oracle]'"
    )
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing is looked up anywhere
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[oracle]'")
    if not fetch.is_fetched():
        pytest.skip("SmolLM2 is not here: run `minipaged fetch`")
    path = fetch.smollm2_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}, eager attention, float32")
    model.generation_config.eos_token_id = None  # do not stop at the end of a text: 64 tokens are compared
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def prompts(smollm2):
    found = [smollm2.tokenizer.encode(text)[first : first + count] for text, first, count in SLICES]
    assert [len(token_ids) for token_ids in found] == [count for _, _, count in SLICES]
    return found


def test_logits_agree_at_every_position(smollm2, theirs, prompts):
    largest = []
    for token_ids in prompts:
        batch = make_batch([token_ids], [0])
        with torch.inference_mode():
            ours = smollm2.transformer.logits(smollm2.transformer(batch, RecomputeCache()))
            expected = theirs[0](torch.tensor([token_ids])).logits[0]
        assert ours.shape == expected.shape == (len(token_ids), 49_152)
        largest.append((ours - expected).abs().max().item())
        print(
            f"{len(token_ids):4} tokens: largest difference {largest[-1]:.1e} "
            f"(logits from {expected.min():.1f} to {expected.max():.1f}), "
            f"likeliest token equal at {(ours.argmax(-1) == expected.argmax(-1)).sum()} of {len(token_ids)} positions"
        )
    assert max(largest) <= LARGEST_DIFFERENCE


def greedy(model, token_ids):
    """Their 64 likeliest tokens, and the smallest lead that one of them had over the second."""
    out = model.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best, second = torch.cat(out.logits).topk(2).values.T
    return out.sequences[0, len(token_ids) :].tolist(), (best - second).min().item()


def test_greedy_tokens_agree(smollm2, theirs, prompts):
    llm = LLM(smollm2, cache="paged", max_model_len=320, num_blocks=200)
    params = SamplingParams(max_tokens=STEPS, ignore_eos=True)
    start = time.perf_counter()
    requests = [{"prompt_token_ids": token_ids} for token_ids in prompts]
    ours = [output.outputs[0].token_ids for output in llm.generate(requests, params, progress=False)]
    print(f"\nours, one ragged batch through the paged cache: {time.perf_counter() - start:.1f} s")
    for token_ids, found in zip(prompts, ours, strict=True):
        expected, lead = greedy(theirs[0], token_ids)
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        print(f"{len(token_ids):4} tokens: {equal} of {STEPS} greedy tokens equal (smallest lead {lead:.4f})")
        assert found == expected


any_text = st.text(max_size=40) | st.text("0123456789 +-.,'st\n\t", max_size=40) | st.sampled_from((PROSE, CODE, CHAT))


@given(text=any_text)
def test_token_ids_agree_where_no_number_stands(smollm2, theirs, text):
    text = "".join(letter for letter in text if not letter.isnumeric())
    assert smollm2.tokenizer.encode(text) == theirs[1](text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def their_splitting_tokenizer(theirs):
    """The file's splitter is "smollm", which sets digits apart before all else; transformers 5.24 reads over that.

    It shows in white space before a number alone: "a  1" is a, two spaces and 1 for llama.cpp and for us, and for
    transformers a, one space, one space and 1.
    """
    tokenizer = Tokenizer.from_str(theirs[1].backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
    )
    return tokenizer


@given(text=any_text)
def test_token_ids_agree_with_the_splitter_that_the_file_names(smollm2, their_splitting_tokenizer, text):
    assert smollm2.tokenizer.encode(text) == their_splitting_tokenizer.encode(text, add_special_tokens=False).ids


def test_the_chat_template_gives_the_same_prompt(smollm2, theirs):
    hello, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}
    for messages in ([hello], [{"role": "system", "content": "Be brief."}, hello], [hello, answer, hello]):
        expected = theirs[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert smollm2.tokenizer.apply_chat_template(messages) == expected


@pytest.mark.parametrize(
    ("width", "length_penalty", "early_stopping"), [(2, 1.0, False), (4, 0.0, "never"), (4, 2.0, True)]
)
def test_beam_search_finds_the_same_hypotheses(smollm2, theirs, prompts, width, length_penalty, early_stopping):
    """The same texts in the same order, with the same scores. A text may end: both take the file's own end token."""
    llm = LLM(smollm2, cache="paged", max_model_len=320, num_blocks=200)
    eos = sorted(smollm2.tokenizer.eos_token_ids)
    chat = smollm2.tokenizer.encode(
        smollm2.tokenizer.apply_chat_template([{"role": "user", "content": "Say yes or no."}])
    )
    cases = [*prompts[:4], chat]
    params = BeamSearchParams(width, max_tokens=24, length_penalty=length_penalty, early_stopping=early_stopping)
    ours = llm.beam_search([{"prompt_token_ids": token_ids} for token_ids in cases], params, progress=False)
    largest = 0.0
    for token_ids, found in zip(cases, ours, strict=True):
        out = theirs[0].generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            max_new_tokens=24,
            eos_token_id=eos,
            pad_token_id=eos[0],
            output_scores=True,
            return_dict_in_generate=True,
        )
        for mine, sequence, score in zip(found.outputs, out.sequences, out.sequences_scores.tolist(), strict=True):
            expected = sequence[len(token_ids) :].tolist()
            assert mine.token_ids == expected[: len(mine.token_ids)]
            assert set(expected[len(mine.token_ids) :]) <= {eos[0]}, "theirs is longer"
            largest = max(largest, abs(mine.score - score) / max(1.0, abs(score)))
    ended = sum(o.finish_reason == "stop" for found in ours for o in found.outputs)
    print(
        f"\n{width} beams, length penalty {length_penalty}, early_stopping {early_stopping}: {len(cases)} prompts, all "
        f"{width} hypotheses equal ({ended} ended by themselves); scores differ by at most {largest:.1e} of themselves"
    )
    assert largest < 1e-4  # both are float32, in another order of sums
