"""Chapter 2. The tokenizer of a model's files: built of the fields of a GGUF file, or read from tokenizer.json.

Two kinds are common. Byte-level BPE cuts a text into words, by a pattern that each family chose for itself, and merges
pairs of tokens within a word, those learned first before others. SentencePiece's BPE (Llama 2, Mistral 7B) cuts
nothing: a space is a letter, and the pair whose token has the highest score is merged first. A tokenizer.json says all
of it. A GGUF file gives tokens, merges or scores, and a name for the rest (llama.cpp's src/llama-vocab.cpp).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minipaged.model.folder import file_in, read_json
from minipaged.model.gguf_file import GGUFFile, ModelFileError, gguf_field
from minipaged.model.tokenizer import TextTokenizer, panics_are_errors

_UNKNOWN_TOKEN, _CONTROL_TOKEN, _USER_TOKEN = 2, 3, 4  # llama.cpp's token types; 1 is an ordinary token

_ENDINGS = r"| ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s" + _ENDINGS % ""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# GGUF's name of a splitter -> the patterns by which words are cut, one after the other.
_SPLITTERS: dict[str, list[str]] = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],  # digits by themselves, so that "2026" is always four tokens
    "llama-bpe": [_LLAMA3 % "{1,3}"],
    "smaug-bpe": [_LLAMA3 % "{1,3}"],  # SmolLM3's files say so
    "qwen2": [_LLAMA3 % ""],
    "tekken": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _ENDINGS % "/"
    ],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json", "config.json", "generation_config.json")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a token is taken as it is, though no merges lead there
_ADD_BOS = ("llama-bpe", "tekken")  # where the file does not say


def tokenizer_from_gguf(file: GGUFFile) -> TextTokenizer:
    """Raises ModelFileError, with its name, for a kind that is not supported."""
    kind, splitter = gguf_field(file, "tokenizer.ggml.model"), gguf_field(file, "tokenizer.ggml.pre", "default")
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and str(splitter) not in _SPLITTERS):
        raise ModelFileError(f"tokenizer {kind!r} with pre-tokenizer {splitter!r} is not supported")
    tokens, types = gguf_field(file, "tokenizer.ggml.tokens"), gguf_field(file, "tokenizer.ggml.token_type")
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if kind == "llama":
            unknown = next((token for token, of in zip(tokens, types, strict=True) if of == _UNKNOWN_TOKEN), None)
            prefix = gguf_field(file, "tokenizer.ggml.add_space_prefix", True)
            tokenizer = _sentencepiece_bpe(vocabulary, gguf_field(file, "tokenizer.ggml.scores"), unknown, prefix)
        else:
            merges = gguf_field(file, "tokenizer.ggml.merges")
            pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
            tokenizer = _byte_level_bpe(vocabulary, pairs, _SPLITTERS[splitter], splitter in _WHOLE_WORDS)
            if splitter == "qwen2":
                tokenizer.normalizer = normalizers.NFC()
        control = [tokens[i] for i, of in enumerate(types) if of in (_CONTROL_TOKEN, _UNKNOWN_TOKEN)]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        user = [tokens[i] for i, of in enumerate(types) if of == _USER_TOKEN]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])
    except ModelFileError:
        raise
    except Exception as error:  # the package raises a bare Exception
        raise ModelFileError(f"no tokenizer can be built from the GGUF file's tokens and merges: {error}") from error

    def token_id(name: str) -> int:
        value = gguf_field(file, f"tokenizer.ggml.{name}")
        if not isinstance(value, int) or not 0 <= value < len(tokens):
            raise ModelFileError(f"{name} must be a token, 0 to {len(tokens) - 1}, got {value!r}")
        return value

    names = [name for name in ("bos_token", "eos_token") if file.field(f"tokenizer.ggml.{name}_id") is not None]
    template = gguf_field(file, "tokenizer.chat_template", "")
    add_bos = gguf_field(file, "tokenizer.ggml.add_bos_token", kind == "llama" or splitter in _ADD_BOS)
    # A chat model may end a turn with another token than a text.
    ends = ["eos_token_id", *(["eot_token_id"] if file.field("tokenizer.ggml.eot_token_id") is not None else [])]
    return TextTokenizer(
        tokenizer,
        eos_token_ids=[token_id(name) for name in ends],
        chat_template=template if isinstance(template, str) and template else None,
        bos_token_id=token_id("bos_token_id") if add_bos else None,
        special_tokens={name: tokens[token_id(f"{name}_id")] for name in names},
    )


def tokenizer_from_folder(folder: Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, with config.json and tokenizer_config.json beside it.

    Raises ModelFileError, with its name, for a file that is damaged, and for an id that is none.
    """
    if (path := file_in(folder, "tokenizer.json")) is None:
        raise ModelFileError(f"{folder} holds no tokenizer.json")
    try:
        with panics_are_errors():
            tokenizer = Tokenizer.from_file(str(path))
            bos = _first_of_a_text(tokenizer)
    except Exception as error:  # the package raises a bare Exception
        raise ModelFileError(f"{path} is not a usable tokenizer.json: {error}") from error
    settings: dict[str, Any] = {}
    for name in _SETTINGS:  # the last word counts, and null is none
        if file := file_in(folder, name):
            settings |= {key: value for key, value in read_json(file).items() if value is not None}
    special_tokens = {}
    for name in _NAMED_TOKENS:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special_tokens[name] = token
    eos = settings.get("eos_token_id")
    if eos is None and "eos_token" in special_tokens:
        eos = tokenizer.token_to_id(special_tokens["eos_token"])
    ends = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for token_id in (*ends, settings.get("bos_token_id", 0)):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ModelFileError(f"{folder}: bos_token_id and eos_token_id must be tokens, 0 or more, got {token_id!r}")
    template = settings.get("chat_template")
    if file := file_in(folder, "chat_template.jinja"):
        template = file.read_text(encoding="utf-8")
    if isinstance(template, list):  # of several, one is for plain conversations
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return TextTokenizer(tokenizer, ends, template if isinstance(template, str) else None, bos, special_tokens)


def _first_of_a_text(tokenizer: Tokenizer) -> int | None:
    """The token that the file puts before every text, if any. (What it puts behind one would end a prompt.)"""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    ids: list[int] = tokenizer.encode("a").ids
    return ids[0] if ids[:1] != plain[:1] else None


def byte_tokenizer() -> TextTokenizer:
    """One token a byte, and one that ends a text: for models that were never trained, such as `tiny`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins, one for each byte
    tokenizer = _byte_level_bpe({token: i for i, token in enumerate(alphabet)}, [], _SPLITTERS["gpt-2"])
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return TextTokenizer(tokenizer, eos_token_ids=[len(alphabet)])


def _byte_level_bpe(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], patterns: list[str], whole_words: bool = False
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(vocabulary: dict[str, int], scores: list[float], unknown: str | None, prefix: bool) -> Tokenizer:
    """A letter that is no token is spelled by its bytes, <0x00> to <0xFF>. prefix: put a space before a text."""
    merges = sorted(
        (-scores[vocabulary[left + right]], vocabulary[left], vocabulary[right], left, right)
        for left, right in _halves(vocabulary)
    )
    pairs = [(left, right) for *_, left, right in merges]
    model = models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    before = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _halves(vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Each way to make a token of two others. The file has no list of merges: any two may meet."""
    for token in vocabulary:
        for i in range(1, len(token)):
            if token[:i] in vocabulary and token[i:] in vocabulary:
                yield token[:i], token[i:]
