"""Chapter 7. Write the property yourself: `minipaged check 7 --properties`. (How it is graded: ch06_properties.py.)

tests/strategies.py draws the batches: `paged_batches()` gives a ragged batch whose unused memory is NaN, with
`batch.arguments` for the call and `batch.expected(scale, sliding_window)`, what the oracle of chapter 1 says.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention.gathered import write_kv
from minipaged.attention.online_softmax import paged_attention_online
from strategies import paged_batches


@given(batch=paged_batches(), data=st.data())
def test_online_softmax_equals_the_oracle(batch, data):
    """paged_attention_online gives what the oracle gives, for any batch, scale and window.

    Refuses: no rescaling, a NaN from a row that sees nothing of a block, the wrong KV head of a group.
    """
    raise NotImplementedError("ch07: test_online_softmax_equals_the_oracle")


@given(data=st.data())
def test_a_write_reaches_its_slots_and_no_other(data):
    """write_kv stores each token in its slot, a token with slot -1 nowhere, and leaves every other slot as it was.

    Refuses: a token with slot -1 that is stored in the last block.
    """
    raise NotImplementedError("ch07: test_a_write_reaches_its_slots_and_no_other")
