"""A tokenizer as the token store needs it: plain text in, token ids out, nothing left to chance."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lowvram.errors import DataError

# https://huggingface.co/meta-llama/Meta-Llama-3-8B tokenizer.json
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Encoder:
    """Wraps a fast tokenizer of transformers. One without what is needed: DataError."""

    def __init__(self, tokenizer: Any, append_eos: bool, allow_special_tokens: bool) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} is not a fast one: use a directory "
                "with a tokenizer.json"
            )
        if append_eos and tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, which ends every document: "
                "set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.allow_special_tokens = allow_special_tokens
        self.suffix = [int(tokenizer.eos_token_id)] if append_eos else []
        self.prefix = added_in_front(tokenizer)
        backend = self.backend().to_str()
        self.may_split = may_split(json.loads(backend))
        self.sha256 = hashlib.sha256(backend.encode()).hexdigest()
        ids = tokenizer.get_vocab().values()
        self.vocabulary_size = 1 + max([0, *ids, *self.prefix, *self.suffix])

    def key(self) -> list[Any]:
        """Everything that tokens depend on."""
        return [self.sha256, self.prefix, self.suffix, self.allow_special_tokens]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, by all cores; other threads run meanwhile."""
        # Without the places in the text, which nobody asks for and which take a tenth of the time.
        encodings = self.backend().encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def backend(self) -> Any:
        """The tokenizer of the tokenizers library, with what others may have set for a call of
        their own as we need it; each call of transformers sets all of this anew, too."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not self.allow_special_tokens
        return backend


def added_in_front(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text by itself, such as Llama's <s>."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []


def may_split(backend: dict[str, Any]) -> bool:
    """Whether a text may be cut where `pieces` cuts: the pre-tokenizer must be one of those known,
    and nothing that runs before it may look across a cut."""
    pre_tokenizer = backend["pre_tokenizer"] or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    bytes_ = steps[-1]
    if bytes_.get("type") != "ByteLevel" or bytes_["add_prefix_space"] or backend["normalizer"]:
        return False
    if any(crosses_cuts(token) for token in backend["added_tokens"]):
        return False
    if len(steps) == 1:
        return bool(bytes_["use_regex"])
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA_3},
        "behavior": "Isolated",
        "invert": False,
    }
    return steps[:-1] == [split] and not bytes_["use_regex"]


def crosses_cuts(token: dict[str, Any]) -> bool:
    has_space = any(character.isspace() for character in token["content"])
    return has_space or token["lstrip"] or token["rstrip"] or token["single_word"]
