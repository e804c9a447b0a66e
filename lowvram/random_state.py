"""Where the random number generators are: to go on from there, or to go back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """Of Python, of torch on the CPU and, if it was asked about one, of a card."""

    python: tuple[Any, ...]
    cpu: torch.Tensor  # (n,) uint8
    card: torch.Tensor | None  # (n,) uint8

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        return cls(
            python=random.getstate(),
            cpu=torch.get_rng_state(),
            card=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    def restore(self) -> None:
        """Without a card, its part is left out: random numbers of another device are others."""
        random.setstate(self.python)
        torch.set_rng_state(self.cpu)
        if self.card is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.card)

    def to_json(self) -> dict[str, Any]:
        version, internal, gauss = self.python
        return {
            "python": [version, list(internal), gauss],
            "cpu": self.cpu.numpy().tobytes().hex(),
            "card": None if self.card is None else self.card.numpy().tobytes().hex(),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> RandomState:
        version, internal, gauss = saved["python"]
        return cls(
            python=(version, tuple(internal), gauss),
            cpu=_tensor(saved["cpu"]),
            card=None if saved["card"] is None else _tensor(saved["card"]),
        )


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
