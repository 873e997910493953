"""Chapter 14. A conformance kit for paged KV memory: two interfaces, two state machines, one content model.

One file that needs Hypothesis and nothing else: copy it beside your engine, write an adapter, kit.main([MyEngine]).

Hypothesis writes scripts: requests come in bursts, run, share prefixes, run short of blocks, are preempted, fork and
are aborted. No model runs. The content model stands in for K and V, which depend on every token before them:

    slot (block 5, offset 1)   holds   the whole text up to its token, and its salt

A request must find its own text in every slot that it reads. So a block handed out twice, freed too early, or found
for another prefix, shows as the text of another request, and needs no tensor and no poison. Free and held blocks must
add up to the pool, every request must end, and each must get the tokens that it gets alone.
"""

import functools
import time
from collections import Counter, namedtuple

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

TOKENS = (0, 1, 65_536)  # the last one is 0 where a token is kept in 16 bits
IDLE_STEPS, MOST_STEPS = 5, 5_000  # without work: requests wait for ever; until all end, since a small pool thrashes

Work = namedtuple("Work", "seq start count blocks")  # tokens start .. start + count - 1 of seq, and its block table
Table = namedtuple("Table", "blocks computed pool", defaults=("device",))  # `computed`: tokens that the blocks hold
Output = namedtuple("Output", "seq tokens finished")  # what a client gets in a step
Result = namedtuple("Result", "verdict counts seconds first machine")


class Memory:
    """Level 1: a block manager driven by hand. A sequence is a string, a token an integer. A method that takes blocks
    returns the copies to make at once, each (pool, block, pool, block), or None: refused, and nothing was changed."""

    block_sizes = (1, 2, 4)
    salts = forks = swaps = ends_twice = False

    def __init__(self, num_blocks, block_size): ...  # with swaps also num_host_blocks
    def free(self): ...  # {"device": blocks that could be handed out now}; with swaps also "host"
    def tables(self): ...  # {sequence: Table} of all that hold blocks
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
    aborts = aborts_twice = True  # twice: also what has ended
    most_samples = 1  # above 1, samples fork the blocks of their prompt

    def __init__(self, num_blocks, block_size, budget, max_seqs): ...  # with swaps also num_host_blocks
    def fits(self, prompt_len, max_tokens): ...  # the documented condition on one request
    def add(self, request, prompt, max_tokens, **asked): ...  # asked: salt, samples, priority, where it has them
    def schedule(self): ...  # (copies that come first, [Work]); no Work where nothing could run
    def accept(self, next_token): ...  # the step has run: [Output]. next_token(seq) -> int, where a token is due
    def abort(self, request): ...
    def free(self): ...  # as above
    def tables(self): ...  # as above


class Text:
    """The tokens of a sequence. marks[i] is its salt and the whole text up to token i: what a slot holds."""

    def __init__(self, tokens, salt=None, sample=0):
        self.salt, self.sample, self.tokens, self.marks = salt, sample, [], []
        for token in tokens:
            self.append(token)

    def append(self, token):
        self.tokens.append(token)
        self.marks.append((self.salt, *self.tokens))

    def next_token(self):
        """Stands in for the model: it depends on every token, and on the sample."""
        return TOKENS[hash((self.sample, *self.tokens)) // 8 % len(TOKENS)]


class Contents:
    """Every slot of every pool, and the mark in it."""

    def __init__(self, block_size):
        self.block_size, self.slots = block_size, {}  # (pool, block) -> {offset: mark}

    def slot(self, seq, blocks, position, pool="device"):
        logical, offset = divmod(position, self.block_size)
        assert logical < len(blocks), f"{seq}: position {position} has no block, its table is {blocks}"
        return self.slots.setdefault((pool, blocks[logical]), {}), offset

    def write(self, seq, blocks, text, start, end):
        for position in range(start, end):
            block, offset = self.slot(seq, blocks, position)
            block[offset] = text.marks[position]

    def check(self, seq, blocks, text, end, pool="device"):
        assert len(set(blocks)) == len(blocks), f"{seq} has a block twice: {blocks}"
        for position, mark in enumerate(text.marks[:end]):
            block, offset = self.slot(seq, blocks, position, pool)
            found = block.get(offset, "a slot that was never written")
            assert found == mark, f"{seq} reads position {position} in {pool} {blocks}: wants {mark}, finds {found}"


_any = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=14)
PROMPTS = _any | st.builds(lambda n, more: [0, 1, 0, 0, 1, 1, 0, 1][:n] + more[:4], st.integers(2, 8), _any)  # alike
REQUESTS = st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 12) | st.just(10**9))  # max_tokens; steps to its abort
SALTS = st.sampled_from((None, "a", "b"))


def act(when=lambda self: True, **strategies):
    """A rule that Hypothesis may choose where `when` holds."""

    watched = lambda function: functools.wraps(function)(lambda self, **drawn: self.watch(function, **drawn))  # noqa: E731
    return lambda function: precondition(when)(rule(**strategies)(watched(function)))


class Machine(RuleBasedStateMachine):
    """What both have: the adapter, its calls as Python, the texts, and what is checked between two calls."""

    adapter = counts = failed = progress = every = proof = engine = broken = None  # set by run() and the machines below

    def begin(self, data, *sizes):
        more = {"num_host_blocks": data.draw(st.integers(1, sizes[0]))} if self.adapter.swaps else {}
        self.calls, self.sizes, self.block_size = [], sizes, sizes[1]
        self.engine, self.contents = self.call(self.adapter, *sizes, **more), Contents(sizes[1])
        self.text, self.over, self.number = {}, set(), 0  # sequence -> Text; those that have ended
        self.held, self.total = {}, dict(self.engine.free())

    def call(self, name, *args, **kwargs):
        told = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
        self.calls.append(f"engine.{name}({told})" if self.calls else f"engine = {name.__name__}({told})")
        return (getattr(self.engine, name) if self.calls[1:] else name)(*args, **kwargs)

    def watch(self, function, **drawn):
        """Call and check. The machine of a failure is kept: the last one that Hypothesis runs is the smallest."""
        try:
            function(self, **drawn)
            self.check()
        except Exception:
            self.failed["machine"], self.broken = self, True
            self.failed.setdefault("first", self.counts["scripts"] + 1)
            raise

    def check(self):
        """Every sequence finds its text, and free and held blocks are the whole pool."""
        self.held, free = {seq: Table(*table) for seq, table in self.engine.tables().items()}, self.engine.free()
        used = {pool: set() for pool in self.total}
        for seq, (blocks, computed, pool) in self.held.items():
            assert seq in self.text and seq not in self.over, f"{seq} has ended, and holds blocks {blocks}"
            assert computed <= len(self.text[seq].tokens), f"{seq}: {computed} of {len(self.text[seq].tokens)} computed"
            used[pool].update(blocks)
            self.contents.check(seq, blocks, self.text[seq], computed, pool)
        for pool, total in self.total.items():
            said = f"{free[pool]} blocks of the {pool} are free and {len(used[pool])} held, of {total}"
            assert free[pool] + len(used[pool]) == total, said

    def copy(self, copies):
        for source, a, target, b in copies:
            self.counts["copies on write" if source == target else f"blocks swapped to the {target}"] += 1
            self.contents.slots[target, b] = dict(self.contents.slots.get((source, a), {}))

    def teardown(self):
        if self.engine and not self.broken:
            self.watch(type(self).finish_all)
            assert self.engine.free() == self.total, f"leak: all have ended, and free are {self.engine.free()}"
            self.counts["scripts"] += (tried := len(self.calls) > 1)
            if tried and not self.failed and self.counts["scripts"] % self.every == 0:
                self.progress(self.counts)


class MemoryMachine(Machine):
    """A block manager driven by hand: each token is written as soon as it has a slot."""

    proof = ("refused", "prefix hits")

    @initialize(num_blocks=st.integers(2, 9), data=st.data())
    def build(self, num_blocks, data):
        self.begin(data, num_blocks, data.draw(st.sampled_from(self.adapter.block_sizes)))

    def here(self):
        return sorted(seq for seq, table in self.held.items() if table.pool == "device")

    def take(self, name, seq, *args, needed=1, pool="device"):
        """A call that takes blocks. A refusal changes nothing, and is right only where fewer than `needed` are free."""
        before = self.engine.free(), {seq: list(table.blocks) for seq, table in self.held.items()}
        answer = self.call(name, seq, *args)
        if answer is None:
            after = self.engine.free(), {seq: list(table[0]) for seq, table in self.engine.tables().items()}
            assert before == after, f"{name} was refused, and changed something: {before} to {after}"
            assert before[0][pool] < needed, f"{name} was refused: it needs {needed} blocks, and free are {before[0]}"
        self.counts["refused"] += answer is None
        self.copy(answer if isinstance(answer, list) else [])
        return answer

    @act(tokens=PROMPTS, salt=SALTS)
    def start(self, tokens, salt):
        seq, self.number, text = f"s{self.number}", self.number + 1, Text(tokens, salt if self.adapter.salts else None)
        found = self.take("start", seq, tokens, text.salt, needed=-(-len(tokens) // self.block_size))
        if found is not None:
            assert 0 <= found < len(tokens), f"{found} of {len(tokens)} tokens were found: one is left to compute"
            self.counts["prefix hits"] += found > 0
            self.text[seq], blocks = text, self.engine.tables()[seq][0]
            self.contents.check(seq, blocks, text, found)
            self.contents.write(seq, blocks, text, found, len(tokens))
            self.call("computed", seq)

    @act(lambda self: self.here(), data=st.data(), token=st.sampled_from(TOKENS), times=st.integers(1, 4))
    def append(self, data, token, times):
        seq = data.draw(st.sampled_from(self.here()))
        for _ in range(times):
            end = len(self.text[seq].tokens)
            if self.take("append", seq, token) is not None:
                self.text[seq].append(token)
                self.contents.write(seq, self.engine.tables()[seq][0], self.text[seq], end, end + 1)
                self.call("computed", seq)
                self.check()

    @act(lambda self: self.held or (self.over and self.adapter.ends_twice), data=st.data())
    def end(self, data):
        seq = data.draw(st.sampled_from(sorted(self.held) + sorted(self.over if self.adapter.ends_twice else ())))
        self.call("end", seq)
        self.over.add(seq)

    @act(lambda self: self.adapter.forks and self.here(), data=st.data())
    def fork(self, data):
        seq, child, self.number = data.draw(st.sampled_from(self.here())), f"s{self.number}", self.number + 1
        if self.take("fork", seq, child) is not None:
            self.counts["forks"] += 1
            self.text[child] = Text(self.text[seq].tokens, self.text[seq].salt)

    @act(lambda self: self.adapter.swaps and self.held, data=st.data())
    def swap(self, data):
        seq = data.draw(st.sampled_from(sorted(self.held)))
        name, pool = ("swap_out", "host") if seq in self.here() else ("swap_in", "device")
        self.take(name, seq, needed=len(self.held[seq].blocks), pool=pool)

    def finish_all(self):
        for seq in self.held:
            self.call("end", seq)
            self.over.add(seq)


class EngineMachine(Machine):
    """Requests come in bursts, run, are preempted, fork and are aborted. Each gets the tokens that it gets alone."""

    proof = ("preemptions", "prefix hits")

    @initialize(budget=st.integers(2, 12), max_seqs=st.integers(1, 5), data=st.data())
    def build(self, budget, max_seqs, data):
        blocks, size = st.integers(*self.adapter.num_blocks), st.sampled_from(self.adapter.block_sizes)
        self.begin(data, data.draw(blocks), data.draw(size), budget, max_seqs)
        self.asked, self.ended, self.aborts, self.steps = (
            {},
            [],
            {},
            0,
        )  # request -> sequences; and -> step of its abort
        self.got, self.reached = {}, {}  # sequence -> tokens that its client has; -> tokens computed

    @act(burst=st.lists(REQUESTS, min_size=1, max_size=4), data=st.data())
    def add(self, burst, data):
        for prompt, max_tokens, abort_after in burst:
            if not self.engine.fits(len(prompt), max_tokens):
                continue
            asked = {"salt": data.draw(SALTS)} if self.adapter.salts else {}
            asked |= {"samples": data.draw(st.integers(1, most))} if (most := self.adapter.most_samples) > 1 else {}
            asked |= {"priority": data.draw(st.integers(0, 2))} if self.adapter.priorities else {}
            old = self.ended if self.adapter.reuses_names else []
            name, self.number = data.draw(st.sampled_from([f"r{self.number}", *old])), self.number + 1
            self.ended = [other for other in self.ended if other != name]
            self.over = {seq for seq in self.over if seq.partition("/")[0] != name}
            self.asked[name] = [name, *(f"{name}/{i}" for i in range(1, asked.get("samples", 1)))]
            for sample, seq in enumerate(self.asked[name]):
                alone = Text(prompt, sample=sample)
                self.text[seq], self.reached[seq] = Text(prompt, asked.get("salt"), sample), 0
                for _ in range(max_tokens):
                    alone.append(alone.next_token())
                self.got[seq] = [], alone.tokens[len(prompt) :]
            self.counts["requests"] += 1
            self.call("add", name, list(prompt), max_tokens, **asked)
            self.aborts[name] = self.steps + abort_after

    @act(lambda self: self.number, times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            if self.asked:  # no precondition: Hypothesis can then leave out a request and keep the step
                self.one_step()

    def abort(self, upto):
        """Clients go away, some of them after their request has ended."""
        for name, at in list(self.aborts.items()):
            if at <= upto and self.adapter.aborts and (name in self.asked or self.adapter.aborts_twice):
                del self.aborts[name]
                self.call("abort", name)
                self.counts["aborts" if name in self.asked else "aborts of what had ended"] += 1
                self.leave(name)
                self.check()

    def leave(self, name):
        if name in self.asked:
            self.over.update(self.asked.pop(name))
            self.ended.append(name)

    def one_step(self):
        """Copies, then all writes, then all reads, then the tokens. Returns whether anything ran."""
        self.abort(self.steps)
        copies, work = self.call("schedule")
        told = ", ".join(f"{w.seq} {w.start} to {w.start + w.count - 1} in {list(w.blocks)}" for w in work)
        self.calls[-1] += f"  # {told or 'nothing'}"
        self.steps, self.counts["steps"] = self.steps + 1, self.counts["steps"] + 1
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
            given[seq] = self.text[seq].next_token()
            self.text[seq].append(given[seq])
            self.calls[-1] = f"engine.accept({given}.get)"
            return given[seq]

        outputs = list(self.call("accept", due))
        self.calls[-1] = f"engine.accept({given}.get)"
        for output in outputs:
            self.receive(*output)
        self.check()
        for seq, table in self.held.items():  # preempted, and its blocks lie on the host
            self.counts["preemptions"] += table.pool != before.get(seq, table).pool == "device"
        return bool(work)

    def receive(self, seq, tokens, finished):
        assert seq not in self.over, f"{seq} has ended, and gets {tokens}"
        got, alone = self.got[seq]
        got += tokens
        assert got == (alone if finished else alone[: len(got)]), f"{seq} got {got}, and alone it gets {alone}"
        self.over.update([seq] if finished else [])
        if self.over.issuperset(self.asked[seq.partition("/")[0]]):
            self.leave(seq.partition("/")[0])

    def finish_all(self):
        idle, last = 0, self.steps + MOST_STEPS
        while self.asked:
            idle = 0 if self.one_step() else idle + 1
            assert idle < IDLE_STEPS, f"{', '.join(self.asked)} wait, free are {self.engine.free()}, and nothing runs"
            assert self.steps < last, f"{', '.join(self.asked)} are unfinished after {MOST_STEPS} steps"
        self.abort(last)


def run(adapter, scripts=2000, *, number=None, shrink=True, progress=lambda counts: None):
    """number: a seed. Of the result, `machine` is None, or as the smallest failing script left it: machine.calls."""
    counts, failed, began = Counter(), {}, time.monotonic()
    parts = {"adapter": adapter, "counts": counts, "failed": failed, "progress": staticmethod(progress)}
    parts["every"] = max(1, scripts // 5)
    machine = type(adapter.__name__, (EngineMachine if issubclass(adapter, Engine) else MemoryMachine,), parts)
    trying = settings(
        max_examples=scripts, stateful_step_count=15, deadline=None, database=None, suppress_health_check=HealthCheck,
        print_blob=False, report_multiple_bugs=False, phases=[Phase.generate] + [Phase.shrink] * shrink,
    )  # fmt: skip
    try:
        run_state_machine_as_test(machine if number is None else seed(number)(machine), settings=trying)
        seen = " and ".join(f"{counts[what]:,} {what}" for what in machine.proof)
        little = "" if all(counts[what] for what in machine.proof) else ": this proves little"
        verdict = f"held over {counts['scripts']:,} scripts with {seen}{little}"
    except Exception as error:
        if not failed:
            raise  # no fault of the engine
        said = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        verdict = f"fails, first in script {failed['first']:,}: {said}"
    return Result(verdict, +counts, time.monotonic() - began, failed.get("first"), failed.get("machine"))


def main(adapters, scripts=2000, number=None, draw=lambda machine: machine.engine.tables()):
    """Try them all and print what came of it. Returns how many fail. draw: the block tables of a failing script."""
    failing = 0
    for adapter in adapters:
        print(f"{adapter.__name__}: {scripts:,} scripts", flush=True)
        found = run(adapter, scripts, number=number, progress=lambda counts: print(" ", dict(+counts), flush=True))
        if found.machine:
            failing += 1
            print("the smallest script:", *found.machine.calls, draw(found.machine), sep="\n  ")
        print(f"{dict(found.counts)} in {found.seconds:.0f} s\n{adapter.__name__} {found.verdict}", flush=True)
    return failing
