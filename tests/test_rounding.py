"""Rounding by chance: to one of two neighbours, and right on average."""

from __future__ import annotations

import pytest
import torch

from lowvram import rounding
from lowvram.rounding import stochastic_round_


def rounded(source: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    target = torch.empty(source.shape, dtype=torch.bfloat16)
    stochastic_round_(target, source.clone())
    return target


def neighbours(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of bf16 around each, by cutting the lower 16 bits off and adding one above."""
    low = source.view(torch.int32) & -(2**16)
    return low.view(torch.float32), (low + 2**16).view(torch.float32)


SAMPLES = torch.cat(
    [
        torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * scale
        for scale in (1e-40, 1e-6, 0.02, 1.0, 1e30)
    ]
)


def test_every_result_is_one_of_two_neighbours() -> None:
    """Negative numbers, subnormals and large ones, too; both of the two come up."""
    found = rounded(SAMPLES).float()
    toward_zero, away = neighbours(SAMPLES)
    assert torch.equal(torch.where(found == toward_zero, toward_zero, away), found)
    assert 0.3 < (found == away).float().mean() < 0.7


@pytest.mark.parametrize("share", [1 / 16, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mean_is_the_number(share: float, sign: float) -> None:
    """Between 1 and 1 + 2**-7: how many of 200,000 are rounded up, within five deviations."""
    exact = sign * (1 + share * 2**-7)
    found = rounded(torch.full((200_000,), exact)).double()
    up = (found.abs() > 1).double().mean().item()
    assert abs(up - share) < 5 * (share * (1 - share) / 200_000) ** 0.5
    assert found.mean().item() == pytest.approx(exact, abs=5 * 2**-7 * 0.5 / 200_000**0.5)


def test_what_bf16_can_hold_stays() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, 1e-40, 3.3895e38]).bfloat16()
    for seed in range(20):
        assert torch.equal(rounded(exact.float(), seed), exact)


def test_what_is_no_number_stays_what_it_is() -> None:
    """The bits of a NaN are any: neither a carry nor a cut may make a number or infinity of it."""
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -8388607], dtype=torch.int32)
    infinite = torch.tensor([torch.inf, -torch.inf])
    for seed in range(20):
        assert torch.equal(rounded(infinite, seed).float(), infinite)
        assert rounded(bits.view(torch.float32), seed).isnan().all()


def test_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each element is rounded once: a slice of 7 gives neighbours as a slice of all does."""
    monkeypatch.setattr(rounding, "_SLICE", 7)
    source = SAMPLES[-100:].view(4, 25)
    found = rounded(source).float()
    toward_zero, away = neighbours(source)
    assert ((found == toward_zero) | (found == away)).all()


def test_numbers_beyond_the_largest_of_bf16_become_that() -> None:
    largest = torch.finfo(torch.bfloat16).max
    source = torch.full((1000,), 3.396e38)
    assert largest < source[0] < torch.inf
    assert (rounded(source).float() == largest).all()
    assert (rounded(-source).float() == -largest).all()
