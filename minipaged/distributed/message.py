"""Chapter 13. What rank 0 sends to all others before a step: one message of whole numbers, and nothing else.

    tag | num_tokens num_seqs max_blocks num_sampled max_query_len num_swap_out num_swap_in num_copies
        | token_ids positions query_start_loc seq_lens block_tables slot_mapping logits_rows     the ForwardBatch
        | swap_out | swap_in | copies (pairs)                                                    int32, all of them

The batch is sent as it is, so that every rank computes the very arrays of rank 0. A decoding sequence costs 6 numbers
and its row of the block tables.
"""

import numpy as np
import torch
from torch import Tensor

from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.memory.block_manager import Copies
from minipaged.model.batch import ForwardBatch

TAG = b"STEP"
NUM_COUNTS = 8


def encode(output: SchedulerOutput, batch: ForwardBatch) -> bytes:
    """A step as bytes: the copies of `output`, and the batch."""
    plans = (output.swap_out, output.swap_in, output.copies)
    counts = [*_sizes(batch), batch.max_query_len, *map(len, plans)]
    tensors = [batch.token_ids, batch.positions, batch.query_start_loc, batch.seq_lens]
    tensors += [batch.block_tables, batch.slot_mapping, batch.logits_rows]
    pairs = [number for plan in plans for pair in plan for number in pair]
    # A slot fits in an int32: 2^31 tokens are terabytes of K and V.
    parts = [np.array(counts), *(tensor.cpu().numpy().ravel() for tensor in tensors), np.array(pairs)]
    return TAG + b"".join(part.astype(np.int32).tobytes() for part in parts)


def decode(message: bytes, device: torch.device | str = "cpu") -> tuple[SchedulerOutput, ForwardBatch]:
    """The inverse of `encode`: block copies alone, and the batch. Raises ValueError for a message of another length
    than it says."""
    numbers = np.frombuffer(message, dtype=np.int32, offset=len(TAG))
    num_tokens, num_seqs, max_blocks, num_sampled, max_query_len, *num_copies = numbers[:NUM_COUNTS].tolist()
    expected = _num_numbers(num_tokens, num_seqs, max_blocks, num_sampled, sum(num_copies))
    if message[: len(TAG)] != TAG or len(numbers) != expected:
        raise ValueError(f"a step of {expected} numbers was announced, and {len(numbers)} came")
    place = NUM_COUNTS

    def take(count: int) -> np.ndarray:
        nonlocal place
        place += count
        return numbers[place - count : place]

    def tensor(count: int, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(take(count).copy()).to(device=device, dtype=dtype)

    def copies() -> Copies:
        return [(source, target) for source, target in take(2 * num_copies.pop(0)).reshape(-1, 2).tolist()]

    batch = ForwardBatch(
        token_ids=tensor(num_tokens, torch.int64),
        positions=tensor(num_tokens, torch.int64),
        query_start_loc=tensor(num_seqs + 1, torch.int32),
        seq_lens=tensor(num_seqs, torch.int32),
        block_tables=tensor(num_seqs * max_blocks, torch.int32).view(num_seqs, max_blocks),
        slot_mapping=tensor(num_tokens, torch.int64),
        logits_rows=tensor(num_sampled, torch.int64),
        max_query_len=max_query_len,
    )
    return SchedulerOutput(swap_out=copies(), swap_in=copies(), copies=copies()), batch


def message_bytes(output: SchedulerOutput, batch: ForwardBatch) -> int:
    """Bytes of `encode(output, batch)`, by the formula of docs/tensor_parallel.md."""
    num_copies = len(output.swap_out) + len(output.swap_in) + len(output.copies)
    return len(TAG) + 4 * _num_numbers(*_sizes(batch), num_copies)


def _sizes(batch: ForwardBatch) -> tuple[int, int, int, int]:
    """num_tokens, num_seqs, max_blocks, num_sampled."""
    return len(batch.token_ids), *batch.block_tables.shape, len(batch.logits_rows)


def _num_numbers(num_tokens: int, num_seqs: int, max_blocks: int, num_sampled: int, num_copies: int) -> int:
    return NUM_COUNTS + 3 * num_tokens + 2 * num_seqs + 1 + num_seqs * max_blocks + num_sampled + 2 * num_copies
