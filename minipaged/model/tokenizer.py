"""Chapter 2. Text to token ids and back, and a conversation to a text.

The package `tokenizers` does the work, and jinja2 fills in the model's chat template. `tokenizer_files.py` finds both
in the model's files.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

Message = dict[str, str]


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
        self.special_tokens = {"bos_token": "", "eos_token": "", **(special_tokens or {})}

    @property
    def largest_token_id(self) -> int:
        """The largest id that `encode` may give."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max([*ids, -1 if self.bos_token_id is None else self.bos_token_id])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises ValueError where it is not Unicode text (half of a surrogate pair).

        The token that begins a text is put before it, unless it stands there: chat templates write it themselves.
        Special tokens that stand in the text as words (<|im_end|>) are read as such: a chat template writes them so. A
        byte that the vocabulary lacks is left out, as elsewhere: SmolLM2's lacks a few, of control characters and of
        planes of Unicode that are hardly in use.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason}, at character {error.start}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.bos_token_id is None or ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens, without special tokens. Bytes that are not a whole character read as U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's own text, special tokens included: for pictures of what lies in which slot."""
        return [self._tokenizer.decode([token], skip_special_tokens=False) for token in token_ids]

    def stream(self) -> "TextStream":
        return TextStream(self)

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
        sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            return sandbox.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **self.special_tokens
            )
        except Exception as error:  # the template is a program: any exception may be its own
            raise ValueError(f"the model's chat template does not take these messages: {error}") from error


class TextStream:
    """Text as its tokens come: it is given out as soon as a token ends with a whole character.

    Invariant: what was given out is a beginning of `decode` of all tokens so far; with `finish`, it is the whole.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._given = 0  # characters

    def push(self, token_id: int) -> str:
        """The new text that this token completes; empty while a character is unfinished."""
        self._token_ids.append(token_id)
        try:
            text: str = self._decoder.step(self._tokenizer._tokenizer, token_id) or ""
        except Exception:  # the package's: bytes that end no character changed the text before them; begin again
            self._decoder = DecodeStream(skip_special_tokens=True)
            text = self._decoder.step(self._tokenizer._tokenizer, token_id) or ""
        self._given += len(text)
        return text

    def finish(self) -> str:
        """No token follows: what is left of the text. A character that was never finished reads as U+FFFD."""
        rest = self._tokenizer.decode(self._token_ids)[self._given :]
        self._given += len(rest)
        return rest


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the model's own words, for training. Here it is its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
