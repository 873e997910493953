"""Record what the site's player plays: real runs of SmolLM2, and three reservation policies. (make traces)

    docs/traces/NAME.json              the trace as `minipaged.viz.export` writes it, with the words of films.toml, and
                                       marks: [[frame, caption], ...], the moments that matter
    docs/traces/paged_attention.json   one step of decode, block by block: see `paged_attention`
    docs/traces/fragmentation.json     a format of its own: see `fragmentation`

The files are kept in the repository, so that the site builds on a machine without the model. They are small on
purpose: blocks of 4 tokens, pools of 7 to 20 blocks. A run gives the same file again: greedy or seeded, float32.
"""

import json
import math
import random
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.memory.reservation import POLICIES, OutOfSlots, ReservationPool
from minipaged.memory.trace import Trace
from minipaged.model.load import Model, load_model
from minipaged.viz.export import MAPS, apply_changes, to_json

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "traces"
BYTES_UP_TO = 150_000  # of one file: it is loaded with a page
TWO_PROMPTS = ["Four score and seven years ago our", "It was the best of"]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    films = tomllib.loads((Path(__file__).parent / "films.toml").read_text(encoding="utf-8"))
    model = load_model("smollm2-135m")
    for name, document in runs(model):
        film = films[name]
        film["marks"] = [marked(document["events"], fields, caption) for fields, caption in film["marks"]]
        write(name, film | document, f"{len(document['events']):>4} events")
    write("fragmentation", fragmentation(), "three policies")


def marked(events: list[dict[str, Any]], fields: dict[str, Any], caption: str) -> tuple[int, str]:
    """(frame, caption) of the first event with these fields; what the event says stands in the caption."""
    for frame, event in enumerate((item["event"] for item in events), start=1):
        if fields.items() <= event.items():
            return frame, caption.format_map(event)
    raise ValueError(f"no event has {fields}")


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


def runs(model: Model) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, document) of each run. What is left open is as in `LLM`."""

    def llm(num_blocks: int, **options: Any) -> LLM:
        return LLM(model, block_size=4, num_blocks=num_blocks, trace=True, watermark=0.0, **options)

    def traced(engine: LLM) -> dict[str, Any]:
        assert engine.trace is not None
        return json.loads(to_json(lettered(engine.trace)))

    greedy = SamplingParams(max_tokens=8, ignore_eos=True)

    engine = llm(12, enable_prefix_caching=False)
    asked = queries_of(engine)
    engine.generate(TWO_PROMPTS, greedy)
    yield "two_requests", traced(engine)
    yield "paged_attention", paged_attention(engine, asked[-1], traced(engine))

    engine = llm(16, enable_prefix_caching=False)
    samples = SamplingParams(n=3, temperature=0.9, max_tokens=8, ignore_eos=True, seed=4)
    engine.generate(["The moon is a place where"], samples)
    yield "parallel_sampling", traced(engine)

    engine = llm(20, enable_prefix_caching=False)
    engine.beam_search(["The capital of France is"], BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True))
    yield "beam_search", traced(engine)

    engine = llm(14)
    engine.generate("You are a kind poet. Sing of the rain", SamplingParams(max_tokens=4, ignore_eos=True))
    engine.generate("You are a kind poet. Sing of the snow", SamplingParams(max_tokens=4, ignore_eos=True))
    yield "prefix_cache", traced(engine)

    long = SamplingParams(max_tokens=12, ignore_eos=True)
    engine = llm(7, enable_prefix_caching=False)
    engine.generate(TWO_PROMPTS, long)
    yield "preemption_recompute", traced(engine)

    engine = llm(7, enable_prefix_caching=False, preemption="swap", num_host_blocks=6)
    engine.generate(TWO_PROMPTS, long)
    yield "preemption_swap", traced(engine)


LAYER, HEAD = 0, 4  # of SmolLM2: two blocks hold a larger score than those before them


def queries_of(engine: LLM) -> list[torch.Tensor]:
    """The queries of each step, [num_tokens, num_heads, head_dim], as one layer hands them to the cache."""
    cache, asked = engine.runner.cache, list[torch.Tensor]()
    attend = cache.attend

    def watched(layer: int, query: torch.Tensor, *others: Any) -> torch.Tensor:
        if layer == LAYER:
            asked.append(query.clone())
        return attend(layer, query, *others)

    cache.attend = watched  # type: ignore[method-assign]
    return asked


def paged_attention(engine: LLM, queries: torch.Tensor, document: dict[str, Any]) -> dict[str, Any]:
    """The last step of a run, with what one query head does in it: an event `read` for each block, the fields of which
    are the scores, and m, l and the factor of chapter 7 after it."""
    cache = engine.runner.cache.key_cache[LAYER]  # [num_blocks, num_kv_heads, block_size, head_dim]
    size, head_dim = cache.shape[2:]
    kv_head = HEAD // (queries.shape[1] // cache.shape[1])
    last = max(item["event"]["step"] for item in document["events"])
    before: dict[str, dict[str, Any]] = {name: {} for name in MAPS}
    events = []
    for item in document["events"]:
        event = item["event"]
        if event["step"] < last:
            apply_changes(before, item["changes"])
        elif event["event"] in ("schedule", "write"):
            events.append(item)
        if event["step"] < last or event["event"] != "write":
            continue
        seq, m, total = event["seq"], -torch.inf, 0.0
        query = queries["AB".index(seq), HEAD]
        for logical, block in enumerate(before["tables"][seq]):
            fill = min(size, event["start"] + 1 - logical * size)
            scores = cache[block, kv_head, :fill] @ query * head_dim**-0.5  # [fill]
            largest = max(m, float(scores.max()))
            factor = math.exp(m - largest)
            m, total = largest, total * factor + float((scores - largest).exp().sum())
            read = {"event": "read", "step": last, "seq": seq, "logical": logical, "block": block}
            read |= {"scores": [round(s, 2) for s in scores.tolist()]}
            read |= {"m": round(m, 2), "l": round(total, 3), "rescaled": round(factor, 3)}
            words = f"{seq}'s query meets block {block}: m = {read['m']}, l = {read['l']}"
            events.append({"event": read, "words": words, "changes": {}})
    names = ("schema", "version", "trace", "sequences")
    running = dict.fromkeys(before["tables"], "running")
    return {name: document[name] for name in names} | {
        "step": last - 1,
        "queues": running,
        "base": before,
        "events": events,
    }


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
        "The same requests in three pools of 64 slots. How long a request will get is not known when it comes: how "
        "much is reserved for it?"
    )
    pool = {"num_slots": NUM_SLOTS, "max_model_len": MAX_MODEL_LEN, "states": STATES, "policies": list(POLICIES)}
    return {**head, "about": about, **pool, "frames": frames, "marks": marks_of(frames)}


def marks_of(frames: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The moments that matter in `fragmentation`, found in its frames."""

    def first(holds: Callable[[dict[str, Any]], bool]) -> tuple[int, dict[str, Any]]:
        return next((i, frame["pools"]) for i, frame in enumerate(frames) if holds(frame["pools"]))

    waits, pools = first(lambda pools: all(pool["waiting"] for pool in pools.values()))
    held = pools["max"]["account"][0]
    marks = [(waits, f"All 64 slots are taken, and {held} of them hold a token. The next request must wait.")]
    more, pools = first(lambda pools: len(pools["oracle"]["runs"]) > len(pools["max"]["runs"]))
    counts = [len(pools[policy]["runs"]) for policy in ("oracle", "max")]
    marks.append((more, f"Knowing the lengths helps: the oracle runs {counts[0]} requests now, and max {counts[1]}."))
    worst = max(range(len(frames)), key=lambda i: frames[i]["pools"]["oracle"]["account"][3])
    rounding = frames[worst]["pools"]["oracle"]["account"][3]
    marks.append((worst, f"Even the oracle loses {rounding} slots now: a run has a power of two of them."))
    ends = {
        policy: first(lambda pools, of=policy: not pools[of]["runs"] and pools[of]["done"])[0] for policy in POLICIES
    }
    said = ", ".join(f"{policy} after {step} steps" for policy, step in ends.items())
    marks.append((len(frames) - 1, f"All requests are done: {said}. The memory decided how many ran at once."))
    return sorted(marks)


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
