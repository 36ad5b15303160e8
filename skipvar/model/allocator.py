"""glibc's allocator, told to keep large blocks that are freed. No torch.

Otherwise every tensor above 128 KB is mapped anew, and the kernel hands it out page by page, filled with zeros: half of
the time of the decoder on a CPU. One arena for all threads, since those of other threads than the first end at 64 MB.
"""

import contextlib
import ctypes
import gc
import sys

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_ARENA_MAX": "1",
}
"""For a process that is to be started; elsewhere than on glibc it does nothing."""


def keep_freed_memory() -> None:
    """The same for this process, from now on. For programs: it changes the whole process."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX


def give_back() -> None:
    """Free what nobody refers to any more, and on a GPU let others have it: another engine is about to be planned."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
