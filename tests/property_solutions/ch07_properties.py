"""One right answer to the exercise of the same name."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention.gathered import write_kv
from minipaged.attention.online_softmax import paged_attention_online
from strategies import paged_batches


@given(batch=paged_batches(), data=st.data())
def test_online_softmax_equals_the_oracle(batch, data):
    scale = data.draw(st.floats(0.1, 2.0))
    window = data.draw(st.none() | st.integers(1, 20))
    out = paged_attention_online(*batch.arguments, scale=scale, sliding_window=window)
    torch.testing.assert_close(out, batch.expected(scale, window), rtol=1e-8, atol=1e-9)


@given(data=st.data())
def test_a_write_reaches_its_slots_and_no_other(data):
    slots = data.draw(st.lists(st.integers(-1, 5), min_size=1, max_size=6, unique=True))
    key = torch.arange(1.0, len(slots) + 1)[:, None, None]  # [num_tokens, 1, 1]
    key_cache, value_cache = torch.zeros(2, 3, 1, 2, 1)
    write_kv(key, -key, key_cache, value_cache, torch.tensor(slots))
    expected = [slots.index(slot) + 1 if slot in slots else 0 for slot in range(6)]
    assert key_cache.flatten().tolist() == expected
    assert value_cache.flatten().tolist() == [-number for number in expected]
