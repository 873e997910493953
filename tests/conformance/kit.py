"""Chapter 14. A conformance kit for paged KV memory: two interfaces, two state machines, one content model.

One file that needs Hypothesis and nothing else: copy it beside your engine, write an adapter, and run it.

    python kit.py my_adapter.py --scripts 2000          all ADAPTERS of the file; my_adapter.py:Repaired is one class

Hypothesis writes scripts: requests come in bursts, run, share prefixes, run short of blocks, are preempted, fork and
are aborted. No model runs. The content model stands in for K and V, which depend on every token before them:

    slot (block 5, offset 1)   holds   the whole text up to its token, and its salt

A request must find its own text in every slot that it reads. So a block handed out twice, freed too early, or found
for another prefix, shows as the text of another request, and needs no tensor and no poison. Free and held blocks must
add up to the pool, every request must end, and each must get the tokens that it gets alone.
"""

import argparse
import functools
import importlib.util
import sys
import time
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

TOKENS = (0, 1, 65_536)  # the last one is 0 where a token is kept in 16 bits
IDLE_STEPS = 5  # steps that run nothing while a request is unfinished: then it waits for ever
MOST_STEPS = 5_000  # until all have ended: a small pool thrashes, and that is no fault


class Skip(Exception):
    """For an adapter's file: the engine is not here, or not in the version that the adapter was written for."""


# ---- what an adapter gives -------------------------------------------------------------------------------------------


# A sequence's share of a step: tokens start .. start + count - 1 are written, all up to there are read. `blocks` is its
# block table at the time of the step.
Work = namedtuple("Work", "seq start count blocks")
# Between two steps: the blocks of a sequence, and how many of its tokens they hold.
Table = namedtuple("Table", "blocks computed pool", defaults=("device",))
# What a client gets in a step.
Output = namedtuple("Output", "seq tokens finished")


class Memory:
    """Level 1: a block manager driven by hand. A sequence is a string, a token an integer. A method that takes blocks
    returns the copies to make at once, each (pool, block, pool, block), or None: refused, and nothing was changed."""

    block_sizes = (1, 2, 4)
    salts = forks = swaps = ends_twice = False

    def __init__(self, num_blocks, block_size): ...  # with swaps also num_host_blocks
    def free(self): ...  # {"device": blocks that could be handed out now}; with swaps also "host"
    def tables(self): ...  # sequence -> Table, of all that hold blocks
    def start(self, seq, tokens, salt): ...  # how many of its tokens were found (at most all but one), or None
    def append(self, seq, token): ...  # copies, or None
    def computed(self, seq): ...  # its tokens so far are written: other sequences may find their blocks
    def end(self, seq): ...
    def fork(self, seq, child): ...  # copies, or None
    def swap_out(self, seq): ...  # copies, or None
    def swap_in(self, seq): ...  # copies, or None


class Engine:
    """Level 2: a scheduler driven without a model. Sample 0 of request "r1" is the sequence "r1", sample 2 "r1/2"."""

    block_sizes = (1, 2, 4)
    num_blocks = (3, 10)  # from, to
    salts = swaps = priorities = reuses_names = False
    aborts = aborts_twice = True
    most_samples = 1  # above 1, samples fork the blocks of their prompt

    def __init__(self, num_blocks, block_size, budget, max_seqs): ...  # with swaps also num_host_blocks
    def fits(self, prompt_len, max_tokens): ...  # the documented condition on one request
    def add(self, request, prompt, max_tokens, **asked): ...  # asked: salt, samples, priority, where it has them
    def schedule(self): ...  # (copies that come first, [Work]); no Work where nothing could run
    def accept(self, next_token): ...  # the step has run: [Output]. next_token(seq) -> int, where a token is due
    def abort(self, request): ...
    def free(self): ...  # as above
    def tables(self): ...  # as above


# ---- the content model -----------------------------------------------------------------------------------------------


class Text:
    """The tokens of a sequence. marks[i] is its salt and the whole text up to token i: what a slot holds."""

    def __init__(self, salt, tokens):
        self.salt, self.tokens, self.marks = salt, [], []
        for token in tokens:
            self.append(token)

    def append(self, token):
        self.tokens.append(token)
        self.marks.append((self.salt, *self.tokens))


class Contents:
    def __init__(self, block_size):
        self.block_size, self.slots = block_size, {}  # (pool, block) -> {offset: mark}

    def block(self, seq, blocks, i):
        assert i // self.block_size < len(blocks), f"{seq}: position {i} has no block, its table is {blocks}"
        return blocks[i // self.block_size]

    def write(self, seq, blocks, text, start, end):
        for i in range(start, end):
            slots = self.slots.setdefault(("device", self.block(seq, blocks, i)), {})
            slots[i % self.block_size] = text.marks[i]

    def check(self, seq, blocks, text, end, pool="device"):
        assert len(set(blocks)) == len(blocks), f"{seq} has a block twice: {blocks}"
        assert end <= len(text.tokens), f"{seq}: {end} tokens are computed, and its text has {len(text.tokens)}"
        for i in range(end):
            block = self.block(seq, blocks, i)
            found = self.slots.get((pool, block), {}).get(i % self.block_size, "a slot that was never written")
            assert found == text.marks[i], (
                f"{seq} reads position {i} in block {block} of the {pool}: "
                f"it wants salt and text {text.marks[i]}, and finds {found}"
            )

    def copy(self, copies):
        for source, a, target, b in copies:
            self.slots[target, b] = dict(self.slots.get((source, a), {}))


def next_token(tokens, sample=0):
    """Stands in for the model: depends on every token, and on the sample."""
    value = 3 + sample
    for token in tokens:
        value = (value * 5 + token + 1) % 1_000_003
    return TOKENS[value // 7 % len(TOKENS)]


# ---- the machines ----------------------------------------------------------------------------------------------------

_any = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=14)
PROMPTS = _any | st.builds(lambda n, more: [0, 1, 0, 0, 1, 1, 0, 1][:n] + more[:4], st.integers(2, 8), _any)  # alike
SALTS = st.sampled_from((None, "a", "b"))


def act(when=lambda self: True, made_by=rule, **strategies):
    """A rule that Hypothesis may choose where `when` holds. The check follows; the machine of a failure is kept, and
    the last one that Hypothesis runs is the smallest."""

    def wrap(function):
        @functools.wraps(function)
        def run(self, *args, **kwargs):
            try:
                function(self, *args, **kwargs)
                self.check()
            except Exception:
                self.failed["machine"], self.engine_is_broken = self, True
                self.failed.setdefault("first", self.counts["scripts"] + 1)
                raise

        return precondition(when)(made_by(**strategies)(run)) if made_by else run

    return wrap


class Machine(RuleBasedStateMachine):
    """What both have: the adapter, its calls as Python, the texts, and what is checked between two calls."""

    adapter, counts, failed, progress = None, None, None, None  # set by run()
    engine, engine_is_broken = None, False

    def begin(self, data, *sizes):
        more = {"num_host_blocks": data.draw(st.integers(1, sizes[0]))} if self.adapter.swaps else {}
        self.calls, self.sizes, self.block_size = [], sizes, sizes[1]
        self.engine, self.contents = self.call(self.adapter, *sizes, **more), Contents(sizes[1])
        self.text, self.over, self.names, self.number = {}, set(), [], 0  # sequence -> Text; those that have ended
        self.held, self.total = {}, dict(self.engine.free())

    def call(self, name, *args, **kwargs):
        told = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
        self.calls.append(f"engine.{name}({told})" if self.calls else f"engine = {name.__name__}({told})")
        return (getattr(self.engine, name) if self.calls[1:] else name)(*args, **kwargs)

    def copy(self, copies):
        for source, _, target, _ in copies:
            self.counts["copies on write" if source == target else f"blocks swapped to the {target}"] += 1
        self.contents.copy(copies)

    def check(self):
        """Every sequence finds its text, and free and held blocks are the whole pool."""
        tables, free = {seq: Table(*table) for seq, table in self.engine.tables().items()}, self.engine.free()
        held = {pool: set() for pool in self.total}
        for seq, table in tables.items():
            assert seq in self.text and seq not in self.over, f"{seq} has ended, and holds blocks {table.blocks}"
            held[table.pool].update(table.blocks)
            self.contents.check(seq, table.blocks, self.text[seq], table.computed, table.pool)
        for pool, total in self.total.items():
            assert free[pool] + len(held[pool]) == total, (
                f"{pool}: {free[pool]} blocks are free and {len(held[pool])} held, of {total}"
            )
        self.held = tables

    def teardown(self):
        if self.engine and not self.engine_is_broken:
            self.end_of_script()

    @act(made_by=None)
    def end_of_script(self):
        self.finish_all()
        assert self.engine.free() == self.total, f"leak: all have ended, and free are {self.engine.free()}"
        self.counts["scripts"] += len(self.calls) > 1
        self.progress(self.counts)


class MemoryMachine(Machine):
    """A block manager driven by hand: each token is written as soon as it has a slot."""

    @initialize(num_blocks=st.integers(2, 9), data=st.data())
    def build(self, num_blocks, data):
        self.begin(data, num_blocks, data.draw(st.sampled_from(self.adapter.block_sizes)))

    def on(self, pool):
        return sorted(seq for seq, table in self.held.items() if table.pool == pool)

    def take(self, name, seq, *args, needed=1, pool="device"):
        """A call that takes blocks. A refusal changes nothing, and is right only where fewer than `needed` are free."""
        free, held = self.engine.free(), {seq: list(table.blocks) for seq, table in self.held.items()}
        answer = self.call(name, seq, *args)
        if answer is None:
            now = self.engine.free(), {seq: list(table[0]) for seq, table in self.engine.tables().items()}
            assert now == (free, held), f"{name} was refused, and changed something: {(free, held)} to {now}"
            assert free[pool] < needed, f"{name} was refused: it needs {needed} blocks, and free are {free}"
            self.counts["refused"] += 1
        elif name != "start":
            self.copy(answer)
        return answer is not None and (answer, True)

    @act(tokens=PROMPTS, salt=SALTS)
    def start(self, tokens, salt):
        seq, self.number, text = f"s{self.number}", self.number + 1, Text(salt if self.adapter.salts else None, tokens)
        if taken := self.take("start", seq, tokens, text.salt, needed=-(-len(tokens) // self.block_size)):
            assert 0 <= taken[0] < len(tokens), f"{taken[0]} of {len(tokens)} tokens were found: one is left to compute"
            self.counts["prefix hits"] += taken[0] > 0
            self.text[seq], blocks = text, self.engine.tables()[seq][0]
            self.contents.check(seq, blocks, text, taken[0])
            self.contents.write(seq, blocks, text, taken[0], len(tokens))
            self.call("computed", seq)

    @act(lambda self: self.on("device"), data=st.data(), token=st.sampled_from(TOKENS), times=st.integers(1, 4))
    def append(self, data, token, times):
        seq = data.draw(st.sampled_from(self.on("device")))
        for _ in range(times):
            if self.take("append", seq, token):
                self.text[seq].append(token)
                end = len(self.text[seq].tokens)
                self.contents.write(seq, self.engine.tables()[seq][0], self.text[seq], end - 1, end)
                self.call("computed", seq)
                self.check()

    @act(lambda self: self.held or (self.over and self.adapter.ends_twice), data=st.data())
    def end(self, data):
        seq = data.draw(st.sampled_from(sorted(self.held) + sorted(self.over if self.adapter.ends_twice else ())))
        self.call("end", seq)
        self.over.add(seq)

    @act(lambda self: self.adapter.forks and self.on("device"), data=st.data())
    def fork(self, data):
        seq, child, self.number = data.draw(st.sampled_from(self.on("device"))), f"s{self.number}", self.number + 1
        if self.take("fork", seq, child):
            self.counts["forks"] += 1
            self.text[child] = Text(self.text[seq].salt, self.text[seq].tokens)

    @act(lambda self: self.adapter.swaps and self.held, data=st.data())
    def swap(self, data):
        seq = data.draw(st.sampled_from(sorted(self.held)))
        name, pool = ("swap_out", "host") if seq in self.on("device") else ("swap_in", "device")
        self.take(name, seq, needed=len(self.held[seq].blocks), pool=pool)

    def finish_all(self):
        for seq in self.held:
            self.call("end", seq)
            self.over.add(seq)


class EngineMachine(Machine):
    """Requests come in bursts, run, are preempted, fork and are aborted. Each gets the tokens that it gets alone."""

    @initialize(budget=st.integers(2, 12), max_seqs=st.integers(1, 5), data=st.data())
    def build(self, budget, max_seqs, data):
        blocks, size = st.integers(*self.adapter.num_blocks), st.sampled_from(self.adapter.block_sizes)
        self.begin(data, data.draw(blocks), data.draw(size), budget, max_seqs)
        self.asked, self.got, self.reached = {}, {}, {}  # request -> sequences; sequence -> tokens; -> tokens computed

    @act(burst=st.lists(st.tuples(PROMPTS, st.integers(1, 12)), min_size=1, max_size=4), data=st.data())
    def add(self, burst, data):
        for prompt, max_tokens in burst:
            if not self.engine.fits(len(prompt), max_tokens):
                continue
            asked = {"salt": data.draw(SALTS)} if self.adapter.salts else {}
            asked |= {"samples": data.draw(st.integers(1, most))} if (most := self.adapter.most_samples) > 1 else {}
            asked |= {"priority": data.draw(st.integers(0, 2))} if self.adapter.priorities else {}
            old = self.names if self.adapter.reuses_names else []
            name, self.number = data.draw(st.sampled_from([f"r{self.number}", *old])), self.number + 1
            self.names = [other for other in self.names if other != name]
            self.asked[name] = {name, *(f"{name}/{i}" for i in range(1, asked.get("samples", 1)))}
            for seq in self.asked[name]:
                self.text[seq], self.reached[seq], alone = Text(asked.get("salt"), prompt), 0, list(prompt)
                for _ in range(max_tokens):
                    alone.append(next_token(alone, self.sample_of(seq)))
                self.got[seq] = [], alone[len(prompt) :]
            self.over = {seq for seq in self.over if seq.partition("/")[0] != name}
            self.counts["requests"] += 1
            self.call("add", name, list(prompt), max_tokens, **asked)

    @staticmethod
    def sample_of(seq):
        return int(seq.partition("/")[2] or 0)

    @act(lambda self: self.asked, times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times if self.asked else 0):
            self.one_step()

    @act(lambda self: self.adapter.aborts and (self.asked or self.ended()), data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.asked) + self.ended()))
        self.call("abort", name)
        self.counts["aborts" if name in self.asked else "aborts of what had ended"] += 1
        self.leave(name)

    def ended(self):
        """Requests that may be aborted though they have ended: the client goes away late. Not twice in a row."""
        return self.names if self.adapter.aborts_twice and ".abort(" not in self.calls[-1] else []

    def leave(self, name):
        if name in self.asked:
            self.over |= self.asked.pop(name)
            self.names.append(name)

    def one_step(self):
        """Copies, then all writes, then all reads, then the tokens. Returns whether anything ran."""
        copies, work = self.call("schedule")
        told = ", ".join(f"{w.seq} {w.start} to {w.start + w.count - 1} in {list(w.blocks)}" for w in work)
        self.calls[-1] += f"  # {told or 'nothing'}"
        self.counts["steps"] += 1
        self.copy(copies)
        for w in work:
            assert w.seq in self.text and w.seq not in self.over, f"{w.seq} has ended, and is scheduled"
            assert w.count >= 1 and w.start + w.count <= len(self.text[w.seq].tokens), f"{w}: it has fewer tokens"
            self.counts["prefix hits"] += w.start > 0 and w.seq not in self.held
            self.counts["preemptions"] += w.start < self.reached[w.seq]
            self.reached[w.seq] = w.start + w.count
            self.contents.write(w.seq, w.blocks, self.text[w.seq], w.start, w.start + w.count)
        for w in work:
            self.contents.check(w.seq, w.blocks, self.text[w.seq], w.start + w.count)
        ends = {self.text[w.seq].marks[-1] for w in work if w.start + w.count == len(self.text[w.seq].tokens)}
        given, before = {}, self.held

        def due(seq):
            assert seq not in self.over and self.text[seq].marks[-1] in ends, f"{seq}: nothing computed its last token"
            self.counts["forks"] += self.reached[seq] == 0
            self.reached[seq] = len(self.text[seq].tokens)
            given[seq] = next_token(self.text[seq].tokens, self.sample_of(seq))
            self.text[seq].append(given[seq])
            return given[seq]

        for output in self.call("accept", due):
            self.receive(*output)
        self.calls[-1] = f"engine.accept({given}.get)"
        self.check()
        for seq, table in self.held.items():  # it runs no more: its blocks lie on the host
            self.counts["preemptions"] += table.pool != before.get(seq, table).pool == "device"
        return bool(work)

    def receive(self, seq, tokens, finished):
        assert seq not in self.over, f"{seq} has ended, and gets {tokens}"
        got, alone = self.got[seq]
        got += tokens
        assert got == (alone if finished else alone[: len(got)]), f"{seq} got {got}, and alone it gets {alone}"
        if finished:
            self.over.add(seq)
            name = seq.partition("/")[0]
            if self.asked[name] <= self.over:
                self.leave(name)

    def finish_all(self):
        idle = steps = 0
        while self.asked:
            idle, steps = 0 if self.one_step() else idle + 1, steps + 1
            assert idle < IDLE_STEPS, f"{', '.join(self.asked)} wait, free are {self.engine.free()}, and nothing runs"
            assert steps < MOST_STEPS, f"{', '.join(self.asked)} are unfinished after {steps} steps"


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    name: str
    counts: Counter
    seconds: float
    error: str | None
    first: int = 0  # the number of the first script that failed
    machine: Machine | None = None  # as the smallest failing script left it; its `calls` are that script

    @property
    def verdict(self):
        """In words that claim no more than was tried."""
        if self.error:
            return f"fails, first in script {self.first:,}: {self.error}"
        seen = " and ".join(f"{self.counts[what]:,} {what}" for what in ("preemptions", "prefix hits"))
        little = any(not self.counts[what] for what in ("preemptions", "prefix hits")) and self.counts["steps"]
        return f"held over {self.counts['scripts']:,} scripts with {seen}" + (": this proves little" if little else "")


def run(adapter, scripts=2000, *, number=None, shrink=True, progress=lambda counts: None):
    """Try so many scripts. number: a seed, for the same scripts again. progress is called with the counters."""
    failed = {}
    parts = {"adapter": adapter, "counts": Counter(), "failed": failed, "progress": staticmethod(progress)}
    base = EngineMachine if issubclass(adapter, Engine) else MemoryMachine
    machine, began, error = type(adapter.__name__, (base,), parts), time.monotonic(), None
    trying = settings(
        max_examples=scripts, stateful_step_count=30, deadline=None, database=None, suppress_health_check=HealthCheck,
        print_blob=False, report_multiple_bugs=False, phases=[Phase.generate] + [Phase.shrink] * shrink,
    )  # fmt: skip
    try:
        run_state_machine_as_test(machine if number is None else seed(number)(machine), settings=trying)
    except Exception as raised:
        if not failed:
            raise  # not of the engine
        error = f"{type(raised).__name__}: {raised}".partition("\n")[0]
    seconds = time.monotonic() - began
    return Result(adapter.__name__, parts["counts"], seconds, error, failed.get("first", 0), failed.get("machine"))


def load(name):
    """The adapters of "file.py", or the one that "file.py:Class" names."""
    path, _, wanted = name.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [getattr(module, wanted)] if wanted else module.ADAPTERS


def main(draw=None, where=str):
    """The command line. draw: prints the block tables of a failing script. where: the file that an engine's name means."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", help="the file of an adapter, or FILE:CLASS")
    parser.add_argument("--scripts", type=int, default=2000)
    parser.add_argument("--seed", type=int, help="the same scripts again")
    told, failed = parser.parse_args(), False
    try:
        adapters = load(where(told.engine))
    except Skip as reason:
        return print(f"skipped, and nothing was tried: {reason}")
    for adapter in adapters:

        def progress(counts):
            if counts["scripts"] % max(1, told.scripts // 10) == 0:
                print(f"  {adapter.__name__}: {dict(counts)}", flush=True)  # noqa: B023

        found = run(adapter, told.scripts, number=told.seed, progress=progress)
        print(f"{found.name}: {dict(found.counts)} in {found.seconds:.0f} s")
        if found.machine:
            failed = True
            print("the smallest script:\n  " + "\n  ".join(found.machine.calls))
            print(*(draw or tables)(found.machine), sep="\n")
        print(f"{found.name} {found.verdict}", flush=True)
    return sys.exit(failed)


def tables(machine):
    """The block tables that a failing script left, as lines."""
    return [f"{seq:>8}  {table[0]}, {table[1]} computed" for seq, table in machine.engine.tables().items()]


if __name__ == "__main__":
    import kit  # the adapter's file imports it by this name

    kit.main()
