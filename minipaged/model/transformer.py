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
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def rotary_table(config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim) / factor_i, each [max_position, head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim  # [head_dim / 2]
    frequency = config.rope_theta**-exponent / torch.tensor(config.rope_factors or (1.0,), dtype=torch.float64)
    angle = torch.arange(config.max_position, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos() * config.rope_attention_factor, angle.sin() * config.rope_attention_factor
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim / 2]) by its angle.

    x [num_tokens, heads, head_dim]; cos, sin [num_tokens, 1, head_dim / 2]. Returns the shape of x. After it, a query
    at position m and a key at position n meet with an angle that depends on m - n alone.
    """
    first, second = x.chunk(2, dim=-1)  # [num_tokens, heads, head_dim / 2] each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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
        hidden = hidden + self.attention(self.attention_norm(hidden), cos, sin, cache, batch)
        return hidden + self.mlp(self.mlp_norm(hidden))  # [num_tokens, hidden_size]

    def attention(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, batch: ForwardBatch) -> Tensor:
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = self.qkv_proj(hidden).view(-1, heads + 2 * kv_heads, head_dim)  # [num_tokens, all heads, head_dim]
        query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.has_rope:  # K is kept with its position already in it: a cached key is never turned again
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        out = cache.attend(self.index, query, key, value, batch, self.sliding_window)  # [num_tokens, heads, head_dim]
        return self.o_proj(out.reshape(-1, heads * head_dim))  # Concat(head_1, ..., head_h) W^O

    def mlp(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)  # [num_tokens, intermediate_size] each
        return self.down_proj(F.silu(gate) * up)  # [num_tokens, hidden_size]


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
        hidden = self.embed_tokens(batch.token_ids)  # [num_tokens, hidden_size]
        cos, sin = self.cos[batch.positions, None], self.sin[batch.positions, None]  # [num_tokens, 1, head_dim / 2]
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, cache, batch)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [num_rows, vocab_size]. Ask for the rows that are sampled from, not for all."""
        return self.lm_head(hidden)
