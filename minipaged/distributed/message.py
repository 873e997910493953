"""Chapter 13. What rank 0 says to all others before a step: one message of whole numbers, and nothing else.

    tag | num_seqs num_tokens num_blocks num_swap_out num_swap_in num_copies
        | starts | counts | lengths of tables | reaches an end (0, 1)             num_seqs numbers each
        | tokens | blocks of all tables | swap_out | swap_in | copies (pairs)     int32, all of them

Positions, slots and sequence lengths are not in it: every rank works them out of starts, counts and tables, as a single
device does (`make_step`). A decoding sequence costs 5 numbers and its block table.
"""

import numpy as np

from minipaged.engine.runner import StepDescription
from minipaged.model.contract import Scheduled

TAG = b"STEP"
NUM_COUNTS = 6


def encode(told: StepDescription) -> bytes:
    """A step as bytes."""
    batch, pairs = told.batch, (told.swap_out, told.swap_in, told.copies)
    tokens = [token for item in batch for token in item.token_ids]
    blocks = [block for item in batch for block in item.blocks]
    ends = set(told.ends)
    numbers = [
        len(batch), len(tokens), len(blocks), *(len(plan) for plan in pairs),
        *(item.start for item in batch),
        *(len(item.token_ids) for item in batch),
        *(len(item.blocks) for item in batch),
        *(int(i in ends) for i in range(len(batch))),
        *tokens,
        *blocks,
        *(number for plan in pairs for pair in plan for number in pair),
    ]  # fmt: skip
    return TAG + np.array(numbers, dtype=np.int32).tobytes()


def decode(message: bytes) -> StepDescription:
    """The inverse of `encode`. Raises ValueError for a message of another length than it says."""
    numbers = np.frombuffer(message, dtype=np.int32, offset=len(TAG)).tolist()
    num_seqs, num_tokens, num_blocks, *num_pairs = numbers[:NUM_COUNTS]
    expected = NUM_COUNTS + 4 * num_seqs + num_tokens + num_blocks + 2 * sum(num_pairs)
    if message[: len(TAG)] != TAG or len(numbers) != expected:
        raise ValueError(f"a step of {expected} numbers was announced, and {len(numbers)} came")
    place = NUM_COUNTS

    def take(count: int) -> list[int]:
        nonlocal place
        place += count
        return numbers[place - count : place]

    starts, counts, lengths, reached = (take(num_seqs) for _ in range(4))
    tokens, blocks = [take(count) for count in counts], [take(length) for length in lengths]
    batch = [Scheduled(*item) for item in zip(tokens, starts, blocks, strict=True)]
    swap_out, swap_in, copies = (
        [(source, target) for source, target in zip(*[iter(take(2 * number))] * 2, strict=True)] for number in num_pairs
    )
    return StepDescription(swap_out, swap_in, copies, batch, [i for i, is_end in enumerate(reached) if is_end])


def message_bytes(told: StepDescription) -> int:
    """Bytes of `encode(told)`, by the formula of docs/tensor_parallel.md."""
    blocks, tokens = sum(len(item.blocks) for item in told.batch), sum(len(item.token_ids) for item in told.batch)
    pairs = len(told.swap_out) + len(told.swap_in) + len(told.copies)
    return len(TAG) + 4 * (NUM_COUNTS + 4 * len(told.batch) + tokens + blocks + 2 * pairs)
