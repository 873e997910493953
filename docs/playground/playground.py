"""What the playground's buttons run, in the browser and, by the site's tests, outside of it. Plain Python.

    run(settings)         requests through our own scheduler and memory, with no model        -> the player's document
    check(file, source)   chapter 6's own suite over an edited module, graded as a learner's  -> findings, and a film

No model runs in a browser tab, so what a request answers is made up: its tokens are the numbers 1, 2, 3, ... What
the memory does about it is not made up: it is done by minipaged/memory and minipaged/engine/scheduler.py.
"""

import json
import os
import re
import sys
from pathlib import Path

STEPS_UP_TO = 500
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LIMITS = {
    "num_blocks": (1, 64),
    "block_size": (1, 16),
    "num_host_blocks": (0, 64),
    "max_num_batched_tokens": (1, 512),
    "max_num_seqs": (1, 32),
}


def run(settings):
    """The player's document for a run. settings:

    {"requests": [{"prompt": "...", "max_tokens": 8, "n": 1, "arrives": 0}, ...],
     "num_blocks": 12, "block_size": 4, "num_host_blocks": 0, "preemption": "recompute" | "swap",
     "prefix_caching": false, "max_num_batched_tokens": 64, "max_num_seqs": 8}

    A prompt is words, a word a token; a request arrives before step `arrives` + 1. Raises ValueError with the numbers
    where something does not fit.
    """
    from minipaged.viz.export import to_json

    return to_json(trace_of(settings))


def trace_of(settings):
    """The trace of a run."""
    from minipaged.engine.scheduler import Scheduler
    from minipaged.engine.sequence import SamplingParams, Sequence, Token
    from minipaged.memory.block_manager import BlockManager
    from minipaged.memory.trace import Trace

    sizes = {name: _whole(settings.get(name), name, *limits) for name, limits in LIMITS.items()}
    swap = settings["preemption"] == "swap"
    if swap and not sizes["num_host_blocks"]:
        raise ValueError("preemption by swap needs blocks of the host: num_host_blocks is 0")
    trace = Trace(sizes["num_blocks"], sizes["block_size"], sizes["num_host_blocks"] if swap else 0)
    blocks = BlockManager(
        trace.num_blocks,
        trace.block_size,
        num_host_blocks=trace.num_host_blocks,
        enable_prefix_caching=bool(settings["prefix_caching"]),
        trace=trace,
    )
    scheduler = Scheduler(
        blocks,
        max_model_len=512,
        max_num_seqs=sizes["max_num_seqs"],
        max_num_batched_tokens=sizes["max_num_batched_tokens"],
        watermark=0.0,
    )
    words = {}  # word -> token id, so that equal words are equal tokens
    letters = iter(LETTERS)  # the names of sequences, one a sample

    def samples_of(number, request):
        prompt = [words.setdefault(word, len(words)) for word in str(request["prompt"]).split()]
        n, max_tokens = _whole(request["n"], "n", 1, 8), _whole(request["max_tokens"], "max_tokens", 1, 64)
        params = SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens)
        seqs = [Sequence(str(number), index, prompt, params) for index in range(n)]
        for seq in seqs:
            seq.seq_id = next(letters, None)
            if seq.seq_id is None:
                raise ValueError(f"there are more than {len(LETTERS)} sequences")
        return seqs

    if not settings["requests"]:
        raise ValueError("there is no request")
    arriving = []  # (before which step, the samples)
    for number, request in enumerate(settings["requests"]):
        try:
            seqs = samples_of(number, request)
            scheduler.check(len(seqs[0].prompt_token_ids), seqs[0].params.max_tokens)
        except ValueError as error:
            raise ValueError(f"request {number + 1}: {error}") from error
        arriving.append((_whole(request.get("arrives", 0), "arrives", 0, 100), seqs))
    arriving.sort(key=lambda item: item[0])
    shown = list(words)
    for step in range(STEPS_UP_TO):
        while arriving and arriving[0][0] <= step:
            scheduler.add(arriving.pop(0)[1])
        if not (scheduler.waiting or scheduler.running):
            if not arriving:
                return trace
            continue  # no request is here yet
        trace.step += 1
        output = scheduler.schedule()
        counts = output.num_scheduled_tokens
        for seq, mode in output.preempted.items():
            trace.record("preempt", seq=seq.seq_id, mode=mode)
        trace.record("schedule", seqs={seq.seq_id: count for seq, count in counts.items()})
        for seq, count in counts.items():
            tokens = seq.tokens(seq.num_computed, seq.num_computed + count)
            text = [shown[token] if token >= 0 else str(-token) for token in tokens]
            trace.record("write", seq=seq.seq_id, start=seq.num_computed, count=count, tokens=text)
        scheduler.update_from_output(output)
        for seq in output.sampled:
            seq.outputs.append(Token(-len(seq.outputs) - 1, None, 0.0))  # the answer: 1, 2, 3, ...
            if len(seq.outputs) == seq.params.max_tokens:
                trace.record("finish", seq=seq.seq_id, reason="length")
                scheduler.finish(seq)
    raise ValueError(f"not finished after {STEPS_UP_TO} steps")


def _whole(value, name, least, most):
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return value


# ---- the suite of chapter 6 ------------------------------------------------------------------------------------------

EXERCISES = {"block_allocator.py": "ch06_block_allocator.py", "block_table.py": "ch06_block_table.py"}


def check(file, source, root=".", folder="exercises"):
    """Grade an edited block_allocator.py or block_table.py by chapter 6's suite, in this process.

    Returns JSON: {"holds": 12, "wrong": 1, "findings": [...], "errors": [...], "film": document or null}. The film is
    the smallest counterexample, call by call. A process grades once: the modules are imported then.
    """
    if file not in EXERCISES:
        raise ValueError(f"file is one of {', '.join(EXERCISES)}, got {file!r}")
    root = Path(root).resolve()
    where, report = root / folder, root / "report.json"
    where.mkdir(exist_ok=True)
    (where / EXERCISES[file]).write_text(source, encoding="utf-8")
    os.environ |= {"MINIPAGED_COURSE_REPORT": str(report), "HYPOTHESIS_PROFILE": "course", "MINIPAGED_EXAMPLES": "50"}
    os.chdir(root)
    sys.path.insert(0, str(root))
    import pytest

    plugins = ["-p", "minipaged.course.plugin", "-p", "no:cacheprovider", "-p", "no:terminal"]
    options = [*plugins, "-o", "addopts=", "--rootdir", str(root), "-m", "ch06", "--impl", str(where)]
    pytest.main([*options, str(root / "tests" / "test_ch06_block_table.py")])
    found = json.loads(report.read_text(encoding="utf-8"))
    findings, errors = found["findings"], found["errors"]
    wrong = [finding for finding in findings if finding["outcome"] == "wrong"]
    first = min(wrong, key=lambda finding: max(finding["events"], 6), default=None)
    return json.dumps(
        {
            "holds": sum(finding["outcome"] == "holds" for finding in findings),
            "wrong": len(wrong),
            "tried": len(findings),
            "first": first and {name: first[name] for name in ("property", "about", "message", "error")},
            "script": [call["call"] for call in first["script"]] if first else [],
            "errors": [str(error).strip().splitlines()[-1] for error in errors],
            "film": first and film_of(first),
        }
    )


def film_of(finding):
    """The script of a finding as the player's document: a frame a call, with the block tables after it, and the last
    call marked with what was found. None where there is nothing to draw.

    Unlike a trace it may contradict itself (a block with two owners that do not share): that is what it must show.
    """
    from minipaged.viz.colours import PALETTE

    script = finding["script"]
    if any(call.get("state") for call in script):
        states, sizes = _states_of_tables(script)
    else:
        states, sizes = _states_of_an_allocator(script)
    names = list(dict.fromkeys(name for state in states for kind in TABLES for name in state[kind]))
    if not names:
        return None
    before, events = {name: {} for name in MAPS}, []
    for call, after in zip(script, states, strict=True):
        changes = {name: _changed(before[name], after[name]) for name in MAPS if before[name] != after[name]}
        events.append({"event": {"event": "call", "step": len(events) + 1}, "words": call["call"], "changes": changes})
        before = after
    return {
        "schema": "minipaged.site",
        "version": 1,
        "title": "The smallest script that shows it",
        "trace": sizes,
        "sequences": [{"name": n, "label": n, "colour": PALETTE[i % len(PALETTE)]} for i, n in enumerate(names)],
        "events": events,
        "marks": [[len(events), finding["message"].split("\n")[0]]],
    }


TABLES = ("tables", "host_tables")
MAPS = (*TABLES, "num_tokens", "lost")


def _states_of_tables(script):
    """The maps of a film after each call, as the course's recorder read them from the learner's own tables."""
    sizes = {"num_blocks": 1, "block_size": 1, "num_host_blocks": 0}
    states, last = [], {name: {} for name in MAPS}
    for call in script:
        if state := call.get("state"):
            of = {"device": {}, "host": {}}
            for name, blocks in state["tables"].items():
                if blocks:
                    of[state["on"][name]][name] = blocks
            here, there, pools = of["device"], of["host"], state["pools"]
            tokens = {name: state["num_tokens"][name] for name in (*here, *there)}
            # [its count, references of tables, of the cache, of the test]
            lost = {str(block): True for block, counts in pools["device"]["blocks"].items() if not any(counts[1:])}
            last = {"tables": here, "host_tables": there, "num_tokens": tokens, "lost": lost}
            sizes["block_size"], sizes["num_blocks"] = state["block_size"], pools["device"]["num_blocks"]
            sizes["num_host_blocks"] = pools["host"]["num_blocks"] if "host" in pools else 0
        states.append(last)
    return states, sizes


def _states_of_an_allocator(script):
    """The same where there is an allocator alone: each `allocate` and each `share` is drawn as an owner of a block."""
    owners, states, num_blocks = {}, [], 1
    letters = iter(LETTERS)
    for call in script:
        if made := re.search(r"BlockAllocator\((?:num_blocks=)?(\d+)", call["call"]):
            num_blocks = int(made[1])
        did = re.match(r"\w+\.(allocate|share|free)\((\d*)\)(?:  -> (\d+))?$", call["call"])
        if did and did[1] == "free":
            leaving = next((name for name, (block,) in owners.items() if block == int(did[2])), None)
            owners = {name: blocks for name, blocks in owners.items() if name != leaving}
        elif did and (did[2] or did[3]) and (letter := next(letters, None)):
            owners = {**owners, letter: [int(did[3] or did[2])]}
        states.append({"tables": owners, "host_tables": {}, "num_tokens": dict.fromkeys(owners, 1), "lost": {}})
    return states, {"num_blocks": num_blocks, "block_size": 1, "num_host_blocks": 0}


def _changed(before, after):
    """Entries that are new or different, and null for those that are gone."""
    gone = {name: None for name in before if name not in after}
    return {**gone, **{name: value for name, value in after.items() if before.get(name) != value}}
