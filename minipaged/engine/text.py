"""Chapter 10. From tokens to text as they come, and the places where a text ends.

    tokens   "The"  " qu"  "ick\\n"  "\\n"             stop = "\\n\\n"
    text     The     qu     ick      -> stop          the line break is held back until it is no beginning of a stop

A token need not end where a character ends, and a stop string need not begin where a token begins. So text is given
out only when nothing that follows can change it.
"""

from typing import NamedTuple

from minipaged.engine.sequence import CompletionOutput, FinishReason, SamplingParams
from minipaged.model.tokenizer import TextTokenizer


class Written(NamedTuple):
    """What one more token did to a sample: the text that it adds, and why the sample ends, if it does."""

    text: str
    finish_reason: FinishReason | None


class Writer:
    """Writes one sample's text. Invariant: what it has given out so far is a beginning of `output.text`."""

    def __init__(self, output: CompletionOutput, params: SamplingParams, tokenizer: TextTokenizer):
        self.output, self.params = output, params
        self._eos = frozenset() if params.ignore_eos else tokenizer.eos_token_ids
        self._stop_tokens = frozenset(params.stop_token_ids)
        self._stop_strings = params.stop_strings
        self._hold_back = max((len(s) - 1 for s in self._stop_strings), default=0)  # characters
        self._stream = tokenizer.stream()
        self._num_given = 0  # characters

    def push(self, token: int, is_full: bool) -> Written:
        """Append a token to the sample. is_full: no token can follow it."""
        output = self.output
        output.token_ids.append(token)
        if token not in self._stop_tokens:  # its text is no part of the answer
            output.text += self._stream.push(token)
        reason: FinishReason | None = None
        if token in self._eos or token in self._stop_tokens:
            reason = "stop"
        elif is_full or len(output.token_ids) >= self.params.max_tokens:
            reason = "length"
        if reason:  # a character that is still unfinished is given out as it is
            output.text += self._stream.finish()
        stops = [at for string in self._stop_strings if (at := output.text.find(string)) >= 0]
        if stops:
            output.text = output.text[: min(stops)]
            reason = "stop"
        return Written(self._new_text(0 if reason else self._hold_back), reason)

    def rest(self) -> str:
        """What was held back, where the sample ends without another token."""
        self.output.text += self._stream.finish()
        return self._new_text(0)

    def _new_text(self, hold_back: int) -> str:
        new = self.output.text[self._num_given : max(self._num_given, len(self.output.text) - hold_back)]
        self._num_given += len(new)
        return new
