"""CUDA's choice of an attention kernel, and its attention in terms of operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.memory.attention import (
    Backend,
    Enabled,
    choose_attention,
    scaled_dot_product_attention,
)
from lowvram.memory.kernels import Target

RTX_4070_TI = Target(compute_capability=(8, 9), multiprocessors=60)
A100 = Target(compute_capability=(8, 0), multiprocessors=108)
T4 = Target(compute_capability=(7, 5), multiprocessors=40)
H100 = Target(compute_capability=(9, 0), multiprocessors=132)
RTX_5090 = Target(compute_capability=(12, 0), multiprocessors=170)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def inputs(
    dtype: torch.dtype, size: int, queries: int = 128, keys: int = 128, key_heads: int = 4
) -> list[torch.Tensor]:
    shapes = [(2, 4, queries, size), (2, key_heads, keys, size), (2, key_heads, keys, size)]
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


# dtype, head size, mask, causal, dropout, card, choice when gradients are needed
CHOICES: list[tuple[torch.dtype, int, bool, bool, float, Target, Backend]] = [
    (BF16, 64, False, True, 0.1, RTX_4070_TI, "flash"),
    (BF16, 64, False, False, 0.0, RTX_4070_TI, "flash"),
    (F16, 128, False, True, 0.0, A100, "flash"),
    (BF16, 64, True, False, 0.1, RTX_4070_TI, "efficient"),
    (F32, 64, False, True, 0.1, RTX_4070_TI, "efficient"),
    (F32, 64, True, False, 0.0, RTX_4070_TI, "efficient"),
    (F32, 62, False, True, 0.0, RTX_4070_TI, "math"),  # not a multiple of 4
    (BF16, 60, True, False, 0.0, RTX_4070_TI, "math"),  # not a multiple of 8
    (BF16, 60, False, False, 0.0, RTX_4070_TI, "flash"),  # padded
    (BF16, 192, False, False, 0.1, RTX_4070_TI, "flash"),
    (BF16, 224, False, False, 0.0, RTX_4070_TI, "efficient"),
    (BF16, 224, False, False, 0.0, A100, "flash"),
    (BF16, 256, False, False, 0.0, RTX_4070_TI, "flash"),
    (BF16, 256, False, False, 0.1, RTX_4070_TI, "efficient"),
    (BF16, 256, False, False, 0.1, RTX_5090, "efficient"),
    (BF16, 264, False, False, 0.0, A100, "efficient"),
    (torch.float64, 64, False, False, 0.0, A100, "math"),
    (F16, 64, False, True, 0.0, T4, "efficient"),  # flash needs compute capability 8
    (F32, 63, False, True, 0.0, T4, "efficient"),  # no tensor cores for fp32: any size
    (BF16, 64, False, True, 0.0, T4, "math"),
    (BF16, 64, False, True, 0.0, H100, "cudnn"),
    (BF16, 64, True, False, 0.0, H100, "cudnn"),
    (BF16, 64, False, True, 0.1, H100, "flash"),  # cuDNN drops in sixteenths
    (BF16, 64, False, True, 0.125, H100, "cudnn"),
    (BF16, 256, False, True, 0.0, H100, "flash"),
    (F32, 64, False, True, 0.0, H100, "efficient"),
    (BF16, 64, False, True, 0.0, RTX_5090, "flash"),
]


@pytest.mark.parametrize(
    ("dtype", "size", "masked", "causal", "dropout", "card", "kernel"), CHOICES
)
def test_choice(  # noqa: PLR0913 - one column of the table each
    dtype: torch.dtype,
    size: int,
    masked: bool,
    causal: bool,
    dropout: float,
    card: Target,
    kernel: Backend,
) -> None:
    mask = torch.empty(2, 1, 128, 128, dtype=torch.bool, device="meta") if masked else None
    tensors = inputs(dtype, size)
    chosen = choose_attention(*tensors, mask, dropout, causal, False, target=card, needs_grad=True)
    assert chosen == kernel


def choose(*tensors: torch.Tensor, **options: Any) -> Backend:
    mask = options.pop("mask", None)
    causal, gqa = options.pop("causal", False), options.pop("gqa", False)
    options = {"target": RTX_4070_TI, "needs_grad": True} | options
    return choose_attention(*tensors, mask, 0.0, causal, gqa, **options)


def test_large_heads_only_matter_in_training() -> None:
    assert choose(*inputs(BF16, 224), needs_grad=False) == "flash"


def test_causal_rectangle_is_not_for_flash() -> None:
    assert choose(*inputs(BF16, 64, queries=1), causal=True) == "efficient"
    assert choose(*inputs(BF16, 64, queries=1)) == "flash"


def test_grouped_heads() -> None:
    grouped = inputs(BF16, 64, key_heads=2)
    mask = torch.empty(128, 128, device="meta")
    assert choose(*grouped, gqa=True) == "flash"
    assert choose(*grouped, gqa=True, mask=mask) == "math"
    assert choose(*grouped, gqa=True, mask=mask, target=H100) == "cudnn"
    assert choose(*inputs(F32, 64, key_heads=2), gqa=True) == "math"
    assert choose(*grouped) == "math"


def test_strides_and_sizes() -> None:
    query, key, value = inputs(BF16, 64)
    across = torch.empty(2, 4, 64, 128, dtype=BF16, device="meta").transpose(-1, -2)
    assert choose(across, key, value) == "math"
    assert choose(query[0], key[0], value[0]) == "math"
    assert choose(query, key[:1], value[:1]) == "math"
    assert choose(query, key[:, :, :0], value[:, :, :0]) == "math"
    spread = torch.empty(2, 1, 128, 1, dtype=torch.bool, device="meta").expand(2, 1, 128, 128)
    assert choose(query, key, value, mask=spread) == "math"


def test_mask_that_learns_is_not_for_cudnn() -> None:
    mask = torch.empty(2, 4, 128, 128, dtype=BF16, device="meta", requires_grad=True)
    assert choose(*inputs(BF16, 64), mask=mask, target=H100) == "efficient"


def test_old_cudnn_is_not_preferred() -> None:
    old = Target(compute_capability=(9, 0), multiprocessors=132, cudnn_version=91002)
    assert choose(*inputs(BF16, 64), target=old) == "flash"


def test_switches() -> None:
    tensors = inputs(BF16, 64)
    assert choose(*tensors, enabled=Enabled(flash=False)) == "efficient"
    assert choose(*tensors, enabled=Enabled(flash=False, efficient=False)) == "math"
    alone = Enabled(flash=False, efficient=False, math=False)
    assert choose(*tensors, enabled=alone) == "cudnn"
    order: tuple[Backend, ...] = ("math", "flash", "efficient", "cudnn")
    assert choose(*tensors, enabled=Enabled(order=order)) == "math"
    nothing = Enabled(flash=False, efficient=False, math=False, cudnn=False)
    with pytest.raises(RuntimeError, match="No available kernel. Aborting execution."):
        choose(*tensors, enabled=nothing)


def test_switches_of_this_process() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert Enabled.current() == Enabled()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        now = Enabled.current()
    assert (now.flash, now.efficient, now.math) == (False, True, True)
    assert now.order[:2] == ("math", "efficient")


class Operators(TorchDispatchMode):
    """Names of the operators below autograd, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name != "detach" and not name.startswith("prim"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def run(
    tensors: list[torch.Tensor], card: Target = RTX_4070_TI, **options: Any
) -> tuple[torch.Tensor, list[str], list[tuple[tuple[int, ...], torch.dtype]]]:
    """Forward and backward on the meta device: output, operators, what was saved between them."""
    for tensor in tensors:
        tensor.requires_grad_()
    saved: list[tuple[tuple[int, ...], torch.dtype]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    def give(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with Operators() as operators, saved_tensors_hooks(note, give):
        output = scaled_dot_product_attention(*tensors, target=card, **options)
        output.backward(torch.empty_like(output))
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
    return output, operators.names, saved


def test_flash_saves_inputs_output_and_logarithms() -> None:
    output, names, saved = run(inputs(BF16, 64), is_causal=True, dropout_p=0.1)
    assert output.shape == (2, 4, 128, 64)
    assert names[0] == "_scaled_dot_product_flash_attention"
    assert "_scaled_dot_product_flash_attention_backward" in names
    assert saved.count(((2, 4, 128, 64), BF16)) == 4
    assert ((2, 4, 128), F32) in saved


def test_flash_pads_heads_to_a_multiple_of_8() -> None:
    output, names, saved = run(inputs(BF16, 60))
    assert output.shape == (2, 4, 128, 60)
    assert names[:4] == ["constant_pad_nd"] * 3 + ["_scaled_dot_product_flash_attention"]
    assert saved.count(((2, 4, 128, 64), BF16)) == 4


def test_efficient_takes_an_additive_mask_expanded_without_a_copy() -> None:
    mask = torch.empty(2, 1, 128, 128, dtype=torch.bool, device="meta")
    output, names, saved = run(inputs(BF16, 64), attn_mask=mask)
    kernel = names.index("_scaled_dot_product_efficient_attention")
    assert names[kernel - 2 : kernel] == ["where", "expand"]
    assert ((2, 4, 128, 128), BF16) in saved
    assert ((2, 4, 128), F32) in saved
    assert output.shape == (2, 4, 128, 64)


@pytest.mark.parametrize(
    ("keys", "padded"), [(120, False), (121, True), (128, False)], ids=["120", "121", "128"]
)
def test_efficient_pads_rows_of_the_mask_to_a_multiple_of_8(keys: int, padded: bool) -> None:
    mask = torch.empty(2, 1, 128, keys, device="meta")
    _, names, _ = run(inputs(F32, 64, keys=keys), attn_mask=mask)
    assert ("constant_pad_nd" in names) == padded


def test_log_sums_only_when_a_gradient_is_needed() -> None:
    tensors = inputs(F32, 64)
    mode = _Arguments("_scaled_dot_product_efficient_attention")
    with mode:
        scaled_dot_product_attention(*tensors, target=RTX_4070_TI)
        tensors[1].requires_grad_()
        scaled_dot_product_attention(*tensors, target=RTX_4070_TI)
        with torch.no_grad():
            scaled_dot_product_attention(*tensors, target=RTX_4070_TI)
    assert [args[4] for args in mode.calls] == [False, True, False]


class _Arguments(TorchDispatchMode):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = f"aten::{name}"
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name == self.name:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def test_cudnn_on_a_server_card() -> None:
    output, names, _ = run(inputs(BF16, 64), card=H100, is_causal=True)
    assert names[0] == "_scaled_dot_product_cudnn_attention"
    assert output.shape == (2, 4, 128, 64)


def test_products_in_fp32_add_the_mask_in_place() -> None:
    enabled = Enabled(flash=False, efficient=False)
    output, names, _ = run(inputs(BF16, 64), enabled=enabled, is_causal=True, dropout_p=0.1)
    assert output.dtype == BF16
    assert names[:3] == ["_to_copy"] * 3
    assert "add_" in names
    assert "_safe_softmax" in names


def attend(call: Callable[..., torch.Tensor], mask: bool, causal: bool, gqa: bool) -> list[Any]:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    key, value = (torch.randn(2, 2 if gqa else 4, 6, 8, requires_grad=True) for _ in range(2))
    hidden = torch.randn(2, 1, 6, 6) > 0 if mask else None
    output = call(query, key, value, hidden, is_causal=causal, scale=0.3, enable_gqa=gqa)
    output.sum().backward()
    return [output, query.grad, key.grad, value.grad]


@pytest.mark.parametrize(
    ("mask", "causal", "gqa"),
    [case for case in itertools.product([False, True], repeat=3) if not (case[0] and case[1])],
)
def test_products_give_what_torch_gives(mask: bool, causal: bool, gqa: bool) -> None:
    ours = partial(
        scaled_dot_product_attention,
        target=RTX_4070_TI,
        enabled=Enabled(flash=False, efficient=False, cudnn=False),
    )
    got = attend(ours, mask, causal, gqa)
    expected = attend(functional.scaled_dot_product_attention, mask, causal, gqa)
    torch.testing.assert_close(got, expected)


def test_products_refuse_two_masks() -> None:
    mask = torch.empty(128, 128, device="meta")
    with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True"):
        run(inputs(torch.float64, 64), attn_mask=mask, is_causal=True)


def test_nothing_to_attend_to() -> None:
    tensors = inputs(F32, 64, queries=0)
    output, _, _ = run(tensors)
    assert output.shape == (2, 4, 0, 64)
