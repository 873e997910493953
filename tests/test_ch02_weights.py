"""Chapter 2. Weights from a file are the weights that were written, and a file that is not whole is refused.

Whatever is wrong with a file, one kind of error says so, with names and numbers in it: ModelFileError. Nothing hangs,
and nothing asks for memory that the file itself does not hold.
"""

import json
import os
import pickle
import resource
import struct
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from live_bytes import assert_load_is_frugal, pack_everything
from minipaged.model import linear, load
from minipaged.model.batch import make_batch
from minipaged.model.compiled_ops import use_compiled_ops
from minipaged.model.families import FAMILIES
from minipaged.model.gguf_file import ModelFileError
from minipaged.model.load import load_model
from minipaged.model.recompute import RecomputeCache
from minipaged.model.transformer import MAX_POSITION, ModelConfig
from model_files import (
    EOS,
    SMALL,
    TOKENS,
    WIDE,
    gguf_fields,
    gguf_name,
    json_fields,
    random_weights,
    shapes,
    tokenizer,
    transformer_of,
    write_folder,
    write_gguf,
    write_wide,
)

pytestmark = pytest.mark.ch02

WEIGHTS = random_weights(SMALL)
SECONDS = 2.0  # of this process, whatever else runs here; a load of these small files takes milliseconds
BYTES = 1 << 30


@contextmanager
def little_memory_and_time():
    """The body may take 1 GiB of address space and a few seconds more: a length of 2^60 that is believed shows."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < SECONDS, "it took too long: a length in the file was believed"


@contextmanager
def folder_with(config=SMALL, weights=WEIGHTS, **how):
    with TemporaryDirectory() as folder:
        write_folder(folder, config, weights, **how)
        yield Path(folder)


@contextmanager
def gguf_with(config=SMALL, weights=WEIGHTS, **how):
    with TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "model.gguf", config, weights, **how)
        yield Path(folder) / "model.gguf"


@contextmanager
def file_of(data, name="model.gguf"):
    with TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        yield Path(folder) / name


def logits(transformer, token_ids=(0, 7, EOS, 8, 7, EOS - 1)):
    batch = make_batch([token_ids], [0])
    with torch.inference_mode():
        return transformer.logits(transformer(batch, RecomputeCache()))


def written(config, weights):
    """The source model, with the operations of a loaded one: where the weights are equal, so are the logits' bits."""
    transformer = transformer_of(config, weights)
    use_compiled_ops(transformer)
    return transformer


def refused(path):
    """The message with which this path is refused. Anything else than a ModelFileError fails the test."""
    with pytest.raises(ModelFileError) as error, little_memory_and_time():
        load_model(path)
    return str(error.value)


def refused_or_loaded(path):
    try:
        with little_memory_and_time():
            return load_model(path)
    except ModelFileError as error:
        assert str(path) in str(error), "the message does not say which file"
        return None


# ---- what was written is what is loaded ------------------------------------------------------------------------------


@st.composite
def small_configs(draw):
    num_kv_heads = draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=len(TOKENS),
        hidden_size=draw(st.sampled_from((2, 8, 18))),
        intermediate_size=draw(st.integers(1, 12)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from((2, 4, 6, 8))),
        max_position=draw(st.integers(8, 100)),
        rope_theta=draw(st.sampled_from((100.0, 10_000.0, 500_000.0))),
        rms_norm_eps=2.0 ** draw(st.integers(-20, -3)),
        tie_embeddings=draw(st.booleans()),
    )


def as_stored(weights, dtype):
    return {name: torch.from_numpy(array).to(dtype).float().numpy() for name, array in weights.items()}


@given(config=small_configs(), seed=st.integers(0, 99), kind=st.sampled_from(("F32", "F16", "BF16")))
def test_a_gguf_file_loads_to_the_model_that_was_written(config, seed, kind):
    weights = random_weights(config, seed)
    with gguf_with(config, weights, kind=gguf.GGMLQuantizationType[kind]) as path, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of weights that lie in memory which cannot be written to
        loaded = load_model(path)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    stored = {name: a if a.ndim == 1 else as_stored({name: a}, dtype)[name] for name, a in weights.items()}
    assert loaded.transformer.config == config
    assert torch.equal(logits(loaded.transformer), logits(written(config, stored)))
    assert loaded.tokenizer.eos_token_ids == {EOS}


@given(seed=st.integers(0, 99), kind=st.sampled_from(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")), tied=st.booleans())
def test_a_quantised_gguf_file_loads_to_its_dequantised_weights(seed, kind, tied):
    config = ModelConfig(len(TOKENS), 32, 64, 1, 4, 2, 8, 64, rms_norm_eps=2.0**-16, tie_embeddings=tied)
    weights, kind = random_weights(config, seed), gguf.GGMLQuantizationType[kind]
    with gguf_with(config, weights, kind=kind) as path:
        loaded = load_model(path)
    stored = {n: gguf.dequantize(gguf.quantize(a, kind), kind) if a.ndim > 1 else a for n, a in weights.items()}
    assert torch.equal(logits(loaded.transformer), logits(written(config, stored)))


@given(
    config=small_configs(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    num_shards=st.integers(1, 5),
)
def test_a_folder_loads_to_the_model_that_was_written(config, seed, dtype, num_shards):
    weights = random_weights(config, seed)
    with folder_with(config, weights, dtype=dtype, num_shards=num_shards) as folder:
        loaded = load_model(folder)
    assert loaded.transformer.config == config
    assert torch.equal(logits(loaded.transformer), logits(written(config, as_stored(weights, dtype))))
    assert loaded.tokenizer.eos_token_ids == {EOS}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_has_the_dtype_that_was_asked_for(dtype):
    source = transformer_of(SMALL, WEIGHTS).to(dtype)
    for made in (gguf_with(), folder_with()):
        with made as path:
            loaded = load_model(path, dtype=str(dtype).removeprefix("torch."))
        assert {parameter.dtype for parameter in loaded.transformer.parameters()} == {dtype}
        for (name, ours), theirs in zip(loaded.transformer.named_parameters(), source.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


@given(theta=st.sampled_from((100.0, 500_000.0)), where=st.sampled_from(("rope_theta", "rope_parameters")))
def test_the_base_of_rotary_positions_is_read_where_it_stands(theta, where):
    with folder_with() as folder:
        fields = json_fields(SMALL)
        del fields["rope_theta"]
        fields[where] = theta if where == "rope_theta" else {"rope_type": "default", "rope_theta": theta}
        (folder / "config.json").write_text(json.dumps(fields))
        assert load_model(folder).transformer.config.rope_theta == theta


def test_what_a_config_may_leave_out():
    config = ModelConfig(len(TOKENS), 16, 6, 1, 4, 4, 4, 64, rms_norm_eps=2.0**-16, tie_embeddings=False)
    with folder_with(config, random_weights(config)) as folder:
        fields = json_fields(config)
        for name in ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
            del fields[name]
        (folder / "config.json").write_text(json.dumps({**fields, "head_dim": None, "rope_scaling": None}))
        assert load_model(folder).transformer.config == config
    left_out = ("attention_head_count_kv", "attention_key_length", "rope_dimension_count", "rope_freq_base")
    with gguf_with(config, random_weights(config), **{f"llama_{name}": None for name in left_out}) as path:
        assert load_model(path).transformer.config == config


def test_a_tied_file_may_hold_the_embedding_twice():
    config = ModelConfig(len(TOKENS), 8, 6, 1, 2, 1, 4, 64, tie_embeddings=True)
    weights = random_weights(config)
    twice = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    with folder_with(config, twice) as folder:
        assert torch.equal(logits(load_model(folder).transformer), logits(written(config, weights)))


# ---- a damaged GGUF file ---------------------------------------------------------------------------------------------


@cache
def gguf_bytes():
    """The file of SMALL, where its header ends, and where its last tensor ends (zeros follow, which fill a row)."""
    with gguf_with() as path:
        reader = gguf.GGUFReader(path)
        end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
        return path.read_bytes(), int(reader.data_offset), int(end)


@cache
def gguf_lengths():
    """Where the header holds a length or a count, 8 bytes each: of strings, arrays, dimensions, fields and tensors."""
    with file_of(gguf_bytes()[0]) as path:
        reader = gguf.GGUFReader(path)
        places = [8, 16]
        for field in [f for f in reader.fields.values() if not f.name.startswith("GGUF.")]:
            places.append(field.offset)  # of the key
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                places.append(field.offset + 8 + len(field.name) + 8)
            elif field.types[0] == gguf.GGUFValueType.STRING:
                places.append(field.offset + 8 + len(field.name) + 4)
        for tensor in reader.tensors:
            places.append(tensor.field.offset)
            first_dim = tensor.field.offset + 8 + len(tensor.name) + 4
            places += [first_dim + 8 * i for i in range(len(tensor.shape) + 1)]
    return places


@given(data=st.data())
def test_a_gguf_file_that_is_cut_is_refused_wherever_it_is_cut(data):
    whole, header_end, end = gguf_bytes()
    cut = data.draw(st.integers(0, header_end) | st.integers(0, end - 1), label="cut at byte")
    with file_of(whole[:cut]) as path:
        message = refused(path)
    assert str(path) in message
    assert f"({cut:,} bytes)" in message


@given(data=st.data())
def test_a_gguf_file_with_flipped_bytes_in_its_header_is_refused_or_loads(data):
    whole, header_end, _ = gguf_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3), label="bytes")):
        damaged[data.draw(st.integers(0, header_end - 1), label="at")] ^= data.draw(st.integers(1, 255), label="flip")
    with file_of(damaged) as path:
        refused_or_loaded(path)


@given(data=st.data())
def test_a_length_in_a_gguf_header_is_never_believed(data):
    whole, _, _ = gguf_bytes()
    at = data.draw(st.sampled_from(gguf_lengths()), label="at")
    (true,) = struct.unpack_from("<Q", whole, at)
    sizes = st.sampled_from((0, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)) | st.integers(0, 2 * len(whole))
    length = data.draw(sizes.filter(lambda size: size != true), label="length")
    damaged = bytearray(whole)
    struct.pack_into("<Q", damaged, at, length)
    with file_of(damaged) as path:
        if data.draw(st.booleans(), label="much follows"):  # 256 MiB of zeros: a sparse file, which holds none of them
            os.truncate(path, 1 << 28)
        refused_or_loaded(path)


def header(*fields, tensors=0, num_fields=None):
    """A GGUF header of hand-made fields."""
    counts = struct.pack("<QQ", tensors, len(fields) if num_fields is None else num_fields)
    return b"GGUF" + struct.pack("<I", 3) + counts + b"".join(fields)


def field(kind, value, name=b"name"):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


STRING, ARRAY, UINT8, FLOAT64 = 8, 9, 0, 12
HUGE = (2**27, 2**31, 2**40, 2**60, 2**64 - 1)


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize(
    "made",
    [
        lambda size: header(tensors=size),
        lambda size: header(num_fields=size),
        lambda size: header(field(STRING, struct.pack("<Q", size))),
        lambda size: header(struct.pack("<Q", size)),
        lambda size: header(field(ARRAY, struct.pack("<IQ", UINT8, size))),
        lambda size: header(field(ARRAY, struct.pack("<IQ", FLOAT64, size))),
        lambda size: header(field(ARRAY, struct.pack("<IQ", STRING, size))),
        lambda size: header(field(ARRAY, struct.pack("<IQ", ARRAY, size))),
        lambda size: header(struct.pack("<QI", 0, size % 2**32), tensors=1),
        lambda size: header(struct.pack("<QIQ", 0, 1, size), tensors=1),
    ],
    ids=["tensors", "fields", "text", "name", "bytes", "numbers", "texts", "arrays", "dimensions", "dimension"],
)
def test_a_huge_length_before_much_data_is_never_believed(made, size):
    with file_of(made(size)) as path:
        os.truncate(path, 1 << 28)  # 256 MiB of zeros, for code that walks through them: a sparse file, which is small
        assert str(path) in refused(path)


def test_arrays_of_arrays_of_arrays_are_refused():
    with file_of(header(field(ARRAY, struct.pack("<IQ", ARRAY, 1) * 100_000))) as path:
        assert str(path) in refused(path)


def test_a_name_that_comes_twice_is_refused():
    twice = field(UINT8, b"\x01", b"a name") * 2
    with file_of(header(twice, num_fields=2) + bytes(64)) as path:
        assert "a name" in refused(path)


@given(name=st.sampled_from(sorted(shapes(SMALL))), kind=st.integers(0, 50) | st.integers(0, 2**32 - 1))
def test_a_tensor_of_another_type_is_refused_unless_its_numbers_could_be_of_that_type(name, kind):
    whole, _, _ = gguf_bytes()
    encoded = gguf_name(name).encode()
    at = whole.index(struct.pack("<Q", len(encoded)) + encoded) + 8 + len(encoded) + 4 + 8 * len(shapes(SMALL)[name])
    damaged = bytearray(whole)
    assert struct.unpack_from("<I", damaged, at)[0] == gguf.GGMLQuantizationType.F32
    struct.pack_into("<I", damaged, at, kind)
    readable = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}  # 2 or 4 bytes a number, and any
    with file_of(damaged) as path:
        assert (refused_or_loaded(path) is not None) == (kind in readable)


@given(data=st.binary(max_size=200), magic=st.booleans())
def test_any_bytes_at_all_are_refused(data, magic):
    with file_of((b"GGUF" + struct.pack("<I", 3) if magic else b"") + data) as path:
        assert f"{path} ({path.stat().st_size:,} bytes)" in refused(path)


def test_an_empty_file_is_refused():
    with file_of(b"") as path:
        assert "(0 bytes)" in refused(path)


@given(version=st.integers(0, 2**32 - 1).filter(lambda version: version not in (2, 3)))
def test_another_version_of_the_format_is_refused_with_its_number(version):
    with file_of(gguf_bytes()[0][:4] + struct.pack("<I", version) + gguf_bytes()[0][8:]) as path:
        assert f"version {version}" in refused(path)


MAY_BE_MISSING = {"llama.rope.dimension_count", "llama.rope.freq_base", "tokenizer.ggml.pre"} | {
    "tokenizer.ggml.add_bos_token", "tokenizer.chat_template"
}  # fmt: skip


def test_a_big_endian_file_is_refused_by_what_it_is():
    for version in (2, 3):
        with file_of(gguf_bytes()[0][:4] + struct.pack(">I", version) + gguf_bytes()[0][8:]) as path:
            assert "big-endian" in refused(path)


@given(name=st.sampled_from(sorted(shapes(SMALL))), data=st.data())
def test_a_tensor_lies_where_it_lies_and_nowhere_else(name, data):
    """Unaligned, over another one, past the end, or so far behind it that 64 bits wrap around: no offset but its own
    is free in a whole file."""
    whole, _, _ = gguf_bytes()
    encoded = gguf_name(name).encode()
    at = whole.index(struct.pack("<Q", len(encoded)) + encoded) + 8 + len(encoded) + 8 + 8 * len(shapes(SMALL)[name])
    (own,) = struct.unpack_from("<Q", whole, at)
    near, far = st.integers(0, len(whole)), st.integers(2**64 - len(whole), 2**64 - 1)
    offset = data.draw(near | (near | far).map(lambda n: n // 32 * 32) | far, label="offset")
    damaged = bytearray(whole)
    struct.pack_into("<Q", damaged, at, offset)
    with file_of(damaged) as path:
        if offset == own:
            load_model(path)
        else:
            message = refused(path)
            assert gguf_name(name) in message or "overlap" in message


@given(shift=st.integers(0, 64))
def test_a_tensor_begins_on_a_multiple_of_the_alignment(shift):
    """Here the last one has room behind it."""
    whole, header_end, _ = gguf_bytes()
    with file_of(whole) as path:
        last = max(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.data_offset)
        at = last.field.offset + 8 + len(last.name) + 8 + 8 * len(last.shape)
    damaged = bytearray(whole + bytes(64))
    struct.pack_into("<Q", damaged, at, last.data_offset - header_end + shift)
    with file_of(damaged) as path:
        if shift % 32:
            assert "no multiple of 32" in refused(path)
        else:
            load_model(path)


@given(
    factor=st.sampled_from((0.0, 1.0, 2.0, 4.0)),
    kind=st.sampled_from((None, "linear", "none")),
    name=st.sampled_from(("llama.rope.scaling.factor", "llama.rope.scale_linear")),
)
def test_positions_that_a_gguf_file_scales_are_scaled_by_the_factor(factor, kind, name):
    """A file that names no kind of scaling means a linear one; a factor of 0 is none (llama.cpp)."""
    fields = {} if kind is None else {"llama.rope.scaling.type": ("add_string", kind)}
    with gguf_with(**{name: ("add_float32", factor)}, **fields) as path:
        config = load_model(path).transformer.config
    is_scaled = kind != "none" and factor not in (0.0, 1.0)
    assert config.rope_factors == ((factor, factor) if is_scaled else ())


@given(slides=st.lists(st.booleans(), min_size=2, max_size=2), window=st.integers(0, 9))
def test_a_gguf_file_may_say_which_layers_have_the_window(slides, window):
    fields = {
        "llama.attention.sliding_window": ("add_uint32", window),
        "llama.attention.sliding_window_pattern": ("add_array", slides),
    }
    with gguf_with(**fields) as path:
        config = load_model(path).transformer.config
    expected = tuple(window if slide else None for slide in slides)
    assert config.sliding_windows == (expected if window and any(slides) else ())


@pytest.mark.parametrize("name", gguf_fields(SMALL))
def test_a_gguf_field_that_is_missing_is_named(name):
    with gguf_with(**{name.replace(".", "_"): None}) as path:
        if name in MAY_BE_MISSING:
            load_model(path)
            return
        message = refused(path)
    # These two follow from others, and then do not fit the tensors, or each other.
    by_default = ("llama.attention.head_count_kv", "llama.attention.key_length")
    assert name in message or (name in by_default and ("configuration asks for" in message or "4 of 2" in message))


_ODD = st.tuples(st.just("add_string"), st.text(max_size=5)) | st.tuples(
    st.just("add_array"), st.lists(st.integers(-9, 9), min_size=1, max_size=40) | st.lists(st.text(), min_size=1)
)
_ODD |= st.tuples(st.just("add_float32"), st.floats(width=32)) | st.tuples(st.just("add_bool"), st.booleans())
_ODD |= st.tuples(st.just("add_int64"), st.integers(-(2**63), 2**63 - 1))


_MORE_FIELDS = [
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.yarn_beta_fast",
    "llama.attention.scale",
    "llama.attention.sliding_window",
    "llama.attention.sliding_window_pattern",
    "llama.logit_scale",
    "split.count",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eot_token_id",
]


@given(name=st.sampled_from(sorted(gguf_fields(SMALL)) + _MORE_FIELDS), value=_ODD)
def test_whatever_stands_in_a_gguf_field_it_is_refused_or_loads(name, value):
    with gguf_with(**{name.replace(".", "_"): value}) as path:
        loaded = refused_or_loaded(path)
    if loaded:
        ids = loaded.tokenizer.encode("hi and more")
        assert max(ids, default=0) < SMALL.vocab_size


@given(
    name=st.sampled_from(("block_count", "context_length", "embedding_length", "feed_forward_length"))
    | st.sampled_from(("attention.head_count", "attention.head_count_kv", "attention.key_length")),
    number=st.integers(0, 2**32 - 1),
)
def test_a_number_in_a_gguf_file_that_its_tensors_contradict_is_refused(name, number):
    if gguf_fields(SMALL)[f"llama.{name}"][1] == number or (name == "context_length" and 1 <= number <= MAX_POSITION):
        return
    with gguf_with(**{f"llama_{name.replace('.', '_')}": ("add_uint32", number)}) as path:
        message = refused(path)
    assert any(character.isdigit() for character in message.replace(str(path), ""))


@given(
    architecture=st.text(st.characters(categories=("Ll", "Nd")), min_size=1).filter(lambda name: name not in FAMILIES)
    | st.just("mistral")  # whose GGUF files say llama
)
def test_another_architecture_is_refused_by_name(architecture):
    with gguf_with(architecture=architecture) as path:
        assert repr(architecture) in refused(path)


@given(name=st.sampled_from(sorted(set(shapes(SMALL)) - {"lm_head.weight"})))
def test_a_tensor_missing_from_a_gguf_file_is_named(name):
    with gguf_with(weights={n: array for n, array in WEIGHTS.items() if n != name}) as path:
        assert name in refused(path)


@given(name=st.sampled_from(sorted(shapes(SMALL))), shape=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_a_tensor_of_another_shape_in_a_gguf_file_is_named_with_both_shapes(name, shape):
    if tuple(shape) == shapes(SMALL)[name]:
        return
    with gguf_with(weights={**WEIGHTS, name: np.ones(shape, np.float32)}) as path:
        message = refused(path)
    assert name in message
    assert str(shape) in message
    assert str(list(shapes(SMALL)[name])) in message


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight", "odd"])
def test_a_tensor_too_many_is_refused_by_name(name):
    """A file with a third layer and a configuration with two: half a model would run, and write nonsense."""
    weights = {**WEIGHTS, name: np.ones((6, 8), np.float32)}
    with folder_with(weights=weights) as folder:
        assert name in refused(folder)
    with gguf_with(weights=weights) as path:
        message = refused(path)
        assert name in message or gguf_name(name).removeprefix("blk.0.") in message


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("llama.rope.scaling.type", ("add_string", "longrope"), "longrope"),
        ("llama.rope.scaling.attn_factor", ("add_float32", 2.0), "rope.scaling.attn_factor is 2.0"),
        ("llama.rope.scaling.yarn_attn_factor", ("add_float32", 2.0), "rope.scaling.yarn_attn_factor is 2.0"),
        ("llama.rope.scaling.yarn_log_multiplier", ("add_float32", 1.0), "yarn_log_multiplier is 1.0"),
        ("llama.attention.scale", ("add_float32", 0.25), "attention.scale 0.25"),
        ("llama.attention.output_scale", ("add_float32", 0.5), "attention.output_scale is 0.5"),
        ("llama.attention.max_alibi_bias", ("add_float32", 8.0), "attention.max_alibi_bias is 8.0"),
        ("llama.attention.clamp_kqv", ("add_float32", 8.0), "attention.clamp_kqv is 8.0"),
        ("llama.attention.causal", ("add_bool", False), "attention.causal is False"),
        ("llama.logit_scale", ("add_float32", 0.5), "logit_scale is 0.5"),
        ("llama.embedding_scale", ("add_float32", 2.0), "embedding_scale is 2.0"),
        ("llama.residual_scale", ("add_float32", 2.0), "residual_scale is 2.0"),
        ("llama.attn_logit_softcapping", ("add_float32", 50.0), "attn_logit_softcapping is 50.0"),
        ("llama.final_logit_softcapping", ("add_float32", 30.0), "final_logit_softcapping is 30.0"),
        ("llama.attention.sliding_window_pattern", ("add_array", [True]), "must be 2 flags"),
        ("split.count", ("add_uint16", 3), "part 0 (from 0) of 3"),
        ("llama_rope_dimension_count", ("add_uint32", 2), "2 of 4"),
        ("llama.expert_count", ("add_uint32", 8), "expert_count is 8"),
        ("tokenizer_ggml_model", ("add_string", "t5"), "'t5'"),
        ("tokenizer_ggml_model", ("add_string", "llama"), "tokenizer.ggml.scores"),
        ("tokenizer_ggml_pre", ("add_string", "olmo"), "'olmo'"),
        ("tokenizer_ggml_merges", ("add_array", ["h i", "noblank"]), "merges"),
        ("tokenizer_ggml_merges", ("add_array", ["h i", "q \u1234"]), "merges"),
        ("tokenizer_ggml_tokens", ("add_array", TOKENS[:-3]), str(len(TOKENS) - 3)),
        ("tokenizer_ggml_token_type", ("add_array", [3] * (len(TOKENS) + 5)), "tokens"),
    ],
)
def test_what_a_gguf_file_asks_for_and_we_do_not_have_is_refused(field, value, said):
    with gguf_with(**{field: value}) as path:
        assert said in refused(path)


# ---- a damaged folder ------------------------------------------------------------------------------------------------


@cache
def safetensors_bytes():
    with folder_with() as folder:
        (path,) = folder.glob("*.safetensors")
        return path.read_bytes()


@given(data=st.data())
def test_a_safetensors_file_that_is_cut_is_refused_wherever_it_is_cut(data):
    whole = safetensors_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1), label="cut at byte")
    with folder_with() as folder:
        (path,) = folder.glob("*.safetensors")
        path.write_bytes(whole[:cut])
        message = refused(folder)
    assert path.name in message
    assert f"({cut:,} bytes)" in message


@given(data=st.data())
def test_a_safetensors_file_with_flipped_bytes_in_its_header_is_refused_or_loads(data):
    damaged = bytearray(safetensors_bytes())
    header_end = 8 + struct.unpack_from("<Q", damaged)[0]
    for _ in range(data.draw(st.integers(1, 3), label="bytes")):
        damaged[data.draw(st.integers(0, header_end - 1), label="at")] ^= data.draw(st.integers(1, 255), label="flip")
    with folder_with() as folder:
        (path,) = folder.glob("*.safetensors")
        path.write_bytes(damaged)
        refused_or_loaded(folder)


@given(name=st.sampled_from(sorted(shapes(SMALL))), shape=st.lists(st.integers(0, 9), max_size=3))
def test_a_tensor_of_another_shape_in_a_folder_is_named_with_both_shapes(name, shape):
    if tuple(shape) == shapes(SMALL)[name]:
        return
    with folder_with(weights={**WEIGHTS, name: np.ones(shape, np.float32)}) as folder:
        message = refused(folder)
    assert name in message
    assert str(shape) in message
    assert str(list(shapes(SMALL)[name])) in message


@given(name=st.sampled_from(sorted(shapes(SMALL))))
def test_a_tensor_missing_from_a_folder_is_named_with_its_shape(name):
    with folder_with(weights={n: array for n, array in WEIGHTS.items() if n != name}) as folder:
        message = refused(folder)
    assert name in message
    assert str(list(shapes(SMALL)[name])) in message


@given(num_shards=st.integers(2, 5), data=st.data())
def test_a_shard_that_is_missing_is_noticed(num_shards, data):
    with folder_with(num_shards=num_shards) as folder:
        lost = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
        lost.unlink()
        assert lost.name in refused(folder)


@given(name=st.sampled_from(sorted(set(json_fields(SMALL)) - {"rope_theta", "tie_word_embeddings"})))
def test_a_number_missing_from_config_json_is_named(name):
    fields = json_fields(SMALL)
    del fields[name]
    with folder_with() as folder:
        (folder / "config.json").write_text(json.dumps(fields))
        message = refused(folder)
    by_default = {"head_dim", "num_key_value_heads"}  # they follow from others, and then do not fit the tensors
    assert name in message or (name in by_default and "configuration asks for" in message)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    name=st.sampled_from(sorted({*json_fields(SMALL), "rope_scaling", "rope_parameters", "hidden_act"})), value=_JSON
)
def test_whatever_stands_in_config_json_it_is_refused_or_loads(name, value):
    with folder_with() as folder:
        (folder / "config.json").write_text(json.dumps({**json_fields(SMALL), name: value}))
        refused_or_loaded(folder)


@given(
    name=st.sampled_from(sorted(set(json_fields(SMALL)) - {"model_type", "rope_theta", "tie_word_embeddings"})),
    value=st.integers(max_value=0) | st.integers(MAX_POSITION + 1) | st.floats() | st.text() | st.lists(st.integers()),
)
def test_an_absurd_number_in_config_json_is_refused(name, value):
    if name == "rms_norm_eps" and isinstance(value, float | int) and 0 <= value <= 1:
        return
    with folder_with() as folder:
        (folder / "config.json").write_text(json.dumps({**json_fields(SMALL), name: value}))
        message = refused(folder)
    assert str(folder) in message


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", ["eight", None, [8], 0])
def test_a_number_that_others_are_computed_from_is_refused_too(name, value):
    fields = {**json_fields(SMALL), name: value}
    del fields["head_dim"]
    with folder_with() as folder:
        (folder / "config.json").write_text(json.dumps(fields))
        assert "config.json" in refused(folder)


@given(data=st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_a_config_json_that_is_none_is_refused(data):
    with folder_with() as folder:
        (folder / "config.json").write_bytes(data)
        assert "config.json" in refused(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"hidden_size": ' + "9" * 10_000 + "}", "\ufeff{}", ""])
def test_a_config_json_without_end_is_refused(text):
    with folder_with() as folder:
        (folder / "config.json").write_text(text)
        assert "config.json" in refused(folder)


@given(
    where=st.sampled_from(("rope_scaling", "rope_parameters")),
    key=st.sampled_from(("type", "rope_type")),
    kind=st.sampled_from(("dynamic", "longrope")) | st.text(min_size=1, max_size=5),
)
def test_scalings_of_rotary_positions_that_are_not_known_are_refused(where, key, kind):
    if kind in ("default", "none", "linear", "yarn"):
        return
    with folder_with() as folder:
        fields = {**json_fields(SMALL), where: {key: kind, "factor": 2.0}}
        (folder / "config.json").write_text(json.dumps(fields))
        message = refused(folder)
    assert repr(kind) in message


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not supported (it caps its scores)"),
        ({"model_type": "phi3"}, "'phi3' is not supported (its weights are fused)"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported (it has experts)"),
        ({"model_type": "bloom"}, "'bloom'"),
        ({"model_type": ["llama"]}, "['llama']"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_windows"),
        ({"model_type": "mistral", "sliding_window": 4, "num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised (bitsandbytes)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised (MLX)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier is 0.2"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "2 layers"),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            "differ",
        ),
    ],
)
def test_another_kind_of_model_is_refused(changed, said):
    with folder_with() as folder:
        (folder / "config.json").write_text(json.dumps({**json_fields(SMALL), **changed}))
        assert said in refused(folder)


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_says_which(lost):
    with folder_with() as folder:
        (folder / lost).unlink()
        assert lost in refused(folder)


def is_json_object(data):
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


@given(
    name=st.sampled_from(("tokenizer.json", "tokenizer_config.json", "generation_config.json")),
    data=st.binary().filter(lambda data: not is_json_object(data)),  # settings that say nothing are no damage
)
def test_a_damaged_tokenizer_is_refused_by_its_file(name, data):
    with folder_with() as folder:
        (folder / name).write_bytes(data)
        assert name in refused(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused():
    with folder_with() as folder:
        larger = tokenizer()
        larger.add_tokens(["one more"])
        larger.save(str(folder / "tokenizer.json"))
        assert str(len(TOKENS)) in refused(folder)


# ---- pickles and names -----------------------------------------------------------------------------------------------


class Trap:
    """To unpickle it is to write a file."""

    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return Path.touch, (self.sign,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth"])
def test_a_pickle_is_never_opened(name, tmp_path):
    sign = tmp_path / "the pickle has run"
    with folder_with() as folder:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        (folder / name).write_bytes(pickle.dumps(Trap(sign)))
        assert "safetensors" in refused(folder)
        assert "never" in refused(folder / name)
        torch.save({"model.norm.weight": Trap(sign)}, folder / name)
        refused(folder)
        refused(folder / name)
    assert not sign.exists()
    pickle.loads(pickle.dumps(Trap(sign)))
    assert sign.exists(), "the trap does not work: this test shows nothing"


@given(name=st.text(st.characters()) | st.sampled_from(("", "~nobody-has-this-name/x", "a" * 5000, "a\0b", "SmolLM2")))
def test_an_unknown_model_is_refused_with_the_names_that_are_known(name):
    if name in ("tiny", "smollm2-135m") or os.path.exists(os.path.expanduser(name)):
        return
    with pytest.raises(ValueError) as error:
        load_model(name)
    assert repr(name) in str(error.value)
    assert "smollm2-135m" in str(error.value)


@given(dtype=st.text().filter(lambda dtype: dtype not in ("float64", "float32", "bfloat16", "float16", "auto")))
def test_an_unknown_dtype_is_refused_with_those_that_are_known(dtype):
    with pytest.raises(ValueError) as error:
        load_model("tiny", dtype)
    assert repr(dtype) in str(error.value)
    assert "bfloat16" in str(error.value)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_weight_is_not_kept_beside_its_packed_form(tied, monkeypatch):
    """And the model says what it said. The embedding is kept: rows of it are looked up."""
    monkeypatch.setattr(linear, "MIN_SIZE", 1)
    config = replace(SMALL, tie_embeddings=tied)
    weights = random_weights(config)
    for way in linear.ways(torch.float32)[1:]:
        monkeypatch.setattr(load, "fastest_way", lambda dtype, way=way: way)
        with folder_with(config, weights) as folder:
            model = load_model(folder).transformer
        packed = [module for module in model.modules() if type(module) is linear.PackedLinear]
        assert len(packed) == 4 * config.num_layers + 1
        kept = [module for module in packed if module.weight.untyped_storage().nbytes() >= module.weight.nbytes]
        assert kept == ([model.lm_head] if tied else [])
        expected = logits(written(config, weights))
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_a_load_takes_little_more_memory_than_what_stays(form, tied, dtype, monkeypatch, tmp_path):
    pack_everything(monkeypatch, load.DTYPES[dtype])
    path, numbers = write_wide(tmp_path, form, tied)
    table = WIDE.vocab_size * WIDE.hidden_size
    kept = table * load.DTYPES[dtype].itemsize // 4  # of the embedding: rows of it are looked up
    assert_load_is_frugal(lambda: load_model(path, dtype), numbers - (0 if tied else table), kept, 4)


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_what_no_memory_holds_is_refused_before_a_number_is_read(form, monkeypatch):
    monkeypatch.setattr(load, "memory_of", lambda device: 1000)
    monkeypatch.setattr(load, "build_transformer", lambda *arguments: pytest.fail("numbers were read"))
    with gguf_with() if form == "gguf" else folder_with() as path:
        message = refused(path)
    numbers = sum(array.size for array in WEIGHTS.values()) + SMALL.max_position * SMALL.head_dim
    assert f"{4 * numbers:,} bytes" in message and "1,000" in message and "float32" in message


# ---- what is read of a folder --------------------------------------------------------------------------------------


OTHERS = ("consolidated.safetensors", "adapter_model.safetensors", "model-00000.safetensors", "zzz.safetensors")


@given(num_shards=st.integers(1, 3), others=st.sets(st.sampled_from((*OTHERS, "model.safetensors"))), data=st.data())
def test_what_the_index_does_not_name_is_not_read(num_shards, others, data):
    """Older parts, adapters, other forms of the weights beside them; and copies of tensors in the wrong part."""
    other = {name: torch.from_numpy(array) for name, array in random_weights(SMALL, seed=1).items()}
    with folder_with(num_shards=num_shards) as folder:
        named = sorted(folder.glob("*.safetensors"))
        if num_shards > 1:
            part = data.draw(st.sampled_from(named), label="part with copies")
            own = {name: tensor.clone() for name, tensor in load_file(part).items()}
            copies = data.draw(st.sets(st.sampled_from(sorted(other))), label="copies")
            save_file({name: own.get(name, other[name]) for name in copies | set(own)}, part)
        for name in others - {path.name for path in named}:
            save_file(other, folder / name)
        (folder / "half.safetensors").write_bytes(b"no weights")
        assert torch.equal(logits(load_model(folder).transformer), logits(written(SMALL, WEIGHTS)))


@given(num_shards=st.integers(2, 3), name=st.sampled_from(sorted(WEIGHTS)))
def test_a_tensor_that_the_index_says_is_elsewhere_is_named(num_shards, name):
    with folder_with(num_shards=num_shards) as folder:
        index = folder / "model.safetensors.index.json"
        parts = json.loads(index.read_text())["weight_map"]
        parts[name] = next(part for part in parts.values() if part != parts[name])
        index.write_text(json.dumps({"weight_map": parts}))
        message = refused(folder)
    assert name in message and parts[name] in message


@given(weight_map=_JSON)
def test_whatever_stands_in_an_index_it_is_refused(weight_map):
    with folder_with(num_shards=2) as folder:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@given(name=st.sampled_from(sorted(WEIGHTS)))
def test_numbers_of_quantised_weights_are_refused_by_their_type(dtype, name):
    with folder_with() as folder:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors")
        message = refused(folder)
    assert name in message and "quantised" in message


@given(
    changed=st.none() | st.integers(0, SMALL.vocab_size * SMALL.hidden_size - 1), dtype=st.sampled_from(("f4", "f2"))
)
def test_an_output_layer_beside_a_tied_embedding_is_used_where_it_is_another(changed, dtype):
    """As in transformers: a config.json that says tied is believed as far as the two are equal."""
    weights = random_weights(replace(SMALL, tie_embeddings=True))
    output = weights["model.embed_tokens.weight"].astype(dtype).astype(np.float32)
    weights["model.embed_tokens.weight"] = output.copy()
    if changed is not None:
        output.reshape(-1)[changed] += 1.0
    expected = written(replace(SMALL, tie_embeddings=changed is None), {**weights, "lm_head.weight": output})
    with folder_with(replace(SMALL, tie_embeddings=True), {**weights, "lm_head.weight": output}) as folder:
        loaded = load_model(folder).transformer
        assert torch.equal(logits(loaded), logits(expected))
        assert loaded.config.tie_embeddings == (changed is None)
        file = folder / "model.safetensors"
        save_file({**load_file(file), "lm_head.weight": torch.ones(3, 8)}, file)
        assert "lm_head.weight has shape [3, 8]" in refused(folder)


# ---- what is no file ------------------------------------------------------------------------------------------------

READ = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
READ += ["special_tokens_map.json", "generation_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(name, kind):
    """The end of a pipe, or of /dev/zero, may never come."""
    with folder_with() as folder:
        (folder / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(folder / name)
        elif kind == "device":
            (folder / name).symlink_to("/dev/zero")
        else:
            (folder / name).mkdir()
        assert f"{name} is no regular file" in refused(folder)


# ---- ids ------------------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(("eos_token_id", "bos_token_id")),
    file=st.sampled_from(("config.json", "generation_config.json", "tokenizer_config.json")),
    value=_JSON | st.sampled_from(([[1]], -1, [-1], [1, None], "1", 1.0, True, 10**30)),
)
def test_an_id_that_is_none_is_refused_by_its_name(name, file, value):
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_ids = name == "eos_token_id" and isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
    with folder_with() as folder:
        fields = {**json_fields(SMALL), name: value} if file == "config.json" else {name: value}
        (folder / "config.json").write_text(json.dumps(json_fields(SMALL)))
        (folder / file).write_text(json.dumps(fields))
        if value is None or is_id or is_ids:
            found = load_model(folder).tokenizer.eos_token_ids
            expected = value if isinstance(value, list) else [] if value is None or name == "bos_token_id" else [value]
            assert found == set(expected)
        else:
            assert f"{name} must be" in refused(folder) or name in refused(folder)


@given(
    said=st.dictionaries(
        st.sampled_from(("tokenizer_config.json", "config.json", "generation_config.json")),
        st.none() | st.integers(0, EOS),
    ),
    named=st.booleans(),
    where=st.sampled_from(("tokenizer_config.json", "special_tokens_map.json")),
    form=st.booleans(),
)
def test_the_end_of_a_text_is_found_wherever_a_folder_names_it(said, named, where, form):
    """The last file that says it counts, null says nothing, and without an id the token's name is looked up."""
    files = {file: {} for file in said}
    files["config.json"] = json_fields(SMALL)
    for file, value in said.items():
        files[file]["eos_token_id"] = value
    if named:
        token = TOKENS[EOS]
        files.setdefault(where, {})["eos_token"] = {"content": token, "special": True} if form else token
    with folder_with() as folder:
        for file, fields in files.items():
            (folder / file).write_text(json.dumps(fields))
        found = load_model(folder).tokenizer
    ids = [said[file] for file in ("generation_config.json", "config.json", "tokenizer_config.json") if file in said]
    ids = [value for value in ids if value is not None]
    assert found.eos_token_ids == {ids[0] if ids else EOS} if ids or named else not found.eos_token_ids
    assert found.special_tokens == ({"eos_token": TOKENS[EOS]} if named else {})
