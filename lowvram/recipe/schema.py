"""The recipe: every setting of a run, its type, its default and what it means.

Strict and frozen: nothing is coerced (a whole number may stand for a float, that is all), unknown
keys are refused, and nothing below the command line may change a recipe. What no single field can
see stands in `conflicts`. This file does not read YAML and does not know where a value came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from lowvram.errors import RecipeError

ADAPTER_KEYS = ("rank", "alpha", "dropout", "target_modules", "use_rslora", "folded", "bias")
EMBEDDING_MODULES = ("wte", "wpe", "lm_head", "embed_tokens", "embed_in", "embed_out")
LONGEST_PLACE = 4096  # of Linux; elsewhere it is less
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Wanted:
    """Annotates a field with the words for what it allows, where its type does not say it all."""

    words: str


def parse_size(text: str) -> int:
    """Bytes in a size such as `12GiB` (2**30 each), `12GB` (10**9 each) or `11500MiB`."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([KMG]i?B)", text, re.IGNORECASE)
    size = int(float(match[1]) * SIZE_UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise ValueError("write a size such as 12GiB, 12GB or 11500MiB")
    return size


def _usable_text(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds a character that no file name and no text file can hold")
    return text


def _place(text: str) -> str:
    if len(text) > LONGEST_PLACE:
        raise ValueError(f"is longer than {LONGEST_PLACE} characters, which no file name can be")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(
            "is a URL, and nothing is fetched from one. Name a file or directory of this machine, "
            "or an id of the hub, whose token comes from HF_TOKEN or `hf auth login`"
        )
    return text


def _auto_or_size(text: str) -> str:
    if text != "auto":
        parse_size(text)
    return text


def _size(text: str) -> str:
    parse_size(text)
    return text


def _text_encoding(name: str) -> str:
    try:
        # codecs.lookup also finds codecs between bytes, such as hex; str.encode does not.
        "".encode(name)
    except (LookupError, ValueError, UnicodeError):
        raise ValueError(
            "no text encoding that Python knows; common ones: utf-8, utf-16, latin-1, cp1252"
        ) from None
    return name


def _adaptable(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name.split(".")[-1] in EMBEDDING_MODULES:
            raise ValueError(
                f"{name!r} is an embedding, or the output head that shares its weight: a change to "
                "it cannot be merged into a plain checkpoint. "
                "Name linear layers such as c_attn, c_proj or c_fc"
            )
    return names


FilledText = Annotated[str, AfterValidator(_usable_text), Field(min_length=1)]
# What is looked for on this machine, then on the hub.
Place = Annotated[FilledText, AfterValidator(_place)]
# Lists become tuples, so that a frozen recipe cannot change from inside.
TextList = Annotated[tuple[FilledText, ...], Field(strict=False)]
PlaceList = Annotated[tuple[Place, ...], Field(strict=False, min_length=1)]
# Far above what anyone waits for, and far below where a product of two is no 64-bit number.
Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
    )


class ModelSection(Section):
    name: Place
    """Hugging Face hub id, a directory, or `embedded:gpt2-docstrings`."""
    revision: FilledText | None = None
    """Branch, tag or commit of a hub model; null takes the default branch."""
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = "auto"
    """How the frozen base weights are stored while training."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention: torch's fused kernel, or plain matrix products; auto is the first, made leaner."""
    fused_gelu: bool = True
    """Compute GPT-2's GELU in one kernel, which keeps less; on a CPU a few rows at a time."""
    lean_norms: bool = True
    """With weights in 16 bits, keep a layer norm's input and output in 16 bits, too."""
    fast_dropout: bool = True
    """On a CPU, draw the random numbers of dropout several at a time, and keep a byte of each."""


class DataSection(Section):
    source: Place | PlaceList
    """Files, a directory, a hub data set, or `embedded:python-reference`; one or a list."""
    config: FilledText | None = None
    """Configuration name of a hub data set."""
    split: FilledText = "train"
    """Split of a hub data set to train on."""
    validation_source: Place | PlaceList | None = None
    """Where held-out text comes from; null takes it from `source`."""
    validation_split: FilledText | None = None
    """Split of a hub data set to hold out."""
    validation_fraction: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    """Share of the documents of `source` to hold out, before packing; 0 holds out none."""
    format: Literal["auto", "lines", "paragraphs", "document"] = "auto"
    """What one document of a text file is; auto goes by the file."""
    text_column: FilledText = "text"
    """Column of a table that holds the text."""
    prompt_column: FilledText = "prompt"
    """Column of a table that holds the prompt, if it has prompts and completions."""
    completion_column: FilledText = "completion"
    """Column of a table that holds the completion."""
    separator: FilledText | None = None
    """Text that parts prompt and completion in a line of a text file."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens that count in the loss: every one, or those of the completion only."""
    encoding: Annotated[str, AfterValidator(_text_encoding), Field(min_length=1)] = "utf-8"
    """Encoding of text files, a name that Python knows."""
    packing: bool = True
    """Fill each sequence with several documents, so that no position is padding."""
    allow_special_tokens: bool = False
    """Read `<|endoftext|>` in the text as the end-of-text token, not as characters."""

    @model_validator(mode="before")
    @classmethod
    def _hold_out_nothing_twice(cls, values: Any) -> Any:
        if isinstance(values, dict) and "validation_fraction" not in values:
            if values.get("validation_source") or values.get("validation_split"):
                return {**values, "validation_fraction": 0.0}
        return values


class MethodSection(Section):
    name: Literal["lora", "dora", "rslora", "full"] = "lora"
    """What is trained: a low-rank adapter of some kind, or every weight."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank of the adapter matrices."""
    alpha: Positive = 16.0
    """The adapter's output is multiplied by alpha / rank (rslora: by alpha / sqrt(rank))."""
    dropout: Share = 0.0
    """Probability that an input of the adapter is dropped while training."""
    target_modules: (
        Literal["auto", "all-linear"]
        | Annotated[
            tuple[FilledText, ...], Field(strict=False, min_length=1), AfterValidator(_adaptable)
        ]
    ) = "auto"
    """Layers that get an adapter: auto (the attention input), all-linear, or their names."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank); implied by `name: rslora`."""
    folded: bool = True
    """Add the adapter's product to the layer's output in place; false is peft's own computation."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained as well."""

    @model_validator(mode="before")
    @classmethod
    def _rslora_is_rank_stabilized(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "rslora":
            return {"use_rslora": True, **values}
        return values


class TrainSection(Section):
    global_batch_size: Annotated[int, Field(ge=1, le=2**20)] = 32
    """Sequences per optimizer step; what fits on the card does not change it."""
    epochs: Count = 3
    """Passes over the training data."""
    max_steps: Count | None = None
    """Optimizer steps after which training ends early; null goes by `epochs`."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] | Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Optimizer steps over which the learning rate rises, or their share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, on matrices only."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the optimizer's moments; adafactor and sgd have none of these."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null never clips."""
    label_smoothing: Share = 0.0
    """Share of the target probability spread over the vocabulary, in training only."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "sgd"] = (
        "adamw8bit"
    )
    """Optimizer; the 8-bit ones are from bitsandbytes."""
    fused_backward: bool = False
    """Update each tensor in the backward pass and drop its gradient; for full fine-tuning."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the matrix products."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of initialisation, shuffling, dropout and sampling."""
    deterministic: bool = False
    """On a card, only kernels that give the same bits every time, as a CPU's do; slower."""
    eval_every: Count | None = 100
    """Optimizer steps between evaluations; null evaluates at the end only."""
    save_every: Count | None = 100
    """Optimizer steps between checkpoints; null leaves it to `save_every_minutes`."""
    save_every_minutes: Positive | None = 30.0
    """Minutes after which a checkpoint is due all the same; null never saves by time."""
    log_every: Count = 10
    """Optimizer steps between lines of output."""
    keep_last: Count = 2
    """Checkpoints to keep; older ones are removed."""
    keep_best: bool = False
    """Keep the checkpoint of the lowest perplexity as well, and put out its weights at the end."""
    chunked_loss: bool = True
    """Compute the loss in chunks that never hold the logits of all tokens at once."""
    max_nonfinite_steps: Count = 3
    """Steps in a row with a NaN or infinite loss after which training stops."""


class FitSection(Section):
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Sequences per forward pass; must divide `train.global_batch_size`."""
    max_seq_len: Literal["auto"] | Annotated[int, Field(ge=2, le=10**9)] = "auto"
    """Tokens per sequence; auto takes what the longest document needs, up to 1024."""
    gradient_checkpointing: Annotated[
        Literal["auto", "selective", "offload"] | bool | Count,
        Wanted("auto, true, false, a number of blocks, selective, offload"),
    ] = "auto"
    """Blocks to recompute in the backward pass, for memory: all, none, the first few, or how."""
    vram: Annotated[
        str,
        AfterValidator(_auto_or_size),
        Wanted("auto, or a size such as 12GiB, 12GB or 11500MiB"),
    ] = "auto"
    """Memory that the run may use on the card; auto takes what the card has."""
    headroom: Annotated[
        str, AfterValidator(_size), Wanted("a size such as 128MiB; 1MiB is next to nothing")
    ] = "128MiB"
    """Memory that auto leaves free, for what other programs may take meanwhile."""

    @property
    def vram_bytes(self) -> int | None:
        """None stands for auto."""
        return None if self.vram == "auto" else parse_size(self.vram)

    @property
    def headroom_bytes(self) -> int:
        return parse_size(self.headroom)


class EvaluateSection(Section):
    stride: Literal["auto"] | Count = "auto"
    """Tokens that the window moves by; auto moves it by half its length."""
    max_tokens: Count | None = 16384
    """Tokens to score at most; null scores all."""


class GenerateSection(Section):
    prompts: TextList = ()
    """Prompts to continue after training."""
    max_new_tokens: Count = 64
    """Tokens to generate for each prompt at most."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample from the fewest tokens that hold this share of the probability."""


class Recipe(Section):
    model: ModelSection
    data: DataSection
    method: MethodSection = MethodSection()
    train: TrainSection = TrainSection()
    fit: FitSection = FitSection()
    evaluate: EvaluateSection = EvaluateSection()
    generate: GenerateSection = GenerateSection()
    output_dir: Place = "runs/recipe"
    """Directory that the run writes into; by default runs/ and the recipe file's name."""
    output_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the merged checkpoint."""

    @model_validator(mode="after")
    def _refuse_conflicts(self, info: ValidationInfo) -> Recipe:
        # load_recipe asks for the conflicts itself, to report them with all other problems.
        if info.context != "conflicts later" and (found := list(conflicts(self))):
            raise RecipeError("\n".join(f"{item.keys[0]}: {item.message}" for item in found))
        return self


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Values that are fine each but not together. The first of the keys is the one to change."""

    keys: tuple[str, ...]
    message: str


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    yield from _method_conflicts(recipe)
    if recipe.train.fused_backward:
        yield from _fused_conflicts(recipe)
    yield from _validation_conflicts(recipe.data)
    yield from _batch_conflicts(recipe)


def _method_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    model, method = recipe.model, recipe.method
    if method.name == "full":
        if model.dtype not in ("auto", "fp32", "bf16"):
            yield Conflict(
                keys=("model.dtype", "method.name"),
                message=f"{model.dtype} does not go with method.name: full, which trains the "
                "weights themselves. Write fp32 or auto, or bf16, whose updates are rounded by "
                "chance, or choose method.name: lora",
            )
        if model.dtype == "bf16" and recipe.train.precision not in ("auto", "bf16"):
            yield Conflict(
                keys=("train.precision", "model.dtype"),
                message=f"{recipe.train.precision} is not how a model in bf16 computes. Write auto "
                "or bf16, or model.dtype: fp32",
            )
        for key in ADAPTER_KEYS:
            if key in method.model_fields_set:
                yield Conflict(
                    keys=(f"method.{key}", "method.name"),
                    message="has no meaning with method.name: full, which trains every weight. "
                    "Remove it, or choose method.name: lora",
                )
    elif method.name == "rslora" and not method.use_rslora:
        yield Conflict(
            keys=("method.use_rslora", "method.name"),
            message="false contradicts method.name: rslora. Remove it, or choose method.name: lora",
        )


def _fused_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    train, micro = recipe.train, recipe.fit.micro_batch_size
    if recipe.method.name != "full":
        yield Conflict(
            keys=("train.fused_backward", "method.name"),
            message=f"has no use with method.name: {recipe.method.name}, whose gradients are "
            "small. Remove it, or choose method.name: full",
        )
    if train.max_grad_norm is not None:
        yield Conflict(
            keys=("train.max_grad_norm", "train.fused_backward"),
            message=f"{train.max_grad_norm} needs all gradients before the first update, which "
            "train.fused_backward does not keep. Write null, and a lower train.learning_rate",
        )
    if train.precision == "fp16":
        yield Conflict(
            keys=("train.precision", "train.fused_backward"),
            message="fp16 scales the loss, and skips a step whose gradients overflow, which is "
            "known too late with train.fused_backward. Write bf16, fp32 or auto",
        )
    if micro not in ("auto", train.global_batch_size):
        yield Conflict(
            keys=("fit.micro_batch_size", "train.fused_backward"),
            message=f"{micro} makes several micro-batches of train.global_batch_size: "
            f"{train.global_batch_size}, whose gradients would have to be kept. Write "
            f"{train.global_batch_size} or auto, or change train.global_batch_size",
        )


def _validation_conflicts(data: DataSection) -> Iterator[Conflict]:
    if data.validation_fraction > 0:
        for key in ("validation_source", "validation_split"):
            if getattr(data, key) is not None:
                yield Conflict(
                    keys=("data.validation_fraction", f"data.{key}"),
                    message=f"{data.validation_fraction} would hold out data.source as well as "
                    f"data.{key}. Remove one of the two",
                )


def _batch_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    train, micro = recipe.train, recipe.fit.micro_batch_size
    if micro != "auto" and train.global_batch_size % micro:
        yield Conflict(
            keys=("fit.micro_batch_size", "train.global_batch_size"),
            message=f"{micro} does not divide train.global_batch_size: {train.global_batch_size}. "
            f"Choose auto or one of {_divisors(train.global_batch_size)}",
        )


def _divisors(number: int) -> str:
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    found = sorted({*small, *(number // divisor for divisor in small)})
    shown = ", ".join(str(divisor) for divisor in found[:20])
    return shown + (", ..." if len(found) > 20 else "")
