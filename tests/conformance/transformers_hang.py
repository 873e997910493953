"""Chapter 14. The hang of transformers 5.24.0 without the kit: a small model and the public manager, nothing else.

    python tests/conformance/transformers_hang.py               as it is: B waits for ever
    python tests/conformance/transformers_hang.py --repaired    with the repair, B ends

A and B grow until the pool is full. B loses its blocks and is queued again (a soft reset), and the scheduler takes in
nothing new until a request finishes. Then A's client cancels A. Nothing is left that could finish, so B waits, and so
does C, which comes later, while the whole pool is free.
"""

import logging
import sys
import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

NUM_BLOCKS, PAGE_SIZE = 32, 16  # a pool of 512 tokens
LONGEST = 480  # tokens of a request: one fits, two do not
SECONDS = 20.0  # a request alone takes about two


def repair():
    """A cancellation clears the flag, as a finish does."""
    from transformers.generation.continuous_batching.scheduler import Scheduler

    clear = Scheduler.clear_cancelled_requests

    def clear_cancelled_requests(self):
        cancelled = clear(self)
        if cancelled:
            self.block_new_requests = False
        return cancelled

    Scheduler.clear_cancelled_requests = clear_cancelled_requests


def main():
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes)).eval()
    manager = model.init_continuous_batching(
        GenerationConfig(max_new_tokens=LONGEST, do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=NUM_BLOCKS,
            max_batch_tokens=64,
            max_memory_percent=0.5,
            use_async_batching=False,
        ),
    )
    manager.start()
    lengths, finished, cancelled = {}, set(), False
    try:
        for name in ("A", "B"):
            prompt = [1, 2, 3, 4 + ord(name) % 3]
            manager.add_request(prompt, request_id=name, max_new_tokens=LONGEST - 4, streaming=True)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and finished != {"B", "C"}:
            result = manager.get_result(timeout=0.2)
            if result is None:
                continue
            if result.request_id not in lengths:
                print(f"{result.request_id} gets its first token", flush=True)
            lengths[result.request_id] = len(result.generated_tokens)
            if result.is_finished():
                finished.add(result.request_id)
                print(f"{result.request_id} has ended with {lengths[result.request_id]} tokens", flush=True)
            # The pool was full when each had 256 tokens.
            if not cancelled and result.request_id == "A" and lengths["A"] == 350:
                print(f"A has 350 tokens, B {lengths['B']} and waits; A is cancelled, and C comes", flush=True)
                manager.cancel_request("A")
                manager.add_request([7, 8, 9], request_id="C", max_new_tokens=5, streaming=True)
                cancelled, end = True, time.monotonic() + SECONDS
        print(f"ended within {SECONDS:.0f} s: {', '.join(sorted(finished)) or 'none'}; tokens: {lengths}")
    finally:
        manager.stop(block=True, timeout=10, hard_stop=True)
    return finished


if __name__ == "__main__":
    if "--repaired" in sys.argv:
        repair()
    sys.exit(not main())
