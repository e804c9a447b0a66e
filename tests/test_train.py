"""A step against a loop written by hand, and what must not change it."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lines, make_gpt2, make_tokenizer, save
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lowvram.adapters import Adapter, add_adapter, plain_model
from lowvram.build import Numerics, build, choose_numerics, warmup_steps
from lowvram.data import IGNORED, Batch, ReadReport, TokenStore, pack, windows
from lowvram.errors import DeviceError, TrainingError
from lowvram.loss import decoder, token_loss
from lowvram.optimizers import learning_rate_at, make_optimizer
from lowvram.plan import plan
from lowvram.recipe import with_overrides
from lowvram.train import StepMetrics, TrainState, train, train_step

# As attributes of the package these are the functions.
BUILD, TRAIN = import_module("lowvram.build"), import_module("lowvram.train")
CPU = torch.device("cpu")
VOCABULARY = len(make_tokenizer())
Gradients = dict[str, torch.Tensor]


def randomise_adapters(model: nn.Module) -> None:
    """A fresh adapter has B = 0, which hides most mistakes."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def make_state(
    *,
    model: PreTrainedModel | None = None,
    optimizer: Any = "sgd",
    learning_rate: float = 0.1,
    rank: int = 4,
    **changes: Any,
) -> TrainState:
    model = model or make_gpt2()
    torch.manual_seed(3)
    adapted = add_adapter(model, Adapter(rank=rank, target_modules=["c_attn", "c_proj"]))
    randomise_adapters(adapted)
    made = make_optimizer(
        optimizer,
        adapted.parameters(),
        learning_rate=learning_rate,
        weight_decay=0.01,
        betas=(0.9, 0.99),
    )
    return TrainState(
        model=adapted, optimizer=made, learning_rate=lambda step: learning_rate, **changes
    )


def make_store(lengths: Sequence[int], prompt_lengths: Sequence[int] | None = None) -> TokenStore:
    n = len(lengths)
    tokens = np.random.default_rng(11).integers(0, VOCABULARY, sum(lengths))
    return TokenStore(
        tokens=tokens.astype(np.uint16),
        starts=np.cumsum([0, *lengths]),
        prompt_lengths=np.array(prompt_lengths or [0] * n, np.int32),
        hashes=np.arange(n, dtype=np.uint64),
        byte_counts=np.ones(n, np.int64),
        word_counts=np.ones(n, np.int64),
        report=ReadReport(documents=n),
        sha256="",
    )


def make_windows(
    lengths: Sequence[int], *, micro: int, batch: int, epochs: int = 1, packing: bool = False
) -> list[list[Batch]]:
    store = make_store(lengths)
    blocks = pack(store, np.arange(len(lengths)), max_seq_len=32, packing=packing, seed=0)
    return [
        window
        for epoch in range(epochs)
        for window in windows(
            blocks,
            epoch=epoch,
            global_batch_size=batch,
            micro_batch_size=micro,
            seed=0,
            pad_token_id=VOCABULARY - 1,
        )
    ]


def without_targets(b: int = 2, s: int = 5) -> Batch:
    return Batch(
        input_ids=torch.arange(b * s).reshape(b, s),
        labels=torch.full((b, s), IGNORED),
        position_ids=None,
        target_tokens=0,
        tokens=b * s,
    )


def weights(model: nn.Module) -> Gradients:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def moments(optimizer: torch.optim.Optimizer) -> Gradients:
    """All tensors of the state, copied, named by where they are."""
    found = {}
    for number, state in enumerate(optimizer.state.values()):
        for key, value in state.items():
            found[f"{number} {key}"] = torch.as_tensor(value).clone()
    return found


def assert_equal(one: Gradients, other: Gradients) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_close(one: Gradients, other: Gradients, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=name)


@contextmanager
def gradients_at_steps(state: TrainState) -> Iterator[list[Gradients]]:
    """What the optimizer is given at each of its steps."""
    seen: list[Gradients] = []

    def look(*_: Any) -> None:
        named = state.model.named_parameters()
        seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    handle = state.optimizer.register_step_pre_hook(look)
    yield seen
    handle.remove()


@contextmanager
def poisoned(model: nn.Module, *numbers: int) -> Iterator[None]:
    """These forward passes (counted from 0) give NaN."""
    passes = 0

    def poison(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal passes
        if passes in numbers:
            output.last_hidden_state = output.last_hidden_state * math.nan
        passes += 1
        return output

    handle = decoder(plain_model(model)).register_forward_hook(poison)
    yield
    handle.remove()


def segments_of(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of each packed document on its own, the padding left out."""
    for row in range(len(batch.input_ids)):
        ids, labels = batch.input_ids[row], batch.labels[row]
        starts = [0]
        if batch.position_ids is not None:
            starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if (labels[start:end] != IGNORED).any():
                yield ids[None, start:end], labels[None, start:end]


# Parity and the arithmetic of windows


def reference_run(
    directory: Path, method: str, start: Gradients, data: list[list[Batch]]
) -> tuple[Gradients, list[float], list[float]]:
    """peft, Hugging Face's loss on one document at a time, torch's AdamW: no code of ours."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    if method == "lora":
        settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 4, "lora_alpha": 16}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).train()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    matrices = {"params": [p for p in named.values() if p.ndim == 2], "weight_decay": 0.1}
    vectors = {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0}
    if method == "lora":
        options = {"lr": 5e-3, "betas": (0.8, 0.95), "foreach": False, "fused": False}
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([matrices, vectors], **options)
    else:
        optimizer = torch.optim.SGD([matrices, vectors], lr=0.1)
    losses, norms = [], []
    for window in data:
        pieces = [piece for batch in window for piece in segments_of(batch)]
        targets = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in pieces)
        total = 0.0
        for ids, labels in pieces:
            loss = model(ids, labels=labels, num_items_in_batch=targets, use_cache=False).loss
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {n: p.detach() for n, p in named.items()}, losses, norms


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("packing", [True, False])
def test_ten_steps_equal_a_loop_of_peft_transformers_and_torch(
    packing: bool, method: str, make_recipe: Any, gpt2_dir: Path
) -> None:
    """1e-5 in the weights after ten clipped steps, 1e-5 in every logged loss.

    Adapters with AdamW, the whole model with SGD: there Adam makes steps of full size from
    gradients that are nothing but rounding, such as those of the keys' biases.
    """
    lora = {"method.rank": 4, "method.target_modules": ["c_attn"], "train.optimizer": "adamw"}
    full = {"method.name": "full", "train.optimizer": "sgd", "train.learning_rate": 0.1}
    recipe = make_recipe(
        **{"train.learning_rate": 5e-3} | (lora if method == "lora" else full),
        **{
            "data.packing": packing,
            "fit.micro_batch_size": 2,
            "train.global_batch_size": 4,
            "train.max_steps": 10,
            "train.schedule": "constant",
            "train.warmup_steps": 0,
            "train.weight_decay": 0.1,
            "train.betas": [0.8, 0.95],
            "train.max_grad_norm": 0.5,
        },
    )
    planned = plan(recipe)
    data = list(planned.windows())
    assert len(data) == 10
    assert any(batch.position_ids is not None for w in data for batch in w) is packing
    state = build(recipe, total_steps=10)
    randomise_adapters(state.model)
    start = weights(state.model)
    steps = list(train(state, data))

    wanted, losses, norms = reference_run(gpt2_dir, method, start, data)
    assert_close(weights(state.model), wanted, 1e-5)
    assert max((start[n] - wanted[n]).abs().max() for n in start) > 1e-2
    assert [s.loss for s in steps] == pytest.approx(losses, abs=1e-5)
    assert [s.grad_norm for s in steps] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.5, "clipping was not tried"
    assert (state.step, state.optimizer_steps) == (10, 10)
    assert state.tokens == sum(batch.tokens for window in data for batch in window)


@pytest.mark.parametrize("chunked", [True, False])
def test_settings_of_the_recipe_reach_the_step(
    chunked: bool, make_recipe: Any, gpt2_dir: Path
) -> None:
    """The smoothed loss is torch's, on Hugging Face's logits, to 1e-5; the rest is as written."""
    recipe = make_recipe(
        **{
            "train.label_smoothing": 0.2,
            "train.chunked_loss": chunked,
            "train.max_nonfinite_steps": 7,
            "train.max_grad_norm": None,
            "train.learning_rate": 4e-3,
            "train.schedule": "linear",
            "train.warmup_steps": 0.3,
        }
    )
    state = build(recipe, total_steps=10)
    assert (state.max_nonfinite_steps, state.max_grad_norm) == (7, None)
    assert state.chunked_loss is chunked
    curve = [state.learning_rate(step) for step in range(10)]
    assert curve == pytest.approx([1e-3, 2e-3, 3e-3, *(4e-3 * n / 7 for n in range(7, 0, -1))])
    (window,) = make_windows([9, 30, 5], micro=2, batch=3)
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir, dtype=torch.float32)
    pieces = [piece for batch in window for piece in segments_of(batch)]
    logits = torch.cat([model(ids).logits[0, :-1] for ids, _ in pieces])
    targets = torch.cat([labels[0, 1:] for _, labels in pieces])
    wanted = F.cross_entropy(logits, targets, label_smoothing=0.2).item()
    head_runs = []
    head = plain_model(state.model).get_output_embeddings()
    head.register_forward_hook(lambda *_: head_runs.append(1))
    assert train_step(state, window).loss == pytest.approx(wanted, rel=1e-5)
    assert bool(head_runs) is not chunked


def test_a_warm_up_longer_than_the_run_is_shortened(make_recipe: Any) -> None:
    found = {
        (wanted, total): warmup_steps(make_recipe(**{"train.warmup_steps": wanted}), total)
        for wanted, total in [(0, 5), (4, 5), (0.1, 50), (0.1, 4), (5, 5), (500, 20)]
    }
    note = "train.warmup_steps {} is not shorter than the run ({} steps): warming up over {}"
    assert found == {
        (0, 5): (0, None),
        (4, 5): (4, None),
        (0.1, 50): (5, None),
        (0.1, 4): (0, None),
        (5, 5): (0, note.format(5, 5, 0)),
        (500, 20): (2, note.format(500, 20, 2)),
    }


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("sgd", 0.5), ("adamw", 1e-3)])
def test_how_a_step_is_cut_changes_nothing(optimizer: str, learning_rate: float) -> None:
    """Rows with 2 to 16 targets: weights to 1e-6, the logged loss to 1e-5."""
    lengths = [n + 1 for n in (16, 4, 9, 2, 16, 3, 12, 5)]
    results = {}
    for micro in (8, 2, 1, 3):
        state = make_state(optimizer=optimizer, learning_rate=learning_rate)
        (window,) = make_windows(lengths, micro=micro, batch=8)
        assert [len(batch.input_ids) for batch in window] == {
            8: [8], 2: [2] * 4, 1: [1] * 8, 3: [3, 3, 2],
        }[micro]  # fmt: skip
        before = weights(state.model)
        metrics = train_step(state, window)
        assert metrics.target_tokens == sum(lengths) - 8
        after = weights(state.model)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        results[micro] = after, metrics
    whole, whole_metrics = results.pop(8)
    for after, metrics in results.values():
        assert_close(after, whole, 1e-6)
        assert metrics.loss == pytest.approx(whole_metrics.loss, abs=1e-5)
        assert metrics.grad_norm == pytest.approx(whole_metrics.grad_norm, rel=1e-5)


def test_what_is_left_of_an_epoch_is_a_step_of_its_own() -> None:
    """Ten rows in steps of four, twice: 6 steps, and the third has just the two left over."""
    state = make_state(max_grad_norm=None)
    data = make_windows(range(5, 15), micro=1, batch=4, epochs=2)
    assert [len(window) for window in data] == [4, 4, 2, 4, 4, 2]
    with gradients_at_steps(state) as seen:
        for number, window in enumerate(data):
            if number == 2:
                model = plain_model(state.model)
                targets = sum(len(labels[0]) - 1 for b in window for _, labels in segments_of(b))
                for ids, labels in (piece for batch in window for piece in segments_of(batch)):
                    model(ids, labels=labels, num_items_in_batch=targets).loss.backward()
                wanted = {n: p.grad for n, p in state.model.named_parameters() if p.requires_grad}
                state.optimizer.zero_grad()
            train_step(state, window)
            assert all(parameter.grad is None for parameter in state.model.parameters())
    assert len(seen) == state.optimizer_steps == 6
    assert_close(seen[2], wanted, 1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw8bit"])
def test_windows_without_a_target_are_skipped(optimizer: str) -> None:
    """No NaN of 0 / 0, no weight decay, no moment that moves on."""
    state = make_state(optimizer=optimizer, learning_rate=1e-2)
    (window,) = make_windows([9, 7], micro=2, batch=2)
    train_step(state, window)
    before = weights(state.model)
    state_before = moments(state.optimizer)
    for empty in ([without_targets()], [without_targets(), without_targets(1)]):
        metrics = train_step(state, empty)
        assert (metrics.skipped, metrics.loss, metrics.target_tokens) == ("empty", 0.0, 0)
        json.dumps(metrics.to_json(), allow_nan=False)
    assert_equal(weights(state.model), before)
    assert_equal(moments(state.optimizer), state_before)
    assert (state.step, state.optimizer_steps, state.nonfinite_in_a_row) == (3, 1, 0)


def test_a_micro_batch_without_a_target_adds_nothing() -> None:
    (window,) = make_windows([9, 7, 4], micro=2, batch=3)
    alone, mixed = make_state(), make_state()
    expected = train_step(alone, window)
    found = train_step(mixed, [without_targets(), window[0], without_targets(), window[1]])
    assert_equal(weights(mixed.model), weights(alone.model))
    assert (found.loss, found.skipped) == (expected.loss, None)


# Packing and labels


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_packed_documents_do_not_see_each_other(
    architecture: str, attention: str, checkpointing: bool, make_recipe: Any, request: Any
) -> None:
    """Hidden states of a step, and in evaluation mode, through the head: 1e-4 of each alone."""
    directory = request.getfixturevalue(f"{architecture}_dir")
    recipe = make_recipe(**{"model.name": str(directory), "model.attention": attention})
    recipe = with_overrides(recipe, {"fit.gradient_checkpointing": checkpointing})
    state = build(recipe, total_steps=1)
    randomise_adapters(state.model)
    state.learning_rate = lambda step: 0.0
    model = plain_model(state.model)
    ((batch,),) = make_windows([7, 9, 12, 5, 20, 9], micro=2, batch=2, packing=True)
    assert batch.position_ids is not None
    seen: list[tuple[bool, torch.Tensor]] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append((module.training, output.last_hidden_state.detach()))

    handle = decoder(model).register_forward_hook(look)
    train_step(state, [batch])
    model.eval()
    options = {"target_tokens": batch.target_tokens}
    token_loss(model, batch.input_ids, batch.labels, batch.position_ids, **options)
    handle.remove()
    assert [training for training, _ in seen] == [True, False]

    documents = 0
    for row in range(len(batch.input_ids)):
        starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], batch.input_ids.shape[1]], strict=True):
            alone = model(batch.input_ids[row : row + 1, start:end], use_cache=False).logits[0]
            documents += 1
            for _, hidden in seen:
                packed = model.get_output_embeddings()(hidden[row, start:end])
                torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)
    assert documents >= 6


def test_every_token_but_the_first_of_a_document_is_a_target(
    make_recipe: Any, text_file: Path
) -> None:
    """From the text file to the batches: the targets are those of each line alone."""
    changes = {"data.validation_fraction": 0.0, "train.max_steps": None, "train.epochs": 1}
    tokenizer = make_tokenizer()
    documents = [[*tokenizer(line)["input_ids"], tokenizer.eos_token_id] for line in lines(40)]
    wanted = sorted(tuple(ids[1:]) for ids in documents if len(ids) <= 64)
    assert len(wanted) > 20
    for packing in (True, False):
        planned = plan(make_recipe(**changes, **{"data.packing": packing}))
        found = []
        for batch in (batch for window in planned.windows() for batch in window):
            assert batch.target_tokens == int((batch.labels[:, 1:] != IGNORED).sum())
            assert (batch.labels[:, 0] == IGNORED).all()
            for ids, labels in segments_of(batch):
                assert labels[0, 0] == IGNORED
                chosen = labels[0] != IGNORED
                assert torch.equal(labels[0][chosen], ids[0][chosen])
                found.append(tuple(labels[0][chosen].tolist()))
        assert set(wanted) <= set(found)
        # A document of more than 64 tokens is cut, and each part has one token without a target.
        parts = sum(-(-len(ids) // 64) for ids in documents)
        lonely = sum(len(ids) % 64 == 1 for ids in documents)
        assert len(found) == parts - lonely
        assert sum(map(len, found)) == sum(map(len, documents)) - parts


def test_every_epoch_sees_every_token_in_an_order_of_its_own(make_recipe: Any) -> None:
    """And a plan that starts at a later step goes on as the whole one does."""
    planned = plan(make_recipe(**{"train.max_steps": 25, "fit.micro_batch_size": 2}))
    assert planned.steps_per_epoch == 10
    everything = list(planned.windows())
    steps = [[batch.input_ids.tolist() for batch in window] for window in everything]
    assert len(steps) == 25
    epochs = [steps[:10], steps[10:20], steps[20:]]
    assert epochs[0] != epochs[1]
    assert epochs[0][:5] != epochs[2]
    targets = [
        sorted(label for batch in sum(part, []) for label in batch.labels.flatten().tolist())
        for part in (everything[:10], everything[10:20])
    ]
    kept = [[label for label in labels if label != IGNORED] for labels in targets]
    assert kept[0] == kept[1]
    assert len(kept[0]) == planned.blocks.targets
    for start in (0, 3, 10, 13, 20, 24, 25):
        later = [[b.input_ids.tolist() for b in window] for window in planned.windows(start)]
        assert later == steps[start:]


# Number formats


@pytest.fixture(scope="module")
def fp16_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_gpt2().half(), tmp_path_factory.mktemp("models") / "fp16")


METHODS: list[dict[str, Any]] = [
    {"method.name": "lora"},
    {"method.name": "dora"},
    {"method.name": "rslora"},
    {"method.name": "full"},
    {"method.bias": "all"},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(method.values()))
def test_what_is_trained_is_fp32_whatever_the_checkpoint(
    method: dict[str, Any],
    precision: Any,
    fp16_dir: Path,
    make_recipe: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the base is stored as asked: `auto` follows the precision, unless it is trained."""
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)
    recipe = make_recipe(
        **{"model.name": str(fp16_dir), "train.precision": precision, "train.optimizer": "adamw"},
        **method,
    )
    state = build(recipe, total_steps=3)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    trains_base = method.get("method.name") == "full" or "method.bias" in method
    assert {p.dtype for p in state.trainable()} == {torch.float32}
    frozen = {p.dtype for p in state.model.parameters() if not p.requires_grad}
    if method.get("method.name") != "full":
        assert frozen == {torch.float32 if trains_base else dtypes[precision]}
    assert (state.scaler is not None) is (precision == "fp16")
    if state.scaler is not None:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    (window,) = make_windows([9, 7], micro=1, batch=2)
    before = weights(state.model)
    assert train_step(state, window).skipped is None
    after = weights(state.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {value.dtype for value in after.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_base_is_stored_as_asked(
    dtype: str, fp16_dir: Path, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)
    recipe = make_recipe(**{"model.name": str(fp16_dir), "model.dtype": dtype})
    state = build(recipe, total_steps=3)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {p.dtype for p in state.model.parameters() if not p.requires_grad} == {wanted}
    assert {p.dtype for p in state.trainable()} == {torch.float32}


def fp16_state(optimizer: str = "adamw", scale: float = 1024.0, **changes: Any) -> TrainState:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    return make_state(optimizer=optimizer, precision="fp16", scaler=scaler, **changes)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_an_fp16_overflow_skips_the_step(optimizer: str, bad: float) -> None:
    """Weights, moments and schedule stay, the scale is halved, the run goes on."""
    state = fp16_state(optimizer, rank=128, learning_rate=1e-3)

    def schedule(step: int) -> float:
        return learning_rate_at(step, peak=1e-3, total_steps=5, warmup_steps=0, schedule="linear")

    state.learning_rate = schedule
    data = make_windows([9, 7, 8, 12, 6, 9], micro=1, batch=1)
    hit = state.trainable()[1]
    steps, snapshots = [], []
    for number, window in enumerate(data):
        if number == 2:
            handle = hit.register_hook(lambda gradient: torch.full_like(gradient, bad))
        steps.append(train_step(state, window))
        if number == 2:
            handle.remove()
        snapshots.append((weights(state.model), moments(state.optimizer)))
    assert [s.skipped for s in steps] == [None, None, "overflow", None, None, None]
    for kept, before in zip(snapshots[2], snapshots[1], strict=True):
        assert_equal(kept, before)
    assert all(not torch.equal(snapshots[3][0][n], snapshots[2][0][n]) for n in snapshots[2][0])
    assert [s.loss_scale for s in steps] == [1024, 1024, 512, 512, 512, 512]
    assert math.isfinite(steps[2].loss)
    curve = [s.learning_rate for s in steps if s.skipped is None]
    assert curve == [schedule(i) for i in range(5)]
    assert steps[2].learning_rate == steps[3].learning_rate
    assert (state.step, state.optimizer_steps, state.nonfinite_in_a_row) == (6, 5, 0)
    assert steps[2].to_json()["grad_norm"] is None


def test_fp16_without_any_usable_scale_ends_the_run() -> None:
    state = fp16_state(scale=4.0)
    state.trainable()[0].register_hook(lambda gradient: gradient * math.inf)
    before = weights(state.model)
    seen: list[StepMetrics] = []
    with pytest.raises(TrainingError) as error:
        seen.extend(train(state, make_windows([9] * 9, micro=1, batch=1)))
    assert [metrics.loss_scale for metrics in seen] == [2.0, 1.0, 0.5]
    assert str(error.value) == (
        "step 3: fp16 gradients overflow at any loss scale; "
        "use train.precision: bf16 or fp32, or lower train.learning_rate"
    )
    assert_equal(weights(state.model), before)


def test_gradients_are_clipped_after_unscaling() -> None:
    """SGD with rate 1 and clipping to 0.1 moves by 0.1; clipped first, it would be 0.1 / 65536.

    The direction agrees with fp32's to 1 %, the reported norm too.
    """
    moved = {}
    for precision in ("fp32", "fp16"):
        options: dict[str, Any] = {"learning_rate": 1.0, "max_grad_norm": 0.1}
        state = (
            fp16_state("sgd", scale=65536.0, **options)
            if precision == "fp16"
            else make_state(**options)
        )
        for group in state.optimizer.param_groups:
            group["weight_decay"] = 0.0
        before = weights(state.model)
        (window,) = make_windows([30, 20], micro=1, batch=2)
        metrics = train_step(state, window)
        assert metrics.skipped is None
        after = weights(state.model)
        change = torch.cat([(after[n] - before[n]).flatten() for n in before])
        moved[precision] = change, metrics.grad_norm
    for change, norm in moved.values():
        assert change.norm().item() == pytest.approx(0.1, rel=1e-4)
        assert norm > 1.0
    (true, true_norm), (found, found_norm) = moved["fp32"], moved["fp16"]
    assert found_norm == pytest.approx(true_norm, rel=1e-2)
    assert (found - true).norm().item() < 1e-2 * 0.1


@pytest.mark.parametrize(
    ("capability", "wanted", "precision"),
    [
        ((7, 5), "auto", "fp16"),
        ((7, 5), "fp16", "fp16"),
        ((7, 5), "fp32", "fp32"),
        ((8, 0), "auto", "bf16"),
        ((8, 9), "auto", "bf16"),
        ((8, 9), "bf16", "bf16"),
        ((12, 0), "auto", "bf16"),
    ],
)
def test_precision_on_a_card(
    capability: tuple[int, int],
    wanted: str,
    precision: str,
    make_recipe: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BUILD, "compute_capability", lambda device: capability)
    device = torch.device("cuda")
    found = choose_numerics(make_recipe(**{"train.precision": wanted}), device)
    assert found == Numerics(device=device, precision=precision, base_dtype=precision)  # type: ignore[arg-type]
    full = make_recipe(**{"train.precision": wanted, "method.name": "full"})
    assert choose_numerics(full, device).base_dtype == "fp32"


def test_bf16_is_refused_where_it_is_emulated(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BUILD, "compute_capability", lambda device: (7, 5))
    with pytest.raises(DeviceError) as error:
        choose_numerics(make_recipe(**{"train.precision": "bf16"}), torch.device("cuda"))
    assert str(error.value) == (
        "train.precision: found bf16, but this card (compute capability 7.5) only emulates it; "
        "it needs 8.0 or more. Use train.precision: fp16 or auto"
    )


@pytest.mark.parametrize("format_", ["bf16", "fp16"])
def test_sixteen_bits_on_a_cpu(
    format_: str, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(**{"train.precision": format_, "model.dtype": format_})
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: False)
    assert choose_numerics(recipe, CPU) == Numerics(
        device=CPU,
        precision="fp32",
        base_dtype="fp32",
        notes=(
            f"train.precision {format_}: this CPU has no {format_} arithmetic; using fp32",
            f"model.dtype {format_}: this CPU has no {format_} arithmetic; the base is fp32",
        ),
    )
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: dtype == format_)
    assert choose_numerics(recipe, CPU) == Numerics(
        device=CPU,
        precision=format_,  # type: ignore[arg-type]
        base_dtype=format_,  # type: ignore[arg-type]
    )
    auto = choose_numerics(make_recipe(), CPU)
    assert (auto.precision, auto.base_dtype, auto.notes) == ("fp32", "fp32", ())


class Casts(TorchDispatchMode):
    """Counts conversions of tensors that are stored where the base's weights are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self.base = {p.untyped_storage().data_ptr() for p in frozen}
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage().data_ptr() in self.base
        return function(*args, **(kwargs or {}))


def test_a_bf16_base_is_not_cast_at_every_step(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fp32 base under autocast is, weight by weight, for each micro-batch; losses to 1e-2."""
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)
    data = make_windows([9, 7, 20, 12, 6, 9], micro=1, batch=2)
    counts, losses = {}, {}
    for dtype in ("bf16", "fp32"):
        recipe = make_recipe(**{"model.dtype": dtype, "train.precision": "bf16"})
        state = build(recipe, total_steps=3)
        randomise_adapters(state.model)
        with Casts(state.model) as casts:
            losses[dtype] = [train_step(state, window).loss for window in data]
        counts[dtype] = casts.count
    assert counts["bf16"] == 0
    # 4 weights and 4 biases a block, and the output head
    assert counts["fp32"] >= 6 * (2 * 8 + 1)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)


# What is not finite


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_a_nan_loss_skips_the_step(optimizer: str, precision: str) -> None:
    options: dict[str, Any] = {"rank": 128, "learning_rate": 1e-3}
    state = (
        fp16_state(optimizer, **options)
        if precision == "fp16"
        else make_state(optimizer=optimizer, **options)
    )
    data = make_windows([9] * 7, micro=1, batch=1)
    seen, snapshots = [], []
    with poisoned(state.model, 1, 2, 4):
        for metrics in train(state, data):
            seen.append(metrics)
            snapshots.append(weights(state.model))
    nan = "nonfinite"
    assert [m.skipped for m in seen] == [None, nan, nan, None, nan, None, None]
    assert_equal(snapshots[0], snapshots[2])
    assert_equal(snapshots[3], snapshots[4])
    assert all(value.isfinite().all() for value in snapshots[-1].values())
    assert state.nonfinite_in_a_row == 0
    line = seen[1].to_json()
    assert math.isnan(seen[1].loss)
    assert line["loss"] is None
    assert line["skipped"] == nan
    assert json.loads(json.dumps(line, allow_nan=False)) == line


@pytest.mark.parametrize("allowed", [1, 3])
def test_too_many_nan_losses_end_the_run(allowed: int) -> None:
    state = make_state(optimizer="adamw8bit", rank=128, max_nonfinite_steps=allowed)
    first, *others = make_windows([9] * 9, micro=1, batch=1)
    train_step(state, first)
    last = weights(state.model)
    seen: list[StepMetrics] = []
    with poisoned(state.model, *range(9)), pytest.raises(TrainingError) as error:
        seen.extend(train(state, others))
    assert [metrics.skipped for metrics in seen] == ["nonfinite"] * allowed
    assert str(error.value) == (
        f"step {allowed + 1}: the loss was not finite {allowed} steps in a row; the weights are "
        "still those of the last good step. Lower train.learning_rate, or use train.precision: "
        "bf16 or fp32 instead of fp16"
    )
    assert_equal(weights(state.model), last)
    assert all(value.isfinite().all() for value in last.values())


def test_one_bad_micro_batch_spoils_no_weight() -> None:
    """The loss of the window is NaN though three of its four passes are fine."""
    state = make_state()
    (window,) = make_windows([9, 8, 7, 6], micro=1, batch=4)
    before = weights(state.model)
    with poisoned(state.model, 2):
        metrics = train_step(state, window)
    assert metrics.skipped == "nonfinite"
    assert_equal(weights(state.model), before)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert train_step(state, window).skipped is None


def test_a_nan_gradient_under_a_finite_loss_is_no_step() -> None:
    state = make_state(optimizer="adamw")
    handle = state.trainable()[0].register_hook(lambda gradient: gradient * math.nan)
    before = weights(state.model)
    (window,) = make_windows([9, 8], micro=1, batch=2)
    metrics = train_step(state, window)
    handle.remove()
    assert metrics.skipped == "nonfinite"
    assert math.isfinite(metrics.loss)
    assert_equal(weights(state.model), before)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_bad_loss_over_finite_gradients_is_no_step(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(optimizer="adamw")
    before = weights(state.model)
    (window,) = make_windows([9, 8], micro=1, batch=2)
    with monkeypatch.context() as patch:
        patch.setattr(TRAIN, "token_loss", lambda *a, **k: token_loss(*a, **k) + bad)
        metrics = train_step(state, window)
    assert metrics.skipped == "nonfinite"
    assert metrics.to_json()["loss"] is None
    assert math.isfinite(metrics.grad_norm)
    assert_equal(weights(state.model), before)


# Memory and gradients


def test_eight_bit_state_survives_many_models() -> None:
    """bitsandbytes' process-wide table of settings must stay empty: it is keyed by id()."""
    (window,) = make_windows([9, 8], micro=1, batch=2)
    for number in range(20):
        state = make_state(optimizer="adamw8bit", rank=32)
        train_step(state, window)
        del state
        if number % 5 == 0:
            gc.collect()
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    assert manager.pid2config == manager.index2config == {}
    state = make_state(optimizer="adamw8bit", rank=128)
    train_step(state, window)
    sizes = {p.numel(): state.optimizer.state[p]["state1"].dtype for p in state.trainable()}
    assert min(sizes) == 4096
    assert set(sizes.values()) == {torch.uint8}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [False, True])
def test_checkpointing_changes_nothing(
    dropout: bool,
    precision: str,
    make_recipe: Any,
    gpt2_dir: Path,
    dropout_gpt2_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same loss and the same gradients to the bit, with dropout 0.1 and under autocast too."""
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)
    recipe = make_recipe(
        **{
            "model.name": str(dropout_gpt2_dir if dropout else gpt2_dir),
            "method.dropout": 0.1 if dropout else 0.0,
            "train.optimizer": "sgd",
            "train.precision": precision,
        }
    )
    (window,) = make_windows([30, 20, 9, 12, 17, 4], micro=2, batch=6, packing=True)
    losses, gradients, passes = [], [], []
    for checkpointing in (False, True):
        recipe = with_overrides(recipe, {"fit.gradient_checkpointing": checkpointing})
        state = build(recipe, total_steps=3)
        randomise_adapters(state.model)
        block = plain_model(state.model).transformer.h[0].attn
        runs = []
        block.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(5)
        with gradients_at_steps(state) as seen:
            losses.append(train_step(state, window).loss)
        gradients.append(seen[0])
        passes.append(len(runs) // len(window))
        assert seen[0].keys() == weights(state.model).keys()
        assert all(gradient.abs().max() > 0 for gradient in seen[0].values())
    assert passes == [1, 2], "the block is run again in the backward pass, or checkpointing is off"
    assert losses[0] == losses[1]
    assert_equal(*gradients)
    if dropout:
        torch.manual_seed(6)
        assert train_step(state, window).loss != losses[0], "there was no dropout"


class Unused(nn.Module):
    """Trains a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_gpt2().requires_grad_(False)
        self.lonely = nn.Parameter(torch.ones(3))
        self.base_model = self.model.base_model
        self.get_output_embeddings = self.model.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("graph", ["none", "of the inputs"])
def test_training_nothing_is_an_error_at_the_first_step(graph: str, chunked: bool) -> None:
    """As behind reentrant checkpointing, where nothing that enters a block needs a gradient."""
    model = Unused()
    if graph == "of the inputs":
        model.model.enable_input_require_grads()
    state = TrainState(
        model=model,
        optimizer=torch.optim.SGD([model.lonely], lr=0.1),
        learning_rate=lambda step: 0.1,
        chunked_loss=chunked,
    )
    (window,) = make_windows([9, 8], micro=1, batch=2)
    with pytest.raises(TrainingError) as error:
        train_step(state, window)
    assert str(error.value) == "no parameter received a gradient: nothing would be trained"


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_step_makes_no_cache(
    architecture: str,
    chunked: bool,
    make_recipe: Any,
    request: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = request.getfixturevalue(f"{architecture}_dir")
    recipe = make_recipe(**{"model.name": str(directory), "train.chunked_loss": chunked})
    state = build(recipe, total_steps=3)
    (window,) = make_windows([9, 8], micro=1, batch=2)
    made = []
    original: Callable[..., None] = DynamicCache.__init__

    def spy(self: DynamicCache, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "__init__", spy)
    model = plain_model(state.model).train()
    assert model(window[0].input_ids).past_key_values is not None
    assert len(made) == 1, "transformers no longer makes a cache while training"
    train_step(state, window)
    assert len(made) == 1
    assert model.config.use_cache is True
