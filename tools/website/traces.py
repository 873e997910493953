"""Record what the site's player plays: real runs of SmolLM2, and three reservation policies. (make traces)

    docs/traces/NAME.json        the trace as `minipaged.viz.export` writes it, with a title and what to look for
    docs/traces/fragmentation.json   a format of its own: see `fragmentation`

The files are kept in the repository, so that the site builds on a machine without the model. They are small on
purpose: blocks of 4 tokens, pools of 12 to 20 blocks. A run gives the same file again: greedy or seeded, float32.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.memory.reservation import POLICIES, OutOfSlots, ReservationPool
from minipaged.memory.trace import Trace
from minipaged.model.load import Model, load_model
from minipaged.viz.export import to_json

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "traces"
BYTES_UP_TO = 150_000  # of one file: it is loaded with a page


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = load_model("smollm2-135m")
    for name, title, about, trace in runs(model):
        document = {"title": title, "about": about, **json.loads(to_json(lettered(trace)))}
        write(name, document, f"{len(trace.events):>4} events")
    write("fragmentation", fragmentation(), "three policies")


def write(name: str, document: dict[str, Any], what: str) -> None:
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=True) + "\n"
    if len(text) > BYTES_UP_TO:
        raise ValueError(f"{name}.json has {len(text)} bytes, and may have {BYTES_UP_TO}")
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{name:<22} {what}, {len(text):>7} bytes")


def lettered(trace: Trace) -> Trace:
    """The same trace with sequences named A, B, C, ... in the order of arrival, as pictures name them."""
    seqs = [[event["seq"]] if "seq" in event else event.get("seqs", ()) for event in trace.events]
    letters = dict(zip(dict.fromkeys(seq for each in seqs for seq in each), "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False))
    renamed = Trace(trace.num_blocks, trace.block_size, trace.num_host_blocks)
    for event in trace.events:
        renamed.step = event["step"]
        fields = {key: value for key, value in event.items() if key not in ("event", "step")}
        for name in ("seq", "parent"):
            if name in fields:
                fields[name] = letters[fields[name]]
        if "seqs" in fields:
            fields["seqs"] = {letters[seq]: count for seq, count in fields["seqs"].items()}
        renamed.record(event["event"], **fields)
    return renamed


# ---- the engine ------------------------------------------------------------------------------------------------------


def runs(model: Model) -> Iterator[tuple[str, str, str, Trace]]:
    """(name, title, about, trace) of each run. What is left open is as in `LLM`."""

    def llm(num_blocks: int, **options: Any) -> LLM:
        return LLM(model, block_size=4, num_blocks=num_blocks, trace=True, watermark=0.0, **options)

    def traced(engine: LLM) -> Trace:
        assert engine.trace is not None
        return engine.trace

    greedy = SamplingParams(max_tokens=8, ignore_eos=True)
    two = ["Four score and seven years ago our", "It was the best of"]

    engine = llm(12, enable_prefix_caching=False)
    engine.generate(two, greedy)
    about = (
        "Two prompts run as one batch. Each has its own block table. Their blocks lie in one pool, in the order in "
        "which they were asked for."
    )
    yield "two_requests", "Two requests", about, traced(engine)

    engine = llm(16, enable_prefix_caching=False)
    samples = SamplingParams(n=3, temperature=0.9, max_tokens=8, ignore_eos=True, seed=4)
    engine.generate(["The moon is a place where"], samples)
    about = (
        "One prompt, three samples. The prompt is computed once. All three name its blocks, and whoever writes into a "
        "shared block takes a copy first."
    )
    yield "parallel_sampling", "Parallel sampling", about, traced(engine)

    engine = llm(20, enable_prefix_caching=False)
    engine.beam_search(["The capital of France is"], BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True))
    about = (
        "A beam search of width 3. In each step beams fork and beams die. The blocks of their common past stay shared."
    )
    yield "beam_search", "Beam search", about, traced(engine)

    engine = llm(14)
    engine.generate("You are a kind poet. Sing of the rain", SamplingParams(max_tokens=4, ignore_eos=True))
    engine.generate("You are a kind poet. Sing of the snow", SamplingParams(max_tokens=4, ignore_eos=True))
    about = (
        "Two requests, one after the other, with the same beginning. The first leaves its full blocks behind, and the "
        "second finds them."
    )
    yield "prefix_cache", "Prefix cache", about, traced(engine)

    long = SamplingParams(max_tokens=12, ignore_eos=True)
    engine = llm(7, enable_prefix_caching=False)
    engine.generate(two, long)
    about = (
        "The pool is too small for both. The later request gives its blocks back, waits, and computes its tokens again."
    )
    yield "preemption_recompute", "Preemption by recompute", about, traced(engine)

    engine = llm(7, enable_prefix_caching=False, preemption="swap", num_host_blocks=6)
    engine.generate(two, long)
    about = (
        "The same two requests in the same pool. The later one moves to the host's memory, and comes back with nothing "
        "lost."
    )
    yield "preemption_swap", "Preemption by swap", about, traced(engine)


# ---- three policies --------------------------------------------------------------------------------------------------

NUM_SLOTS, MAX_MODEL_LEN = 64, 32
STATES = ("held", "reserved", "over_reserved", "rounding", "external", "free")


def fragmentation(num_requests: int = 12, seed: int = 0) -> dict[str, Any]:
    """The same requests under max, pow2 and oracle.

    {"schema": "minipaged.site.fragmentation", "version": 1, "num_slots": 64, "policies": ["max", ...],
     "frames": [{"words": "...", "pools": {"max": {"runs": [[name, start, held, final, asked, size], ...],
                                                   "waiting": [name, ...], "done": 0, "account": [six numbers]}}}]}

    A frame is one step: finished requests leave, the others store a token, one arrives every second step, and waiting
    ones enter in the order of arrival. `size` is the block of the buddy allocator. The account is a `MemoryAccount`.
    """
    rng = random.Random(seed)
    requests = [(name, rng.randint(2, 8), rng.randint(2, 18)) for name in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:num_requests]]
    worlds = {policy: _World(policy) for policy in POLICIES}
    frames = []
    for step in range(10_000):
        arriving = requests[step // 2] if step % 2 == 0 and step // 2 < num_requests else None
        pools = {policy: world.step(arriving) for policy, world in worlds.items()}
        words = "every request stores one token"
        if arriving is not None:
            words = f"{arriving[0]} arrives: {arriving[1]} tokens of prompt, {arriving[2]} to come"
        frames.append({"words": words, "pools": pools})
        if all(len(world.done) == num_requests for world in worlds.values()):
            break
    head = {"schema": "minipaged.site.fragmentation", "version": 1, "title": "Three policies, one memory"}
    about = (
        "The same requests in three pools of 64 slots. Nobody knows how long a request will get: how much is reserved "
        "for it?"
    )
    pool = {"num_slots": NUM_SLOTS, "max_model_len": MAX_MODEL_LEN, "states": STATES, "policies": list(POLICIES)}
    return {**head, "about": about, **pool, "frames": frames}


class _World:
    """One policy: its pool, who waits, who is done."""

    def __init__(self, policy: str):
        self.pool = ReservationPool(NUM_SLOTS, policy, MAX_MODEL_LEN)
        self.waiting: list[tuple[str, int, int]] = []
        self.runs: dict[str, tuple[int, int, int]] = {}  # name -> (start, final length, asked)
        self.done: list[str] = []

    def step(self, arriving: tuple[str, int, int] | None) -> dict[str, Any]:
        for name, (_, final, _) in list(self.runs.items()):
            if self.pool.num_tokens(name) == final:
                self.pool.free(name)
                self.done.append(name)
                del self.runs[name]
            else:
                self.pool.append(name)
        if arriving is not None:
            self.waiting.append(arriving)
        while self.waiting:
            name, prompt, output = self.waiting[0]
            try:
                start = self.pool.allocate(name, prompt, output)
            except OutOfSlots:
                break
            self.runs[name] = start, prompt + output, self.pool.reservation(prompt, output)
            self.waiting.pop(0)
        following = self.waiting[0][1:] if self.waiting else None
        return {
            "runs": [
                [name, start, self.pool.num_tokens(name), final, asked, 1 << (asked - 1).bit_length()]
                for name, (start, final, asked) in self.runs.items()
            ],
            "waiting": [name for name, _, _ in self.waiting],
            "done": len(self.done),
            "account": list(self.pool.account(following)),
        }


if __name__ == "__main__":
    main()
