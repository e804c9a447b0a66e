"""Would training work on this machine? Looks at the driver, the card, torch and the disk.

`examine` asks the machine; `diagnose` judges what it said and is a pure function. A broken torch is
one of the things to find, so nothing here needs it at import.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

OLDEST_PYTHON = (3, 11)
# CUDA 12.2's driver. Older ones lack fixes that bitsandbytes and fused attention rely on.
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


@dataclass(frozen=True, kw_only=True)
class DriverCard:
    """A card as nvidia-smi sees it; None where it does not say."""

    name: str
    driver: str
    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class CardProcess:
    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What nvidia-smi says; `complaint` if it says nothing."""

    cards: tuple[DriverCard, ...] = ()
    processes: tuple[CardProcess, ...] = ()
    complaint: str = ""


@dataclass(frozen=True, kw_only=True)
class TorchCard:
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What torch says; an empty `version` means that it cannot be imported."""

    version: str = ""
    gpu_build: str | None = None
    architectures: tuple[str, ...] = ()
    cards: tuple[TorchCard, ...] = ()
    complaint: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything a diagnosis goes by. `driver` is None where there is no nvidia-smi."""

    python: tuple[int, int, int]
    system: str
    wsl: bool
    visible_devices: str | None
    driver: Driver | None
    torch: Torch
    bitsandbytes: str | None
    step_complaint: str
    free_disk_bytes: int
    own_pid: int


def examine() -> Diagnosis:
    return diagnose(look())


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


# --- judging ----------------------------------------------------------------------------------


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
            advice="Fine for recipes/quickstart.yaml; larger models take a card.",
        )
    found = f"torch cannot use {seen[0].name if seen else 'any card'}"
    if torch.complaint:
        found += f": {torch.complaint}"
    return Check(name="card", status="fail", found=found, advice=_unusable_advice(machine))


def _unusable_advice(machine: Machine) -> str:
    if machine.visible_devices is not None:
        return (
            f"CUDA_VISIBLE_DEVICES is {machine.visible_devices!r}, which may hide the card: "
            "unset it."
        )
    if machine.torch.gpu_build is None:
        return "See torch above."
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

    Machine code (sm) runs on later minors of its major; PTX (compute) is compiled for any later card.
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
        found=f"{'WSL' if machine.wsl else 'Windows'}: the driver may move memory of a full card to "
        "the host, which makes training very slow instead of failing",
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


# --- looking ----------------------------------------------------------------------------------


def look() -> Machine:
    torch = look_at_torch()
    release = platform.uname().release.lower()
    return Machine(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        system=platform.system(),
        wsl="microsoft" in release,
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        driver=look_at_driver(),
        torch=torch,
        bitsandbytes=_version_of("bitsandbytes"),
        step_complaint=try_8bit_step("cuda" if torch.cards else "cpu") if torch.version else "",
        free_disk_bytes=min(shutil.disk_usage(place).free for place in _places()),
        own_pid=os.getpid(),
    )


def look_at_driver() -> Driver | None:
    """What nvidia-smi says; None where there is none."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if program is None:
        return None
    try:
        cards = ask_nvidia_smi(program, "--query-gpu=driver_version,memory.total,memory.free,name")
        processes = ask_nvidia_smi(program, "--query-compute-apps=pid,used_memory,process_name")
    except (OSError, subprocess.SubprocessError) as error:
        return Driver(complaint=_complaint(error))
    return Driver(
        cards=tuple(
            DriverCard(name=name, driver=driver, total_bytes=_mib(total), free_bytes=_mib(free))
            for driver, total, free, name in (_fields(line, 4) for line in cards)
        ),
        processes=tuple(
            CardProcess(pid=int(pid), name=name, used_bytes=_mib(used))
            for pid, used, name in (_fields(line, 3) for line in processes)
            if pid.isdigit()
        ),
    )


def ask_nvidia_smi(program: str, query: str) -> list[str]:
    """Lines of CSV. The name comes last in a query: only it can hold commas."""
    command = [program, query, "--format=csv,noheader,nounits"]
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=30, check=False
    )
    if result.returncode:
        lines = (result.stdout + result.stderr).split("\n")
        said = next((line.strip() for line in lines if line.strip()), f"exit {result.returncode}")
        raise subprocess.SubprocessError(said)
    return [line for line in result.stdout.splitlines() if line.strip()]


def _fields(line: str, count: int) -> list[str]:
    fields = [field.strip() for field in line.split(",", count - 1)]
    return fields + [""] * (count - len(fields))


def _mib(text: str) -> int | None:
    return int(text) * 2**20 if text.isdigit() else None  # "[N/A]" on Windows and on shared memory


def look_at_torch() -> Torch:
    try:
        import torch
    except Exception as error:  # a broken build raises anything, from OSError to RuntimeError
        return Torch(complaint=_complaint(error))
    build = None
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    facts = Torch(version=torch.__version__, gpu_build=build)
    if build is None:
        return facts
    with warnings.catch_warnings(record=True) as caught:
        # torch says why it cannot use a card in a warning.
        warnings.simplefilter("always")
        try:
            cards = look_at_cards()
        except Exception as error:  # the driver's failures come as RuntimeError and its kin
            return dataclasses.replace(facts, complaint=_complaint(error))
    if not cards:
        said = _complaint(caught[0].message) if caught else ""
        return dataclasses.replace(facts, complaint=said)
    return dataclasses.replace(facts, cards=cards, architectures=tuple(torch.cuda.get_arch_list()))


def look_at_cards() -> tuple[TorchCard, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    cards = []
    for number in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(number)
        cards.append(
            TorchCard(
                name=torch.cuda.get_device_name(number),
                capability=torch.cuda.get_device_capability(number),
                total_bytes=total_bytes,
                free_bytes=free_bytes,
            )
        )
    return tuple(cards)


def try_8bit_step(device: str) -> str:
    """Take one step of 8-bit AdamW; what went wrong, or nothing."""
    try:
        import torch

        from lowvram.optimizers import make_optimizer

        # 4,096 elements: bitsandbytes keeps the state of anything smaller in 32 bits.
        parameter = torch.nn.Parameter(torch.ones(4096, device=device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = make_optimizer(
            "adamw8bit", [parameter], learning_rate=0.125, weight_decay=0.0, betas=(0.9, 0.999)
        )
        optimizer.step()
        # Adam's first step has the size of the learning rate.
        off = (parameter.detach() - 0.875).abs().max().item()
    except Exception as error:  # a missing library raises anything, from OSError to AttributeError
        return _complaint(error)
    return "" if off < 1e-3 else f"the step is off by {off:.3g}"


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _places() -> Iterator[Path]:
    """Where runs and downloaded models go, or the nearest folder above that there is."""
    yield Path.cwd()
    cache = os.environ.get("HF_HOME") or os.path.join("~", ".cache", "huggingface")
    place = Path(cache).expanduser().absolute()
    yield next(folder for folder in (place, *place.parents) if folder.is_dir())


def _complaint(error: object) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().split("\n")
    text = lines[0].strip() or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
