"""An engine without tensors: the real scheduler and the real memory, under a model too simple to be wrong.

A slot holds the text up to its token, as K and V of a real model depend on it. The model reads every slot that
attention would read. So a block that is handed out twice, a copy that is forgotten or comes too early, a prefix that is
found for other tokens, a table that moved and left something behind: each is a slot with another text in it.
"""

from collections import Counter

from minipaged.engine.beam_scheduler import BeamScheduler, BeamSearchParams, Choice, Search
from minipaged.engine.scheduler import Scheduler
from minipaged.engine.sequence import SamplingParams, Sequence, Token
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
    """Two pools of slots. Invariant: a slot of a block that is neither in a table nor cached is empty."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.pools = {"device": {}, "host": {}}  # pool -> block -> {offset: text}

    def copy(self, copies, source, target):
        for a, b in copies:
            self.pools[target][b] = dict(self.pools[source].get(a, {}))

    def run(self, output, running):
        """One step: copies of blocks, and one forward pass."""
        self.copy_blocks(output)
        self.compute(output, running)

    def copy_blocks(self, output):
        """In the order of the fields."""
        self.copy(output.swap_out, "device", "host")
        self.copy(output.swap_in, "host", "device")
        self.copy(output.copies, "device", "device")

    def compute(self, output, running):
        """All writes, then all reads."""
        there = [(seq, self.num_there(seq)) for seq in running]
        for seq, count in output.num_scheduled_tokens.items():
            for position in range(seq.num_computed, seq.num_computed + count):
                block, _ = self.place(seq, position)
                owners = self.blocks.device.ref_count(block)
                assert owners == 1, f"{seq.seq_id} writes into block {block}, which has {owners} owners"
                self.write(seq, position, self.text(seq, position))
        for seq, count in output.num_scheduled_tokens.items():
            end, found = seq.num_computed + count, self.num_there(seq)
            assert found >= end, f"{seq.seq_id} reads up to position {end}, and its tokens end at {found}"
        for seq, before in there:
            assert self.num_there(seq) >= before, f"a slot that {seq.seq_id} reads was written"

    def fail(self, output):
        """A forward pass that ends in the middle: a part of the writes is done, and wrong."""
        for seq in output.num_scheduled_tokens:
            self.write(seq, seq.num_computed, "half-done")

    def write(self, seq, position, text):
        block, offset = self.place(seq, position)
        self.pools["device"].setdefault(block, {})[offset] = text

    def num_there(self, seq):
        """How many of the sequence's first tokens lie where its table says."""
        for position in range(len(self.blocks.blocks(seq.seq_id)) * self.blocks.block_size):
            block, offset = self.place(seq, position)
            if position >= len(seq) or self.pools["device"].get(block, {}).get(offset) != self.text(seq, position):
                return position
        return len(seq)

    def place(self, seq, position):
        blocks = self.blocks.blocks(seq.seq_id)
        return blocks[position // self.blocks.block_size], position % self.blocks.block_size

    def text(self, seq, position):
        return seq.cache_salt, tuple(seq.tokens(0, position + 1))

    def poison(self):
        """Slots of free blocks are emptied."""
        for name, allocator in (("device", self.blocks.device), ("host", self.blocks.host)):
            if allocator is not None:
                kept = self.pools[name].items()
                self.pools[name] = {block: text for block, text in kept if allocator.ref_count(block)}


class Engine:
    """Requests, the scheduler, and the device: `LLMEngine` without text and tensors."""

    def __init__(self, num_blocks, block_size, num_host_blocks=0, prefix_caching=False, **settings):
        self.blocks = BlockManager(
            num_blocks, block_size, num_host_blocks=num_host_blocks, enable_prefix_caching=prefix_caching
        )
        self.scheduler = Scheduler(self.blocks, **settings)
        self.device = Device(self.blocks)
        self.requests = {}  # request id -> its samples, all requests that ever were
        self.unfinished = []  # sequences, in the order of arrival
        self.gone = set()  # sequences that were aborted or failed
        self.num_searches = 0

    def add(self, prompt, max_tokens, n=1, cache_salt=None):
        """Returns the samples; ValueError where the scheduler refuses the request."""
        self.scheduler.check(len(prompt), max_tokens)
        params = SamplingParams(max_tokens=max_tokens, n=n, temperature=1.0)
        request_id = str(len(self.requests))
        seqs = [Sequence(request_id, index, list(prompt), params, cache_salt=cache_salt) for index in range(n)]
        self.requests[request_id] = seqs
        self.unfinished += seqs
        self.scheduler.add(seqs)
        return seqs

    def finish(self, seq):
        self.scheduler.finish(seq)
        self.unfinished.remove(seq)

    def abort(self, request_id):
        """All samples that are unfinished, wherever they stand."""
        for seq in [seq for seq in self.unfinished if seq.request_id == request_id]:
            self.gone.add(seq)
            self.finish(seq)

    def recover(self):
        """What the next call does after one that was cut off: the tokens are all that is left."""
        self.scheduler.reset(self.unfinished)
        assert not any(seq.num_computed for seq in self.unfinished), "after a reset no token is computed"
        self.device.poison()

    def step(self, fail_in_model=False, fail_after=None, error_at=None):
        """One iteration. It may be cut off in the model, or when so many tokens were accepted; and the sequence that
        is sampled at place `error_at` may fail, alone."""
        scheduler = self.scheduler
        running, earliest = list(scheduler.running), self.unfinished[0]
        decoding = [seq for seq in running if seq.num_uncomputed_tokens == 1]
        output = scheduler.schedule()
        self.check_schedule(output, running, earliest, decoding)
        if fail_in_model:
            self.device.fail(output)
            self.recover()
            return output
        self.device.run(output, scheduler.running)
        texts = {
            row: seq.tokens(0, seq.num_computed + output.num_scheduled_tokens[seq])
            for seq, row in output.sampled.items()
        }
        scheduler.update_from_output(output)
        for number, (seq, row) in enumerate(output.sampled.items()):
            if number == fail_after:
                self.recover()
                break
            assert texts[row] == seq.tokens(0, len(seq)), f"{seq.seq_id} chooses from the logits of another text"
            if number == error_at:
                self.gone.add(seq)
                self.finish(seq)
                continue
            seq.outputs.append(Token(next_token(seq.tokens(0, len(seq)), seq.index), None, 0.0))
            if len(seq.outputs) == seq.params.max_tokens:
                self.finish(seq)
        return output

    def search(self, prompts, max_tokens, width, most_steps=None):
        """Beam searches, in step, beside the requests. Cut off after `most_steps`, where they are not over by then.

        ValueError where the client of the pool refuses one of them.
        """
        scheduler = self.scheduler
        beams = BeamScheduler(self.blocks, scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        searches = []
        for prompt in prompts:
            self.num_searches += 1
            seq = Sequence(f"search{self.num_searches}", 0, list(prompt), SamplingParams(max_tokens=max_tokens))
            room = scheduler.max_model_len - len(prompt)
            searches.append(Search(BeamSearchParams(width, max_tokens), [seq], room=room))
            beams.check(searches[-1])
        beams.waiting.extend(searches)
        num_steps, held = 0, {seq.seq_id: self.blocks.blocks(seq.seq_id) for seq in self.unfinished}
        while beams.running or beams.waiting:
            if num_steps == most_steps:
                return self.recover()
            num_steps += 1
            assert num_steps <= 2 * sum(len(prompt) + max_tokens for prompt in prompts), "the searches do not end"
            self.search_step(beams, searches)
            assert held == {seq_id: self.blocks.blocks(seq_id) for seq_id in held}, "a request lost its blocks"
        return None

    def search_step(self, beams, searches):
        first = [*beams.running, *beams.waiting][0]
        output = beams.schedule()
        counts = output.num_scheduled_tokens
        assert any(beam in counts for beam in first.beams), "the search that came first does not proceed"
        assert output.total_num_scheduled_tokens == sum(counts.values()) <= beams.max_num_batched_tokens
        assert all(count >= 1 for count in counts.values())
        assert sum(search.params.beam_width for search in beams.running) <= beams.max_num_seqs
        running = [beam for search in beams.running for beam in search.beams]
        assert set(counts) <= set(running)
        self.device.run(output, [*running, *self.scheduler.running])
        for search in beams.update_from_output(output):
            width, prompt = search.params.beam_width, search.prompt_token_ids
            parents = {tuple(beam.tokens(0, len(beam))): place for place, beam in enumerate(search.beams)}
            chosen = [text for _, text in sorted(option for text in parents for option in likings(text))[:width]]
            if len(chosen[0]) == len(prompt) + search.max_tokens:
                found = [list(text[len(prompt) :]) for text in chosen]
                assert found == beams_alone(prompt, search.max_tokens, width), "a search has other beams than alone"
                chosen = []
            beams.advance(search, [Choice(parents[text[:-1]], text[-1]) for text in chosen])
        order = [searches.index(search) for search in [*beams.running, *beams.waiting]]
        assert order == sorted(order), "a search that came later stands before one that came earlier"
        assert all(not self.blocks.blocks(beam.seq_id) for search in beams.waiting for beam in search.beams)
        self.check_state([beam for search in beams.running for beam in search.beams])

    def check_schedule(self, output, running, earliest, decoding):
        """What holds for every step, whatever came before it."""
        counts = output.num_scheduled_tokens
        assert all(count >= 1 for count in counts.values()), "a sequence is scheduled for no token"
        assert earliest in counts, f"the sequence that came first, {earliest.seq_id}, does not proceed"
        total, budget = output.total_num_scheduled_tokens, self.scheduler.max_num_batched_tokens
        assert total == sum(counts.values()) <= budget, f"{sum(counts.values())} tokens, total {total}, budget {budget}"
        assert set(counts) <= set(self.scheduler.running), "a sequence is scheduled that does not run"
        for seq in decoding:
            if seq in self.scheduler.running:
                assert counts.get(seq) == 1, f"{seq.seq_id} decodes, and did not get its token"
        gone = {seq.seq_id for seq in set(running) - set(self.scheduler.running)}
        said = {seq.seq_id for seq in output.preempted}
        assert said == gone, f"{gone or 'nothing'} left `running` in this step, and {said or 'nothing'} is preempted"
        if output.preempted:
            assert set(self.scheduler.running) <= set(running) and not output.swap_in, (
                "a sequence entered, or came back, in the step in which one was preempted"
            )
        due = [seq for seq, count in counts.items() if count == seq.num_uncomputed_tokens]
        assert output.sampled == {seq: row for row, seq in enumerate(due)}, "logits of other tokens than the last ones"

    def check_state(self, beams=()):
        """What holds between any two steps; `beams` are those of searches that hold blocks."""
        scheduler, blocks = self.scheduler, self.blocks
        running, waiting = scheduler.running, list(scheduler.waiting)
        assert [*running, *waiting] == self.unfinished, (
            "a sequence is lost, there twice, or before one that came earlier"
        )
        assert len(running) <= scheduler.max_num_seqs, f"{len(running)} run, and {scheduler.max_num_seqs} may"
        named = Counter(block for seq in [*running, *beams] for block in blocks.blocks(seq.seq_id))
        for seq in [*running, *beams]:
            assert 0 <= seq.num_computed < len(seq), f"{seq.seq_id}: {seq.num_computed} of {len(seq)} are computed"
            slots = blocks.num_tokens(seq.seq_id)
            assert seq.num_computed <= slots <= len(seq), (
                f"{seq.seq_id} has slots for {slots} tokens: {seq.num_computed} of its {len(seq)} are computed"
            )
        on_host = Counter()
        for seq in waiting:
            held = blocks.blocks(seq.seq_id)
            assert blocks.is_swapped(seq.seq_id) or not held, f"{seq.seq_id} waits, and holds blocks of the device"
            on_host.update(held)
        holding = [*running, *beams, *(seq for seq in waiting if blocks.is_swapped(seq.seq_id))]
        assert set(blocks.tables) == {seq.seq_id for seq in holding}, "a table has no sequence"
        for block in range(blocks.num_blocks):
            owners = blocks.device.ref_count(block) - named[block]
            assert owners in ((0, 1) if blocks.enable_prefix_caching else (0,)), (
                f"block {block} has {owners} owners too many"
            )
        free = blocks.num_blocks - len(named)
        assert blocks.num_free == free, f"{free} blocks have no table, and {blocks.num_free} are free"
        if blocks.host is not None:
            assert all(blocks.host.ref_count(b) == on_host[b] for b in range(blocks.host.num_blocks))
        self.device.poison()

    def check_answers(self):
        """Every sequence that is over, and neither aborted nor failed, has the text that it has alone. The others have
        a beginning of it."""
        for seqs in self.requests.values():
            for seq in seqs:
                tokens = [token.token_id for token in seq.outputs]
                whole = text_alone(seq.prompt_token_ids, seq.params.max_tokens, seq.index)
                assert tokens == whole[: len(tokens)], f"{seq.seq_id} has another text than alone"
                assert seq in self.gone or seq in self.unfinished or tokens == whole, f"{seq.seq_id} ended too early"

    def finish_all(self):
        """Step until nothing is left. The sequence that is first proceeds in every step, so this is soon."""
        longest = sum(len(seq.prompt_token_ids) + seq.params.max_tokens + 1 for seq in self.unfinished)
        most = 2 * longest * self.scheduler.max_num_seqs + 1
        for _ in range(most):
            if not self.unfinished:
                break
            self.step()
            self.check_state()
        assert not self.unfinished, f"not finished in {most} steps"
        self.check_answers()
        assert not self.blocks.tables and self.blocks.num_free == self.blocks.num_blocks, "a block is held"
        assert self.blocks.host is None or self.blocks.host.num_free == self.blocks.num_host_blocks
