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
import networks
from measure import results
from models import evo_deit
from utils import InputError

NAME = 'evo_deit_nano_patch4_32'
NANO = ['--model', NAME, '--num_warm_iter', 1, '--num_bench_iter', 1, '--device', 'cpu']
INFERENCE = '--bench', 'inference', '-b', 1
DENSE = 'vit_tiny_patch16_224 patch_size=4 embed_dim=64 num_heads=2'

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


def columns(rows: list[dict], *names: str) -> list[tuple]:
    return [tuple(row[name] for name in names) for row in rows]


def make_case(mode: str, *flags, name: str = NAME, size: int = 32, batch: int = 4) -> Namespace:
    """A case with the defaults of a CPU."""
    args, training_flags = benchmark.get_parser().parse_known_args([*map(str, flags)])
    return benchmark.make_case(
        benchmark.resolve_args(args, torch.device('cpu')), training_flags, mode, name, size, batch
    )


# --- dense baselines


@pytest.mark.parametrize('name', [NAME, 'evo_deit_small_vis_patch16_384'])
def test_the_dense_baseline_is_the_same_network_without_selection(name):
    """Those of Evo-LeViT have other names; test_costs.py compares their FLOPs with the original's."""
    dense, options = networks.dense_baseline(name)
    with torch.device('meta'):
        ours, theirs = networks.create(name, 1000, 64), networks.create(dense, 1000, 64, **options)
    own = '_cls.weight', '_cls.bias', '_state'
    shapes = {key: value.shape for key, value in ours.state_dict().items() if not key.endswith(own)}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


def test_every_model_of_ours_has_a_dense_baseline_and_no_other_has():
    ours = timm.list_models('evo_deit_*') + timm.list_models('EvoLeViT_*')
    assert len(ours) == 21 and all(timm.is_model(networks.dense_baseline(name)[0]) for name in ours)
    assert networks.dense_baseline('levit_128s') is networks.dense_baseline('deit_tiny_patch16_224') is None
    case = make_case('inference', '--evolve', '--model-kwargs', 'depth=3', name='test_vit')
    assert [len(build(num_classes=5).blocks) for _, build in benchmark.list_models(case)] == [3, 3]


# --- modes


def test_every_mode_on_a_small_model(bench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    steps = []
    real_step = engine.train_step

    def spy(state, net, criterion, *others):
        def spying(images, outputs, targets):
            steps.append((type(net).__name__, net.training, state.ema is not None, type(outputs).__name__))
            return criterion(images, outputs, targets)

        return real_step(state, net, spying, *others)

    monkeypatch.setattr(engine, 'train_step', spy)
    printed, rows = bench('--bench', 'latency', 'both', '-b', 4, '--num_bench_iter', 2)
    assert columns(rows[::2], 'mode', 'batch', 'n') == [
        ('inference', 4, 2), ('latency', 1, 2 * benchmark.LATENCY_CALLS), ('train', 4, 2),
    ]  # fmt: skip
    for ours, dense in zip(rows[::2], rows[1::2], strict=True):
        assert list(ours) == list(dense) == list(results.COLUMNS)
        assert columns([ours, dense], 'model', 'selection', 'keep_ratio', 'stages', 'representative') == [
            (NAME, 'stage-wise', '0.5', '4,8', 'none'), (DENSE, 'no selection', None, None, None),
        ]  # fmt: skip
        for row in (ours, dense):
            assert (row['error'], row['input'], row['image_size'], row['threads']) == (None, 'noise', 32, 1)
            assert row['images_per_second_p10'] <= row['images_per_second'] <= row['images_per_second_p90']
            assert 0 < row['ms'] <= row['ms_p90'] and row['ms_p99'] is None
            assert row['images_per_second'] == pytest.approx(1000 * row['batch'] / row['ms'], rel=1e-3)
            assert row['torch'] == torch.__version__ and row['device'] and row['date'] and row['commit']
            assert f'{row["gmacs"]:.4g}' in printed and row['peak_mib'] > 4 * row['parameters'] / 2**20
        assert dense['speedup'] is None and ours['speedup_p10'] <= ours['speedup'] <= ours['speedup_p90']
        assert ours['gmacs_ratio'] == pytest.approx(dense['gmacs'] / ours['gmacs'], rel=1e-4)
    # Forward and backward are three forward passes, but for the first layer, which needs no gradient of images.
    inference, train = rows[0], rows[4]
    assert 2.9 < train['gmacs'] / inference['gmacs'] < 3.1
    assert train['peak_mib'] > 5 * 4 * train['parameters'] / 2**20  # weights, average, two moments, gradients
    ours, dense = ('EvoDeiT', True, True, 'Heads'), ('VisionTransformer', True, True, 'Tensor')
    assert {*steps} == {ours, dense} and steps[-4:] == [ours, dense] * 2  # the last ones are timed, in turns
    assert [path.name for path in tmp_path.iterdir()] == ['results.jsonl']  # training writes nothing besides


def test_networks_are_folded_in_inference(bench, monkeypatch):
    norms = []
    real = benchmark.make_step

    def spy(case, model, *others):
        norms.append(sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()))
        return real(case, model, *others)

    monkeypatch.setattr(benchmark, 'make_step', spy)
    small = '--model', 'EvoLeViT_128S', '--img_size', 32, '-b', 2, '--bench'
    _, rows = bench(*small, 'inference')
    assert columns(rows, 'model', 'fused') == [('EvoLeViT_128S', True), ('levit_128s', True)] and norms == [0, 0]
    assert all(row['image_size'] == 32 and row['images_per_second'] > 0 for row in rows)
    for flags in (('inference', '--no-fuse'), ('train',)):
        _, rows = bench(*small, *flags, '--no-compare')
        assert columns(rows, 'error', 'fused') == [(None, False)] and norms[-1] > 0


@pytest.mark.parametrize('name, size', [('vit_tiny_patch16_224', 32), ('eva02_tiny_patch14_224', 28)])
def test_any_vit_is_measured_evolved_and_not(bench, name, size):
    flags = '--model', name, '--evolve', '--bench', 'inference', '-b', 2, '--img_size', size
    printed, rows = bench(*flags, '--keep-ratio', '0.75,0.25', 0.5, '--stages', 4, 8)
    assert columns(rows, 'model', 'keep_ratio', 'stages', 'representative', 'error') == [
        (f'{name} evolved', '0.75,0.25', '4,8', 'nearest', None),
        (f'{name} evolved', '0.5', '4,8', 'nearest', None),
        (name, None, None, None, None),
    ]
    assert [row['architecture'].startswith('Evolved') for row in rows] == [True, True, False]
    assert len({row['parameters'] for row in rows}) == 1 and f'{name} evolved' in printed
    assert rows[2]['speedup'] is None
    for row in rows[:2]:
        ratio = rows[2]['gmacs'] / row['gmacs']
        assert row['speedup'] > 0 and row['gmacs_ratio'] == pytest.approx(ratio, rel=1e-4)


def test_flags_of_evolving_are_for_models_that_evolve(bench):
    flags = '--representative', 'nearest', '-b', 2, '--img_size', 32, '--bench'
    expected = [(NAME, 'nearest', '4,8', None), (DENSE, None, None, None)]
    _, rows = bench('--model', 'vit_tiny_patch16_224', NAME, *flags, 'train', '--evolve')
    assert columns(rows, 'model', 'representative', 'stages', 'error') == [
        ('vit_tiny_patch16_224 evolved', 'nearest', '4,8', None),
        ('vit_tiny_patch16_224', None, None, None),
        *expected,
    ]
    _, rows = bench('--model', 'resnet10t', NAME, *flags, 'inference')
    expected = [('resnet10t', None, None, None), *expected]
    assert columns(rows, 'model', 'representative', 'stages', 'error') == expected


def test_the_plan_says_what_and_how_long(bench, monkeypatch):
    said, gmacs = [], iter([0.1, 0.6, 0.2] * 2)  # evolved and dense, and a ResNet; for inference and training
    monkeypatch.setattr(benchmark, 'count_gmacs', lambda *_: next(gmacs))
    monkeypatch.setattr(benchmark, 'measure_gmacs_per_second', lambda tensors: 1.0)
    monkeypatch.setattr(benchmark, 'measure', lambda case: [])
    monkeypatch.setattr(benchmark, 'print_rank0', said.append)
    sizes = '-b', 100, '--img_size', 32, '--num_warm_iter', 2, '--num_bench_iter', 4
    with pytest.raises(FileNotFoundError):  # no row was written
        bench('--model', NAME, 'resnet10t', '--bench', 'both', *sizes)
    # Twice the dense 0.6 and once 0.2, for 1 + 3 passes of 100 images and 6 calls: 3,360 seconds; 3 more for each row.
    plan = 'measuring 6 rows: inference and train of 2 models, with dense baselines, about 56 minutes'
    assert plan in said and said[-1].startswith('wrote ')


def test_end_to_end_is_never_mixed_up_with_noise(bench, image_folder):
    folder = '--data-path', image_folder, '--num_workers', 0
    _, rows = bench(*folder, '--bench', 'both', '-b', 8)
    assert columns(rows, 'mode', 'model') == [
        (mode, model) for mode in ('inference', 'train') for model in ('the loader alone', NAME, DENSE)
    ]
    for row in rows:
        assert (row['input'], row['n']) == ('IMNET, end to end', benchmark.PASSES)
        assert row['ms'] > 0 and row['ms_p90'] is row['ms_p99'] is None
    assert rows[0]['gmacs'] is rows[0]['speedup'] is None and rows[1]['speedup'] > 0
    with torch.device('meta'):  # classes are those of the folder
        model = timm.create_model(NAME, num_classes=4)
        assert rows[4]['parameters'] == engine.count_parameters(model)
        assert rows[1]['parameters'] == engine.count_parameters(model.fuse())
    with pytest.raises(InputError, match='expected a batch of 31, found 30 images'):
        bench(*folder, '--bench', 'inference', '-b', 31)
    with pytest.raises(InputError, match='square'):
        bench(*folder, '--input_size', 3, 32, 64)
    square = '--input_size', 3, 32, 32, '--bench', 'inference', '-b', 8, '--no-compare'
    assert bench(*folder, *square)[1][1]['image_size'] == 32


def test_images_are_normalized_as_the_model_wants_them(image_folder):
    flags = '--data-path', image_folder, '--num_workers', 0
    load, _ = benchmark.build_loader(make_case('inference', *flags, name='vit_tiny_patch16_224', batch=8))
    levels = (next(load())[0] + 1) / 2 * 255  # its mean and standard deviation are 0.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize('mode', ['inference', 'train'])
def test_a_pass_loads_no_more_than_it_uses(image_folder, monkeypatch, mode):
    """Workers would go on loading, in the time of the next."""
    opened = torch.zeros(1, dtype=torch.int64).share_memory_()  # counted in the worker too
    real = Image.open
    monkeypatch.setattr(Image, 'open', lambda *args, **kwargs: (opened.add_(1), real(*args, **kwargs))[1])
    flags = '--data-path', image_folder, '--num_workers', 1, '--num_bench_iter', 2
    load, _ = benchmark.build_loader(make_case(mode, *flags))
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
    with pytest.raises(InputError, match='tf32: expected an NVIDIA GPU'):
        dtypes('inference', '--precision', 'tf32')


def test_half_precision_trains(bench):
    flags = '--bench', 'both', '-b', 2, '--precision', 'fp16', '--channels-last', '--layer-wise', '--no-compare'
    _, rows = bench(*flags)
    assert columns(rows, 'precision', 'autocast', 'channels_last', 'selection', 'error') == [
        ('fp16', False, True, 'layer-wise', None), ('fp16', True, True, 'layer-wise', None),
    ]  # fmt: skip


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
    printed, rows = bench(*once, 1, '--keep-ratio', 0.25, '0.5,0.75', 1, '--plot', path)
    assert [row['keep_ratio'] for row in rows] == ['0.25', '0.5,0.75', '1', None]
    gmacs = [row['gmacs'] for row in rows]
    assert gmacs[0] < gmacs[1] < gmacs[2] == pytest.approx(gmacs[3], rel=0.01)
    assert path.read_bytes().startswith(b'\x89PNG')
    assert printed.splitlines()[-1] == f'wrote {tmp_path / "results.jsonl"} and {path}'
    _, rows = bench(*once, 1, 3, '--img_size', 32, 48, '--plot', tmp_path / 'sweep.svg')
    assert columns(rows[::2], 'image_size', 'batch') == [(32, 1), (32, 3), (48, 1), (48, 3)]
    assert rows[4]['gmacs'] > 2 * rows[0]['gmacs'] == 2 * rows[2]['gmacs']
    drawn = (tmp_path / 'sweep.svg').read_text()
    assert 'image size' in drawn and all(f'{NAME}, batch {batch}' in drawn for batch in (1, 3))
    _, rows = bench(*once, 1, '--input_size', 3, 32, 64)
    assert [row['image_size'] for row in rows] == ['32x64'] * 2


def test_published_flags_are_accepted():
    flags = (
        '--bench both --detail --results_file results.csv --num_warm_iter 10 --num_bench_iter 40 '
        f'--model {NAME} -b 256 --img_size 32 --num_classes 10 --gp avg --channels_last --amp '
        '--precision float16 --torchscript --opt lamb --opt_eps 1e-7 --opt-betas 0.8 0.9 --momentum 0.8 '
        '--weight_decay 0.01 --clip-grad 2 --clip_mode value --smoothing 0.2 --drop 0.1 --drop_path 0.3 '
        '--drop_block 0.1'
    )
    case = make_case('train', *flags.split())
    expected = dict(
        bench=['inference', 'train'], compile=True, channels_last=True, opt='lamb', opt_eps=1e-7, opt_betas=[0.8, 0.9],
        momentum=0.8, weight_decay=0.01, clip_grad=2, clip_mode='value', smoothing=0.2, drop=0.1, drop_path=0.3,
    )  # fmt: skip
    assert vars(case).items() >= expected.items()
    case = make_case('train', name='EvoLeViT_128')
    expected = dict(clip_mode='agc', precision='fp32', num_bench_iter=10, compile=False, compare=True)  # its own recipe
    assert vars(case).items() >= expected.items()


def test_model_lists_and_patterns(tmp_path):
    listing = tmp_path / 'models.txt'
    listing.write_text(f'{NAME}\nEvoLeViT_128S\n')
    assert benchmark.find_models([], listing) == listing.read_text().split()
    found = benchmark.find_models(['evo_deit_*_patch16_384', 'resnet18', 'deit_tiny_patch16_224.fb_in1k'])
    # Not the names with vis.
    expected = ['evo_deit_base_patch16_384', 'evo_deit_small_patch16_384', 'resnet18', 'deit_tiny_patch16_224.fb_in1k']
    assert found == expected


# --- what goes wrong


def test_out_of_memory_ends_a_row_and_not_the_run(bench, tmp_path, monkeypatch):
    printed, rows = bench('--bench', 'inference', '-b', 10**13, 2, '--plot', tmp_path / 'plot.png')
    assert [row['error'] for row in rows] == ['out of memory'] * 2 + [None] * 2
    assert rows[0]['images_per_second'] is None and rows[2]['images_per_second'] > 0
    assert printed.count('out of memory') == 2
    real = timm.create_model

    def create(name, **options):  # the dense baseline alone
        if name == DENSE.split()[0] and torch.get_default_device().type != 'meta':
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return real(name, **options)

    monkeypatch.setattr(timm, 'create_model', create)
    _, rows = bench(*INFERENCE)
    assert columns(rows, 'error', 'speedup') == [(None, None), ('out of memory', None)]


def test_any_other_error_ends_a_row_and_the_run_with_1(bench, monkeypatch, tmp_path):
    """BatchNorm in training needs two images."""
    plotted, flags = tmp_path / 'plot.png', ('--no-compare', '--img_size', 32)
    _, rows = bench('--model', 'EvoLeViT_128S', '--bench', 'train', '-b', 1, 2, '--plot', plotted, *flags, code=1)
    assert plotted.exists()
    assert rows[0]['error'].startswith('ValueError: Expected more than 1 value per channel')
    assert rows[0]['ms'] is rows[1]['error'] is None and rows[1]['ms'] > 0
    real, error = benchmark.time_batches, KeyError('a surprise\nwith details')

    def time_batches(candidate, device):
        if candidate.row['model'] == DENSE:
            raise error
        return real(candidate, device)

    monkeypatch.setattr(benchmark, 'time_batches', time_batches)
    _, rows = bench(*INFERENCE, code=1)
    assert rows[0]['ms'] > 0 and rows[1]['error'].startswith('KeyError: ') and '\n' not in rows[1]['error']
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench(*INFERENCE)


def test_damaged_data_ends_the_run(bench, tmp_path):
    for split in ('train', 'val'):
        for label in ('a', 'b'):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / 'image.png').write_bytes(b'no image')
    with pytest.raises(InputError, match='image.png'):
        bench('--data-path', tmp_path, '--num_workers', 0, *INFERENCE)


def test_a_failed_model_is_gone_before_its_baseline_is_built(bench, monkeypatch):
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


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--model evo_deit_tinny', 'there is no model evo_deit_tinny. Nearest: .*evo_deit_tiny_patch16_224'),
        ('--model deit_tiny_patch16_224.nope', 'there is no model .*nope. Nearest: .*deit_tiny_patch16_224.fb_in1k'),
        ('--model resnet10t --evolve', '--method evolve: ResNet cannot be evolved'),
        ('--model vit_tiny_patch16_224 --keep-ratio 0.5', 'none of these models evolves; add --evolve'),
        ('--model_list nowhere.txt', 'nowhere.txt: expected model names, one per line, found none'),
        ('--keep-ratio 0.7,0.5,0.5', 'keep_ratio: expected one value or 2'),
        ('--input_size 1 32 32', 'expected 3 channels, found 1'),
        ('--plot plot.txt', 'plot.txt: expected a file in an existing folder, named .png'),
        ('--results_file other.csv', 'other.csv: expected the columns .*, found model,speed; choose another file'),
        ('--amp --precision float32', '--amp is autocast to half precision, found --precision fp32 as well'),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(bench, monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(benchmark, 'measure', lambda case: pytest.fail('measured'))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'other.csv').write_text('model,speed\n')
    with pytest.raises(InputError, match=message):
        bench(*INFERENCE, *flags.split())
    assert (tmp_path / 'other.csv').read_text() == 'model,speed\n'


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--keep-ratio', 'abc'], "expected a number, or one per stage as in 0.7,0.3, found 'abc'"),
        (['--num_bench_iter', 0], '--num_bench_iter: expected 1 or more, found 0'),
        # A run on disk is never touched.
        (['--overwrite', '--output_dir', '.'], 'unrecognized arguments: --overwrite --output_dir'),
        (['--auto-resume'], 'unrecognized arguments: --auto-resume'),
        (['--resume', '.'], 'unrecognized arguments: --resume'),
    ],
)
def test_flags_that_are_wrong_or_of_runs_are_refused(bench, capfd, flags, message):
    with pytest.raises(SystemExit):
        bench(*flags)
    assert message in capfd.readouterr().err


# --- what is printed


def test_the_table_fits_a_terminal(bench):
    printed, rows = bench('--bench', 'latency', 'train', '-b', 4, '--keep-ratio', '0.25,0.75', 1)
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('mode'))
    heading, *table = lines[start : start + 1 + len(rows)]
    names = ['mode', 'model', 'keep', 'px', 'batch', 'img/s', 'ms', 'peak MiB', 'GMACs', 'speed-up']
    assert re.split('  +', heading) == names and max(map(len, [heading, *table])) <= 120
    for line, row in zip(table, rows, strict=True):
        assert line.startswith(f'{row["mode"]:9}  {row["model"][:32]}') and f'  {row["keep_ratio"] or ""}  ' in line
        columns = ('batch', 'images_per_second', 'ms', 'peak_mib', 'gmacs', 'speedup')
        numbers = [row[name] for name in columns if row[name] is not None]
        printed = [float(cell.replace(',', '')) for cell in line.split()[-len(numbers) :]]
        assert printed == pytest.approx(numbers, rel=1e-3)


def test_warnings_are_printed(bench, monkeypatch):
    monkeypatch.setattr(os, 'getloadavg', lambda: (99.0, 0.0, 0.0))
    monkeypatch.setattr(results, 'DISTURBED', 0.5)
    printed, _ = bench(*INFERENCE, '--no-compare')
    assert 'warning: the machine was busy before the start' in printed
    assert f'warning: inference, {NAME}, 32 px, batch 1: img/s vary 1.0-fold' in printed


def test_detail_names_operators(bench):
    printed, _ = bench(*INFERENCE, '--detail', '--no-compare')
    assert 'aten::addmm' in printed and f'inference, {NAME}, one call' in printed
