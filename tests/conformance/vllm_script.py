"""Chapter 14. A script for vLLM 0.32.0 that thousands of random ones missed: reading the scheduler gave it.

    .venv-vllm/bin/python tests/conformance/vllm_script.py

With priorities, a request that was scheduled earlier in the same step can be preempted. Its chunk is then not computed,
but blocks that the chunk would fill are in the prefix cache already. Needed: `long_prefill_token_threshold`, so that a
chunk and a decode share a step, a chunk of two blocks (the request that needs a block takes one, the other stays in the
cache), and a third request that waits. Only vLLM's own scheduler is called; nothing of the kit judges.
"""

import vllm_v1

LOW, WAITS, HIGH = [0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1], [1] * 13, [1, 1]


def main():
    engine = vllm_v1.Threshold(8, 2, 12, 2)  # 7 blocks of 2 tokens, and chunks of at most 4 tokens
    engine.add("low", LOW, 1, priority=2)
    engine.add("waits", WAITS, 1, priority=2)  # or the threshold would not apply: a request alone gets the whole budget
    computed = set()  # positions of "low" that a step has computed
    for number in range(1, 6):
        if number == 2:
            engine.add("high", HIGH, 2, priority=0)
        _, work = engine.schedule()
        print(f"step {number}:", ", ".join(f"{w.seq} {w.start} to {w.start + w.count - 1} in {w.blocks}" for w in work))
        for one in work:
            if one.seq == "low":
                missing = sorted(set(range(one.start)) - computed)
                if missing:
                    return print(f"low begins at {one.start}, and positions {missing} were never computed")
                computed.update(range(one.start, one.start + one.count))
        engine.accept(lambda seq: 0)
    return print("every position was computed")


if __name__ == "__main__":
    main()
