"""SmolLM2 as a Hugging Face folder, for peers that read nothing else: the weights are the very ones that we run."""

import os
from pathlib import Path

from minipaged.model import fetch


def exported_model() -> Path:
    """A folder with config.json, tokenizer.json and model.safetensors (float32), made once. Raises ValueError where
    transformers, which writes it, is not installed."""
    folder = fetch.smollm2_path().parent / "smollm2-135m-hf"
    if (folder / "model.safetensors").exists():
        return folder
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError("peers need the model in another format: pip install -e '.[oracle]'") from error
    path = fetch.fetch()
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del read.config.quantization_config  # dequantised by now; transformers would not write it otherwise
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    scratch = folder.with_suffix(".tmp")
    model.save_pretrained(scratch)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(scratch)
    scratch.rename(folder)
    return folder
