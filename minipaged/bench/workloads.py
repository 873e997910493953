"""The workloads that are timed. Plain Python, so that a peer's interpreter without minipaged reads the same JSON.

    A   1 prompt of 64 tokens                          one user at a terminal
    B   8 prompts of 16 to 256                         a small server
    C   32 prompts of 16 to 256                        a batch
    D   C, behind 512 tokens that all share            a system prompt
    S   64 requests that arrive over 96 steps          16 places, 8 to 256 new tokens, mostly few

Each has 128 new tokens a prompt unless said otherwise, greedy, and does not end at the end of a text. Prompts are
random tokens of a fixed seed: what is timed does not depend on what they say.
"""

import random
from dataclasses import dataclass, field

NEW_TOKENS = 128
SHARED = 512  # tokens of D's common prefix
FIRST_TOKEN, LAST_TOKEN = 1_000, 40_000  # ordinary tokens of SmolLM2's vocabulary


@dataclass(frozen=True)
class Workload:
    """prompts: token ids. new_tokens: of each prompt. arrivals: the engine step before which each one comes; none where
    all are there from the start. places: sequences that may run at once."""

    name: str
    prompts: list[list[int]]
    new_tokens: list[int]
    arrivals: list[int] = field(default_factory=list)
    places: int = 32

    @property
    def num_new(self) -> int:
        return sum(self.new_tokens)

    @property
    def context(self) -> int:
        """The longest that a sequence becomes, in tokens."""
        return max(len(prompt) + new for prompt, new in zip(self.prompts, self.new_tokens, strict=True))


def workload(name: str, scale: float = 1.0) -> Workload:
    """One of A, B, C, D, S. scale: a share of the new tokens, for a quick look. Raises ValueError for another name."""
    rng = random.Random(17)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]

    new = max(2, round(NEW_TOKENS * scale))
    if name == "A":
        return Workload(name, [prompt(64)], [new])
    if name in ("B", "C", "D"):
        count = 8 if name == "B" else 32
        lengths = [16 + 240 * i // (count - 1) for i in range(count)]  # evenly spread, in no order
        rng.shuffle(lengths)
        common = prompt(SHARED) if name == "D" else []
        return Workload(name, [common + prompt(length) for length in lengths], [new] * count)
    if name == "S":
        prompts = [prompt(rng.randrange(16, 129)) for _ in range(64)]
        return Workload(
            name,
            prompts,
            [max(2, round(8 * 32 ** rng.random() * scale)) for _ in prompts],  # as answers are: most short, a few long
            sorted(round(rng.randrange(97) * scale) for _ in prompts),
            places=16,
        )
    raise ValueError(f"workload must be one of A, B, C, D, S, got {name!r}")
