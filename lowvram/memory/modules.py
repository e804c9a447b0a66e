"""Which module is running, by hooks that torch calls around every forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_C: Any = torch._C
_AUTOGRAD: Any = torch.autograd


class Modules:
    """Names are those of `named_modules` of the outermost module; `on_root` hears of each once."""

    def __init__(self, on_root: Callable[[nn.Module], None]) -> None:
        self.vocabulary = -1
        """Entries of the largest embedding seen."""
        self._on_root = on_root
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._stacks = threading.local()  # a backward pass has a thread of its own
        self._made_by: dict[int, str] = {}  # modules by number of the autograd node

    def enter(self, module: nn.Module, *_: Any) -> None:
        stack = self._stack()
        if not stack and module not in self._names:
            self._on_root(module)
            self._learn(module)
        stack.append(self._names.get(module) or type(module).__name__)

    def leave(self, *_: Any) -> None:
        stack = self._stack()
        if stack:
            stack.pop()

    def current(self) -> str:
        """Empty outside of any module. In a backward pass: the module whose forward it undoes."""
        stack = self._stack()
        if stack:
            name = stack[-1]
            if torch.is_grad_enabled():
                self._made_by[_AUTOGRAD._get_sequence_nr() - 1] = name
            return name
        if _C._current_graph_task_id() != -1:
            node = _C._current_autograd_node()
            if node is not None:
                return self._made_by.get(node._sequence_nr(), "")
        return ""

    def _stack(self) -> list[str]:
        try:
            stack: list[str] = self._stacks.names
        except AttributeError:
            stack = self._stacks.names = []
        return stack

    def _learn(self, root: nn.Module) -> None:
        for name, module in root.named_modules():
            self._names.setdefault(module, name)
            if isinstance(module, nn.Embedding):
                self.vocabulary = max(self.vocabulary, module.num_embeddings)
