"""A second opinion on every family: transformers saves a small model of random weights, and we must say the same.

    pytest -m oracle -s tests/test_oracle_families.py        prints the figures

Folders are what transformers writes. GGUF files are written here as llama.cpp's converter writes them. Tokenizers are
trained on a few sentences with the family's own pattern.
"""

import json
import os
from functools import cache
from itertools import product

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minipaged import LLM, SamplingParams
from minipaged.model.batch import make_batch
from minipaged.model.families import config_from_json
from minipaged.model.load import load_model
from minipaged.model.recompute import RecomputeCache
from minipaged.model.tokenizer_files import tokenizer_from_folder
from model_files import GGUF_NAMES, permute
from test_oracle import CHAT, CODE, PROSE

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing is looked up anywhere
transformers = pytest.importorskip("transformers", reason="pip install -e '.[oracle]'")
pytestmark = pytest.mark.oracle

LARGEST_DIFFERENCE = 1e-4
LENGTHS = (1, 5, 40, 120)
STEPS = 16
WINDOW = 24

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}

# name -> model_type, splitter, what differs
CASES = {
    "llama": ("llama", "llama-bpe", {}),
    "llama3": ("llama", "llama-bpe", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama linear": ("llama", "smollm", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama yarn": ("llama", "default", {"rope_parameters": YARN}),
    "mistral": ("mistral", "tekken", {"sliding_window": WINDOW}),
    "mistral without window": ("mistral", "tekken", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows in half of the layers": ("qwen2", "qwen2", MIXED),
    "qwen2 yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "qwen2", {"head_dim": 16}),
    "qwen3 tied, with windows": ("qwen3", "qwen2", {"head_dim": 16, "tie_word_embeddings": True, **MIXED}),
    "smollm3": ("smollm3", "llama-bpe", {}),
}


# ---- tokenizers ------------------------------------------------------------------------------------------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# As the families' own tokenizer.json files have them.
PRE_TOKENIZERS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)],
    "gpt-2": [pre_tokenizers.ByteLevel(False, use_regex=True)],
    "llama-bpe": [split(LLAMA3_WORDS), pre_tokenizers.ByteLevel(False, use_regex=False)],
    "qwen2": [split(LLAMA3_WORDS.replace("{1,3}", "")), pre_tokenizers.ByteLevel(False, use_regex=False)],
    "tekken": [split(TEKKEN), pre_tokenizers.ByteLevel(False, use_regex=False)],
    # llama.cpp's own choice for files that name none (no tokenizer.json has it).
    "default": [
        split(r"[\p{P}\$\+<=>\^~\|]+"), split(GPT2), split(r"\p{N}+"), split("[0-9][0-9][0-9]"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ],
}  # fmt: skip
BOS, EOS = "<|begin|>", "<|im_end|>"


@cache
def trained(splitter):
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitter in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[splitter])
    tokenizer.decoder = decoders.ByteLevel()
    if splitter == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = [AddedToken(token, special=True) for token in (BOS, EOS, "<|im_start|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*PROSE.split("\n"), *CODE.split("\n"), *CHAT.split("\n"), "1234567890 2026"], trainer
    )
    if splitter in ("llama-bpe", "tekken"):
        begin = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return tokenizer


STRINGS = [
    *PROSE.split(". ")[:14], *CODE.split("\n")[:8], CHAT, PROSE, "", " ", "  ", "\n", "\n\n \t", "a", "1", "12", "1234",
    "3.14159 is 22/7?", "don't DON'T we'll I'M", "CamelCaseWords andMORE", "x+=1; y==2 || z<=3", "http://a.b/c?d=e&f",
    "naïve café résumé", "cafe\u0301", "日本語 の 文", "Привет, мир 2024", "مرحبا 123",
    "😀👩‍👩‍👧", "\u00a0nbsp\u2003em",
    "$5 ~ 10^6 <b>", "½ ²³ Ⅷ ٣", "tabs\t\tand  two  spaces", "trailing  ", "\r\nwindows\r\n", "ǅ ʰ a\u0308bc",
    "<|im_start|>user\nhi<|im_end|>", "//path/to/", "a/b\n/c",
]  # fmt: skip
assert len(STRINGS) >= 50


# ---- models and files ------------------------------------------------------------------------------------------------


@cache
def their_model(name):
    family, splitter, changed = CASES[name]
    tokenizer = trained(splitter)
    known = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    config = transformers.AutoConfig.for_model(
        family, **{**SIZES, **known, "pad_token_id": None, "vocab_size": tokenizer.get_vocab_size(), **changed}
    )
    generator = torch.Generator().manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # do not stop at the end of a text
    return model.eval()


def their_tokenizer(splitter):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained(splitter), bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")

    @cache
    def written(name, form):
        splitter = CASES[name][1]
        path = root / f"{name.replace(' ', '_')}{'.gguf' if form == 'gguf' else ''}"
        if form == "gguf":
            write_gguf(path, their_model(name), byte_level(splitter))
        else:
            their_model(name).save_pretrained(path)
            their_tokenizer(splitter).save_pretrained(path)
        return path

    return written


def gguf_name(name):
    if not name.startswith("model.layers."):
        return f"{GGUF_NAMES[name.removesuffix('.weight')]}.weight"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    stem, _, kind = rest.rpartition(".")
    known = {**GGUF_NAMES, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    return f"blk.{layer}.{known[stem]}.{kind}"


def write_gguf(path, model, add_tokenizer, raw=None):
    """As convert_hf_to_gguf.py does. raw: name -> (bytes, type) of tensors that are written as they are."""
    config, raw = model.config, raw or {}
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
        kinds = getattr(config, "layer_types", None)  # llama.cpp writes such a list for families that mix them
        if kinds:
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    rope = config.rope_parameters
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name in raw:
            writer.add_tensor(gguf_name(name), raw[name][0], raw_dtype=raw[name][1])
            continue
        array = tensor.numpy()
        if architecture in ("llama", "smollm3") and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = permute(array, len(array) // head_dim)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(splitter):
    """Adds the fields of this tokenizer to a file."""

    def add(writer):
        tokenizer = trained(splitter)
        tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        merges = [" ".join(pair) for pair in merges_of(tokenizer)]
        writer.add_tokenizer_model("gpt2")
        if splitter != "default":
            writer.add_tokenizer_pre(splitter)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(tokens.index(BOS))
        writer.add_eos_token_id(tokens.index(EOS))

    return add


def merges_of(tokenizer):
    return json.loads(tokenizer.to_str())["model"]["merges"]


def llama3_factors(rope, head_dim):
    """LlamaModel.generate_extra_tensors, in its own words."""
    base, dim = rope["rope_theta"], head_dim
    freqs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    low_wavelen, high_wavelen = context / low, context / high
    factors = []
    for freq in freqs:
        wavelen = 2 * torch.pi / freq
        if wavelen < high_wavelen:
            factors.append(1)
        elif wavelen > low_wavelen:
            factors.append(factor)
        else:
            smooth = (context / wavelen - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def prompts(vocab_size):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length).tolist() for length in LENGTHS]


def largest_difference(ours, theirs):
    found = 0.0
    for token_ids in prompts(theirs.config.vocab_size):
        with torch.inference_mode():
            mine = ours.logits(ours(make_batch([token_ids], [0]), RecomputeCache()))
            expected = theirs(torch.tensor([token_ids])).logits[0]
        assert mine.shape == expected.shape == (len(token_ids), theirs.config.vocab_size)
        found = max(found, (mine - expected).abs().max().item())
    return found


def greedy(theirs, token_ids):
    out = theirs.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=STEPS,
    )
    return out[0, len(token_ids) :].tolist()


FORMS = [(name, form) for name in CASES for form in ("folder", "gguf")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_logits_and_greedy_tokens_agree(name, form, files):
    theirs, model = their_model(name), load_model(files(name, form))
    difference = largest_difference(model.transformer, theirs)
    print(f"\n{name}, {form}: largest difference {difference:.1e}", end="")
    assert difference <= LARGEST_DIFFERENCE
    params = SamplingParams(max_tokens=STEPS, ignore_eos=True)
    for cache_kind in ("paged", "contiguous"):
        llm = LLM(model, cache=cache_kind, block_size=4, max_model_len=160, num_blocks=240, max_num_batched_tokens=64)
        requests = [{"prompt_token_ids": token_ids} for token_ids in prompts(theirs.config.vocab_size)]
        found = [output.outputs[0].token_ids for output in llm.generate(requests, params, progress=False)]
        assert found == [greedy(theirs, request["prompt_token_ids"]) for request in requests], cache_kind


def test_without_its_windows_a_model_says_something_else(files):
    """Otherwise the cases with windows would show nothing."""
    model = load_model(files("mistral", "folder"))
    for layer in model.transformer.layers:
        layer.sliding_window = None
    assert largest_difference(model.transformer, their_model("mistral")) > 0.1


@pytest.mark.parametrize("splitter", ["llama-bpe", "qwen2", "tekken", "smollm", "default"])
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_token_ids_agree(splitter, form, files):
    name = next(name for name, case in CASES.items() if case[1] == splitter)
    ours, theirs = load_model(files(name, form)).tokenizer, their_tokenizer(splitter)
    for text in STRINGS:
        expected = theirs(text).input_ids
        assert ours.encode(text) == expected, repr(text)
        assert ours.decode(expected) == theirs.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


# ---- tokenizers of folders -------------------------------------------------------------------------------------------


@cache
def metaspace(form):
    """Llama 2's kind: a space is a letter, and a letter without a token is spelt by its bytes.

    form: what puts the space before a text: a normalizer (Llama 2), a pre-tokenizer (newer files), or nothing (Gemma).
    """
    spaces = [normalizers.Replace(" ", "▁")]
    before = [normalizers.Prepend("▁"), *spaces] if form == "normalizer" else spaces
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(before)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator([*PROSE.split("\n"), *CODE.split("\n")], trainer)
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if form == "pre-tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(before)
    tokenizer.decoder = decoders.Sequence(steps if form == "nothing" else [*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", BOS, EOS)])
    begin = (BOS, vocab[BOS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return tokenizer


KINDS = {name: lambda name=name: trained(name) for name in ("gpt-2", "llama-bpe", "qwen2", "tekken", "smollm")}
KINDS |= {
    f"metaspace, {form}": lambda form=form: metaspace(form) for form in ("normalizer", "pre-tokenizer", "nothing")
}


PLAIN_TEXT = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def saved(kind, folder, template=None):
    """The folder as transformers saves it, and their tokenizer, read from there."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), bos_token=BOS, eos_token=EOS)
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_folder_saves_is_read_as_transformers_reads_it(kind, tmp_path):
    """Token ids of 50 tricky strings; their text, also as it streams; and their text behind a prompt."""
    theirs, ours = saved(kind, tmp_path), tokenizer_from_folder(tmp_path)
    assert theirs("a").input_ids and len(STRINGS) >= 50
    prompt = theirs(PROSE[:40]).input_ids
    for text in STRINGS:
        expected = theirs(text).input_ids
        assert ours.encode(text) == expected, repr(text)
        assert ours.decode(expected) == theirs.decode(expected, **PLAIN_TEXT)
        stream = ours.stream()
        assert "".join([*map(stream.push, expected), stream.finish()]) == ours.decode(expected)
        plain = theirs(text, add_special_tokens=False).input_ids
        whole, before = theirs.decode(prompt + plain, **PLAIN_TEXT), theirs.decode(prompt, **PLAIN_TEXT)
        assert before + ours.decode_behind(prompt, plain) == whole, repr(text)


# The forms of the six kinds of templates that most models have: what each needs of what renders it.
TEMPLATES = {
    # Qwen: a system message of its own, tools, and what jinja2 calls a namespace.
    "chatml": """
{%- if tools %}{{ '<|im_start|>system\n# Tools' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if message.role == 'user' %}{%- set ns.last = index %}{%- break %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'assistant' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if ns.last == 0 %}{{ '<think>' }}{% endif %}
{%- endif %}
""",
    # Llama 3: it writes what begins a text, and the date.
    "llama3": """
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start|>system<|end|>\n\n" }}{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}{{- system }}{{- eos_token }}
{%- for message in messages %}
{{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}
""",
    # Mistral: roles take turns, or it refuses.
    "mistral": """
{%- if messages[0]["role"] == "system" %}{%- set system = messages[0]["content"] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- bos_token }}
{%- for message in rest %}
{%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}{{- raise_exception("no turns") }}{%- endif %}
{%- if message["role"] == "user" %}
{%- if loop.last and system is defined %}{{- "[INST] " + system + "\n\n" + message["content"] + "[/INST]" }}
{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
{%- else %}{{- " " + message["content"]|trim + eos_token }}{%- endif %}
{%- endfor %}
""",
    # Gemma: other names for roles, and no system message.
    "gemma": """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<turn>' + role + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<turn>model\n'}}{% endif %}
""",
    # Zephyr, TinyLlama: blocks on lines of their own, which are trimmed.
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
    {{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    # SmolLM3: the model's own words are marked, for training.
    "smollm3": """
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" %}
{% generation %}{{ "<|im_start|>assistant\n" + message.content.lstrip("\n") + "<|im_end|>\n" }}{% endgeneration %}
{%- elif message.role not in ["user", "system"] %}{% continue %}
{%- else %}{{ "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}{% endif %}
{%- endfor %}
{{- {"role": messages[-1].role, "a": ["<", "é", "'"], "content": messages[-1].content} | tojson(indent=2) }}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% if not enable_thinking %}{{ "<think>" }}{% endif %}
{%- endif %}
""",
}
ROLES = [["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user", "tool"]]
ROLES += [["user", "user"], ["assistant"]]
CONTENTS = ["Hello", '  <b>it\'s "5 < 6"</b> & \n', "日本語 😀", f"{EOS}{BOS}", "", "{{ 1 }}"]


def rendered(render):
    """What comes out, or that it is refused."""
    try:
        return render()
    except Exception:
        return "refused"


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe", "metaspace, normalizer", "metaspace, nothing"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_what_transformers_makes_of_them(name, kind, tmp_path):
    """As text and as tokens: with what begins a text where the template writes it, and there alone."""
    theirs, ours = saved(kind, tmp_path, TEMPLATES[name]), tokenizer_from_folder(tmp_path)
    refused, told = 0, {"add_generation_prompt": True, "return_dict": False}
    for roles, shift in product(ROLES, range(3)):
        contents = CONTENTS[shift:] + CONTENTS[:shift]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        text = rendered(lambda messages=messages: theirs.apply_chat_template(messages, tokenize=False, **told))
        prompt = rendered(lambda messages=messages: ours.chat_prompt(messages))
        refused += text == "refused"
        if text == "refused":
            assert prompt == "refused"
        else:
            assert prompt["prompt"] == text
            assert prompt["prompt_token_ids"] == theirs.apply_chat_template(messages, **told)
    assert refused <= 9


# ---- config.json -----------------------------------------------------------------------------------------------------

ORIGINAL = {"original_max_position_embeddings": 64}
SCALINGS = [
    None,
    {"rope_type": "default"},
    {"type": "linear", "factor": 2.0},
    {**LLAMA3, "rope_theta": 1e4},
    {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 8.0, **ORIGINAL, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
]
ABSENT = object()


@given(
    family=st.sampled_from(("llama", "mistral", "qwen2", "qwen3", "smollm3")),
    scaling=st.sampled_from(SCALINGS),
    where=st.sampled_from(("rope_scaling", "rope_parameters", "both")),
    changes=st.fixed_dictionaries(
        {
            "rope_theta": st.sampled_from((ABSENT, 1e4, 5e5)),
            "sliding_window": st.sampled_from((ABSENT, None, 7)),
            "use_sliding_window": st.sampled_from((ABSENT, False, True)),
            "max_window_layers": st.sampled_from((ABSENT, 0, 2, 9)),
            "head_dim": st.sampled_from((ABSENT, 8)),
            "tie_word_embeddings": st.sampled_from((ABSENT, False, True)),
            "no_rope_layer_interval": st.sampled_from((ABSENT, 2)),
            "no_rope_layers": st.sampled_from((ABSENT, [1, 0, 1, 1])),
            "num_hidden_layers": st.sampled_from((4, 32)),
        }
    ),
)
def test_a_config_is_read_as_transformers_reads_it(tmp_path_factory, family, scaling, where, changes):
    """Also where fields are absent, or null: transformers' classes have defaults of their own."""
    if changes["num_hidden_layers"] != 4:
        changes["no_rope_layers"] = ABSENT
    fields = {**SIZES, "model_type": family, "vocab_size": 100, **changes}
    fields |= dict.fromkeys(("rope_scaling", "rope_parameters") if where == "both" else (where,), scaling)
    fields = {name: value for name, value in fields.items() if value is not ABSENT}
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    ours, theirs = config_from_json(folder / "config.json"), transformers.AutoConfig.from_pretrained(folder)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config=theirs)
    pairs = torch.arange(0, ours.head_dim, 2, dtype=torch.float64) / ours.head_dim
    frequency = ours.rope_theta**-pairs / torch.tensor(ours.rope_factors or (1.0,), dtype=torch.float64)
    torch.testing.assert_close(frequency, rotary.inv_freq.double(), rtol=1e-5, atol=0.0)
    assert ours.rope_attention_factor == pytest.approx(rotary.attention_scaling)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None) if family != "llama" else None
    if family == "smollm3" and not theirs.use_sliding_window:
        window = None
    expected = [window if kind == "sliding_attention" else None for kind in kinds]
    assert list(ours.sliding_windows or [None] * len(kinds)) == expected
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.head_dim, ours.num_kv_heads) == (head_dim, theirs.num_key_value_heads)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    if family == "smollm3":
        assert ours.no_rope_layers == tuple(i for i, turned in enumerate(theirs.no_rope_layers) if not turned)


# ---- tied, and yet not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_same", [True, False])
def test_an_output_layer_beside_a_tied_embedding(is_same, tmp_path, files):
    """transformers ties the two where they are equal, and otherwise does not, whatever config.json says."""
    path = files("llama", "folder")
    fields = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    if is_same:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert largest_difference(load_model(tmp_path).transformer, theirs) <= LARGEST_DIFFERENCE
    assert load_model(tmp_path).transformer.config.tie_embeddings == is_same


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_in_a_gguf_file_gives_the_ids_of_sentencepiece(prefix, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install -e '.[oracle]'")
    (tmp_path / "text").write_text("\n".join([PROSE, CODE, CHAT]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm"), vocab_size=500, model_type="bpe",
        byte_fallback=True, character_coverage=0.99, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ids = range(theirs.get_piece_size())
    kinds = [6 if theirs.is_byte(i) else 3 if theirs.is_control(i) else 2 if theirs.is_unknown(i) else 1 for i in ids]
    config = transformers.LlamaConfig(**SIZES, vocab_size=len(ids))
    model = transformers.LlamaForCausalLM(config)
    path = tmp_path / "model.gguf"

    def add_tokenizer(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([theirs.id_to_piece(i) for i in ids])
        writer.add_token_scores([theirs.get_score(i) for i in ids])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(theirs.bos_id())
        writer.add_eos_token_id(theirs.eos_id())
        writer.add_add_space_prefix(prefix)

    write_gguf(path, model, add_tokenizer)
    ours = load_model(path).tokenizer
    texts = [text for text in STRINGS if text and "<|" not in text]
    assert len(texts) >= 45
    for text in texts:
        expected = theirs.encode(text)
        assert ours.encode(text) == [theirs.bos_id(), *expected], repr(text)
        assert ours.decode(expected) == theirs.decode(expected), repr(text)


# ---- K-quants --------------------------------------------------------------------------------------------------------


def random_blocks(rng, rows, columns, kind):
    """Blocks of 256 numbers: every bit is drawn, but for those of the factors, which are small numbers."""
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // 256, num_bytes), dtype=np.uint8)
    largest = 6e-5 if kind == gguf.GGMLQuantizationType.Q4_K else 2e-5
    factors = rng.uniform(largest / 4, largest, (rows, columns // 256, 2)).astype(np.float16).view(np.uint8)
    if kind == gguf.GGMLQuantizationType.Q4_K:  # d and dmin come first
        blocks[..., :4] = factors
    else:  # Q6_K: d comes last
        blocks[..., -2:] = factors[..., :2]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize(("family", "splitter"), [("llama", "llama-bpe"), ("qwen2", "qwen2"), ("qwen3", "qwen2")])
def test_a_q4_k_m_file_gives_the_logits_of_its_dequantised_weights(family, splitter, tmp_path):
    """The mix that people have: Q4_K, and Q6_K in the embedding, W^V and W^down of some layers."""
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    vocab_size = trained(splitter).get_vocab_size()
    config = transformers.AutoConfig.for_model(family, **sizes, vocab_size=vocab_size, tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rng, raw = np.random.default_rng(0), {}
    state = theirs.state_dict()
    for name, tensor in state.items():
        if tensor.dim() != 2 or name == "lm_head.weight":
            continue
        is_fine = "embed" in name or ("layers.0" in name and name.endswith(("v_proj.weight", "down_proj.weight")))
        kind = gguf.GGMLQuantizationType.Q6_K if is_fine else gguf.GGMLQuantizationType.Q4_K
        raw[name] = random_blocks(rng, *tensor.shape, kind), kind
        numbers = gguf.dequantize(*raw[name])
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            order = permute(np.arange(len(numbers))[:, None], len(numbers) // 64)[:, 0]  # the file's row -> theirs
            numbers[order] = numbers.copy()
        tensor.copy_(torch.from_numpy(numbers))
    write_gguf(tmp_path / "model.gguf", theirs, byte_level(splitter), raw)
    difference = largest_difference(load_model(tmp_path / "model.gguf").transformer, theirs)
    print(f"\n{family}, Q4_K and Q6_K: largest difference {difference:.1e}", end="")
    assert difference <= LARGEST_DIFFERENCE
