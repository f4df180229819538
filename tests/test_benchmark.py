"""benchmark.py: what it counts, what its rows say, what it refuses. No test looks at a time."""

import csv
import json
import os
import re
import weakref
from argparse import Namespace
from contextlib import nullcontext

import pytest
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmark
import datasets
import engine
import main_deit
import models
from benchmark import Candidate
from models import evo_deit
from utils import InputError

NANO = ['--model', 'evo_deit_nano_patch4_32', '--num_warm_iter', 1, '--num_bench_iter', 2, '--device', 'cpu']
TWIN = 'vit_tiny_patch16_224 patch_size=4 embed_dim=64 num_heads=2'
CPU = torch.device('cpu')


@pytest.fixture
def bench(script, tmp_path):
    """Run the script on the CPU; returns what it printed and the rows that it wrote."""

    def run(*flags) -> tuple[str, list[dict]]:
        file = tmp_path / 'results.jsonl'
        file.unlink(missing_ok=True)
        printed = script('benchmark', *NANO, '--results_file', file, *flags)
        return printed, [json.loads(line) for line in file.read_text().splitlines()]

    return run


def build(name: str, size: int, own: dict) -> nn.Module:
    return benchmark.build(Namespace(input_size=size, drop=0.0, drop_path=None), 1000, name, own).eval()


# --- arithmetic and twins

# GMACs of the models as published, and of their dense twins.
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


@pytest.mark.parametrize('name', GMACS)
def test_arithmetic_is_that_of_the_published_models(name):
    size = timm.get_pretrained_cfg(name).input_size[-1]
    # The large ones without numbers: the same operators are called, nothing is computed.
    large = 'base' in name
    for (maker, own), expected in zip(((name, {}), models.dense_twin(name)), GMACS[name], strict=False):
        with torch.device('meta') if large else nullcontext():
            model = build(maker, size, own)
        with FakeTensorMode(allow_non_fake_inputs=True) if large else nullcontext(), torch.inference_mode():
            model = model.to_empty(device=CPU) if large else model
            batch = torch.randn(1, 3, size, size), torch.empty(1)
            counted = benchmark.count_gmacs(lambda images, _, model=model: model(images), batch)
        assert counted == pytest.approx(expected, rel=2e-3)


def closed_form(dim: int, evolving: bool) -> int:
    """Multiply-accumulates in an image of 224 px in a DeiT of width `dim`, evolving or dense."""

    def block(tokens: int) -> int:
        qkv, projection, mlp = 3 * tokens * dim**2, tokens * dim**2, 2 * 4 * tokens * dim**2
        return qkv + 2 * tokens**2 * dim + projection + mlp

    patch_embed, head = 196 * (3 * 16**2) * dim, dim * 1000
    # Blocks 4 to 11 see the class token and half of the 196 patches.
    blocks = 4 * block(197) + 8 * block(99) if evolving else 12 * block(197)
    # The class token's row of the attention, which selects: of block 3, and of 4 to 7.
    rows = (197 + 4 * 99) * dim if evolving else 0
    return patch_embed + blocks + rows + head


@pytest.mark.parametrize('name, dim', [('evo_deit_tiny_patch16_224', 192), ('evo_deit_small_patch16_224', 384)])
def test_arithmetic_is_the_closed_form(name, dim):
    with torch.device('meta'):
        candidates = [build(name, 224, {}), build(models.dense_twin(name)[0], 224, {})]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        for model, evolving in zip(candidates, (True, False), strict=True):
            counted = benchmark.count_gmacs(model.to_empty(device=CPU), [torch.randn(2, 3, 224, 224)])
            assert counted == pytest.approx(closed_form(dim, evolving) / 1e9, rel=1e-12)


def attend_by_products(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize('attend', [nn.functional.scaled_dot_product_attention, attend_by_products])
def test_attention_is_counted_fused_and_not(attend):
    q, k, v = torch.randn(3, 5, 2, 7, 4, requires_grad=True)
    product = 2 * 7 * 7 * 4 / 1e9
    assert benchmark.count_gmacs(attend, (q, k, v)) == pytest.approx(2 * product)
    trained = benchmark.count_gmacs(lambda *qkv: attend(*qkv).sum().backward(), (q, k, v))
    # Each product has two in its gradient; a fused kernel computes the map once more.
    assert trained == pytest.approx((6 if attend is attend_by_products else 7) * product)


@pytest.mark.parametrize(
    'kernel, others',
    [
        ('flash_attention', ()), ('flash_attention_for_cpu', ()), ('cudnn_attention', (None, False)),
        ('efficient_attention', (None, False)), ('fused_attention_overrideable', ()), ('attention_math', ()),
    ],
)  # fmt: skip
def test_every_kernel_of_attention_is_counted_alike(kernel, others):
    attend = getattr(torch.ops.aten, f'_scaled_dot_product_{kernel}')
    q, k, v = torch.randn(3, 5, 2, 7, 8, device='meta', dtype=torch.bfloat16)
    counted = benchmark.count_gmacs(lambda *qkv: attend(*qkv, *others), (q, k, v))
    assert counted == pytest.approx(2 * 2 * 7 * 7 * 8 / 1e9)


@pytest.mark.parametrize('name', ['fused_linear', 'my_attention_backward', 'addmm_relu', '_conv2d_packed'])
def test_a_product_that_cannot_be_counted_is_an_error(name):
    with torch.library._scoped_library('evo_vit_test', 'FRAGMENT') as library:
        library.define(f'{name}(Tensor x) -> Tensor')
        library.impl(name, torch.clone, 'CompositeExplicitAutograd')
        with pytest.raises(InputError, match=f'found evo_vit_test.{name}; add it to COUNTED_AS'):
            benchmark.count_gmacs(getattr(torch.ops.evo_vit_test, name), [torch.randn(2)])


def test_what_is_no_product_counts_nothing():
    def call(x):
        x = nn.functional.interpolate(x, scale_factor=2, mode='bilinear').softmax(-1)
        return torch.linalg.vector_norm(x.sum().lgamma())

    assert benchmark.count_gmacs(call, [torch.randn(2, 3, 4, 4)]) == 0


@pytest.mark.parametrize('name', ['evo_deit_nano_patch4_32', 'evo_deit_small_vis_patch16_384', 'EvoLeViT_128S_384'])
def test_the_twin_is_the_same_network_without_selection(name):
    with torch.device('meta'):
        ours = build(name, 64, {})
        twin_name, own = models.dense_twin(name)
        twin = build(twin_name, 64, own)
    assert not hasattr(twin, 'set_schedule')
    if name.startswith('evo_deit'):
        own = {
            k: v.shape for k, v in ours.state_dict().items() if not k.endswith(('_cls.weight', '_cls.bias', '_state'))
        }
        assert own == {key: value.shape for key, value in twin.state_dict().items()}
    else:
        # Positions stand in place of biases of attention; every other matrix of the layers is the same.
        matrices = [
            sorted(
                tuple(value.shape)
                for key, value in model.stages.named_parameters()
                if value.ndim > 1 and not key.endswith(('pos_embed', 'attention_biases'))
            )
            for model in (ours, twin)
        ]
        assert matrices[0] == matrices[1]


def test_every_model_of_ours_has_a_twin_and_no_other_has():
    ours = timm.list_models('evo_deit_*') + timm.list_models('EvoLeViT_*')
    assert len(ours) == 21
    for name in ours:
        assert timm.is_model(models.dense_twin(name)[0])
    assert models.dense_twin('levit_128s') is models.dense_twin('deit_tiny_patch16_224') is None


# --- modes


def test_every_mode_on_a_small_model(bench, monkeypatch):
    steps = []
    real_step = engine.train_step

    def spy(state, net, criterion, *others):
        def spying(images, outputs, targets):
            steps.append((type(net).__name__, net.training, state.ema is not None, type(outputs).__name__))
            return criterion(images, outputs, targets)

        return real_step(state, net, spying, *others)

    monkeypatch.setattr(engine, 'train_step', spy)
    printed, rows = bench('--bench', 'latency', 'both', '-b', 4)
    assert [(row['mode'], row['batch'], row['n']) for row in rows[::2]] == [
        ('inference', 4, 2), ('latency', 1, 2 * benchmark.LATENCY_CALLS), ('train', 4, 2),
    ]  # fmt: skip
    for ours, twin in zip(rows[::2], rows[1::2], strict=True):
        assert list(ours) == list(twin) == benchmark.FIELDS
        assert (ours['model'], ours['selection'], ours['keep_ratio']) == (NANO[1], 'stage-wise', '0.5')
        assert (twin['model'], twin['selection'], twin['keep_ratio']) == (TWIN, 'no selection', None)
        for row in (ours, twin):
            assert (row['error'], row['input'], row['image_size'], row['threads']) == (None, 'noise', 32, 1)
            assert row['images_per_second_p10'] <= row['images_per_second'] <= row['images_per_second_p90']
            assert 0 < row['ms'] <= row['ms_p90'] and row['ms_p99'] is None
            assert row['images_per_second'] == pytest.approx(1000 * row['batch'] / row['ms'], rel=1e-3)
            assert row['torch'] == torch.__version__ and row['device'] and row['date'] and row['commit']
            assert f'{row["gmacs"]:.4g}' in printed and row['peak_mib'] > 4 * row['parameters'] / 2**20
        assert twin['speedup'] is None and ours['speedup_p10'] <= ours['speedup'] <= ours['speedup_p90']
        assert ours['arithmetic_ratio'] == pytest.approx(twin['gmacs'] / ours['gmacs'], rel=1e-4)
    # Forward and backward are three forward passes, but for the first layer, which needs no gradient of images.
    inference, train = rows[0], rows[4]
    assert 2.9 < train['gmacs'] / inference['gmacs'] < 3.1
    assert train['peak_mib'] > 5 * 4 * train['parameters'] / 2**20  # weights, average, two moments, gradients
    ours, twin = ('EvoDeiT', True, True, 'Heads'), ('VisionTransformer', True, True, 'Tensor')
    assert {*steps} == {ours, twin} and steps[-4:] == [ours, twin] * 2  # the last ones are timed, in turns


def test_the_twins_take_turns(bench, monkeypatch):
    calls = []
    real = benchmark.seconds_a_batch
    monkeypatch.setattr(benchmark, 'seconds_a_batch', lambda c, device: calls.append(c.row['model']) or real(c, device))
    bench('--bench', 'inference', '-b', 1, '--num_bench_iter', 3)
    assert calls == [NANO[1], TWIN] * 3
    _, rows = bench('--bench', 'inference', '-b', 1, '--no-compare')
    assert [row['model'] for row in rows] == [NANO[1]] and rows[0]['speedup'] is None


def test_levit_is_folded_and_any_timm_model_runs(bench):
    small = '--img_size', 32, '-b', 2, '--num_bench_iter', 1
    _, rows = bench('--model', 'EvoLeViT_128S', 'resnet10t', '--bench', 'inference', *small)
    _, train = bench('--model', 'EvoLeViT_128S', '--bench', 'train', '--no-compare', *small)
    assert [(row['mode'], row['model'], row['fused']) for row in rows + train] == [
        ('inference', 'EvoLeViT_128S', True), ('inference', 'levit_128s', True), ('inference', 'resnet10t', True),
        ('train', 'EvoLeViT_128S', False),
    ]  # fmt: skip
    assert all(row['image_size'] == 32 and row['images_per_second'] > 0 for row in rows)


def test_fused_networks_have_no_batchnorm(monkeypatch):
    kept = []
    monkeypatch.setattr(benchmark, 'held_bytes', lambda model, *_: kept.append(model) or 0)
    args, _ = benchmark.get_parser().parse_known_args([*map(str, NANO), '--bench', 'inference', '-b', '1'])
    args.model = ['EvoLeViT_128S']
    benchmark.settle(args, CPU)
    benchmark.measure(args, benchmark.make_case(args, [], 'inference', 'EvoLeViT_128S', 32, 1), CPU)
    assert [type(model).__name__ for model in kept] == ['EvoLeViT', 'LevitDistilled']
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for model in kept for module in model.modules())


def test_end_to_end_is_never_mixed_up_with_noise(bench, image_folder):
    _, rows = bench(
        *('--data-path', image_folder, '--bench', 'both', '-b', 8, '--num_workers', 0, '--num_bench_iter', 1)
    )
    assert [(row['mode'], row['model']) for row in rows] == [
        (mode, model) for mode in ('inference', 'train') for model in ('the loader alone', NANO[1], TWIN)
    ]
    for row in rows:
        assert (row['input'], row['n']) == ('IMNET, end to end', benchmark.PASSES)
        assert row['ms'] > 0 and row['ms_p90'] is row['ms_p99'] is None
    assert rows[0]['gmacs'] is rows[0]['speedup'] is None and rows[1]['speedup'] > 0
    # Classes are those of the folder.
    with torch.device('meta'):
        model = timm.create_model(NANO[1], num_classes=4)
        assert rows[4]['parameters'] == engine.count_parameters(model)  # inference has one head less
        assert rows[1]['parameters'] == engine.count_parameters(model.fuse()) == rows[4]['parameters'] - 65 * 4 - 2 * 64
    with pytest.raises(InputError, match='30 images, expected a batch of 31'):
        bench('--data-path', image_folder, '--bench', 'inference', '-b', 31, '--num_workers', 0)
    with pytest.raises(InputError, match='square'):
        bench('--data-path', image_folder, '--input_size', 3, 32, 64)
    square = '--input_size', 3, 32, 32, '--bench', 'inference', '-b', 8, '--num_workers', 0, '--no-compare'
    assert bench('--data-path', image_folder, *square)[1][1]['image_size'] == 32


def test_images_are_normalised_as_the_model_wants_them(image_folder):
    flags = ['--data-path', str(image_folder), '--num_workers', '0', '--num_bench_iter', '1']
    args, recipe = benchmark.get_parser().parse_known_args(flags)
    case = benchmark.make_case(args, recipe, 'inference', 'vit_tiny_patch16_224', 32, 8)
    load, _ = benchmark.build_loader(args, case, CPU)
    levels = (next(load())[0] + 1) / 2 * 255  # its mean and standard deviation are 0.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


def test_a_pass_loads_no_more_than_it_uses(image_folder, monkeypatch):
    """Workers would go on loading, in the time of the next."""
    loaders = []
    real = datasets.build_loaders
    monkeypatch.setattr(datasets, 'build_loaders', lambda *a, **k: loaders.append(real(*a, **k)) or loaders[-1])
    args, recipe = benchmark.get_parser().parse_known_args(
        [*map(str, NANO), '--data-path', str(image_folder), '--num_workers', '0']
    )
    for mode, which in (('train', 0), ('inference', 1)):
        load, _ = benchmark.build_loader(args, benchmark.make_case(args, recipe, mode, NANO[1], None, 8), CPU)
        assert sum(1 for _ in load()) == sum(1 for _ in load()) == 2 == len(list(loaders[-1][which].batch_sampler))


# --- settings


def test_precisions():
    def dtype(mode, *flags):
        args, _ = benchmark.get_parser().parse_known_args([*map(str, NANO), *flags])
        benchmark.settle(args, CPU)
        case = benchmark.make_case(args, [], mode, args.model[0], None, 1)
        return benchmark.placement(args, case, CPU)['dtype'], engine.make_autocast(case.precision, CPU).keywords[
            'dtype'
        ]

    half = torch.bfloat16
    assert dtype('inference') == (torch.float32, None)
    assert dtype('inference', '--precision', 'bfloat16') == dtype('latency', '--precision', 'bf16') == (half, half)
    assert dtype('train', '--precision', 'bf16') == (torch.float32, half)  # as engine.train: autocast of fp32 weights
    assert dtype('inference', '--amp') == dtype('inference', '--precision', 'amp') == (torch.float32, half)
    assert dtype('inference', '--precision', 'float16') == (torch.float16, torch.float16)
    with pytest.raises(InputError, match='tf32 is a mode of NVIDIA GPUs'):
        dtype('inference', '--precision', 'tf32')


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_runs(bench, precision):
    _, rows = bench(
        '--bench', 'both', '-b', 2, '--precision', precision, '--channels-last', '--layer-wise', '--no-compare'
    )
    assert [(row['precision'], row['autocast'], row['error']) for row in rows] == [
        (precision, False, None),
        (precision, True, None),
    ]
    assert all(row['channels_last'] and row['selection'] == 'layer-wise' for row in rows)


def test_compile_takes_cuda_graphs_where_they_apply(bench, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, 'compile', lambda self, **how: compiled.append(how))
    _, rows = bench('--bench', 'both', '-b', 2, '--torchscript', '--num_bench_iter', 1, '--no-compare')
    assert [row['compile'] for row in rows] == ['default'] * 2
    graphs = {'dynamic': False, 'options': {'triton.cudagraphs': False}}
    assert compiled == [graphs, {}]  # training: as engine.train does
    how = benchmark.compile_model(
        Namespace(freeze=True), Namespace(mode='latency'), nn.Identity(), torch.device('cuda')
    )
    assert how == 'CUDA graphs, frozen' and compiled[-1]['options'] == {'triton.cudagraphs': True}


def test_sweeps_and_plots(bench, tmp_path):
    path = tmp_path / 'plot.png'
    _, rows = bench('--bench', 'inference', '-b', 1, '--keep-ratio', 0.25, '0.5,0.75', 1, '--plot', path)
    assert [row['keep_ratio'] for row in rows] == ['0.25', '0.5,0.75', '1', None]
    gmacs = [row['gmacs'] for row in rows]
    assert gmacs[0] < gmacs[1] < gmacs[2] == pytest.approx(gmacs[3], rel=0.01)
    assert path.read_bytes().startswith(b'\x89PNG')
    sweep = '-b', 1, 3, '--img_size', 32, 48, '--num_bench_iter', 1, '--plot', tmp_path / 'sweep.svg'
    _, rows = bench('--bench', 'inference', *sweep)
    assert [(row['image_size'], row['batch']) for row in rows[::2]] == [(32, 1), (32, 3), (48, 1), (48, 3)]
    assert rows[4]['gmacs'] > 2 * rows[0]['gmacs'] == 2 * rows[2]['gmacs']
    drawn = (tmp_path / 'sweep.svg').read_text()
    assert 'side of the images' in drawn
    # One line for each batch, not one that goes back and forth between both.
    assert all(f'{NANO[1]}, batch {batch}' in drawn for batch in (1, 3))
    _, rows = bench('--bench', 'inference', '-b', 1, '--input_size', 3, 32, 64)
    assert [row['image_size'] for row in rows] == ['32x64'] * 2


def test_published_flags_are_accepted():
    flags = (
        '--bench both --detail --results_file results.csv --num_warm_iter 10 --num_bench_iter 40 '
        '--model evo_deit_nano_patch4_32 -b 256 --img_size 32 --num_classes 10 --gp avg --channels_last --amp '
        '--precision float16 --torchscript --opt lamb --opt_eps 1e-7 --opt-betas 0.8 0.9 --momentum 0.8 '
        '--weight_decay 0.01 --clip-grad 2 --clip_mode value --smoothing 0.2 --drop 0.1 --drop_path 0.3 '
        '--drop_block 0.1'
    )
    args, recipe = benchmark.get_parser().parse_known_args(flags.split())
    benchmark.settle(args, CPU)
    case = benchmark.make_case(args, recipe, 'train', args.model[0], 32, 256)
    assert (args.bench, args.batch_size, args.compile, args.channels_last) == (
        ['inference', 'train'],
        [256],
        True,
        True,
    )
    assert (case.opt, case.opt_eps, case.opt_betas, case.momentum, case.weight_decay) == (
        'lamb',
        1e-7,
        [0.8, 0.9],
        0.8,
        0.01,
    )
    assert (case.clip_grad, case.clip_mode, case.smoothing, case.drop, case.drop_path) == (2, 'value', 0.2, 0.1, 0.3)
    assert benchmark.make_case(args, [], 'train', 'EvoLeViT_128', None, 8).clip_mode == 'agc'  # its own recipe


def test_defaults_suit_the_machine():
    args, _ = benchmark.get_parser().parse_known_args([])
    benchmark.settle(args, CPU)
    assert (args.precision, args.batch_size, args.num_bench_iter, args.compile) == ('fp32', [32], 10, False)
    assert benchmark.find_models(args) == benchmark.MODELS and args.compare


def test_model_lists_and_patterns(tmp_path):
    listing = tmp_path / 'models.txt'
    listing.write_text('evo_deit_nano_patch4_32\nEvoLeViT_128S\n')
    assert benchmark.find_models(Namespace(model=[], model_list=listing)) == listing.read_text().split()
    found = benchmark.find_models(Namespace(model=['evo_deit_*_patch16_384', 'resnet18'], model_list=None))
    assert found == ['evo_deit_base_patch16_384', 'evo_deit_small_patch16_384', 'resnet18']  # not the names with vis


# --- what goes wrong


def test_out_of_memory_ends_a_row_and_not_the_run(bench, tmp_path):
    printed, rows = bench('--bench', 'inference', '-b', 10**13, 2, '--plot', tmp_path / 'plot.png')
    assert [row['error'] for row in rows] == ['out of memory'] * 2 + [None] * 2
    assert rows[0]['images_per_second'] is None and rows[2]['images_per_second'] > 0
    assert printed.count('out of memory') == 2


def test_out_of_memory_of_the_twin_leaves_the_model_its_row(bench, monkeypatch):
    real = benchmark.build

    def fail(case, num_classes, name, own):
        if name == TWIN.split()[0]:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return real(case, num_classes, name, own)

    monkeypatch.setattr(benchmark, 'build', fail)
    _, rows = bench('--bench', 'inference', '-b', 1)
    assert [row['error'] for row in rows] == [None, 'out of memory'] and rows[0]['speedup'] is None


def test_any_other_error_ends_a_row_and_the_run_with_1(bench, tmp_path):
    """BatchNorm in training needs two images; one ratio too many for the stages of LeViT."""
    plotted, flags = tmp_path / 'plot.png', ('--no-compare', '--num_bench_iter', 1, '--img_size', 32)
    with pytest.raises(SystemExit) as end:
        bench('--model', 'EvoLeViT_128S', '--bench', 'train', '-b', 1, 2, '--plot', plotted, *flags)
    assert end.value.code == 1 and plotted.exists()
    rows = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert rows[0]['error'].startswith('ValueError: Expected more than 1 value per channel')
    assert rows[0]['ms'] is rows[1]['error'] is None and rows[1]['ms'] > 0
    plotted.unlink()
    ratios = '--keep-ratio', '0.7,0.5,0.5', '--plot', plotted
    with pytest.raises(SystemExit):
        bench('--model', 'EvoLeViT_128S', '--bench', 'inference', '-b', 1, *ratios, *flags)
    assert plotted.exists()  # without a single row that could be drawn


def test_errors_of_timing_end_a_row_too(bench, monkeypatch, tmp_path):
    real = benchmark.seconds_a_batch

    def fail(error):
        def timed(candidate, device):
            if candidate.row['model'] == TWIN:
                raise error
            return real(candidate, device)

        monkeypatch.setattr(benchmark, 'seconds_a_batch', timed)

    fail(KeyError('a surprise\nwith details'))
    with pytest.raises(SystemExit):
        bench('--bench', 'inference', '-b', 1)
    rows = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert rows[0]['ms'] > 0 and rows[1]['error'].startswith('KeyError: ') and '\n' not in rows[1]['error']
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench('--bench', 'inference', '-b', 1)


def test_damaged_data_ends_the_run(bench, tmp_path):
    for split in ('train', 'val'):
        for label in ('a', 'b'):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / 'image.png').write_bytes(b'no image')
    with pytest.raises(InputError, match='image.png'):
        bench('--data-path', tmp_path, '--num_workers', 0, '--bench', 'inference', '-b', 1)


def test_a_failed_model_is_gone_before_its_twin_is_built(bench, monkeypatch):
    created, alive = [], []
    real = models.create

    def create(*args, **kwargs):
        alive.extend(reference() is not None for reference in created)
        model = real(*args, **kwargs)
        if not created:
            model.register_forward_hook(fail)
        created.append(weakref.ref(model))
        return model

    def fail(*_):
        raise torch.OutOfMemoryError('CUDA out of memory.')

    monkeypatch.setattr(models, 'create', create)
    _, rows = bench('--bench', 'train', '-b', 2)
    assert [row['error'] for row in rows] == ['out of memory', None] and alive == [False]


def test_representative_is_for_models_of_ours(bench):
    _, rows = bench(
        '--representative',
        '--model',
        'resnet10t',
        '--bench',
        'inference',
        '-b',
        1,
        '--img_size',
        32,
        '--num_bench_iter',
        1,
    )
    assert rows[0]['error'] is None


@pytest.mark.parametrize(
    'flag', ['num_warm_iter', 'num_bench_iter', 'threads', 'num_classes', 'batch-size', 'img_size']
)
def test_zero_is_refused(flag):
    args, _ = benchmark.get_parser().parse_known_args([f'--{flag}', '0'])
    with pytest.raises(InputError, match=f'--{flag.replace("_", "-")}: expected 1 or more, found'):
        benchmark.settle(args, CPU)


def test_a_tag_that_timm_does_not_know():
    name = 'deit_tiny_patch16_224.nope'
    refused = 'there is no model deit_tiny_patch16_224.nope. Nearest: .*deit_tiny_patch16_224.fb_in1k'
    with pytest.raises(InputError, match=refused):
        benchmark.find_models(Namespace(model=[name], model_list=None))
    with pytest.raises(InputError, match=refused):
        models.create(name, 10, 224)
    tagged = 'deit_tiny_patch16_224.fb_in1k'
    assert benchmark.find_models(Namespace(model=[tagged], model_list=None)) == [tagged]


def test_refusals_name_what_to_do(bench, tmp_path, capfd):
    with pytest.raises(InputError, match='there is no model evo_deit_tinny. Nearest: .*evo_deit_tiny_patch16_224'):
        bench('--model', 'evo_deit_tinny')
    with pytest.raises(InputError, match='expected 3 channels, found 1'):
        bench('--input_size', 1, 32, 32)
    with pytest.raises(InputError, match='plot.txt: expected a file in a folder that exists, named .png'):
        bench('--plot', tmp_path / 'plot.txt')
    with pytest.raises(InputError, match='--amp is autocast to half precision, found --precision fp32 beside it'):
        bench('--amp', '--precision', 'float32')
    empty = tmp_path / 'empty.txt'
    empty.write_text('\n')
    with pytest.raises(InputError, match='empty.txt: expected names of models, found none'):
        bench('--model_list', empty)
    with pytest.raises(SystemExit):
        bench('--no-such-flag')
    with pytest.raises(SystemExit):
        bench('--keep-ratio', 'abc')
    assert "expected a number, or one for each stage as in 0.7,0.5, found 'abc'" in capfd.readouterr().err
    other = tmp_path / 'other.csv'
    other.write_text('model,speed\n')
    with pytest.raises(InputError, match='other.csv has other columns'):
        bench('--results_file', other)
    assert other.read_text() == 'model,speed\n'


def test_a_run_on_disk_is_never_touched(bench, tmp_path):
    names = ('checkpoint.pth', 'checkpoint-0001-000000.pth', 'best_checkpoint.pth', 'log.txt')
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    for flags in (['--overwrite', '--output_dir', tmp_path], ['--resume', tmp_path / 'checkpoint.pth'], ['--eval']):
        with pytest.raises(InputError, match=f'{flags[0]}.*leave these flags out'):
            bench('--bench', 'train', '-b', 2, '--no-compare', *flags)
    # Nor could it be, were the flags let through: only the scripts' own way into training removes anything.
    case = engine.get_parser('', main_deit.RECIPE).parse_args(
        [*map(str, NANO[:2]), '--overwrite', '--output_dir', str(tmp_path), '--input-size', '32', '--precision', 'fp32']
    )
    case.mode = 'train'
    model = timm.create_model(NANO[1])
    benchmark.make_step(case, model, 1000, engine.make_autocast('fp32', CPU), CPU)
    assert {name: (tmp_path / name).read_bytes() for name in names} == {name: name.encode() for name in names}


# --- results


def test_csv_is_added_to(script, tmp_path):
    file = tmp_path / 'results.csv'
    for batch in (1, 2):
        script('benchmark', *NANO, '--bench', 'inference', '-b', batch, '--no-compare', '--results_file', file)
    with open(file) as lines:
        rows = list(csv.DictReader(lines))
    assert [(row['model'], row['batch'], row['error']) for row in rows] == [(NANO[1], '1', ''), (NANO[1], '2', '')]


def test_speedup_is_the_median_ratio_of_neighbours():
    """A machine that becomes ten times slower half way does not change it."""
    slow = [1, 1, 10, 10, 10]
    twin = Candidate(dict(input='noise', batch=8, gmacs=3.0), seconds=[1.5 * s for s in slow])
    ours = Candidate(dict(input='noise', batch=8, gmacs=2.0), seconds=slow)
    benchmark.summarise(ours, twin)
    assert (ours.row['speedup'], ours.row['arithmetic_ratio'], ours.row['n']) == (1.5, 1.5, 5)
    assert ours.row['images_per_second'] == 0.8 and ours.row['ms'] == 10_000


@pytest.mark.parametrize('calls', [99, 100])
def test_rare_calls_need_many(calls):
    ours = Candidate(dict(input='noise', batch=1), seconds=[1.0] * calls)
    benchmark.summarise(ours, None)
    assert ours.row['ms_p90'] == 1000 and ours.row.get('ms_p99') == (1000 if calls == 100 else None)


def test_columns_are_aligned_and_have_names_of_their_own(bench):
    printed, rows = bench('--bench', 'latency', 'train', '-b', 4, '--keep-ratio', '0.25,0.75', 1)
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('mode'))
    headings = {match.group(): match.span() for match in re.finditer(r'\S+( \S+)*', lines[start])}
    assert len(headings) == len(benchmark.TABLE) - 1 and len(lines[start]) < 280
    for line, row in zip(lines[start + 1 :], rows, strict=False):
        cells = {name: line[:end].split('  ')[-1] for name, (_, end) in headings.items()}
        assert all(line[end : end + 2].strip() == '' for _, end in list(headings.values())[2:])
        assert row['model'] == line[headings['model'][0] :].split('  ')[0]
        assert (cells['keep'].strip() or None, int(cells['parameters'])) == (row['keep_ratio'], row['parameters'])
        for name, field in (('img/s p10', 'images_per_second_p10'), ('ms p90', 'ms_p90'), ('GMACs/img', 'gmacs')):
            assert float(cells[name].replace(',', '')) == pytest.approx(row[field], rel=1e-3)
        if row['speedup']:
            assert float(cells['speed-up p90']) == pytest.approx(row['speedup_p90'], rel=1e-3)


@pytest.mark.parametrize('load, cores, busy', [(3.0, 2, True), (1.6, 2, True), (1.4, 2, False), (3.0, 16, False)])
def test_a_busy_machine_is_said_at_the_start(bench, monkeypatch, load, cores, busy):
    monkeypatch.setattr(os, 'getloadavg', lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, 'cpu_count', lambda: cores)
    printed, _ = bench('--bench', 'inference', '-b', 1, '--num_bench_iter', 1, '--no-compare')
    warning = f'warning: the machine was busy before this started (load {load} of the last minute, {cores} cores'
    assert (warning in printed) == busy


def drawn(monkeypatch, rows) -> Figure:
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path: figures.append(figure))
    benchmark.plot(rows, 'gmacs', 'plot.png')
    return figures[0]


def row_of(model: str, kind: str, gmacs: float, seconds: list[float]) -> dict:
    row = dict(mode='latency', input='noise', model=model, architecture=kind, gmacs=gmacs, batch=1)
    candidate = Candidate(row | dict(precision='fp32', device='cpu'), seconds=seconds)
    benchmark.summarise(candidate, None)
    return candidate.row


@pytest.mark.parametrize('slowest, disturbed, unusable', [(1.2, False, False), (2, True, False), (12, True, True)])
def test_spread_is_drawn_and_warned_of(monkeypatch, capsys, slowest, disturbed, unusable):
    rows = [row_of('steady', 'ViT', 1.0, [1.0] * 9), row_of('shaky', 'ViT', 2.0, [1.0, 1.0, 1.0, *[slowest] * 3])]
    benchmark.warn_of_spread(rows)
    printed = capsys.readouterr().out
    assert ('in 1 of 2 rows' in printed and 'latency, shaky' in printed) == bool(printed) == disturbed
    bars = drawn(monkeypatch, rows).axes[0].containers[0][2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[1, 1], pytest.approx([1 / slowest, 1])]
    printed = capsys.readouterr().out
    assert ('the point of shaky, latency, 2.0 GMACs an image means little' in printed) == unusable
    assert 'steady' not in printed


def test_labels_do_not_overlap_and_lines_are_told_apart(monkeypatch):
    kinds = 'EvoLeViT', 'LevitDistilled', 'EvoDeiT', 'VisionTransformer'
    rows = [row_of(f'{kind}_{i}', kind, 1 + 0.01 * i, [1 + 0.01 * i] * 3) for kind in kinds for i in range(4)]
    panel = drawn(monkeypatch, rows).axes[0]
    assert sorted(text.get_text() for text in panel.texts) == sorted(row['model'] for row in rows)
    for text in panel.texts:
        text.get_window_extent()  # moves it to its place
    boxes = [Text.get_window_extent(text) for text in panel.texts]
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # with itself
    styles = {(line.get_linestyle(), line.get_marker(), line.get_linewidth()) for line, *_ in panel.containers}
    assert len(styles) == len(kinds)


def test_memory_is_the_most_at_a_time():
    def step(images, targets):
        first = torch.empty(2**20)
        second = torch.empty(2**20)
        del first
        third = torch.empty(2**18)
        return second, third

    assert benchmark.warm_up(step, (None, None), 1, CPU) == 2 * 4 * 2**20
    model = nn.Linear(3, 5)
    assert benchmark.held_bytes(model, None, (torch.zeros(2), torch.zeros(1))) == 4 * (3 * 5 + 5 + 3)


def test_detail_names_operators(bench):
    printed, _ = bench('--bench', 'inference', '-b', 1, '--detail', '--no-compare')
    assert 'aten::addmm' in printed and f'inference, {NANO[1]}, one call' in printed


def test_twin_of_the_smallest_follows_the_variant_table(monkeypatch):
    monkeypatch.setitem(evo_deit.SIZES, 'nano', (96, 3))
    assert models.dense_twin(NANO[1])[1] == dict(patch_size=4, embed_dim=96, num_heads=3)
