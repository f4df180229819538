"""What holds for every network: names, sizes of images, export, compilation, and that a GPU is not waited for."""

import argparse
from contextlib import nullcontext
from itertools import product

import pytest
import timm
import torch
from conftest import images, small_vit, without_gradient
from timm.layers import SwiGLU
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import models
import networks
from models import rivals
from models.weights import InputError

FAMILIES = ('evo_deit', 'EvoLeViT', 'vit', 'eva')  # the last two are timm's, evolved


def small(family: str, **kwargs) -> nn.Module:
    """A model with few blocks, two stages of which select among several patches."""
    torch.manual_seed(0)
    if family == 'evo_deit':
        return timm.create_model('evo_deit_nano_patch4_32', img_size=16, num_classes=10, depth=6, **kwargs)
    if family == 'EvoLeViT':
        return timm.create_model('EvoLeViT_128S', img_size=64, num_classes=10, depth=(3, 2, 1), **kwargs)
    representative = kwargs.pop('representative')
    name, size = {'vit': ('vit_tiny_patch16_224', 80), 'eva': ('eva02_tiny_patch14_224', 70)}[family]
    model = timm.create_model(name, img_size=size, num_classes=10, depth=4, **kwargs)
    return models.evolve(model, representative=representative)


# Layer-wise as trained, stage-wise as deployed, and evolved without training.
WAYS = [*product(FAMILIES[:2], ('layer-wise', 'fused', 'nearest')), *product(FAMILIES[2:], ('layer-wise', 'nearest'))]


@pytest.fixture(params=WAYS, ids='-'.join)
def inference_model(request) -> nn.Module:
    family, way = request.param
    model = small(family, representative={'layer-wise': 'one', 'fused': 'none', 'nearest': 'nearest'}[way]).eval()
    model.set_schedule(stage_wise=way != 'layer-wise')
    return model.fuse() if way == 'fused' else model


def test_export_with_a_batch_of_any_size(inference_model):
    batch = torch.export.Dim('batch')
    program = torch.export.export(inference_model, (images(inference_model, 2),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 3):
        x = images(inference_model, size)
        with torch.no_grad():
            torch.testing.assert_close(program(x), inference_model(x), rtol=0, atol=1e-6)


def test_onnx_with_a_batch_of_any_size(inference_model):
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    batch = torch.export.Dim('batch')
    program = torch.onnx.export(
        inference_model, (images(inference_model, 2),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    for size in (1, 3):
        x = images(inference_model, size)
        with torch.no_grad():
            torch.testing.assert_close(program(x)[0], inference_model(x), rtol=0, atol=1e-5)


def test_inference_compiles_to_one_graph(inference_model):
    x = images(inference_model, 2)
    torch.compiler.reset()  # code belongs to a class: each of the models compiles it anew
    compiled = torch.compile(inference_model, fullgraph=True, backend='eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), inference_model(x))


def train_on(network: nn.Module, model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a model in training and the gradients of its parameters; `network` is how it is called."""
    model.zero_grad()
    out = network(x)
    heads = out if isinstance(out, tuple) else [out]
    sum(head.square().mean() for head in heads).backward()
    assert without_gradient(model) == []
    return list(heads), [p.grad for p in model.parameters()]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('representative', ['one', 'nearest'])
def test_training_compiles_to_one_graph(family, representative):
    model = small(family, representative=representative).train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    x = images(model, 4)
    torch.testing.assert_close(train_on(compiled, model, x), train_on(model, model, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('representative', ['one', 'nearest'])
def test_checkpointing_runs_blocks_again(family, representative):
    check_checkpointing(small(family, representative=representative))


@pytest.mark.parametrize('method', rivals.METHODS)
def test_checkpointing_runs_blocks_of_rivals_again(method):
    check_checkpointing(rivals.apply(small_vit(), method))


def check_checkpointing(model: nn.Module):
    """With gradient checkpointing each MLP runs twice a step, less is kept, and the gradients are the same."""
    x, runs, kept, results = images(model.train(), 4), [], [], []
    layers = [module for module in model.modules() if 'Mlp' in type(module).__name__ or type(module) is SwiGLU]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))  # running again ends before the last layer does
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        runs.clear()
        torch.manual_seed(0)  # of a selection at random
        sizes = {}

        def pack(tensor: Tensor, sizes: dict = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(train_on(model, model, x))
        kept.append(sum(sizes.values()))
        assert len(runs) == len(layers) * (1 + checkpointing) > 0
    assert kept[1] < 0.8 * kept[0], kept
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('stage_wise', [True, False])
@pytest.mark.parametrize('family', FAMILIES)
def test_intermediates_are_the_tokens_on_the_way(family, stage_wise):
    model = small(family, representative='one').eval()
    model.set_schedule(stage_wise)
    x, prefix = images(model), model.num_prefix_tokens
    with torch.no_grad():
        features, grids = model.forward_intermediates(x)
        tokens = [grid.flatten(2).mT for grid in grids]
        assert [grid.shape[2:] for grid in grids] == [grid for _, grid in model.feature_levels(x)]
        torch.testing.assert_close(features, model.forward_features(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.norm_tokens(tokens[-1]), features[:, prefix:], rtol=1e-4, atol=1e-5)
        form = dict(output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True)
        early = model.forward_intermediates(x, [0, 1], stop_early=True, **form)
        for (patches, before), expected in zip(early, tokens, strict=False):
            torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-5)
            assert before.shape == (2, prefix, patches.shape[2])
        out = model.forward_intermediates(x, 2, output_dict=True, norm=True)
        assert set(out) == {'image_features', 'image_intermediates'} and len(out['image_intermediates']) == 2
        found = out['image_intermediates'][1].flatten(2).mT
        torch.testing.assert_close(found, model.norm(tokens[-1]), rtol=1e-4, atol=1e-5)
    for wrong, message in (({'output_fmt': 'NHWC'}, 'NCHW or NLC'), ({'attn_mask': x}, 'attn_mask: expected none')):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(x, **wrong)
    with pytest.raises(ValueError, match='stop_early: expected out_indices'):
        model.forward_blocks(x, stop_early=True)


class OnGPU(TorchDispatchMode):
    """Asserts that all tensors are on a GPU: a copy from or to the CPU would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs, out)):
            assert not isinstance(tensor, Tensor) or tensor.is_cuda, f'{func} on {tensor.device}'
        return out


def forward_on_fake_gpu(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype):
    """One forward pass on tensors without data, on a GPU that need not exist.

    What has to read a number back, such as `.item()` or indices of unknown number, raises.
    """

    def empty(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=dtype if like.is_floating_point() else like.dtype, device='cuda')

    tensors = [*model.named_parameters(), *model.named_buffers()]
    with FakeTensorMode():
        state, x = {key: empty(value) for key, value in tensors}, torch.empty(shape, dtype=dtype, device='cuda')
        with OnGPU():
            return functional_call(model, state, (x,))


@pytest.mark.parametrize('representative', ['none', 'one', 'nearest'])
@pytest.mark.parametrize('stage_wise', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_forward_does_not_wait_for_a_gpu(family, training, stage_wise, representative):
    model = small(family, representative=representative, drop_path_rate=0.1).train(training)
    model.set_schedule(stage_wise)
    for dtype in (torch.float32, torch.bfloat16):
        out = forward_on_fake_gpu(model, (4, *images(model, 1).shape[1:]), dtype)
        assert all(head.is_cuda and head.shape == (4, 10) for head in (out if isinstance(out, tuple) else [out]))


@pytest.mark.parametrize(
    'wrong, first',
    [
        ('evo_deit_smal', 'evo_deit_small_patch16_224'),
        ('evodeit_tiny_patch16_224', 'evo_deit_tiny_patch16_224'),
        ('EvoLeViT_128s', 'EvoLeViT_128S'),
        ('evolevit256', 'EvoLeViT_256'),
        ('vit_small_patch16_225', 'vit_small_patch16_224'),
        ('resnet5', 'resnet50'),
    ],
)
def test_nearest_names(wrong, first):
    near = networks.nearest_names(wrong).removeprefix('Nearest: ').split(', ')
    assert near[0] == first and len(near) == 5
    assert not wrong.startswith('evo_') or all(name.startswith(('evo_deit', 'EvoLeViT')) for name in near)


@pytest.mark.parametrize(
    'name, size, message',
    [
        ('evo_deit_tiny_patch16_224', 208, None),
        ('deit_tiny_patch16_224', 192, None),
        ('resnet18', 201, None),
        ('evo_deit_tiny_patch16_224', 200, 'expected a multiple of 16.*found 200: 8 pixels.*Nearest: 192 and 208'),
        ('deit_tiny_patch16_224', 200, 'expected a multiple of 16.*found 200: 8 pixels.*Nearest: 192 and 208'),
        ('vit_tiny_patch16_224', 10, 'found 10: 10 pixels.*Nearest: 16$'),
        ('swin_tiny_patch4_window7_224', 225, 'expected a multiple of 4.*Nearest: 224 and 228'),
        ('convnext_atto', 65, 'expected a multiple of 4.*Nearest: 64 and 68'),
        ('EvoLeViT_128S', 200, 'expected multiples of 16, found .200, 200.'),
    ],
)
def test_sizes_that_a_model_would_cut_are_refused(name, size, message):
    with torch.device('meta'), pytest.raises(InputError, match=message) if message else nullcontext():
        assert networks.create(name, 10, size).num_classes == 10


def test_a_model_that_pads_takes_any_size():
    model = timm.create_model('vit_tiny_patch16_224', depth=1, dynamic_img_size=True, dynamic_img_pad=True)
    networks.check_input_size(model, 'vit_tiny_patch16_224', 200)
    with pytest.raises(InputError, match='found 200'):
        networks.check_input_size(timm.create_model('vit_tiny_patch16_224', depth=1), 'vit_tiny_patch16_224', 200)


def test_flags_evolve_a_vit_of_timm():
    parser = argparse.ArgumentParser()
    networks.add_arguments(parser)
    flags = '--model vit_tiny_patch16_224 --evolve --keep-ratio 0.8 0.4 --stages 3 9 --representative one'.split()
    model = networks.build(parser.parse_args(flags), 10, 64)
    assert model.schedule() == dict(
        stage_wise=True, evolving=True, stages=[3, 9], keep_ratio=[0.8, 0.4], representative='one'
    )
    model = networks.build(parser.parse_args(flags[:3]), 10, 64)
    assert model.schedule() == dict(
        stage_wise=True, evolving=True, stages=[4, 8], keep_ratio=[0.7, 0.3], representative='nearest'
    )
    ours = '--model evo_deit_nano_patch4_32 --representative nearest --stages 6'.split()
    model = networks.build(parser.parse_args(ours), 10, 32)
    assert (model.representative, model.first_blocks, model.keep_ratio) == ('nearest', (6,), (0.5,))
    for flag, name in ((['--representative'], 'one'), (['--no-representative'], 'none'), ([], 'none')):
        assert networks.build(parser.parse_args([*ours[:2], *flag]), 10, 32).representative == name
    for wrong, message in (
        (['--model', 'resnet18', '--evolve'], '--method evolve: ResNet cannot be evolved'),
        ([*flags, '--stages', '9', '3'], '--method evolve: stages: expected ascending'),
        (
            ['--model', 'resnet18', '--keep-ratio', '0.5'],
            '--keep-ratio: expected a model that evolves, found resnet18; add --evolve',
        ),
    ):
        with pytest.raises(InputError, match=message):
            networks.build(parser.parse_args(wrong), 10, 64)
