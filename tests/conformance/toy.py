"""Chapter 14. A scheduler of sixty lines over blocks with a prefix cache, and six faults that one can plant in it.

Each fault was seen in an engine that people run. `FAULTS` says where it stands below: search for its name.
"""

import statistics

import kit
from kit import Engine, Output, Table, Work

FAULTS = {
    "freed_while_used": "a preempted request frees its blocks even where others use them",
    "pages_as_tokens": "a request enters if its blocks are fewer than the free slots, not the free blocks",
    "found_before_computed": "a block is found by others as soon as it is allocated",
    "only_a_finish_clears": "after a preemption nothing enters until a request finishes, and an abort does not count",
    "freed_twice": "an abort frees the blocks of a request that had finished",
    "announced_twice": "a preempted request announces its last token again",
}


class Request:
    def __init__(self, name, prompt, max_tokens):
        self.name, self.tokens, self.end = name, list(prompt), len(prompt) + max_tokens
        self.blocks, self.computed, self.announced = [], 0, len(prompt)


class Scheduler:
    def __init__(self, num_blocks, block_size, budget, max_seqs, fault=""):
        self.block_size, self.budget, self.max_seqs, self.fault = block_size, budget, max_seqs, fault
        self.free, self.owners = list(range(num_blocks)), [0] * num_blocks
        self.found, self.key = {}, {}  # the text up to a block's end -> block, and back
        self.waiting, self.running, self.held_back, self.requests = [], [], False, {}

    def add(self, request):
        self.requests[request.name] = request
        self.waiting.append(request)

    def schedule(self):
        """[(request, number of tokens)] of the next step: each runs from its first token that is not computed."""
        for request in self.running[:]:
            while request in self.running and len(request.blocks) * self.block_size < len(request.tokens):
                if self.free:
                    request.blocks.append(self.allocate())
                else:
                    self.preempt(self.running[-1])
        while self.waiting and len(self.running) < self.max_seqs and not self.held_back and self.enter(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
        step, budget = [], self.budget
        for request in self.running:
            if count := min(budget, len(request.tokens) - request.computed):
                step.append((request, count))
                budget -= count
        return step

    def enter(self, request):
        """Blocks for all of its tokens, behind those that are found; False if too few are free."""
        ends = range(self.block_size, len(request.tokens), self.block_size)  # never all tokens: one is left to compute
        hits = []
        while len(hits) < len(ends) and (block := self.found.get(tuple(request.tokens[: ends[len(hits)]]))) is not None:
            hits.append(block)
        needed = -(-len(request.tokens) // self.block_size) - len(hits)
        room = len(self.free) - sum(not self.owners[block] for block in hits)
        if needed > (room * self.block_size if self.fault == "pages_as_tokens" else room):
            return False
        for block in hits:
            if not self.owners[block]:
                self.free.remove(block)
            self.owners[block] += 1
        request.blocks, request.computed = hits + [self.allocate() for _ in range(needed)], len(hits) * self.block_size
        if self.fault == "found_before_computed":
            self.remember(request, len(request.tokens))
        return True

    def allocate(self):
        block = self.free.pop(0)
        self.found.pop(self.key.pop(block, None), None)
        self.owners[block] = 1
        return block

    def remember(self, request, end):
        """The blocks of these tokens can be found, each unless another has its text."""
        for place in range(end // self.block_size):
            key, block = tuple(request.tokens[: (place + 1) * self.block_size]), request.blocks[place]
            if self.found.setdefault(key, block) == block:
                self.key[block] = key

    def release(self, request, for_all=False):
        for block in request.blocks:
            self.owners[block] = 0 if for_all else self.owners[block] - 1
            if not self.owners[block]:
                self.free.append(block)
        request.blocks = request.blocks if self.fault == "freed_twice" else []

    def preempt(self, request):
        self.release(request, for_all=self.fault == "freed_while_used")
        self.running.remove(request)
        self.waiting.insert(0, request)
        request.blocks, request.computed, self.held_back = [], 0, True
        if self.fault == "announced_twice" and request.announced + 1 == request.end:
            request.announced -= 1

    def leave(self, request):
        self.release(request)
        (self.running if request in self.running else self.waiting).remove(request)

    def update(self, step, next_token):
        """The step has run. [(name, new tokens, finished)] of those that got one."""
        given = []
        for request, count in step:
            request.computed += count
            self.remember(request, request.computed)
            if request.computed == len(request.tokens):
                request.tokens.append(next_token(request.name))
                finished = len(request.tokens) == request.end
                given.append((request.name, request.tokens[request.announced :], finished))
                request.announced = len(request.tokens)
                if finished:
                    self.leave(request)
                    self.held_back = False
        return given

    def abort(self, name):
        request = self.requests[name]
        if request in self.running or request in self.waiting:
            self.leave(request)
            self.held_back = self.held_back and self.fault == "only_a_finish_clears"
        elif self.fault == "freed_twice":
            self.release(request)


class Toy(Engine):
    """The adapter. Its methods are the scheduler's own, in the kit's words."""

    fault = ""

    def __init__(self, num_blocks, block_size, budget, max_seqs):
        self.scheduler = Scheduler(num_blocks, block_size, budget, max_seqs, self.fault)
        self.num_slots = num_blocks * block_size

    def fits(self, prompt_len, max_tokens):
        return prompt_len + max_tokens <= self.num_slots

    def add(self, request, prompt, max_tokens):
        self.scheduler.add(Request(request, prompt, max_tokens))

    def schedule(self):
        self.planned = self.scheduler.schedule()
        return [], [Work(r.name, r.computed, count, list(r.blocks)) for r, count in self.planned]

    def accept(self, next_token):
        return [Output(*given) for given in self.scheduler.update(self.planned, next_token)]

    def abort(self, request):
        self.scheduler.abort(request)

    def free(self):
        return {"device": len(self.scheduler.free)}

    def tables(self):
        return {r.name: Table(list(r.blocks), r.computed) for r in self.scheduler.running}


ADAPTERS = [Toy]
for fault in FAULTS:  # a class for each: toy:freed_twice
    globals()[fault] = type(fault, (Toy,), {"fault": fault})


def scripts_to_find(fault, seeds=20):
    """How many scripts it takes, for each seed."""
    return [kit.run(globals()[fault], number=seed, shrink=False).first for seed in range(seeds)]


if __name__ == "__main__":  # the table of chapter 14
    for fault in FAULTS:
        found = sorted(scripts_to_find(fault))
        print(f"{fault:<24} median {statistics.median(found):5g}, {found[0]} to {found[-1]}", flush=True)
