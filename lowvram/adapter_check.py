"""Whether an adapter directory is what it says, before anything is built from it.

The file decides: its header says which layers are changed and with which rank, and the settings
have to agree. So no rank, pattern or list of a stranger makes more than the file holds, and none
of his regular expressions is searched with, which could take for ever.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowvram.safetensors_header import TensorEntry

START = "base_model.model."
KINDS = ("LORA", "LOHA", "LOKR", "IA3")
STARTS = ("gaussian", "orthogonal", "eva")
"""How training may have begun; others change the base's own weights, on every load anew."""
PATTERNS_A_LAYER = 4

_TENSOR = re.compile(r"(.+?)\.((?:lora|hada|lokr|ia3)_.+)")
_PLAIN = re.compile(r"[\w.^$\\-]{1,1000}")
_MORE = (
    *("layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config"),
    *("target_parameters", "trainable_token_indices", "use_qalora", "velora_config"),
    *("monteclora_config", "use_bdlora", "kasa_config"),
)

Header = Mapping[str, TensorEntry]


def check_settings(settings: Mapping[str, Any]) -> None:
    """ValueError for what is no adapter of layers, or would run or read something else."""
    kind = settings.get("peft_type")
    if kind not in KINDS:
        raise ValueError(f"peft_type is {_shown(kind)}; read are {', '.join(KINDS)}")
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type is {_shown(settings['task_type'])}, not CAUSAL_LM")
    for key in _MORE:
        if settings.get(key):
            raise ValueError(
                f"{key} is set, which is more than an adapter of layers; train without"
            )
    start = settings.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in STARTS:
        raise ValueError(
            f"init_lora_weights is {_shown(start)}, which changes the base itself: save the "
            "adapter with peft's path_initial_model_for_weight_conversion"
        )
    for key, (holds, wanted) in _RULES.items():
        if key in settings and not holds(settings[key]):
            raise ValueError(f"{key} is {_shown(settings[key])}; it has to be {wanted}")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_truth(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in value)
    )


def _by_name(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if value is None:
            return True
        return isinstance(value, dict) and all(
            _PLAIN.fullmatch(name) and holds(inner) for name, inner in value.items()
        )

    return check


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number from 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "alpha": (_is_number, "a finite number"),
    "lora_dropout": (_is_share, "a number from 0 up to 1"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_rslora": (_is_truth, "true or false"),
    "use_dora": (_is_truth, "true or false"),
    "fan_in_fan_out": (_is_truth, "true or false"),
    "lora_bias": (_is_truth, "true or false"),
    "rank_pattern": (_by_name(_is_rank), "whole numbers by the plain names of layers"),
    "alpha_pattern": (_by_name(_is_number), "finite numbers by the plain names of layers"),
    "modules_to_save": (_are_names, "a list of plain names"),
    "feedforward_modules": (_are_names, "a list of plain names"),
}


def layers_of(header: Header, settings: Mapping[str, Any], model: PreTrainedModel) -> list[str]:
    """The layers of `model` that the file has an adapter for; ValueError if the two disagree.

    Every tensor has to have its place in the model, with the shape that belongs there.
    """
    modules = dict(model.named_modules())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    copies = set()
    for name, entry in sorted(header.items()):
        inner = name.removeprefix(START)
        found = _TENSOR.fullmatch(inner)
        plain = inner.replace(".base_layer.", ".")
        if found and inner != name and found[1] in modules:
            layers.setdefault(found[1], {})[found[2]] = entry.shape
        elif not found and inner != name and plain in shapes:
            copies.add(plain)
            if shapes[plain] != entry.shape:
                raise ValueError(f"{name} is {entry.shape}, in the base {shapes[plain]}")
        else:
            raise ValueError(f"{name} is not in the base")
    if settings["peft_type"] == "LORA":
        for layer, tensors in layers.items():
            _check_sizes(layer, modules[layer], tensors)
    _check_ranks(layers, settings)
    _check_covered(layers, copies, settings, model)
    return list(layers)


def _check_sizes(layer: str, module: nn.Module, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """A is (rank, in) and B (out, rank), of an embedding (rank, rows) and (width, rank)."""
    if isinstance(module, nn.Embedding):
        width, sizes = "lora_embedding_", (module.num_embeddings, module.embedding_dim)
    elif isinstance(module, Conv1D):
        width, sizes = "lora_", (module.nx, module.nf)
    elif isinstance(module, nn.Linear):
        width, sizes = "lora_", (module.in_features, module.out_features)
    else:
        return  # peft knows which others it takes
    end = "" if isinstance(module, nn.Embedding) else ".weight"
    first, second = f"{width}A{end}", f"{width}B{end}"
    for part in (first, second):
        if part not in tensors:
            raise ValueError(f"{START}{layer}.{part} is not in the file")
    rank = tensors[first][0] if tensors[first] else 0
    for part, wanted in ((first, (rank, sizes[0])), (second, (sizes[1], rank))):
        if tensors[part] != wanted:
            raise ValueError(f"{START}{layer}.{part} is {tensors[part]}, its layer takes {wanted}")


def _check_ranks(
    layers: Mapping[str, Mapping[str, tuple[int, ...]]], settings: Mapping[str, Any]
) -> None:
    """No rank beyond the largest size in the file, and not more patterns than layers need."""
    largest = max((max(s, default=0) for t in layers.values() for s in t.values()), default=0)
    ranks = {
        tensors[part][0]
        for tensors in layers.values()
        for part in ("lora_A.weight", "lora_embedding_A")
        if part in tensors
    }
    patterns = settings.get("rank_pattern") or {}
    asked = {settings.get("r", 8), *patterns.values()}
    if ranks - asked or max(asked) > (max(ranks) if ranks else largest):
        raise ValueError(
            f"its rank is {', '.join(map(str, sorted(asked)[:5]))} by {'adapter_config.json'}, "
            f"{', '.join(map(str, sorted(ranks)[:5])) or f'at most {largest}'} by its tensors"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if len(settings.get(key) or ()) > PATTERNS_A_LAYER * len(layers):
            raise ValueError(
                f"{key} has {len(settings[key]):,} entries for {len(layers):,} layers; give one "
                "for each layer at most"
            )


def _check_covered(
    layers: Mapping[str, Any],
    copies: set[str],
    settings: Mapping[str, Any],
    model: PreTrainedModel,
) -> None:
    """What the settings name by plain names is in the file."""
    saved = settings.get("modules_to_save") or []
    for name in model.state_dict():
        module = name.rpartition(".")[0]
        if _is_below(module, saved) and name not in copies:
            raise ValueError(f"{START}{name} is not in the file")
    targets = settings.get("target_modules")
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if not isinstance(targets, list) or any(settings.get(key) is not None for key in narrowed):
        return
    wanted = {str(target) for target in targets}
    for name, _ in model.named_modules():
        if name in layers or _is_below(name, saved):
            continue
        if any(name == target or name.endswith(f".{target}") for target in wanted):
            part = "lora_A.weight" if settings["peft_type"] == "LORA" else "adapter"
            raise ValueError(f"{START}{name}.{part} is not in the file")


def _is_below(module: str, names: list[str]) -> bool:
    """Whether one of the modules on the way to this one has such a name, as peft matches them."""
    parts = module.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path == name or path.endswith(f".{name}") for path in paths for name in names)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
