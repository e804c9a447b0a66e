"""lowvram: low-VRAM, parameter-efficient fine-tuning of GPT-2-class language models.

    import lowvram
    recipe = lowvram.load_recipe("gpt2-lora", overrides={"train.max_steps": 10})
    result = lowvram.run(recipe)

Names are loaded on first use, so that `import lowvram` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load_recipe": "lowvram.recipe",
}

__all__ = ["load_recipe"]

if TYPE_CHECKING:
    from lowvram.recipe import load_recipe


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lowvram' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
