"""The timer of the benchmark, of export.py --bench, and of the experiments.

The speed of a machine drifts by more than models differ, so models that are compared take turns: each call of one is
next to a call of the other, and the speed-up is the median ratio of these pairs.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch


def time_call(call: Callable, device: torch.device) -> float:
    """Seconds of one call, on a GPU until its last kernel has finished."""
    on_gpu = device.type == 'cuda'
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def time_alternately(calls: Sequence[Callable], turns: int, warm_up: int, device: torch.device) -> np.ndarray:
    """Seconds (turns, len(calls)) of calls that take turns, after `warm_up` turns that do not count."""
    keep_freed_memory()
    return np.array([[time_call(call, device) for call in calls] for _ in range(warm_up + turns)])[warm_up:]


def keep_freed_memory():
    """Let this process keep the memory that tensors on the CPU give back; for measuring time, on Linux.

    Otherwise large blocks go back to the kernel, and new pages take time in each call: by chance in those of one model
    and not in those of another, and more of it in those of the model with the larger tensors.
    """
    with suppress(OSError, AttributeError, TypeError):  # a C library other than GNU's
        library = ctypes.CDLL(None)
        library.mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
