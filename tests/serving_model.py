"""An engine without tensors: the real scheduler and the real memory, under a model too simple to be wrong.

A slot holds the text up to its token, as K and V of a real model depend on it. The model reads every slot that
attention would read. So a block that is handed out twice, a copy that is forgotten or comes too early, a prefix that is
found for other tokens, a table that moved and left something behind: each is a slot with somebody else's text in it.
"""

from collections import Counter

from minipaged.engine.scheduler import Scheduler
from minipaged.engine.sequence import CompletionOutput, SamplingParams, Sequence, SequenceGroup
from minipaged.memory.block_manager import BlockManager

ALPHABET = 3  # tokens are 0, 1, 2, so that prompts and texts meet


def next_token(tokens, sample=0):
    """What the model says after these tokens; each sample of a request has its own opinion."""
    value = 7 * sample + 3
    for token in tokens:
        value = (value * 5 + token + 1) % 1_000_003
    return value // 7 % ALPHABET


def likings(tokens):
    """How much a beam search likes each continuation. No two are equal, so that there is one right choice."""
    return [(hash((*tokens, token, 5)), (*tokens, token)) for token in range(ALPHABET)]


def text_alone(prompt, max_tokens, sample=0):
    """The answer to a request with no memory, no batch and no scheduler."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, sample))
    return tokens[len(prompt) :]


def beams_alone(prompt, max_tokens, width):
    beams = [tuple(prompt)]
    for _ in range(max_tokens):
        beams = [text for _, text in sorted(option for beam in beams for option in likings(beam))[:width]]
    return [list(beam[len(prompt) :]) for beam in beams]


class Device:
    """Two pools of slots. Invariant: a slot that no table names, and no prefix can be found in, holds nothing."""

    def __init__(self, memory):
        self.memory = memory
        self.pools = {"device": {}, "host": {}}  # pool -> block -> {offset: text}

    def copy(self, copies, source, target):
        for a, b in copies:
            self.pools[target][b] = dict(self.pools[source].get(a, {}))

    def run(self, output, groups):
        """One forward pass: copies in the order of the fields, then all writes, then all reads. `groups` run."""
        self.copy(output.swap_out, "device", "host")
        self.copy(output.swap_in, "host", "device")
        self.copy(output.copies, "device", "device")
        there = [(seq, self.num_there(seq)) for group in groups for seq in group.seqs]
        for item in output.work:
            for position in range(item.start, item.start + item.count):
                block, offset = self.place(item.seq, position)
                owners = self.memory.allocator.ref_count(block)
                assert owners == 1, f"{item.seq.seq_id} writes into block {block}, which has {owners} owners"
                self.pools["device"].setdefault(block, {})[offset] = self.text(item.seq, position)
        for item in output.work:
            end = item.start + item.count
            found = self.num_there(item.seq)
            assert found >= end, f"{item.seq.seq_id} reads up to position {end}, and its tokens end at {found}"
        for seq, before in there:
            assert self.num_there(seq) >= before, f"somebody wrote into what {seq.seq_id} reads"

    def num_there(self, seq):
        """How many of the sequence's first tokens lie where its table says."""
        for position in range(len(self.memory.blocks(seq.seq_id)) * self.memory.block_size):
            block, offset = self.place(seq, position)
            if position >= len(seq) or self.pools["device"].get(block, {}).get(offset) != self.text(seq, position):
                return position
        return len(seq)

    def place(self, seq, position):
        blocks = self.memory.blocks(seq.seq_id)
        return blocks[position // self.memory.block_size], position % self.memory.block_size

    def text(self, seq, position):
        return seq.cache_salt, tuple(seq.tokens(0, position + 1))

    def poison(self):
        """What nobody owns is forgotten."""
        for name, allocator in (("device", self.memory.allocator), ("host", self.memory.host)):
            if allocator is not None:
                kept = self.pools[name].items()
                self.pools[name] = {block: text for block, text in kept if allocator.ref_count(block)}


class Engine:
    """Requests, the scheduler, and the device: `LLM` without text and tensors."""

    def __init__(self, num_blocks, block_size, num_host_blocks=0, prefix_caching=False, **settings):
        self.memory = BlockManager(
            num_blocks, block_size, num_host_blocks=num_host_blocks, enable_prefix_caching=prefix_caching
        )
        self.scheduler = Scheduler(self.memory, **settings)
        self.device = Device(self.memory)
        self.num_requests = self.num_forks = 0
        self.asked = {}  # request id -> (prompt, max_tokens, n, beam width)
        self.answers = {}  # request id -> list of texts; of a search, the beams in the end
        self.aborted = set()

    def add(self, prompt, max_tokens, n=1, beam_width=0, salt=None):
        """Returns the request's id; ValueError where the scheduler refuses it."""
        request_id = str(self.num_requests)
        params = SamplingParams(max_tokens=max_tokens, n=n, temperature=1.0)
        seqs = [
            Sequence(f"{request_id}.{i}", list(prompt), params, CompletionOutput(i), cache_salt=salt) for i in range(n)
        ]
        self.scheduler.add(SequenceGroup(request_id, seqs[:1], seqs[1:], beam_width))
        self.num_requests += 1
        self.asked[request_id] = (tuple(prompt), max_tokens, n, beam_width)
        self.answers[request_id] = [seq.output.token_ids for seq in seqs]
        return request_id

    def abort(self, request_id):
        assert self.scheduler.abort(request_id), f"request {request_id} was there, and could not be aborted"
        self.aborted.add(request_id)

    def step(self, fail_in_model=False, fail_after=None):
        """One iteration, which may fail in the middle of the model, or when so many tokens have been accepted."""
        earliest = next(iter(self.scheduler.groups.values()), None)
        decoding = [g for g in self.scheduler.running if g.is_decoding]
        before, num_running = self.scheduler.preemptions.total(), len(self.scheduler.running)
        output = self.scheduler.schedule()
        preempted = self.scheduler.preemptions.total() - before
        self.check_schedule(output, earliest, decoding)
        if preempted:
            assert len(self.scheduler.running) == num_running - preempted and not output.swap_in, (
                "somebody entered, or came back, in the step in which somebody gave way"
            )
        if fail_in_model:
            for item in output.work:  # half of the work is done: worse than none
                block, offset = self.device.place(item.seq, item.start)
                self.device.pools["device"].setdefault(block, {})[offset] = "half-done"
            self.scheduler.start_over()
            return output
        self.device.run(output, self.scheduler.running)
        texts = [item.seq.tokens(0, item.start + item.count) for item in output.work if item.reaches_end]
        ready = self.scheduler.computed(output)
        for row, _, seq in ready:
            assert texts[row] == seq.tokens(0, len(seq)), f"{seq.seq_id} chooses from the logits of another text"
        for number, (_, group, seq) in enumerate(ready):
            if number == fail_after:
                self.scheduler.start_over()
                return output
            if not group.beam_width:
                self.accept(group, seq)
        for group in dict.fromkeys(group for _, group, _ in ready):
            if group.beam_width:
                assert {id(s) for _, g, s in ready if g is group} == {id(s) for s in group.seqs}, (
                    "the beams of a search must reach their ends in one step: they choose together"
                )
                self.choose(group)
        return output

    def accept(self, group, seq):
        seq.output.token_ids.append(next_token(seq.tokens(0, len(seq)), seq.output.index))
        if len(seq.output.token_ids) == seq.params.max_tokens:
            self.scheduler.finish(group, seq, "length")

    def choose(self, group):
        """One step of a beam search: the likeliest continuations live on, and fork where one beam has several."""
        prompt, max_tokens, _, width = self.asked[group.request_id]
        parents = {tuple(seq.tokens(0, len(seq))): seq for seq in group.seqs}
        chosen = sorted(option for text in parents for option in likings(text))[:width]
        beams = []
        for _, text in chosen:
            beam = parent = parents[text[:-1]]
            if beam in [beam for beam, _ in beams]:
                self.num_forks += 1
                name = f"{group.request_id}.fork{self.num_forks}"
                output = CompletionOutput(0, token_ids=list(text[len(prompt) : -1]))
                beam = Sequence(name, list(prompt), parent.params, output, parent.cache_salt)
                self.scheduler.fork(group, parent, beam)
            beams.append((beam, text[-1]))
        for seq in [seq for seq in group.seqs if seq not in [beam for beam, _ in beams]]:
            self.scheduler.drop(group, seq)
        for beam, token in beams:
            beam.output.token_ids.append(token)
        self.answers[group.request_id] = [beam.output.token_ids for beam, _ in beams]
        if len(beams[0][0].output.token_ids) == max_tokens:
            self.scheduler.remove(group)

    def check_schedule(self, output, earliest, decoding):
        """What holds for every step, whatever came before it."""
        scheduled = Counter()
        for item in output.work:
            assert item.count >= 1, "a place is spent on no token"
            scheduled[item.group.request_id] += 1
        if earliest is not None:
            assert earliest.request_id in scheduled, "the request that came first does not move"
        assert sum(item.count for item in output.work) <= self.scheduler.max_num_batched_tokens, "over the budget"
        assert len({item.seq.seq_id for item in output.work}) == len(output.work), "a sequence is there twice"
        for group in decoding:
            if group in self.scheduler.running:
                assert scheduled[group.request_id] == len(group.seqs), "one that decodes did not get its token"

    def check_state(self):
        """What holds between any two steps."""
        scheduler, memory = self.scheduler, self.memory
        order = [int(group.request_id) for group in [*scheduler.running, *scheduler.waiting]]
        assert order == sorted(order), "one that came later stands before one that came earlier"
        assert order == [int(request_id) for request_id in scheduler.groups], "a request is lost, or there twice"
        assert sum(group.num_places for group in scheduler.running) <= scheduler.max_num_seqs
        named = Counter(
            block for group in scheduler.running for seq in group.seqs for block in memory.blocks(seq.seq_id)
        )
        for group in scheduler.running:
            assert all(0 <= seq.num_computed < len(seq) for seq in group.seqs)
        on_host = Counter()
        for group in scheduler.waiting:
            for seq in group.seqs:
                held = memory.blocks(seq.seq_id)
                assert group.is_swapped or not held, "one that waits holds blocks of the device"
                on_host.update(held)
        for block in range(memory.allocator.num_blocks):
            owners = memory.allocator.ref_count(block) - named[block]
            assert owners in ((0, 1) if memory.finds_prefixes else (0,)), f"block {block} has {owners} owners too many"
        free = memory.allocator.num_blocks - len(named)
        assert memory.num_free == free, f"{free} blocks have no table, and {memory.num_free} are free"
        if memory.host is not None:
            assert all(memory.host.ref_count(b) == on_host[b] for b in range(memory.host.num_blocks))
        self.device.poison()

    def check_answers(self):
        """Everything that was asked and not aborted was answered as it would be alone."""
        for request_id, (prompt, max_tokens, n, beam_width) in self.asked.items():
            if request_id not in self.aborted and request_id not in self.scheduler.groups:
                expected = (
                    beams_alone(prompt, max_tokens, beam_width)
                    if beam_width
                    else [text_alone(prompt, max_tokens, sample) for sample in range(n)]
                )
                assert self.answers[request_id] == expected, f"request {request_id} has another text than alone"

    def finish_all(self):
        """Step until nothing is left. The request that is first moves in every step, so this is soon."""
        most = (
            sum(
                len(prompt) + max_tokens + 1
                for request_id, (prompt, max_tokens, _, _) in self.asked.items()
                if request_id in self.scheduler.groups
            )
            * 2
            * self.scheduler.max_num_seqs
            + 1
        )
        for _ in range(most):
            if not self.scheduler.has_unfinished():
                break
            self.step()
            self.check_state()
        assert not self.scheduler.has_unfinished(), f"not finished in {most} steps"
        self.check_answers()
        assert self.memory.num_slots_reserved == 0, "blocks are held, and nobody is there"
