"""Optimizers and learning-rate schedules. The only module that knows bitsandbytes.

The 8-bit optimizers are used without bitsandbytes' GlobalOptimManager: it is a process-wide
table keyed by `id(parameter)` that is never cleared, so a model built later can inherit the
settings of one that is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from lowvram.memory.measure import is_card

OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "sgd"]
ScheduleName = Literal["cosine", "linear", "constant"]

# bitsandbytes keeps the state of smaller tensors in 32 bits; so do we when we count bytes.
MIN_8BIT_SIZE = 4096


def make_optimizer(
    name: OptimizerName,
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.Optimizer:
    """An optimizer over `parameters`; matrices decay, vectors (biases, norms) do not.

    Adafactor and SGD have no `betas`; SGD runs without momentum, hence without state.
    """
    groups = _decay_groups(parameters, weight_decay)
    return _FACTORIES[name](groups, learning_rate, betas)


def _decay_groups(
    parameters: Iterable[torch.nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(groups: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    # The fused kernel keeps no temporary copy of the parameters; foreach keeps one.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def _adafactor(groups: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=lr)


def _sgd(groups: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr)


def _bitsandbytes(class_name: str, *, paged: bool = False) -> Callable[..., torch.optim.Optimizer]:
    def factory(groups: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        import bitsandbytes

        # Pages go between a card and the host. Elsewhere the two classes do the same, but the
        # paged one warns of it in its first step.
        on_card = any(is_card(p.device) for group in groups for p in group["params"])
        optimizer_class = getattr(
            bitsandbytes.optim, f"Paged{class_name}" if paged and on_card else class_name
        )
        optimizer: torch.optim.Optimizer = optimizer_class(
            groups, lr=lr, betas=betas, min_8bit_size=MIN_8BIT_SIZE
        )
        return optimizer

    return factory


_FACTORIES: dict[OptimizerName, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw8bit": _bitsandbytes("AdamW8bit", paged=True),
    "lion8bit": _bitsandbytes("Lion8bit"),
    "adafactor": _adafactor,
    "sgd": _sgd,
}


def learning_rate_at(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, schedule: ScheduleName
) -> float:
    """The learning rate of optimizer step `step` (counted from 0).

    Warm-up rises linearly as peak * (step + 1) / (warmup_steps + 1), so that the first step
    already learns. After it, with t = (step - warmup_steps) / (total_steps - warmup_steps):
    linear gives peak * (1 - t), cosine peak * (1 + cos(pi t)) / 2, constant peak. The last
    step has t < 1 and is never at zero.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    t = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1.0 - t)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * t))
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of optimizer state by dtype, each storage counted once (maps are shared)."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                name = str(value.dtype).removeprefix("torch.")
                sizes[name] = sizes.get(name, 0) + value.numel() * value.element_size()
        elif isinstance(value, dict):
            for item in value.values():
                count(item)

    for state in optimizer.state.values():
        count(state)
    return sizes
