"""On a GPU: the original numbers, steps that never wait, every precision, NCCL, CUDA graphs, memory.

All of it is skipped where there is no GPU.
"""

import csv
import gc
import math
import shutil
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import accuracy, launch, read_log
from golden import fill
from test_evo_levit import golden_arrays, published_state
from torch import Tensor, nn

import engine
import losses
import main_deit
import main_levit
import models  # noqa: F401
import optim
import stopping
import visualize
from image_data import shapes
from models import weights
from utils import InputError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
DEVICE = torch.device('cuda')
RECIPES = {'evo_deit_nano_patch4_32': main_deit.RECIPE, 'EvoLeViT_128S': main_levit.RECIPE}
SIDES = {'evo_deit_nano_patch4_32': 32, 'EvoLeViT_128S': 64}
both_families = pytest.mark.parametrize('name', RECIPES)


@pytest.fixture(autouse=True)
def true_float32():
    """Begin and end without TF32, which torch uses in convolutions unless told not to."""

    def set_off():
        torch.set_float32_matmul_precision('highest')
        torch.backends.cudnn.allow_tf32 = False

    set_off()
    yield
    set_off()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_shapes(monkeypatch):
    """Make SHAPES small: four batches of 64 to train on, and one to validate."""
    monkeypatch.setattr(shapes.Shapes, 'LENGTHS', {'train': 256, 'val': 64})


def build(name: str, **kwargs) -> nn.Module:
    """A small model on the GPU, with weights less mild than fresh ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(dict(num_classes=10, img_size=SIDES[name]) | kwargs))
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.to(DEVICE)


def batch(name: str, count: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDES[name], SIDES[name], generator=generator)
    return images.to(DEVICE), torch.arange(count, device=DEVICE) % 10


def make_step(name: str, model: nn.Module, precision: str = 'fp32', *flags):
    """A function that makes one of the engine's training steps on a batch and returns its loss; and the run's state."""
    args = engine.get_parser('', RECIPES.get(name, main_deit.RECIPE)).parse_args(['--model', name, *flags])
    state = optim.build_state(args, model.train(), precision, args.batch_size)
    criterion, autocast = losses.Criterion(args.smoothing), engine.make_autocast(precision, DEVICE)
    clip = args.clip_grad, args.clip_mode
    return lambda inputs: engine.train_step(state, model, criterion, [inputs], 1, autocast, *clip), state


def flags_of(name: str, output) -> list:
    """Flags of a short run of a script on SHAPES."""
    flags = f'--device {DEVICE} --data-set SHAPES --batch-size 64 --num_workers 0 --lr 4e-3 --warmup-epochs 0'.split()
    return [*flags, '--model', name, '--input-size', SIDES[name], '--distillation-type', 'none', '--output_dir', output]


def script_of(name: str) -> str:
    return 'main_levit' if name.startswith('EvoLeViT') else 'main_deit'


# --- the original numbers


@pytest.mark.parametrize('schedule', ['stage', 'layer'])
def test_evo_deit_computes_the_original_numbers(schedule):
    description, golden = fill.load('evo_deit_tiny_patch16_224')
    model = timm.create_model('evo_deit_tiny_patch16_224').to(DEVICE)
    weights.load_weights(model, {'model': fill.published_state(description)})
    count = description['batch']
    x, y = fill.images('golden', count, 224).to(DEVICE), fill.labels('golden', count).to(DEVICE)
    model.eval().set_schedule(schedule == 'stage')
    with torch.inference_mode():
        logits, selection = model.forward_with_selection(x)
    np.testing.assert_allclose(logits[:, ::10].cpu(), golden[f'eval_{schedule}'], rtol=0, atol=1e-4)
    for name, kept in selection.items():
        np.testing.assert_array_equal(kept.cpu(), golden[f'kept_{schedule}_{name.replace("s.", "")}'])

    model.double().train().set_distilled_training()
    heads = model(x.double())
    loss = 0.5 * (F.cross_entropy(heads.head, y) + F.cross_entropy(heads.head_cls, y))
    loss.backward()
    np.testing.assert_allclose(loss.item(), golden[f'train_{schedule}_loss'], rtol=0, atol=1e-6)
    gradients = model.to_published({key: p.grad for key, p in model.named_parameters()})
    norms = [gradients[key].norm().item() for key in description['parameters']]
    np.testing.assert_allclose(norms, golden[f'train_{schedule}_gradnorm'], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize('schedule', ['stage', 'layer'])
def test_evo_levit_computes_the_original_numbers(schedule):
    model, golden = timm.create_model('EvoLeViT_128S', drop_path_rate=0.0), golden_arrays('EvoLeViT_128S')
    model.load_state_dict(model.convert_state(published_state(model))[0])
    count = len(golden['eval_stage_learn'])
    x, y = fill.images('golden', count, 224).to(DEVICE), fill.labels('golden', count).to(DEVICE)
    model.to(DEVICE).eval().set_schedule(schedule == 'stage')
    with torch.inference_mode():
        logits = model(x)[:, ::10]
    tradeoff = {'stage': 'learn', 'layer': 'fixed'}[schedule]  # the layer-wise schedule goes with fixed ones
    np.testing.assert_allclose(logits.cpu(), golden[f'eval_{schedule}_{tradeoff}'], rtol=0, atol=1e-4)

    model.set_distilled_training()
    heads = model.double().train()(x.double())
    loss = sum(F.cross_entropy(head, y) for head in heads) / 4
    np.testing.assert_allclose(loss.item(), golden[f'train_{schedule}_loss'], rtol=0, atol=1e-6)
    for head, published in zip(heads, ('avg', 'avg_dist', 'cls', 'cls_dist'), strict=True):
        expected = golden[f'train_{schedule}_{published}']
        np.testing.assert_allclose(head[:, ::10].detach().cpu(), expected, rtol=0, atol=1e-6)


# --- training steps


@contextmanager
def no_waiting():
    """An error where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@both_families
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_a_training_step_does_not_wait_for_the_gpu(name, precision):
    step, state = make_step(name, build(name, drop_path_rate=0.1), precision)
    inputs = batch(name)
    step(inputs)  # makes the state of the optimizer
    for stage_wise in (False, True):
        state.model.set_schedule(stage_wise)
        with no_waiting():
            loss = step(inputs)
        assert math.isfinite(loss)


def test_the_guard_does_not_wait_for_the_step_that_was_queued_last(monkeypatch):
    monkeypatch.setattr('signal.signal', lambda *_: None)
    guard = stopping.StepCheck(DEVICE)
    for i in range(3):  # kernels are loaded and memory is pinned when first needed, which may wait
        guard.check(torch.full((), 0.0, device=DEVICE), f'in step {i}')
    torch.cuda._sleep(2 * 10**9)  # clock cycles: about a second
    done = torch.cuda.current_stream().record_event()
    guard.check(torch.full((), math.nan, device=DEVICE), 'in step 3')
    assert not done.query()
    with pytest.raises(InputError, match='nan in step 3'):
        guard.check_last()


def first_gradient(name: str, precision: str) -> tuple[float, Tensor]:
    """Loss and gradient of the first step; in fp16 of the first whose scaled gradient does not overflow."""
    step, state = make_step(name, build(name), precision, '--no-model-ema')
    found = []

    def look(*_):
        found.append(torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None]).double())

    state.optimizer.register_step_pre_hook(look)
    for _ in range(10):
        loss = step(batch(name))
        if found[-1].isfinite().all():
            return loss.item(), found[-1]
    raise AssertionError(f'no finite gradient in {precision}')


@both_families
@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_goes_where_fp32_goes(name, precision):
    expected, exact = first_gradient(name, 'fp32')
    loss, gradient = first_gradient(name, precision)
    assert loss == pytest.approx(expected, rel=0.02)
    assert F.cosine_similarity(gradient, exact, dim=0) > 0.98


@both_families
def test_scripts_train_in_every_precision(name, script, few_shapes, tmp_path):
    log = {}
    for flags in ('fp32', 'tf32', 'bf16', 'fp16', 'tf32 --channels-last'):
        output = tmp_path / flags.replace(' ', '')
        script(script_of(name), *flags_of(name, output), '--epochs', 1, '--precision', *flags.split())
        (log[flags],) = read_log(output)
        assert log[flags]['precision'] == flags.split()[0]
        assert log[flags]['train_loss'] == pytest.approx(log['fp32']['train_loss'], rel=0.05)
        assert math.isfinite(log[flags]['test_loss'])


# --- runs


def weights_of(path) -> Tensor:
    state = weights.read_checkpoint(path)['model']
    return torch.cat([value.flatten().double() for value in state.values()])


@both_families
def test_a_run_that_is_resumed_in_an_epoch_ends_like_one_that_was_not(name, script, few_shapes, tmp_path, monkeypatch):
    """But for rounding: on a GPU sums may add up in any order. A lost optimizer state ends 0.02 away."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.backends.cudnn, 'enabled', False)  # its choice of algorithm is a race
    ends, common = [], ['--epochs', 3, '--precision', 'fp32', '--save-interval-steps', 1, '--keep-checkpoints', 99]
    resumed = ['--resume', tmp_path / 'whole/checkpoint-0001-000002.pth']
    for run, more in (('whole', []), ('resumed', resumed)):
        script(script_of(name), *flags_of(name, tmp_path / run), *common, *more)
        ends.append(weights_of(tmp_path / run / 'checkpoint.pth'))
    assert [line['epoch'] for line in read_log(tmp_path / 'resumed')] == [1, 2]
    assert (ends[1] - ends[0]).norm() <= 2e-3 * ends[0].norm()


@both_families
def test_a_checkpoint_of_a_gpu_is_evaluated_on_a_cpu(name, script, few_shapes, tmp_path):
    flags = flags_of(name, tmp_path)
    script(script_of(name), *flags, '--epochs', 1, '--precision', 'fp32')
    printed = script(script_of(name), *flags, '--eval', '--resume', tmp_path / 'checkpoint.pth', '--device', 'cpu')
    assert 'cpu, fp32' in printed
    # An image between two classes may fall to the other side.
    assert float(accuracy(printed)) == pytest.approx(read_log(tmp_path)[0]['test_acc1'], abs=100 / 64 + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_launcher_trains_with_nccl(processes, image_folder, tmp_path):
    if processes > torch.cuda.device_count():
        pytest.skip(f'needs {processes} GPUs')
    flags = ['--model', 'evo_deit_nano_patch4_32', '--input-size', 32, '--num_workers', 1, '--device', DEVICE.type]
    flags += ['--data-path', image_folder, '--batch-size', 16, '--epochs', 2, '--output_dir', tmp_path]
    launcher = ['torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    printed, _ = launch(*launcher, 'main_deit.py', *flags).communicate(timeout=300)
    assert f'{processes} process(es)' in printed and '(30 images)' in printed, printed
    assert [line['epoch'] for line in read_log(tmp_path)] == [0, 1]
    assert all(math.isfinite(line['train_loss']) for line in read_log(tmp_path))


# --- ways to call a model


@both_families
@pytest.mark.parametrize('stage_wise', [True, False])
def test_a_captured_graph_computes_the_same(name, stage_wise):
    """Captured with some images and replayed with others, which select other patches."""
    model = build(name).eval()
    model.set_schedule(stage_wise)
    (images, _), (others, _) = batch(name, 8), batch(name, 8, seed=1)
    with torch.inference_mode():
        expected = model(others)
        static, stream = images.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(static)
        static.copy_(others)
        graph.replay()
        torch.testing.assert_close(captured, expected, rtol=1e-4, atol=1e-4)
        assert (expected - model(images)).abs().max() > 1e-2


@both_families
def test_a_compiled_model_with_graphs_computes_the_same(name):
    pytest.importorskip('triton')
    if not (shutil.which('gcc') and Path(sysconfig.get_path('include'), 'Python.h').exists()):
        pytest.skip('triton needs a C compiler and the headers of Python')
    model = build(name).eval()
    inputs = [batch(name, 8, seed)[0] for seed in range(4)]
    with torch.inference_mode():
        expected = [model(images) for images in inputs]
        model.compile(mode='reduce-overhead', fullgraph=True)
        for images, logits in zip(inputs, expected, strict=True):
            torch.testing.assert_close(model(images).clone(), logits, rtol=1e-3, atol=1e-3)


@both_families
def test_channels_last_computes_the_same(name):
    """The convolutional stem of Evo-LeViT is what the layout is for."""
    images, labels = batch(name)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = build(name).to(memory_format=layout).train()
        model.set_distilled_training()
        logits = model(images.to(memory_format=layout))
        sum(F.cross_entropy(head, labels) for head in logits).backward()
        found.append((*logits, *(p.grad.contiguous() for p in model.patch_embed.parameters())))
    for plain, last in zip(*found, strict=True):
        torch.testing.assert_close(last, plain, rtol=0, atol=1e-3 * plain.abs().max().item())


def peak_bytes(name: str, train: bool) -> int:
    """Peak memory of a second step, or of a second inference, of 32 images of 224 px."""
    before = torch.cuda.memory_allocated()
    model = timm.create_model(name).to(DEVICE)
    inputs = torch.randn(32, 3, 224, 224, device=DEVICE), torch.arange(32, device=DEVICE)
    if train:
        step, _ = make_step(name, model, 'fp32', '--no-model-ema')
    else:
        engine.fuse(model.eval())
        step = torch.inference_mode()(lambda inputs: model(inputs[0]))
    step(inputs)
    torch.cuda.reset_peak_memory_stats()
    step(inputs)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize('train', [False, True])
def test_evolution_needs_no_more_memory_than_the_dense_baseline(train):
    peaks = []
    for name in 2 * ['deit_tiny_patch16_224', 'evo_deit_tiny_patch16_224']:
        gc.collect()
        peaks.append(peak_bytes(name, train))
    dense, evolving = peaks[2:]  # in the first round the libraries took their workspaces
    # In inference both peak in a dense block, where the scores, a float32 for each patch, come on top.
    assert evolving <= dense * (1 if train else 1.002)


# --- the other scripts


@both_families
def test_pictures_are_those_of_a_cpu(name):
    model = build(name).eval()
    images, labels = batch(name, 4)
    with torch.inference_mode():
        on_gpu = visualize.predict(model, images, labels.tolist())
        on_cpu = visualize.predict(model.cpu(), images.cpu(), labels.tolist())
    for one, two in zip(on_gpu, on_cpu, strict=True):
        np.testing.assert_array_equal(one.image, two.image)
        np.testing.assert_allclose(one.probabilities, two.probabilities, rtol=0, atol=1e-4)
        assert list(one.selections) == list(two.selections)


@pytest.mark.parametrize('precision', ['float32', 'tf32', 'bf16', 'amp'])
def test_the_benchmark_measures(precision, script, tmp_path):
    flags = ['--model', 'evo_deit_tiny_patch16_224', '--bench', 'inference', 'latency', 'train', '-b', 4]
    flags += ['--num_bench_iter', 2, '--num_warm_iter', 1, '--precision', precision, '--device', DEVICE]
    script('benchmark', *flags, '--results_file', tmp_path / 'results.csv')
    with open(tmp_path / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['mode'] for row in rows} == {'inference', 'latency', 'train'}
    assert all(not row['error'] and float(row['images_per_second']) > 0 and float(row['peak_mib']) > 0 for row in rows)
