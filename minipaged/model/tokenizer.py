"""Chapter 2. Text to token ids and back: byte-level BPE, rebuilt from what lies in the model file.

The package `tokenizers` does the work. This module knows where each format keeps the vocabulary, the merges, the
special tokens and the chat template.
"""

from collections.abc import Sequence
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from minipaged.model.gguf_file import GGUFFile
from minipaged.model.weights import ModelFileError, gguf_field, read_json

Message = dict[str, str]

_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # llama.cpp's token types; 1 is an ordinary token


class TextTokenizer:
    """A tokenizer with the model's end-of-text tokens and its chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        bos_token_id: int | None = None,
    ):
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.chat_template = chat_template
        self.bos_token_id = bos_token_id  # put before every text, where the model was trained so

    @property
    def largest_token_id(self) -> int:
        """The largest id that `encode` may give."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max([*ids, -1 if self.bos_token_id is None else self.bos_token_id])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises ValueError where it is not Unicode text (half of a surrogate pair).

        Special tokens that stand in the text as words (<|im_end|>) are read as such: a chat template writes them so. A
        byte that the vocabulary lacks is left out, as elsewhere: SmolLM2's lacks a few, of control characters and of
        planes of Unicode that are hardly in use.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason}, at character {error.start}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.bos_token_id is None else [self.bos_token_id, *ids]

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
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        sandbox.globals["raise_exception"] = _refuse  # what templates call to refuse
        try:
            return sandbox.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=True, bos_token="", eos_token=""
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
        text: str = self._decoder.step(self._tokenizer._tokenizer, token_id) or ""
        self._given += len(text)
        return text

    def finish(self) -> str:
        """No token follows: what is left of the text. A character that was never finished reads as U+FFFD."""
        rest = self._tokenizer.decode(self._token_ids)[self._given :]
        self._given += len(rest)
        return rest


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def tokenizer_from_gguf(file: GGUFFile) -> TextTokenizer:
    """Rebuild the tokenizer from GGUF metadata. Raises ModelFileError for kinds that are not byte-level BPE."""
    kind = gguf_field(file, "tokenizer.ggml.model")
    splitter = gguf_field(file, "tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or splitter not in ("smollm", "gpt-2", "default"):
        raise ModelFileError(f"tokenizer {kind!r} with pre-tokenizer {splitter!r} is not supported")
    tokens, merges = gguf_field(file, "tokenizer.ggml.tokens"), gguf_field(file, "tokenizer.ggml.merges")
    types = gguf_field(file, "tokenizer.ggml.token_type")
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        tokenizer = _byte_level_bpe(vocabulary, pairs, digits=splitter == "smollm")
        control = [tokens[i] for i, kind in enumerate(types) if kind == _CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        user = [tokens[i] for i, kind in enumerate(types) if kind == _USER_TOKEN]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])
    except Exception as error:  # the package raises a bare Exception
        raise ModelFileError(f"no tokenizer can be built from the GGUF file's tokens and merges: {error}") from error

    def token_id(name: str) -> int:
        value = gguf_field(file, f"tokenizer.ggml.{name}")
        if not isinstance(value, int) or not 0 <= value < len(tokens):
            raise ModelFileError(f"{name} must be a token, 0 to {len(tokens) - 1}, got {value!r}")
        return value

    template = gguf_field(file, "tokenizer.chat_template", "")
    return TextTokenizer(
        tokenizer,
        eos_token_ids=[token_id("eos_token_id")],
        chat_template=template if isinstance(template, str) and template else None,
        bos_token_id=token_id("bos_token_id") if gguf_field(file, "tokenizer.ggml.add_bos_token", False) else None,
    )


def tokenizer_from_folder(folder: Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, with config.json and tokenizer_config.json beside it."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelFileError(f"{folder} holds no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises a bare Exception
        raise ModelFileError(f"{path} is not a usable tokenizer.json: {error}") from error
    settings: dict[str, object] = {}
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):  # the last word counts
        if (folder / name).exists():
            settings.update(read_json(folder / name))
    eos = settings.get("eos_token_id")
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    bos = settings.get("bos_token_id") if settings.get("add_bos_token") else None
    return TextTokenizer(
        tokenizer,
        eos_token_ids=eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else [],
        chat_template=template if isinstance(template, str) else None,
        bos_token_id=bos if isinstance(bos, int) else None,
    )


def byte_tokenizer() -> TextTokenizer:
    """One token a byte, and one that ends a text: for models that were never trained, such as `tiny`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins, one for each byte
    tokenizer = _byte_level_bpe({token: i for i, token in enumerate(alphabet)}, merges=[], digits=False)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return TextTokenizer(tokenizer, eos_token_ids=[len(alphabet)])


def _byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], digits: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # SmolLM splits numbers digit by digit *before* anything else, so that "2026" is always four tokens.
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if digits else words
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
