"""What the two suites of chapter 13 share: small models of many head counts, and what a rank's part of one is."""

from hypothesis import strategies as st

from minipaged.model.transformer import ModelConfig


def config(kv_heads, group, head_dim=4, hidden=8, inner=12, vocab=17, tied=True, max_position=32):
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=2,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        tie_embeddings=tied,
    )


@st.composite
def models_and_ranks(draw):
    """A model, and a number of ranks that fits it: fewer than KV heads, as many, or more."""
    made = config(
        draw(st.integers(1, 5)),
        draw(st.integers(1, 4)),
        inner=draw(st.sampled_from((12, 13, 64, 96)) | st.integers(32, 200)),
        vocab=draw(st.integers(12, 40)),
        tied=draw(st.booleans()),
    )
    most = min(made.num_heads, 6)
    replicates = draw(st.booleans()) and made.num_kv_heads < most
    return made, draw(st.integers(made.num_kv_heads + 1 if replicates else 1, most))


# query heads in a group, KV heads, inner columns, words: SmolLM2 135M, Qwen 2.5 0.5B, Llama 2 7B, Llama 3 70B, and a
# shape that divides into nothing.
REAL = (
    (3, 3, 1_536, 49_152),
    (7, 2, 4_864, 151_936),
    (1, 32, 11_008, 32_000),
    (8, 8, 28_672, 128_256),
    (4, 8, 11_009, 32_003),
)


@st.composite
def real_models_and_ranks(draw):
    """The shape of a model that people serve, on as many devices as they serve it on. No weight is made."""
    group, kv_heads, inner, words = draw(st.sampled_from(REAL))
    made = config(kv_heads, group, inner=inner, vocab=words)
    return made, draw(st.integers(1, min(16, made.num_heads)))


def in_words(model, size):
    """For a message: what was drawn."""
    return (
        f"{size} ranks, {model.num_heads} query heads, {model.num_kv_heads} KV heads, "
        f"inner size {model.intermediate_size}, {model.vocab_size} words"
    )
