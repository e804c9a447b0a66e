"""`simulate` against memory that was really taken: by the same code, run on the CPU.

The profiler of PyTorch sees every allocation of the CPU's allocator. Code under test marks moments
with an allocation of a size that nothing else has, so that both worlds are compared at the same
moments, to the byte. Where kernels of the CPU and of a card allocate alike nothing may differ, but
for what a card's libraries hold for themselves (workspaces) and for the single numbers that
optimizers keep on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from lowvram.memory import MemoryTrace, simulate

CPU = torch.device("cpu")
MARK = 12_345
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 100, 32, 4, 16, 2

State = dict[str, Any]
Build = Callable[[torch.device], State]
Step = Callable[[State], None]


def mark(device: torch.device) -> None:
    torch.empty(MARK, dtype=torch.uint8, device=device)


def really(build: Build, step: Step, *, steps: int = 2) -> tuple[list[int], list[int]]:
    """Live bytes at each mark, and the most there were since the mark before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        state = build(CPU)
        for _ in range(steps):
            step(state)
    live, peak = 0, 0
    marks, peaks = [], []
    events: Any = profile.kineto_results
    for event in sorted(events.events(), key=lambda event: event.start_ns()):
        if event.name() != "[memory]":
            continue
        size = event.nbytes()
        if size == MARK:
            marks.append(live)
            peaks.append(peak)
            peak = live
        elif size != -MARK:
            live += size
            peak = max(peak, live)
    return marks, peaks


def allocations(profile: Any) -> list[int]:
    """Sizes of all, in order."""
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def marked(trace: MemoryTrace) -> tuple[list[int], list[int]]:
    """The same of a simulation, without workspaces and temporaries of the card's kernels."""
    live, peak = 0, 0
    marks, peaks = [], []
    for event in trace.events:
        if event[0] not in "AF":
            continue
        block = trace.blocks[event[1]]
        own = block.category in ("workspaces", "temporaries")
        if block.size == MARK and event[0] == "A":
            marks.append(live)
            peaks.append(peak)
            peak = live
        elif block.size != MARK and not own:
            live += block.size if event[0] == "A" else -block.size
            peak = max(peak, live)
    return marks, peaks


# --- models ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention by matrix products and an MLP, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (b, s, c)
        b, s, _ = x.shape
        qkv = self.qkv(self.norm1(x)).split(WIDTH, dim=-1)
        q, k, v = (part.view(b, s, HEADS, -1).transpose(1, 2) for part in qkv)
        weights = torch.softmax(q @ k.transpose(-2, -1), -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, s, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, *, checkpointed: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpointed = checkpointed

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = recomputed(block, x) if self.checkpointed else block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


def built(
    model: Callable[[], nn.Module] = Transformer,
    optimizer: Callable[[Any], Any] = lambda weights: torch.optim.SGD(weights, foreach=False),
) -> Build:
    def build(device: torch.device) -> State:
        made = model().to(device)
        return {"model": made, "optimizer": optimizer(made.parameters()), "device": device}

    return build


def whole_loss(model: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).view(-1, VOCABULARY), ids.view(-1))


def chunked_loss(model: Any, ids: Tensor) -> Tensor:
    """The head and the loss on a quarter of the positions at a time, recomputed in backward."""

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.head(hidden), targets, reduction="sum")

    pairs = zip(model.hidden(ids).flatten(0, 1).chunk(4), ids.flatten().chunk(4), strict=True)
    parts = [recomputed(part, hidden, targets) for hidden, targets in pairs]
    return torch.stack(parts).sum()


def trained(loss: Callable[[Any, Tensor], Tensor] = whole_loss, accumulate: int = 1) -> Step:
    """A step with marks after inputs, each forward and backward pass, the optimizer, its end."""

    def step(state: State) -> None:
        model, optimizer, device = state["model"], state["optimizer"], state["device"]
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device=device)
        mark(device)
        for _ in range(accumulate):
            value = loss(model, ids)
            mark(device)
            value.backward()
            del value
            mark(device)
        optimizer.step()
        mark(device)
        optimizer.zero_grad()
        mark(device)

    return step


# --- live bytes, to the byte ----------------------------------------------------------------------

CASES: dict[str, tuple[Build, Step]] = {
    "plain": (built(), trained()),
    "untied": (built(lambda: Transformer(tied=False)), trained()),
    "checkpointed": (built(lambda: Transformer(checkpointed=True)), trained()),
    "accumulated": (built(), trained(accumulate=3)),
    "chunked loss": (built(), trained(chunked_loss)),
}


@pytest.mark.parametrize("case", CASES)
def test_live_bytes_are_those_of_a_real_step(case: str) -> None:
    build, step = CASES[case]
    expected, _ = really(build, step)
    found, _ = marked(simulate(build, step, steps=2))

    assert found == expected
    assert len(found) >= 10
    assert max(found) > 1.2 * min(found)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, momentum=0.9, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, foreach=False, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_are_those_of_a_real_step(name: str) -> None:
    """But for the step counters, 4 bytes a parameter, which stay on the host."""
    build, step = built(optimizer=OPTIMIZERS[name]), trained()
    expected, _ = really(build, step)
    found, _ = marked(simulate(build, step, steps=2))

    state = build(CPU)
    step(state)
    counters = sum("step" in values for values in state["optimizer"].state.values())
    differences = [real - simulated for real, simulated in zip(expected, found, strict=True)]
    assert differences[3:] == [4 * counters] * 7  # from the first optimizer step on
    assert differences[:3] in ([0] * 3, [4 * counters] * 3)  # Adagrad makes its states at once


def test_the_peak_of_foreach_optimizers() -> None:
    """AdamW's for-loop and foreach forms take different temporaries, on both machines alike."""
    for foreach in (False, True):
        build = built(
            lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))),
            lambda p, foreach=foreach: torch.optim.AdamW(p, foreach=foreach),
        )

        def step(state: State) -> None:
            for parameter in state["model"].parameters():
                parameter.grad = torch.zeros_like(parameter)
            mark(state["device"])
            state["optimizer"].step()
            mark(state["device"])

        _, expected = really(build, step)
        _, found = marked(simulate(build, step, steps=2))
        assert abs(expected[3] - found[3]) < 500, foreach  # the counters and numbers on the host
        parameters = 4 * 4 * 65 * 64
        temporaries = found[3] - 4 * parameters
        assert temporaries >= parameters if foreach else temporaries < parameters


class Residual(nn.Module):
    """Of operators that the autocasts of CPU and CUDA treat alike."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.layers[1].requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.relu(layer(x))
        return x


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_autocast_copies_weights_as_the_cpu_does(
    frozen: bool, cached: bool, checkpointed: bool
) -> None:
    """Trainable weights once in a region, which may run the model twice; frozen ones each time."""

    def build(device: torch.device) -> State:
        model = Residual(frozen=frozen).to(device)
        weights = [p for p in model.parameters() if p.requires_grad]
        return {"model": model, "optimizer": torch.optim.SGD(weights), "device": device}

    def step(state: State) -> None:
        model, device = state["model"], state["device"]
        x = torch.ones(BATCH, LENGTH, WIDTH, device=device)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=cached):
            y = model(x)
            y = recomputed(model, y) if checkpointed else model(y)
            loss = F.mse_loss(y, x)
            del y
            mark(device)
        mark(device)
        loss.backward()
        mark(device)
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        mark(device)

    expected, _ = really(build, step)
    found, _ = marked(simulate(build, step, steps=2))
    assert found == expected


class Branches(nn.Module):
    """A tensor that several operators read, views of one tensor, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x)
        parts = torch.tanh(self.q(x)), torch.tanh(self.k(x)), torch.tanh(self.v(x))
        first, second = (x * x).tanh().chunk(2, dim=1)
        return (parts[0] * parts[1] * parts[2]) + torch.cat([second, first], 1) + x


def test_gradients_are_summed_up_in_place() -> None:
    """All that is ever taken in a backward pass, and its peak, not only what is left of it."""

    def step(state: State) -> None:
        x = torch.ones(64, WIDTH, device=state["device"], requires_grad=True)
        target = torch.ones(64, WIDTH, device=state["device"])
        y = state["model"](x)
        mark(state["device"])
        y.backward(target)
        mark(state["device"])
        state["model"](x).backward(target)
        mark(state["device"])
        state["optimizer"].zero_grad()

    build = built(Branches)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        state = build(CPU)
        step(state)
    real = allocations(profile)
    trace = simulate(build, step, steps=1)
    found = [b.size for b in trace.blocks if b.category not in ("workspaces", "temporaries")]

    large = 4 * WIDTH * WIDTH  # less are numbers that the CPU makes tensors of
    assert [n for n in found if n >= large] == [n for n in real if n >= large]
    expected_marks, expected_peaks = really(build, step)
    assert marked(trace)[0] == expected_marks[:3]
    differences = [a - b for a, b in zip(expected_peaks, marked(trace)[1], strict=False)]
    assert all(abs(difference) < 64 for difference in differences)


# --- by hand --------------------------------------------------------------------------------------


def test_activations_of_a_block_by_hand() -> None:
    """What one fp32 block keeps for its backward pass, for n = b s c floats of its input x.

    The norm keeps its output n (x lives anyway) and 2 b s statistics. The projection to q, k and v
    makes 3 n; q, k and v are views of it, and keys are read transposed. Matrix products of more
    than two dimensions copy what is not contiguous: q, k and v are copied for bmm, 3 n, and the
    projection itself is freed. Weights after the softmax are b h s s. The mixed heads are made
    contiguous for the output layer: n, while the product's own result is freed. The output layer's
    result is freed once added to x; the sum is n. The second half keeps n and 2 b s for the norm,
    4 n before and 4 n after the GELU. The result is n.
    """

    def build(device: torch.device) -> State:
        return {"model": Block().to(device), "device": device}

    def step(state: State) -> None:
        x = torch.ones(BATCH, LENGTH, WIDTH, device=state["device"], requires_grad=True)
        mark(state["device"])
        y = state["model"](x)
        mark(state["device"])
        del y

    before, after = marked(simulate(build, step, steps=1))[0]

    n = BATCH * LENGTH * WIDTH
    statistics = 2 * 2 * BATCH * LENGTH
    first = n + 3 * n + BATCH * HEADS * LENGTH * LENGTH + n + n
    second = n + 4 * n + 4 * n + n
    assert after - before == 4 * (first + second + statistics)
    assert really(build, step, steps=1)[0][1] == after


def test_logits_and_loss_by_hand() -> None:
    """Cross entropy keeps the logits' logarithms; their gradient is a third tensor as large."""
    tokens, vocabulary = 64, 1000
    size = 4 * tokens * vocabulary

    def step(device: torch.device) -> None:
        logits = torch.zeros(tokens, vocabulary, device=device, requires_grad=True) * 1.0
        loss = F.cross_entropy(logits, torch.zeros(tokens, dtype=torch.long, device=device))
        mark(device)
        loss.backward()
        mark(device)

    trace = simulate(lambda device: device, step, steps=1)
    marks, peaks = marked(trace)

    assert marks[0] - 2 * size < 2000 + size  # a leaf, the logits and their logarithms
    assert [b.size for b in trace.blocks].count(size) >= 4
    assert peaks[1] >= 4 * size


# --- another tracker ------------------------------------------------------------------------------


def test_categories_agree_with_mem_tracker() -> None:
    """torch.distributed's tracker, on the CPU, with hooks and a dispatch mode of its own."""
    build = built(optimizer=lambda p: torch.optim.AdamW(p, foreach=False))
    step = trained()
    state = build(CPU)
    tracker: Any = MemTracker()
    tracker.track_external(state["model"], state["optimizer"])
    optimizer, snapshots = state["optimizer"], []
    zero_grad = optimizer.zero_grad
    optimizer.zero_grad = lambda: (snapshots.append(tracker.get_tracker_snapshot()), zero_grad())
    with tracker:
        step(state)
    sizes = {getattr(kind, "value", kind): size for kind, size in snapshots[0][CPU].items()}

    trace = simulate(build, step, steps=1)
    event = next(b.end for b in reversed(trace.blocks) if b.category == "gradients")
    assert event is not None
    found = trace.by_category(max(e for e in range(event) if trace.events[e][0] == "A") - 1)

    counters = 4 * len(list(state["model"].parameters()))
    assert found["base weights"] == sizes["Parameter"]
    assert found["gradients"] == sizes["Gradient"]
    assert found["optimizer states"] == sizes["Optstate"] - counters


# --- bitsandbytes ---------------------------------------------------------------------------------


def state_bytes(optimizer: Any) -> int:
    tensors = [
        value
        for values in optimizer.state.values()
        for name, value in values.items()
        if isinstance(value, Tensor) and not name.startswith("qmap")
    ]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamW"])
def test_8_bit_states_are_those_of_the_real_optimizer(name: str) -> None:
    """One byte a number and its blocks' scales for large weights, fp32 for small ones."""

    def step(state: State) -> None:
        x = torch.ones(2, 128, device=state["device"])
        state["model"](x).sum().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 8))

    def optimizer(weights: Any) -> Any:
        return getattr(bnb.optim, name)(weights, lr=1e-3)

    build = built(model, optimizer)
    trace = simulate(build, step)
    real = build(CPU)
    step(real)

    maps = {"AdamW8bit": 2, "Lion8bit": 1, "AdamW": 0}[name] * 256 * 4  # shared by all weights
    found = trace.by_category(trace.steps[-1].last_event)
    assert found["optimizer states"] == state_bytes(real["optimizer"]) + maps


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4, its scales quantised too", "int8"])
def test_quantised_weights_are_those_of_the_real_layer(kind: str) -> None:
    """Weights, scales and tables, moved to the device as a user moves them."""

    def layer() -> Any:
        if kind == "int8":
            return bnb.nn.Linear8bitLt(256, 512, bias=False, has_fp16_weights=False)
        made = bnb.nn.Linear4bit(
            256, 512, bias=False, quant_type=kind[:3], compress_statistics="scales" in kind
        )
        made.weight.data = made.weight.data.half()
        return made

    def build(device: torch.device) -> State:
        return {"model": layer().to(device)}

    trace = simulate(build, lambda state: None, steps=1)

    if kind == "int8":
        weight, scales = 256 * 512, 4 * 512
        assert sum(b.size for b in trace.live(len(trace.events) - 1)) == weight + scales
        return
    real = layer().to(CPU).weight
    found = [real.data, real.quant_state.absmax, real.quant_state.code]
    if (nested := real.quant_state.state2) is not None:
        found += [nested.absmax, nested.code, real.quant_state.offset]
        found.append(bnb.functional.name2qmap["dynamic"])  # of which each layer has a copy
    assert sum(b.size for b in trace.live(len(trace.events) - 1)) == sum(t.nbytes for t in found)


def test_paged_states_are_not_on_the_card() -> None:
    """They live in managed memory; small ones, under 100,000 numbers, are ordinary."""

    def build(device: torch.device) -> State:
        model = nn.Sequential(nn.Linear(512, 256, bias=False), nn.Linear(256, 128)).to(device)
        optimizer = bnb.optim.PagedAdamW8bit(model.parameters(), lr=1e-3)
        return {"model": model, "optimizer": optimizer, "device": device}

    def step(state: State) -> None:
        state["model"](torch.ones(2, 512, device=state["device"])).sum().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        large, small, _ = state["model"].parameters()
        states = state["optimizer"].state
        assert states[large]["state1"].is_paged
        assert not hasattr(states[small]["state1"], "is_paged")

    get_paged = bnb.functional.get_paged
    trace = simulate(build, step)
    found = trace.by_category(trace.steps[-1].last_event)["optimizer states"]

    scales = 2 * 4 * (512 * 256 + 256 * 128) // 256
    assert found == 2 * 256 * 128 + 2 * 4 * 128 + scales + 2 * 4 * 256
    assert bnb.functional.get_paged is get_paged
    assert not bnb.functional.GlobalPageManager.get_instance().paged_tensors


def test_the_quantisation_map_stays_on_its_device() -> None:
    """The library keeps one for the process: a later real run must not get a simulated one."""
    bnb.functional.name2qmap.clear()

    def build(device: torch.device) -> Any:
        return bnb.functional.quantize_blockwise(torch.zeros(64, 64, device=device))

    traces = [simulate(build, lambda state: None, steps=1) for _ in range(2)]

    assert not bnb.functional.name2qmap
    bnb.functional.quantize_blockwise(torch.zeros(64, 64))
    traces.append(simulate(build, lambda state: None, steps=1))
    assert bnb.functional.name2qmap["dynamic"].device == CPU
    assert len({trace.peak_allocated_bytes for trace in traces}) == 1
