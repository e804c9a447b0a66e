"""lowvram: low-VRAM, parameter-efficient fine-tuning of GPT-2-class language models.

    import lowvram

    recipe = lowvram.load_recipe("gpt2-lora", overrides={"train.max_steps": 10})
    result = lowvram.run(recipe)

or step by step:

    plan = lowvram.plan(recipe)
    state = lowvram.build(plan.recipe, total_steps=plan.total_steps)
    for metrics in lowvram.train(state, plan.windows()):
        print(metrics.step, metrics.loss)

Names are loaded on first use, so that `import lowvram` costs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LowVRAMError": "lowvram.errors",
    "Plan": "lowvram.plan",
    "Recipe": "lowvram.recipe",
    "RunResult": "lowvram.report",
    "StepMetrics": "lowvram.train",
    "TrainState": "lowvram.train",
    "build": "lowvram.build",
    "load_recipe": "lowvram.recipe",
    "merge": "lowvram.merge",
    "plan": "lowvram.plan",
    "run": "lowvram.run",
    "train": "lowvram.train",
    "train_step": "lowvram.train",
}

__all__ = [
    "LowVRAMError",
    "Plan",
    "Recipe",
    "RunResult",
    "StepMetrics",
    "TrainState",
    "build",
    "load_recipe",
    "merge",
    "plan",
    "run",
    "train",
    "train_step",
]

if TYPE_CHECKING:
    from lowvram.build import build
    from lowvram.errors import LowVRAMError
    from lowvram.merge import merge
    from lowvram.plan import Plan, plan
    from lowvram.recipe import Recipe, load_recipe
    from lowvram.report import RunResult
    from lowvram.run import run
    from lowvram.train import StepMetrics, TrainState, train, train_step


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lowvram' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """`lowvram.run` is the function, also after `lowvram/run.py` has been imported.

    Python sets a submodule as an attribute of its package when it is first imported; where a
    public function has the name, the attribute stays the function's.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
