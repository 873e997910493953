"""Chapter 2. Text to token ids and back, and a conversation to a text.

The package `tokenizers` does the work, and jinja2 fills in the model's chat template. `tokenizer_files.py` finds both
in the model's files.
"""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NotRequired, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders

Message = dict[str, str]


class TokenPrompt(TypedDict):
    """A prompt as tokens. prompt: their text, for the answer to repeat. cache_salt: prompts of unequal salts share no
    block (one for each tenant, say)."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


# Byte-level BPE writes each byte as one printable character: the printable ones of Latin-1 as they are, the others from
# U+0100 on, in order (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
_SPELT_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """The package's Rust code panics where a pattern of tokenizer.json explodes, say. That is no Exception, and would
    pass for a Ctrl-C: here it becomes a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer does not get through this text: {error}") from error


class TextTokenizer:
    """A tokenizer with the model's end-of-text tokens and its chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        bos_token_id: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """special_tokens: what a template calls some of them by, {"bos_token": "<s>", ...}."""
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # some files keep what their training wanted
        tokenizer.no_padding()
        self.eos_token_ids = frozenset(eos_token_ids)
        self.chat_template = chat_template
        self.bos_token_id = bos_token_id  # put before every text, where the model was trained so
        self.special_token_ids = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self.is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self.special_tokens = dict(special_tokens or {})

    @property
    def largest_token_id(self) -> int:
        """The largest id that `encode` may give."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max([*ids, -1 if self.bos_token_id is None else self.bos_token_id])

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """The tokens of a text. Raises ValueError where it is not Unicode text (half of a surrogate pair).

        add_bos: put the token that begins a text before it, unless it stands there. A chat template writes it itself.
        Special tokens that stand in the text as words (<|im_end|>) are read as such: a chat template writes them so. A
        byte that the vocabulary lacks is left out, as elsewhere: SmolLM2's lacks a few, of control characters and of
        planes of Unicode that are hardly in use.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason}, at character {error.start}") from error
        with panics_are_errors():
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        bos = [self.bos_token_id] if add_bos and self.bos_token_id is not None else []
        return ids if ids[:1] == bos else [*bos, *ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens, without special tokens. Bytes that are not a whole character read as U+FFFD."""
        with panics_are_errors():
            return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's own text, special tokens included: for pictures of what lies in which slot."""
        return [self._tokenizer.decode([token], skip_special_tokens=False) for token in token_ids]

    def id_to_token(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it; None where there is none of this number."""
        found: str | None = self._tokenizer.id_to_token(token_id)
        return found

    def stream(self, prompt_token_ids: Sequence[int] = ()) -> "TextStream":
        return TextStream(self, prompt_token_ids)

    def decode_behind(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text that tokens add to that of a prompt."""
        stream = self.stream(prompt_token_ids)
        return "".join([*map(stream.push, token_ids), stream.finish()])

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        """The prompt that asks the model for the next turn of a conversation: [{"role": ..., "content": ...}, ...].

        The template comes with the model file, from strangers: it runs in a sandbox. Raises ValueError where the
        model has none, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("the model has no chat template: give a plain prompt")
        extensions: list[type[Extension]] = [loopcontrols, _Generation]
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        sandbox.globals["raise_exception"] = _refuse  # what templates call to refuse
        sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        sandbox.filters["tojson"] = _to_json
        try:
            given = [{key: value for key, value in message.items() if value is not None} for message in messages]
            return sandbox.from_string(self.chat_template).render(
                messages=given, add_generation_prompt=True, tools=None, documents=None, **self.special_tokens
            )
        except Exception as error:  # the template is a program: any exception may be its own
            raise ValueError(f"the model's chat template does not take these messages: {error}") from error

    def chat_prompt(self, messages: Sequence[Message]) -> TokenPrompt:
        """A conversation as tokens. The template writes itself what begins a text. Raises as `apply_chat_template`."""
        written = self.apply_chat_template(messages)
        return TokenPrompt(prompt_token_ids=self.encode(written, add_bos=False), prompt=written)


class TextStream:
    """Text as its tokens come, behind a prompt: a token's text is given out as soon as no later token can change it.

    Invariant: what was given out is a beginning of what `decode` adds to the prompt for all tokens so far; with
    `finish`, it is the whole. Each token is decoded a bounded number of times.

    Two kinds of tokens need not be whole characters. Those of byte-level BPE are bytes of UTF-8: an incremental decoder
    keeps the beginning of a character. Others spell a byte of a rare character, as <0xE2>, and a run of such tokens is
    text, or each of them U+FFFD, as a whole (Llama 2, Mistral, Gemma): so it is kept until it ends.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_token_ids: Sequence[int] = ()):
        self._tokenizer, self._skipped = tokenizer, tokenizer.special_token_ids
        self._characters = getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        # Decoded with the tokens that follow it, since some decoders strip the space that begins a text.
        self._before = [token for token in prompt_token_ids if token not in self._skipped][-1:]
        self._run: list[int] = []  # tokens that spell bytes, not given out yet

    def push(self, token_id: int) -> str:
        """The new text that this token completes; empty while a character is unfinished."""
        name = self._tokenizer.id_to_token(token_id)
        if token_id in self._skipped or name is None:
            return ""
        if self._characters:
            known = all(character in _BYTES for character in name)  # else an added token, as it is written
            return self._characters.decode(bytes(_BYTES[each] for each in name) if known else name.encode())
        self._run.append(token_id)
        return "" if _SPELT_BYTE.fullmatch(name) else self._give()

    def finish(self) -> str:
        """No token follows: what is left of the text. A character that was never finished reads as U+FFFD."""
        return self._characters.decode(b"", final=True) if self._characters else self._give()

    def _give(self) -> str:
        given = len(self._tokenizer.decode(self._before))
        text = self._tokenizer.decode(self._before + self._run)[given:]
        self._before, self._run = (self._run or self._before)[-1:], []
        return text


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the model's own words, for training. Here it is its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
    """With the arguments of transformers' filter, and without jinja2's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
