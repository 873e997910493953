"""Chapter 13. What rank 0 sends to all others before a step: whole numbers in two tensors, and nothing else.

    header    num_tokens num_seqs max_blocks num_sampled max_query_len num_swap_out num_swap_in num_copies
    body      token_ids positions query_start_loc seq_lens block_tables slot_mapping logits_rows     the ForwardBatch
              swap_out swap_in copies (pairs)

All are int32. The batch is sent as it is, so that every rank computes the very arrays of rank 0. A decoding sequence
costs 6 numbers and its row of the block tables.
"""

import torch
from torch import Tensor

from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.model.batch import ForwardBatch

HEADER_LENGTH = 8


def encode(output: SchedulerOutput, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """Header and body of a step: the copies of `output`, and the batch."""
    plans = (output.swap_out, output.swap_in, output.copies)
    sizes = (len(batch.token_ids), *batch.block_tables.shape, len(batch.logits_rows), batch.max_query_len)
    tensors = [batch.token_ids, batch.positions, batch.query_start_loc, batch.seq_lens]
    tensors += [batch.block_tables, batch.slot_mapping, batch.logits_rows]
    # A slot fits in an int32: 2^31 tokens are terabytes of K and V.
    parts = [tensor.flatten().to("cpu", torch.int32) for tensor in tensors]
    parts += [torch.tensor(plan, dtype=torch.int32).flatten() for plan in plans]
    return torch.tensor([*sizes, *map(len, plans)], dtype=torch.int32), torch.cat(parts)


def body_sizes(header: Tensor) -> list[int]:
    """How many numbers each part of the body has."""
    num_tokens, num_seqs, max_blocks, num_sampled, _, *num_copies = header.tolist()
    batch = [num_tokens, num_tokens, num_seqs + 1, num_seqs, num_seqs * max_blocks, num_tokens, num_sampled]
    return [*batch, *(2 * count for count in num_copies)]


def decode(header: Tensor, body: Tensor, device: torch.device | str = "cpu") -> tuple[SchedulerOutput, ForwardBatch]:
    """The inverse of `encode`: block copies alone, and the batch. Raises ValueError for a body of another length than
    the header says."""
    sizes = body_sizes(header)
    if len(body) != sum(sizes):
        raise ValueError(f"a step of {sum(sizes)} numbers was announced, and {len(body)} came")
    tokens, positions, starts, seq_lens, tables, slots, rows, *plans = body.split(sizes)
    long = {"device": device, "dtype": torch.int64}
    batch = ForwardBatch(
        token_ids=tokens.to(**long),
        positions=positions.to(**long),
        query_start_loc=starts.to(device),
        seq_lens=seq_lens.to(device),
        block_tables=tables.view(header[1], header[2]).to(device),
        slot_mapping=slots.to(**long),
        logits_rows=rows.to(**long),
        max_query_len=int(header[4]),
    )
    swap_out, swap_in, copies = ([(a, b) for a, b in plan.view(-1, 2).tolist()] for plan in plans)
    return SchedulerOutput(swap_out=swap_out, swap_in=swap_in, copies=copies), batch
