"""Chapter 2. Text to tokens and back: nothing is lost, numbers are split, and text streams as whole characters."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minipaged.model import fetch
from minipaged.model.gguf_file import ModelFileError, open_gguf
from minipaged.model.load import load_model
from minipaged.model.tokenizer import TextTokenizer, panics_are_errors
from minipaged.model.tokenizer_files import byte_tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from model_files import EOS, SMALL, TOKENS, random_weights, write_folder, write_gguf

pytestmark = pytest.mark.ch02

BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2's tokenizer alone: its weights stay in the file."""
    if not fetch.is_fetched():
        pytest.skip("SmolLM2 is not here: run `minipaged fetch`")
    return tokenizer_from_gguf(open_gguf(fetch.smollm2_path()))


@pytest.fixture(params=["bytes", "smollm2"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else request.getfixturevalue("smollm2")


any_text = (
    st.text(max_size=30) | st.text("0123456789 ab.,\n\t'", max_size=30) | st.text("aé€😀\u200d\ufe0f", max_size=12)
).filter(lambda text: "<|" not in text)  # Hypothesis tries words of this file too, and special tokens are no text


@cache
def known_bytes(tokenizer: TextTokenizer):
    """The bytes that the vocabulary has a token for. SmolLM2's lacks 0x04, 0xF1 and some others."""
    alphabet = {byte: chr(byte) for byte in range(256) if chr(byte) in pre_tokenizers.ByteLevel.alphabet()}
    stand_ins = iter(range(256, 512))  # GPT-2's rule: bytes that do not print stand 256 and more higher
    alphabet |= {byte: chr(next(stand_ins)) for byte in range(256) if byte not in alphabet}
    vocabulary = tokenizer._tokenizer.get_vocab()
    return {byte for byte, letter in alphabet.items() if letter in vocabulary}


# ---- there and back --------------------------------------------------------------------------------------------------


@given(text=any_text)
def test_decoding_what_was_encoded_gives_the_text(tokenizer, text):
    known = known_bytes(tokenizer)
    kept = bytes(byte for byte in text.encode() if byte in known)
    assert tokenizer.decode(tokenizer.encode(text)) == kept.decode("utf-8", "replace")
    if tokenizer is BYTES:
        assert kept == text.encode(), "the byte tokenizer has no token for some byte"


def test_smollm2_knows_the_bytes_of_all_common_text(smollm2):
    """Lost are control characters, and planes of Unicode in which next to nothing is assigned."""
    lost = set(range(256)) - known_bytes(smollm2)
    in_use = {byte for point in range(0x20, 0x40000) if not 0xD800 <= point < 0xE000 for byte in chr(point).encode()}
    assert not lost & (in_use | set(b"\n\r\t"))


@given(text=any_text)
def test_the_byte_tokenizer_has_one_token_a_byte(text):
    token_ids = BYTES.encode(text)
    assert len(token_ids) == len(text.encode())
    assert all(0 <= token < 256 for token in token_ids)
    assert BYTES.eos_token_ids == {256}
    assert BYTES.largest_token_id == 256


@given(parts=st.lists(any_text | st.sampled_from(("<|im_start|>", "<|im_end|>", "<|endoftext|>")), max_size=6))
def test_special_tokens_are_one_token_each_and_no_text(smollm2, parts):
    special = {"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 0}
    token_ids = smollm2.encode("".join(parts))
    assert [token for token in token_ids if token < 3] == [special[part] for part in parts if part in special]
    words = [part for part in parts if part not in special]
    assert smollm2.decode(token_ids) == "".join(smollm2.decode(smollm2.encode(word)) for word in words)
    assert smollm2.eos_token_ids == {2}


@given(text=st.text("0123456789", min_size=1, max_size=12) | st.text("0123456789 ab.-", max_size=20))
def test_digits_are_split_one_by_one(smollm2, text):
    """So that 2026 is four tokens, wherever it stands."""
    pieces = smollm2.pieces(smollm2.encode(text))
    assert "".join(pieces) == text
    assert all(sum(letter.isdigit() for letter in piece) <= 1 for piece in pieces), pieces
    assert all(len(piece) == 1 for piece in pieces if piece.strip(" ").isdigit()), pieces


@given(text=st.text("12ahi", max_size=12))
def test_the_splitter_that_a_gguf_file_names_is_used(small_tokenizers, text):
    """Here "12" is a token: what splits digits never gives it, and what does not split them does."""
    splits_digits, does_not = small_tokenizers[0], small_tokenizers[2]
    assert splits_digits.decode(splits_digits.encode(text)) == does_not.decode(does_not.encode(text)) == text
    assert TOKENS.index("12") not in splits_digits.encode(text)
    assert does_not.encode(text).count(TOKENS.index("12")) == text.count("12")


@given(text=st.text("abhi. ", max_size=30))
def test_gguf_and_folder_give_the_same_tokens(small_tokenizers, text):
    from_gguf, from_folder = small_tokenizers[:2]
    assert from_gguf.encode(text) == from_folder.encode(text)
    assert from_gguf.decode(from_gguf.encode(text)) == text == from_folder.decode(from_folder.encode(text))
    assert from_gguf.encode(text).count(TOKENS.index("hi")) == text.count("hi")


@pytest.fixture(scope="module")
def small_tokenizers():
    weights = random_weights(SMALL)
    with TemporaryDirectory() as folder:
        write_folder(Path(folder) / "folder", SMALL, weights)
        write_gguf(Path(folder) / "model.gguf", SMALL, weights)
        write_gguf(Path(folder) / "gpt-2.gguf", SMALL, weights, tokenizer_ggml_pre=("add_string", "gpt-2"))
        return [load_model(Path(folder) / name).tokenizer for name in ("model.gguf", "folder", "gpt-2.gguf")]


@given(text=st.text("ahi", max_size=9), bos=st.integers(0, EOS))
def test_a_text_begins_with_the_token_that_the_model_was_trained_to_see_there(small_file_with_bos, text, bos):
    tokenizer = small_file_with_bos(bos)
    assert tokenizer.encode(text)[0] == bos
    assert tokenizer.bos_token_id == bos
    plain = TextTokenizer(tokenizer._tokenizer).encode(text)
    assert tokenizer.encode(text) == (plain if plain[:1] == [bos] else [bos, *plain])  # never twice
    assert tokenizer.decode(plain) == text


@pytest.fixture(scope="module")
def small_file_with_bos():
    def load(bos):
        with TemporaryDirectory() as folder:
            fields = {
                "tokenizer_ggml_add_bos_token": ("add_bool", True),
                "tokenizer.ggml.bos_token_id": ("add_uint32", bos),
            }
            write_gguf(Path(folder) / "model.gguf", SMALL, {}, **fields)
            return tokenizer_from_gguf(open_gguf(Path(folder) / "model.gguf"))

    return load


@given(before=st.text(max_size=5), half=st.integers(0xD800, 0xDFFF).map(chr), after=st.text(max_size=5))
def test_what_is_no_unicode_text_is_refused_with_its_place(before, half, after):
    """Bytes of a command line that are no UTF-8 arrive like this."""
    with pytest.raises(ValueError, match=f"not valid Unicode.*character {len(before)}$"):
        BYTES.encode(before + half + after)


# ---- streaming -------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_streamed_text_is_the_text_of_all_tokens(tokenizer, data):
    """Any tokens, as a model that was never trained writes them: characters broken off in the middle among them."""
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.largest_token_id), max_size=20), label="tokens")
    stream, given_out = tokenizer.stream(), ""
    for count, token in enumerate(token_ids, start=1):
        given_out += stream.push(token)
        assert tokenizer.decode(token_ids[:count]).startswith(given_out), "text was given out and then taken back"
    whole = tokenizer.decode(token_ids)
    # What is still held back can only be bytes that are no character yet.
    assert set(whole[len(given_out) :]) <= {"\ufffd"}
    assert given_out + stream.finish() == whole
    assert stream.finish() == "", "given out twice"


@given(text=any_text.filter(lambda text: "\ufffd" not in text))
def test_text_is_given_out_as_soon_as_a_token_ends_with_a_whole_character(tokenizer, text):
    if set(text.encode()) - known_bytes(tokenizer):
        return
    token_ids = tokenizer.encode(text)
    stream, given_out = tokenizer.stream(), ""
    for count, token in enumerate(token_ids, start=1):
        given_out += stream.push(token)
        so_far = tokenizer.decode(token_ids[:count])
        assert so_far.startswith(given_out), "a part of a character was given out"
        assert so_far.endswith("\ufffd") or given_out == so_far, "whole characters wait, and none is unfinished"
    assert given_out == text
    assert stream.finish() == ""


@given(text=st.text(min_size=1, max_size=8), cut=st.integers(1, 3))
def test_an_unfinished_character_is_not_given_out_before_the_end(text, cut):
    token_ids = BYTES.encode(text)
    unfinished = token_ids[:-cut] if len(text[-1].encode()) > cut else token_ids
    stream = BYTES.stream()
    given_out = "".join(map(stream.push, unfinished))
    if unfinished is not token_ids and "\ufffd" not in text:
        assert given_out == text[:-1]
        assert stream.finish() == "\ufffd"


def test_streams_do_not_share_what_they_hold_back():
    first, second = BYTES.stream(), BYTES.stream()
    euro, letter = BYTES.encode("€"), BYTES.encode("a")
    assert [first.push(token) for token in euro[:2]] == ["", ""]
    assert second.push(letter[0]) == "a"
    assert first.push(euro[2]) == "€"


# ---- chat ------------------------------------------------------------------------------------------------------------

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant")), "content": st.text(max_size=20)}), min_size=1
)


@given(messages=messages, system=st.none() | st.text(max_size=20))
def test_smollm2_chats_in_its_own_format(smollm2, messages, system):
    expected = f"<|im_start|>system\n{SYSTEM if system is None else system}<|im_end|>\n"
    for message in messages:
        expected += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    expected += "<|im_start|>assistant\n"
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    before = [dict(message) for message in messages]
    prompt = smollm2.apply_chat_template(messages)
    assert prompt == expected
    assert messages == before
    if not any("<|" in message["content"] for message in messages):
        assert smollm2.encode(prompt).count(1) == expected.count("<|im_start|>")


def with_template(template):
    return TextTokenizer(BYTES._tokenizer, chat_template=template)


ONE = [{"role": "user", "content": "Hello"}]


def test_a_model_without_a_chat_template_says_so():
    with pytest.raises(ValueError, match="no chat template"):
        BYTES.apply_chat_template(ONE)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in messages %}", "endfor"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ raise_exception('only a system message may come first') }}", "only a system message may come first"),
        ("{{ nothing.at_all }}", "nothing"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
        ("{{ messages.append('more') }}", "not safely callable|unsafe"),
        ("{{ messages[0].update(role='system') }}", "not safely callable|unsafe"),
    ],
)
def test_an_error_in_a_template_is_a_clear_error(template, said):
    with pytest.raises(ValueError, match=f"chat template does not take these messages.*{said}"):
        with_template(template).apply_chat_template(ONE)


@pytest.mark.parametrize("content", [None, 7, ["a"]])
def test_messages_that_a_template_does_not_take_are_refused(smollm2, content):
    with pytest.raises(ValueError, match="does not take these messages"):
        smollm2.apply_chat_template([{"role": "user", "content": content}])


VALUES = ("''", "messages", "messages[0]", "raise_exception", "cycler", "namespace", "self", "range", "joiner")
WAYS = ("{v}.{a}", "{v}['{a}']", "({v}|attr('{a}'))", "({v}|map(attribute='{a}')|list)", "'{{0.{a}}}'.format({v})")
ATTRIBUTES = ("__class__", "__init__", "__globals__", "__code__", "__subclasshook__", "__reduce__", "__dict__")
THEN = ("", ".__mro__", ".__globals__", ".__subclasses__()", ".__globals__.os.popen('id').read()")


@given(*map(st.sampled_from, (VALUES, WAYS, ATTRIBUTES, THEN)))
def test_a_hostile_template_does_not_reach_python(value, way, attribute, then):
    """Templates come with model files, from strangers."""
    expression = way.format(v=value, a=attribute) + then
    template = f"[{{% set x = {expression} %}}{{{{ x }}}}]"
    try:
        text = with_template(template).apply_chat_template(ONE)
    except ValueError as error:
        assert "does not take these messages" in str(error)
    else:
        assert not any(word in text for word in ("<class", "<function", "<module", "<code", "object at", "uid=")), text


# Llama 2, Mistral, Gemma: a character without a token is spelt by its bytes, which are text only all together.
SPELT = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"\u2581abcd",
    "\u2581a",
    "\u2581the",
    "sat",
    "\u2581\u2581",
]


@cache
def spelling_tokenizer(strips):
    """strips: whether the space that begins a text is no part of it, as in Llama 2."""
    vocab = {token: i for i, token in enumerate(SPELT)}
    spelt = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    spelt.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    spelt.add_special_tokens([AddedToken(token, special=True) for token in SPELT[:3]])
    return TextTokenizer(spelt)


# Often bytes of whole and of broken characters, spaces and special tokens, since any of them is rare among 264 tokens.
spelt_tokens = st.integers(0, len(SPELT) - 1) | st.sampled_from(
    [
        SPELT.index(token)
        for token in (
            "<0x0A>",
            "<0xF0>",
            "<0x9F>",
            "<0x98>",
            "<0x80>",
            "<0xE2>",
            "<0x20>",
            "\u2581",
            "<s>",
            "\u2581the",
        )
    ]
)


@given(strips=st.booleans(), prompt=st.lists(spelt_tokens, max_size=6), token_ids=st.lists(spelt_tokens, max_size=20))
@example(strips=False, prompt=[SPELT.index("<0x00>"), 0], token_ids=[SPELT.index("<0x80>")])
def test_streamed_bytes_that_turn_out_to_be_no_text(strips, prompt, token_ids):
    """Whatever the tokens: no error, nothing taken back, and the pieces are what the tokens add to the prompt."""
    tokenizer = spelling_tokenizer(strips)
    if any(SPELT[token].startswith("<0x") for token in [token for token in prompt if token > 2][-1:]):
        prompt = [*prompt, SPELT.index("a")]  # else the first bytes may change the prompt's own text
    before = tokenizer.decode(prompt)
    stream, given_out = tokenizer.stream(prompt), ""
    for count, token in enumerate(token_ids, start=1):
        given_out += stream.push(token)
        so_far = tokenizer.decode(prompt + token_ids[:count])
        assert so_far.startswith(before + given_out), "text was given out and then taken back"
        if token > 2 and not SPELT[token].startswith("<0x"):  # and no special token
            assert before + given_out == so_far, "it waits, and no byte is unfinished"
    given_out += stream.finish()
    assert before + given_out == tokenizer.decode(prompt + token_ids)
    assert given_out == tokenizer.decode_behind(prompt, token_ids)


def test_the_space_before_a_completion_is_kept():
    tokenizer = spelling_tokenizer(True)
    prompt, answer = [SPELT.index("\u2581the")], [SPELT.index("\u2581a"), SPELT.index("sat")]
    assert tokenizer.decode(prompt) + tokenizer.decode_behind(prompt, answer) == "the asat"
    assert tokenizer.decode_behind([], answer) == "asat"


@pytest.mark.parametrize("token", ["<0x80>", "<s>", "<0x0A>", "a"])
@pytest.mark.parametrize("kind", ["spelt", "bytes"])
def test_the_cost_of_a_token_does_not_grow(kind, token, monkeypatch):
    """Counted in tokens that are decoded: a run of lone bytes or of special tokens costs a few for each."""
    tokenizer = spelling_tokenizer(True) if kind == "spelt" else BYTES
    token_id = SPELT.index(token) if kind == "spelt" else {"<0x80>": 128, "<s>": 256, "<0x0A>": 10, "a": 97}[token]
    decoded = []
    monkeypatch.setattr(TextTokenizer, "decode", lambda self, ids: decoded.append(len(ids)) or "x" * len(ids))
    stream = tokenizer.stream()
    for _ in range(3_000):
        stream.push(token_id)
    stream.finish()
    assert sum(decoded) <= 5 * 3_000


# ---- what a folder says of it ---------------------------------------------------------------------------------------


@cache
def folder_tokenizer(bos=False, eos=False, shape=False, template=None):
    """A folder's tokenizer whose file puts tokens around a text, or cuts and pads it. "hi" is what begins a text."""
    with TemporaryDirectory() as folder:
        write_folder(folder, SMALL, {})
        saved = Tokenizer.from_file(f"{folder}/tokenizer.json")
        around = " ".join([*["hi"] * bos, "$A", *[TOKENS[EOS]] * eos])
        if bos or eos:
            saved.post_processor = processors.TemplateProcessing(
                single=around, special_tokens=[("hi", TOKENS.index("hi")), (TOKENS[EOS], EOS)]
            )
        if shape:
            saved.enable_truncation(max_length=1)
            saved.enable_padding(length=8, direction="left", pad_id=0, pad_token="a")
        saved.save(f"{folder}/tokenizer.json")
        settings = {"bos_token": "hi", "eos_token": TOKENS[EOS], "chat_template": template}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        return tokenizer_from_folder(Path(folder))


@given(text=st.text("abhi. ", max_size=12), bos=st.booleans(), eos=st.booleans(), shape=st.booleans())
def test_a_file_may_put_a_token_before_every_text_and_nothing_else_changes_it(text, bos, eos, shape):
    """Nor is a text cut or padded as the file's training wanted it, or ended: it is to be continued."""
    tokenizer, plain = folder_tokenizer(bos, eos, shape), folder_tokenizer().encode(text)
    begins = plain[:1] == [TOKENS.index("hi")]
    assert tokenizer.encode(text) == ([TOKENS.index("hi")] if bos and not begins else []) + plain
    assert tokenizer.encode(text, add_bos=False) == plain


BEGINS = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@given(text=st.text("ab. ", max_size=12), writes=st.booleans(), bos=st.booleans())
def test_a_conversation_begins_as_its_template_says(text, writes, bos):
    """Never twice with what begins a text, and not with it at all where the template writes none."""
    template = BEGINS if writes else BEGINS.replace("{{ bos_token }}", "")
    prompt = folder_tokenizer(bos=bos, template=template).chat_prompt([{"role": "user", "content": text}])
    assert prompt["prompt"] == "hi" * writes + text
    assert prompt["prompt_token_ids"] == [TOKENS.index("hi")] * writes + folder_tokenizer().encode(text)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "Hello"),
        ("{% for m in messages %}{% continue %}{{ m.content }}{% endfor %}!", "!"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        ("{{ tools is none }} {{ documents is none }} {{ tools is defined }}", "True True True"),
        ("{{ bos_token is defined }} {{ eos_token is defined }}", "False False"),
        ("{{ '%Y' == strftime_now('%%Y') }}", "True"),
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'b': '<é>', 'a': 1} | tojson(indent=1) }}", '{\n "b": "<é>",\n "a": 1\n}'),
        ("{{ {'b': 1, 'a': 1} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":1,"b":1}'),
        ("{{ messages[0].nothing is defined }}", "False"),
        ("{% if true %}\nA\n{% endif %}\n!", "A\n!"),  # a line break behind a block is no text
        ("A\n  {% if true %}B{% endif %}", "A\nB"),  # nor are spaces before one
    ],
)
def test_templates_find_what_transformers_gives_them(template, expected):
    messages = [{"role": "user", "content": "Hello", "nothing": None}, {"role": "user", "content": "again"}]
    assert with_template(template).apply_chat_template(messages) == expected


@given(names=st.lists(st.sampled_from(("default", "tool_use", "rag")), unique=True, max_size=3))
def test_of_several_templates_the_default_one_is_for_conversations(names):
    tokenizer = folder_tokenizer.__wrapped__(template=[{"name": name, "template": f"{name}!"} for name in names])
    if "default" in names:
        assert tokenizer.apply_chat_template(ONE) == "default!"
    else:
        with pytest.raises(ValueError, match="no chat template"):
            tokenizer.apply_chat_template(ONE)


def exploding():
    """Each further "a" doubles the ways to cut a text that does not end with "b"."""
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "!": 2, "a" * 40: 3}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    made.decoder = decoders.Replace(Regex("(a+)+b"), "")
    return made


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, ZeroDivisionError, TypeError])
def test_what_is_no_panic_stays_what_it_is(error):
    """Ctrl-C above all."""
    with pytest.raises(error), panics_are_errors():
        raise error


def test_a_pattern_that_explodes_is_an_error_of_its_text_alone():
    tokenizer = TextTokenizer(exploding())
    for call in (lambda: tokenizer.encode("a" * 40 + "!"), lambda: tokenizer.decode([3])):
        with pytest.raises(ValueError, match="does not get through this text"):
            call()
    assert tokenizer.encode("aab!") == [0, 0, 1, 2]
    with TemporaryDirectory() as folder:
        write_folder(folder, SMALL, {})
        made = exploding()
        made.normalizer = normalizers.Sequence(
            [normalizers.Replace("a", "a" * 40), normalizers.Replace(Regex("(a+)+b"), "")]
        )
        made.save(f"{folder}/tokenizer.json")
        with pytest.raises(ModelFileError, match="is not a usable"):
            tokenizer_from_folder(Path(folder))
