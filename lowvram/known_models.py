"""Configurations of models that are often asked about, so that no network is needed to probe them.

Facts only, as in the config.json of each on the hub; what is left out there or here is a default of
transformers, or of no weight for memory. A run reads the configuration that comes with the weights.
"""

from __future__ import annotations

import copy
from typing import Any


def _gpt2(layers: int, heads: int, width: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width}


_SMOLLM3_3B = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
    "rope_theta": 5000000.0,
    "rms_norm_eps": 1e-6,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}

_LLAMA_3_2_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}

_MODELS: dict[str, dict[str, Any]] = {
    "distilbert/distilgpt2": _gpt2(6, 12, 768),
    "openai-community/gpt2": _gpt2(12, 12, 768),
    "openai-community/gpt2-medium": _gpt2(24, 16, 1024),
    "openai-community/gpt2-large": _gpt2(36, 20, 1280),
    "openai-community/gpt2-xl": _gpt2(48, 25, 1600),
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3_3B,
    "HuggingFaceTB/SmolLM3-3B-Base": _SMOLLM3_3B,  # what it was post-trained from: the same sizes
    "meta-llama/Llama-3.2-3B": _LLAMA_3_2_3B,
}

# The hub has kept the names of its first models, without an organisation.
_SHORT = {name.split("/")[1]: name for name in _MODELS if "gpt2" in name}


def known_settings(name: str) -> dict[str, Any] | None:
    """A model's configuration by its hub id, as keywords of `AutoConfig.for_model`; None: unknown.

    An organisation's other models, and those of others with the same name, are not known.
    """
    found = _MODELS.get(_SHORT.get(name, name))
    return copy.deepcopy(found)  # transformers writes into what it is given
