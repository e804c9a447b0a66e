"""Recipe -> what a run is made of: the one place where settings meet constructors.

`run` trains with what is built here, and whatever measures or predicts memory has to build it
here too, so that it measures the step that will be run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowvram.adapters import Adapter, Base, add_adapter, plain_model
from lowvram.checkpointing import recompute
from lowvram.data import Blocks, Source, TokenStore, pack, split_documents, tokenize
from lowvram.dropout import speed_up_dropout
from lowvram.errors import DataError, DeviceError, ModelError, RecipeError
from lowvram.frozen_block import make_blocks_lean
from lowvram.heap import keep_freed_memory
from lowvram.loss import head_is_plain
from lowvram.memory.measure import SIMULATED, compute_capability, has_fast_16_bit, limit_memory
from lowvram.model import (
    TORCH_DTYPES,
    BaseDtype,
    blank_model,
    empty_model,
    fuse_gelu,
    known_config,
    load_model,
    load_tokenizer,
    parameter_count,
    weights_sha256,
)
from lowvram.norms import make_norms_lean
from lowvram.optimizers import learning_rate_at, make_optimizer
from lowvram.recipe import Recipe
from lowvram.tensorwise import FusedBackward
from lowvram.train import Precision, TrainState, make_scaler


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Where and in which number formats a recipe is run; `notes` say what was changed and why."""

    device: torch.device
    precision: Precision
    base_dtype: BaseDtype
    notes: tuple[str, ...] = ()


def choose_device() -> torch.device:
    if torch.cuda.is_available():
        # With its index: some of torch's memory functions do not take "cuda" alone.
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def choose_numerics(
    recipe: Recipe,
    device: torch.device | None = None,
    capability: tuple[int, int] | None = None,
) -> Numerics:
    """Formats that this device computes well, or an error where the recipe insists.

    `capability` is that of a card which is not there: the device then is the simulated one.

    bf16 needs compute capability 8 (torch's own answer also counts emulation). A CPU without
    16-bit matrix products is tens of times slower in 16 bits than in fp32, so there a run that
    asks for 16 bits is done in fp32, and says so.
    """
    device = device or choose_device()
    if capability is None and device.type == "cuda":
        capability = compute_capability(device)
    wanted = recipe.train.precision
    if capability is None and wanted == "auto" and _trains_bf16(recipe):
        wanted = "bf16"  # there is no fp32 arithmetic on such weights
    precision, notes = _precision(wanted, capability)
    if precision == "fp16" and recipe.train.fused_backward:
        raise DeviceError(
            "train.precision: auto is fp16 on this card, whose loss scale needs all gradients "
            "before the first update; set train.fused_backward: false, or train.precision: fp32"
        )
    dtype = recipe.model.dtype
    if dtype == "auto":
        trains_base = recipe.method.name == "full" or recipe.method.bias != "none"
        return Numerics(
            device=device,
            precision=precision,
            base_dtype="fp32" if trains_base else precision,
            notes=notes,
        )
    if device.type == "cpu" and dtype == "int8" and recipe.method.name == "dora":
        raise DeviceError(
            "method.name: dora on a base in int8 needs a card, since on a CPU its layers lose "
            "their scales; set model.dtype: nf4 or fp32, or method.name: lora"
        )
    _check_formats(dtype, precision)
    if device.type == "cpu" and dtype in ("bf16", "fp16") and not has_fast_16_bit(dtype):
        notes += (f"model.dtype {dtype}: this CPU has no {dtype} arithmetic; the base is fp32",)
        dtype = "fp32"
    return Numerics(device=device, precision=precision, base_dtype=dtype, notes=notes)


def _trains_bf16(recipe: Recipe) -> bool:
    return recipe.method.name == "full" and recipe.model.dtype == "bf16"


def _check_formats(dtype: str, precision: str) -> None:
    """A bf16 weight and an fp16 activation have no product."""
    if (dtype, precision) in (("bf16", "fp16"), ("fp16", "bf16")):
        raise RecipeError(
            f"model.dtype: found {dtype} with train.precision {precision}; choose one of the two "
            "formats for both, or model.dtype: auto"
        )


def _precision(
    wanted: str, capability: tuple[int, int] | None
) -> tuple[Precision, tuple[str, ...]]:
    """`capability` is that of a card; None stands for a CPU."""
    if capability is not None:
        major, minor = capability
        if wanted == "auto":
            return ("bf16" if major >= 8 else "fp16"), ()
        if wanted == "bf16" and major < 8:
            raise DeviceError(
                f"train.precision: found bf16, but this card (compute capability {major}.{minor}) "
                "only emulates it; it needs 8.0 or more. Use train.precision: fp16 or auto"
            )
        return wanted, ()  # type: ignore[return-value]
    if wanted == "auto" or wanted == "fp32":
        return "fp32", ()
    if has_fast_16_bit(wanted):
        return wanted, ()  # type: ignore[return-value]
    return "fp32", (f"train.precision {wanted}: this CPU has no {wanted} arithmetic; using fp32",)


def build(recipe: Recipe, *, total_steps: int, numerics: Numerics | None = None) -> TrainState:
    """Model, adapters, optimizer and schedule, on the device, ready for `train_step`.

    What `fit` leaves to auto has to be chosen before, as `plan` does in the recipe it returns;
    here auto is off. A process that trains on the CPU keeps what it frees from then on, and one
    that trains with train.deterministic stays with deterministic kernels.
    """
    numerics = numerics or choose_numerics(recipe)
    if recipe.fit.vram_bytes is not None:
        limit_memory(numerics.device, recipe.fit.vram_bytes)
    if numerics.device.type == "cpu":
        keep_freed_memory()
    if recipe.train.deterministic:
        be_deterministic()
    set_seed(recipe.train.seed)
    model = build_model(recipe, numerics)
    settings = recipe.train
    optimizer = make_optimizer(
        settings.optimizer,
        model.parameters(),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
    )
    return TrainState(
        model=model,
        optimizer=optimizer,
        fused=FusedBackward(optimizer) if settings.fused_backward else None,
        learning_rate=partial(
            learning_rate_at,
            peak=settings.learning_rate,
            total_steps=total_steps,
            warmup_steps=warmup_steps(recipe, total_steps)[0],
            schedule=settings.schedule,
        ),
        precision=numerics.precision,
        scaler=make_scaler(numerics.precision, numerics.device),
        max_grad_norm=settings.max_grad_norm,
        label_smoothing=settings.label_smoothing,
        chunked_loss=settings.chunked_loss and head_is_plain(plain_model(model)),
        max_nonfinite_steps=settings.max_nonfinite_steps,
    )


def be_deterministic() -> None:
    """Kernels that give the same bits every time; torch refuses operations that have none."""
    # cuBLAS reads it when it is first used. Without it torch refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_model(recipe: Recipe, numerics: Numerics) -> nn.Module:
    """The base in its dtype with fp32 adapters on it, or the whole model in fp32 or bf16."""
    name, revision = recipe.model.name, recipe.model.revision
    options: dict[str, Any] = {
        "dtype": numerics.base_dtype,
        "compute_dtype": TORCH_DTYPES[numerics.precision],
        "attention": recipe.model.attention,
        "device": str(numerics.device),
    }
    if numerics.device.type == SIMULATED:
        model = blank_model(known_config(name, revision), **options)
    else:
        model = load_model(name, revision=revision, **options)
    if recipe.model.fused_gelu:
        fuse_gelu(model)
        if numerics.device.type == "cpu":
            make_blocks_lean(model)
    if recipe.model.lean_norms:
        make_norms_lean(model)
    if numerics.base_dtype == "int8":
        from lowvram.int8 import keep_no_inputs  # bitsandbytes takes a second to import

        keep_no_inputs(model)
    if recipe.model.fast_dropout and numerics.device.type == "cpu":
        speed_up_dropout(model)
    trained: nn.Module = model
    if recipe.method.name == "full":
        model.requires_grad_(True)
    else:
        trained = add_adapter(model, adapter_of(recipe))
    if recipe.fit.gradient_checkpointing != "auto":
        # After peft, which would have the embeddings' output require a gradient.
        recompute(model, recipe.fit.gradient_checkpointing)
    return trained


def adapter_of(recipe: Recipe) -> Adapter:
    method = recipe.method
    return Adapter(
        rank=method.rank,
        alpha=method.alpha,
        dropout=method.dropout,
        target_modules=method.target_modules,
        use_rslora=method.use_rslora or method.name == "rslora",
        use_dora=method.name == "dora",
        folded=method.folded,
        bias=method.bias,
    )


def base_of(recipe: Recipe) -> Base:
    name = recipe.model.name
    local = Path(name).expanduser()
    return Base(
        name=str(local.absolute()) if local.is_dir() else name,
        revision=recipe.model.revision,
        sha256=weights_sha256(name, recipe.model.revision),
    )


def warmup_steps(recipe: Recipe, total_steps: int) -> tuple[int, str | None]:
    """Warm-up in steps, and a note where the recipe's is longer than a tenth of a short run."""
    wanted = recipe.train.warmup_steps
    if isinstance(wanted, float):
        return round(wanted * total_steps), None
    if wanted < total_steps:
        return wanted, None
    shorter = total_steps // 10
    return shorter, (
        f"train.warmup_steps {wanted} is not shorter than the run ({total_steps} steps): "
        f"warming up over {shorter}"
    )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The tokens of a recipe's data, and which documents train and which are held out."""

    store: TokenStore
    train: np.ndarray  # int64 numbers of documents in `store`
    held_out_store: TokenStore
    held_out: np.ndarray  # int64 numbers of documents in `held_out_store`
    notes: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest training document."""
        return int(self.store.lengths(self.train).max())

    @property
    def sha256(self) -> str:
        return f"{self.store.sha256}:{self.held_out_store.sha256}"


Progress = Callable[[int, int | None], None]


def build_corpus(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Corpus:
    data = recipe.data
    to_tokens = partial(
        tokenize, tokenizer=tokenizer, allow_special_tokens=data.allow_special_tokens
    )
    store = to_tokens(_source(recipe, data.source, data.split), progress=progress)
    notes = (f"data: {store.report}",) if store.report.left_out else ()
    if data.validation_source is None and data.validation_split is None:
        split = split_documents(store, data.validation_fraction, recipe.train.seed)
        return Corpus(
            store=store,
            train=split.train,
            held_out_store=store,
            held_out=split.validation,
            notes=notes + ((split.note,) if split.note else ()),
        )
    held_out = to_tokens(
        _source(recipe, data.validation_source or data.source, data.validation_split or data.split),
        progress=progress,
    )
    return _without_leaks(store, held_out, notes)


def _without_leaks(store: TokenStore, held_out: TokenStore, notes: tuple[str, ...]) -> Corpus:
    """Training documents that are also held out would make the held-out figures a lie."""
    everything = np.arange(len(store), dtype=np.int64)
    leaked = np.isin(store.hashes, held_out.hashes)
    if leaked.all():
        raise DataError(
            "data.validation_source: holds every document of data.source, so nothing is left to "
            "train on; name other text, or use data.validation_fraction"
        )
    if leaked.any():
        notes += (f"{leaked.sum()} documents of data.source are held out too: not trained on",)
    return Corpus(
        store=store,
        train=everything[~leaked],
        held_out_store=held_out,
        held_out=np.arange(len(held_out), dtype=np.int64),
        notes=notes,
    )


def _source(recipe: Recipe, names: str | tuple[str, ...], split: str) -> Source:
    data = recipe.data
    return Source(
        names=(names,) if isinstance(names, str) else tuple(names),
        format=data.format,
        text_column=data.text_column,
        prompt_column=data.prompt_column,
        completion_column=data.completion_column,
        separator=data.separator,
        encoding=data.encoding,
        config=data.config,
        split=split,
    )


def build_blocks(recipe: Recipe, corpus: Corpus, max_seq_len: int) -> Blocks:
    completion_only = recipe.data.loss_on == "completion"
    if completion_only and not corpus.store.prompt_lengths.any():
        raise DataError(
            "data.loss_on: completion, but no document has a prompt. Set data.separator to the "
            "text between the two, or use columns named by data.prompt_column and "
            "data.completion_column (a column named by data.text_column comes before them)"
        )
    return pack(
        corpus.store,
        corpus.train,
        max_seq_len=max_seq_len,
        packing=recipe.data.packing,
        seed=recipe.train.seed,
        completion_only=completion_only,
    )


def build_tokenizer(recipe: Recipe, vocabulary_size: int) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
    if len(tokenizer) > vocabulary_size:
        raise ModelError(
            f"model.name: the tokenizer of {recipe.model.name!r} has {len(tokenizer)} tokens, its "
            f"model {vocabulary_size}; they do not belong together"
        )
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    total: int
    trainable: int


def count_parameters(recipe: Recipe) -> ParameterCount:
    """From the model's configuration alone: shapes without weights."""
    model = empty_model(recipe.model.name, recipe.model.revision)
    total = parameter_count(model)
    if recipe.method.name == "full":
        return ParameterCount(total=total, trainable=total)
    with torch.device("meta"):
        wrapped = add_adapter(model, adapter_of(recipe))
    return ParameterCount(total=total, trainable=parameter_count(wrapped, trainable=True))
