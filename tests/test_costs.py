"""measure/costs.py: FLOPs are those of the original models and of closed forms, memory is the peak."""

import copy
from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
import networks
from measure.costs import count_gmacs, peak_memory
from utils import InputError

CPU = torch.device('cpu')
KEPT = 0.7, 0.3

# GMACs of the original models, and of their dense baselines.
GMACS = {
    'evo_deit_tiny_patch16_224': (0.818, 1.254),
    'evo_deit_small_patch16_224': (3.033, 4.599),
    'evo_deit_base_patch16_224': (11.658, 17.564),
    'evo_deit_base_patch16_384': (36.112, 55.484),
    'EvoLeViT_128S': (0.256, 0.305),
    'EvoLeViT_128': (0.305, 0.405),
    'EvoLeViT_192': (0.510, 0.657),
    'EvoLeViT_256': (0.880, 1.127),
    'EvoLeViT_384': (1.849, 2.352),
    'EvoLeViT_256_384': (2.763,),
    'EvoLeViT_384_384': (5.622,),
}


@cache
def count(name: str, size: int = 224, representative: str | None = None) -> float:
    """GMACs of a model in inference, evolved if there is a representative.

    DeiT without numbers: the same operators are called, nothing is computed, so that a batch costs nothing.
    """
    fake = 'deit' in name
    with torch.device('meta') if fake else nullcontext():
        model = networks.create(name, 1000, size)
    if representative:
        models.evolve(model, KEPT, representative=representative)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), torch.inference_mode():
        model = model.to_empty(device=CPU) if fake else model
        return count_gmacs(model.eval(), [torch.randn(2 if fake else 1, 3, size, size)])


@pytest.mark.parametrize('name', GMACS)
def test_flops_are_those_of_the_original_models(name):
    size = timm.get_pretrained_cfg(name).input_size[-1]
    for model, expected in zip((name, networks.dense_baseline(name)[0]), GMACS[name], strict=False):
        assert count(model, size) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize('evolving', [False, True])
def test_flops_are_the_closed_form(evolving):
    """Of DeiT-Ti at 224 px."""
    dim = 192

    def block(tokens: int) -> int:
        qkv, projection, mlp = 3 * tokens * dim**2, tokens * dim**2, 2 * 4 * tokens * dim**2
        return qkv + 2 * tokens**2 * dim + projection + mlp

    patch_embed, head = 196 * (3 * 16**2) * dim, dim * 1000
    # Blocks 4 to 11 see the class token and half of the 196 patches.
    blocks = 4 * block(197) + 8 * block(99) if evolving else 12 * block(197)
    # The class token's row of the attention, which selects: of block 3, and of 4 to 7.
    rows = (197 + 4 * 99) * dim if evolving else 0
    name = 'evo_deit_tiny_patch16_224' if evolving else 'deit_tiny_patch16_224'
    assert count(name) == pytest.approx((patch_embed + blocks + rows + head) / 1e9, rel=1e-12)


def test_nearest_costs_its_similarities():
    """As much as without a representative, and in each stage three products: all with each other, the means of clusters
    and the lengths of these; all patches in the first, the clusters of the first in the second.
    """
    none, nearest = (count('deit_tiny_patch16_224', representative=name) for name in ('none', 'nearest'))
    assert 0.80 < none < nearest < 0.86
    sizes = 196, *(int(196 * ratio) for ratio in KEPT)
    # The class token is a cluster of its own.
    products = sum(n * n * 192 + (1 + k) * (1 + n) * (192 + 1) for n, k in pairwise(sizes))
    assert nearest - none == pytest.approx(products / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    'attend', [nn.functional.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT).softmax(-1) @ v]
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_attention_is_counted_fused_and_not(attend, dtype):
    q, k, v = torch.randn(3, 5, 2, 7, 4, dtype=dtype, requires_grad=True)
    product = 2 * 7 * 7 * 4 / 1e9
    assert count_gmacs(attend, (q, k, v)) == pytest.approx(2 * product)
    # Each product has two in its gradient.
    trained = count_gmacs(lambda *qkv: attend(*qkv).sum().backward(), (q, k, v))
    assert trained == pytest.approx(6 * product)
    bias = torch.randn(5, 1, 1, 7, dtype=dtype)
    with torch.inference_mode():
        fused = count_gmacs(lambda *qkv: nn.functional.scaled_dot_product_attention(*qkv, bias), (q, k, v))
    assert fused == pytest.approx(2 * product)


@pytest.mark.parametrize('name', ['fused_linear', 'my_attention_backward', 'addmm_relu', '_conv2d_packed'])
def test_a_product_that_cannot_be_counted_is_an_error(name):
    with torch.library._scoped_library('evo_vit_test', 'FRAGMENT') as library:
        library.define(f'{name}(Tensor x) -> Tensor')
        library.impl(name, torch.clone, 'CompositeExplicitAutograd')
        with pytest.raises(InputError, match=f'evo_vit_test.{name} has no formula'):
            count_gmacs(getattr(torch.ops.evo_vit_test, name), [torch.randn(2)])


def test_what_is_no_product_counts_nothing():
    def call(x):
        x = nn.functional.interpolate(x, scale_factor=2, mode='bilinear').softmax(-1)
        return torch.linalg.vector_norm(x.sum().lgamma())

    assert count_gmacs(call, [torch.randn(2, 3, 4, 4)]) == 0


def test_memory_is_the_peak():
    def step(images, targets):
        first = torch.empty(2**20)
        second = torch.empty(2**20)
        del first
        third = torch.empty(2**18)
        return second, third

    grown = 2 * 4 * 2**20
    inputs = torch.zeros(2), torch.zeros(1)
    assert peak_memory(step, inputs, [], 1, CPU) == grown + 4 * (2 + 1)
    model = nn.Linear(3, 5)
    moments = {model.weight: {'exp_avg': torch.zeros(3, 5), 'step': 7}}
    assert peak_memory(step, inputs, [[*model.parameters()], moments], 1, CPU) == grown + 4 * (2 + 1 + 2 * 3 * 5 + 5)


# Both peak in the MLP of a dense block, where the scores, a float32 for each patch, come on top. A matrix (N, N) or
# (K, N) of the 900 patches of a large grid would be several times the hidden layer of an MLP.
LARGE_GRID = dict(depth=3, embed_dim=96, num_heads=3, img_size=480)


@pytest.mark.parametrize(
    'representative, shape, bound',
    [('none', dict(depth=6), 1.002), ('nearest', dict(depth=6), 1.002), ('nearest', LARGE_GRID, 1.1)],
)
def test_inference_needs_no_more_memory_than_the_dense_model(representative, shape, bound):
    dense = timm.create_model('vit_tiny_patch16_224', **shape).eval()
    evolving = models.evolve(copy.deepcopy(dense), representative=representative)
    images = torch.randn(4, 3, *dense.patch_embed.img_size)
    with torch.inference_mode():
        peaks = [peak_memory(model, [images], [*model.parameters()], 0, CPU) for model in (evolving, dense)]
    assert peaks[0] <= bound * peaks[1]
