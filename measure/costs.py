"""Cost of a call: FLOPs and peak memory."""

import gc
import re
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from utils import InputError

# Operators that multiply matrices, such as addmm, _conv_depthwise2d, mkldnn_linear_backward.
MATRIX_PRODUCT = re.compile(
    '(^|_)([a-z]*mm|matmul|linear|conv|conv[123]d|convolution|attention|attn|einsum|(add)?mv|v?dot|bilinear|rnn)(_|$)'
)


class RefuseUncounted(TorchDispatchMode):
    """Raises InputError for a matrix product without a FLOP formula, which torch would count as zero."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = func.overloadpacket
        if operator not in flop_registry and MATRIX_PRODUCT.search(operator.__name__):
            raise InputError(f'torch {torch.__version__}: {operator} has no formula, so its FLOPs cannot be counted')
        return func(*args, **(kwargs or {}))


def count_gmacs(call: Callable, inputs: Sequence[Tensor]) -> float:
    """GMACs (10^9 multiply-accumulates) per image of the matrix products and convolutions in `call(*inputs)`.

    `inputs` are tensors (B, ...), images first. Raises InputError for an operator that cannot be counted.
    """
    # Attention runs unfused: some fused kernels have no formula, and their backward pass recomputes a product.
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), RefuseUncounted(), counter:
        call(*inputs)
    return counter.get_total_flops() / 2e9 / len(inputs[0])


def peak_memory(call: Callable, inputs: Sequence[Tensor], kept: list, calls: int, device: torch.device) -> int:
    """Peak memory, in bytes, over `calls` calls of `call(*inputs)`; on a CPU, of one more call after these.

    `kept` holds the tensors that outlive a call, such as weights and optimizer state, in any nesting.
    """
    if device.type == 'cuda':  # from the first call on, because a CUDA graph allocates only when it is captured
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(calls):
        call(*inputs)
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(profile_memory=True) as profiler:
            call(*inputs)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
        peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return peak + sum(leaf.nbytes for leaf in tree_leaves([inputs, kept]) if torch.is_tensor(leaf))
