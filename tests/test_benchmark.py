"""benchmark.py: what it measures, what its rows say, what it refuses. No test looks at a time."""

import gc
import json
import os
import re
import time
import weakref
from argparse import Namespace
from contextlib import nullcontext

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import benchmark
import engine
import models
from measure import results
from models import evo_deit
from utils import InputError

NANO = ['--model', 'evo_deit_nano_patch4_32', '--num_warm_iter', 1, '--num_bench_iter', 1, '--device', 'cpu']
INFERENCE = '--bench', 'inference', '-b', 1
TWIN = 'vit_tiny_patch16_224 patch_size=4 embed_dim=64 num_heads=2'
CPU = torch.device('cpu')

gc.freeze()  # the benchmark collects garbage after each case: what importing has made need not be looked through


@pytest.fixture
def bench(script, tmp_path):
    """Run the script on the CPU; returns what it printed, None if it ended with `code`, and the rows that it wrote."""

    def run(*flags, code: int = 0) -> tuple[str | None, list[dict]]:
        file, printed = tmp_path / 'results.jsonl', None
        file.unlink(missing_ok=True)
        with pytest.raises(SystemExit) if code else nullcontext() as end:
            printed = script('benchmark', *NANO, '--results_file', file, *flags)
        assert not code or end.value.code == code
        return printed, [json.loads(line) for line in file.read_text().splitlines()]

    return run


def parse(*flags) -> tuple[Namespace, list[str]]:
    """Flags with the defaults of a CPU, and those of the scripts."""
    args, training_flags = benchmark.get_parser().parse_known_args([*map(str, flags)])
    return benchmark.resolve_args(args, CPU), training_flags


# --- twins


@pytest.mark.parametrize('name', ['evo_deit_nano_patch4_32', 'evo_deit_small_vis_patch16_384', 'EvoLeViT_128S_384'])
def test_the_twin_is_the_same_network_without_selection(name):
    with torch.device('meta'):
        ours = models.create(name, 1000, 64).eval()
        twin_name, options = models.dense_twin(name)
        twin = models.create(twin_name, 1000, 64, **options).eval()
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


def test_the_dense_model_has_the_same_arguments():
    args, flags = benchmark.get_parser().parse_known_args(['--evolve', '--model-kwargs', 'depth=3'])
    args = benchmark.resolve_args(args, torch.device('cpu'))
    case = benchmark.make_case(args, flags, 'inference', 'test_vit', None, 2)
    assert [len(build(num_classes=5).blocks) for _, build in benchmark.list_models(case)] == [3, 3]


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
    printed, rows = bench('--bench', 'latency', 'both', '-b', 4, '--num_bench_iter', 2)
    assert [(row['mode'], row['batch'], row['n']) for row in rows[::2]] == [
        ('inference', 4, 2), ('latency', 1, 2 * benchmark.LATENCY_CALLS), ('train', 4, 2),
    ]  # fmt: skip
    for ours, twin in zip(rows[::2], rows[1::2], strict=True):
        assert list(ours) == list(twin) == list(results.COLUMNS)
        assert (ours['model'], ours['selection'], ours['keep_ratio']) == (NANO[1], 'stage-wise', '0.5')
        assert (ours['stages'], ours['representative'], twin['stages'], twin['representative']) == (
            '4,8',
            'none',
            None,
            None,
        )
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
    real = benchmark.time_batches
    monkeypatch.setattr(benchmark, 'time_batches', lambda c, device: calls.append(c.row['model']) or real(c, device))
    bench(*INFERENCE, '--num_bench_iter', 3)
    assert calls == [NANO[1], TWIN] * 3
    _, rows = bench(*INFERENCE, '--no-compare')
    assert [row['model'] for row in rows] == [NANO[1]] and rows[0]['speedup'] is None


def test_levit_is_folded_and_any_timm_model_runs(bench):
    small = '--img_size', 32, '-b', 2
    _, rows = bench('--model', 'EvoLeViT_128S', 'resnet10t', '--bench', 'inference', *small)
    _, train = bench('--model', 'EvoLeViT_128S', '--bench', 'train', '--no-compare', *small)
    assert [(row['mode'], row['model'], row['fused']) for row in rows + train] == [
        ('inference', 'EvoLeViT_128S', True), ('inference', 'levit_128s', True), ('inference', 'resnet10t', True),
        ('train', 'EvoLeViT_128S', False),
    ]  # fmt: skip
    assert all(row['image_size'] == 32 and row['images_per_second'] > 0 for row in rows)


def test_fused_networks_have_no_batchnorm(bench, monkeypatch):
    norms = {}
    real = benchmark.make_step

    def spy(case, model, *others):
        norms[type(model).__name__] = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        return real(case, model, *others)

    monkeypatch.setattr(benchmark, 'make_step', spy)
    flags = '--model', 'EvoLeViT_128S', *INFERENCE, '--img_size', 32
    bench(*flags)
    assert norms == {'EvoLeViT': 0, 'LevitDistilled': 0}
    bench(*flags, '--no-fuse', '--no-compare')
    assert norms['EvoLeViT'] > 0


@pytest.mark.parametrize('name, size', [('vit_tiny_patch16_224', 32), ('eva02_tiny_patch14_224', 28)])
def test_any_vit_is_measured_evolved_and_not(bench, name, size):
    flags = '--model', name, '--evolve', '--bench', 'inference', '-b', 2, '--img_size', size
    printed, rows = bench(*flags, '--keep-ratio', '0.75,0.25', 0.5, '--stages', 4, 8)
    assert [(row['model'], row['keep_ratio'], row['stages'], row['representative'], row['error']) for row in rows] == [
        (f'{name} evolved', '0.75,0.25', '4,8', 'nearest', None),
        (f'{name} evolved', '0.5', '4,8', 'nearest', None),
        (name, None, None, None, None),
    ]
    assert [row['architecture'].startswith('Evolved') for row in rows] == [True, True, False]
    assert {row['parameters'] for row in rows} == {rows[0]['parameters']}
    for row in rows[:2]:
        assert row['speedup'] > 0 and row['arithmetic_ratio'] == pytest.approx(
            rows[2]['gmacs'] / row['gmacs'], rel=1e-4
        )
    assert rows[2]['speedup'] is None and f'{name} evolved' in printed


def test_evolve_trains_and_leaves_our_models_as_they_are(bench):
    flags = '--evolve', '--representative', 'nearest', '-b', 2, '--img_size', 32
    _, rows = bench('--model', 'vit_tiny_patch16_224', NANO[1], '--bench', 'train', *flags)
    assert [(row['model'], row['representative'], row['stages'], row['error']) for row in rows] == [
        ('vit_tiny_patch16_224 evolved', 'nearest', '4,8', None), ('vit_tiny_patch16_224', None, None, None),
        (NANO[1], 'nearest', '4,8', None), (TWIN, None, None, None),
    ]  # fmt: skip


def test_what_cannot_be_evolved_is_refused_before_anything_is_measured(bench, monkeypatch):
    monkeypatch.setattr(benchmark, 'measure', lambda case: pytest.fail('measured'))
    with pytest.raises(InputError, match='--method evolve: ResNet cannot be evolved'):
        bench('--model', NANO[1], 'resnet10t', '--evolve', '--img_size', 32, *INFERENCE)
    with pytest.raises(InputError, match='keep_ratio: expected one value or 2'):
        bench('--keep-ratio', '0.7,0.5,0.5', *INFERENCE)


def test_what_is_measured_is_said_beforehand(bench, monkeypatch):
    monkeypatch.setattr(benchmark, 'measure_gmacs_per_second', lambda tensors: 1e-3)
    monkeypatch.setattr(benchmark, 'measure', lambda case: [])
    said = []
    monkeypatch.setattr(benchmark, 'print_rank0', said.append)
    args = '--model', NANO[1], 'resnet10t', '--bench', 'both', '-b', 7, '--img_size', 32, '--num_warm_iter', 2
    with pytest.raises(FileNotFoundError):  # no row was written
        bench(*args, '--num_bench_iter', 3)
    (plan,) = [line for line in said if line.startswith('to measure')]
    assert plan.startswith('to measure: 6 rows, inference and train of 2 models and their dense twins, about ')
    # Two of the dense GMACs of the small ViT and one of the ResNet's, 1 + 3 times, in batches of 7, 5 calls.
    gmacs = [
        benchmark.count_gmacs(build(num_classes=1000).eval(), [torch.zeros(1, 3, 32, 32)])
        for name in (NANO[1], 'resnet10t')
        for build in [benchmark.list_models(benchmark.make_case(*parse(*args), 'inference', name, 32, 7))[-1][1]]
    ]
    minutes = (2 * gmacs[0] + gmacs[1]) * 4 * 7 * 5 / 1e-3 / 60 + 6 / 20
    assert f'about {minutes:.0f} minutes' in plan


def test_end_to_end_is_never_mixed_up_with_noise(bench, image_folder):
    _, rows = bench('--data-path', image_folder, '--bench', 'both', '-b', 8, '--num_workers', 0)
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
    args, training_flags = parse('--data-path', image_folder, '--num_workers', 0)
    case = benchmark.make_case(args, training_flags, 'inference', 'vit_tiny_patch16_224', 32, 8)
    load, _ = benchmark.build_loader(case)
    levels = (next(load())[0] + 1) / 2 * 255  # its mean and standard deviation are 0.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize('mode', ['inference', 'train'])
def test_a_pass_loads_no_more_than_it_uses(image_folder, monkeypatch, mode):
    """Workers would go on loading, in the time of the next."""
    opened = torch.zeros(1, dtype=torch.int64).share_memory_()  # counted in the worker too
    real = Image.open
    monkeypatch.setattr(Image, 'open', lambda *args, **kwargs: (opened.add_(1), real(*args, **kwargs))[1])
    args, training_flags = parse(*NANO, '--data-path', image_folder, '--num_workers', 1, '--num_bench_iter', 2)
    load, _ = benchmark.build_loader(benchmark.make_case(args, training_flags, mode, NANO[1], None, 4))
    for passes in (1, 2):
        assert [len(images) for images, _ in load()] == [4, 4]
        time.sleep(0.2)
        assert opened.item() == passes * 8


# --- settings


def test_precisions(bench, monkeypatch):
    seen = []
    real = evo_deit.EvoDeiT.forward

    def spy(self, images):
        autocast = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None
        if not images.is_meta:  # there the plan counts GMACs
            seen.append((images.dtype, self.head.weight.dtype, autocast))
        return real(self, images)

    monkeypatch.setattr(evo_deit.EvoDeiT, 'forward', spy)

    def dtypes(mode, *flags):
        seen.clear()
        bench('--bench', mode, '-b', 2, '--no-compare', *flags)
        (used,) = set(seen)  # the same in every call
        assert used[0] == used[1]
        return used[1:]

    full, half = torch.float32, torch.bfloat16
    assert dtypes('inference') == (full, None)
    assert dtypes('inference', '--precision', 'bfloat16') == dtypes('latency', '--precision', 'bf16') == (half, None)
    assert dtypes('train', '--precision', 'bf16') == (full, half)  # as in the scripts: autocast of fp32 weights
    assert dtypes('inference', '--amp') == dtypes('inference', '--precision', 'amp') == (full, half)
    assert dtypes('inference', '--precision', 'float16') == (torch.float16, None)
    with pytest.raises(InputError, match='tf32 is a mode of NVIDIA GPUs'):
        dtypes('inference', '--precision', 'tf32')


def test_half_precision_trains(bench):
    flags = '--bench', 'both', '-b', 2, '--precision', 'fp16', '--channels-last', '--layer-wise', '--no-compare'
    _, rows = bench(*flags)
    expected = [('fp16', False, True, 'layer-wise', None), ('fp16', True, True, 'layer-wise', None)]
    columns = 'precision', 'autocast', 'channels_last', 'selection', 'error'
    assert [tuple(row[name] for name in columns) for row in rows] == expected


@torch._inductor.config.patch(freezing=False)
@torch._dynamo.config.patch(recompile_limit=8)  # what the benchmark sets is put back
def test_compile_takes_cuda_graphs_where_they_apply(bench, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, 'compile', lambda self, **how: compiled.append(how))
    _, rows = bench('--bench', 'both', '-b', 2, '--torchscript', '--no-compare')
    assert [row['compile'] for row in rows] == ['default'] * 2
    graphs = {'dynamic': False, 'options': {'triton.cudagraphs': False}}
    assert compiled == [graphs, {}]  # training: as in the scripts
    _, rows = bench('--bench', 'inference', '-b', 2, '--freeze', '--no-compare')
    assert rows[0]['compile'] == 'default, frozen' and rows[0]['peak_mib'] is None and torch._inductor.config.freezing


def test_sweeps_and_plots(bench, tmp_path):
    path = tmp_path / 'plot.png'
    once = '--bench', 'inference', '-b'
    _, rows = bench(*once, 1, '--keep-ratio', 0.25, '0.5,0.75', 1, '--plot', path)
    assert [row['keep_ratio'] for row in rows] == ['0.25', '0.5,0.75', '1', None]
    gmacs = [row['gmacs'] for row in rows]
    assert gmacs[0] < gmacs[1] < gmacs[2] == pytest.approx(gmacs[3], rel=0.01)
    assert path.read_bytes().startswith(b'\x89PNG')
    _, rows = bench(*once, 1, 3, '--img_size', 32, 48, '--plot', tmp_path / 'sweep.svg')
    assert [(row['image_size'], row['batch']) for row in rows[::2]] == [(32, 1), (32, 3), (48, 1), (48, 3)]
    assert rows[4]['gmacs'] > 2 * rows[0]['gmacs'] == 2 * rows[2]['gmacs']
    drawn = (tmp_path / 'sweep.svg').read_text()
    assert 'side of the images' in drawn and all(f'{NANO[1]}, batch {batch}' in drawn for batch in (1, 3))
    _, rows = bench(*once, 1, '--input_size', 3, 32, 64)
    assert [row['image_size'] for row in rows] == ['32x64'] * 2


def test_published_flags_are_accepted():
    flags = (
        '--bench both --detail --results_file results.csv --num_warm_iter 10 --num_bench_iter 40 '
        '--model evo_deit_nano_patch4_32 -b 256 --img_size 32 --num_classes 10 --gp avg --channels_last --amp '
        '--precision float16 --torchscript --opt lamb --opt_eps 1e-7 --opt-betas 0.8 0.9 --momentum 0.8 '
        '--weight_decay 0.01 --clip-grad 2 --clip_mode value --smoothing 0.2 --drop 0.1 --drop_path 0.3 '
        '--drop_block 0.1'
    )
    args, training_flags = parse(*flags.split())
    case = benchmark.make_case(args, training_flags, 'train', args.model[0], 32, 256)
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
    args, _ = parse()
    assert (args.precision, args.batch_size, args.num_bench_iter, args.compile) == ('fp32', [32], 10, False)
    assert benchmark.find_models(args.model) == benchmark.MODELS and args.compare


def test_model_lists_and_patterns(tmp_path):
    listing = tmp_path / 'models.txt'
    listing.write_text('evo_deit_nano_patch4_32\nEvoLeViT_128S\n')
    assert benchmark.find_models([], listing) == listing.read_text().split()
    found = benchmark.find_models(['evo_deit_*_patch16_384', 'resnet18'])
    assert found == ['evo_deit_base_patch16_384', 'evo_deit_small_patch16_384', 'resnet18']  # not the names with vis


# --- what goes wrong


def test_out_of_memory_ends_a_row_and_not_the_run(bench, tmp_path):
    printed, rows = bench('--bench', 'inference', '-b', 10**13, 2, '--plot', tmp_path / 'plot.png')
    assert [row['error'] for row in rows] == ['out of memory'] * 2 + [None] * 2
    assert rows[0]['images_per_second'] is None and rows[2]['images_per_second'] > 0
    assert printed.count('out of memory') == 2


def test_out_of_memory_of_the_twin_leaves_the_model_its_row(bench, monkeypatch):
    real = timm.create_model

    def create(name, **options):
        if name == TWIN.split()[0] and torch.get_default_device().type != 'meta':
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return real(name, **options)

    monkeypatch.setattr(timm, 'create_model', create)
    _, rows = bench(*INFERENCE)
    assert [row['error'] for row in rows] == [None, 'out of memory'] and rows[0]['speedup'] is None


def test_any_other_error_ends_a_row_and_the_run_with_1(bench, tmp_path):
    """BatchNorm in training needs two images."""
    plotted, flags = tmp_path / 'plot.png', ('--no-compare', '--img_size', 32)
    _, rows = bench('--model', 'EvoLeViT_128S', '--bench', 'train', '-b', 1, 2, '--plot', plotted, *flags, code=1)
    assert plotted.exists()
    assert rows[0]['error'].startswith('ValueError: Expected more than 1 value per channel')
    assert rows[0]['ms'] is rows[1]['error'] is None and rows[1]['ms'] > 0


def test_errors_of_timing_end_a_row_too(bench, monkeypatch):
    real = benchmark.time_batches

    def fail(error):
        def timed(candidate, device):
            if candidate.row['model'] == TWIN:
                raise error
            return real(candidate, device)

        monkeypatch.setattr(benchmark, 'time_batches', timed)

    fail(KeyError('a surprise\nwith details'))
    _, rows = bench(*INFERENCE, code=1)
    assert rows[0]['ms'] > 0 and rows[1]['error'].startswith('KeyError: ') and '\n' not in rows[1]['error']
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench(*INFERENCE)


def test_damaged_data_ends_the_run(bench, tmp_path):
    for split in ('train', 'val'):
        for label in ('a', 'b'):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / 'image.png').write_bytes(b'no image')
    with pytest.raises(InputError, match='image.png'):
        bench('--data-path', tmp_path, '--num_workers', 0, *INFERENCE)


def test_a_failed_model_is_gone_before_its_twin_is_built(bench, monkeypatch):
    created, alive = [], []
    real = timm.create_model

    def create(*args, **kwargs):
        alive.extend(reference() is not None for reference in created)
        model = real(*args, **kwargs)
        if next(model.parameters()).is_meta:  # built to see that it can be
            return model
        if not created:
            model.register_forward_hook(fail)
        created.append(weakref.ref(model))
        return model

    def fail(*_):
        raise torch.OutOfMemoryError('CUDA out of memory.')

    monkeypatch.setattr(timm, 'create_model', create)
    _, rows = bench('--bench', 'train', '-b', 2)
    assert [row['error'] for row in rows] == ['out of memory', None] and alive == [False]


def test_representative_is_for_models_that_evolve(bench):
    flags = *INFERENCE, '--img_size', 32
    _, rows = bench('--representative', 'nearest', '--model', 'resnet10t', NANO[1], 'EvoLeViT_128S', *flags)
    assert [(row['architecture'], row['representative'], row['error']) for row in rows] == [
        ('ResNet', None, None), ('EvoDeiT', 'nearest', None), ('VisionTransformer', None, None),
        ('EvoLeViT', 'nearest', None), ('LevitDistilled', None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    'flag', ['num_warm_iter', 'num_bench_iter', 'threads', 'num_classes', 'batch-size', 'img_size']
)
def test_zero_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse(f'--{flag}', 0)
    assert re.search(f'--{flag}.*: expected 1 or more, found 0', capsys.readouterr().err)


def test_a_tag_that_timm_does_not_know():
    name = 'deit_tiny_patch16_224.nope'
    refused = 'there is no model deit_tiny_patch16_224.nope. Nearest: .*deit_tiny_patch16_224.fb_in1k'
    with pytest.raises(InputError, match=refused):
        benchmark.find_models([name])
    with pytest.raises(InputError, match=refused):
        models.create(name, 10, 224)
    tagged = 'deit_tiny_patch16_224.fb_in1k'
    assert benchmark.find_models([tagged]) == [tagged]


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
    with pytest.raises(InputError, match='nowhere.txt: expected names of models, found none'):
        bench('--model_list', tmp_path / 'nowhere.txt')
    with pytest.raises(InputError, match='none of these models evolves; add --evolve'):
        bench('--model', 'vit_tiny_patch16_224', '--keep-ratio', 0.5)
    with pytest.raises(SystemExit):
        bench('--no-such-flag')
    with pytest.raises(SystemExit):
        bench('--keep-ratio', 'abc')
    assert "expected a number, or one for each stage as in 0.7,0.3, found 'abc'" in capfd.readouterr().err
    other = tmp_path / 'other.csv'
    other.write_text('model,speed\n')
    with pytest.raises(InputError, match='other.csv has other columns'):
        bench('--results_file', other)
    assert other.read_text() == 'model,speed\n'


@pytest.mark.parametrize('flags', [['--overwrite', '--output_dir'], ['--auto-resume', '--output_dir'], ['--resume']])
def test_a_run_on_disk_is_never_touched(bench, tmp_path, capfd, flags):
    names = ('checkpoint.pth', 'checkpoint-0001-000000.pth', 'best_checkpoint.pth', 'log.txt')
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    with pytest.raises(SystemExit):
        bench('--bench', 'train', '-b', 2, '--no-compare', *flags, tmp_path)
    assert f'unrecognized arguments: {flags[0]}' in capfd.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in names} == {name: name.encode() for name in names}


def test_training_writes_nothing_beside_its_results(bench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    bench('--bench', 'train', '-b', 2, '--no-compare')
    assert [path.name for path in tmp_path.iterdir()] == ['results.jsonl']


def test_no_flag_of_checkpoints_reaches_a_case():
    args, training_flags = parse(*NANO)
    case = benchmark.make_case(args, training_flags, 'train', NANO[1], None, 1)
    assert not {'output_dir', 'resume', 'auto_resume', 'overwrite', 'finetune'} & vars(case).keys()


# --- results


def test_the_table_fits_a_terminal(bench):
    printed, rows = bench('--bench', 'latency', 'train', '-b', 4, '--keep-ratio', '0.25,0.75', 1)
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('mode'))
    table = lines[start : start + 1 + len(rows)]
    assert max(map(len, table)) <= 120
    headings = {match.group(): match.span() for match in re.finditer(r'\S+( \S+)*', table[0])}
    assert list(headings) == ['mode', 'model', 'keep', 'px', 'batch', 'img/s', 'ms', 'peak MiB', 'GMACs', 'speed-up']
    for line, row in zip(table[1:], rows, strict=True):
        line = line.ljust(120)
        cells = {name: line[:end].split('  ')[-1].strip() for name, (_, end) in headings.items()}
        assert all(line[end : end + 2].strip() == '' for _, end in list(headings.values())[2:])
        name = line[headings['model'][0] :].split('  ')[0]
        assert row['model'] == name or (name[-1] == '…' and row['model'].startswith(name[:-1]))
        assert (cells['keep'] or None, int(cells['batch'])) == (row['keep_ratio'], row['batch'])
        for name, field in (('img/s', 'images_per_second'), ('ms', 'ms'), ('GMACs', 'gmacs'), ('peak MiB', 'peak_mib')):
            assert float(cells[name].replace(',', '')) == pytest.approx(row[field], rel=1e-3)
        assert (cells['speed-up'] or None) == (row['speedup'] and f'{row["speedup"]:.4g}')


def test_an_error_has_lines_of_its_own():
    row = dict(mode='inference', model='a' * 60, keep_ratio='0.7,0.3', image_size='1344x1344', batch=32)
    line, *error = results.table_line(row | {'error': 'word ' * 50}, 60).splitlines()
    assert 'a' * 32 + '…' in line and len(line) <= 120 and all(len(part) <= 120 for part in error)
    assert ' '.join(error).split() == ['word'] * 50


def test_warnings_are_printed(bench, monkeypatch):
    monkeypatch.setattr(os, 'getloadavg', lambda: (99.0, 0.0, 0.0))
    monkeypatch.setattr(results, 'DISTURBED', 0.5)
    printed, _ = bench(*INFERENCE, '--no-compare')
    assert 'warning: the machine was busy before this started' in printed
    assert f'warning: inference, {NANO[1]}, 32 px, batch 1: img/s differ by 1.0 times' in printed


def test_detail_names_operators(bench):
    printed, _ = bench(*INFERENCE, '--detail', '--no-compare')
    assert 'aten::addmm' in printed and f'inference, {NANO[1]}, one call' in printed


def test_twin_of_the_smallest_follows_the_variant_table(monkeypatch):
    monkeypatch.setitem(evo_deit.SIZES, 'nano', (96, 3))
    assert models.dense_twin(NANO[1])[1] == dict(patch_size=4, embed_dim=96, num_heads=3)
