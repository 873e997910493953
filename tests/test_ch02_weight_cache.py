"""Chapter 2. The copy of a model's weights: the same model, and never one that is damaged or of another file."""

import json
import os
import time
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minipaged.model import fetch, load, weight_cache
from minipaged.model.load import load_model
from minipaged.model.transformer import ModelConfig
from minipaged.model.weights import source_from_gguf
from model_files import FAMILIES, SMALL, TOKENS, random_weights, write_gguf
from strategies import costly

pytestmark = pytest.mark.ch02

UNTIED = ModelConfig(len(TOKENS), 8, 6, 1, 2, 1, 4, 64, tie_embeddings=False)
TIED = ModelConfig(len(TOKENS), 8, 6, 1, 2, 1, 4, 64, tie_embeddings=True)


@contextmanager
def folder_with_source(config=SMALL, seed=0):
    with TemporaryDirectory() as name:
        source = Path(name) / "model.gguf"
        write_gguf(source, config, random_weights(config, seed) if seed else random_weights(config))
        yield source


def loaded(source, dtype=torch.float32):
    """The model through the cache, and whether it was built again."""
    built = []
    found = weight_cache.load_through_cache(
        source,
        sha256(source.read_bytes()).hexdigest(),
        dtype,
        lambda: built.append(1) or load.read_model(source_from_gguf(source), dtype),
    )
    return found, bool(built)


def copy_of(source, dtype="float32"):
    return source.with_name(f"{source.stem}.{dtype}.safetensors")


def assert_same(found, source, dtype=torch.float32):
    transformer, tokenizer = found
    expected = load.read_model(source_from_gguf(source), dtype)
    ours, theirs = transformer.state_dict(), expected.transformer.state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype, name
    assert transformer.config == expected.transformer.config
    assert torch.equal(transformer.cos, expected.transformer.cos)
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert tokenizer.encode("ab 2026") == expected.tokenizer.encode("ab 2026")
    assert tokenizer.eos_token_ids == expected.tokenizer.eos_token_ids
    assert tokenizer.chat_template == expected.tokenizer.chat_template
    assert tokenizer.bos_token_id == expected.tokenizer.bos_token_id


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [SMALL, UNTIED, TIED], ids=["small", "untied", "tied"])
def test_a_copy_is_made_once_and_is_the_same_model(config, dtype):
    with folder_with_source(config) as source:
        for time in range(3):
            found, rebuilt = loaded(source, dtype)
            assert rebuilt == (time == 0)
            assert_same(found, source, dtype)
            tied = found[0].lm_head.weight is found[0].embed_tokens.weight
            assert tied == config.tie_embeddings
        assert [path.name for path in source.parent.iterdir() if path != source] == [
            copy_of(source, str(dtype).removeprefix("torch.")).name
        ], "something was left behind"


@contextmanager
def folder_with_family(name, seed, tied):
    family = FAMILIES[name]
    config = replace(SMALL, tie_embeddings=tied, **family.config)
    weights = random_weights(config, seed)
    if name == "llama 3.1":
        weights["rope_freqs.weight"] = np.array(config.rope_factors, np.float32)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "model.gguf"
        write_gguf(source, config, weights, architecture=family.architecture, **(family.gguf or {}))
        yield source, config


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.architecture])
@costly(1 / 12)
@given(
    seed=st.integers(0, 9),
    tied=st.booleans(),
    which=st.integers(0, 99),
    where=st.floats(0.0, 1.0, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_copy_of_each_family_is_the_same_model_and_a_damaged_one_is_made_anew(name, seed, tied, which, where, bit):
    with folder_with_family(name, seed, tied) as (source, config):
        for rebuilt in (True, False):
            found, built = loaded(source)
            assert built == rebuilt
            assert found[0].config == config
            assert_same(found, source)
        data = bytearray(copy_of(source).read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")  # of the numbers
        header = json.loads(data[8:begin])
        tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        first, end = tensors[which % len(tensors)]  # small ones are as likely as large ones
        data[begin + first + int(where * (end - first))] ^= 1 << bit
        copy_of(source).write_bytes(data)
        found, built = loaded(source)
        assert built
        assert_same(found, source)
        assert not loaded(source)[1], "the good copy did not take the place of the damaged one"


def test_the_weights_are_mapped_and_writing_to_them_leaves_the_file_alone():
    with folder_with_source() as source:
        loaded(source)
        (transformer, _), _ = loaded(source)
        transformer.norm.weight.fill_(7.0)
        assert_same(loaded(source)[0], source)


def test_a_copy_of_another_source_is_made_anew():
    with folder_with_source() as source:
        loaded(source)
        weights = random_weights(SMALL)
        write_gguf(source, SMALL, {name: array + 1 for name, array in weights.items()})
        found, rebuilt = loaded(source)
        assert rebuilt
        assert_same(found, source)
        assert not loaded(source)[1]


def test_a_copy_of_another_version_is_made_anew(monkeypatch):
    with folder_with_source() as source:
        loaded(source)
        monkeypatch.setattr(weight_cache, "FORMAT", "minipaged 0")
        assert loaded(source)[1]


@costly(1 / 2)
@given(where=st.floats(0.0, 1.0, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_that_flipped_anywhere_is_noticed(where, bit):
    with folder_with_source(TIED) as source:
        loaded(source)
        data = bytearray(copy_of(source).read_bytes())
        data[int(where * len(data))] ^= 1 << bit
        copy_of(source).write_bytes(data)
        found, rebuilt = loaded(source)
        if not rebuilt:  # a space of the header's padding, say, that says nothing
            assert_same(found, source)
        assert_same(loaded(source)[0], source)


@costly(1 / 2)
@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_copy_that_was_cut_is_made_anew(share):
    with folder_with_source(TIED) as source:
        loaded(source)
        data = copy_of(source).read_bytes()
        copy_of(source).write_bytes(data[: int(share * len(data))])
        found, rebuilt = loaded(source)
        assert rebuilt
        assert_same(found, source)
        assert not loaded(source)[1], "the good copy did not take the place of the bad one"


def test_numbers_that_were_changed_with_a_whole_header_around_them_are_noticed():
    with folder_with_source() as source:
        loaded(source)
        with safe_open(copy_of(source), framework="pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        tensors["norm.weight"][0] += 1
        save_file(tensors, copy_of(source), about)
        assert loaded(source)[1]


def test_a_configuration_that_was_changed_is_noticed():
    with folder_with_source() as source:
        loaded(source)
        with safe_open(copy_of(source), framework="pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        about["config"] = json.dumps({**json.loads(about["config"]), "rope_theta": 5.0})
        save_file(tensors, copy_of(source), about)
        assert loaded(source)[1]


def test_where_no_copy_can_be_kept_all_goes_on_without(monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_cache, "save_file", full)
    with folder_with_source() as source:
        for _ in range(2):
            found, rebuilt = loaded(source)
            assert rebuilt
            assert_same(found, source)
        assert list(source.parent.iterdir()) == [source]


def test_smollm2_goes_through_the_cache_and_other_files_do_not(monkeypatch):
    with folder_with_source() as source:
        load_model(source)
        assert list(source.parent.iterdir()) == [source]
        monkeypatch.setattr(fetch, "fetch", lambda: source)
        monkeypatch.setattr(fetch, "GGUF_SHA256", sha256(source.read_bytes()).hexdigest())
        load_model("smollm2-135m")
        assert copy_of(source).exists()


@given(where=st.floats(0, 1, exclude_max=True), num_bytes=st.integers(1, 64))
def test_a_damaged_model_is_refused_also_where_a_copy_is_whole(where, num_bytes):
    with folder_with_source() as source, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "fetch", lambda: source)
        patch.setattr(fetch, "GGUF_SHA256", sha256(source.read_bytes()).hexdigest())
        load_model("smollm2-135m")
        data = bytearray(source.read_bytes())
        start = int(where * len(data))
        data[start : start + num_bytes] = bytes(byte ^ 0xFF for byte in data[start : start + num_bytes])
        source.write_bytes(data)
        with pytest.raises(fetch.FetchError, match=f"{sha256(data).hexdigest()}.*fetch --force"):
            load_model("smollm2-135m")


def test_half_a_copy_that_a_killed_process_left_is_swept():
    with folder_with_source() as source:
        left, fresh = source.parent / ".fetch-killed", source.parent / ".fetch-running"
        for folder, age in ((left, 3600), (fresh, 0)):
            folder.mkdir()
            (folder / "half.safetensors").write_bytes(b"half")
            for path in (folder / "half.safetensors", folder):
                os.utime(path, (time.time() - age, time.time() - age))
        loaded(source)
        assert not left.exists() and fresh.exists()
