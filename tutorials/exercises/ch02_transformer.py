"""Chapter 2. A decoder-only transformer in the Llama shape: configuration, rotary positions, layers, in one file.

    token ids -> embedding -> [RMSNorm -> attention -> +  ->  RMSNorm -> SwiGLU -> +] x num_layers -> RMSNorm -> linear

Every operation but attention treats each token by itself. So the tokens of many sequences are laid end to end, with no
batch dimension and no padding, and only `cache.attend` depends on where one sequence ends. Llama, Mistral, Qwen 2.5 and
3 and SmolLM3 are this one model: where they differ, one line below reads a field of `ModelConfig`, which `families.py`
fills from a model's files.

Sources: Vaswani et al. 2017 (the decoder); Touvron et al., "LLaMA" (2023), section 2.2 (RMSNorm, SwiGLU, rotary
positions); Su et al., "RoFormer" (2021), section 3.4 (rotary positions); Ainslie et al., "GQA" (2023); Jiang et al.,
"Mistral 7B" (2023), section 2 (sliding window).
"""

# Exercise ch02_transformer, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 2` after each step:
#
#   1. ModelConfig.kv_bytes_per_token
#   2. rotary_table
#   3. rotate
#   4. Layer.forward
#   5. Layer.attention
#   6. Layer.mlp
#   7. Transformer.forward
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Layer.forward, attention and mlp take and return [num_tokens, hidden_size]; their cos and sin are the rows of
# batch.positions, as rotate wants them. attention norms queries and keys where config.qk_norm is set, rotates
# them where self.has_rope is, and hands self.sliding_window to the cache.
#
# Given: ForwardBatch, in minipaged/model/batch.py.
#
#   token_ids: Tensor  # int64 [num_tokens]
#   positions: Tensor  # int64 [num_tokens]
#   query_start_loc: Tensor  # int32 [num_seqs + 1]
#   seq_lens: Tensor  # int32 [num_seqs]
#   block_tables: Tensor  # int32 [num_seqs, max_blocks], -1 past the end of a table
#   slot_mapping: Tensor  # int64 [num_tokens], -1 where nothing is kept
#   logits_rows: Tensor  # int64 [num_sampled], rows of the hidden states
#   max_query_len: int  # the most tokens that one sequence brings, known here without asking the device
#
# Given: KVCache, in minipaged/model/batch.py.
#
#   attend(layer: int, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch, sliding_window: int |
#       None) -> Tensor
#       Store the batch's key and value; return causal attention of its queries over each sequence's whole
#       context. query [num_tokens, num_heads, head_dim]; key, value [num_tokens, num_kv_heads, head_dim].
#       Returns query's shape. sliding_window: of the layer, the newest tokens that a query sees, itself among
#       them; None: all.
#
# Made from minipaged/model/transformer.py by minipaged/course/generate.py.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.model.batch import ForwardBatch, KVCache

MAX_POSITION = 1 << 20  # tokens; the rotary table of a context as long as this is the largest that is built

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, read from its file. Raises ValueError where the numbers cannot go together."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # tokens of context the model was trained for
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the output layer is the embedding, transposed
    qkv_bias: bool = False  # W^Q, W^K and W^V have biases (Qwen 2.5)
    qk_norm: bool = False  # queries and keys are normed, head by head, before they are turned (Qwen 3)
    rope_factors: tuple[float, ...] = ()  # what each frequency is divided by (Llama 3.1); empty: all by 1
    rope_attention_factor: float = 1.0  # what cos and sin are multiplied by (yarn)
    no_rope_layers: tuple[int, ...] = ()  # layers whose queries and keys carry no position (SmolLM3)
    sliding_windows: tuple[int | None, ...] = ()  # of each layer, the tokens that a query sees (Mistral); empty: all

    def __post_init__(self) -> None:
        # A damaged file can hold any number here: each is refused before it becomes a shape, a table or a loop.
        for name in (*_SIZES, "max_position"):
            value = getattr(self, name)
            if not _is_size(value):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary positions turn pairs), got {self.head_dim}")
        if self.max_position > MAX_POSITION:
            raise ValueError(f"max_position must be at most {MAX_POSITION:,}, got {self.max_position:,}")
        numbers = {"rope_theta": (1.0, 1e12), "rms_norm_eps": (0.0, 1.0), "rope_attention_factor": (1e-3, 1e3)}
        for name, (low, high) in numbers.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
        for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        half, layers, factors, windows = self.head_dim // 2, self.num_layers, self.rope_factors, self.sliding_windows
        if factors and (len(factors) != half or not all(1e-6 <= factor <= 1e6 for factor in factors)):
            raise ValueError(f"rope_factors must be {half} numbers from 1e-6 to 1e6, one for each pair, got {factors}")
        if windows and (len(windows) != layers or not all(window is None or _is_size(window) for window in windows)):
            raise ValueError(f"sliding_windows must be {layers} sizes or None, one for each layer, got {windows}")

    @property
    def widest_window(self) -> int | None:
        """Tokens back that some layer still sees: None where one sees all."""
        return None if None in (self.sliding_windows or (None,)) else max(self.sliding_windows)  # type: ignore[type-var]

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of K and V that one token adds over all layers: 2 * num_layers * num_kv_heads * head_dim * itemsize."""
        raise NotImplementedError("ch02: ModelConfig.kv_bytes_per_token")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def rotary_table(config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim) / factor_i, each [max_position, head_dim / 2]."""
    raise NotImplementedError("ch02: rotary_table")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim / 2]) by its angle.

    x [num_tokens, heads, head_dim]; cos, sin [num_tokens, 1, head_dim / 2]. Returns the shape of x. After it, a query
    at position m and a key at position n meet with an angle that depends on m - n alone.
    """
    raise NotImplementedError("ch02: rotate")


class Layer(nn.Module):
    """One block of the stack. Invariant: a token's output depends on other tokens through `cache.attend` alone."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.has_rope = index not in config.no_rope_layers
        self.sliding_window = config.sliding_windows[index] if config.sliding_windows else None
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # W^Q, W^K and W^V stacked, and W^gate and W^up: one product each, since a wide one is faster than two narrow.
        self.qkv_proj = nn.Linear(config.hidden_size, q_size + 2 * kv_size, bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, batch: ForwardBatch) -> Tensor:
        raise NotImplementedError("ch02: Layer.forward")

    def attention(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, batch: ForwardBatch) -> Tensor:
        raise NotImplementedError("ch02: Layer.attention")

    def mlp(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("ch02: Layer.mlp")


class Transformer(nn.Module):
    """The whole model. `forward` gives hidden states; `logits` turns those that are wanted into scores of tokens."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        # Not filled: its weights come from elsewhere, and torch needs a second to draw some on device "meta".
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.to(dtype)
        with torch.device("cpu"):  # real numbers even where the weights are built without storage (device "meta")
            cos, sin = rotary_table(config, dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Hidden states [num_tokens, hidden_size] of the step's tokens; their K and V are in the cache afterwards."""
        raise NotImplementedError("ch02: Transformer.forward")

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [num_rows, vocab_size]. Ask for the rows that are sampled from, not for all."""
        return self.lm_head(hidden)
