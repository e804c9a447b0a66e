"""What a card would hear: which kernels common layers run, and what each of them allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram.errors import DeviceError
from lowvram.memory import simulate
from lowvram.memory.device import simulated_device
from lowvram.memory.listener import is_simulating

MARK = 777
ROWS, WIDTH = 128, 64
N = 4 * ROWS * WIDTH  # bytes of the input in fp32

Layer = Callable[[Tensor], Tensor]
Seen = list[tuple[str, int]]


def heard(make: Callable[[Any], Layer], dtype: torch.dtype | None = None) -> tuple[Seen, Seen]:
    """(kernel, bytes) of all that a layer allocates, forward and backward, without workspaces."""

    def step(device: torch.device) -> None:
        layer = make(device)
        x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
        torch.empty(MARK, dtype=torch.uint8, device=device)
        with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
            y = layer(x)
        gradient = torch.ones_like(y)
        torch.empty(MARK, dtype=torch.uint8, device=device)
        y.backward(gradient)

    blocks = simulate(lambda device: device, step, steps=1).blocks
    seen = [
        (block.op.removeprefix("aten::").partition(".")[0], block.size)
        for block in blocks
        if block.category != "workspaces"
    ]
    first, second = (index for index, (_, size) in enumerate(seen) if size == MARK)
    return seen[first + 1 : second - 1], seen[second + 1 :]


def modules(kind: Any, *arguments: Any) -> Callable[[Any], Layer]:
    return lambda device: kind(*arguments, device=device)


def with_target(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Layer]:
    def make(device: Any) -> Layer:
        target = torch.zeros(ROWS, dtype=torch.long, device=device)
        return lambda x: function(x, target)

    return make


# Forward and backward by the CUDA entries of native_functions.yaml and derivatives.yaml.
LAYERS: dict[str, tuple[Callable[[Any], Layer], Seen, Seen]] = {
    "layer norm": (
        modules(nn.LayerNorm, WIDTH),
        [("native_layer_norm", N), ("native_layer_norm", 512), ("native_layer_norm", 512)],
        [("native_layer_norm_backward", size) for size in (N, 256, 256)],
    ),
    "rms norm": (
        modules(nn.RMSNorm, WIDTH),
        [("_fused_rms_norm", N), ("_fused_rms_norm", 512)],
        [("_fused_rms_norm_backward", N), ("_fused_rms_norm_backward", 256)],
    ),
    "silu": (lambda _: F.silu, [("silu", N)], [("silu_backward", N)]),
    "gelu": (lambda _: F.gelu, [("gelu", N)], [("gelu_backward", N)]),
    "mish": (lambda _: F.mish, [("mish", N)], [("mish_backward", N)]),
    "dropout": (
        lambda _: nn.Dropout(0.1),
        [("native_dropout", N // 4), ("native_dropout", N)],  # the mask comes first
        [("native_dropout_backward", N)],
    ),
    "softmax": (
        lambda _: lambda x: x.softmax(-1),
        [("_softmax", N)],
        [("_softmax_backward_data", N)] * 2,  # one is a temporary
    ),
    "linear": (
        modules(nn.Linear, WIDTH, WIDTH),
        [("addmm", N)],
        [("mm", N), ("mm", 4 * WIDTH * WIDTH), ("sum", 4 * WIDTH)],
    ),
    "cross entropy": (
        with_target(F.cross_entropy),
        [("_log_softmax", N), ("nll_loss_forward", 4), ("nll_loss_forward", 4)],
        [("nll_loss_backward", N), ("_log_softmax_backward_data", N)],
    ),
    "log sigmoid": (
        lambda _: F.logsigmoid,
        [("log_sigmoid_forward", N)],
        [("log_sigmoid_backward", N)],
    ),
    "masked fill": (
        lambda _: lambda x: x.masked_fill(x > 0, 0.0),
        [("gt", N // 4), ("copy_", N)],
        [("copy_", N)],
    ),
    "gather by index": (
        with_target(lambda x, target: x[target]),
        [("index", N)],
        [("zero_", N)],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_run_the_kernels_of_a_card(name: str) -> None:
    make, forward, backward = LAYERS[name]
    seen = heard(make)

    assert seen[0] == forward
    outputs = [entry for entry in seen[1] if entry[0] != "_index_put_impl_"]  # its sorting
    assert outputs == backward


def test_fp16_softmax_writes_fp32_without_a_copy() -> None:
    """Under autocast: SoftMax.cpp, half_to_float. bf16 has no such kernel and is converted."""

    def make(device: Any) -> Layer:
        linear = nn.Linear(WIDTH, WIDTH, bias=False, device=device)
        return lambda x: linear(x).softmax(-1)

    half = [("copy_", N // 2), ("copy_", 2 * WIDTH * WIDTH), ("mm", N // 2)]
    assert heard(make, torch.float16)[0] == [*half, ("_softmax", N)]
    assert heard(make, torch.bfloat16)[0] == [*half, ("copy_", N), ("_softmax", N)]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_rms_norm_of_two_dtypes_is_not_fused() -> None:
    """layer_norm.cpp, rms_norm_symint: 16-bit input and fp32 weight take single operators."""

    def make(device: Any) -> Layer:
        norm = nn.RMSNorm(WIDTH, device=device)
        return lambda x: norm(x.bfloat16())

    kernels = {kernel for kernel, _ in heard(make)[0]}
    assert {"pow", "mean", "rsqrt"} <= kernels
    assert "_fused_rms_norm" not in kernels


def attend(mask: bool = False, dropout: float = 0.0) -> Callable[[Any], Layer]:
    def make(device: Any) -> Layer:
        allowed = torch.ones(1, 1, 32, 32, dtype=torch.bool, device=device) if mask else None

        def layer(x: Tensor) -> Tensor:
            q = x.view(2, 4, 32, 32)
            return F.scaled_dot_product_attention(q, q, q, allowed, dropout, is_causal=not mask)

        return layer

    return make


def test_attention_saves_what_its_kernel_saves() -> None:
    """fp32 and masks take the memory-efficient kernel, 16 bits without a mask flash attention."""
    efficient = "_scaled_dot_product_efficient_attention"
    flash = "_scaled_dot_product_flash_attention"
    logarithms = 4 * 2 * 4 * 32

    assert heard(attend())[0][:2] == [(efficient, N), (efficient, logarithms)]
    assert heard(attend(dropout=0.1))[0][:2] == [(efficient, N), (efficient, logarithms)]
    masked = heard(attend(mask=True))[0]
    assert ("where", 4 * 32 * 32) in masked  # the additive mask
    assert (efficient, N) in masked
    half = heard(attend(), torch.bfloat16)[0]
    assert (flash, N // 2) in half
    assert (flash, logarithms) in half
    assert (efficient, N // 2) in heard(attend(mask=True), torch.float16)[0]


def sums(layer: Layer, *, create_graph: bool = False) -> int:
    """How many gradients autograd makes anew where it sums up what comes from several sides."""

    def step(device: torch.device) -> None:
        x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
        y = layer(x * 1.0).exp()
        torch.empty(MARK, dtype=torch.uint8, device=device)
        torch.autograd.grad(y.sum(), x, create_graph=create_graph)

    blocks = simulate(lambda device: device, step, steps=1).blocks
    start = next(i for i, block in enumerate(blocks) if block.size == MARK)
    return sum(b.op == "aten::add.Tensor" and b.size == N for b in blocks[start:])


def test_gradients_from_several_sides() -> None:
    """As autograd's engine does it on the CPU, where the profiler shows add_ and add."""
    assert sums(lambda x: x.exp() + x.tanh() + x.sin()) == 0
    # What comes past tanh is there first, and tanh's backward is still to read it.
    assert sums(lambda x: x + x.tanh()) == 0
    # The sum's gradient is one number at all places.
    assert sums(lambda x: (x + x.tanh()).log()) == 0
    assert sums(lambda x: Identity.apply(x) + Identity.apply(x)) == 0
    assert sums(lambda x: Keeper.apply(x) + Keeper.apply(x).sin()) == 1
    # A second derivative may need the parts.
    assert sums(lambda x: x.exp() + x.tanh(), create_graph=True) == 1


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class Keeper(torch.autograd.Function):
    """Somebody still holds the gradient that it has made."""

    kept: ClassVar[list[Tensor]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Keeper.kept.append(gradient.clone())
        return Keeper.kept[-1]


def test_outside_of_a_simulation_nothing_is_there() -> None:
    device = simulated_device()
    assert not is_simulating()
    assert not torch.get_device_module(device).is_available()
    assert torch.accelerator.device_count() == 0 or torch.cuda.is_available()


def test_a_device_type_that_another_library_has() -> None:
    name = torch._C._get_privateuse1_backend_name()
    assert name == "simulated" or simulated_device().type == "simulated"
    with pytest.raises((DeviceError, RuntimeError)):
        torch.utils.rename_privateuse1_backend("another")
