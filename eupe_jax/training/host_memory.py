"""How the C library hands out memory, for steps that run on the processor itself."""

import ctypes
import platform

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets malloc keep what is freed, for all later allocations of this process; False where the library cannot.

    A step's temporaries are one block of hundreds of megabytes, or of gigabytes. By default it is mapped for every step
    and given back after it, and the system clears each of its pages anew: a tenth of a ViT-T step. Call it before the
    first computation, since threads that run already have their own pools. Not for hosts of accelerators, where the
    threads that decode images would wait for each other in the one pool.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # -1: never give back. The largest number that fits would be 2 GiB, which ViT-S has more than at 16 images.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    return all([mallopt(name, value) for name, value in settings.items()])
