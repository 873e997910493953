"""Chapter 14. minipaged under the kit: its scheduler over its block manager, and the block manager by hand."""

import kit
from chapter10 import BlockManager, Scheduler

from minipaged.engine.sequence import SamplingParams, Sequence, Token


def copies_between(source, copies, target):
    return [(source, a, target, b) for a, b in copies]


def free_blocks(blocks):
    return {"device": blocks.num_free, "host": blocks.host.num_free}


class Blocks(kit.Memory):
    salts = forks = swaps = ends_twice = True

    def __init__(self, num_blocks, block_size, num_host_blocks):
        self.blocks = BlockManager(num_blocks, block_size, num_host_blocks=num_host_blocks, enable_prefix_caching=True)
        self.tokens = {}  # sequence -> (tokens, salt)

    def free(self):
        return free_blocks(self.blocks)

    def tables(self):
        pools = {seq: "host" if self.blocks.is_swapped(seq) else "device" for seq in self.blocks.tables}
        return {seq: kit.Table(self.blocks.blocks(seq), len(self.tokens[seq][0]), pools[seq]) for seq in pools}

    def start(self, seq, tokens, salt):
        prefix = self.blocks.get_computed_blocks(tokens, salt)
        if self.blocks.allocate_slots(seq, len(tokens), prefix) is None:
            return None
        self.tokens[seq] = list(tokens), salt
        return len(prefix) * self.blocks.block_size

    def append(self, seq, token):
        copies = self.blocks.allocate_slots(seq, len(self.tokens[seq][0]) + 1)
        if copies is None:
            return None
        self.tokens[seq][0].append(token)
        return copies_between("device", copies, "device")

    def computed(self, seq):
        self.blocks.cache_blocks(seq, *self.tokens[seq])

    def end(self, seq):
        self.blocks.free(seq)

    def fork(self, seq, child):
        self.blocks.fork(seq, child)
        self.tokens[child] = list(self.tokens[seq][0]), self.tokens[seq][1]
        return []

    def swap_out(self, seq):
        copies = self.blocks.swap_out(seq)
        return None if copies is None else copies_between("device", copies, "host")

    def swap_in(self, seq):
        copies = self.blocks.swap_in(seq, len(self.tokens[seq][0]))
        return None if copies is None else copies_between("host", copies, "device")


class Minipaged(kit.Engine):
    salts = swaps = reuses_names = True
    most_samples = 3

    def __init__(self, num_blocks, block_size, budget, max_seqs, num_host_blocks):
        self.blocks = BlockManager(num_blocks, block_size, num_host_blocks=num_host_blocks, enable_prefix_caching=True)
        length = num_blocks * block_size + 1  # the last token is never stored
        self.scheduler = Scheduler(self.blocks, length, max_seqs, max(budget, max_seqs))
        self.seqs = {}  # the kit's name -> Sequence, of those that have not ended

    def fits(self, prompt_len, max_tokens):
        try:
            self.scheduler.check(prompt_len, max_tokens)
        except ValueError:
            return False
        return prompt_len + max_tokens <= self.scheduler.max_model_len

    def add(self, request, prompt, max_tokens, salt, samples):
        params = SamplingParams(max_tokens=max_tokens, n=samples, temperature=1.0)
        seqs = [Sequence(request, index, list(prompt), params, cache_salt=salt) for index in range(samples)]
        self.seqs.update((self.name(seq), seq) for seq in seqs)
        self.scheduler.add(seqs)

    @staticmethod
    def name(seq):
        return f"{seq.request_id}/{seq.index}" if seq.index else seq.request_id

    def schedule(self):
        self.output = output = self.scheduler.schedule()
        copies = copies_between("device", output.swap_out, "host") + copies_between("host", output.swap_in, "device")
        work = [
            kit.Work(self.name(seq), seq.num_computed, count, self.blocks.blocks(seq.seq_id))
            for seq, count in output.num_scheduled_tokens.items()
        ]
        return copies + copies_between("device", output.copies, "device"), work

    def accept(self, next_token):
        self.scheduler.update_from_output(self.output)
        given = []
        for seq in self.output.sampled:
            seq.outputs.append(Token(next_token(self.name(seq)), None, 0.0))
            given.append(
                kit.Output(self.name(seq), [seq.outputs[-1].token_id], len(seq.outputs) == seq.params.max_tokens)
            )
            if given[-1].finished:
                self.scheduler.finish(self.seqs.pop(self.name(seq)))
        return given

    def abort(self, request):
        for name in [name for name, seq in self.seqs.items() if seq.request_id == request]:
            self.scheduler.finish(self.seqs.pop(name))

    def free(self):
        return free_blocks(self.blocks)

    def tables(self):
        held = {}
        for name, seq in self.seqs.items():
            if blocks := self.blocks.blocks(seq.seq_id):
                pool = "host" if self.blocks.is_swapped(seq.seq_id) else "device"
                held[name] = kit.Table(blocks, seq.num_computed, pool)
        return held


ADAPTERS = [Minipaged, Blocks]
