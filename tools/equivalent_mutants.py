"""Mutants that were looked at and change nothing that can be seen. docs/mutation.md tells how they were found.

Module -> the mutated line, stripped -> why. An empty line: lines were taken out and none was put in.
"""

# Another number for the last dimension, `*` for `&`.
_LAST_OF_TWO = "of two dimensions, 1 and -1 are one"
_PINNED = "pinned memory makes copies to a GPU faster, and changes none"
_FIRST_NAME = "no name of a device comes before a CPU's"
_AND_OF_TRUTHS = "a product of truth values is their and"

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "minipaged/memory/block_allocator.py",
        "if self._owners[block] <= 0:",
    ): "a count never falls below 0: `_in_use` saw to it",
    (
        "minipaged/memory/block_allocator.py",
        "if self._owners[self._known(block)] <= 0:",
    ): "a count never falls below 0: `_in_use` saw to it",
    (
        "minipaged/memory/block_table.py",
        "return num_new_tokens > 0 and partly_full and self.allocator.ref_count(self._blocks[-1]) != 1",
    ): "a block of the table has an owner at least",
    (
        "minipaged/memory/block_table.py",
        "while len(self._blocks) != cdiv(self.num_tokens, self.block_size):",
    ): "the table has never more blocks than its tokens take",
    (
        "minipaged/memory/block_table.py",
        "return num_new_tokens != 0 and partly_full and self.allocator.ref_count(self._blocks[-1]) > 1",
    ): "a negative number was refused before",
    (
        "minipaged/memory/block_table.py",
        "while len(self._blocks) != cdiv(num_tokens, self.block_size):",
    ): "the table has never fewer blocks than its tokens take",
    (
        "minipaged/memory/block_manager.py",
        "return table is not None and table.allocator == self.host",
    ): "a pool is equal to itself alone",
    (
        "minipaged/engine/scheduler.py",
        "samples = [other for other in self.running if seq.request_id == other.request_id] if seq.params.n > 0 else []",
    ): "the only sample of a request is no other one",
    (
        "minipaged/engine/scheduler.py",
        "if not self.blocks.enable_prefix_caching or first >= len(seq) + self.blocks.block_size:",
    ): "a slice that begins past the last key is empty: the test saves the hashing",
    (
        "minipaged/engine/scheduler.py",
        "self._ahead = max_num_batched_tokens if blocks.sliding_window else 1 << 61",
    ): "any number above all lengths will do",
    (
        "minipaged/engine/scheduler.py",
        "self._ahead = max_num_batched_tokens if blocks.sliding_window else 2 << 62",
    ): "any number above all lengths will do",
    (
        "minipaged/memory/swap.py",
        "if len({id(table) for table in tables}) < len(tables):",
    ): "a set is never larger than what it is made of",
    (
        "minipaged/memory/swap.py",
        "device, host = (block, new[block]) if target == self.host else (new[block], block)",
    ): "a pool is equal to itself alone",
    (
        "minipaged/memory/swap.py",
        'event = "swap_out" if target == self.host else "swap_in"',
    ): "a pool is equal to itself alone",
    ("minipaged/memory/swap.py", "if device == host:"): "a pool is equal to itself alone",
    (
        "minipaged/memory/swap.py",
        "if any(table.allocator != source for table in tables):",
    ): "a pool is equal to itself alone",
    (
        "minipaged/memory/prefix_cache.py",
        "continue",
    ): "no block is cached behind one that is not: a leaf goes before its parent",
    (
        "minipaged/memory/prefix_cache.py",
        "if table.allocator != self or table.block_size != self.block_size:",
    ): "a pool is equal to itself alone",
    (
        "minipaged/memory/prefix_cache.py",
        "ROOT = bytes( 31)  # the parent of a first block",
    ): "any root will do, if it is always the same",
    (
        "minipaged/memory/prefix_cache.py",
        "while first != 0 and blocks[first - 1] not in self._key_of:",
    ): "it counts down by 1 from a number that is not negative",
    (
        "minipaged/memory/address_space.py",
        "self._bytes = bytearray(num_frames >> page_bytes)",
    ): "`take` writes the frames in their order at first, and lengthens what is too short",
    (
        "minipaged/memory/address_space.py",
        "self._bytes = bytearray(num_frames << page_bytes)",
    ): "`take` writes the frames in their order at first, and lengthens what is too short",
    (
        "minipaged/memory/address_space.py",
        "self._bytes = bytearray(num_frames % page_bytes)",
    ): "`take` writes the frames in their order at first, and lengthens what is too short",
    (
        "minipaged/memory/address_space.py",
        "self._bytes = bytearray(num_frames ** page_bytes)",
    ): "`take` writes the frames in their order at first, and lengthens what is too short",
    (
        "minipaged/memory/address_space.py",
        "self._bytes = bytearray(num_frames + page_bytes)",
    ): "`take` writes the frames in their order at first, and lengthens what is too short",
    ("minipaged/memory/address_space.py", "if not 0 <= byte <= 256:"): "a bytearray refuses 256 with the same error",
    ("minipaged/memory/address_space.py", "if owner.memory != self.memory:"): "a memory is equal to itself alone",
    (
        "minipaged/memory/address_space.py",
        "if self._mappings[frame] <= 0:",
    ): "a count never falls below 0: `_in_use` saw to it",
    (
        "minipaged/memory/trace.py",
        'least = 0 if name >= "num_host_blocks" else 1',
    ): "the two other names come before it in the alphabet",
    (
        "minipaged/attention/gathered.py",
        "skipped = first >> block_size",
    ): "more blocks are gathered, and cut off again",
    (
        "minipaged/attention/checks.py",
        "wrong = tensor[(tensor < low) + (tensor > high)]",
    ): "a sum of truth values is their or",
    (
        "minipaged/attention/compiled.py",
        "finite = maximum if maximum != -np.inf else total"
        "  # -inf: nothing is seen yet, and -inf - (-inf) would be NaN",
    ): "they differ for NaN alone, and the answer is NaN either way",
    (
        "minipaged/attention/compiled.py",
        "window = q.dtype.type(scale), min(sliding_window or 2**30, 2<<30)",
    ): "both are longer than any text",
    (
        "minipaged/attention/compiled.py",
        "least = cdiv(LEAST_SLOTS, max(1, table.shape[1] & block_size))",
    ): "the pieces that threads take have another size, and the answer does not depend on it",
    (
        "minipaged/attention/contiguous.py",
        "if num_queries == 0 and sliding_window is None:",
    ): "the special case is for speed: the general one has the same answer",
    (
        "minipaged/attention/contiguous.py",
        "if num_queries <= num_keys or sliding_window is not None:",
    ): "the mask says what `is_causal` says",
    (
        "minipaged/attention/contiguous.py",
        "if num_queries <= 1 and sliding_window is None:",
    ): "it is never asked with no query: every caller leaves such a sequence out",
    (
        "minipaged/attention/online_softmax.py",
        "scores = q @ key.transpose(-1, 2) * scale  # [num_kv_heads, group, num_queries, tokens]",
    ): "of four axes, 2 and -2 are one",
    (
        "minipaged/attention/online_softmax.py",
        "finite = new_maximum.masked_fill(new_maximum == -torch.inf, -1.0)",
    ): "any finite number will do: exp(-inf) is 0",
    ("minipaged/attention/gathered.py", "if rows.start >= rows.stop:"): "a checked query_start_loc never falls",
    (
        "minipaged/engine/sampling.py",
        "kept[:, 1:] = torch.where((top_p >= 1.0) | (before < top_p * total), kept, 0.0)[:, 1:]",
    ): "a top_p is at most 1",
    (
        "minipaged/engine/sampling.py",
        "if num_sorted >= vocab_size or bool(enough.all()):",
    ): "no more tokens are sorted than there are",
    (
        "minipaged/engine/sampling.py",
        "if not (likeliest.values.isfinite() & adjusted.amin(1).isfinite()).all():",
    ): _LAST_OF_TWO,
    (
        "minipaged/engine/sampling.py",
        "total = weights.cumsum(+1)  # [num_rows, vocab_size]",
    ): _LAST_OF_TWO,
    (
        "minipaged/engine/sampling.py",
        "if not (likeliest.values.isfinite() * adjusted.amin(-1).isfinite()).all():",
    ): _AND_OF_TRUTHS,
    (
        "minipaged/engine/sampling.py",
        "reached = (top_p < 1.0) & (top_k == vocab_size) * (kept.sum(-1, keepdim=True) >= top_p * total)",
    ): _AND_OF_TRUTHS,
    (
        "minipaged/engine/sampling.py",
        "reached = (top_p < 1.0) & (top_k == vocab_size) & (kept.sum(-1, keepdim=True) >= top_p + total)",
    ): "a few tokens are sorted for speed: all of them give the same answer",
    (
        "minipaged/engine/sampling.py",
        "if any(p.top_k > -1 or p.top_p < 1.0 for p in params):",
    ): "a top_k is -1 or at least 1",
    (
        "minipaged/engine/sampling.py",
        "if any(p.top_k != - 2 or p.top_p < 1.0 for p in params):",
    ): "the special case is for speed: where no token is dropped, all are kept",
    (
        "minipaged/simulator/simulate.py",
        "total = sum(self.slots) or 2.0",
    ): "no slots are no share, whatever they are divided by",
    (
        "minipaged/kvcache/swap_space.py",
        'pinned = cache.key_cache.device.type is "cuda"',
    ): _PINNED,
    (
        "minipaged/kvcache/swap_space.py",
        'pinned = cache.key_cache.device.type > "cuda"',
    ): _PINNED,
    (
        "minipaged/kvcache/swap_space.py",
        'pinned = cache.key_cache.device.type >= "cuda"',
    ): "of the devices that the engine runs on, a CPU's name comes first, and a GPU's is this one",
    (
        "minipaged/kvcache/swap_space.py",
        "sources, targets = (torch.tensor(blocks) for blocks in zip(*plan, strict=False))",
    ): "every entry of a plan is a pair",
    (
        "minipaged/model/tokenizer.py",
        "_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 257)]",
    ): "the character 256 gets its byte from the second half of the table",
    (
        "minipaged/model/tokenizer.py",
        "return max([*ids, not 1 if self.bos_token_id is None else self.bos_token_id])",
    ): "a vocabulary has a token, and no id is less than 0",
    (
        "minipaged/model/tokenizer.py",
        "self._before = [token for token in prompt_token_ids if token not in self._skipped][~1:]",
    ): "one token before a text is enough, and two do as well",
    (
        "minipaged/model/tokenizer.py",
        "_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 ^ i): byte for i, byte in enumerate(_OTHERS)}",
    ): "there are fewer than 256 others, so nothing is carried",
    (
        "minipaged/engine/llm_engine.py",
        "if rows is not list(range(len(logits))):  # else each row once, in order: megabytes are not copied",
    ): "rows that are in order already are copied, and stay what they are",
    (
        "minipaged/engine/llm_engine.py",
        "if rows > list(range(len(logits))):  # else each row once, in order: megabytes are not copied",
    ): "each row comes once, in order, and again for samples behind them: rows never come before the plain list",
    (
        "minipaged/engine/llm_engine.py",
        "seconds = scheduled % start + updated - ran, time.perf_counter() - start",
    ): "a step is shorter than the clock has run, so the remainder is the difference",
    (
        "minipaged/kvcache/paged.py",
        'if device.type <= "cpu" and "triton" not in sys.modules:',
    ): _FIRST_NAME,
    (
        "minipaged/kvcache/paged.py",
        'if interpreted != (device.type <= "cpu"):',
    ): _FIRST_NAME,
    (
        "minipaged/kvcache/paged.py",
        "return compiled.paged_attention(query, *caches, *tables, **options, check=True)",
    ): "what was found right is checked again",
}
