"""What transformers and the hub say and raise, in the words of a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging as transformers_logging

from lowvram.errors import LowVRAMError, ModelError


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"model.name: {name!r} is no directory here ({Path(name).absolute()} does not exist), "
            "and the hub could not be asked for it or does not have it "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Give a "
            "directory with config.json and model.safetensors, or connect to the network once"
        ) from error


@contextlib.contextmanager
def model_errors(name: str) -> Iterator[None]:
    """What the libraries raise on a bad file, in the words of the recipe.

    That can be anything: a bare Exception from tokenizers, a division by zero for `n_head: 0`.
    """
    try:
        yield
    except (LowVRAMError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise ModelError(
            f"model.name: cannot load {name!r}: {reason.rstrip('.')}. "
            "Give a directory with config.json and model.safetensors, or a model id of the hub "
            "(which needs a network connection the first time)"
        ) from error


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Loading bars and load reports are for a notebook; the run shows its own progress."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
