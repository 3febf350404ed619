"""The C library's allocator, set so that a step reuses the memory of the one before it.

By default glibc maps every large block anew and returns it when freed, so each step pays for page
faults on all of its activations. Kept blocks spare a step these faults; between steps the process
holds more memory.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# mallopt takes an int. A glibc that refuses thresholds past half of a thread's heap takes 32 MiB.
_THRESHOLDS = (2**31 - 1, 32 * 2**20)
_NEVER_TRIM = 2**31 - 1


def reuse_freed_memory() -> bool:
    """Keep freed blocks of up to 2 GiB in the process; for programs, not for libraries.

    Changes the whole process and cannot be undone, so only the command line calls it.

    Returns:
        Whether the C library took the setting; False where it is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    taken = any(mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in _THRESHOLDS)
    return taken and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
