"""Chapter 2. The decoder-only transformer, its weights and its tokenizer.

The model knows the interface of a key/value cache (`KVCache` in `model/batch.py`) and no cache. So the same
transformer runs with none, a contiguous one and a paged one, and must write the same text with all of them.
"""
