"""Memory of a CPU run: what is freed stays with the process, for the next tensor of that size.

By default glibc gives large tensors back to the system at once and asks for each anew. The system
then clears every page of it, which takes as long as the arithmetic of many small kernels.
"""

from __future__ import annotations

import ctypes
import os

# From malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Where the C library is glibc, until the process ends; whether it is.

    One arena for all threads, so that what one has freed can serve another. Settings of the user
    (the MALLOC_* variables of the environment) are left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return False  # Windows
    if not hasattr(library, "gnu_get_libc_version"):
        return False  # macOS; musl, whose mallopt does nothing
    mallopt = library.mallopt
    settings = ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1))
    return all([bool(mallopt(name, value)) for name, value in settings])
