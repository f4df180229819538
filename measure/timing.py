"""The timer of the benchmark, of export.py --bench, and of the experiments; and their progress bar.

The speed of a machine drifts by more than the models differ, so models that are compared take turns. Each call of one
has a neighboring call of the other, and the speed-up is the median ratio of these pairs.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

# For loops that may take longer than ten seconds. On a terminal only; it clears itself, so printed tables stay whole.
progress = partial(tqdm, leave=False, delay=10, disable=None)


def time_call(call: Callable, device: torch.device) -> float:
    """Seconds that a call takes, on a GPU until its last kernel has finished."""
    on_gpu = device.type == 'cuda'
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def time_alternately(calls: Sequence[Callable], turns: int, warm_up: int, device: torch.device) -> np.ndarray:
    """Seconds (turns, len(calls)) of calls that take turns, after `warm_up` untimed turns."""
    keep_freed_memory()
    rounds = progress(range(warm_up + turns), 'timing')
    return np.array([[time_call(call, device) for call in calls] for _ in rounds])[warm_up:]


def keep_freed_memory():
    """Make malloc keep the memory of freed CPU tensors (Linux with glibc).

    Otherwise large blocks return to the kernel, and every call pays for page faults again. That slows models with large
    tensors most, and others not at all.
    """
    with suppress(OSError, AttributeError, TypeError):  # a C library other than GNU's
        library = ctypes.CDLL(None)
        library.mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
