"""Would training work on this machine? Looks at the driver, the card, torch and the disk."""

from __future__ import annotations

from lowvram.doctor.diagnosis import Check, Diagnosis, diagnose
from lowvram.doctor.machine import look

__all__ = ["Check", "Diagnosis", "examine"]


def examine() -> Diagnosis:
    return diagnose(look())
