"""OpenAI's API in data: what a client may ask, and the form of the answers and errors.

A field that the engine cannot honour is refused by name, unless its value asks for nothing (frequency_penalty 0, say).
Names beyond OpenAI's (top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, cache_salt) are vLLM's.
Source: https://platform.openai.com/docs/api-reference (chat, completions)
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from minipaged.engine.sequence import SamplingParams
from minipaged.model.tokenizer import Message, TextTokenizer
from minipaged.server.engine_loop import Piece

Kind = TypeVar("Kind", bound="_Asked")

# Values that ask for nothing: a client that sends all of its fields is served.
NOTHING: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logit_bias": {},
    "tools": [],
    "tool_calls": [],
    "response_format": {"type": "text"},
    "store": False,
}


SAMPLING = {"n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "stop_token_ids"}
SAMPLING |= {"ignore_eos", "seed"}  # fields that the engine takes as they are


class ApiError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None and not (k in NOTHING and v == NOTHING[k])}


class StreamOptions(_Asked):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Body(_Asked):
    model: str | None = None
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=16)] = []
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, max_length=256)
    user: str | None = None  # is not used
    metadata: dict[str, str] | None = None  # is not used

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "_Body":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for stream = true")
        return self

    def params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Raises ValueError, naming the field that is out of range."""
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **self.model_dump(include=SAMPLING))


Tokens = Annotated[list[int], Field(fail_fast=True)]


class CompletionRequest(_Body):
    prompt: str | Tokens | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[Tokens], Field(fail_fast=True)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens or 16

    def prompts(self, tokenizer: TextTokenizer) -> list[list[int]]:
        """The prompts as tokens. Raises ValueError for text that is not Unicode."""
        several = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if several and isinstance(several[0], int):
            several = [several]
        if not several:
            raise ValueError("prompt is an empty list")
        return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in several]  # type: ignore[misc]


class TextPart(_Asked):
    type: Literal["text"]
    text: str


class ChatMessage(_Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None  # is not used

    def message(self) -> Message:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}


class ChatRequest(_Body):
    messages: Annotated[list[ChatMessage], Field(min_length=1), Field(fail_fast=True)]
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs = true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def new_tokens(self) -> int | None:
        """None: to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    def prompts(self, tokenizer: TextTokenizer) -> list[list[int]]:
        """The conversation in the model's format, as tokens. Raises ValueError where the model has none."""
        return [tokenizer.chat_prompt([message.message() for message in self.messages])["prompt_token_ids"]]


def parsed(body: bytes, kind: type[Kind]) -> Kind:
    """Raises ApiError 400 for a body that is no such request: which field, what it takes, and what it got."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False)
    field = ".".join(str(part) for part in found[0]["loc"])
    if found[0]["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: this server has no such field, or takes no other value of it", param=field)
    top = found[0]["loc"][:1]
    reasons = dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in found if each["loc"][:1] == top)
    got = repr(found[0]["input"])
    got = got if len(got) <= 60 else got[:59] + "…"
    message = f"{field + ': ' if field else ''}{'; or '.join(list(reasons)[:4])}; got {got}"
    return ApiError(400, message, param=str(top[0]) if top else None)


class Answer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, body: CompletionRequest | ChatRequest, tokenizer: TextTokenizer, model: str, prompt_tokens: int):
        self.body, self.tokenizer, self.prompt_tokens = body, tokenizer, prompt_tokens
        self.chat = isinstance(body, ChatRequest)
        self.completion_tokens = 0
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if body.stream else "chat.completion"
        self.head = {"id": "", "object": kind, "created": int(time.time()), "model": model}
        self._offsets: dict[int, int] = defaultdict(int)  # characters of each choice so far

    def name(self, request_id: str) -> None:
        """The answer is named after the engine's request, as the page shows it: chatcmpl-7 is 7.0 there."""
        self.head["id"] = f"{'chatcmpl' if self.chat else 'cmpl'}-{request_id}"

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        choices = defaultdict(list)
        for piece in pieces:
            choices[piece.choice].append(piece)
        return {**self.head, "choices": [self._choice(choices[i]) for i in sorted(choices)], "usage": self.usage()}

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """Who speaks: what a stream of a chat begins with."""
        delta = {"role": "assistant", "content": ""}
        empty = [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(num_choices)]
        return [{**self.head, "choices": [each]} for each in empty] if self.chat else []

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """None where the piece says nothing: its text is held back."""
        choice = self._choice([piece])
        said = piece.text or piece.finish_reason or choice["logprobs"]
        return {**self.head, "choices": [choice]} if said else None

    def last_chunk(self) -> dict[str, Any]:
        return {**self.head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}

    def _choice(self, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        self.completion_tokens += sum(piece.token_id is not None for piece in pieces)
        said: dict[str, Any] = {"text": text}
        if self.chat and self.body.stream:
            said = {"delta": {"content": text} if text else {}}
        elif self.chat:
            said = {"message": {"role": "assistant", "content": text}}
        logprobs = self._logprobs(pieces)
        self._offsets[pieces[0].choice] += len(text)
        return {"index": pieces[0].choice, **said, "logprobs": logprobs, "finish_reason": pieces[-1].finish_reason}

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        """The chosen token's, and the likeliest ones' in falling order."""
        kept = [(piece, piece.token_id, piece.logprobs) for piece in pieces]
        tokens = [(piece, token, found) for piece, token, found in kept if token is not None and found is not None]
        if not tokens:
            return None
        if self.chat:
            return {"content": [self._chat_token(token, found) for _, token, found in tokens], "refusal": None}
        offset, offsets = self._offsets[pieces[0].choice], []
        for piece, _, _ in tokens:
            offsets.append(offset)
            offset += len(piece.text)
        return {
            "tokens": [self._text(token) for _, token, _ in tokens],
            "token_logprobs": [found[token] for _, token, found in tokens],
            "top_logprobs": [
                {self._text(each): found[each] for each in reversed(self._likeliest(found))} for _, _, found in tokens
            ],
            "text_offset": offsets,
        }

    def _chat_token(self, token: int, found: dict[int, float]) -> dict[str, Any]:
        assert isinstance(self.body, ChatRequest)
        likeliest = self._likeliest(found)[: self.body.top_logprobs or 0]
        return {**self._one(token, found), "top_logprobs": [self._one(each, found) for each in likeliest]}

    def _one(self, token: int, found: dict[int, float]) -> dict[str, Any]:
        text = self._text(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # part of a character has no text of its own
        return {"token": text, "logprob": found[token], "bytes": list(text.encode()) if whole else None}

    @staticmethod
    def _likeliest(found: dict[int, float]) -> list[int]:
        return sorted(found, key=lambda token: -found[token])

    def _text(self, token: int) -> str:
        return self.tokenizer.pieces([token])[0]
