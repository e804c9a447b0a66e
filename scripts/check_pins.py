"""Every dependency is pinned, as its range allows, and what is installed is what is pinned.

    python scripts/check_pins.py

It goes from pyproject.toml, with the extra dev, through what is installed, so that what other
platforms need is not asked for here. pip, which brings them in, is not one of them. Exit code 1
with one line for each thing that is wrong.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
INSTALLER = "pip"
Installed = Callable[[str], tuple[str, list[str]] | None]


def read_pins(text: str) -> dict[str, Version]:
    """Of the lines NAME==VERSION; comments and blank lines are none."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): Version(pinned) for name, pinned in pairs}


def direct_requirements(project: Mapping[str, object]) -> list[Requirement]:
    """Those of the project with all its extras; one extra's use of another is none."""
    extras: Mapping[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    texts = [*project["dependencies"], *(text for texts in extras.values() for text in texts)]  # type: ignore[misc]
    found = [Requirement(text) for text in texts]
    return [requirement for requirement in found if requirement.name != project["name"]]


def installed(name: str) -> tuple[str, list[str]] | None:
    """Version and requirements of a package, if it is there."""
    try:
        return version(name), requires(name) or []
    except PackageNotFoundError:
        return None


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def wrong(
    direct: list[Requirement], pins: Mapping[str, Version], look_up: Installed
) -> Iterator[str]:
    """A line for each problem; what one package needs is looked at once for each set of extras."""
    queue = [("pyproject.toml", wanted) for wanted in direct if applies(wanted, {""})]
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        wanted_by, requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name == INSTALLER:
            continue
        pinned, found = pins.get(name), look_up(name)
        if pinned is None:
            yield f"{name}: {wanted_by} needs it and constraints.txt does not pin it"
        elif not requirement.specifier.contains(pinned, prereleases=True):
            yield f"{name}: pinned at {pinned}, and {wanted_by} needs {requirement.specifier}"
        key = name, frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        if found is None:
            yield f"{name}: {wanted_by} needs it and it is not installed"
            continue
        # 2.13.0+cpu is a build of 2.13.0.
        if pinned is not None and Version(found[0]).public != pinned.public:
            yield f"{name}: pinned at {pinned}, and {found[0]} is installed"
        needs = [Requirement(text) for text in found[1]]
        extras = set(requirement.extras)
        queue += [(name, need) for need in needs if applies(need, extras | {""})]


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = read_pins((ROOT / "constraints.txt").read_text("utf-8"))
    problems = sorted(set(wrong(direct_requirements(project), pins, installed)))
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"pins: all {len(pins)} are right")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
