"""What this machine says of itself. Judges nothing.

A broken torch is one of the things to find, so nothing here needs it at import.
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
        step_complaint=try_8bit_step("cuda" if torch.cards else "cpu"),
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
