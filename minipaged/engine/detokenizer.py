"""Chapter 10. From tokens to text as they come, and the places where a text ends.

    tokens   "The"  " qu"  "ick\\n"  "\\n"             stop = "\\n\\n"
    pieces   The     qu     ick      -> stop          the line break is held back until it is no beginning of a stop

A token need not end where a character ends, and a stop string need not begin where a token begins. So text is given
out only when nothing that follows can change it.
"""

from collections.abc import Sequence as Items
from contextlib import suppress
from typing import NamedTuple

from minipaged.engine.sequence import FinishReason, SamplingParams
from minipaged.model.tokenizer import TextTokenizer


class Piece(NamedTuple):
    """The new text that a token gave out, and why it was the last one."""

    text: str
    finish_reason: FinishReason | None


class IncrementalDetokenizer:
    """The text of one sequence: a function of its tokens. Invariant: the pieces joined are a beginning of `text`, and
    all of it once the text has ended, which is the append of its last piece."""

    def __init__(
        self, params: SamplingParams, tokenizer: TextTokenizer, max_tokens: int, prompt_token_ids: Items[int] = ()
    ):
        """max_tokens: new tokens at most, by the parameters and by the context."""
        self.params, self.max_tokens = params, max_tokens
        self.eos_token_ids = frozenset() if params.ignore_eos else tokenizer.eos_token_ids
        self.hold_back = max((len(string) - 1 for string in params.stop_strings), default=0)  # characters
        self.text = ""
        self.pieces: list[Piece] = []
        self._stream = tokenizer.stream(prompt_token_ids)
        self._num_given = 0  # characters

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.pieces[-1].finish_reason if self.pieces else None

    def push(self, token_id: int) -> None:
        """One more token."""
        reason: FinishReason | None = None
        stops = token_id in (self.params.stop_token_ids or ())
        text = self.text if stops else self.text + self._stream.push(token_id)  # its text is no part of the answer
        if stops or token_id in self.eos_token_ids:
            reason = "stop"
        elif len(self.pieces) + 1 >= self.max_tokens:
            reason = "length"
        if reason:  # a character that is still unfinished is given out as it is
            text += self._stream.finish()
        ends = [at for string in self.params.stop_strings if (at := text.find(string)) >= 0]
        if ends:
            text, reason = text[: min(ends)], "stop"
        self.text = text
        self._give(reason)

    def close(self, reason: FinishReason) -> None:
        """No token follows: give out what was held back."""
        with suppress(Exception):  # the tokenizer may be what failed
            self.text += self._stream.finish()
        self._give(reason)

    def _give(self, reason: FinishReason | None) -> None:
        start, end = self._num_given, len(self.text) - (0 if reason else self.hold_back)
        self._num_given = max(start, end)
        self.pieces.append(Piece(self.text[start : self._num_given], reason))
