"""Optimizers against torch's, their state by size, and schedules against tables by hand."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lowvram.optimizers import (
    MIN_8BIT_SIZE,
    OptimizerName,
    learning_rate_at,
    make_optimizer,
    set_learning_rate,
    state_bytes,
)
from lowvram.recipe.schema import TrainSection

NAMES = get_args(OptimizerName)
EIGHT_BIT = ("adamw8bit", "paged_adamw8bit", "lion8bit")
RATES = {"sgd": 1.0, "adafactor": 0.05, "lion8bit": 0.01}


class Quadratic(nn.Module):
    """Half the squared distance of a matrix and a vector from a target."""

    def __init__(self, rows: int = 64, columns: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(rows, columns))
        self.vector = nn.Parameter(torch.randn(columns))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.target = torch.randn(columns)

    def forward(self) -> torch.Tensor:
        errors = torch.cat([self.matrix - self.target, (self.vector - self.target)[None]])
        return 0.5 * errors.square().mean(0).sum()


def make(name: Any, model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    options = {"learning_rate": 0.05, "weight_decay": 0.0, "betas": (0.9, 0.99), **changes}
    return make_optimizer(name, model.parameters(), **options)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, model().item()]


def test_the_recipe_offers_exactly_these() -> None:
    assert get_args(TrainSection.model_fields["optimizer"].annotation) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_downhill(name: str) -> None:
    model = Quadratic()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make(name, model, learning_rate=RATES.get(name, 0.05))
    losses = run(model, optimizer, 30)
    after = list(model.parameters())
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [False, False, True]
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.isfinite().all() for parameter in after)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_do_not_decay(name: str) -> None:
    """With gradients of zero only decay moves: W (1 - lr decay), in SGD's case by its gradient."""
    model = Quadratic()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make(name, model, learning_rate=0.1, weight_decay=0.5)
    decays = [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert decays == [(0.5, 1), (0.0, 1)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    if name != "adafactor":  # its steps are relative to the size of the weights
        torch.testing.assert_close(model.matrix, before[0] * 0.95)
    else:
        assert (model.matrix.abs() < before[0].abs()).all()
    assert torch.equal(model.vector, before[1])
    assert torch.equal(model.frozen, before[2])


def test_groups_without_parameters_are_left_out() -> None:
    model = Quadratic()
    model.vector.requires_grad_(False)
    assert [len(group["params"]) for group in make("adamw", model).param_groups] == [1]


def test_adamw_is_torchs() -> None:
    """20 steps with a changing rate against AdamW(foreach=False, fused=False), to 1e-6."""
    ours, theirs = Quadratic(), Quadratic()
    options = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizer = make("adamw", ours, **options)
    decayed = {"params": [theirs.matrix], "weight_decay": 0.1}
    plain = {"params": [theirs.vector], "weight_decay": 0.0}
    reference = torch.optim.AdamW(
        [decayed, plain], lr=1e-2, betas=(0.8, 0.95), foreach=False, fused=False
    )
    for step in range(20):
        rate = 1e-2 * (1 - step / 20)
        set_learning_rate(optimizer, rate)
        for group in reference.param_groups:
            group["lr"] = rate
        run(ours, optimizer, 1)
        run(theirs, reference, 1)
    assert not torch.allclose(ours.matrix, Quadratic().matrix, atol=1e-2)
    torch.testing.assert_close(ours.matrix, theirs.matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.vector, theirs.vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_adamw8bit_is_close_to_adamw(name: str) -> None:
    """After 50 steps on random gradients the changes differ by less than 5 %."""
    models = Quadratic(), Quadratic()
    optimizers = make(name, models[0], weight_decay=0.1), make("adamw", models[1], weight_decay=0.1)
    torch.manual_seed(1)
    for _ in range(50):
        gradient = torch.randn(64, 64)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.matrix.grad = gradient.clone()
            optimizer.step()
    changes = [model.matrix.detach() - Quadratic().matrix for model in models]
    assert (changes[0] - changes[1]).norm() < 0.05 * changes[1].norm()
    assert not torch.equal(*changes)


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((64, 64), torch.uint8), ((65, 64), torch.uint8), ((63, 65), torch.float32)],
)
def test_state_has_8_bits_from_4096_elements_on(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    assert (math.prod(shape) >= MIN_8BIT_SIZE) is (dtype == torch.uint8)
    model = Quadratic(*shape)
    optimizer = make(name, model)
    run(model, optimizer, 1)
    moments = ("state1",) if name == "lion8bit" else ("state1", "state2")
    assert {optimizer.state[model.matrix][key].dtype for key in moments} == {dtype}
    assert {optimizer.state[model.vector][key].dtype for key in moments} == {torch.float32}


def test_state_bytes() -> None:
    """A matrix of 64 x 64 = 4096 and a vector of 64, as counted by hand."""
    found = {}
    for name in NAMES:
        model = Quadratic()
        optimizer = make(name, model)
        assert state_bytes(optimizer) == {}
        run(model, optimizer, 2)
        found[name] = state_bytes(optimizer)
    steps = 2 * 4  # a float32 for each of the two tensors
    maps = 256 * 4  # what the 256 codes stand for
    blocks = 4096 // 256 * 4  # the scale of each block of 256
    eight_bit = {"uint8": 2 * 4096, "float32": 2 * 64 * 4 + 2 * maps + 2 * blocks}
    assert found == {
        "adamw": {"float32": 2 * (4096 + 64) * 4 + steps},
        "adamw8bit": eight_bit,
        "paged_adamw8bit": eight_bit,
        "lion8bit": {"uint8": 4096, "float32": 64 * 4 + maps + blocks},
        "adafactor": {"float32": (64 + 64) * 4 + 64 * 4 + steps},
        "sgd": {},
    }


def test_a_map_that_is_shared_counts_once() -> None:
    model = Quadratic()
    model.other = nn.Parameter(torch.randn(64, 64))
    optimizer = make("adamw8bit", model)
    for parameter in (model.matrix, model.other):
        parameter.grad = torch.randn(64, 64)
    optimizer.step()
    maps, blocks = 2 * 256 * 4, 4096 // 256 * 4
    assert state_bytes(optimizer) == {"uint8": 4 * 4096, "float32": maps + 4 * blocks}


# Schedules


def rates(schedule: Any, total: int, warmup: int, steps: int | None = None) -> list[float]:
    return [
        learning_rate_at(step, peak=8.0, total_steps=total, warmup_steps=warmup, schedule=schedule)
        for step in range(total if steps is None else steps)
    ]


def test_schedules_by_hand() -> None:
    assert rates("constant", 4, 0) == [8, 8, 8, 8]
    assert rates("constant", 5, 3) == [2, 4, 6, 8, 8]
    assert rates("linear", 4, 0) == [8, 6, 4, 2]
    assert rates("linear", 6, 2) == pytest.approx([8 / 3, 16 / 3, 8, 6, 4, 2])
    half = math.sqrt(0.5)
    assert rates("cosine", 4, 0) == pytest.approx([8, 4 + 4 * half, 4, 4 - 4 * half])
    assert rates("cosine", 5, 1) == pytest.approx([4, 8, 4 + 4 * half, 4, 4 - 4 * half])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 100])
def test_every_step_learns(schedule: str, total: int) -> None:
    for warmup in range(total):
        found = rates(schedule, total, warmup)
        assert all(0 < rate <= 8 for rate in found)
        assert found[warmup] == max(found) == 8
        assert found[: warmup + 1] == sorted(set(found[: warmup + 1]))
        assert found[warmup:] == sorted(found[warmup:], reverse=True)


def test_a_run_of_one_step_is_at_the_peak() -> None:
    assert [rates(schedule, 1, 0) for schedule in ("cosine", "linear", "constant")] == [[8.0]] * 3


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_beyond_the_end_it_stays_at_zero(schedule: str) -> None:
    assert rates(schedule, 4, 0, steps=7)[4:] == pytest.approx([0, 0, 0])
