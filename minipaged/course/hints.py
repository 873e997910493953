"""Three hints for each kind of failure. The first asks where to look, the second says what goes wrong, the third nearly
tells.

A topic is found by the test's name and the message: the first whose pattern matches is taken, the last of a chapter
matches everything.
"""

import re
from typing import Any, NamedTuple


class Topic(NamedTuple):
    pattern: str  # searched in "test name: message"
    hints: tuple[str, str, str]


HINTS: dict[int, tuple[Topic, ...]] = {
    1: (
        Topic(
            r"mask_is_zero|later_token|first_token",
            (
                "Which position does query i have? It is not i, unless there are as many queries as keys.",
                "The queries are the last num_queries of num_keys positions. Compare positions, not row numbers.",
                "Query i stands at num_keys - num_queries + i, and sees key j where j <= that, its own key included; "
                "with a window also j > that - sliding_window.",
            ),
        ),
        Topic(
            r"outside_the_window",
            (
                "Count the keys that a query with sliding_window 1 sees.",
                "A window of w is w positions, the query's own among them: w - 1 earlier ones.",
                "Key j is seen by a query at position p where p - sliding_window < j <= p.",
            ),
        ),
        Topic(
            r"sum_to_one|average|nan",
            (
                "What must a row of weights add up to, and over which axis did you add?",
                "Softmax runs over the keys, the last axis. Large scores overflow exp unless the row's maximum is "
                "subtracted first.",
                "weights = exp(scores - scores.max(-1, keepdims=True)); weights / weights.sum(-1, keepdims=True). The "
                "mask is added to the scores before that.",
            ),
        ),
        Topic(
            r"heads|group",
            (
                "With 6 query heads and 2 key/value heads, which key head does query head 2 read?",
                "Neighbouring query heads share a key/value head: 0, 1, 2 read head 0, and 3, 4, 5 read head 1.",
                "Query head h reads h // (num_heads // num_kv_heads): np.repeat along the head axis, not np.tile.",
            ),
        ),
        Topic(
            r"refused",
            (
                "Read the Raises part of the docstrings: what does not fit together is refused first.",
                "Each message names the argument and the numbers that do not fit.",
                "Raise ValueError with an f-string that holds both numbers, before any array is computed.",
            ),
        ),
        Topic(
            r"",
            (
                "Write the formula of the header beside your code. Is every factor there?",
                "The scale is 1 / sqrt(head_dim) where none is given, and a given one is used as it is.",
                "scores = einsum('qhd,khd->hqk', query, key) * scale + mask, all in float64; then softmax; then times "
                "value with the same heads.",
            ),
        ),
    ),
    2: (
        Topic(
            r"rotat",
            (
                "At position 0 a rotation changes nothing. Does yours?",
                "The pair is (x[i], x[i + head_dim / 2]): halves, not neighbours. Its length stays.",
                "first * cos - second * sin, and second * cos + first * sin, one behind the other; the angle is "
                "position * theta ** (-2 i / head_dim).",
            ),
        ),
        Topic(
            r"asks_the_cache",
            (
                "Which arguments does cache.attend take, and in which shapes?",
                "query has num_heads heads, key and value num_kv_heads; the layer's number is self.index.",
                "Split the product of qkv_proj, viewed as [num_tokens, heads + 2 * kv_heads, head_dim], along dim 1.",
            ),
        ),
        Topic(
            r"ragged|later_token",
            (
                "Which operation lets one token see another?",
                "Only cache.attend. Everything else treats each row by itself, and needs no batch dimension.",
                "Look for a mean, a softmax or a reshape over dimension 0 (tokens) where the last one was meant.",
            ),
        ),
        Topic(
            r"",
            (
                "Follow the picture of the header: where does each + of the residual stream take its left side from?",
                "hidden + attention(norm(hidden)), then hidden + mlp(norm(hidden)): the norm is inside the branch.",
                "mlp: down_proj(silu(gate) * up), gate being the first half of gate_up_proj. The model ends with its "
                "own norm. Positions come from batch.positions, not from the row.",
            ),
        ),
    ),
    3: (
        Topic(
            r"refuse|of_no_size",
            (
                "What sizes can a cache not have?",
                "num_slabs and max_len must both be at least 1, and the message holds both numbers.",
                'raise ValueError(f"num_slabs and max_len must be at least 1, got {num_slabs} and {max_len}").',
            ),
        ),
        Topic(
            r"causal_attention",
            (
                "Where do the queries stand, if there are fewer of them than keys?",
                "They are the last ones. A mask that starts in the upper left corner is right only for a whole prompt.",
                "visible(num_queries, num_keys, window)[i, j] is j <= num_keys - num_queries + i; hand it to "
                "scaled_dot_product_attention as attn_mask, with query heads grouped by their key/value head.",
            ),
        ),
        Topic(
            r"nan",
            (
                "All memory is NaN until you write it. Which slot was read and not written?",
                "Only the first seq_len offsets of a slab hold tokens, and they must be stored before they are read.",
                "Store key[rows] and value[rows] of this step first, then attend over [:, :seq_len] of the slab.",
            ),
        ),
        Topic(
            r"",
            (
                "In a slab, at which offsets do this step's tokens lie?",
                "seq_lens counts the new tokens too: they are the last ones of it, not the ones behind it.",
                "new = slice(seq_len - num_new, seq_len), in the slab batch.block_tables[seq, 0], in the tensors of "
                "this layer; the rows of the sequence are query_start_loc[seq] to query_start_loc[seq + 1].",
            ),
        ),
    ),
    4: (
        Topic(
            r"Buddy|buddies|halve|merge|whole_pool|lay_out|wrong_free|never_be_served|out_of_slots",
            (
                "A block of 2^k starts at a multiple of 2^k. Does every block of yours?",
                "To free is to merge: as long as the other half of the larger block is free too, and of the same size.",
                "The buddy of a block is at start XOR size. Merge while that start is free in the same order; then "
                "start = min(start, buddy), and one order up. Buddies of two sizes never merge.",
            ),
        ),
        Topic(
            r"polic|example_an_output|figure_3|seven_requests|oracle",
            (
                "What does each policy know when the request arrives?",
                "max asks for max_model_len; pow2 rounds the output alone up to a power of two; oracle asks for the "
                "sum.",
                "pow2: min(prompt_len + 2^ceil(log2(output_len)), max_model_len), and (n - 1).bit_length() is that k.",
            ),
        ),
        Topic(
            r"external|account|header",
            (
                "Do the six numbers of the account add up to the slots of the pool?",
                "External fragmentation exists in the eyes of a next request: free slots that suffice only together.",
                "external = num_free - num_free_for(asked) where num_free >= asked, else 0; free is the rest. rounding "
                "= slots of blocks in use - slots asked for.",
            ),
        ),
        Topic(
            r"refused|no_sense|wrong",
            (
                "What must have changed after a call that raised?",
                "Nothing. Check everything first, then change; what can never run is a ValueError, what must wait is "
                "OutOfSlots.",
                "In allocate: the name, then reservation(), then the allocator, and only then your own records.",
            ),
        ),
        Topic(
            r"",
            (
                "What does the pool keep of each request, and which call changes it?",
                "A request ends with what it holds now, which need not be its final length.",
                "allocate stores prompt_len tokens, append n more, and free removes the request from the records.",
            ),
        ),
    ),
    5: (
        Topic(
            r"indices|address|x86_64_by_hand",
            (
                "Which bits of the address are the lowest ones?",
                "The offset; above it the index of the last level, and the top level's bits come highest.",
                "Take page & ((1 << bits) - 1), shift right by bits, from the last level up; then reverse.",
            ),
        ),
        Topic(
            r"cost|gib|mib|dense|sparse|level",
            (
                "How many tables of each level exist, with this page mapped and with none?",
                "A table is billed whole, however few entries it has. The top one always exists; another one exists "
                "only as long as a page under it is mapped.",
                "Count tables by level: one more when map makes one, one fewer when unmap leaves one empty. dense: "
                "ceil(num_pages / pages under one table); sparse: min(num_pages, tables that could exist).",
            ),
        ),
        Topic(
            r"Process|process|frame|cleared",
            (
                "When is a frame free?",
                "When no page table entry names it: two processes may, and the first that lets go must not free it.",
                "take sets the count to 1 and clears the bytes; share adds one; drop takes one, and at 0 the frame "
                "goes back to the free list.",
            ),
        ),
        Topic(
            r"refused|no_sense|fault",
            (
                "What must have changed after a call that raised?",
                "Nothing. A page without a frame is a PageFault when it is read, and a ValueError when it is unmapped.",
                "Call check_unmapped first in map; Process.map takes a frame only when the page is known to be free.",
            ),
        ),
        Topic(
            r"",
            (
                "Does translate keep the offset?",
                "Only the page is translated: the offset is the same in the frame.",
                "frame(page) * page_bytes + offset, with page = address >> offset_bits.",
            ),
        ),
    ),
    6: (
        Topic(
            r"handed out|handed_out|freed twice|free_block_has_no_owner",
            (
                "A block is in exactly one place: free, or in use. Where is this one?",
                "A block that is handed out is no longer free, and one that is given back twice would be free twice.",
                "allocate takes the block out of the free list and sets its count to 1; free refuses a count of 0.",
            ),
        ),
        Topic(
            r"tables name block|owners of block|said to be free|no_block_is_left|refused",
            (
                "Count by hand: how many tables name the block, and what does ref_count say?",
                "share adds one, free takes one away, and only with the last one does the block go back to the pool.",
                "After `counts[block] -= 1`, append the block to the free list only if the count is 0 now.",
            ),
        ),
        Topic(
            r"outside_the_pool|IndexError: list|misuse|negative|has_blocks|has_slots|lengthen|DID NOT RAISE",
            (
                "What is list[-1] in Python?",
                "-1 is a legal index of a list and no block, no position and no count: check the range yourself.",
                "Raise ValueError unless 0 <= block < num_blocks, IndexError unless 0 <= position < num_tokens.",
            ),
        ),
        Topic(
            r"changed something|takes_nothing|refusal|not_fit",
            (
                "An append that does not fit: what had it taken when it found out?",
                "Ask blocks_needed first, and compare with num_free before the first allocate.",
                "needed = self.blocks_needed(n); if needed > self.allocator.num_free: raise OutOfBlocks(...); only "
                "then change num_tokens and allocate.",
            ),
        ),
        Topic(
            r"need \d+ blocks|blocks_needed|all_at_once|blocks of its tokens|blocks_of_its_tokens",
            (
                "How many blocks do 4 tokens take with block_size 4, and how many do 5?",
                "The last block may have room: count the blocks of all tokens, less those that are there.",
                "ceil((num_tokens + n) / block_size) - len(blocks), and cdiv(a, b) is the ceiling of a / b.",
            ),
        ),
        Topic(
            r"not what was written|slot|IndexError|not_appended",
            (
                "Take block_size 4 and position 9. Which logical block, which offset, which physical block?",
                "The table maps logical blocks. The offset inside the block is not translated.",
                "blocks[position // block_size] * block_size + position % block_size, and only for positions that were "
                "appended.",
            ),
        ),
        Topic(
            r"trunc|release|stay where|keep",
            (
                "Which blocks hold none of the tokens that stay?",
                "Those behind ceil(keep / block_size). Each goes back once, the last one first.",
                "while len(blocks) > ceil(num_tokens / block_size): allocator.free(blocks.pop()); release is "
                "truncate(0).",
            ),
        ),
        Topic(
            r"",
            (
                "Read the invariant of the class, and count: does it hold after each line of the script?",
                "blocks is a copy: a caller that changes it must not change your table.",
                "len(blocks) == ceil(num_tokens / block_size), and one reference to each of them, after every call.",
            ),
        ),
    ),
    7: (
        Topic(
            r"write|slot",
            (
                "Which two numbers does a slot consist of?",
                "block = slot // block_size, offset = slot % block_size; a slot of -1 stores nothing at all.",
                "Drop the rows with slot_mapping < 0, then key_cache[block, :, offset] = key. -1 is a legal index!",
            ),
        ),
        Topic(
            r"overflow|inf",
            (
                "exp(1000) is infinite. Which number must be subtracted first?",
                "The running maximum. When a block moves it, what was summed before is in the old unit: rescale it.",
                "rescale = exp(maximum - new_maximum); total and accumulator are both multiplied by it, every block.",
            ),
        ),
        Topic(
            r"nan",
            (
                "Memory that no token owns is NaN. Which slot did you read that is not yours?",
                "The last block may be partly full: read only seq_len - first of it. And a weight of 0 does not save "
                "you: 0 * NaN is NaN.",
                "Cut keys and values to the tokens that exist before the product. A row that has seen nothing yet has "
                "the maximum -inf, and -inf - (-inf) is NaN: subtract 0 there.",
            ),
        ),
        Topic(
            r"copies|portions",
            (
                "In which order do you copy, and into how many layers?",
                "The source of one copy may be the target of one before it: one after the other, K and V, all layers.",
                "for source, target in copies: key_cache[:, target] = key_cache[:, source], and the same for values. "
                "attend writes before it reads, in the tensors of its own layer.",
            ),
        ),
        Topic(
            r"refused",
            (
                "What is checked before anything is read or written?",
                "minipaged.attention.checks has a function for each: call it first.",
                "check_paged_attention(query, key_cache, ...), check_write_kv(key, value, ...), as the imports say.",
            ),
        ),
        Topic(
            r"",
            (
                "Which rows of query belong to sequence s, and at which positions do they stand?",
                "Rows query_start_loc[s] to query_start_loc[s + 1]; the last one is at position seq_lens[s] - 1.",
                "Take ceil(seq_len / block_size) entries of the table, gather those blocks in that order, cut to "
                "seq_len, and attend with the mask aligned at the end. Query heads of a group share a KV head.",
            ),
        ),
    ),
    8: (
        Topic(
            r"write_stores|refused_write",
            (
                "What does this program's slot point at?",
                "The caches are read through strides: block * stride_block + offset * stride_slot + head * "
                "stride_head.",
                "A slot below 0 stores nothing; mask heads and dims that are only padding; make the block number "
                "int64.",
            ),
        ),
        Topic(
            r"far_into",
            (
                "How large is block times stride in a pool of 20 GiB?",
                "Larger than 2^31: the product of two int32 wraps around, and the address with it.",
                "Cast the block number with .to(tl.int64) before it meets a stride.",
            ),
        ),
        Topic(
            r"copies|whole_blocks|copy",
            (
                "Which part of which block does this program copy?",
                "program_id(0) is the pair, program_id(1) the layer, program_id(2) the piece of PIECE elements.",
                "element = piece * PIECE + arange, masked by element < numel; K and V both.",
            ),
        ),
        Topic(
            r"overflow",
            (
                "What happens to what was summed when the maximum moves?",
                "It is in the old unit: multiply total and accumulator by exp2(maximum - new_maximum).",
                "Scores are in units of log2: the scale holds log2(e) already, so use exp2 and not exp.",
            ),
        ),
        Topic(
            r"nan|past_the_end|without_context|nothing",
            (
                "Which lanes have no token? They still compute.",
                "Load K and V with a mask and other=0.0, and set the scores of what is not there to -inf.",
                "A row that saw nothing has maximum -inf: subtract 0 instead, and divide by 1 where total is 0.",
            ),
        ),
        Topic(
            r"split|merge",
            (
                "What does a split with no token leave behind?",
                "Its maximum is -inf and its accumulator was never written: do not read it.",
                "m = max of the maxima; each split counts exp2(m_i - m): sum acc_i * that over sum l_i * that.",
            ),
        ),
        Topic(
            r"",
            (
                "For one program: which sequence, which KV head, which rows of the dot are real?",
                "Query heads kv_head * GROUP to kv_head * GROUP + GROUP - 1; the other rows of ROWS are padding.",
                "Token t lies in block table[t // BLOCK_SIZE], at slot t % BLOCK_SIZE of it. A query at seq_len - 1 "
                "sees all, or the last WINDOW tokens.",
            ),
        ),
    ),
    9: (
        Topic(
            r"there is room|there is none|enters_exactly|comes_back_exactly|to look is not",
            (
                "The block manager asks your classes what is free, and what an append takes. Which answer is wrong?",
                "A block without a table counts as free. A prefix that is found takes it away again: is_evictable "
                "says whether a found block is such a one.",
                "num_free: the free blocks and the evictable ones. is_evictable: cached, and named "
                "by no table. blocks_needed: new blocks, and one more for a copy.",
            ),
        ),
        Topic(
            r"tables name block|last_one_out|swapped_out_sequence|said to be free",
            (
                "Count the tables that name the block, and compare with its reference count.",
                "Each entry of a table is a reference: fork and append_shared take one for each block that they name.",
                "allocator.share(block) for every block that the new table names; free the old one only after that.",
            ),
        ),
        Topic(
            r"copies to make|writes_alone|copied|copy|not what was written|beam",
            (
                "Two tables name the last block. Which of them may write into it?",
                "Neither. A table that appends takes a block of its own, names the copy, and says what is to be "
                "copied.",
                "If tokens begin inside a last block with ref_count > 1: own = allocate(), free(shared), "
                "blocks[-1] = own, return [(shared, own)]. A full block is not written: no copy.",
            ),
        ),
        Topic(
            r"need \d+ blocks|blocks_needed|fit",
            (
                "Does the number of blocks needed count the copy?",
                "A copy takes a block too, and all of it must fit before the first block is taken.",
                "blocks_needed: new blocks, plus 1 if the append must copy; compare with num_free, then change.",
            ),
        ),
        Topic(
            r"reused|stale|does not hold|held|evict|least|leaf|goes first",
            (
                "When a block gets a new owner, by which key can it still be found?",
                "By none: evicting a block removes it from both maps. It goes when it has been without a table "
                "longest, a leaf before its parent.",
                "In allocate, with no free block: take the first evictable one, forget its key, super().free it, then "
                "super().allocate(). A block that a table names again is not evictable.",
            ),
        ),
        Topic(
            r"found|different|tenants|prefix|behind|leaves_a_token|hit|cached",
            (
                "What does the key of a block depend on?",
                "On its tokens, on the key of the block before it, and on the salt; and only a full block has one.",
                "key = H(parent + tokens, 8 bytes each + salt). match looks at tokens[:-1], so one token is left to "
                "compute, and stops at the first block that is not found.",
            ),
        ),
        Topic(
            r"moves|swap|host|back|Memory|plan",
            (
                "A block that two tables of the group name: how often does it move?",
                "Once. Both tables name its one copy afterwards. The last block moves too, however few tokens it "
                "holds.",
                "Keep a dictionary source block -> target block over the group: allocate for a new one, share for one "
                "that is there; then table.move(target, ...). Check the room first.",
            ),
        ),
        Topic(
            r"refused|changed something|DID NOT RAISE|free_block",
            (
                "What must have changed after a call that raised?",
                "Nothing: check everything that can be wrong before the first reference is taken.",
                "append_shared looks at every block (ref_count 0 is free: ValueError) before it shares the first.",
            ),
        ),
        Topic(
            r"",
            (
                "Draw the tables before and after. Which reference is too many, or too few?",
                "A cached block has one owner more: the cache.",
                "Every entry of a table is one reference, every cached block one more; nothing else counts.",
            ),
        ),
    ),
    10: (
        Topic(
            r"can_never_run|fits the pool|let in|cannot fit|can_ever_fit",
            (
                "How long can the sequence become, and how many blocks is that?",
                "What outgrows the whole pool can never finish: refuse it in check, with the numbers, not later.",
                "blocks.can_ever_fit(min(prompt_len + max_tokens, max_model_len) - 1): the last token is never stored.",
            ),
        ),
        Topic(
            r"owners too many|are held|blocks have no table|holds blocks|nobody is there|come_and_go|are free|leak",
            (
                "Which sequence left its place and kept its blocks?",
                "Every way out frees all blocks: finish, wherever the sequence stands, preemption, and reset.",
                "blocks.free(seq_id) in finish, whether the sequence runs or waits: on the host it has blocks too. It "
                "may hold none.",
            ),
        ),
        Topic(
            r"stands before|does not move|comes_back_first|lost, or there|not finished|arrived",
            (
                "In which order do sequences come back?",
                "As they came. A preempted sequence was there before all that wait: it goes to the front.",
                "waiting.appendleft(seq) in _preempt, and the victim is the last of those that run: running.pop().",
            ),
        ),
        Topic(
            r"budget|hold_up|decodes did not|max_num_seqs",
            (
                "Which sequences get tokens first, and which get what is left?",
                "Those in decode, one token each; then prompts, in chunks, within the budget. At most max_num_seqs "
                "run, and samples that will fork count too.",
                "First the running sequences with one uncomputed token, then the others, then waiting ones while "
                "budget and slots are left.",
            ),
        ),
        Topic(
            r"swap|came back|preempted",
            (
                "Which sequence was preempted in this step, and which entered?",
                "None enters in a step in which one was preempted. The copies of a swap are part of the step's output.",
                "In schedule: admit only `if not output.preempted`. In _enter: swap_in for all tokens, and then "
                "allocate_slots for the newest.",
            ),
        ),
        Topic(
            r"computed_once|wholly_cached|found|owners$|writes into|fork|sample",
            (
                "From which position on must this sequence compute?",
                "Behind what was found, or behind what its parent computed. Of two equal prompts that come together "
                "the second waits until it finds the first's.",
                "num_computed = len(prefix) * block_size; a fork has the num_computed of its parent; a sequence whose "
                "next key is being computed does not enter.",
            ),
        ),
        Topic(
            r"",
            (
                "Follow one sequence through the steps: num_computed, its blocks, its place.",
                "schedule chooses and makes room; update_from_output moves num_computed, caches full blocks, and "
                "forks.",
                "A step computes tokens from num_computed on. A sequence is in output.sampled where they reach its "
                "end, with its row of the logits.",
            ),
        ),
    ),
    13: (
        Topic(
            r"did not come|CollectiveError|calls|brings|pages_formula",
            (
                "Which calls does each rank make, and in which order? They must be the same on all.",
                "One all-reduce after the embedding and two in each layer, on every rank; one gather, on every rank, "
                "where there is a row. A rank that returns before its gather lets the others wait.",
                "Call group.gather on every rank, and look at what it returned afterwards; (2 * num_layers + 1) "
                "all-reduces of num_tokens * hidden_size numbers; num_ends * ceil(vocab_size / size) to rank 0.",
            ),
        ),
        Topic(
            r"test_parts",
            (
                "Deal 7 things to 3 ranks. How many does each get, and which gets the one that is left?",
                "total // size for each, and one more for the first total % size of them.",
                "Run i begins at i * (total // size) + min(i, total % size), and ends where the next one begins.",
            ),
        ),
        Topic(
            r"test_a_rank_has_the_kv_head|test_a_kv_head_is|divided_by_groups",
            (
                "Which KV head does query head 5 read, if there are 9 query heads and 3 KV heads? Is it on this rank?",
                "Up to as many ranks as KV heads: divide the KV heads, and let their query heads follow. Beyond that: "
                "divide the *ranks* over the KV heads, and then each group over its ranks.",
                "size <= num_kv_heads: kv = parts(num_kv_heads, size), heads range(group * kv.start, group * kv.stop). "
                "Else, for kv_head, ranks in enumerate(parts(size, num_kv_heads)): one rank for each of "
                "parts(group, len(ranks)), moved by group * kv_head, with range(kv_head, kv_head + 1).",
            ),
        ),
        Topic(
            r"unit of|shares_partition",
            (
                "Four things are divided, and each of them by `parts`. Which of them is divided in whole units?",
                "Words one by one, heads by groups, inner columns by units of 32 where 32 divides them and all ranks "
                "get a unit.",
                "parts(intermediate_size // unit, size), each range times unit; unit is INNER_UNIT or 1.",
            ),
        ),
        Topic(
            r"refused",
            (
                "Of what does each rank need at least one?",
                "A query head, an inner column, a word; and there must be a rank. KV heads can be replicated.",
                "Compare size with num_heads, intermediate_size and vocab_size before anything is divided, and say "
                "both numbers in the ValueError.",
            ),
        ),
        Topic(
            r"its_bytes",
            (
                "List the matrices of a layer, and the shape of each on this rank.",
                "Q and output have num_heads * head_dim rows of hidden_size numbers, K and V num_kv_heads * head_dim, "
                "the MLP three times intermediate_size; norms are whole on every rank.",
                "Rows: num_layers * ((2 * num_heads + 2 * num_kv_heads) * head_dim + 3 * intermediate_size + 2) + 1 + "
                "vocab_size, and vocab_size again where the output layer is not the embedding. Times hidden_size, and "
                "times dtype.itemsize.",
            ),
        ),
        Topic(
            r"row_parallel|o_proj|down_proj",
            (
                "Each rank multiplies some of the inputs. What is the product of all of them?",
                "A row-parallel layer ends in one sum over ranks, and nothing else is summed in a layer. There are two "
                "of them: one ends the attention, one the MLP.",
                "return self.group.all_reduce(self.linear(input)); in parallelise, o_proj and down_proj of every layer "
                "are wrapped, and qkv_proj and gate_up_proj stay as they are.",
            ),
        ),
        Topic(
            r"row_of_every_word|embed_tokens",
            (
                "Which rank has the row of word 7? What do the others bring to the sum?",
                "Word w is row w - start of this rank's table, if that is from 0 to len(weight) - 1. All others bring "
                "zeros, and they cannot look up a row that they do not have.",
                "row = token_ids - start; elsewhere = (row < 0) | (row >= len(weight)); look up "
                "row.masked_fill(elsewhere, 0), fill those rows with 0, and all-reduce. start is share.vocab.start.",
            ),
        ),
        Topic(
            r"score_of_every_word|other logits|gather",
            (
                "Ranks have unequal numbers of words. Can a gather take tensors of unequal shapes?",
                "Each rank sends as many columns as the longest has; rank 0 cuts each to its length, and joins them in "
                "the order of the ranks. A step in which no sequence ends sends nothing.",
                "sent = F.pad(scores, (0, self.lengths[0] - scores.shape[1])); torch.cat of part[:, :length] along "
                "dim 1; with no row return scores.new_empty(0, sum(self.lengths)) before any rank calls gather.",
            ),
        ),
        Topic(
            r"",
            (
                "With one rank everything is as it was. What changes with the second?",
                "Columns, then rows, then one sum. Everything between the two is the code of one device.",
                "Compare one layer at a time with the whole model: embedding, attention up to o_proj, MLP up to "
                "down_proj, output layer.",
            ),
        ),
    ),
}


def hints_for(chapter: int, finding: dict[str, Any]) -> tuple[str, str, str]:
    """The three hints for a failure."""
    said = f"{finding['test']}: {finding.get('error', '')}: {finding.get('message', '')}"
    for topic in HINTS[chapter]:
        if re.search(topic.pattern, said):
            return topic.hints
    raise ValueError(f"chapter {chapter} has no hint for {said}")
