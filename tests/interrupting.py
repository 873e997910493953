"""Ctrl-C at a chosen line, and scenarios of the engine that go on after it.

`sys.settrace` calls back before each line of the engine, of memory and of the caches; the k-th of them raises a
KeyboardInterrupt. The model's forward pass is one line of it, or a few: what it computes can be cut off anywhere.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

import minipaged
from minipaged import LLM
from minipaged.engine.sequence import CompletionOutput, RequestOutput, StreamOutput
from minipaged.viz.replay import at
from serving_model import Device

PACKAGE = Path(minipaged.__file__).parent
ALL = tuple(str(PACKAGE / name) for name in ("engine", "memory", "kvcache"))
RUNNER = tuple(str(PACKAGE / name) for name in ("engine/runner.py", "kvcache"))


class Interrupts:
    """Counts the lines of some files while it is on, and raises before the lines of these numbers (from 1)."""

    def __init__(self, *lines, files=ALL):
        self.lines, self.files = set(lines), files
        self.count, self.raised, self.places = 0, [], []

    @contextmanager
    def on(self):
        """A trace function that raises is switched off. Where a second interrupt is due, a profile function, which is
        not, switches it on again as soon as the next function returns or is called."""
        if len(self.lines) > 1:
            sys.setprofile(self._again)
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.setprofile(None)  # first: it would switch the other on again
            sys.settrace(None)

    def _again(self, frame, event, argument):
        if self.raised and sys.gettrace() is None and len(self.raised) < len(self.lines):
            sys.settrace(self._call)

    def _call(self, frame, event, argument):
        return self._line if is_counted(frame.f_code, self.files) else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count in self.lines:
                self.raised.append(KeyboardInterrupt(f"line {self.count}"))
                self.places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                raise self.raised[-1]
        return self._line

    def __str__(self):
        """For a failure: where the interrupts came."""
        return f"interrupted at lines {sorted(self.lines)}: {', '.join(self.places)}"


@lru_cache(1_000)
def is_counted(code, files):
    return code.co_filename.startswith(files) or code is TextRunner.run.__code__


@lru_cache(10_000)
def scores(text, vocab_size):
    """Logits that depend on the whole text, and on nothing else."""
    return torch.rand(vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(hash(text))) * 8


def quietly(function, *arguments):
    """Call it without counting its lines."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        return function(*arguments)
    finally:
        sys.settrace(trace)


class TextRunner:
    """In place of a model: K and V of a token are the text up to it, and every slot that attention reads is checked."""

    def __init__(self, llm):
        self.blocks, self.vocab_size, self.device = llm.blocks, llm.config.vocab_size, torch.device("cpu")
        self.slots = Device(llm.blocks)
        self.pool = llm.blocks.device

    def run(self, output, batch):
        """Five lines at which a step can be interrupted; what they call is not counted."""
        quietly(self._begin)
        quietly(self.slots.copy_blocks, output)
        quietly(self.slots.fail, output)  # an interrupt behind this line leaves wrong K and V
        quietly(self.slots.compute, output, list(output.num_scheduled_tokens))
        return quietly(self._logits, output)

    def _begin(self):
        if self.pool is not self.blocks.device:  # the pools were emptied: what the slots hold is not known any more
            self.pool, self.slots = self.blocks.device, Device(self.blocks)

    def _logits(self, output):
        self.slots.poison()
        texts = [tuple(seq.tokens(0, len(seq))) for seq in output.sampled]
        return torch.stack([scores(text, self.vocab_size) for text in texts]) if texts else torch.empty(0, 1)

    def close(self):
        """Nothing to end."""


class Recording(dict):
    """`requests` of an engine, which also keeps every request that ever was among them."""

    def __init__(self):
        super().__init__()
        self.ever = []

    def __setitem__(self, request_id, request):
        if request not in self.ever:
            self.ever.append(request)
        super().__setitem__(request_id, request)


class User:
    """Calls an engine. Where a call is interrupted, it looks what became of it, and calls again if that is nothing."""

    def __init__(self, model, interrupts, **settings):
        """With the real runner where the interrupts are in its files, and with text in the slots otherwise."""
        self.llm = LLM(model, **settings)
        self.llm.requests = Recording()
        if interrupts.files is ALL:
            self.llm.runner = TextRunner(self.llm)
        else:
            self.llm.runner.cache.key_cache.fill_(torch.nan)
            self.llm.runner.cache.value_cache.fill_(torch.nan)
        self.interrupts = interrupts
        self.own = []  # requests of add_request
        self.read = []  # for each of their sequences: [sequence, pieces]
        self.results = []  # of whole calls

    def interrupted(self, call):
        """Whether the call was. What comes out is the interrupt itself, the last one where there were several; but one
        that comes while a generator is dropped goes no further than that, in Python."""
        try:
            with self.interrupts.on():
                call()
        except KeyboardInterrupt as error:
            assert error in self.interrupts.raised
            return True
        return False

    def add(self, prompt, params):
        known = len(self.llm.requests.ever)
        while self.interrupted(lambda: self.llm.add_request({"prompt_token_ids": prompt}, params)):
            if len(self.llm.requests.ever) > known:
                break
        self.own.append(self.llm.requests.ever[-1])
        self.read += [[seq, []] for seq in self.own[-1].seqs]
        return self.own[-1]

    def step(self, times=1):
        for _ in range(times):
            self.interrupted(self.llm.step)
            self.read_on()

    def read_on(self):
        for reader in self.read:
            while self.interrupted(lambda: self._take(*reader)):  # noqa: B023
                pass
        for seq, pieces in self.read:
            for read, given in zip(pieces, list(seq.pieces(0)), strict=False):  # fewer, until the next call recovers
                assert read == given, "a piece that was given changed: a reader that comes later gets another one"
            if seq.finish_reason:
                assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [seq.finish_reason], (
                    "a sequence is finished, and its last piece was not given"
                )

    @staticmethod
    def _take(seq, pieces):
        pieces += list(seq.pieces(len(pieces)))

    def abort(self, request):
        while request.request_id in self.llm.requests:
            self.interrupted(lambda: self.llm.abort(request.request_id))
        self.read_on()

    def call(self, method, *arguments):
        """`generate`, `stream` or `beam_search`: interrupted, its requests are gone, and it can be called again."""
        found = []
        while self.interrupted(lambda: found.append(list(getattr(self.llm, method)(*arguments)))):
            if len(self.interrupts.raised) == 1:
                assert set(self.llm.requests.values()) <= set(self.own), "an interrupted call left a request behind"
        self.results.append(shape(by_sample(found[-1])))
        self.read_on()

    def call_once(self, method, *arguments):
        """One that is given up where it is interrupted."""
        self.interrupted(lambda: list(getattr(self.llm, method)(*arguments)))
        self.read_on()

    def finish(self):
        """Until nothing is left: then every block is back, and every request was counted once."""
        for _ in range(500):
            if not self.llm.has_unfinished():
                break
            self.step()
        llm = self.llm
        assert not llm.has_unfinished(), "it does not end"
        self.step()  # where the interrupt came behind the last token: the next call recovers, whatever it is
        assert not llm.scheduler.running and not llm.scheduler.waiting
        assert not llm.blocks.tables and llm.blocks.num_free == llm.blocks.num_blocks, "a block is held"
        assert llm.blocks.host is None or llm.blocks.host.num_free == llm.blocks.num_host_blocks
        reasons = [{seq.finish_reason for seq in request.seqs} for request in llm.requests.ever]
        counted = Counter("error" if "error" in r else "abort" if "abort" in r else "end" for r in reasons)
        totals = llm.stats
        assert (totals.num_finished, totals.num_aborted, totals.num_failed) == (
            counted["end"],
            counted["abort"],
            counted["error"],
        )
        assert totals.num_tokens_generated == sum(len(seq.outputs) for each in llm.requests.ever for seq in each.seqs)
        if llm.trace is not None:
            state = at(llm.trace, -1)
            assert not any(state.tables.values()) and not any(state.host_tables.values())

    def outcome(self):
        """What the user got: answers and streams of the own requests that were not aborted, and results of calls."""
        answers = [
            shape(request.output())
            for request in self.own
            if "abort" not in {seq.finish_reason for seq in request.seqs}
        ]
        streams = [shape(pieces) for seq, pieces in self.read if seq.finish_reason != "abort"]
        for seq, pieces in self.read:
            assert "".join(each.text for each in pieces) == seq.completion().text, "a stream has another text"
        return answers, streams, self.results


def by_sample(outputs):
    """Pieces of a stream, sample by sample: how requests take turns in it may change."""
    if outputs and isinstance(outputs[0], StreamOutput):
        return sorted(outputs, key=lambda piece: (int(piece.request_id), piece.index))
    return outputs


def shape(output):
    """An answer without what differs between two runs of one script: the request's number, times, and the last digits
    of a sum, which depend on what shares a batch."""
    if isinstance(output, float):
        return round(output, 9)
    if isinstance(output, list):
        return [shape(each) for each in output]
    if isinstance(output, dict):
        return {name: shape(each) for name, each in output.items()}
    if isinstance(output, RequestOutput):
        return shape(output.outputs)
    if isinstance(output, StreamOutput):
        return (output.index, output.text, output.token_id, output.finish_reason)
    return shape(vars(output)) if isinstance(output, CompletionOutput) else output
