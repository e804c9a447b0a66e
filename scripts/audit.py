"""Known vulnerabilities of what constraints.txt pins, by pip-audit.

    python scripts/audit.py

Asks PyPI, then OSV. Exit code 1 if one is found. Where neither can be asked, or knows the
packages, that is said and is no failure: a machine without a network can check all else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
DATABASES = ("pypi", "osv")


def audit(database: str) -> list[dict[str, Any]]:
    """A record for each package; none where the database cannot be asked."""
    options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "-r", CONSTRAINTS, "-s", database, *options],
        capture_output=True,
        text=True,
    )
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return []
    return found


def judge(records: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """How many packages the database knows, and a line for each vulnerability."""
    known = [record for record in records if "skip_reason" not in record]
    return len(known), [
        f"{record['name']} {record['version']}: {found['id']}, "
        f"fixed in {', '.join(found['fix_versions']) or 'no version yet'}"
        for record in known
        for found in record["vulns"]
    ]


def main() -> int:
    for database in DATABASES:
        records = audit(database)
        count, problems = judge(records)
        for problem in problems:
            print(problem, file=sys.stderr)
        if count:
            print(f"audit: {database} knows {count} of {len(records)} packages, "
                  f"and {len(problems)} vulnerabilities of them")  # fmt: skip
            return 1 if problems else 0
    print("audit: NOT DONE: neither PyPI nor OSV could be asked from here", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
