"""Chapter 14. transformers' continuous batching under the kit, written for transformers 5.24.0 on 28 November 2026.

Its FIFO scheduler, PagedAttentionCache and OffloadingManager run without a model. schedule() and accept() are
prepare_next_batch() and update_batch() of generation/continuous_batching/continuous_api.py, without tensors.
"""

import logging

import kit

VERSION = "5.24.0"
try:
    import torch
    import transformers
except ImportError as error:
    raise ImportError(f"{error.name} is not installed: pip install -e '.[oracle]'") from error
if transformers.__version__ != VERSION:
    raise ImportError(f"written for transformers {VERSION}, and {transformers.__version__} is installed")

from transformers import LlamaConfig  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching.cache import PagedAttentionCache  # noqa: E402
from transformers.generation.continuous_batching.distributed import DistributedHelper  # noqa: E402
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager  # noqa: E402
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus  # noqa: E402
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
ONE_HEAD = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
CONFIG = LlamaConfig(vocab_size=16, intermediate_size=16, **ONE_HEAD)
ONE_DEVICE = DistributedHelper(None, None)


class Transformers(kit.Engine):
    """As it is. Its salts, priorities and forks (`num_children`) are not driven."""

    scheduler_type = "fifo"

    def __init__(self, num_blocks, block_size, budget, max_seqs):
        config = ContinuousBatchingConfig(
            page_size=block_size,
            num_blocks=num_blocks,
            max_batch_tokens=budget,
            max_memory_percent=0.5,
            use_async_batching=False,
        )
        self.cache = PagedAttentionCache(CONFIG, config, "cpu", ONE_DEVICE, torch.float32)
        self.scheduler = SCHEDULER_MAPPING[self.scheduler_type](self.cache, 0.0, max_seqs)
        self.offloading = OffloadingManager(self.cache, self.scheduler, 0.0, 0.8, None, ONE_DEVICE)
        (self.allocator,) = self.cache.cache_allocators.values()
        self.num_slots = self.allocator.num_blocks * block_size

    def fits(self, prompt_len, max_tokens):
        return prompt_len + max_tokens <= self.num_slots

    def add(self, request, prompt, max_tokens):
        self.scheduler.add_waiting_request(RequestState(request, list(prompt), max_new_tokens=max_tokens))

    def clear_cancelled(self):
        for state in self.scheduler.clear_cancelled_requests():
            self.offloading.free_request_cpu_cache(state)

    def next_batch(self):
        return self.scheduler.schedule_batch(self.cache.max_batch_tokens, self.cache.max_tokens_read)[0]

    def schedule(self):
        self.batch = []
        if not self.scheduler.has_pending_requests():
            return [], []
        while (batch := self.next_batch()) is None:
            if not self.offloading.offload_requests():
                raise RuntimeError("No requests can be scheduled and no requests can be offloaded.")
        if not batch:
            return [], []
        if self.scheduler.starved_requests:
            self.offloading.offload_requests()
        self.batch, work = batch, []
        for future in batch:
            state = future.state
            blocks = list(self.allocator.block_table[state.request_id])
            work.append(kit.Work(state.request_id, state.position_offset, future.query_length, blocks))
            state.position_offset += future.query_length  # prepare_batch_tensors moves it
        return [], work

    def accept(self, next_token):
        given = []
        for future in self.batch:
            state = future.state
            if state.status in (RequestStatus.FINISHED, RequestStatus.PENDING):
                raise RuntimeError(f"Tried to update {state.status.name} request {state.request_id} in sync mode.")
            if future.has_new_token:
                if state.generated_len() == 0:
                    state.status = RequestStatus.DECODING
                finished = state.update_and_check_completion(next_token(state.request_id), None)
                self.cache.mark_complete_blocks(state, future.complete_blocks)
                if finished:
                    self.scheduler.finish_request(state.request_id)
                    self.scheduler.block_new_requests = False
                    tokens = state.to_generation_output().generated_tokens
                    given.append(kit.Output(state.request_id, tokens, True))
            elif state.status == RequestStatus.PREFILLING:
                self.cache.mark_complete_blocks(state, future.complete_blocks)
        return given

    def abort(self, request):
        self.scheduler.set_request_cancellation(request)
        self.clear_cancelled()  # at the beginning of the next step, in the engine

    def free(self):
        """Free blocks, those of free sectors, and cached ones without an owner."""
        pool, allocator = self.cache.pool, self.allocator
        free = pool.count_free_blocks(allocator.index) + len(pool.free_sectors) * allocator.blocks_per_sector
        return {"device": free + len(allocator.ledger.cached_blocks)}

    def tables(self):
        active = self.scheduler.active_requests
        return {
            name: kit.Table(list(blocks), active[name].position_offset if name in active else 0)
            for name, blocks in self.allocator.block_table.items()
        }


class Repaired(Transformers):
    """With the repair: a cancellation clears the flag, as a finish does."""

    def clear_cancelled(self):
        super().clear_cancelled()
        self.scheduler.block_new_requests = False


class PrefillFirst(Repaired):
    scheduler_type = "prefill_first"


ADAPTERS = [Transformers]
