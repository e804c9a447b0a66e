"""LoRA and its kin: add, save, load, merge. The only module that knows peft."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowvram.adapter_check import check_settings, layers_of
from lowvram.errors import ModelError
from lowvram.folded_lora import fold
from lowvram.model_files import check_directory, read_object
from lowvram.safetensors_header import read_header
from lowvram.weight_check import check_finite

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
BASE_FILE = "base.json"
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What to add to the frozen base. The update of a weight W is (alpha / rank) B A.

    rslora scales by alpha / sqrt(rank) instead, dora also learns the norm of each output. `folded`
    computes the same with fewer tensors, where that is possible.
    `target_modules`: names as peft takes them, "all-linear", or "auto" for the usual ones.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "auto"
    use_rslora: bool = False
    use_dora: bool = False
    folded: bool = True
    bias: Literal["none", "all", "lora_only"] = "none"


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base an adapter was trained on; `sha256` is that of its weight files."""

    name: str
    revision: str | None
    sha256: str


def add_adapter(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Freeze the base, add fp32 adapters with B = 0; the base is changed in place."""
    targets = _target_modules(model, adapter.target_modules)
    matched = _matched(model, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        # peft's type is int, its arithmetic is not
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in matched.values()),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        bias=adapter.bias,
    )
    with _quiet_peft():
        wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ModelError(
                f"method.bias: {name} of the base would be trained in {parameter.dtype}; "
                "what is trained is kept in fp32: set model.dtype: fp32 or method.bias: none"
            )
    if adapter.folded:
        fold(wrapped)
    return wrapped


def _target_modules(model: PreTrainedModel, wanted: str | Sequence[str]) -> str | list[str]:
    if wanted == "auto":
        if model.config.model_type == "gpt2":
            return ["c_attn"]
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        return list(known) if known else "all-linear"
    return wanted if isinstance(wanted, str) else list(wanted)


def _matched(model: PreTrainedModel, targets: str | list[str]) -> dict[str, nn.Module]:
    """The modules that an adapter is put on; refuses those that cannot be merged right."""
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(targets, str):  # "all-linear" leaves the output head out by itself
        return {n: m for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    tied = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    choices = ", ".join(sorted({n.split(".")[-1] for n, m in linear.items() if id(m) not in tied}))
    matched: dict[str, nn.Module] = {}
    for target in targets:
        found = {n: m for n, m in modules.items() if n == target or n.endswith(f".{target}")}
        if any(id(m) in tied or isinstance(m, nn.Embedding) for m in found.values()):
            raise ModelError(
                f"method.target_modules: {target!r} is an embedding or the output head. Merged "
                "into a checkpoint that ties the two, its update would change both and give "
                f"another model. Choose from: {choices}"
            )
        if not found or found.keys() - linear.keys():
            raise ModelError(
                f"method.target_modules: {target!r} is no linear layer of "
                f"{model.config.model_type}; its layers are: {choices}"
            )
        matched.update(found)
    return matched


def save_adapter(model: PeftModel, directory: Path, base: Base) -> None:
    """A standard peft directory, and beside it which base (by hash) it belongs to."""
    with _quiet_peft():
        # "auto" would ask the hub for the base's config
        model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    readme = directory / "README.md"
    readme.unlink(missing_ok=True)  # peft's empty model card
    config_path = directory / CONFIG_FILE
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.name
    config["revision"] = base.revision
    # int8 and nf4 layers are stored transposed; on the plain base GPT-2's are Conv1D again.
    config["fan_in_fan_out"] = model.config.model_type == "gpt2"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    facts = {"name": base.name, "revision": base.revision, "sha256": base.sha256}
    (directory / BASE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG_FILE).is_file()


def recorded_base(directory: Path) -> tuple[str | None, str | None, str | None]:
    """Name if it has one, revision and, if we wrote the adapter, weight hash of its base."""
    check_directory(directory, where="")
    try:
        if (directory / BASE_FILE).is_file():
            facts = read_object(directory / BASE_FILE)
            found = facts["name"], facts["revision"], facts["sha256"]
        else:
            config = read_object(directory / CONFIG_FILE)
            found = config.get("base_model_name_or_path"), config.get("revision"), None
        if not all(value is None or isinstance(value, str) for value in found):
            raise ValueError("its base has to be named by strings")
        return found
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory}: is no readable adapter ({error})") from error


def load_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Put a saved adapter on its base, for evaluation.

    What its files say is compared with the base first; then peft builds what the file holds.
    """
    check_directory(directory, where="")
    if not (directory / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{directory}: has no {ADAPTER_FILE}; adapters stored as a pickle "
            "(adapter_model.bin) are not opened, save them as safetensors"
        )
    try:
        config = _checked_config(model, directory)
        with _quiet_peft():
            # peft warns of tensors that the file lacks, and leaves them at their start values
            warnings.filterwarnings("ignore", message=".*missing adapter keys.*")
            loaded: PeftModel = PeftModel.from_pretrained(
                model, directory, is_trainable=False, config=config
            )
            wanted = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
        found = set(read_header(directory / ADAPTER_FILE))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{directory}: the adapter does not fit its base: {reason[0].rstrip(':')}"
        ) from error
    if different := sorted(wanted ^ found):
        place = "file" if different[0] in wanted else "base"
        raise ModelError(
            f"{directory}: the adapter does not fit its base: {different[0]} is not in the {place}"
        )
    return loaded


def _checked_config(model: PreTrainedModel, directory: Path) -> PeftConfig:
    """peft's settings, with the layers that the file holds in place of rules to find them."""
    settings = read_object(directory / CONFIG_FILE)
    if settings.get("peft_type") in _PROMPTS:
        raise ModelError(
            f"{directory}: is a learned prompt, not layers; it can be neither merged nor scored"
        )
    check_settings(settings)
    file = directory / ADAPTER_FILE
    header = read_header(file)
    layers = layers_of(header, settings, model)
    check_finite({name: (file, entry) for name, entry in header.items()}, header)
    config = PeftConfig.from_pretrained(directory)
    config.target_modules = set(layers)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def merged_tensors(model: PeftModel, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the base of these names, with the update W + (alpha / rank) (B A)^T in them.

    In the base's dtype: give it an fp32 base. Each layer is merged when its turn comes, and as it
    was when the next one's comes, so names of one layer should follow each other. Raises ModelError
    for updates that are not finite, and for an adapter that changes embeddings or the output head.
    """
    _check_mergeable(model)
    for path, group in itertools.groupby(names, lambda name: name.rpartition(".")[0]):
        with _merged(_module_at(plain_model(model), path)) as layer:
            for name in group:
                yield name, getattr(layer, name.rpartition(".")[2])


@contextmanager
def merging_in_turn(model: PeftModel) -> Iterator[None]:
    """The merged model, for as long as the context lasts: each layer is merged while it is used.

    So there is never a second set of weights.
    """
    _check_mergeable(model)
    in_use = ExitStack()

    def begin(layer: nn.Module, inputs: Any) -> None:
        in_use.enter_context(_merged(layer))

    def end(layer: nn.Module, inputs: Any, output: Any) -> None:
        in_use.close()

    with in_use, ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                hooks.callback(layer.register_forward_pre_hook(begin).remove)
                hooks.callback(layer.register_forward_hook(end).remove)
        yield


@contextmanager
def _merged(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer without its adapter, whose weights have the update in them inside the context."""
    if not isinstance(layer, BaseTunerLayer):
        yield layer
        return
    base = layer.get_base_layer()
    own = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
    for name, data in own.items():
        getattr(base, name).data = data.clone()  # an update may be made in place
    try:
        layer.merge()
        for name in own:
            if not torch.stack(getattr(base, name).aminmax()).isfinite().all():
                raise ModelError(f"merge: a {name} is not finite once the adapter is in it")
        yield base
    finally:
        for name, data in own.items():
            getattr(base, name).data = data
        layer.merged_adapters.clear()


def _module_at(root: nn.Module, path: str) -> nn.Module:
    """A module by its name in the plain model; where an adapter has a copy of its own, the copy."""
    module = root
    for part in path.split("."):
        module = getattr(module, part)
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
            module = module.modules_to_save[module.active_adapter]
    return module


def _check_mergeable(model: PeftModel) -> None:
    """Other tools put adapters where a plain checkpoint has no place for them."""
    base = plain_model(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    changed = [m for m in ends if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), nn.Embedding):
            changed.append(module)
    if changed:
        raise ModelError(
            "merge: the adapter changes an embedding or the output head. In a checkpoint that ties "
            "the two, that change would go to both or untie them, and give another model"
        )
    try:
        model.base_model._check_merge_allowed()
    except ValueError as error:
        raise ModelError(f"merge: {error}") from error


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model itself, its layers with adapters in them if there are any."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner  # type: ignore[no-any-return]


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base alone, for as long as the context lasts."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hints that do not apply: fan_in_fan_out is set right, the base's name is written below."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        # peft asks transformers by an attribute that has a newer name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*[Cc]ould not find a config file in.*")
        yield
