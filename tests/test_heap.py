"""What is freed stays with the process, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
from lowvram.heap import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

KEEP
held = bytearray(200_000_000)
with_it = resident()
del held
print(with_it - resident() < 100_000_000)
"""
ON_GLIBC = platform.libc_ver()[0] == "glibc" and os.path.exists("/proc/self/statm")


def run(keep: str, **variables: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", CODE.replace("KEEP", keep)],
        capture_output=True,
        text=True,
        check=True,
        env=environment | variables,
    )
    return result.stdout.split()


@pytest.mark.skipif(not ON_GLIBC, reason="this C library is not glibc")
def test_freed_memory_stays() -> None:
    assert run("") == ["False"]
    assert run("print(keep_freed_memory())") == ["True", "True"]


def test_the_users_own_settings_win() -> None:
    assert run("print(keep_freed_memory())", MALLOC_ARENA_MAX="2")[0] == "False"
