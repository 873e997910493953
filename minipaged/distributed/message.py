"""Chapter 13. What rank 0 sends to all others before a step: whole numbers in two tensors, and nothing else.

    header    num_tokens num_seqs max_blocks num_sampled max_query_len num_swap_out num_swap_in num_copies
    body      token_ids positions query_start_loc seq_lens block_tables slot_mapping logits_rows     the ForwardBatch
              swap_out swap_in copies (pairs)

All are int32. The batch is sent as it is, so that every rank computes the very arrays of rank 0. A decoding sequence
costs 6 numbers and its row of the block tables.
"""

from typing import Any

import torch
from torch import Tensor

from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.model.batch import ForwardBatch

HEADER_LENGTH = 8
INT64 = ("token_ids", "positions", "slot_mapping", "logits_rows")  # of a batch; a slot fits in an int32
TENSORS = ("token_ids", "positions", "query_start_loc", "seq_lens", "block_tables", "slot_mapping", "logits_rows")


def encode(output: SchedulerOutput, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """Header and body of a step: the copies of `output`, and the batch."""
    plans = (output.swap_out, output.swap_in, output.copies)
    sizes = (len(batch.token_ids), *batch.block_tables.shape, len(batch.logits_rows), batch.max_query_len)
    parts = [getattr(batch, name).flatten().to("cpu", torch.int32) for name in TENSORS]
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
    *parts, out, back, copies = body.split(sizes)
    tensors = dict(zip(TENSORS, parts, strict=True))
    tensors |= {name: tensors[name].long() for name in INT64}
    tensors["block_tables"] = tensors["block_tables"].view(header[1], header[2])
    batch = ForwardBatch(**{name: t.to(device) for name, t in tensors.items()}, max_query_len=int(header[4]))
    plans = {"swap_out": out, "swap_in": back, "copies": copies}
    pairs: dict[str, Any] = {name: [(a, b) for a, b in plan.view(-1, 2).tolist()] for name, plan in plans.items()}
    return SchedulerOutput(**pairs), batch
