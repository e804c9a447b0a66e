"""Optimizer steps one tensor at a time: for weights in bf16, and inside a backward pass.

A step of all tensors at once needs all gradients. One at a time, each gradient can go as soon as it
has been used, and the one tensor can be in fp32 meanwhile, where its update is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from lowvram.rounding import stochastic_round_


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """As optimizer.step(), but weights in bf16 are updated in fp32 and rounded by chance."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.dtype == torch.float32 for p in parameters):
        optimizer.step()
        return
    for parameter in parameters:
        if parameter.grad is not None:
            step_tensor(optimizer, parameter)


@torch.no_grad()
def step_tensor(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
    """Update one tensor by its gradient, which is given up."""
    groups = optimizer.param_groups
    (group,) = (g for g in groups if any(p is parameter for p in g["params"]))
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        if parameter.dtype == torch.float32:
            optimizer.step()
        else:
            _step_in_fp32(optimizer, parameter)
    finally:
        optimizer.param_groups = groups
        parameter.grad = None


def _step_in_fp32(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
    """The parameter is an fp32 tensor for as long as the optimizer sees it."""
    assert parameter.grad is not None
    weights, gradient = parameter.data, parameter.grad.float()
    parameter.grad = None
    parameter.data = weights.float()
    parameter.grad = gradient
    del gradient
    try:
        optimizer.step()
        exact = parameter.data
    finally:
        parameter.grad = None
        parameter.data = weights
    stochastic_round_(weights, exact)


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """As optimizer.load_state_dict(saved), which would round states to the dtype of the weights."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict(saved)
    for number, values in saved["state"].items():
        parameter = parameters[number]
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                state = optimizer.state[parameter]
                state[key] = value.to(state[key].device, copy=True)


class FusedBackward:
    """Updates each tensor as soon as its gradient is complete, so that gradients never pile up.

    Between `begin` and `end` is one backward pass. A tensor whose gradient is not finite is left
    as it is. Gradients cannot be clipped to their common norm, which is known at the end only.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.stepping = False
        """Between the first update of a backward pass and its end."""
        self._updates = True
        self._norms: list[torch.Tensor] = []
        self._spoilt = False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._use)

    def begin(self) -> None:
        self._norms, self._spoilt, self.stepping = [], False, False

    def end(self) -> tuple[float, Literal["nonfinite"] | None]:
        """The norm of all gradients there were, and whether some tensor was left as it was."""
        norms, spoilt = self._norms, self._spoilt
        self.begin()
        norm = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
        return norm, "nonfinite" if spoilt else None

    @contextmanager
    def without_updates(self) -> Iterator[None]:
        """Gradients come and go, weights stay."""
        self._updates = False
        try:
            yield
        finally:
            self._updates = True

    def _use(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._norms.append(norm)
        if not math.isfinite(norm.item()):
            self._spoilt = True
        elif self._updates:
            self.stepping = True
            step_tensor(self.optimizer, parameter)  # type: ignore[arg-type]
        parameter.grad = None
