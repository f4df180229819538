"""main_deit.py as its users run it: training, resuming, evaluating, fine-tuning, launchers."""

import io
import json
import math
import re
import shutil
import sys
from argparse import Namespace
from contextlib import nullcontext
from itertools import pairwise

import pytest
import timm
import torch
from conftest import TRAINED, accuracy, arguments, free_port, launch, read_log
from golden import fill
from safetensors.torch import save_file
from timm.models import VisionTransformer
from timm.optim import list_optimizers
from torch.utils.data import DataLoader

import checkpoint
import engine
import losses
import main_deit
import main_levit
import models
import networks
import optim
from models import weights
from utils import InputError

# --- flags


def test_every_published_flag_is_accepted():
    flags = (
        '--batch-size 64 --epochs 300 --model m --input-size 224 --drop 0.0 --drop-path 0.1 --model-ema --no-model-ema '
        '--model-ema-decay 0.99996 --model-ema-force-cpu --opt adamw --opt-eps 1e-8 --opt-betas 0.9 0.99 --clip-grad 1 '
        '--momentum 0.9 --weight-decay 0.05 --sched cosine --lr 5e-4 --lr-noise 0.4 0.6 --lr-noise-pct 0.67 '
        '--lr-noise-std 1.0 --warmup-lr 1e-6 --min-lr 1e-5 --decay-epochs 30 --warmup-epochs 5 --cooldown-epochs 10 '
        '--patience-epochs 10 --decay-rate 0.1 --dr 0.1 --color-jitter 0.4 --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 '
        '--train-interpolation bicubic --repeated-aug --no-repeated-aug --reprob 0.25 --remode pixel --recount 1 '
        '--resplit '
        '--mixup 0.8 --cutmix 1.0 --cutmix-minmax 0.1 0.2 --mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-mode batch '
        '--teacher-model regnety_160 --teacher-path p --distillation-type none --distillation-alpha 0.5 '
        '--distillation-tau 1.0 --finetune p --data-path p --data-set IMNET --inat-category name --output_dir p '
        '--device cpu '
        '--seed 0 --resume p --start_epoch 0 --eval --dist-eval --num_workers 10 --pin-mem --no-pin-mem --world_size 1 '
        '--dist_url env:// --local_rank -1 --stage-epoch 3 --keep-ratio 0.5 --representative --precision bf16 '
        '--compile '
        '--grad-accum-steps 2 --print-freq 3 --eval-interval 2 --eval-ema'
    ).split()
    args = arguments(*flags)
    assert args.lr_noise == [0.4, 0.6] and args.local_rank == -1
    levit = '--clip-grad 0.01 --clip-mode agc --prune-warmup-epoch 0 --teacher-path ./regnety_160-a5fe301d.pth'
    arguments(*levit.split(), '--distillation-type', 'cls', recipe=main_levit.RECIPE)


DEIT = dict(
    epochs=300, batch_size=64, drop=0.0, drop_path=0.1, model_ema=True, model_ema_decay=0.99996,
    opt='adamw', opt_eps=1e-8, opt_betas=None, clip_grad=None, momentum=0.9, weight_decay=0.05, sched='cosine',
    lr=5e-4, warmup_lr=1e-6, min_lr=1e-5, decay_epochs=30, warmup_epochs=5, cooldown_epochs=10, patience_epochs=10,
    decay_rate=0.1, smoothing=0.1, color_jitter=0.4, aa='rand-m9-mstd0.5-inc1', train_interpolation='bicubic',
    repeated_aug=True, reprob=0.25, remode='pixel', recount=1, mixup=0.8, cutmix=1.0, mixup_prob=1.0,
    mixup_switch_prob=0.5, mixup_mode='batch', distillation_type='none', distillation_alpha=0.5, distillation_tau=1.0,
    teacher_model='regnety_160', data_set='IMNET', seed=0, num_workers=10, prune_warmup_epoch=0, amp=True,
)  # fmt: skip
LEVIT = DEIT | dict(
    batch_size=256, weight_decay=0.025, clip_grad=0.01, clip_mode='agc', drop_path=None, distillation_type='cls',
    teacher_path='./regnety_160-a5fe301d.pth', eval_interval=20, amp=False,
)  # fmt: skip


@pytest.mark.parametrize('script, expected', [(main_deit, DEIT), (main_levit, LEVIT)])
def test_the_recipe_is_the_published_one(script, expected):
    args = vars(arguments(recipe=script.RECIPE))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize('script', [main_deit, main_levit])
def test_help_begins_with_a_screen_of_essential_flags(script, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit):
        engine.get_parser(script.__doc__, script.RECIPE).parse_args(['--help'])
    printed = capsys.readouterr().out
    first, rest = printed.split('\nmodel:\n')
    assert len(first.splitlines()) <= 40 and 'usage:' in first and script.__doc__.splitlines()[0] in first
    assert all(f'  {flag} ' in first for flag in ('--model', '--data-path', '--epochs', '--lr', '--eval', '--evolve'))
    flags = re.findall(r'^  (?:-h, )?(--[\w-]+)', printed, re.M)
    assert len(flags) == len(set(flags)) and '--warmup-epochs' in rest
    assert script.__doc__.strip().endswith(rest.strip()[-40:])


def test_what_may_change_in_a_resumed_run_is_flags():
    flags = vars(arguments())
    assert set(flags) >= set(engine.MAY_CHANGE)
    assert not {'model', 'lr', 'epochs', 'seed', 'batch_size', 'mixup', 'method'} & set(engine.MAY_CHANGE)
    before = {'args': flags | {'pretrained': True, 'finetune': 'w.pth'}}  # what it began with does not matter later
    assert checkpoint.compare_flags(before, 'c.pth', flags, engine.MAY_CHANGE, False) == {'pretrained', 'finetune'}


def new_state(*flags, model: torch.nn.Module | None = None, loader: DataLoader | None = None) -> engine.State:
    """The state of a run of a small model, at its start."""
    return optim.build_state(arguments(*flags), model or torch.nn.Linear(2, 2), 'fp32', batch_size=512, loader=loader)


def rates_by_epoch(state: engine.State, epochs: int) -> list[float]:
    rates = []
    for epoch in range(epochs):
        rates.append(engine.learning_rate(state))
        state.scheduler.step(epoch)
    return rates


@pytest.mark.parametrize(
    'row', json.loads((fill.HERE / 'recipe.json').read_text())['lr'], ids=lambda row: str(row['epochs'])
)
def test_learning_rates_are_the_published_ones(row):
    flags = ['--epochs', row['epochs'], '--lr', row['base_lr'], '--min-lr', row['min_lr'], '--no-model-ema']
    flags += ['--warmup-epochs', row['warmup_epochs'], '--warmup-lr', row['warmup_lr']]
    for cooldown in (0, 10):  # has no effect
        state = new_state(*flags, '--cooldown-epochs', cooldown)
        assert rates_by_epoch(state, row['epochs']) == pytest.approx(row['per_epoch'], rel=1e-9)


@pytest.mark.parametrize('epochs, warmup, says', [(5, 5, '0.0003, not 0.0005'), (20, 40, 'reaches'), (7, 5, None)])
def test_a_warmup_that_outlasts_the_run_is_said(capsys, epochs, warmup, says):
    state = new_state('--epochs', epochs, '--warmup-epochs', warmup)
    printed = capsys.readouterr().out
    assert f'takes all of --epochs {epochs}' in printed and says in printed if says else 'warning' not in printed
    # Of 7 epochs with 5 of warm-up, one has 0.8 of the rate.
    assert (max(rates_by_epoch(state, epochs)) < 0.8 * 5e-4) == (says is not None)


def test_the_schedule_on_updates_has_a_rate_for_each_step():
    flags = '--epochs 2 --warmup-epochs 1 --warmup-lr 0 --sched-on-updates --min-lr 0'.split()
    expected = [0, 1 / 4, 2 / 4, 3 / 4, *((1 + math.cos(math.pi * step / 8)) / 2 for step in range(4, 8))]
    state = new_state(*flags, loader=DataLoader([0] * 20, batch_size=5))
    rates = []
    for epoch in range(2):
        for step in range(4):
            state.scheduler.step_update(4 * epoch + step)
            rates.append(engine.learning_rate(state) / 5e-4)
        state.scheduler.step(epoch)  # as after each epoch: without effect
        assert engine.learning_rate(state) / 5e-4 == rates[-1]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    'capability, levit, deit', [(None, 'fp32', 'fp32'), ((7, 5), 'fp32', 'fp16'), ((8, 0), 'tf32', 'bf16')]
)
def test_the_default_precision_is_the_fastest_safe_one(monkeypatch, capability, levit, deit):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    device = torch.device('cuda' if capability else 'cpu')
    for recipe, expected in ((main_levit.RECIPE, levit), (main_deit.RECIPE, deit)):
        args = arguments('--resume', 'c.pth', recipe=recipe)
        assert engine.pick_precision(args.precision, device, args.amp) == expected
        # A run with TF32 is evaluated anywhere, in plain float32 if need be.
        for trained, evaluated in ((None, 'fp32'), ('bf16', 'bf16'), ('tf32', levit)):
            restored = checkpoint.restore_model_args(args, {'args': {'precision': trained}})
            assert engine.pick_precision(restored.precision, device, restored.amp) == evaluated
    if levit == 'tf32':
        assert engine.pick_precision('tf32', device) == 'tf32'
    else:
        with pytest.raises(InputError, match='tf32: expected an NVIDIA GPU, Ampere or newer, found .*use fp32'):
            engine.pick_precision('tf32', device)


# --- training and resuming


def test_each_epoch_has_its_schedule(script, flags, tmp_path, monkeypatch):
    """Selection of the model and of its EMA, mixup, and evaluation: rare at first, frequent at the end."""
    tested, mixed, train_step = [], set(), engine.train_step

    def evaluate(model, loader, autocast, name='Test'):
        tested.append((name, engine.describe_schedule(model)))
        return {'acc1': 0.0}

    def spy(state, net, criterion, batches, *args, **kwargs):
        batches = list(batches)
        mixed.add((state.epoch, batches[0][1].is_floating_point()))
        return train_step(state, net, criterion, batches, *args, **kwargs)

    monkeypatch.setattr(engine, 'evaluate', evaluate)
    monkeypatch.setattr(engine, 'train_step', spy)
    recipe = '--epochs 6 --prune-warmup-epoch 2 --eval-interval 2 --eval-ema --mixup-off-epoch 4'.split()
    script('main_deit', *flags, *recipe, '--output_dir', tmp_path)
    log = read_log(tmp_path)
    schedule = ['all patches'] * 2 + ['layer-wise'] * 2 + ['stage-wise'] * 2
    assert [line['selection'] for line in log] == schedule
    assert [line['epoch'] for line in log if 'test_acc1' in line] == [1, 3, 4, 5]
    assert tested == [(name, schedule[epoch]) for epoch in (1, 3, 4, 5) for name in ('Test', 'Test of the EMA')]
    assert mixed == {(epoch, epoch < 4) for epoch in range(6)}


def test_a_run_evaluates_to_the_logged_accuracy(script, flags, trained_run):
    log = read_log(trained_run)
    assert [line['selection'] for line in log] == ['layer-wise', 'stage-wise']
    needed = {'train_loss', 'train_lr', 'test_loss', 'test_acc1', 'test_acc5', 'epoch', 'n_parameters', 'test_ema_acc1'}
    assert all(needed <= set(line) for line in log)
    for line, name in zip(log, ('checkpoint-0001-000000.pth', 'checkpoint.pth'), strict=True):
        for ema, key in (([], 'test_acc1'), (['--eval-ema'], 'test_ema_acc1')):
            printed = script('main_deit', *flags, '--eval', '--resume', trained_run / name, '--batch-size', 7, *ema)
            assert accuracy(printed) == f'{line[key]:.3f}' and '{' not in printed
            assert (', layer-wise, ' in printed) == (line['selection'] == 'layer-wise')


@pytest.mark.parametrize(
    'recipe', [[], ['--sched-on-updates'], ['--layer-decay', 0.7], ['--opt', 'lamb'], ['--opt', 'adan']], ids=str
)
def test_a_resumed_run_is_exact(script, flags, tmp_path, recipe):
    """At the edge of an epoch; row 3 of test_reliability.py has the rest. LAMB and Adan count steps in their groups."""
    flags = [*flags, *recipe, '--epochs', 2, '--lr', 0.05, '--warmup-epochs', 0, '--model-ema-decay', 0.9]
    printed = script('main_deit', *flags, '--output_dir', tmp_path / 'whole')
    assert '16 x 1 accumulated x 1 processes = 16 images' in printed and 'cpu, fp32' in printed
    source = tmp_path / 'whole' / 'checkpoint-0001-000000.pth'
    script('main_deit', *flags, '--output_dir', tmp_path / 'resumed', '--resume', source)
    one, two = (weights.read_checkpoint(tmp_path / name / 'checkpoint.pth') for name in ('whole', 'resumed'))
    for name in ('model', 'model_ema'):
        assert all(torch.equal(value, two[name][key]) for key, value in one[name].items())
    assert str(one['optimizer']) == str(two['optimizer'])
    one, two = (read_log(tmp_path / name)[-1] for name in ('whole', 'resumed'))
    assert [one[key] for key in ('epoch', 'train_loss', 'train_lr')] == [
        two[key] for key in ('epoch', 'train_loss', 'train_lr')
    ]


def test_the_last_line_names_files_that_exist(script, flags, trained_run, tmp_path):
    """A run that resumes from another folder, and never beats the accuracy of there, has no best checkpoint here."""
    content = weights.read_checkpoint(trained_run / 'checkpoint-0001-000000.pth')
    torch.save(content | {'best_acc1': 100.0}, tmp_path / 'warmup.pth')
    out, run = tmp_path / 'out', [*flags, *TRAINED, '--eval-ema', '--output_dir']
    printed = script('main_deit', *run, out, '--resume', tmp_path / 'warmup.pth')
    assert not (out / 'best_checkpoint.pth').exists()
    assert f'written: checkpoint.pth and log.txt in {out}; next:' in printed
    assert f'--resume {out}/checkpoint.pth ' in printed
    printed = script('main_deit', *run, tmp_path / 'new')
    assert f'written: checkpoint.pth, best_checkpoint.pth and log.txt in {tmp_path}/new; next:' in printed
    assert f'--resume {tmp_path}/new/best_checkpoint.pth ' in printed


def test_row_26_the_best_is_remembered(script, flags, tmp_path, monkeypatch):
    accuracies = iter([50.0, 40.0, 45.0, float('nan'), 60.0])

    def evaluate(model, loader, autocast, name='Test'):
        return {'acc1': next(accuracies), 'acc5': 0.0, 'loss': float('nan')}

    monkeypatch.setattr(engine, 'evaluate', evaluate)
    script('main_deit', *flags, '--epochs', 2, '--output_dir', tmp_path)
    script('main_deit', *flags, '--epochs', 5, '--output_dir', tmp_path, '--resume', tmp_path / 'checkpoint.pth')
    assert [line['best_acc1'] for line in read_log(tmp_path)] == [50.0, 50.0, 50.0, 50.0, 60.0]
    assert read_log(tmp_path)[3]['test_acc1'] is None
    assert weights.read_checkpoint(tmp_path / 'best_checkpoint.pth')['epoch'] == 4


def test_published_checkpoints_go_on_and_are_evaluated(script, flags, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('evo_deit_nano_patch4_32', num_classes=4)
    published = {'model': model.to_published(model.state_dict()), 'epoch': 1, 'args': Namespace(model='x')}
    published['optimizer'] = {'state': {}, 'param_groups': []}
    torch.save(published, tmp_path / 'published.pth')
    printed = script('main_deit', *flags, '--eval', '--resume', tmp_path / 'published.pth')
    assert '(30 images)' in printed
    out = tmp_path / 'out'
    printed = script('main_deit', *flags, '--epochs', 4, '--resume', tmp_path / 'published.pth', '--output_dir', out)
    assert 'no averaged weights' in printed and 'the optimizer starts from scratch' in printed
    assert [line['epoch'] for line in read_log(out)] == [2, 3]
    # The rate is that of the epoch, not of a new run: here the second and third of five warm-up epochs.
    assert [line['train_lr'] for line in read_log(out)] == pytest.approx(
        [1e-6 + i * (5e-4 / 32 - 1e-6) / 5 for i in (1, 2)]
    )


def test_the_advice_at_the_end_of_a_run_works(script, flags, trained_run):
    again = [*flags, *TRAINED, '--resume', trained_run / 'checkpoint.pth', '--epochs']
    assert 'to keep training, pass a larger --epochs\n' in script('main_deit', *again, 2)
    printed = script('main_deit', *again, 3)
    assert 'epochs was 2, now 3: schedules now span 3 epochs' in printed
    assert 'Epoch 2 done' in printed
    with pytest.raises(InputError, match='epochs +2 +1\n.*Resume with the original flags, or pass --accept-changes'):
        script('main_deit', *again, 1)


def test_another_number_of_training_images_is_noticed(script, flags, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / 'images')
    recipe = [*flags[:-1], tmp_path / 'images', '--epochs', 2]
    script('main_deit', *recipe, '--output_dir', tmp_path / 'run')
    source = tmp_path / 'run' / 'checkpoint-0001-000000.pth'
    next((tmp_path / 'images' / 'train' / 'class0').iterdir()).unlink()
    with pytest.raises(InputError, match=r'train_images +64 +63\n'):
        script('main_deit', *recipe, '--resume', source)
    assert 'Epoch 1 done' in script('main_deit', *recipe, '--resume', source, '--accept-changes')


def test_classes_go_by_name(script, flags, tmp_path, image_folder, trained_run):
    content, log = weights.read_checkpoint(trained_run / 'checkpoint.pth'), read_log(trained_run)[-1]
    assert content['classes'] == [f'class{i}' for i in range(4)]

    # The same images, whose folders and names in the checkpoint sort in another order.
    names = ['pear', 'apple', 'fig', 'date']
    torch.save(content | {'classes': names}, tmp_path / 'renamed.pth')
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        for i, name in enumerate(names):
            (tmp_path / split / name).symlink_to(image_folder / split / f'class{i}')
    last = f'Acc@1 {log["test_acc1"]:.3f} Acc@5 {log["test_acc5"]:.3f} loss {log["test_loss"]:.3f}'
    evaluate = [*flags[:-1], tmp_path, '--eval', '--resume', tmp_path / 'renamed.pth']
    assert last in script('main_deit', *evaluate)
    del content['classes']
    torch.save(content, tmp_path / 'nameless.pth')  # which goes by order, and so is wrong here, but says so
    printed = script('main_deit', *evaluate, '--resume', tmp_path / 'nameless.pth')
    assert 'does not name its 4 classes' in printed and last not in printed

    again = [*flags[:-1], tmp_path, *TRAINED, '--resume', trained_run / 'checkpoint-0001-000000.pth']
    with pytest.raises(InputError, match='trained on other classes: the data lacks 4 .class0.* others .apple, '):
        script('main_deit', *again)
    assert 'trained on other classes: the data lacks 4' in script('main_deit', *again, '--accept-changes')

    (tmp_path / 'val' / 'fig').unlink()
    assert 'no images of 1 of 4 classes: fig' in script('main_deit', *evaluate)
    (tmp_path / 'val' / 'plum').symlink_to(image_folder / 'val' / 'class2')
    with pytest.raises(InputError, match='1 classes that training lacks: plum'):
        script('main_deit', *evaluate)


def test_accumulated_batches_are_one_large_batch(script, flags, tmp_path):
    plain = ['--mixup', 0, '--cutmix', 0, '--drop-path', 0, '--epochs', 1, '--opt', 'sgd', '--lr', 1, '--no-model-ema']
    for name, more in (('one', ['--batch-size', 16]), ('two', ['--batch-size', 8, '--grad-accum-steps', 2])):
        script('main_deit', *flags, *plain, *more, '--output_dir', tmp_path / name)
    one, two = (weights.read_checkpoint(tmp_path / name / 'checkpoint.pth')['model'] for name in ('one', 'two'))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['evo_deit_nano_patch4_32', 'EvoLeViT_128S'])
def test_channels_last_trains_to_the_same_weights(script, flags, tmp_path, name):
    torch.manual_seed(0)
    torch.save(timm.create_model('regnety_002', num_classes=4).state_dict(), tmp_path / 't.pth')
    size = 64 if 'LeViT' in name else 32
    own = ['--model', name, '--input-size', size, '--epochs', 1, '--opt', 'sgd', '--lr', 0.1, '--warmup-lr', 0.01]
    distil = ['--distillation-type', 'soft', '--teacher-model', 'regnety_002', '--teacher-path', tmp_path / 't.pth']
    for folder, last in (('contiguous', []), ('last', ['--channels-last'])):
        name = 'main_levit' if 'LeViT' in own[1] else 'main_deit'  # which clips gradients
        script(name, *flags, *own, *distil, *last, '--output_dir', tmp_path / folder)
    one, two = (weights.read_checkpoint(tmp_path / folder / 'checkpoint.pth') for folder in ('contiguous', 'last'))
    for part in ('model', 'model_ema'):
        for key, value in one[part].items():
            torch.testing.assert_close(value, two[part][key], rtol=1e-4, atol=1e-5)
    convolution = next(value for value in two['model'].values() if value.ndim == 4)
    assert convolution.is_contiguous(memory_format=torch.channels_last) and not convolution.is_contiguous()


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, 'evaluate', lambda *_: {})  # a second graph, which takes as long
    one_step = ['--epochs', 1, '--batch-size', 64, '--opt', 'sgd', '--lr', 1, '--warmup-lr', 0.1, '--no-model-ema']
    model = ['--model', 'test_vit', '--evolve', '--stages', 1, '--keep-ratio', 0.5, '--drop-path', 0]
    for name, more in (('compiled', ['--compile']), ('eager', [])):
        script('main_deit', *flags, *model, *one_step, *more, '--output_dir', tmp_path / name)
    one, two = (weights.read_checkpoint(tmp_path / name / 'checkpoint.pth')['model'] for name in ('compiled', 'eager'))
    assert list(one) == list(two), 'names are those of the model that is not compiled'
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_trains(script, flags, precision):
    more = ['--clip-grad', 1, '--grad-accum-steps', 2, '--batch-size', 8]
    assert f'cpu, {precision}' in script('main_deit', *flags, '--epochs', 1, '--precision', precision, *more)


def test_models_that_are_not_ours_train_and_have_no_stages(script, flags):
    assert 'epochs 0 to 0, stage-wise from epoch 0\n' in script('main_deit', *flags, '--epochs', 1)
    printed = script('main_deit', *flags, '--model', 'resnet10t', '--epochs', 1)
    assert 'resnet10t' in printed and 'epochs 0 to 0\n' in printed and 'Epoch 0 done' in printed


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_distillation_through_the_real_loading(script, flags, tmp_path, kind):
    teacher = timm.create_model('regnety_002', num_classes=4)
    torch.save({'model': teacher.state_dict()}, tmp_path / 't.pth')
    save_file(teacher.state_dict(), tmp_path / 't.safetensors')
    distil = ['--distillation-type', kind, '--teacher-model', 'regnety_002', '--teacher-path']
    path = tmp_path / ('t.pth' if kind == 'soft' else 't.safetensors')
    printed = script('main_deit', *flags, '--epochs', 1, *distil, path)
    assert f'teacher: regnety_002, {kind}' in printed and 'done' in printed
    torch.save({'model': timm.create_model('regnety_002', num_classes=5).state_dict()}, tmp_path / 't5.pth')
    with pytest.raises(InputError, match='--teacher-path.*5 classes, the model 4.*\n.*main_deit.py --model') as error:
        script('main_deit', *flags, *distil, tmp_path / 't5.pth')
    assert losses.ORIGINAL_TEACHER not in str(error.value)  # it knows the 1,000 classes of ImageNet
    with pytest.raises(InputError, match='--teacher-path .*is not a file'):
        script('main_deit', *flags, *distil, tmp_path / 'none.pth')
    with pytest.raises(InputError, match='needs --teacher-path'):
        script('main_deit', *flags, *distil[:-1])


# --- fine-tuning


@pytest.fixture
def plain():
    """A plain ViT of Nano's size with random weights that matter, for 4 classes."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, num_heads=2, num_classes=4).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def test_row_25_finetuning_replaces_the_head_and_trains_both(script, flags, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('evo_deit_nano_patch4_32', num_classes=7, img_size=16)
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pth')
    printed = script(
        'main_deit', *flags, '--epochs', 1, '--lr', 1, '--finetune', tmp_path / 'w.pth', '--output_dir', tmp_path
    )
    assert re.search(r'new in the model: head.*head_cls.*not used from the file: ', printed)
    trained = weights.read_checkpoint(tmp_path / 'checkpoint.pth')
    assert len(trained['optimizer']['state']) == len(list(model.parameters()))
    torch.save(timm.create_model('evo_deit_nano_patch4_32', num_classes=7).state_dict(), tmp_path / 'seven.pth')
    with pytest.raises(InputError, match='7 classes, the model 4.*\nTo start training .*--finetune'):
        script('main_deit', *flags, '--resume', tmp_path / 'seven.pth')
    with pytest.raises(InputError, match='seven.pth: 7 classes without names, but .*val has 4 class folders'):
        script('main_deit', *flags, '--eval', '--resume', tmp_path / 'seven.pth')


@pytest.mark.parametrize('head', [True, False])
def test_finetuning_says_what_is_new_and_what_is_a_copy(script, flags, tmp_path, plain, head):
    state = {k: v for k, v in plain.state_dict().items() if head or not k.startswith('head')}
    save_file(state, tmp_path / 'w.safetensors')
    printed = script(
        'main_deit', *flags, '--epochs', 1, '--finetune', tmp_path / 'w.safetensors', '--output_dir', tmp_path
    )
    new = 'nothing' if head else 'head.bias, head.weight, head_cls.bias, head_cls.weight'
    copies = 'norm_cls.weight, norm_cls.bias' + (', head_cls.weight, head_cls.bias' if head else '')
    assert f'new in the model: {new}; copies in the model: {copies}; not used from the file: nothing' in printed
    saved = weights.read_checkpoint(tmp_path / 'checkpoint.pth')['model']['_extra_state']
    assert saved.tolist() == [True, True, 0]  # the mean of the patches


def test_a_dense_vit_is_finetuned_to_other_classes_at_another_size(script, flags, tmp_path):
    small = ['--model', 'vit_tiny_patch16_224', '--drop-path', 0]
    torch.save(timm.create_model('vit_tiny_patch16_224', img_size=48, num_classes=7).state_dict(), tmp_path / 'w.pth')
    printed = script('main_deit', *flags, *small, '--epochs', 1, '--finetune', tmp_path / 'w.pth')
    assert 'new in the model: head.bias, head.weight; not used from the file: head.weight, head.bias' in printed
    assert 'Epoch 0 done' in printed


@pytest.mark.parametrize('stage_epoch', [0, 2])
def test_an_evolved_vit_is_finetuned_resumed_and_evaluated(script, flags, tmp_path, monkeypatch, stage_epoch):
    evaluate, results = engine.evaluate, []
    monkeypatch.setattr(engine, 'evaluate', lambda *args: results.append(evaluate(*args)) or results[-1])
    small = [*flags, '--model', 'vit_tiny_patch16_224', '--lr', 0.02, '--warmup-epochs', 0]
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', img_size=48, num_classes=7)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    path, schedule = tmp_path / 'run' / 'checkpoint.pth', 'layer-wise' if stage_epoch else 'stage-wise'
    run = [*small, '--evolve', '--stages', 3, 9, '--keep-ratio', 0.5, 0.25, '--output_dir', tmp_path / 'run']
    run += ['--stage-epoch', stage_epoch]
    script('main_deit', *run, '--epochs', 1, '--finetune', tmp_path / 'w.pth')
    script('main_deit', *run, '--epochs', 2, '--resume', path)
    log = read_log(tmp_path / 'run')
    assert [line['selection'] for line in log] == [schedule] * 2
    saved = weights.read_checkpoint(path)['schedule']
    assert (saved['stages'], saved['keep_ratio'], saved['stage_wise']) == ([3, 9], [0.5, 0.25], not stage_epoch)
    # Neither --evolve nor the rest of the schedule has to be given again.
    printed = script('main_deit', *small, '--eval', '--resume', path)
    assert 'nearest, keeps 0.5 from block 3 and 0.25 from block 9' in printed and 'plain' not in printed
    assert (', layer-wise, ' in printed) == (schedule == 'layer-wise')
    assert results[-1]['loss'] == log[1]['test_loss'] and results[-1]['acc1'] == log[1]['test_acc1']
    script('main_deit', *small, '--eval', '--resume', path, '--keep-ratio', 1)
    assert results[-1]['loss'] != log[1]['test_loss']


def test_a_fitted_schedule_is_saved_and_comes_back(script, flags, image_folder, tmp_path, monkeypatch):
    fitted = []

    def fit(model, images):
        fitted.append(len(images))
        return models.evolve(model, (0.5, 0.25), (3, 9))

    monkeypatch.setattr(models, 'fit_schedule', fit)
    small = [*flags, '--model', 'vit_tiny_patch16_224', '--output_dir', tmp_path / 'run']
    torch.save(timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=4).state_dict(), tmp_path / 'w.pth')
    fit_flags = ['--evolve', '--fit-schedule', image_folder / 'val']
    with pytest.raises(InputError, match='needs trained weights: add --finetune or --pretrained'):
        script('main_deit', *small, *fit_flags)
    fit_flags += ['--finetune', tmp_path / 'w.pth']
    printed = script('main_deit', *small, *fit_flags, '--epochs', 1)
    assert 'chose --stages 3 9 --keep-ratio 0.5 0.25 on 30 images' in printed and fitted == [30]
    evaluate = [*flags, '--model', 'vit_tiny_patch16_224', '--eval', '--resume', tmp_path / 'run' / 'checkpoint.pth']
    kept = 'nearest, keeps 0.5 from block 3 and 0.25 from block 9'
    assert kept in script('main_deit', *evaluate) and fitted == [30]
    # Images that would choose otherwise do not change a run that goes on.
    monkeypatch.setattr(models, 'fit_schedule', lambda model, images: models.evolve(model, (0.9, 0.8), (2, 4)))
    script('main_deit', *small, *fit_flags, '--epochs', 2, '--auto-resume')
    assert kept in script('main_deit', *evaluate)
    refit = [*evaluate, '--evolve', '--fit-schedule', image_folder / 'val']
    assert 'chose --stages 2 4 --keep-ratio 0.9 0.8 on 30 images' in script('main_deit', *refit)
    for wrong, message in (
        ([*fit_flags, '--keep-ratio', 0.5], '--fit-schedule needs --evolve, and no --keep-ratio'),
        (['--evolve', '--fit-schedule', tmp_path / 'run', *fit_flags[-2:]], 'found 0 in'),
    ):
        with pytest.raises(InputError, match=message):
            script('main_deit', *small, '--overwrite', *wrong)


# --- evaluation


def test_evaluation_recalls_the_model_that_was_trained(script, flags, tmp_path):
    own = ['--keep-ratio', 0.1, '--representative', '--precision', 'bf16', '--lr', 0.05, '--warmup-epochs', 0]
    own += ['--mean', 0.3, '--std', 0.4, '--crop-pct', 0.5]
    script('main_deit', *flags, *own, '--epochs', 1, '--output_dir', tmp_path)
    evaluate = [*flags, '--eval', '--resume', tmp_path / 'checkpoint.pth']
    printed = script('main_deit', *evaluate)
    log = read_log(tmp_path)[0]
    assert f'Acc@1 {log["test_acc1"]:.3f}' in printed and f'loss {log["test_loss"]:.3f}' in printed
    assert 'cpu, bf16' in printed
    assert 'crop_pct 0.5 (center), bicubic, mean 0.3 0.3 0.3, std 0.4 0.4 0.4' in printed
    printed = script('main_deit', *evaluate, '--keep-ratio', 1)
    assert 'trained with keep_ratio [0.1], and is evaluated with [1.0]' in printed
    assert f'loss {log["test_loss"]:.6f}' != re.findall(r'loss (\S+)', printed)[-1]


def test_another_method_begins_with_its_own_schedule():
    """Two keep ratios of `evolve` mean something else to `drop`, and nothing to `merge`."""
    args = arguments('--resume', 'c.pth', '--method', 'drop', recipe={})
    trained = dict(method='evolve', keep_ratio=[0.7], stages=[4, 8], representative='one', model_kwargs={'depth': 9})
    restored = checkpoint.restore_model_args(args, {'args': trained})
    assert (restored.keep_ratio, restored.stages, restored.representative) == (None, None, None)
    assert restored.model_kwargs == {'depth': 9}
    args.method = 'evolve'
    assert checkpoint.restore_model_args(args, {'args': trained}).stages == [4, 8]
    args.method = None
    assert checkpoint.restore_model_args(args, {'args': {'evolve': True}}).method == 'evolve'  # of version 0.2


@pytest.mark.parametrize('args', ['dict', 'Namespace', 'arch'])
def test_a_checkpoint_says_its_model(script, flags, tmp_path, args):
    """Ours, one with published flags, and one of timm's train.py: no --model, whatever the script's own default."""
    torch.manual_seed(0)
    name = 'vit_tiny_patch16_224'
    state = timm.create_model(name, img_size=48, num_classes=4, depth=3).state_dict()
    more = {'dict': {'args': {'model': name}}, 'Namespace': {'args': Namespace(model=name)}, 'arch': {'arch': name}}
    torch.save({'state_dict': state} | more[args], tmp_path / 'c.pth')
    data = flags[flags.index('--num_workers') :]
    evaluate = [*data, '--eval', '--resume', tmp_path / 'c.pth', '--input-size', 48, '--model-kwargs', 'depth=3']
    printed = script('main_deit', *evaluate)
    assert f'{name}, dense, ' in printed and '(30 images)' in printed
    assert accuracy(printed) == accuracy(script('main_levit', *evaluate, '--model', name))
    torch.save(state, tmp_path / 'c.pth')
    with pytest.raises(InputError, match='missing'):
        script('main_deit', *evaluate[:-2], '--model-kwargs', 'embed_dim=192')


def test_a_plain_vit_is_evaluated_from_its_class_token(script, flags, tmp_path, plain, monkeypatch):
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    x, evaluated = torch.randn(2, 3, 32, 32), []
    monkeypatch.setattr(engine, 'evaluate', lambda model, *_: evaluated.append(model.eval()) or {})
    for name, more in (('plain.pth', []), ('plain.safetensors', []), ('plain.pth', ['--fuse'])):
        printed = script('main_deit', *flags, '--keep-ratio', 1, '--eval', '--resume', tmp_path / name, *more)
        assert 'predicts from its class token' in printed and 'evolved without training' in printed
        assert 'assuming stage-wise' not in printed
        with torch.no_grad():
            torch.testing.assert_close(evaluated.pop()(x), plain(x))
    with pytest.raises(InputError, match='has no norm_cls.*, which training needs.*--finetune'):
        script('main_deit', *flags, '--resume', tmp_path / 'plain.pth')


def test_a_plain_vit_is_evaluated_evolved(script, flags, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(engine, 'PROGRESS_SECONDS', 0)
    model = timm.create_model('deit_tiny_patch16_224', num_classes=4)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    evaluate = [*flags, '--model', 'deit_tiny_patch16_224', '--input-size', 224, '--eval']
    evaluate += ['--resume', tmp_path / 'w.pth']
    plain = re.search(r'\* Acc@1 .*', script('main_deit', *evaluate))[0]
    printed = script('main_deit', *evaluate, '--evolve', '--keep-ratio', 1)
    assert 'weights of a plain ViT' in printed and plain in printed
    printed = script('main_deit', *evaluate, '--evolve')
    line = 'deit_tiny_patch16_224, nearest, keeps 0.7 from block 4 and 0.3 from block 8, (.*) of 1.25 GMACs, 224 px\n'
    assert 0.8 < float(re.search(line, printed)[1]) < 0.9 and plain not in printed
    assert re.search(r'Test: \[1/2\]  [\d.]+ img/s  eta: 0:00:\d\d\nTest: \[2/2\]', printed)


@pytest.mark.parametrize('name', ['evo_deit_nano_patch4_32', 'test_vit', 'EvoLeViT_128S'])
def test_evaluation_at_another_size_resizes_positions(script, flags, tmp_path, name):
    torch.manual_seed(0)
    size, other = (64, 128) if 'LeViT' in name else (32, 48)
    model = timm.create_model(name, num_classes=4, img_size=size)
    torch.save({'model': model.state_dict(), 'args': {'model': name, 'input_size': size}}, tmp_path / 'c.pth')
    evaluate = [*flags[flags.index('--num_workers') :], '--eval', '--resume', tmp_path / 'c.pth']
    assert 'positions resized' not in script('main_deit', *evaluate)
    printed = script('main_deit', *evaluate, '--input-size', other)
    assert f'{size}, and is evaluated with {other}' in printed and '(30 images)' in printed
    assert re.search(r"c.pth: positions resized to the model's image size: .*pos_embed \(1, ", printed)
    with pytest.raises(InputError, match='pos_embed.*\n(.*\n)*.*--finetune'):  # the moments would have another shape
        train = ['--model', name, '--input-size', other, '--resume', tmp_path / 'c.pth', '--accept-changes']
        script('main_deit', *evaluate[:-3], *train)


def test_weights_alone_start_training_and_are_evaluated(script, flags, tmp_path, image_folder):
    torch.manual_seed(0)
    state = timm.create_model('evo_deit_nano_patch4_32', num_classes=4).state_dict()
    save_file(state, tmp_path / 'w.safetensors')
    printed = script('main_deit', *flags, '--epochs', 1, '--resume', tmp_path / 'w.safetensors')
    assert 'holds only weights; training starts with them at epoch 0' in printed and 'Epoch 0 done' in printed
    (tmp_path / 'val').symlink_to(image_folder / 'val')  # evaluation needs no other folder
    evaluate = [*flags, '--data-path', tmp_path, '--eval', '--resume']
    printed = script('main_deit', *evaluate, tmp_path / 'w.safetensors')
    assert '(30 images)' in printed and 'class token' not in printed
    for key in ('model_ema', 'state_dict_ema'):
        torch.save({key: state}, tmp_path / 'c.pth')
        printed = script('main_deit', *evaluate, tmp_path / 'c.pth')
        assert 'averaged weights' in printed and '(30 images)' in printed
    torch.save({'ema': state}, tmp_path / 'c.pth')
    with pytest.raises(InputError, match='c.pth: expected weights, tensors by name; found ema'):
        script('main_deit', *evaluate, tmp_path / 'c.pth')


def test_weights_of_timm_are_evaluated_without_a_file(script, flags, monkeypatch):
    """--pretrained: the weights that timm downloads; here none are, and the model is built as it is."""
    monkeypatch.setattr(networks, 'create', lambda *args, pretrained, **kwargs: timm.create_model(args[0], img_size=32))
    data = [*flags, '--model', 'test_vit.r160_in1k', '--eval', '--pretrained']
    with pytest.raises(InputError, match='1000 classes without names'):
        script('main_deit', *data)  # these are four folders of other names
    with pytest.raises(InputError, match='--eval needs --resume with .*, or --pretrained'):
        script('main_deit', *data[:-1])


@pytest.mark.parametrize('name, folds', [('levit_128s', True), ('resnet10t', False)])
def test_timm_models_are_folded_or_it_is_said(script, flags, tmp_path, monkeypatch, name, folds):
    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=4).state_dict(), tmp_path / 'w.pth')
    evaluate = [*flags, '--model', name, '--input-size', 224, '--eval', '--resume', tmp_path / 'w.pth']
    folded, seen = engine.fuse, []
    monkeypatch.setattr(engine, 'fuse', lambda model: (folded(model), seen.append(len(model.state_dict()))))
    printed = script('main_deit', *evaluate, '--fuse')
    assert (seen[0] < len(timm.create_model(name).state_dict())) == folds
    assert ('has nothing to fold' in printed) != folds
    assert re.search(r'Acc@1 .*', printed)[0] == re.search(r'Acc@1 .*', script('main_deit', *evaluate))[0]


def test_an_evaluation_writes_its_results(script, flags, tmp_path, trained_run):
    path, source = tmp_path / 'results.json', trained_run / 'checkpoint.pth'
    script('main_deit', *flags, '--eval', '--resume', source, '--results-file', path)
    results, log = json.loads(path.read_text()), read_log(trained_run)[-1]
    assert results['schedule']['keep_ratio'] == [0.5, 0.5] and 0 < results['gmacs'] < 1
    expected = dict(
        model='evo_deit_nano_patch4_32', checkpoint=str(source), images=30, input_size=32, precision='fp32', ema=False,
        method='evolve', selection='stage-wise', fused=False, parameters=log['n_parameters'], acc1=log['test_acc1'],
        acc5=log['test_acc5'], loss=log['test_loss'],
    )  # fmt: skip
    assert {name: results[name] for name in expected} == expected
    assert results['versions'].keys() == {'python', 'torch', 'torchvision', 'timm'}


def test_results_say_which_method_they_are_of(script, flags, tmp_path):
    torch.save(timm.create_model('test_vit', img_size=32, num_classes=4).state_dict(), tmp_path / 'w.pth')
    evaluate = [*flags, '--model', 'test_vit', '--eval', '--resume', tmp_path / 'w.pth']
    evaluate += ['--results-file', tmp_path / 'results.json']
    kept = 'keeps 0.7 from block 1 and 0.49 from block 3 and 0.343 from block 4'
    for method, selection, says in (
        ('drop', 'drop, stage-wise', f'test_vit, drop, {kept}, 0.00095 of 0.0014 GMACs'),
        ('merge_norm', 'merge_norm', 'test_vit, merge_norm, merges 8 patches per block, '),
        (None, 'no selection', 'test_vit, dense, 0.0014 GMACs, 32 px\n'),
    ):
        assert says in script('main_deit', *evaluate, *(['--method', method] if method else []))
        results = json.loads((tmp_path / 'results.json').read_text())
        assert (results['method'], results['selection']) == (method, selection)
    assert results['schedule'] is None


# --- what goes wrong


@pytest.mark.parametrize(
    'wrong, says',
    [
        (['--resume', 'nowhere.pth'], '--resume nowhere.pth: .*is not a file'),
        (['--finetune', 'nowhere.pth'], '--finetune nowhere.pth: .*is not a file'),
        (['--eval'], '--eval needs --resume'),
        (['--model', 'evo_deit_smal_patch16_224'], 'Nearest: evo_deit_small_patch16_224'),
        (['--keep-ratio', '2'], 'keep_ratio: expected'),
        (['--grad-accum-steps', '100'], 'an epoch has only 4 batches'),
        (['--opt', 'nonsense'], '--opt nonsense'),
        (['--opt', 'adahessian'], '--opt adahessian.*second derivatives'),
        (['--sched', 'nonsense'], '--sched nonsense'),
        (['--sched', 'none'], '--sched none'),
        (['--device', 'meta'], '--device meta: .*cpu or cuda'),
    ],
)
def test_wrong_flags(script, flags, wrong, says):
    with pytest.raises(InputError, match=says):
        script('main_deit', *flags, *wrong)


@pytest.mark.parametrize(
    'flag, value, expected',
    [
        ('--seed', -1, '0 or more'),
        ('--epochs', 0, '1 or more'),
        ('--batch-size', 0, '1 or more'),
        ('--local_rank', -2, '-1 or more'),
        ('--model-ema-decay', 2, 'a number from 0 to 1'),
        ('--weight-decay', -1, '0 or more'),
        ('--opt-eps', 'nan', '0 or more'),
        ('--lr', 'inf', '0 or more'),
        ('--lr-noise', 2, 'a number from 0 to 1'),
        ('--clip-grad', 0, 'a number above 0'),
        ('--dist-timeout', 0, 'a number above 0'),
        ('--distillation-alpha', 1.5, 'a number from 0 to 1'),
    ],
)
def test_numbers_out_of_range_end_at_the_flag(script, capfd, flag, value, expected):
    with pytest.raises(SystemExit) as end:
        script('main_deit', f'{flag}={value}')
    assert end.value.code == 2
    assert f'error: argument {flag}: expected {expected}, found {value} ' in capfd.readouterr().err


@pytest.mark.parametrize(
    'useless, says',
    [
        (['--fuse'], '--fuse needs --eval'),
        (['--mixup-off-epoch', 1, '--mixup', 0, '--cutmix', 0], 'nothing to turn off'),
        (['--eval-ema', '--no-model-ema'], '--no-model-ema turns off'),
        (['--start_epoch', 3, '--epochs', 3], '--start_epoch: expected less than --epochs 3, found 3'),
        (['--results-file', 'OUT/results.json'], '--results-file needs --eval'),
        (['--eval', '--pretrained', '--results-file', 'OUT/no/r.json'], 'its folder does not exist'),
        (['--distillation-type', 'hard'], 'needs --teacher-path, the weights of --teacher-model regnety_160; .*https:'),
        (['--overwrite', '--auto-resume', '--output_dir', 'OUT'], '--overwrite starts over, .*give one of them'),
        (['--overwrite', '--resume', 'OUT/checkpoint.pth', '--output_dir', 'OUT'], '--overwrite starts over'),
        (['--tensorboard'], '--tensorboard logs training to --output_dir'),
    ],
)
def test_flags_that_would_do_nothing_are_refused_at_once(script, tmp_path, monkeypatch, useless, says):
    monkeypatch.setattr(networks, 'build', lambda *args: pytest.fail('the model was built'))
    (tmp_path / 'checkpoint.pth').touch()
    useless = [str(flag).replace('OUT', str(tmp_path)) for flag in useless]
    with pytest.raises(InputError, match=says):
        script('main_deit', *useless, '--data-path', tmp_path / 'nowhere')


# --- launchers


def test_a_launcher(script, flags, tmp_path):
    """With --use_env; without it: test_two_nodes; torchrun: row 13 of test_reliability.py."""
    command = ['torch.distributed.launch', '--nproc_per_node=2', '--use_env', f'--master_port={free_port()}']
    command += ['main_deit.py', *flags, '--epochs', 1, '--output_dir', tmp_path]
    printed, _ = (running := launch(*command)).communicate(timeout=240)
    assert running.returncode == 0, printed
    assert '2 process(es)' in printed and '16 x 1 accumulated x 2 processes = 32 images' in printed
    assert printed.count('Acc@1') == 1 + printed.count('best Acc@1'), 'only the first process prints'
    assert '(30 images)' in printed
    # One process, another batch size: the same accuracy.
    again = script('main_deit', *flags, '--eval', '--resume', tmp_path / 'checkpoint.pth', '--batch-size', 7)
    assert accuracy(again) == f'{read_log(tmp_path)[0]["test_acc1"]:.3f}'


def test_two_nodes(flags, tmp_path):
    port = free_port()
    nodes = [
        launch(
            'torch.distributed.launch', '--nproc_per_node=1', '--nnodes=2', f'--node_rank={i}', f'--master_port={port}',
            '--master_addr=127.0.0.1', 'main_deit.py', *flags, '--epochs', 1, '--output_dir', tmp_path / str(i),
        )
        for i in (0, 1)
    ]  # fmt: skip
    printed = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert '2 process(es)' in printed[0] and '(30 images)' in printed[0]
    assert (tmp_path / '0' / 'checkpoint.pth').exists() and not (tmp_path / '1' / 'checkpoint.pth').exists()


# --- optimizers

# adahessian needs second derivatives; kron keeps counters outside its state; others need a GPU.
OPTIMIZERS = list_optimizers(exclude_filters=['adahessian', 'kron*', 'bnb*', 'fused*'])


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_every_optimizer_takes_its_own_state(opt):
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def begin() -> engine.State:
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 40)
        return new_state('--opt', opt, '--lr', 0.1, '--warmup-epochs', 0, model=torch.nn.Sequential(*layers))

    def step(state: engine.State):
        state.model(images).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    one, two, file = begin(), begin(), io.BytesIO()
    step(one)
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load(torch.load(file, weights_only=True), 'c.pth')
    for _ in range(2):
        step(one)
        step(two)
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[key]), key


def test_optimizers_that_group_otherwise_say_what_to_do():
    saved = new_state('--weight-decay', 0).state_dict()
    for value, fits in (('0', True), ('0.05', False)):
        state = new_state('--weight-decay', value)
        with nullcontext() if fits else pytest.raises(InputError, match='--weight-decay 0 and .*1e-12.*--finetune'):
            state.load(saved | {'epoch': 0}, 'c.pth', {'weight_decay'})


@pytest.mark.parametrize('name', ['evo_deit_nano_patch4_32', 'EvoLeViT_128S', 'vit_tiny_patch16_224'])
def test_layer_decay_slows_early_layers(name):
    model = networks.create(name, 4, 64)
    if name.startswith('vit'):
        model = models.evolve(model)
    flags = ['--layer-decay', 0.5, '--lr', 1, '--warmup-epochs', 2, '--warmup-lr', 0.5]
    state = new_state('--model', name, *flags, model=model)
    rates = {id(p): group['lr'] for group in state.optimizer.param_groups for p in group['params']}
    assert rates.keys() == {id(p) for p in model.parameters()}
    assert engine.learning_rate(state) == 0.5
    blocks = [dict(model.named_modules())[block] for block in model.block_names()]
    layers = [{rates[id(p)] for p in block.parameters()} for block in blocks]
    assert all(len(layer) == 1 for layer in layers)
    layers = [layer.pop() for layer in layers]
    assert all(after == 2 * before for before, after in pairwise(layers))
    early = {rates[id(p)] for p in (*model.patch_embed.parameters(), model.pos_embed, model.cls_token)}
    assert max(early) < layers[0]
    heads = [p for key, p in model.named_parameters() if key.startswith('head')]
    assert {rates[id(p)] for p in heads} == {max(rates.values())} == {engine.learning_rate(state)}
    state.scheduler.step(4)  # all follow the schedule; a power of two divides exactly
    assert {group['lr'] / group['lr_scale'] for group in state.optimizer.param_groups} == {engine.learning_rate(state)}
    assert engine.learning_rate(state) < 1


# --- memory and TensorBoard


@pytest.mark.parametrize(
    'model', [['evo_deit_nano_patch4_32'], ['EvoLeViT_128S', '--input-size', 64], ['vit_tiny_patch16_224', '--evolve']]
)
@pytest.mark.parametrize('stage_epoch', [0, 1])
def test_gradient_checkpointing_runs_blocks_twice_to_the_same_weights(
    script, flags, tmp_path, monkeypatch, model, stage_epoch
):
    calls, build = [], networks.build

    def count_calls(*args):
        network = build(*args)
        for name in network.block_names():
            network.get_submodule(name).register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        return network

    monkeypatch.setattr(networks, 'build', count_calls)
    recipe = [*flags, '--model', *model, '--epochs', 1, '--stage-epoch', stage_epoch, '--lr', 0.05]
    recipe += ['--warmup-lr', 0.01, '--drop-path', 0.1, '--no-model-ema', '--distillation-type', 'none']
    counts = []
    for name, more in (('plain', []), ('saved', ['--grad-checkpointing'])):
        calls.clear()
        script('main_deit', *recipe, *more, '--output_dir', tmp_path / name)
        counts.append(sum(calls))
    assert 1.8 * counts[0] < counts[1] <= 2 * counts[0], 'all but what the last gradients do not need'
    plain, saved = (weights.read_checkpoint(tmp_path / name / 'checkpoint.pth')['model'] for name in ('plain', 'saved'))
    for key, value in plain.items():
        if 'running_' not in key and 'num_batches' not in key:  # statistics of BatchNorm move twice, see the docs
            assert torch.equal(value, saved[key]), key


def test_gradient_checkpointing_is_refused_where_there_is_none(script, flags, tmp_path):
    (tmp_path / 'log.txt').touch()
    output = ['--overwrite', '--output_dir', tmp_path]
    model = ['--model', 'convit_tiny', '--input-size', 224]
    with pytest.raises(InputError, match='--grad-checkpointing: .* does not support it'):
        script('main_deit', *flags, *model, *output, '--grad-checkpointing', '--epochs', 1)
    assert (tmp_path / 'log.txt').exists(), 'nothing is removed for a run that does not start'


def test_tensorboard_shows_what_the_log_has(script, flags, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = [*flags, '--tensorboard', '--output_dir', tmp_path, '--epochs']
    script('main_deit', *recipe, 2)
    script('main_deit', *recipe, 3, '--resume', tmp_path / 'checkpoint-0001-000000.pth')  # epoch 1 again
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    log = read_log(tmp_path)
    for tag, name in (('test/acc1', 'test_acc1'), ('train/loss', 'train_loss'), ('train/lr', 'train_lr')):
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [0, 1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in log], rel=1e-6)
    script('main_deit', *flags, '--epochs', 1, '--overwrite', '--output_dir', tmp_path)
    assert not list((tmp_path / 'tensorboard').glob('*'))


def test_tensorboard_that_is_not_installed_is_said_at_the_start(script, flags, tmp_path, monkeypatch):
    for name in ('tensorboard', 'torch.utils.tensorboard'):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(networks, 'build', lambda *args: pytest.fail('the model was built'))
    with pytest.raises(InputError, match='--tensorboard: .*pip install tensorboard'):
        script('main_deit', *flags, '--tensorboard', '--output_dir', tmp_path)
