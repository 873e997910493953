"""Chapter 10. From tokens to text as they come, and the places where a text ends.

    tokens   "The"  " qu"  "ick\\n"  "\\n"             stop = "\\n\\n"
    pieces   The     qu     ick      -> stop          the line break is held back until it is no beginning of a stop

A token need not end where a character ends, and a stop string need not begin where a token begins. So text is given
out only when nothing that follows can change it.
"""

from minipaged.engine.sequence import FinishReason, SamplingParams
from minipaged.model.tokenizer import TextTokenizer


class IncrementalDetokenizer:
    """The text of one sequence: a function of its tokens. Invariant: the pieces joined are a beginning of `text`, and
    the whole of it where the text has ended."""

    def __init__(self, params: SamplingParams, tokenizer: TextTokenizer, max_tokens: int):
        """max_tokens: new tokens at most, by the parameters and by the context."""
        self.params, self.max_tokens = params, max_tokens
        self.eos_token_ids = frozenset() if params.ignore_eos else tokenizer.eos_token_ids
        self.hold_back = max((len(string) - 1 for string in params.stop_strings), default=0)  # characters
        self.text = ""
        self.pieces: list[str] = []  # the new text that each token gave out
        self.finish_reason: FinishReason | None = None
        self._stream = tokenizer.stream()
        self._num_given = 0  # characters

    def push(self, token_id: int) -> None:
        """One more token."""
        reason: FinishReason | None = None
        stops = token_id in self.params.stop_token_ids
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
        self.text, self.finish_reason = text, reason
        self._give(0 if reason else self.hold_back)

    def close(self) -> None:
        """No token follows: give out what was held back."""
        try:
            self.text += self._stream.finish()
        finally:
            self._give(0)

    def _give(self, hold_back: int) -> None:
        end = max(self._num_given, len(self.text) - hold_back)
        self.pieces.append(self.text[self._num_given : end])
        self._num_given = end
