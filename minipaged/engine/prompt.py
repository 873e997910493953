"""Chapter 10. A prompt as users write it: text, or tokens."""

import reprlib

from minipaged.engine.arguments import items, text, whole
from minipaged.model.tokenizer import TextTokenizer, TokenPrompt

Prompt = str | TokenPrompt
Prompts = Prompt | list[Prompt] | list[str]


def read_prompt(prompt: object, tokenizer: TextTokenizer, vocab_size: int) -> tuple[list[int], str | None]:
    """The tokens of a prompt, and its salt. Raises ValueError for what is no prompt, or no token of the model."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt), None
    if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
        raise ValueError(f"a prompt is a string or {{'prompt_token_ids': [...]}}, got {reprlib.repr(prompt)}")
    token_ids = [whole("prompt_token_ids", token) for token in items("prompt_token_ids", prompt["prompt_token_ids"])]
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {token} does not exist: the vocabulary has 0 to {vocab_size - 1}")
    text("prompt", prompt.get("prompt", ""))
    salt = prompt.get("cache_salt")
    return token_ids, None if salt is None else text("cache_salt", salt)
