"""Dropout for CPUs: how often, what it keeps, and that forward and backward agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_gpt2
from torch import nn

from lowvram.build import build
from lowvram.dropout import FastDropout, keep_mask, keep_probability, speed_up_dropout


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_elements_are_kept_as_often_as_asked(p: float) -> None:
    """Of a million, within five standard deviations; at 0 and 1 all and none."""
    torch.manual_seed(0)
    kept = keep_mask((1000, 1000), p).double().mean().item()
    expected = keep_probability(p)
    assert expected == pytest.approx(1 - p, abs=2**-17)
    assert abs(kept - expected) <= 5 * (expected * (1 - expected) / 1e6) ** 0.5


def test_lanes_of_a_number_are_independent() -> None:
    """Four elements share a drawn number: each is kept alike, and no two know of each other."""
    torch.manual_seed(0)
    lanes = keep_mask((100_000, 4), 0.3).double()
    covariance = torch.cov(lanes.T)
    assert (lanes.mean(0) - 0.7).abs().max() < 5 * (0.21 / 1e5) ** 0.5
    off_diagonal = covariance - covariance.diag().diag()
    assert off_diagonal.abs().max() < 5 * 0.21 / 1e5**0.5


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 4, 5)])
def test_any_shape_and_the_same_seed_the_same_mask(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    mask = keep_mask(shape, 0.5)
    torch.manual_seed(3)
    assert mask.shape == shape
    assert torch.equal(mask, keep_mask(shape, 0.5))


def test_what_is_kept_is_scaled_and_gradients_follow() -> None:
    x = torch.rand(50, 60, requires_grad=True) + 1
    x.retain_grad()
    output = FastDropout(0.1)(x)
    output.sum().backward()
    kept = output != 0
    torch.testing.assert_close(output, x * kept / keep_probability(0.1))
    torch.testing.assert_close(x.grad, kept / keep_probability(0.1))


def test_evaluation_and_the_ends_are_torchs() -> None:
    x = torch.rand(10)
    assert FastDropout(0.5).eval()(x) is x
    assert torch.equal(FastDropout(0.0)(x), x)
    assert torch.equal(FastDropout(1.0)(x), torch.zeros(10))


def test_one_byte_an_element_is_kept() -> None:
    sizes: list[int] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        sizes.append(saved.nbytes)
        return saved

    x = torch.rand(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        FastDropout(0.1)(x)
    assert sizes == [1000]


def test_all_of_a_model_is_replaced_once() -> None:
    model = make_gpt2(resid_pdrop=0.1)
    count = sum(type(module) is nn.Dropout for module in model.modules())
    assert speed_up_dropout(model) == count > 0
    assert speed_up_dropout(model) == 0


@pytest.mark.parametrize("fast", [True, False])
def test_the_recipe_decides(make_recipe: Any, fast: bool) -> None:
    model = build(make_recipe(**{"model.fast_dropout": fast}), total_steps=1).model
    assert any(isinstance(module, FastDropout) for module in model.modules()) is fast
