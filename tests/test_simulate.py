"""`simulate` with ordinary training code: it runs, it says what is what, and it leaves no trace."""

from __future__ import annotations

import copy
import io
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import DefaultDeviceType, checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lowvram.errors import DeviceError
from lowvram.memory import MemoryTrace, find_card, simulate
from lowvram.memory.redirect import _replacements

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 200, 32, 4, 16, 4

State = dict[str, Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:  # (b, s, c)
        b, s, _ = x.shape
        qkv = self.qkv(self.norm1(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(b, s, HEADS, -1).transpose(1, 2) for part in qkv)
        dropout = 0.1 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).contiguous().view(b, s, WIDTH))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A decoder with tied weights, a buffer and, if asked for, checkpointed blocks."""

    positions: Tensor

    def __init__(self, *, blocks: int = 2, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.randn(LENGTH, WIDTH))
        self.reentrant = reentrant

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1), ignore_index=-1)


def build(device: torch.device) -> State:
    model = Transformer().to(device)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "device": device}


def tokens(device: torch.device) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH)).to(device, non_blocking=True)


def step(state: State) -> float:
    ids = tokens(state["device"])
    loss = state["model"](ids, ids)
    loss.backward()
    nn.utils.clip_grad_norm_(state["model"].parameters(), 1.0)
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    return float(loss.item())


def once(code: Callable[[torch.device], Any]) -> MemoryTrace:
    """Simulate a piece of code that is no training step."""
    return simulate(lambda device: device, code, steps=1)


def sizes(trace: MemoryTrace) -> list[tuple[str, int]]:
    """The events, without addresses."""
    return [
        (event[0], trace.blocks[event[1]].size if event[0] in "AF" else event[2])
        for event in trace.events
    ]


# --- training loops -------------------------------------------------------------------------------


def test_a_loop_as_nanogpt_writes_it(tmp_path: Path) -> None:
    data_file = tmp_path / "train.bin"
    np.random.randint(0, VOCABULARY, 2000).astype(np.uint16).tofile(data_file)

    def get_batch(device: torch.device) -> tuple[Tensor, Tensor]:
        data = np.memmap(data_file, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,))
        x, y = (
            torch.stack(
                [torch.from_numpy(data[i + k : i + k + LENGTH].astype(int)) for i in starts]
            )
            for k in (0, 1)
        )
        return (
            x.pin_memory().to(device, non_blocking=True),
            y.pin_memory().to(device, non_blocking=True),
        )

    def build(device: torch.device) -> State:
        torch.manual_seed(1337)
        torch.backends.cuda.matmul.allow_tf32 = False
        model = Transformer()
        model.to(device)
        decay = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return {
            "model": model,
            "optimizer": torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True),
            "scaler": torch.amp.GradScaler("cuda", enabled=True),
            "ctx": torch.amp.autocast(device_type="cuda", dtype=torch.float16),
            "device": device,
        }

    def step(state: State) -> None:
        model, optimizer, scaler = state["model"], state["optimizer"], state["scaler"]
        model.eval()
        losses = torch.zeros(2)
        with torch.no_grad():
            for k in range(2):
                with state["ctx"]:
                    losses[k] = model(*get_batch(state["device"])).item()
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        x, y = get_batch(state["device"])
        for _ in range(2):
            with state["ctx"]:
                loss = model(x, y) / 2
            x, y = get_batch(state["device"])
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    trace = simulate(build, step)

    assert trace.peak_reserved_bytes > 0
    assert any(block.op == "aten::_scaled_dot_product_flash_attention" for block in trace.blocks)
    states = trace.by_category(trace.steps[-1].last_event)["optimizer states"]
    parameters = sum(p.numel() for p in Transformer().parameters())
    assert states == 2 * 4 * parameters + 4 * len(list(Transformer().parameters()))  # and steps


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"maximize": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {}),
}


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optimizers(name: str, foreach: bool | None) -> None:
    """Their states are as large as those of a real step on the CPU."""
    kind, options = OPTIMIZERS[name]

    def make(device: torch.device) -> State:
        model = nn.Linear(8, 8, device=device)
        return {"model": model, "optimizer": kind(model.parameters(), foreach=foreach, **options)}

    def train(state: State) -> None:
        state["model"](torch.ones(2, 8, device=state["model"].weight.device)).sum().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()

    trace = simulate(make, train)

    real = make(torch.device("cpu"))
    train(real)
    on_the_host = set() if name == "asgd" else {"step", "mu_product"}  # single numbers
    expected = sum(
        value.nbytes
        for state in real["optimizer"].state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in on_the_host
    )
    assert trace.by_category(trace.steps[-1].last_event)["optimizer states"] == expected


@pytest.mark.parametrize("kind", ["fused", "capturable"])
def test_optimizers_that_live_on_the_card(kind: str) -> None:
    """Their step counters do too: 4 bytes a parameter."""

    def make(device: torch.device) -> State:
        model = nn.Linear(8, 8, device=device)
        optimizer = torch.optim.AdamW(model.parameters(), **{kind: True})  # type: ignore[arg-type]
        return {"model": model, "optimizer": optimizer, "device": device}

    def train(state: State) -> None:
        state["model"](torch.ones(2, 8, device=state["device"])).sum().backward()
        state["optimizer"].step()

    trace = simulate(make, train)

    states = trace.by_category(trace.steps[-1].last_event)["optimizer states"]
    assert states == 2 * 4 * (64 + 8) + 2 * 4


def test_closures_schedules_and_averages() -> None:
    def build(device: torch.device) -> State:
        model = Transformer().to(device)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
            "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
            "average": torch.optim.swa_utils.AveragedModel(model),
            "device": device,
        }

    def step(state: State) -> None:
        ids = tokens(state["device"])

        def closure() -> Tensor:
            state["optimizer"].zero_grad()
            loss: Tensor = state["model"](ids, ids)
            loss.backward()
            return loss

        loss = state["optimizer"].step(closure)
        state["schedule"].step()
        state["plateau"].step(loss.item())
        state["average"].update_parameters(state["model"])
        copy.deepcopy(state["model"])

    assert simulate(build, step).peak_allocated_bytes > 0


def test_a_loader_accumulation_and_hooks() -> None:
    seen: list[str] = []

    def build(device: torch.device) -> State:
        data = TensorDataset(torch.randint(0, VOCABULARY, (64, LENGTH)))
        model = Transformer().to(device)
        model.blocks[0].register_forward_hook(lambda *_: seen.append("forward"))
        model.blocks[0].register_full_backward_hook(lambda *_: seen.append("backward"))
        model.head.weight.register_hook(lambda gradient: gradient * 0.5)
        return {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "batches": iter(DataLoader(data, batch_size=BATCH, shuffle=True, pin_memory=True)),
            "device": device,
        }

    def step(state: State) -> None:
        for _ in range(2):
            (ids,) = next(state["batches"])
            ids = ids.to(state["device"], non_blocking=True)
            (state["model"](ids, ids) / 2).backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad(set_to_none=False)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pin_memory.*")  # there is no card on this machine
        simulate(build, step)

    assert seen == ["forward", "backward"] * 2 * 3


def test_an_optimizer_made_before_the_model_moves() -> None:
    def build(device: torch.device) -> State:
        model = Transformer()
        optimizer = torch.optim.AdamW(model.parameters())
        before = list(model.parameters())
        assert model.to(device) is model
        assert all(p is q for p, q in zip(before, model.parameters(), strict=True))
        assert all(p.device == device for group in optimizer.param_groups for p in group["params"])
        assert model.head.weight is model.embed.weight
        assert model.head.weight.is_leaf
        return {"model": model, "optimizer": optimizer, "device": device}

    assert sizes(simulate(build, step)) == sizes(simulate(globals()["build"], step))


def test_optimizer_steps_inside_the_backward_pass() -> None:
    """No two gradients live at once, beyond the one that is being made."""

    def build(device: torch.device) -> State:
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8))).to(device)
        for weight in model.parameters():
            optimizer = torch.optim.SGD([weight], lr=0.1)

            def hook(parameter: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            weight.register_post_accumulate_grad_hook(hook)
        return {"model": model, "device": device}

    def step(state: State) -> None:
        state["model"](torch.ones(1, 256, device=state["device"])).sum().backward()

    trace = simulate(build, step)

    gradient = 256 * 256 * 4
    alive = [
        sum(b.size for b in trace.live(event) if b.phase == "backward" and b.size == gradient)
        for event in range(trace.steps[0].first_event, trace.steps[0].last_event)
    ]
    assert gradient <= max(alive) <= 2 * gradient


# --- what code does with tensors ------------------------------------------------------------------


def test_values_from_the_host_are_known() -> None:
    def code(device: torch.device) -> None:
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=device)
        assert not mask.all()
        assert mask[1].all()
        assert mask.sum().item() == 5
        assert mask.cpu().tolist() == mask.tolist() == [[1, 1, 0], [1, 1, 1]]
        assert mask.nonzero().shape == (5, 2)
        assert torch.arange(4, device=device)[mask[0].bool().logical_not().long()].tolist() == [
            0,
            0,
            1,
        ]
        counts = torch.zeros(3, dtype=torch.long)
        counts[1:] += 7
        counts = counts.to(device)
        counts[0] -= 1
        assert counts.tolist() == [-1, 7, 7]
        assert f"{torch.tensor(0.5, device=device):.2f}" == "0.50"
        assert torch.equal(mask, mask.clone())

    once(code)


def test_what_a_weight_has_touched_is_not_known() -> None:
    def code(device: torch.device) -> None:
        model = nn.Linear(3, 3, device=device)
        nn.init.ones_(model.weight)
        loss = model(torch.ones(2, 3, device=device)).sum()
        loss.backward()
        assert loss.item() == 0.0
        assert not torch.isnan(loss)
        assert torch.isfinite(loss)
        assert (loss >= 0) & (loss <= 0)
        assert not (loss == loss + 1)
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True) >= 0

    once(code)


def test_in_place_operators_are_followed() -> None:
    """`x.add_(y)` reaches a device as add(x, y, out=x): it reads what it writes to."""

    def code(device: torch.device) -> None:
        step = torch.zeros((), device=device)
        for number in range(1, 4):
            step += 1
            assert step.item() == number
        x = torch.tensor([4, 9], device=device)
        x.clamp_(max=5).sub_(1)
        x[0] = 8
        assert x.tolist() == [8, 4]
        x.copy_(torch.ones_like(x))
        assert x.tolist() == [1, 1]

    once(code)


def test_masks_choose_as_many_as_are_true() -> None:
    """With values unknown it has to be as many as there can be."""

    def code(device: torch.device) -> None:
        labels = torch.tensor([3, -100, -100, 5], device=device)
        logits = nn.Linear(2, 7, device=device)(torch.ones(4, 2, device=device))
        assert logits[labels != -100].shape == (2, 7)
        assert labels.masked_select(labels > 0).tolist() == [3, 5]
        assert logits[logits > 0].shape == (28,)
        ((logits > 0) | (labels[:, None] == 3)).nonzero()

    once(code)


def test_loops_that_wait_for_a_value_end() -> None:
    """As generation does: sequences end at a length, since no token is the last one."""

    def code(device: torch.device) -> int:
        unfinished = torch.ones(2, dtype=torch.long, device=device)
        ids = torch.zeros(2, 1, dtype=torch.long, device=device)
        embed = nn.Embedding(50, 8, device=device)
        while unfinished.max() != 0:
            logits = embed(ids[:, -1]) @ embed.weight.t()
            ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
            done = torch.isin(ids[:, -1], torch.tensor([3], device=device))
            done = done | torch.full((2,), ids.shape[1] >= 6, device=device)
            unfinished = unfinished & ~done
        lengths.append(ids.shape[1])
        return ids.shape[1]

    lengths: list[int] = []
    once(code)

    assert lengths == [6]


def test_tensors_are_saved_loaded_copied_and_printed() -> None:
    def step(state: State) -> None:
        globals()["step"](state)
        model, optimizer, device = state["model"], state["optimizer"], state["device"]
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        for place in ("cpu", device, None):
            file.seek(0)
            saved = torch.load(file, map_location=place)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        twin = copy.deepcopy(model)
        assert twin.head.weight is twin.embed.weight
        assert twin.head.weight.device == device
        assert "device='simulated:0'" in repr(model.head.weight)
        with pytest.raises(TypeError):
            model.head.weight.detach().numpy()
        model.cpu()
        assert model.head.weight.detach().numpy().shape == (VOCABULARY, WIDTH)
        model.to(device)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    assert simulate(build, step, steps=2).peak_allocated_bytes > 0


def test_storages_can_be_made_on_the_device() -> None:
    def code(device: torch.device) -> None:
        storage = torch.UntypedStorage(64, device=device)
        assert storage.device == device
        tensor = torch.tensor([], device=device).set_(storage, 0, (16,), (1,))
        assert tensor.cpu().tolist() == [0.0] * 16
        assert torch.UntypedStorage(8).device.type == "cpu"

    assert [b.size for b in once(code).blocks] == [64]


class Square(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float16)
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        assert x.dtype == torch.float16
        return x * x

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_functions_written_in_python() -> None:
    def code(device: torch.device) -> None:
        x = torch.randn(8, 8, device=device, requires_grad=True)
        with torch.autocast("cuda", torch.float16):
            Square.apply(x).float().sum().backward()
        Double.apply(x.clone()).sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float32

    once(code)


def test_transforms_of_functions() -> None:
    def code(device: torch.device) -> None:
        model = nn.Linear(4, 4, device=device)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}

        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (x,)).pow(2).mean()

        x = torch.randn(6, 4, device=device)
        assert torch.func.grad(loss)(weights, x)["weight"].shape == (4, 4)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        assert each["weight"].shape == (6, 4, 4)

    once(code)


def test_networks_of_other_kinds() -> None:
    def code(device: torch.device) -> None:
        images = torch.randn(2, 3, 8, 8, device=device)
        convolutions = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.LazyLinear(5),
        ).to(device)
        F.cross_entropy(
            convolutions(images), torch.tensor([1, 2], device=device), label_smoothing=0.1
        ).backward()
        sequence = torch.randn(2, 5, 8, device=device)
        for kind in (nn.LSTM, nn.GRU, nn.RNN):
            layer: Any = kind(8, 8, num_layers=2, batch_first=True, bidirectional=True).to(device)
            layer(sequence)[0].sum().backward()
        nn.TransformerEncoderLayer(8, 2, 16, device=device)(sequence).sum().backward()
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)).to(device)
        spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).to(device)
        spectral(normed(sequence)).sum().backward()

    once(code)


def test_defaults_and_devices_by_other_names() -> None:
    def code(device: torch.device) -> None:
        with torch.device(device):
            assert Transformer().head.weight.device == device
        torch.set_default_device(device)
        torch.set_default_dtype(torch.bfloat16)
        assert torch.zeros(2).device == device
        assert torch.zeros(2).dtype == torch.bfloat16
        assert torch.zeros(1, device="cpu").cuda().device == device
        assert nn.Linear(2, 2, device="cpu").cuda(0).weight.device == device
        assert torch.zeros(1, device=str(device)).device == device
        assert torch.Generator(device=device).manual_seed(1) is not None

    once(code)

    assert torch.zeros(2).device.type == "cpu"
    assert torch.zeros(2).dtype == torch.float32


def test_what_torch_cuda_answers() -> None:
    card = find_card("rtx-4070-ti")
    seen: dict[str, Any] = {}

    def code(device: torch.device) -> None:
        cuda = torch.cuda
        kept = torch.zeros(1 << 20, device=device)
        torch.zeros(1 << 20, device=device)
        start = cuda.Event(enable_timing=True)
        start.record()
        cuda.synchronize()
        seen["time"] = start.elapsed_time(cuda.Event())
        seen["peak"], seen["now"] = cuda.max_memory_allocated(), cuda.memory_allocated(device)
        cuda.reset_peak_memory_stats()
        seen["new peak"] = cuda.memory_stats()["allocated_bytes.all.peak"]
        cuda.empty_cache()
        seen["free"] = cuda.mem_get_info()[0]
        with cuda.nvtx.range("step"):
            cuda.memory._record_memory_history()
        cuda.set_device(cuda.current_device())
        seen["capability"] = cuda.get_device_capability()
        del kept

    simulate(lambda device: device, code, steps=1, card=card)

    size = 4 << 20
    assert seen["peak"] == 2 * size
    assert seen["now"] == seen["new peak"] == size
    assert 0 < seen["free"] < card.budget()
    assert seen["capability"] == (8, 9)
    assert seen["time"] == 0.0


def test_compiled_code_runs_as_it_is_written() -> None:
    def build_compiled(device: torch.device) -> State:
        state = build(device)
        return {**state, "model": torch.compile(state["model"])}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # within torch
        compiled = simulate(build_compiled, step)

    assert sizes(compiled) == sizes(simulate(build, step))


def test_checkpoints_recompute() -> None:
    def build_with(reentrant: bool | None) -> Callable[[torch.device], State]:
        def build(device: torch.device) -> State:
            model = Transformer(blocks=4, reentrant=reentrant).to(device)
            return {
                "model": model,
                "optimizer": torch.optim.SGD(model.parameters()),
                "device": device,
            }

        return build

    plain, first, second = (simulate(build_with(kind), step) for kind in (None, True, False))

    for trace in (first, second):
        assert trace.peak_allocated_bytes < plain.peak_allocated_bytes
        assert any(block.phase == "recompute" for block in trace.blocks)
    assert not any(block.phase == "recompute" for block in plain.blocks)


# --- autocast -------------------------------------------------------------------------------------


def casts(code: Callable[[torch.device, nn.Module], Any], *, frozen: bool = False) -> int:
    """How many 16-bit copies of a 64 x 64 weight `code` makes."""

    def run(device: torch.device) -> None:
        layer = nn.Linear(64, 64, bias=False, device=device).requires_grad_(not frozen)
        code(device, layer)

    return sum(b.size == 2 * 64 * 64 and b.op == "aten::copy_" for b in once(run).blocks)


def twice(device: torch.device, layer: nn.Module) -> None:
    x = torch.ones(1, 64, device=device)
    layer(layer(x))


def test_trainable_weights_are_cast_once_in_a_region() -> None:
    def one_region(device: torch.device, layer: nn.Module) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            twice(device, layer)
            with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
                twice(device, layer)

    def two_regions(device: torch.device, layer: nn.Module) -> None:
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                twice(device, layer)

    def no_cache(device: torch.device, layer: nn.Module) -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            twice(device, layer)

    assert casts(one_region) == 1
    assert casts(two_regions) == 2
    assert casts(no_cache) == 2
    assert casts(one_region, frozen=True) == 4


def test_regions_nest_end_and_decorate() -> None:
    def code(device: torch.device) -> None:
        layer = nn.Linear(4, 4, device=device)
        x = torch.ones(1, 4, device=device)

        @torch.autocast("cuda", dtype=torch.bfloat16)
        def decorated() -> Tensor:
            return layer(x)

        assert decorated().dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32
        with torch.autocast("cuda"):
            assert torch.is_autocast_enabled()
            assert torch.get_autocast_dtype("cuda") == layer(x).dtype == torch.float16
            with torch.autocast("cuda", enabled=False):
                assert layer(x).dtype == torch.float32
            with torch.autocast("cpu"):
                assert layer(x).dtype == torch.float16
            assert F.layer_norm(layer(x), (4,)).dtype == torch.float32
            assert (
                F.cross_entropy(layer(x), torch.tensor([1], device=device)).dtype == torch.float32
            )
            assert (layer(x) @ x.t()).dtype == torch.float16
            assert (layer(x) + x).dtype == torch.float32
            assert layer(x).exp().dtype == layer(x).softmax(-1).dtype == torch.float32
            assert F.gelu(layer(x)).dtype == torch.float16
            with pytest.raises(RuntimeError, match="unsafe to autocast"):
                F.binary_cross_entropy(x, x)
        assert not torch.is_autocast_enabled()

    once(code)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_older_spellings() -> None:
    def code(device: torch.device) -> None:
        layer = nn.Linear(4, 4).cuda()
        scaler = torch.cuda.amp.GradScaler()
        with torch.cuda.amp.autocast(dtype=torch.bfloat16):
            loss = layer(torch.ones(1, 4, device=device))
        assert loss.dtype == torch.bfloat16
        optimizer = torch.optim.SGD(layer.parameters())
        scaler.scale(loss.sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    once(code)


# --- categories -----------------------------------------------------------------------------------

TRAINABLE = sum(p.numel() for p in Transformer().parameters())


def test_categories_of_full_training() -> None:
    """fp32 AdamW: weights, gradients and two states, each 4 bytes a parameter."""
    trace = simulate(build, step)
    end = trace.steps[-1].last_event
    sizes = trace.by_category(end)

    assert sizes["optimizer states"] == 2 * 4 * TRAINABLE
    assert sizes["base weights"] == 4 * TRAINABLE + 4 * LENGTH * WIDTH  # and the buffer
    assert sizes["adapters"] == sizes["gradients"] == 0  # zero_grad has freed them
    assert sizes["activations"] == 0
    assert sizes["workspaces"] == 2 * 8_519_680  # of the two threads

    most = max(trace.by_category(event)["gradients"] for event in range(end))
    assert most == 4 * TRAINABLE
    logits = [b for b in trace.blocks if trace.category(b) == "logits and loss"]
    assert {b.size for b in logits} == {4 * BATCH * LENGTH * VOCABULARY}
    assert sum(sizes.values()) == sum(block.size for block in trace.live(end))


def test_categories_of_an_adapter() -> None:
    """Only what is trained beside frozen weights is an adapter and has gradients and states."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 64, bias=False).requires_grad_(False)
            self.down = nn.Linear(64, 4, bias=False)
            self.up = nn.Linear(4, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    def build(device: torch.device) -> State:
        model = Adapted().to(device)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        return {"model": model, "optimizer": optimizer, "device": device}

    def step(state: State) -> None:
        state["optimizer"].zero_grad()
        state["model"](torch.ones(2, 64, device=state["device"])).sum().backward()
        state["optimizer"].step()

    trace = simulate(build, step)
    sizes = trace.by_category(trace.steps[-1].last_event)

    assert sizes["base weights"] == 4 * 64 * 64
    assert sizes["adapters"] == sizes["gradients"] == 4 * 2 * 64 * 4
    assert sizes["optimizer states"] == 2 * 4 * 2 * 64 * 4


def test_modules_by_name() -> None:
    """What a module makes in its forward pass, and its gradient, bear the module's name."""
    trace = simulate(build, step, steps=1)
    names = dict(Transformer().named_modules())
    made = {block.module for block in trace.blocks if block.phase == "forward"}

    assert {"embed", "blocks.0.qkv", "blocks.1.mlp.0", "head", "norm"} <= made
    assert {"blocks.0", "blocks.1", "Transformer"} <= made  # what they do beside their parts
    assert made - set(names) <= {"", "Transformer"}
    gradients = [b for b in trace.blocks if b.category == "gradients"]
    assert "blocks.1.mlp.0" in {b.module for b in gradients}
    assert sum(trace.by_module().values()) == sum(b.size for b in trace.live())


# --- running out of memory ------------------------------------------------------------------------


def test_running_out_of_memory_is_told() -> None:
    card = find_card("rtx-3060")

    def build(device: torch.device) -> State:
        return {"weight": torch.zeros(1 << 29, device=device, requires_grad=True)}  # 2 GiB

    def step(state: State) -> None:
        doubled = [state["weight"] * 2.0 for _ in range(4)]  # 8 GiB and no more
        sum(part.sum() for part in doubled).backward()  # type: ignore[union-attr]

    trace = simulate(build, step, card=card)
    shortage = trace.out_of_memory

    assert shortage is not None
    assert (shortage.step, shortage.phase) == (1, "backward")
    assert "CUDA out of memory" in shortage.message
    assert trace.peak_reserved_bytes <= card.budget()
    assert trace.budget_bytes == card.budget()
    assert trace.card == card.name
    assert len(trace.steps) == 1

    at_once = simulate(lambda device: torch.zeros(1 << 34, device=device), step, card=card)
    assert at_once.out_of_memory is not None
    assert at_once.out_of_memory.phase == "build"
    assert at_once.out_of_memory.step == 0
    assert not at_once.steps


def test_code_may_cope_with_it() -> None:
    def code(device: torch.device) -> None:
        for size in (1 << 34, 1 << 20):
            try:
                torch.zeros(size, device=device)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()

    trace = simulate(lambda device: device, code, steps=2, card=find_card("rtx-3060"))

    assert trace.out_of_memory is None
    assert len(trace.steps) == 2


# --- the process is left as it was ----------------------------------------------------------------


def process() -> dict[str, Any]:
    """All that `simulate` touches, or code in it may."""

    class Gauges:
        total_bytes = allocated_bytes = reserved_bytes = 0
        peak_allocated_bytes = peak_reserved_bytes = 0
        compute_capability = (8, 9)

    patched = {
        (owner, name): vars(owner).get(name)
        for owner, names in _replacements(Gauges()).items()  # type: ignore[arg-type]
        for name in names
    }
    module: Any = torch.nn.modules.module
    optimizer: Any = sys.modules["torch.optim.optimizer"]
    return {
        "patched": patched,
        "module hooks": (
            len(module._global_forward_pre_hooks),
            len(module._global_forward_hooks),
            len(module._global_forward_hooks_always_called),
        ),
        "optimizer hooks": (
            len(optimizer._global_optimizer_pre_hooks),
            len(optimizer._global_optimizer_post_hooks),
        ),
        "device": getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
        "modes": (
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        ),
        "autocast": [
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda", "simulated")
        ],
        "cache": torch.is_autocast_cache_enabled(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "checkpoint": DefaultDeviceType._default_device_type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "compiler": torch.compiler.is_compiling(),
        "swap": torch.__future__.get_swap_module_params_on_conversion(),
    }


class Stop(Exception):
    pass


def untidy(state: State) -> None:
    """Sets what a script may set for the process, and never undoes it."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(state["device"])
    torch.set_autocast_cache_enabled(False)
    DefaultDeviceType.set_device_type(state["device"].type)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    torch.set_grad_enabled(False)


def untidy_and_stop(state: State) -> None:
    untidy(state)
    with torch.autocast("cuda"), torch.inference_mode(), checkpointless():
        raise Stop


def untidy_and_full(state: State) -> None:
    untidy(state)
    with torch.autocast("cuda"), checkpointless():
        torch.zeros(1 << 40, device=state["device"])


def checkpointless() -> Any:
    return torch.utils.checkpoint.set_checkpoint_early_stop(False)


@pytest.mark.parametrize("end", ["return", "exception", "out of memory", "exception in build"])
def test_the_process_is_left_as_it_was(end: str) -> None:
    simulate(build, step, steps=1)  # torch imports parts of itself at first use
    before = process()

    if end == "return":
        simulate(build, untidy, steps=1)
    elif end == "exception":
        with pytest.raises(Stop):
            simulate(build, untidy_and_stop)
    elif end == "out of memory":
        trace = simulate(build, untidy_and_full, card=find_card("rtx-3060"))
        assert trace.out_of_memory is not None
    else:
        with pytest.raises(Stop):
            simulate(lambda device: untidy_and_stop({"device": device}), step)

    after = process()
    assert {name for name in before if before[name] != after[name]} == set()


def test_a_default_device_of_the_caller_stays() -> None:
    torch.set_default_device("meta")
    try:
        once(lambda device: torch.set_default_device(device))
        assert torch.zeros(1).device.type == "meta"
    finally:
        torch.set_default_device(None)


def train_on_the_cpu() -> list[float]:
    torch.manual_seed(0)
    state = build(torch.device("cpu"))
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(step(state))
    return losses


def test_real_training_is_the_same_before_and_after() -> None:
    before = train_on_the_cpu()
    simulate(build, step)
    assert train_on_the_cpu() == before
    assert before[0] > before[-1] > 0


def test_simulations_repeat_exactly() -> None:
    first, second = simulate(build, step), simulate(build, step)

    assert first.events == second.events
    assert first.peak_reserved_bytes == second.peak_reserved_bytes


def test_simulations_do_not_nest() -> None:
    def nested(device: torch.device) -> None:
        with pytest.raises(DeviceError, match="a simulation is running"):
            simulate(build, step)
        torch.zeros(1 << 20, device=device)  # the outer one goes on

    assert once(nested).peak_allocated_bytes == 4 << 20


def test_a_simulation_in_a_thread() -> None:
    results: list[MemoryTrace] = []
    thread = threading.Thread(target=lambda: results.append(simulate(build, step)))
    thread.start()
    thread.join()

    assert sizes(results[0]) == sizes(simulate(build, step))


def test_tensors_may_outlive_their_simulation() -> None:
    kept: list[Any] = []
    simulate(build, lambda state: kept.append(state["model"]), steps=1)
    model = kept[0]

    assert model.embed.weight.device.type == "simulated"
    assert (model.embed.weight * 2).shape == (VOCABULARY, WIDTH)
    assert not hasattr(torch.zeros(1).untyped_storage(), "_lowvram_values")


def test_errors_of_the_code_reach_the_caller() -> None:
    def wrong(device: torch.device) -> None:
        torch.ones(2, 3, device=device) @ torch.ones(2, 3, device=device)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        once(wrong)
    with pytest.raises(ValueError, match="steps: found 0, allowed 1 or more"):
        simulate(build, step, steps=0)


def test_it_needs_torch_alone() -> None:
    """And torch only once something is simulated."""
    code = """
import sys
for name in ("transformers", "peft", "bitsandbytes", "accelerate", "datasets"):
    sys.modules[name] = None
import lowvram.memory
assert "torch" not in sys.modules
from lowvram.memory import simulate
import torch
def build(device):
    model = torch.nn.Linear(8, 8).to(device)
    return model, torch.optim.AdamW(model.parameters()), device
def step(state):
    model, optimizer, device = state
    model(torch.ones(2, 8, device=device)).sum().backward()
    optimizer.step()
print(simulate(build, step).peak_reserved_bytes)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_device_that_is_named_cuda_is_the_simulated_one() -> None:
    def build(device: torch.device) -> nn.Module:
        torch.set_default_device("cuda")
        by_default = torch.zeros(3)
        torch.set_default_device(None)
        with torch.device("cuda"):
            in_context = torch.ones(3)
        model = nn.Linear(64, 64).to("cuda")
        made = [
            model.weight,
            nn.Linear(8, 8, device="cuda:0").weight,
            torch.tensor([1.0], device="cuda"),
            torch.randn(4).to(torch.device("cuda", 0)),
            torch.ones(2).to(device="cuda", dtype=torch.float16),
            by_default,
            in_context,
        ]
        assert {tensor.device for tensor in made} == {device}
        return model

    def step(model: nn.Module) -> None:
        model(torch.randn(4, 64, device="cuda")).sum().backward()

    assert simulate(build, step).peak_allocated_bytes > 0
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
