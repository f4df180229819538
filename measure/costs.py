"""What a call costs: FLOPs and peak memory."""

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

# Names of operators that multiply matrices, such as addmm, _conv_depthwise2d, mkldnn_linear_backward.
MATRIX_PRODUCT = re.compile(
    '(^|_)([a-z]*mm|matmul|linear|conv|conv[123]d|convolution|attention|attn|einsum|(add)?mv|v?dot|bilinear|rnn)(_|$)'
)


class RefuseUncounted(TorchDispatchMode):
    """InputError for a product of matrices without a formula, which would count as nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = func.overloadpacket
        if operator not in flop_registry and MATRIX_PRODUCT.search(operator.__name__):
            raise InputError(f'torch {torch.__version__}: {operator} has no formula, its arithmetic cannot be counted')
        return func(*args, **(kwargs or {}))


def count_gmacs(call: Callable, inputs: Sequence[Tensor]) -> float:
    """Multiply-accumulates in `call(*inputs)`, in 10^9 an image, of matrix products, convolutions and attentions.

    `inputs` are tensors (B, ...), images first. Attention counts as its products, whichever fused kernel will compute
    them: not all of these have a formula, and in the backward pass they compute one product again.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), RefuseUncounted(), counter:
        call(*inputs)
    return counter.get_total_flops() / 2e9 / len(inputs[0])


def peak_memory(call: Callable, inputs: Sequence[Tensor], kept: list, calls: int, device: torch.device) -> int:
    """The most memory, in bytes, that is in use in `calls` calls (and on a CPU one more) of `call(*inputs)`.

    `kept` holds the tensors that stay from call to call, such as weights and the state of an optimizer, in any nesting.
    """
    if device.type == 'cuda':  # from the first call on: a CUDA graph allocates when it is captured and never again
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
