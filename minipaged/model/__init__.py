"""Chapter 2. The decoder-only transformer, its weights and its tokenizer.

The model knows the *contract* of a key/value cache (`model/batch.py`) and no cache: that is why the same
transformer runs with none, a contiguous one and a paged one, and must write the same text with all of them.
"""
