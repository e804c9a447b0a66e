"""Names of models: which stand for a directory of this machine, and which can stand for nothing."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from lowvram.errors import ModelError
from lowvram.terminal import odd_characters

EMBEDDED_PREFIX = "embedded:"
_ASSETS = Path(__file__).parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def local_directory(name: str) -> Path | None:
    """The directory of a model that is here or embedded in the package; None for one of the hub.

    Raises ModelError for a name that can be none of these.
    """
    if name.startswith(EMBEDDED_PREFIX):
        embedded = {EMBEDDED_PREFIX + path.name: path for path in sorted(_ASSETS.iterdir())}
        if name not in embedded:
            known = ", ".join(embedded)
            raise ModelError(f"model.name: found {name!r}, embedded models are: {known}")
        return embedded[name]
    with contextlib.suppress(OSError, RuntimeError):  # too long for a name; ~ of nobody
        if Path(name).expanduser().is_dir():
            return Path(name).expanduser()
    if not _HUB_ID.fullmatch(name):
        odd = odd_characters(name)
        raise ModelError(
            f"model.name: {name!r} is no directory ({Path(name).absolute()} does not exist) "
            "and no model id of the hub (NAME or ORGANISATION/NAME)"
            + (f"; it has {odd}" if odd else "")
        )
    return None
