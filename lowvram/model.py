"""Load and save causal language models. The only module that knows transformers' model classes.

Weights are read from safetensors only, code never comes from a model directory, and a missing
tensor is an error: transformers would leave it random and go on.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.quantizers.auto import AutoHfQuantizer

from lowvram.attention import use_own_attention
from lowvram.errors import ModelError
from lowvram.known_models import known_settings
from lowvram.library_errors import hub_errors, model_errors, quiet_libraries
from lowvram.model_files import (
    check_config,
    check_directory,
    refuse_file,
    refuse_other_formats,
    weight_files_of,
)
from lowvram.safetensors_header import INDEX_FILE, SINGLE_FILE
from lowvram.weight_check import check_weights, refuse_misfits
from lowvram.weights import Layout, write_weights

BaseDtype = Literal["fp32", "bf16", "fp16", "int8", "nf4"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

EMBEDDED_PREFIX = "embedded:"
_ASSETS = Path(__file__).parent / "assets"

_SMALL_FILES = ["*.json", "*.txt", "*.model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(name: str, revision: str | None = None, *, weights: bool = False) -> Path:
    """The local directory of a model: as given, embedded in the package, or fetched once.

    From the hub come only configuration and tokenizer files, and with `weights` safetensors.
    """
    if name.startswith(EMBEDDED_PREFIX):
        embedded = {EMBEDDED_PREFIX + path.name: path for path in sorted(_ASSETS.iterdir())}
        if name not in embedded:
            known = ", ".join(embedded)
            raise ModelError(f"model.name: found {name!r}, embedded models are: {known}")
        return embedded[name]
    with contextlib.suppress(OSError, RuntimeError):  # too long for a name; ~ of nobody
        path = Path(name).expanduser()
        if path.is_dir():
            check_directory(path)
            return path
        if path.exists():
            refuse_file(path)
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model.name: {name!r} is no directory ({Path(name).absolute()} does not exist) "
            "and no model id of the hub (NAME or ORGANISATION/NAME)"
        )
    with hub_errors(name), quiet_libraries():
        found = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES,
                ignore_patterns=["*/*"],
            )
        )
    check_directory(found)
    return found


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    directory = locate(name, revision)
    with model_errors(name):
        check_config(directory)
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return config


def known_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """As `load_config`; some models' are known without asking the hub."""
    if revision is None and not Path(name).expanduser().is_dir():
        settings = known_settings(name)
        if settings is not None:
            return AutoConfig.for_model(**settings)
    return load_config(name, revision)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    directory = locate(name, revision)
    with model_errors(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False
        )
    if not tokenizer.is_fast or tokenizer.vocab_size == 0:
        raise ModelError(
            f"model.name: {name!r} has no usable tokenizer.json; "
            "put the files of the base model's tokenizer beside its weights"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.name: the tokenizer of {name!r} has no end-of-text token (eos_token); "
            "a model cannot learn where a document ends without one"
        )
    if (directory / "config.json").is_file():
        check_vocabulary(tokenizer, load_config(name, revision), name)
    return tokenizer


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str
) -> None:
    """Every token of the tokenizer, added ones too, has to have its place in the embedding."""
    tokens = 1 + max(tokenizer.get_vocab().values())
    rows = config.get_text_config().vocab_size
    if tokens > rows:
        raise ModelError(
            f"model.name: the tokenizer of {name!r} has {tokens} tokens, its "
            f"model {rows}; they do not belong together"
        )


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: BaseDtype = "fp32",
    compute_dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: str = "cpu",
) -> PreTrainedModel:
    """The model on `device`, in evaluation mode; `compute_dtype` is that of int8 and nf4.

    `attention` is transformers' name of one, or auto: our own where the model allows it, else
    torch's fused kernel.
    """
    options: dict[str, Any] = {"dtype": TORCH_DTYPES.get(dtype, compute_dtype)}
    if dtype in ("int8", "nf4"):
        options["quantization_config"] = _quantization(dtype, compute_dtype)
        options["device_map"] = {"": device}
    files = weight_files(name, revision)
    empty = _on_meta(load_config(name, revision), name)
    with model_errors(name):
        check_weights(name, empty, layout_of(empty), files)
    with model_errors(name), quiet_libraries():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            locate(name, revision, weights=True),
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa" if attention == "auto" else attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which is refused below, and says which
            **options,
        )
    model, report = loaded
    refuse_misfits(name, report["mismatched_keys"], report["missing_keys"])
    if "device_map" not in options:
        model.to(device)
    for module in model.modules():
        # On CPUs with bf16 arithmetic, 4-bit layers repack their weights when they are evaluated,
        # which fails for rows shorter than a block.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    model.eval()
    if attention == "auto":
        use_own_attention(model)
    if "device_map" in options and torch.cuda.is_available():
        torch.cuda.empty_cache()  # transformers reserves room to load into, more than it needs
    return model  # type: ignore[no-any-return]


def blank_model(
    config: PreTrainedConfig,
    *,
    dtype: BaseDtype = "fp32",
    compute_dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: str = "cpu",
) -> PreTrainedModel:
    """What `load_model` gives for weights that are not there: for the simulated device."""
    with model_errors(config.name_or_path or config.model_type), quiet_libraries():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=False,
            attn_implementation="sdpa" if attention == "auto" else attention,
            dtype=TORCH_DTYPES.get(dtype, compute_dtype),
        )
        if dtype in ("int8", "nf4"):
            _quantize_blank(model, _quantization(dtype, compute_dtype), compute_dtype, device)
        nn.Module.to(model, device)  # transformers' own refuses quantised models
    if attention == "auto":
        use_own_attention(model)
    model.eval()
    return model


def _quantize_blank(
    model: PreTrainedModel,
    settings: BitsAndBytesConfig,
    dtype: torch.dtype,
    device: str,
) -> None:
    """transformers' own steps, with weights that are made here rather than read."""
    model.config.quantization_config = settings
    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer.preprocess_model(model, device_map={"": device})
    module: Any
    for module in model.modules():
        if not hasattr(module, "source_cls"):  # transformers' mark of what it has replaced
            continue
        data = torch.empty(module.out_features, module.in_features, dtype=dtype)
        options = vars(module.weight)
        module.weight = type(module.weight)(data, requires_grad=False, **options).to(device)
        if module.bias is not None:
            bias = torch.empty(module.out_features, dtype=dtype)
            module.bias = nn.Parameter(bias, requires_grad=False)
    quantizer.postprocess_model(model)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off. Each module gets its own mode back: some may be frozen in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def empty_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """The model on the meta device: shapes, no weights."""
    return _on_meta(known_config(name, revision), name)


def _on_meta(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    with model_errors(name), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _quantization(dtype: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    if dtype == "int8":
        # It says at every start that activations are cast to 16 bits; that is how it works.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def fuse_gelu(model: nn.Module) -> int:
    """Run GPT-2's `gelu_new` as torch's tanh GELU, one kernel and one saved tensor; how many.

    transformers writes it out in five operations, each of which keeps a tensor of four times
    the hidden size for the backward pass. The function is the same.
    """
    replaced = 0
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, child_name, nn.GELU(approximate="tanh"))
                replaced += 1
    return replaced


def context_length(config: PreTrainedConfig) -> int:
    """The most tokens that the model has positions for."""
    text_config = config.get_text_config()
    length = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError("config.json: max_position_embeddings (or n_positions) is missing")
    return length


def parameter_count(model: nn.Module, *, trainable: bool = False) -> int:
    """Parameters, a tied one counted once; 4-bit weights count as what they stand for."""
    total = 0
    for parameter in model.parameters():
        if trainable and not parameter.requires_grad:
            continue
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return total


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model, sorted."""
    directory = locate(name, revision, weights=True)
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"model.name: {name!r} has an adapter in it (adapter_config.json); merge that, or "
            "name a directory with a model alone"
        )
    with model_errors(name):
        files = weight_files_of(directory)
    if absent := [path.name for path in files if not path.is_file()]:
        raise ModelError(f"model.name: {name!r} lacks {absent[0]}, which {INDEX_FILE} names")
    if not files:
        refuse_other_formats(name, directory)
        raise ModelError(f"model.name: found no {SINGLE_FILE} in {name!r}")
    return files


def weights_sha256(name: str, revision: str | None = None) -> str:
    """One hash of the bytes of all weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(name, revision):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def layout_of(model: PreTrainedModel, dtype: str | None = None) -> dict[str, torch.Tensor]:
    """What a plain checkpoint of `model` holds, in `dtype` or as it is; of tied weights one.

    Tensors on the meta device.
    """
    tied = set(model.all_tied_weights_keys)
    return {
        name: torch.empty(
            tensor.shape,
            dtype=TORCH_DTYPES[dtype] if dtype and tensor.is_floating_point() else tensor.dtype,
            device="meta",
        )
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def save_plain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    layout: Layout | None = None,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """A checkpoint that any tool loads: model, generation settings, tokenizer in both forms.

    In place of the model's own, `tensors` are written, in the dtypes of `layout`.
    """
    layout = layout_of(model) if layout is None else layout
    if tensors is None:
        tensors = ((name, tensor) for name, tensor in model.state_dict().items() if name in layout)
    kind = next(tensor.dtype for tensor in layout.values() if tensor.is_floating_point())
    config = copy.deepcopy(model.config)
    config.use_cache = True
    config.architectures = [type(model).__name__]
    config.dtype = str(kind).removeprefix("torch.")
    directory.mkdir(parents=True)
    with quiet_libraries():
        config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
    write_weights(directory, layout, tensors)
    save_tokenizer(tokenizer, directory)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    tokenizer.save_pretrained(directory)
    backend = tokenizer.backend_tokenizer.model
    if type(backend).__name__ == "BPE":
        backend.save(str(directory))  # vocab.json and merges.txt, which older tools want
