"""The errors a user can meet. Everything else that escapes is a bug of ours.

LowVRAMError                 exit code 1
├── RecipeError              2   the recipe or a command-line value is wrong
├── DataError                3   a data file or data set cannot be used as asked
├── ModelError               4   a model directory, adapter or tokenizer cannot be used as asked
├── CheckpointError          5   a run cannot be resumed, or its directory is in the way
├── DeviceError              6   this machine cannot do what the recipe asks
├── DoesNotFit               7   the run does not fit into the memory it may use
├── TrainingError            8   training was stopped because going on would be of no use
├── ProofError               9   a result differs from what it must equal; nothing was put out
└── Interrupted              130 stopped by Ctrl-C or SIGTERM, after saving

A message names what is wrong (key or file), what was found, what is allowed and what to do. Tokens
of the hub, and user names and passwords in URLs, are masked in all of them.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")
_PASSWORD = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]+:/+)[^\s/'\"]*@")


class LowVRAMError(Exception):
    """Base of all errors of this package; `exit_code` is what the command exits with."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        # Here, so that no place that quotes a name can forget it: errors end up in logs.
        super().__init__(_TOKEN.sub(r"\1_***", _PASSWORD.sub(r"\1***@", str(message))))


class RecipeError(LowVRAMError):
    exit_code = 2


class DataError(LowVRAMError):
    exit_code = 3


class ModelError(LowVRAMError):
    exit_code = 4


class CheckpointError(LowVRAMError):
    exit_code = 5


class DeviceError(LowVRAMError):
    exit_code = 6


class DoesNotFit(LowVRAMError):
    exit_code = 7


class TrainingError(LowVRAMError):
    exit_code = 8


class ProofError(LowVRAMError):
    exit_code = 9


class Interrupted(LowVRAMError):
    exit_code = 130
