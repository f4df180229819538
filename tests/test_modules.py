"""Evolved blocks are modules: what people put around a ViT works as on timm's."""

import copy
import sys
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import images, small_vit
from timm.models import Eva
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import models
from models import evolution, rivals

# VisionTransformer, Eva with biases beside its projections, Eva with rotations and registers.
NAMES = ['deit_tiny_patch16_224', 'eva02_tiny_patch14_224', 'vit_small_patch16_dinov3']
CASES = [(NAMES[0], representative) for representative in evolution.REPRESENTATIVES]
KEPT = (25, 17, 17, 7)  # of 25 patches, before each of four blocks


@pytest.fixture(params=NAMES)
def dense(request) -> nn.Module:
    return small_vit(request.param, depth=4)


def evolve(model: nn.Module, keep_ratio=(0.7, 0.3), **kwargs) -> nn.Module:
    return models.evolve(copy.deepcopy(model), keep_ratio, stages=(1, 3), **kwargs)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


# --- hooks


def test_hooks_run_once_and_see_the_tokens_of_their_block(dense):
    model, seen = evolve(dense), {}
    for name, module in model.blocks.named_modules():
        if name:
            module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(args))
    with torch.no_grad():
        model(images(model))
    called = {name for name in seen if not name.endswith(('drop', 'q_norm', 'k_norm'))}
    for i, kept in enumerate(KEPT):
        assert called >= {f'{i}{x}' for x in ('', '.attn', '.attn.proj', '.norm1', '.norm2', '.mlp', '.mlp.fc2')}
        for name in called:
            if name.startswith(f'{i}.') and name.count('.') == 1:
                assert len(seen[name]) == 1 and seen[name][0][0].shape[1] == model.num_prefix_tokens + kept, name
    assert all(f'{i}.attn.{"qkv" if model.blocks[0].attn.qkv is not None else "q_proj"}' in called for i in range(4))


def test_a_block_called_with_tokens_alone_is_timms(dense):
    model = evolve(dense)
    x = torch.randn(2, 9, model.embed_dim)
    mask = torch.randn(9, 9)
    for fused in (True, False):
        for ours, timms in zip(model.blocks, dense.blocks, strict=True):
            ours.attn.fused_attn = timms.attn.fused_attn = fused
            torch.testing.assert_close(ours(x), timms(x))
            torch.testing.assert_close(ours(x, attn_mask=mask), timms(x, attn_mask=mask))
            torch.testing.assert_close(ours(x, is_causal=True), timms(x, is_causal=True))
            torch.testing.assert_close(ours.attn(x), timms.attn(x))
        rope = torch.randn(9 - model.num_prefix_tokens, 2 * model.blocks[0].attn.head_dim)
        if isinstance(model, Eva):
            torch.testing.assert_close(model.blocks[1](x, rope), dense.blocks[1](x, rope))


@pytest.mark.parametrize('fused', [True, False])
def test_attention_maps_are_extracted(dense, fused):
    """A fused kernel makes no map, so a hook on the dropout behind the map takes the explicit path."""
    model = evolve(dense)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        for block in model.blocks:
            block.attn.fused_attn = fused
        maps = AttentionExtract(model, method='hook')(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(maps) == 4
    for found, kept in zip(maps.values(), KEPT, strict=True):
        assert found.shape[-2:] == 2 * (model.num_prefix_tokens + kept,)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


def test_tracing_by_fx_is_refused_not_wrong(dense):
    with pytest.raises((torch.fx.proxy.TraceError, TypeError, RuntimeError, ValueError)) as error:
        AttentionExtract(evolve(dense), method='fx')
    assert 'models' in {frame.path.parent.name for frame in error.traceback}  # our code, not the import of a module


@pytest.mark.parametrize('method', rivals.METHODS)
def test_rivals_call_blocks_as_modules(method):
    model = rivals.apply(small_vit('deit_tiny_patch16_224', depth=4), method)
    seen = []
    for name, module in model.blocks.named_modules():
        if name.count('.') == 1 and not name.endswith(('path1', 'path2', 'ls1', 'ls2')) or name.isdigit():
            module.register_forward_hook(lambda m, args, out, name=name: seen.append(name))
    with torch.no_grad():
        model(images(model))
    assert sorted(seen) == sorted(f'{i}{x}' for i in range(4) for x in ('', '.attn', '.mlp', '.norm1', '.norm2'))


# --- what replaces layers


class LoRA(nn.Module):
    """A low-rank update of a linear layer, as PEFT puts it in its place."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base_layer = linear
        self.a, self.b = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def add_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for block in model.blocks:
        for name in ('qkv', 'q_proj'):
            if getattr(block.attn, name, None) is not None:
                setattr(block.attn, name, LoRA(getattr(block.attn, name)))
    return model


def test_layers_in_place_of_projections_are_called(dense):
    x = images(dense)
    with torch.no_grad():
        before, after = dense(x), add_lora(evolve(dense, 1))(x)
        assert (after - before).abs().max() > 1e-4
        if getattr(dense.blocks[0].attn, 'q_bias', None) is None:  # else timm itself reads the weight alone
            torch.testing.assert_close(after, add_lora(copy.deepcopy(dense))(x))
    model = add_lora(evolve(dense))
    loss(model, x).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if '.a.' in n or '.b.' in n)


def test_dynamic_quantization_runs(dense):
    with warnings.catch_warnings(action='ignore'):  # torch: it moves to torchao
        model = torch.ao.quantization.quantize_dynamic(evolve(dense), {nn.Linear}, dtype=torch.qint8)
    x = images(model)
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(model(x), evolve(dense)(x)).min() > 0.8


def test_offloading_by_accelerate(dense):
    accelerate = pytest.importorskip('accelerate')
    model = evolve(dense)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(accelerate.cpu_offload(model, execution_device=torch.device('cpu'))(x), expected)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_around_each_block(dense, one_process):
    x, expected = images(dense), dense(images(dense))
    mesh = dist.device_mesh.init_device_mesh('cpu', (1,))
    for ratio in (1, (0.7, 0.3)):
        model = evolve(dense, ratio)
        expected = expected if ratio == 1 else model(x)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = model(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


# --- derivatives, devices, batches


@pytest.mark.parametrize('representative', evolution.REPRESENTATIVES)
def test_gradients_of_each_image_by_vmap(representative):
    model = evolve(small_vit('deit_tiny_patch16_224', depth=4), representative=representative)
    x = images(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        for name, expected in torch.func.grad(one)(parameters, image).items():
            torch.testing.assert_close(found[name][i], expected, rtol=1e-3, atol=1e-4)


def test_double_backward(dense):
    model = evolve(dense)
    for block in model.blocks:
        block.attn.fused_attn = False
    x = images(model).requires_grad_()
    (grad,) = torch.autograd.grad(loss(model, x), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize('representative', evolution.REPRESENTATIVES)
def test_meta_device_and_empty_batches(dense, representative):
    model = evolve(dense, representative=representative)
    x = images(model)
    with torch.no_grad():
        if 'dinov3' not in model.default_cfg['architecture']:  # timm's own embedding fails there
            tokens, grids = model.forward_intermediates(x[:0], [1, 3])
            assert model(x[:0]).shape == (0, 10) and tokens.shape[0] == 0
            assert [tuple(grid.shape[2:]) for grid in grids] == 2 * [(5, 5)]
        assert model.to('meta')(x.to('meta')).shape == (2, 10)


@pytest.mark.parametrize('training', [False, True])
def test_all_operators_are_deterministic_on_gpus(dense, training):
    """And none sorts, also in the gradient. A CPU raises no error for such operators, so they are listed."""
    model = evolve(dense).train(training)
    with torch.set_grad_enabled(training), torch.profiler.profile() as profiler:
        output = model(images(model))
        if training:
            output.square().sum().backward()
    called = {event.key for event in profiler.key_averages()}
    assert 'aten::topk' in called and ('aten::native_layer_norm_backward' in called) == training
    wrong = 'sort', 'index_add', 'scatter_add', 'index_put', 'embedding_dense_backward'  # the last sorts on a GPU
    assert not [name for name in called if any(word in name for word in wrong)]


def test_a_mask_that_a_row_cannot_take_is_refused(dense):
    block, x = evolve(dense).blocks[0], torch.randn(2, 9, dense.embed_dim)
    whole = torch.zeros(9, 9)
    for mask in (dict(is_causal=True), dict(attn_mask=whole.bool()), dict(attn_mask=whole)):
        with pytest.raises(ValueError, match='need_attention: expected no mask, or an additive one'):
            block(x, need_attention=True, **mask)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_residual_stream(dtype):
    """It stays float32 and finite, and prefix tokens enter a stage unchanged."""
    tokens = 1e4 * torch.randn(2, 26, 8)  # sums are beyond float16
    tokens[0, [0, 3]] = 1e5
    score = torch.rand(2, 25)

    def block(x, **_):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x[:, 0], tokens[:, 0])
        return x

    with torch.autocast('cpu', dtype):
        out, _, selection = evolution.update_group(tokens, score, [block], [None], 0.5, 'nearest')
        assert out.dtype == torch.float32 and torch.equal(out, tokens)
        out, _, _ = evolution.update_group(tokens, score, [block], [None], 0.3, 'nearest', selection)
    assert torch.equal(out, tokens)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_a_model_in_half_precision(dtype):
    tokens, score = (1000 * torch.randn(2, 101, 64)).to(dtype), torch.rand(2, 100)  # sums of lengths are beyond float16

    def two_stages():
        block = [lambda x, **_: x + 1]
        out, _, selection = evolution.update_group(tokens, score, block, [None], 0.5, 'nearest')
        return evolution.update_group(out, score, block, [None], 0.02, 'nearest', selection)[0]

    expected = two_stages()
    with torch.autocast('cpu', dtype):
        found = two_stages()
    assert expected.isfinite().all() and torch.equal(found, expected)


def test_autocast_does_not_round_the_sum_of_scores():
    tokens, score, attention = torch.randn(2, 26, 8), torch.rand(2, 25), torch.rand(2, 12)
    _, _, selection = evolution.update_group(tokens, score, [], [], 0.5, 'nearest')

    def block(x, **_):
        return x, attention

    group = tokens, score, [block], [0.5], 0.5, 'nearest', selection, False
    _, expected, _ = evolution.update_group(*group)
    with torch.autocast('cpu', torch.bfloat16):
        _, found, _ = evolution.update_group(*group)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_a_model_that_was_offloaded_before_is_refused(dense):
    accelerate = pytest.importorskip('accelerate')
    model = accelerate.cpu_offload(copy.deepcopy(dense), execution_device=torch.device('cpu'))
    with pytest.raises(ValueError, match='was replaced and would hide the evolved one: evolve first'):
        models.evolve(model, stages=(1, 3))


# --- programs


def program_of(model: nn.Module, x: Tensor, **sizes) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    return torch.export.export(model, (x,), dynamic_shapes=({0: auto} | dict.fromkeys(sizes.get('free', ()), auto),))


def test_a_program_of_dinov3_is_bound_to_its_size():
    """As timm's is: its rotations are made for one grid. Another size is an error, not a wrong result."""
    model = small_vit('vit_small_patch16_dinov3', depth=4, dynamic_img_size=True)
    for either in (model, evolve(model)):
        program = program_of(either, torch.randn(2, 3, 80, 80), free=(2, 3)).module()
        with pytest.raises(AssertionError, match='Guard failed'):
            program(torch.randn(2, 3, 64, 112))


@pytest.mark.parametrize('name', NAMES[:2])
@pytest.mark.parametrize('representative', evolution.REPRESENTATIVES)
def test_a_program_for_free_sizes(name, representative):
    """K is computed from the image, so the program is right at sizes that it was not exported with, also of batches."""
    model = evolve(small_vit(name, depth=4, dynamic_img_size=True), representative=representative)
    patch = model.patch_embed.patch_size[0]
    program = program_of(model, torch.randn(2, 3, 5 * patch, 5 * patch), free=(2, 3)).module()
    for batch, rows, columns in ((3, 5, 5), (1, 4, 7), (3, 8, 6), (1, 12, 12), (1, 2, model.embed_dim * 2 + 9)):
        x = torch.randn(batch, 3, rows * patch, columns * patch)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


def run_onnx(path, x: Tensor) -> Tensor:
    session = pytest.importorskip('onnxruntime').InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.skipif(torch.__version__ < '2.14', reason='older torch resizes positions otherwise, in dense models too')
@pytest.mark.parametrize('name, representative', CASES + [(NAMES[1], 'nearest')])
def test_onnx_for_free_sizes(name, representative, tmp_path):
    pytest.importorskip('onnxscript')
    model = evolve(small_vit(name, depth=4, dynamic_img_size=True), representative=representative)
    patch = model.patch_embed.patch_size[0]
    program = program_of(model, torch.randn(2, 3, 5 * patch, 5 * patch), free=(2, 3))
    torch.onnx.export(program, (), tmp_path / 'm.onnx', dynamo=True, verbose=False)
    for rows, columns in ((5, 5), (4, 7), (8, 6)):
        x = torch.randn(3, 3, rows * patch, columns * patch)
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(tmp_path / 'm.onnx', x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    'name, representative, shape',
    [(*case, {}) for case in [*CASES, (NAMES[2], 'one'), (NAMES[2], 'nearest')]]
    + [(NAMES[0], 'nearest', dict(embed_dim=24, num_heads=3, img_size=192))],  # a large grid for so few channels
)
def test_the_older_onnx_exporter(name, representative, shape, tmp_path):
    pytest.importorskip('onnx')
    model = evolve(small_vit(name, depth=4, **shape), representative=representative)
    for block in model.blocks:
        block.attn.fused_attn = False
    x, axes = images(model), {'images': {0: 'batch'}}
    with warnings.catch_warnings(action='ignore'):  # it is deprecated, and traces Python numbers
        torch.onnx.export(model, (x,), tmp_path / 'm.onnx', dynamo=False, input_names=['images'], dynamic_axes=axes)
    x = torch.cat([x, images(model) + 0.1])
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(tmp_path / 'm.onnx', x), model(x), rtol=1e-3, atol=1e-3)


# --- wrong calls


def test_wrong_calls_say_what_to_do():
    with pytest.raises(ValueError, match=r"pass timm.create_model\('deit_tiny_patch16_224'"):
        models.evolve('deit_tiny_patch16_224')
    with pytest.raises(ValueError, match=r"pass transformers.AutoModel.from_pretrained\('facebook/dinov2-small'"):
        models.evolve('facebook/dinov2-small')
    model = small_vit('deit_tiny_patch16_224', depth=4)
    with pytest.raises(ValueError, match="keep_ratio: expected numbers, found '0.7'"):
        models.evolve(model, keep_ratio='0.7')
    with pytest.warns(UserWarning, match=r'keep_ratio rises, \(0.3, 0.7\)'):
        models.evolve(model, keep_ratio=(0.3, 0.7))


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    """There are no models of transformers without it; a class that says it is one stands for them."""
    monkeypatch.setitem(sys.modules, 'models.transformers_vit', None)  # its import fails
    monkeypatch.delattr(models, 'transformers_vit', raising=False)
    model = type('ViTModel', (nn.Module,), {'__module__': 'transformers.models.vit.modeling_vit'})()
    with pytest.raises(ValueError, match="ViTModel cannot be evolved .*pip install 'transformers>="):
        models.evolve(model)


def test_timm_is_not_changed():
    model = timm.create_model('deit_tiny_patch16_224')
    assert type(models.evolve(copy.deepcopy(model)).blocks[0]) is not type(model.blocks[0])
    assert type(timm.create_model('deit_tiny_patch16_224').blocks[0]) is type(model.blocks[0])
