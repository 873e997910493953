"""Chapter 13. What rank 0 sends to all others before a step: whole numbers in two tensors, and nothing else.

    body      token_ids positions query_start_loc seq_lens block_tables slot_mapping logits_rows     the ForwardBatch
              swap_out swap_in copies (pairs)
    header    how many numbers each of these has, and max_query_len

All are int32. The batch is sent as it is, so that every rank computes the very arrays of rank 0. A decoding sequence
costs 6 numbers and its row of the block tables.
"""

from typing import Any

import torch
from torch import Tensor

from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.model.batch import ForwardBatch

INT64 = ("token_ids", "positions", "slot_mapping", "logits_rows")  # of a batch; a slot fits in an int32
TENSORS = ("token_ids", "positions", "query_start_loc", "seq_lens", "block_tables", "slot_mapping", "logits_rows")
PLANS = ("swap_out", "swap_in", "copies")
HEADER_LENGTH = len(TENSORS) + len(PLANS) + 1


def encode(output: SchedulerOutput, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """Header and body of a step: the copies of `output`, and the batch."""
    parts = [getattr(batch, name).flatten().to("cpu", torch.int32) for name in TENSORS]
    parts += [torch.tensor(getattr(output, name), dtype=torch.int32).flatten() for name in PLANS]
    return torch.tensor([*map(len, parts), batch.max_query_len], dtype=torch.int32), torch.cat(parts)


def decode(header: Tensor, body: Tensor, device: torch.device | str = "cpu") -> tuple[SchedulerOutput, ForwardBatch]:
    """The inverse of `encode`: block copies alone, and the batch. torch refuses a body of another length than the
    header says."""
    *sizes, max_query_len = header.tolist()
    parts = dict(zip((*TENSORS, *PLANS), body.split(sizes), strict=True))
    pairs: dict[str, Any] = {name: [(a, b) for a, b in parts.pop(name).view(-1, 2).tolist()] for name in PLANS}
    parts |= {name: parts[name].long() for name in INT64}
    parts["block_tables"] = parts["block_tables"].view(len(parts["seq_lens"]), -1)
    batch = ForwardBatch(**{name: part.to(device) for name, part in parts.items()}, max_query_len=max_query_len)
    return SchedulerOutput(**pairs), batch
