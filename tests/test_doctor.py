"""The doctor: every trap on a machine that is made up, and the questions it asks a real one."""

# ruff: noqa: E501 (a message stands on one line, as it is printed)

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram import doctor
from lowvram.doctor import Check, Diagnosis, machine
from lowvram.doctor.diagnosis import INSTALL_CUDA_TORCH, diagnose
from lowvram.doctor.machine import CardProcess, Driver, DriverCard, Machine, Torch, TorchCard

GIB = 2**30
CARD = TorchCard(
    name="NVIDIA GeForce RTX 4070 Ti",
    capability=(8, 9),
    total_bytes=12 * GIB,
    free_bytes=int(11.5 * GIB),
)
DRIVER_CARD = DriverCard(
    name=CARD.name, driver="580.95.05", total_bytes=CARD.total_bytes, free_bytes=CARD.free_bytes
)
FINE = Machine(
    python=(3, 12, 1),
    system="Linux",
    wsl=False,
    visible_devices=None,
    driver=Driver(cards=(DRIVER_CARD,)),
    torch=Torch(
        version="2.13.0",
        gpu_build="CUDA 13.0",
        architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
        cards=(CARD,),
    ),
    bitsandbytes="0.50.2",
    step_complaint="",
    free_disk_bytes=100 * GIB,
    own_pid=1,
)


def but(base: Machine = FINE, **changes: Any) -> Machine:
    """A machine like `base` except for some facts; torch__cards changes a fact about torch."""
    for key, value in changes.items():
        part, _, name = key.partition("__")
        new = dataclasses.replace(getattr(base, part), **{name: value}) if name else value
        base = dataclasses.replace(base, **{part: new})
    return base


def with_card(**changes: Any) -> Machine:
    return but(torch__cards=(dataclasses.replace(CARD, **changes),))


def with_driver(version: str, base: Machine = FINE) -> Machine:
    return but(base, driver__cards=(dataclasses.replace(DRIVER_CARD, driver=version),))


CPU_TORCH = Torch(version="2.13.0+cpu")
NO_CARD = but(driver=None, torch=CPU_TORCH)


# --- judging ----------------------------------------------------------------------------------


def test_a_machine_on_which_all_is_well() -> None:
    diagnosis = diagnose(FINE)

    assert [(check.name, check.status, check.found) for check in diagnosis.checks] == [
        ("python", "ok", "3.12.1"),
        ("torch", "ok", "2.13.0, for CUDA 13.0"),
        ("driver", "ok", "NVIDIA 580.95.05"),
        ("card", "ok", "NVIDIA GeForce RTX 4070 Ti"),
        ("memory", "ok", "11.5 GiB free of 12.0 GiB"),
        ("compute capability", "ok", "8.9: bf16"),
        ("8-bit optimizer", "ok", "bitsandbytes 0.50.2 took a step on the card"),
        ("disk", "ok", "100.0 GiB free"),
    ]
    assert not diagnosis.would_fail
    assert diagnosis.exit_code == 0
    assert all(check.advice == "" for check in diagnosis.checks)


def test_no_card_at_all() -> None:
    diagnosis = diagnose(NO_CARD)

    assert [(check.name, check.status, check.found) for check in diagnosis.checks] == [
        ("python", "ok", "3.12.1"),
        ("torch", "ok", "2.13.0+cpu, a build for CPUs only"),
        ("card", "fail", "no NVIDIA card: training runs on the CPU"),
        ("8-bit optimizer", "ok", "bitsandbytes 0.50.2 took a step on the CPU"),
        ("disk", "ok", "100.0 GiB free"),
    ]
    assert diagnosis.exit_code == 1


TRAPS: Mapping[str, tuple[Machine, list[Check]]] = {
    "old python": (
        but(python=(3, 10, 12)),
        [
            Check(
                name="python",
                status="fail",
                found="3.10.12",
                advice="Install Python 3.11 or newer.",
            )
        ],
    ),
    "torch cannot be imported": (
        but(NO_CARD, torch=Torch(complaint="No module named 'torch'")),
        [
            Check(
                name="torch",
                status="fail",
                found="cannot be imported: No module named 'torch'",
                advice="Reinstall it: pip install --force-reinstall torch.",
            ),
            Check(
                name="card",
                status="fail",
                found="torch cannot use any card: No module named 'torch'",
                advice="See torch above.",
            ),
        ],
    ),
    "CPU-only torch beside a card": (
        but(torch=CPU_TORCH),
        [
            Check(
                name="torch",
                status="fail",
                found="2.13.0+cpu, a build for CPUs only, beside an NVIDIA card",
                advice="Install a build for CUDA: pip install --force-reinstall torch "
                "--index-url https://download.pytorch.org/whl/cu130",
            ),
            Check(
                name="card",
                status="fail",
                found="torch cannot use NVIDIA GeForce RTX 4070 Ti",
                advice="See torch above.",
            ),
        ],
    ),
    "CPU-only torch, and the driver is too old for the other": (
        with_driver("552.22", but(torch=CPU_TORCH)),
        [
            Check(
                name="torch",
                status="fail",
                found="2.13.0+cpu, a build for CPUs only, beside an NVIDIA card",
                advice="Update the NVIDIA driver to 580 or newer, then: " + INSTALL_CUDA_TORCH,
            ),
            Check(
                name="card",
                status="fail",
                found="torch cannot use NVIDIA GeForce RTX 4070 Ti",
                advice="See torch above.",
            ),
        ],
    ),
    "old driver": (
        with_driver("470.256.02"),
        [
            Check(
                name="driver",
                status="warn",
                found="NVIDIA 470.256.02, older than 535",
                advice="Update the NVIDIA driver to 580 or newer.",
            )
        ],
    ),
    "driver too old for torch": (
        with_driver(
            "550.54.14",
            but(
                torch__cards=(),
                torch__complaint="CUDA initialization: The NVIDIA driver is too old",
            ),
        ),
        [
            Check(
                name="card",
                status="fail",
                found="torch cannot use NVIDIA GeForce RTX 4070 Ti: CUDA initialization: The NVIDIA "
                "driver is too old",
                advice="Update the NVIDIA driver to 580 or newer, and reboot.",
            )
        ],
    ),
    "driver that does not answer": (
        but(driver=Driver(complaint="Failed to initialize NVML: Driver/library version mismatch")),
        [
            Check(
                name="driver",
                status="fail",
                found="nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch",
                advice="Reinstall the NVIDIA driver, or reboot if it was just updated.",
            )
        ],
    ),
    "hidden card": (
        but(torch__cards=(), visible_devices=""),
        [
            Check(
                name="card",
                status="fail",
                found="torch cannot use NVIDIA GeForce RTX 4070 Ti",
                advice="CUDA_VISIBLE_DEVICES is '', which may hide the card: unset it.",
            )
        ],
    ),
    "memory in use": (
        with_card(free_bytes=8 * GIB),
        [
            Check(
                name="memory",
                status="warn",
                found="8.0 GiB free of 12.0 GiB",
                advice="Close other programs that use the card: what they hold, a run cannot have.",
            )
        ],
    ),
    "no bf16": (
        with_card(capability=(7, 5)),
        [
            Check(
                name="compute capability",
                status="warn",
                found="7.5: no bf16",
                advice="Leave train.precision at auto, or write fp16.",
            )
        ],
    ),
    "card that torch was not built for": (
        with_card(capability=(6, 1)),
        [
            Check(
                name="compute capability",
                status="fail",
                found="6.1, which this torch was not built for "
                "(sm_75, sm_80, sm_86, sm_90, sm_100, sm_120, compute_120)",
                advice="Install a build of torch that supports the card: "
                "https://pytorch.org/get-started",
            )
        ],
    ),
    "other processes": (
        but(
            driver__processes=(
                CardProcess(pid=1, name="this one", used_bytes=GIB),
                CardProcess(pid=7, name="python, old", used_bytes=3 * GIB),
                CardProcess(pid=8, name="game.exe", used_bytes=None),
            )
        ),
        [
            Check(
                name="other processes",
                status="warn",
                found="python, old (pid 7, 3.0 GiB), game.exe (pid 8)",
                advice="They hold memory of the card. Close what you do not need.",
            )
        ],
    ),
    "no bitsandbytes": (
        but(bitsandbytes=None),
        [
            Check(
                name="8-bit optimizer",
                status="fail",
                found="bitsandbytes is not installed",
                advice="pip install bitsandbytes, or write train.optimizer: adamw.",
            )
        ],
    ),
    "bitsandbytes that does not load": (
        but(step_complaint="libbitsandbytes_cuda130.so: cannot open shared object file"),
        [
            Check(
                name="8-bit optimizer",
                status="fail",
                found="bitsandbytes 0.50.2 fails on the card: libbitsandbytes_cuda130.so: cannot "
                "open shared object file",
                advice="pip install --upgrade bitsandbytes, or write train.optimizer: adamw.",
            )
        ],
    ),
    "windows": (
        but(system="Windows"),
        [
            Check(
                name="memory fallback",
                status="warn",
                found="Windows: the driver may move memory of a full card to the host, which makes "
                "training very slow instead of failing",
                advice="In the NVIDIA Control Panel, 3D settings, set CUDA - Sysmem Fallback Policy "
                "to Prefer No Sysmem Fallback.",
            )
        ],
    ),
    "wsl": (
        but(wsl=True),
        [
            Check(
                name="memory fallback",
                status="warn",
                found="WSL: the driver may move memory of a full card to the host, which makes "
                "training very slow instead of failing",
                advice="WSL ignores the driver's switch for this: set fit.vram below the free memory.",
            )
        ],
    ),
    "windows without a card": (
        but(NO_CARD, system="Windows"),
        [
            Check(
                name="card",
                status="fail",
                found="no NVIDIA card: training runs on the CPU",
                advice="Fine for lowvram run quickstart; larger models take a card.",
            )
        ],
    ),
    "little disk": (
        but(free_disk_bytes=3 * GIB),
        [
            Check(
                name="disk",
                status="warn",
                found="3.0 GiB free",
                advice="GPT-2 XL is a download of 6 GiB, and its merged checkpoint takes 6 GiB more.",
            )
        ],
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    trapped, wanted = TRAPS[name]
    diagnosis = diagnose(trapped)

    assert [check for check in diagnosis.checks if check.status != "ok"] == wanted
    assert diagnosis.exit_code == (1 if any(check.status == "fail" for check in wanted) else 0)


def test_many_processes_are_cut_short() -> None:
    processes = tuple(CardProcess(pid=n, name="p", used_bytes=None) for n in range(2, 9))
    check = next(
        check
        for check in diagnose(but(driver__processes=processes)).checks
        if check.name == "other processes"
    )

    assert check.found == "p (pid 2), p (pid 3), p (pid 4), p (pid 5), p (pid 6) and 2 more"


def test_several_cards_are_numbered() -> None:
    two = but(torch__cards=(CARD, dataclasses.replace(CARD, capability=(7, 5))))
    names = {check.name: check.found for check in diagnose(two).checks}

    assert names["card"] == f"{CARD.name}, {CARD.name}"
    assert names["compute capability 0"] == "8.9: bf16"
    assert names["compute capability 1"] == "7.5: no bf16"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), ("sm_80",), True),
        ((8, 9), ("sm_90",), False),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("compute_80",), True),
        ((9, 0), ("sm_90a",), True),
        ((12, 0), ("sm_100", "sm_120"), True),
        ((10, 3), ("sm_100f",), True),
        ((8, 9), ("gfx90a",), True),
        ((8, 9), (), True),
    ],
)
def test_what_runs_on_what(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    card = but(
        torch__cards=(dataclasses.replace(CARD, capability=capability),),
        torch__architectures=architectures,
    )
    assert diagnose(card).would_fail is not runs


def test_a_diagnosis_is_json() -> None:
    page = json.loads(json.dumps(diagnose(NO_CARD).to_dict()))

    assert page["would_fail"] is True
    assert page["checks"][2] == {
        "name": "card",
        "status": "fail",
        "found": "no NVIDIA card: training runs on the CPU",
        "advice": "Fine for lowvram run quickstart; larger models take a card.",
    }


# --- looking ----------------------------------------------------------------------------------

FAKE_SMI = """#!/bin/sh
case "$1" in
  --query-gpu=driver_version,memory.total,memory.free,name)
    echo "580.95.05, 12282, 11000, NVIDIA GeForce RTX 4070 Ti"
    echo "580.95.05, [N/A], [N/A], NVIDIA GB10" ;;
  --query-compute-apps=pid,used_memory,process_name)
    echo "7, 3072, /usr/bin/python, old"
    echo "8, [N/A], game.exe"
    echo "[Insufficient Permissions], 1, x" ;;
  *) echo "unknown option $1"; exit 2 ;;
esac
[ "$2" = "--format=csv,noheader,nounits" ]
"""


def install_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_smi(tmp_path, monkeypatch, FAKE_SMI)
    driver = machine.look_at_driver()

    assert driver == Driver(
        cards=(
            DriverCard(
                name="NVIDIA GeForce RTX 4070 Ti",
                driver="580.95.05",
                total_bytes=12282 * 2**20,
                free_bytes=11000 * 2**20,
            ),
            DriverCard(name="NVIDIA GB10", driver="580.95.05", total_bytes=None, free_bytes=None),
        ),
        processes=(
            CardProcess(pid=7, name="/usr/bin/python, old", used_bytes=3 * GIB),
            CardProcess(pid=8, name="game.exe", used_bytes=None),
        ),
    )


def test_nvidia_smi_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_smi(tmp_path, monkeypatch, "#!/bin/sh\necho\necho 'NVIDIA-SMI has failed.'\nexit 9\n")
    assert machine.look_at_driver() == Driver(complaint="NVIDIA-SMI has failed.")

    install_smi(tmp_path, monkeypatch, "#!/bin/sh\nexit 9\n")
    assert machine.look_at_driver() == Driver(complaint="exit 9")


def test_nvidia_smi_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert machine.look_at_driver() is None


def test_nvidia_smi_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr("shutil.which", lambda name, path=None: "/bin/nvidia-smi")
    monkeypatch.setattr("subprocess.run", hang)
    driver = machine.look_at_driver()

    assert driver is not None
    assert driver.complaint.endswith("timed out after 30 seconds")


def test_torch_is_asked_for_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (CARD.free_bytes, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: CARD.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86"])

    assert machine.look_at_torch() == Torch(
        version="2.13.0", gpu_build="CUDA 13.0", architectures=("sm_86",), cards=(CARD,)
    )


def test_torch_says_why_it_cannot_use_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn_and_deny() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", warn_and_deny)

    assert machine.look_at_torch().complaint == "The NVIDIA driver on your system is too old"


def test_a_card_that_breaks_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", broken)

    assert machine.look_at_torch().complaint == "CUDA error: unknown error"


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    assert machine.look_at_torch() == Torch(complaint="import of torch halted; None in sys.modules")
    assert machine.try_8bit_step("cpu") == "import of torch halted; None in sys.modules"


def test_the_8bit_step_works_on_a_cpu() -> None:
    assert machine.try_8bit_step("cpu") == ""


def test_an_8bit_step_that_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def step(self) -> None:
            pass

    monkeypatch.setattr("lowvram.optimizers.make_optimizer", lambda *args, **kwargs: Idle())
    assert machine.try_8bit_step("cpu") == "the step is off by 0.125"

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'cadam8bit'" + "x" * 400)

    monkeypatch.setattr("lowvram.optimizers.make_optimizer", fail)
    complaint = machine.try_8bit_step("cpu")
    assert len(complaint) == 300
    assert complaint.endswith("x...")


def test_packages_that_are_not_installed() -> None:
    assert machine._version_of("no-such-package-lowvram") is None
    assert machine._version_of("bitsandbytes")


def test_the_disk_of_a_cache_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "a" / "b"))
    monkeypatch.chdir(tmp_path)

    assert list(machine._places()) == [tmp_path, tmp_path]


def test_examine_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = doctor.examine()

    assert isinstance(diagnosis, Diagnosis)
    names = [check.name for check in diagnosis.checks]
    assert {"python", "torch", "card", "8-bit optimizer", "disk"} <= set(names)
    assert diagnosis.checks[0].found == sys.version.split()[0]
    json.dumps(diagnosis.to_dict())


def test_the_doctor_loads_without_torch() -> None:
    code = "import sys, lowvram.doctor; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == "False\n"
