"""From what a machine says to what that means: a pure function, so every trap can be tested."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lowvram.doctor.machine import Machine, TorchCard

OLDEST_PYTHON = (3, 11)
# The first of CUDA 12.2; what is older is untried.
OLDEST_DRIVER = 535
# What the cu130 builds of torch need.
CU130_DRIVER = 580
LITTLE_DISK_BYTES = 10 * 2**30
# A desktop's own use; more than this taken by others shortens what fits.
LITTLE_USED_BYTES = 2**30

INSTALL_CUDA_TORCH = (
    "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """`found` says how it is, `advice` what to do; `fail` stops training on the card."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    checks: tuple[Check, ...]

    @property
    def would_fail(self) -> bool:
        """Whether training on the card would fail; true as well where there is no card."""
        return any(check.status == "fail" for check in self.checks)

    @property
    def exit_code(self) -> int:
        return 1 if self.would_fail else 0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        checks = [dataclasses.asdict(check) for check in self.checks]
        return {"would_fail": self.would_fail, "checks": checks}


def diagnose(machine: Machine) -> Diagnosis:
    checks = [
        _check_python(machine),
        _check_torch(machine),
        *_check_driver(machine),
        _check_card(machine),
        *_check_each_card(machine),
        *_check_processes(machine),
        _check_8bit(machine),
        *_check_memory_fallback(machine),
        _check_disk(machine),
    ]
    return Diagnosis(checks=tuple(checks))


def _check_python(machine: Machine) -> Check:
    version = ".".join(map(str, machine.python))
    if machine.python < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return Check(
            name="python", status="fail", found=version, advice=f"Install Python {wanted} or newer."
        )
    return Check(name="python", status="ok", found=version)


def _check_torch(machine: Machine) -> Check:
    torch = machine.torch
    if not torch.version:
        return Check(
            name="torch",
            status="fail",
            found=f"cannot be imported: {torch.complaint}",
            advice="Reinstall it: pip install --force-reinstall torch.",
        )
    if torch.gpu_build:
        return Check(name="torch", status="ok", found=f"{torch.version}, for {torch.gpu_build}")
    found = f"{torch.version}, a build for CPUs only"
    if machine.driver and machine.driver.cards:
        return Check(
            name="torch",
            status="fail",
            found=f"{found}, beside an NVIDIA card",
            advice=_install_advice(machine.driver.cards[0].driver),
        )
    return Check(name="torch", status="ok", found=found)


def _install_advice(driver: str) -> str:
    if _major(driver) < CU130_DRIVER:
        return f"Update the NVIDIA driver to {CU130_DRIVER} or newer, then: {INSTALL_CUDA_TORCH}"
    return f"Install a build for CUDA: {INSTALL_CUDA_TORCH}"


def _check_driver(machine: Machine) -> Iterator[Check]:
    driver = machine.driver
    if driver is None:
        return
    if driver.complaint:
        yield Check(
            name="driver",
            status="fail",
            found=f"nvidia-smi says: {driver.complaint}",
            advice="Reinstall the NVIDIA driver, or reboot if it was just updated.",
        )
    elif driver.cards:
        version = driver.cards[0].driver
        if _major(version) < OLDEST_DRIVER:
            yield Check(
                name="driver",
                status="warn",
                found=f"NVIDIA {version}, older than {OLDEST_DRIVER}",
                advice=f"Update the NVIDIA driver to {CU130_DRIVER} or newer.",
            )
        else:
            yield Check(name="driver", status="ok", found=f"NVIDIA {version}")


def _check_card(machine: Machine) -> Check:
    torch = machine.torch
    if torch.cards:
        names = ", ".join(card.name for card in torch.cards)
        return Check(name="card", status="ok", found=names)
    seen = machine.driver.cards if machine.driver else ()
    if not seen and not torch.complaint:
        return Check(
            name="card",
            status="fail",
            found="no NVIDIA card: training runs on the CPU",
            advice="Fine for lowvram run quickstart; larger models take a card.",
        )
    found = f"torch cannot use {seen[0].name if seen else 'any card'}"
    if torch.complaint:
        found += f": {torch.complaint}"
    return Check(name="card", status="fail", found=found, advice=_unusable_advice(machine))


def _unusable_advice(machine: Machine) -> str:
    if machine.torch.gpu_build is None:
        return "See torch above."
    if machine.visible_devices is not None:
        return (
            f"CUDA_VISIBLE_DEVICES is {machine.visible_devices!r}, which may hide the card: "
            "unset it."
        )
    return f"Update the NVIDIA driver to {CU130_DRIVER} or newer, and reboot."


def _check_each_card(machine: Machine) -> Iterator[Check]:
    many = len(machine.torch.cards) > 1
    for number, card in enumerate(machine.torch.cards):
        suffix = f" {number}" if many else ""
        yield _check_memory(card, suffix)
        yield _check_capability(card, machine.torch.architectures, suffix)


def _check_memory(card: TorchCard, suffix: str) -> Check:
    found = f"{_gib(card.free_bytes)} free of {_gib(card.total_bytes)}"
    if card.total_bytes - card.free_bytes > LITTLE_USED_BYTES:
        return Check(
            name=f"memory{suffix}",
            status="warn",
            found=found,
            advice="Close other programs that use the card: what they hold, a run cannot have.",
        )
    return Check(name=f"memory{suffix}", status="ok", found=found)


def _check_capability(card: TorchCard, architectures: tuple[str, ...], suffix: str) -> Check:
    major, minor = card.capability
    name, found = f"compute capability{suffix}", f"{major}.{minor}"
    if architectures and not any(_runs_on(card.capability, arch) for arch in architectures):
        return Check(
            name=name,
            status="fail",
            found=f"{found}, which this torch was not built for ({', '.join(architectures)})",
            advice="Install a build of torch that supports the card: https://pytorch.org/get-started",
        )
    # torch also answers yes for cards that only emulate bf16, slowly; the hardware has it from 8.0.
    if major < 8:
        return Check(
            name=name,
            status="warn",
            found=f"{found}: no bf16",
            advice="Leave train.precision at auto, or write fp16.",
        )
    return Check(name=name, status="ok", found=f"{found}: bf16")


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether code for `architecture` (sm_86, compute_90, sm_90a) runs on a card.

    Machine code (sm) runs on later minors of its major, PTX (compute) on any later card.
    """
    kind, _, digits = architecture.partition("_")
    if digits[-1:].isalpha():
        exact, digits = digits[-1] == "a", digits[:-1]
    else:
        exact = False
    if not digits.isdigit():
        return True  # not NVIDIA's: no opinion
    built = (int(digits[:-1]), int(digits[-1]))
    if exact:
        return capability == built
    return capability >= built and (kind == "compute" or capability[0] == built[0])


def _check_processes(machine: Machine) -> Iterator[Check]:
    everyone = machine.driver.processes if machine.driver else ()
    others = [process for process in everyone if process.pid != machine.own_pid]
    if others:
        shown = [
            f"{process.name} (pid {process.pid}"
            + (f", {_gib(process.used_bytes)})" if process.used_bytes is not None else ")")
            for process in others[:5]
        ]
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        yield Check(
            name="other processes",
            status="warn",
            found=", ".join(shown) + more,
            advice="They hold memory of the card. Close what you do not need.",
        )


def _check_8bit(machine: Machine) -> Check:
    name = "8-bit optimizer"
    if machine.bitsandbytes is None:
        return Check(
            name=name,
            status="fail",
            found="bitsandbytes is not installed",
            advice="pip install bitsandbytes, or write train.optimizer: adamw.",
        )
    device = "card" if machine.torch.cards else "CPU"
    if machine.step_complaint:
        return Check(
            name=name,
            status="fail",
            found=f"bitsandbytes {machine.bitsandbytes} fails on the {device}: "
            f"{machine.step_complaint}",
            advice="pip install --upgrade bitsandbytes, or write train.optimizer: adamw.",
        )
    found = f"bitsandbytes {machine.bitsandbytes} took a step on the {device}"
    return Check(name=name, status="ok", found=found)


def _check_memory_fallback(machine: Machine) -> Iterator[Check]:
    has_card = bool(machine.torch.cards or (machine.driver and machine.driver.cards))
    if not has_card or not (machine.wsl or machine.system == "Windows"):
        return
    if machine.wsl:
        advice = "WSL ignores the driver's switch for this: set fit.vram below the free memory."
    else:
        advice = (
            "In the NVIDIA Control Panel, 3D settings, set CUDA - Sysmem Fallback Policy to "
            "Prefer No Sysmem Fallback."
        )
    yield Check(
        name="memory fallback",
        status="warn",
        found=f"{'WSL' if machine.wsl else 'Windows'}: the driver may move memory of a full card "
        "to the host, which makes training very slow instead of failing",
        advice=advice,
    )


def _check_disk(machine: Machine) -> Check:
    found = f"{_gib(machine.free_disk_bytes)} free"
    if machine.free_disk_bytes < LITTLE_DISK_BYTES:
        return Check(
            name="disk",
            status="warn",
            found=found,
            advice="GPT-2 XL is a download of 6 GiB, and its merged checkpoint takes 6 GiB more.",
        )
    return Check(name="disk", status="ok", found=found)


def _major(version: str) -> int:
    digits = version.partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _gib(size_bytes: int) -> str:
    # Not memory.format_gib: that needs torch, and this page must be readable without.
    return f"{size_bytes / 2**30:.1f} GiB"
