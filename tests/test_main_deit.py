"""main_deit.py as its users run it: training, resuming, evaluating, fine-tuning, launchers."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from conftest import accuracy, free_port, launch, read_log
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
import optim
import output
from models import weights
from utils import InputError

ROOT = Path(__file__).parent.parent
NANO = [
    '--model',
    'evo_deit_nano_patch4_32',
    '--input-size',
    32,
    '--num_workers',
    0,
    '--device',
    'cpu',
    '--print-freq',
    1,
]


@pytest.fixture(scope='module')
def flags(image_folder):
    return [*NANO, '--batch-size', 16, '--data-path', image_folder]


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
    args = engine.get_parser('', main_deit.RECIPE).parse_args(flags)
    assert args.lr_noise == [0.4, 0.6] and args.local_rank == -1


def test_what_may_change_in_a_resumed_run_is_flags():
    flags = vars(engine.get_parser('', main_deit.RECIPE).parse_args([]))
    assert set(flags) >= set(engine.MAY_CHANGE)
    assert not {'model', 'lr', 'epochs', 'seed', 'batch_size', 'mixup', 'method'} & set(engine.MAY_CHANGE)


def test_the_recipe_is_the_published_one():
    args = engine.get_parser('', main_deit.RECIPE).parse_args([])
    expected = dict(
        epochs=300, batch_size=64, drop=0.0, drop_path=0.1, model_ema=True, model_ema_decay=0.99996,
        opt='adamw', opt_eps=1e-8, opt_betas=None, clip_grad=None, momentum=0.9, weight_decay=0.05, sched='cosine',
        lr=5e-4, warmup_lr=1e-6, min_lr=1e-5, decay_epochs=30, warmup_epochs=5, cooldown_epochs=10, patience_epochs=10,
        decay_rate=0.1, smoothing=0.1, color_jitter=0.4, aa='rand-m9-mstd0.5-inc1', train_interpolation='bicubic',
        repeated_aug=True, reprob=0.25, remode='pixel', recount=1, mixup=0.8, cutmix=1.0, mixup_prob=1.0,
        mixup_switch_prob=0.5, mixup_mode='batch',
        distillation_type='none', distillation_alpha=0.5, distillation_tau=1.0, data_set='IMNET', seed=0,
        num_workers=10,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    'row', json.loads((fill.HERE / 'recipe.json').read_text())['lr'], ids=lambda row: str(row['epochs'])
)
def test_learning_rates_are_the_published_ones(row):
    flags = ['--epochs', row['epochs'], '--lr', row['base_lr'], '--min-lr', row['min_lr'], '--no-model-ema']
    flags += ['--warmup-epochs', row['warmup_epochs'], '--warmup-lr', row['warmup_lr']]
    state, rates = new_state(*flags), []
    for epoch in range(row['epochs']):
        rates.append(engine.learning_rate(state))
        state.scheduler.step(epoch)
    assert rates == pytest.approx(row['per_epoch'], rel=1e-9)


def new_state(*flags, loader: DataLoader | None = None) -> engine.State:
    """A run's state of a small model, at its start."""
    args = engine.get_parser('', main_deit.RECIPE).parse_args([str(flag) for flag in flags])
    return optim.build_state(args, torch.nn.Linear(2, 2), 'fp32', batch_size=512, loader=loader)


def test_cooldown_changes_no_rate_and_says_so(capsys):
    rates = []
    for epochs in (0, 10):
        state = new_state('--cooldown-epochs', epochs, '--epochs', 20, '--warmup-epochs', 2)
        rates.append([])
        for epoch in range(20):
            state.scheduler.step(epoch)
            rates[-1].append(engine.learning_rate(state))
    assert rates[0] == rates[1]
    with pytest.raises(SystemExit):
        engine.get_parser('', main_deit.RECIPE).parse_args(['--help'])
    assert re.search(r'--cooldown-epochs \S+\s+accepted without effect', capsys.readouterr().out)


@pytest.mark.parametrize(
    'epochs, warmup, says',
    [
        (5, 5, 'from 1e-06 to 0.0003 and never reaches 0.0005; use --warmup-epochs 0'),
        (20, 40, 'from 1e-06 to 0.000226 and never reaches 0.0005; use --warmup-epochs 2'),
        (2, 1, 'from 1e-06 to 1e-06 and never reaches'),
        (7, 5, ''),
        (5, 0, ''),
    ],
)
def test_a_warmup_that_outlasts_the_run_is_said(capsys, epochs, warmup, says):
    state = new_state('--epochs', epochs, '--warmup-epochs', warmup)
    printed = capsys.readouterr().out
    assert says in printed if says else 'warning' not in printed
    rates = [1e-6]
    for epoch in range(epochs - 1):
        state.scheduler.step(epoch)
        rates.append(engine.learning_rate(state))
    assert (max(rates) < 0.8 * 5e-4) == bool(says), 'of 7 epochs with 5 of warm-up, one has 0.8 of the rate'


def test_a_warmup_as_long_as_a_run_of_updates_is_said(capsys):
    loader = DataLoader([0] * 20, batch_size=5)
    for epochs, said in ((3, True), (4, False)):
        new_state('--epochs', epochs, '--warmup-epochs', 3, '--sched-on-updates', loader=loader)
        assert ('never reaches' in capsys.readouterr().out) == said


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
        args = engine.get_parser('', recipe).parse_args(['--resume', 'c.pth'])
        assert engine.pick_precision(args.precision, device, args.amp) == expected
        # A run with TF32 is evaluated anywhere, where there is none in plain float32.
        for trained, evaluated in ((None, 'fp32'), ('bf16', 'bf16'), ('tf32', 'tf32' if levit == 'tf32' else 'fp32')):
            restored = checkpoint.restore_model_args(args, {'args': {'precision': trained}})
            assert engine.pick_precision(restored.precision, device, restored.amp) == evaluated
        assert engine.pick_precision('fp32', device, args.amp) == 'fp32', 'asked for'
    if levit == 'tf32':
        assert engine.pick_precision('tf32', device) == 'tf32'
    else:
        with pytest.raises(InputError, match='tf32 is a mode of NVIDIA GPUs since Ampere, the device is .*use fp32'):
            engine.pick_precision('tf32', device)


@pytest.mark.filterwarnings('error')
def test_tf32_is_a_switch_of_products_and_convolutions():
    try:
        for precision, matmul in (('tf32', 'high'), ('bf16', 'highest'), ('fp32', 'highest')):
            for name in ('cuda', 'cpu'):
                engine.set_backends(precision, torch.device(name))
                assert torch.get_float32_matmul_precision() == matmul
                # The compiler reads these older names.
                assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == 'tf32')
                assert torch.backends.cudnn.benchmark == (name == 'cuda')
        assert engine.make_autocast('tf32', torch.device('cpu')).keywords == {'dtype': None, 'enabled': False}
    finally:
        engine.set_backends('fp32', torch.device('cpu'))


# --- one process


def test_the_average_follows_the_schedule_of_its_model(script, flags, monkeypatch):
    seen = []

    def evaluate(model, loader, autocast, name='Test'):
        seen.append((name, engine.describe_schedule(model)))
        return {'acc1': 0.0}

    monkeypatch.setattr(engine, 'evaluate', evaluate)
    script('main_deit', *flags, '--epochs', 3, '--prune-warmup-epoch', 1, '--stage-epoch', 2, '--eval-ema')
    expected = ['all patches', 'layer-wise', 'stage-wise']
    assert seen == [(name, schedule) for schedule in expected for name in ('Test', 'Test of the EMA')]


@pytest.mark.parametrize('schedule', [[], ['--sched-on-updates']])
def test_training_resumes_and_evaluates_to_the_logged_accuracy(script, flags, tmp_path, schedule):
    recipe = ['--epochs', 3, '--lr', 0.01, '--warmup-epochs', 1, '--model-ema-decay', 0.9, '--eval-ema']
    flags = [*flags, *schedule, *recipe]
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    printed = script('main_deit', *flags, '--output_dir', whole)
    assert 'evo_deit_nano_patch4_32' in printed and '{' not in printed
    assert '16 x 1 accumulated x 1 processes = 16 images' in printed and 'cpu, fp32' in printed
    log = read_log(whole)
    assert [line['epoch'] for line in log] == [0, 1, 2]
    assert [line['selection'] for line in log] == ['layer-wise', 'layer-wise', 'stage-wise']
    needed = {'train_loss', 'train_lr', 'test_loss', 'test_acc1', 'test_acc5', 'epoch', 'n_parameters', 'test_ema_acc1'}
    assert all(needed <= set(line) for line in log)

    # A run that ended early goes on as if it had not. What a crash left of a line is no line of the log.
    stop_after(1, script, *flags, '--output_dir', parts)
    first = weights.read_checkpoint(parts / 'checkpoint.pth')
    (parts / 'log.txt').write_text((parts / 'log.txt').read_text() + '{"epoch": 1, "torn')
    command = [*flags, '--eval', '--resume', parts / 'checkpoint.pth', '--batch-size', 7]
    printed = script('main_deit', *command)
    assert 'layer-wise' in printed and accuracy(printed) == f'{log[0]["test_acc1"]:.3f}'
    script('main_deit', *flags, '--output_dir', parts, '--resume', parts / 'checkpoint.pth')
    one, two = (weights.read_checkpoint(folder / 'checkpoint.pth') for folder in (whole, parts))
    assert first['epoch'] == 0 and one['epoch'] == two['epoch'] == 2
    for name in ('model', 'model_ema'):
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name])
        assert not torch.equal(one[name]['head.weight'], first[name]['head.weight'])
    assert str(one['optimizer']) == str(two['optimizer'])
    assert [(a['train_loss'], a['train_lr']) for a in read_log(parts)] == [
        (a['train_loss'], a['train_lr']) for a in log
    ]

    for which, key in (([], 'test_acc1'), (['--eval-ema'], 'test_ema_acc1')):
        printed = script('main_deit', *flags[:-1], '--eval', '--resume', whole / 'checkpoint.pth', *which)
        assert accuracy(printed) == f'{log[-1][key]:.3f}'


def stop_after(epochs, script, *flags):
    """Run as if the process had ended after so many epochs."""

    class Stop(Exception):
        pass

    def save_and_stop(folder, state, best=False, save=output.RunFolder.save):
        save(folder, state, best)
        if state.epoch == epochs:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(output.RunFolder, 'save', save_and_stop)
        script('main_deit', *flags)


def test_row_26_the_best_is_remembered(script, flags, tmp_path, monkeypatch):
    accuracies = iter([50.0, 40.0, 45.0, float('nan'), 60.0])

    def evaluate(model, loader, autocast, name='Test'):
        return {'acc1': next(accuracies), 'acc5': 0.0, 'loss': float('nan')}

    monkeypatch.setattr(engine, 'evaluate', evaluate)
    flags = [*flags, '--epochs', 5, '--output_dir', tmp_path]
    stop_after(2, script, *flags)
    script('main_deit', *flags, '--resume', tmp_path / 'checkpoint.pth')
    assert [line['best_acc1'] for line in read_log(tmp_path)] == [50.0, 50.0, 50.0, 50.0, 60.0]
    assert read_log(tmp_path)[3]['test_acc1'] is None
    assert weights.read_checkpoint(tmp_path / 'best_checkpoint.pth')['epoch'] == 4


def test_evaluation_is_rare_and_then_frequent(script, flags, tmp_path):
    script('main_deit', *flags, '--epochs', 7, '--eval-interval', 2, '--output_dir', tmp_path)
    assert [line['epoch'] for line in read_log(tmp_path) if 'test_acc1' in line] == [1, 3, 5, 6]


def test_the_stage_epoch_is_a_share_of_the_run(script, flags, tmp_path):
    script('main_deit', *flags, '--epochs', 6, '--prune-warmup-epoch', 1, '--output_dir', tmp_path)
    assert [line['selection'] for line in read_log(tmp_path)] == [
        'all patches',
        *['layer-wise'] * 3,
        *['stage-wise'] * 2,
    ]


def test_published_checkpoints_go_on_and_are_evaluated(script, flags, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('evo_deit_nano_patch4_32', num_classes=4)
    published = {
        'model': model.to_published(model.state_dict()),
        'epoch': 1,
        'args': Namespace(model='x', output_dir=Path('a')),
    }
    published['optimizer'] = {'state': {}, 'param_groups': []}
    torch.save(published, tmp_path / 'published.pth')
    printed = script('main_deit', *flags, '--eval', '--resume', tmp_path / 'published.pth')
    assert '(30 images)' in printed
    out = tmp_path / 'out'
    printed = script('main_deit', *flags, '--epochs', 4, '--resume', tmp_path / 'published.pth', '--output_dir', out)
    assert 'no averaged weights' in printed and 'the optimizer starts anew' in printed
    assert [line['epoch'] for line in read_log(out)] == [2, 3]
    # The rate is that of the epoch, not of a new run: here the second and third of five warm-up epochs.
    assert [line['train_lr'] for line in read_log(out)] == pytest.approx(
        [1e-6 + i * (5e-4 / 32 - 1e-6) / 5 for i in (1, 2)]
    )


def test_row_25_finetuning_replaces_the_head_and_trains_both(script, flags, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('evo_deit_nano_patch4_32', num_classes=7, img_size=16)
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pth')
    printed = script(
        'main_deit', *flags, '--epochs', 1, '--lr', 1, '--finetune', tmp_path / 'w.pth', '--output_dir', tmp_path
    )
    assert re.search(r'new in the model: head.*head_cls.*not used of the file: ', printed)
    trained = weights.read_checkpoint(tmp_path / 'checkpoint.pth')
    state = trained['optimizer']['state']
    assert len(state) == len(list(model.parameters()))
    torch.save(timm.create_model('evo_deit_nano_patch4_32', num_classes=7).state_dict(), tmp_path / 'seven.pth')
    with pytest.raises(InputError, match='7 classes, the model 4.*\nTo start training .*--finetune'):
        script('main_deit', *flags, '--resume', tmp_path / 'seven.pth')
    with pytest.raises(InputError, match='seven.pth has 7 classes and does not name them, .*val holds 4 class folders'):
        script('main_deit', *flags, '--eval', '--resume', tmp_path / 'seven.pth')


def test_classes_go_by_name(script, flags, tmp_path, image_folder):
    recipe = ['--epochs', 1, '--lr', 0.05, '--warmup-epochs', 0]
    script('main_deit', *flags, *recipe, '--output_dir', tmp_path)
    path = tmp_path / 'checkpoint.pth'
    content = weights.read_checkpoint(path)
    assert content['classes'] == [f'class{i}' for i in range(4)]

    # The same images, whose folders and names in the checkpoint sort in another order.
    names = ['pear', 'apple', 'fig', 'date']
    torch.save(content | {'classes': names}, tmp_path / 'renamed.pth')
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        for i, name in enumerate(names):
            (tmp_path / split / name).symlink_to(image_folder / split / f'class{i}')
    log = read_log(tmp_path)[0]
    last = f'Acc@1 {log["test_acc1"]:.3f} Acc@5 {log["test_acc5"]:.3f} loss {log["test_loss"]:.3f}'
    evaluate = [*flags[:-1], tmp_path, '--eval', '--resume', tmp_path / 'renamed.pth']
    assert last in script('main_deit', *evaluate)
    del content['classes']
    torch.save(content, tmp_path / 'nameless.pth')  # which goes by order, and so is wrong here, but says so
    printed = script('main_deit', *evaluate, '--resume', tmp_path / 'nameless.pth')
    assert 'does not name its 4 classes' in printed and last not in printed

    again = [*flags[:-1], tmp_path, *recipe, '--resume', path]
    with pytest.raises(InputError, match='trained on other classes: the data lacks 4 .class0.* others .apple, '):
        script('main_deit', *again)
    assert 'trained on other classes: the data lacks 4' in script('main_deit', *again, '--accept-changes')

    (tmp_path / 'val' / 'fig').unlink()
    assert 'no images of 1 of 4 classes: fig' in script('main_deit', *evaluate)
    (tmp_path / 'val' / 'plum').symlink_to(image_folder / 'val' / 'class2')
    with pytest.raises(InputError, match='1 classes that training lacks: plum'):
        script('main_deit', *evaluate)


def test_preprocessing_is_recalled_from_the_training(script, flags, tmp_path):
    more = ['--mean', 0.3, '--std', 0.4, '--crop-pct', 0.5]
    script('main_deit', *flags, *more, '--epochs', 1, '--lr', 0.05, '--warmup-epochs', 0, '--output_dir', tmp_path)
    printed = script('main_deit', *flags, '--eval', '--resume', tmp_path / 'checkpoint.pth')
    assert 'crop_pct 0.5 (center), bicubic, mean 0.3 0.3 0.3, std 0.4 0.4 0.4' in printed
    assert f'loss {read_log(tmp_path)[0]["test_loss"]:.3f}' in printed


@pytest.mark.parametrize('name, folds', [('levit_128s', True), ('resnet10t', False)])
def test_timm_models_are_folded_or_it_is_said(script, flags, tmp_path, name, folds):
    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=4).state_dict(), tmp_path / 'w.pth')
    evaluate = [*flags, '--model', name, '--input-size', 224, '--eval', '--resume', tmp_path / 'w.pth']
    folded, seen = engine.fuse, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, 'fuse', lambda model: (folded(model), seen.append(len(model.state_dict()))))
        printed = script('main_deit', *evaluate, '--fuse')
    assert (seen[0] < len(timm.create_model(name).state_dict())) == folds
    assert ('has nothing that can be folded' in printed) != folds
    assert re.search(r'Acc@1 .*', printed)[0] == re.search(r'Acc@1 .*', script('main_deit', *evaluate))[0]


@pytest.mark.parametrize(
    'name, script_name', [('evo_deit_nano_patch4_32', 'main_deit'), ('EvoLeViT_128S', 'main_levit')]
)
def test_channels_last_trains_to_the_same_weights(script, flags, tmp_path, name, script_name):
    torch.manual_seed(0)
    torch.save(timm.create_model('regnety_002', num_classes=4).state_dict(), tmp_path / 't.pth')
    own = ['--model', name, '--input-size', 32 if 'nano' in name else 64, '--epochs', 1, '--opt', 'sgd', '--lr', 0.1]
    distil = ['--distillation-type', 'soft', '--teacher-model', 'regnety_002', '--teacher-path', tmp_path / 't.pth']
    more = ['--warmup-lr', 0.01, '--output_dir']
    for folder, last in (('contiguous', []), ('last', ['--channels-last'])):
        script(script_name, *flags, *own, *distil, *last, *more, tmp_path / folder)
    one, two = (weights.read_checkpoint(tmp_path / folder / 'checkpoint.pth') for folder in ('contiguous', 'last'))
    for part in ('model', 'model_ema'):
        for key, value in one[part].items():
            torch.testing.assert_close(value, two[part][key], rtol=1e-4, atol=1e-5)
    convolution = next(value for value in two['model'].values() if value.ndim == 4)
    assert convolution.is_contiguous(memory_format=torch.channels_last) and not convolution.is_contiguous()


@pytest.mark.parametrize('name, size', [('evo_deit_nano_patch4_32', 32), ('EvoLeViT_128S', 64)])
def test_channels_last_logits_are_those_of_the_usual_order(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size).eval()
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = model(images)
        found = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def plain():
    """A plain ViT of Nano's size with random weights that matter, for 4 classes."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, num_heads=2, num_classes=4).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def test_a_plain_vit_is_evaluated_from_its_class_token(script, flags, tmp_path, plain, monkeypatch):
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    x, evaluated = torch.randn(2, 3, 32, 32), []
    monkeypatch.setattr(engine, 'evaluate', lambda model, *_: evaluated.append(model.eval()) or {})
    for name, more in (('plain.pth', []), ('plain.safetensors', []), ('plain.pth', ['--fuse'])):
        printed = script('main_deit', *flags, '--keep-ratio', 1, '--eval', '--resume', tmp_path / name, *more)
        assert 'predicts from its class token' in printed and 'evolved without training' in printed
        assert 'taken for a finished model' not in printed
        with torch.no_grad():
            torch.testing.assert_close(evaluated.pop()(x), plain(x))
    with pytest.raises(InputError, match='has no norm_cls.*, which training needs.*--finetune'):
        script('main_deit', *flags, '--resume', tmp_path / 'plain.pth')


@pytest.mark.parametrize('head', [True, False])
def test_finetuning_says_what_is_new_and_what_is_a_copy(script, flags, tmp_path, plain, head):
    state = {k: v for k, v in plain.state_dict().items() if head or not k.startswith('head')}
    save_file(state, tmp_path / 'w.safetensors')
    printed = script(
        'main_deit', *flags, '--epochs', 1, '--finetune', tmp_path / 'w.safetensors', '--output_dir', tmp_path
    )
    new = 'nothing' if head else 'head.bias, head.weight, head_cls.bias, head_cls.weight'
    copies = 'norm_cls.weight, norm_cls.bias' + (', head_cls.weight, head_cls.bias' if head else '')
    assert f'new in the model: {new}; copies in the model: {copies}; not used of the file: nothing' in printed
    assert ('head reads the mean of the patches' in printed) == head
    saved = weights.read_checkpoint(tmp_path / 'checkpoint.pth')['model']['_extra_state']
    assert saved.tolist() == [True, True, 0]  # the mean of the patches


def test_a_dense_vit_is_finetuned_to_other_classes_at_another_size(script, flags, tmp_path):
    small = ['--model', 'vit_tiny_patch16_224', '--drop-path', 0]
    torch.save(timm.create_model('vit_tiny_patch16_224', img_size=48, num_classes=7).state_dict(), tmp_path / 'w.pth')
    printed = script('main_deit', *flags, *small, '--epochs', 1, '--finetune', tmp_path / 'w.pth')
    assert 'new in the model: head.bias, head.weight; not used of the file: head.weight, head.bias' in printed
    assert 'Epoch 0 done' in printed


def test_an_evolved_vit_is_finetuned_resumed_and_evaluated(script, flags, tmp_path, monkeypatch):
    evaluate, results = engine.evaluate, []
    monkeypatch.setattr(engine, 'evaluate', lambda *args: results.append(evaluate(*args)) or results[-1])
    small = [*flags, '--model', 'vit_tiny_patch16_224', '--lr', 0.02, '--warmup-epochs', 0]
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', img_size=48, num_classes=7)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    evolved = [*small, '--evolve', '--stages', 3, 9, '--keep-ratio', 0.5, 0.25, '--epochs', 2]
    for name, schedule, more in (('a', 'stage-wise', []), ('b', 'layer-wise', ['--stage-epoch', 2])):
        path = tmp_path / name / 'checkpoint.pth'
        run = [*evolved, *more, '--output_dir', tmp_path / name]
        stop_after(1, script, *run, '--finetune', tmp_path / 'w.pth')
        script('main_deit', *run, '--resume', path)
        log = read_log(tmp_path / name)
        assert [line['selection'] for line in log] == [schedule] * 2
        saved = weights.read_checkpoint(path)['schedule']
        assert (saved['stages'], saved['keep_ratio'], saved['stage_wise']) == ([3, 9], [0.5, 0.25], name == 'a')
        # Neither --evolve nor the rest of the schedule has to be given again.
        printed = script('main_deit', *small, '--eval', '--resume', path)
        assert 'nearest, keeps 0.5 from block 3 and 0.25 from block 9' in printed and 'plain' not in printed
        assert (', layer-wise, ' in printed) == (schedule == 'layer-wise')
        assert results[-1]['loss'] == log[1]['test_loss'] and results[-1]['acc1'] == log[1]['test_acc1']
        script('main_deit', *small, '--eval', '--resume', path, '--keep-ratio', 1)
        assert results[-1]['loss'] != log[1]['test_loss']


def test_a_plain_vit_is_evaluated_evolved(script, flags, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=4).state_dict(), tmp_path / 'w.pth')
    evaluate = [*flags, '--model', 'vit_tiny_patch16_224', '--eval', '--resume', tmp_path / 'w.pth']
    plain = re.search(r'Acc@1 .*', script('main_deit', *evaluate))[0]
    printed = script('main_deit', *evaluate, '--evolve', '--keep-ratio', 1)
    assert 'weights of a plain ViT' in printed and plain in printed
    printed = script('main_deit', *evaluate, '--evolve')
    assert 'nearest, keeps 0.7 from block 4 and 0.3 from block 8' in printed and plain not in printed


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
    assert '30 images choose --stages 3 9 --keep-ratio 0.5 0.25' in printed and fitted == [30]
    evaluate = [*flags, '--model', 'vit_tiny_patch16_224', '--eval', '--resume', tmp_path / 'run' / 'checkpoint.pth']
    kept = 'nearest, keeps 0.5 from block 3 and 0.25 from block 9'
    assert kept in script('main_deit', *evaluate) and fitted == [30]
    # Images that would choose otherwise do not change a run that goes on.
    monkeypatch.setattr(models, 'fit_schedule', lambda model, images: models.evolve(model, (0.9, 0.8), (2, 4)))
    script('main_deit', *small, *fit_flags, '--epochs', 2, '--auto-resume')
    assert kept in script('main_deit', *evaluate)
    refit = [*evaluate, '--evolve', '--fit-schedule', image_folder / 'val']
    assert '30 images choose --stages 2 4 --keep-ratio 0.9 0.8' in script('main_deit', *refit)
    (tmp_path / 'empty').mkdir()
    for wrong, message in (
        ([*fit_flags, '--keep-ratio', 0.5], '--fit-schedule needs --evolve, and no --keep-ratio'),
        (fit_flags[1:], '--fit-schedule needs --evolve'),
        (['--evolve', '--fit-schedule', tmp_path / 'empty', *fit_flags[-2:]], 'found 0 in'),
    ):
        with pytest.raises(InputError, match=message):
            script('main_deit', *small, '--overwrite', *wrong)


def test_results_say_which_method_they_are_of(script, flags, tmp_path):
    torch.save(timm.create_model('test_vit', img_size=32, num_classes=4).state_dict(), tmp_path / 'w.pth')
    evaluate = [*flags, '--model', 'test_vit', '--eval', '--resume', tmp_path / 'w.pth']
    evaluate += ['--results-file', tmp_path / 'results.json']
    said = {
        'drop': 'test_vit, drop, keeps 0.7 from block 1, 0.49 from block 3 and 0.343 from block 4, 0.00095 of 0.0014 ',
        'merge': 'test_vit, merge, 8 patches fewer after each block, ',
        'merge_norm': 'test_vit, merge_norm, 8 patches fewer after each block, ',
        None: 'test_vit, dense, 0.0014 GMACs, 32 px\n',
    }
    for method, words in (
        ('drop', 'drop, stage-wise'),
        ('merge', 'merge'),
        ('merge_norm', 'merge_norm'),
        (None, 'no selection'),
    ):
        assert said[method] in script('main_deit', *evaluate, *(['--method', method] if method else []))
        results = json.loads((tmp_path / 'results.json').read_text())
        assert (results['method'], results['selection']) == (method, words)
    assert results['schedule'] is None


def test_weights_alone_in_safetensors_start_training_and_are_evaluated(script, flags, tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model('evo_deit_nano_patch4_32', num_classes=4).state_dict(), tmp_path / 'w.safetensors')
    printed = script('main_deit', *flags, '--epochs', 1, '--resume', tmp_path / 'w.safetensors')
    assert 'holds weights alone; training starts with them at epoch 0' in printed and 'Epoch 0 done' in printed
    printed = script('main_deit', *flags, '--eval', '--resume', tmp_path / 'w.safetensors')
    assert '(30 images)' in printed and 'class token' not in printed


def test_the_advice_at_the_end_of_a_run_works(script, flags, tmp_path):
    flags = [*flags, '--output_dir', tmp_path]
    script('main_deit', *flags, '--epochs', 1)
    again = [*flags, '--resume', tmp_path / 'checkpoint.pth']
    assert 'to train on, give a larger --epochs\n' in script('main_deit', *again, '--epochs', 1)
    printed = script('main_deit', *again, '--epochs', 2)
    assert 'epochs was 1, now 2: from here on the schedules are those of 2 epochs' in printed
    assert 'Epoch 1 done' in printed
    with pytest.raises(InputError, match='epochs +2 +1\n.*--accept-changes'):
        script('main_deit', *again, '--epochs', 1)


@pytest.mark.parametrize('saved, now', [('nearest', 'nearest'), (True, 'one'), (False, 'none')])
def test_evaluation_restores_the_model_of_the_training(capsys, saved, now):
    trained = {'keep_ratio': [0.25], 'representative': saved, 'input_size': 48, 'evolve': True, 'stages': [3, 5]}
    args = engine.get_parser('', {}).parse_args(['--resume', 'c.pth'])
    before = dict(vars(args))
    restored = checkpoint.restore_model_args(args, {'args': trained})
    assert trained.pop('evolve') and restored.method == 'evolve'  # its name today
    assert {name: getattr(restored, name) for name in trained} == trained | {'representative': now}
    assert vars(args) == before and not capsys.readouterr().out
    args.input_size = 32
    assert checkpoint.restore_model_args(args, {'args': trained}).input_size == 32
    assert 'c.pth was trained with input_size 48, and is evaluated with 32' in capsys.readouterr().out
    checkpoint.restore_model_args(args, {'model': {}})  # holds no flags, so none differ
    assert 'trained with' not in capsys.readouterr().out


def test_another_method_begins_with_its_own_schedule():
    """Two keep ratios of `evolve` mean something else to `drop`, and nothing to `merge`."""
    args = engine.get_parser('', {}).parse_args(['--resume', 'c.pth', '--method', 'drop'])
    trained = dict(method='evolve', keep_ratio=[0.7], stages=[4, 8], representative='one', model_kwargs={'depth': 9})
    restored = checkpoint.restore_model_args(args, {'args': trained})
    assert (restored.keep_ratio, restored.stages, restored.representative) == (None, None, None)
    assert restored.model_kwargs == {'depth': 9}
    args.keep_ratio = [0.5]
    assert checkpoint.restore_model_args(args, {'args': trained}).keep_ratio == [0.5]
    args.method, args.keep_ratio = 'evolve', None
    assert checkpoint.restore_model_args(args, {'args': trained}).stages == [4, 8]


def test_flags_that_an_older_checkpoint_does_not_name_are_compared():
    flags = vars(engine.get_parser('', main_deit.RECIPE).parse_args(['--evolve', '--model-kwargs', 'depth=9']))
    older = {name: value for name, value in flags.items() if name not in checkpoint.NEWER_FLAGS}
    with pytest.raises(InputError, match=r'method +None +evolve\n +model_kwargs +None +.*depth'):
        checkpoint.compare_flags({'args': older}, 'c.pth', flags, engine.MAY_CHANGE, False)


def test_what_a_model_began_with_does_not_matter_to_a_resume():
    flags = vars(engine.get_parser('', main_deit.RECIPE).parse_args([]))
    before = {'args': flags | {'pretrained': True, 'finetune': 'w.pth'}}
    assert checkpoint.compare_flags(before, 'c.pth', flags, engine.MAY_CHANGE, False) == {'pretrained', 'finetune'}


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_distillation_through_the_real_loading(script, flags, tmp_path, kind):
    teacher = timm.create_model('regnety_002', num_classes=4)
    torch.save({'model': teacher.state_dict()}, tmp_path / 't.pth')
    save_file(teacher.state_dict(), tmp_path / 't.safetensors')
    distil = ['--distillation-type', kind, '--teacher-model', 'regnety_002', '--teacher-path']
    printed = script('main_deit', *flags, '--epochs', 1, *distil, tmp_path / 't.pth')
    assert f'teacher: regnety_002, {kind}' in printed and 'done' in printed
    assert 'done' in script('main_deit', *flags, '--epochs', 1, *distil, tmp_path / 't.safetensors')
    torch.save({'model': timm.create_model('regnety_002', num_classes=5).state_dict()}, tmp_path / 't5.pth')
    with pytest.raises(InputError, match='--teacher-path.*5 classes, the model 4.*\n.*main_deit.py --model') as error:
        script('main_deit', *flags, *distil, tmp_path / 't5.pth')
    assert losses.PUBLISHED_TEACHER not in str(error.value)  # it knows the 1,000 classes of ImageNet
    assert losses.PUBLISHED_TEACHER in losses.advise_teacher('regnety_160', 1000)
    with pytest.raises(InputError, match='--teacher-path .*is not a file'):
        script('main_deit', *flags, *distil, tmp_path / 'none.pth')
    with pytest.raises(InputError, match='needs --teacher-path'):
        script('main_deit', *flags, *distil[:-1])


def test_evaluation_recalls_the_model_that_was_trained(script, flags, tmp_path):
    own = ['--keep-ratio', 0.1, '--representative', '--precision', 'bf16', '--lr', 0.05, '--warmup-epochs', 0]
    script('main_deit', *flags, *own, '--epochs', 1, '--output_dir', tmp_path)
    evaluate = [*flags, '--eval', '--resume', tmp_path / 'checkpoint.pth']
    printed = script('main_deit', *evaluate)
    log = read_log(tmp_path)[0]
    assert (
        'cpu, bf16' in printed
        and f'Acc@1 {log["test_acc1"]:.3f}' in printed
        and f'loss {log["test_loss"]:.3f}' in printed
    )
    printed = script('main_deit', *evaluate, '--keep-ratio', 1)
    assert 'trained with keep_ratio [0.1], and is evaluated with [1.0]' in printed
    assert f'loss {log["test_loss"]:.6f}' != re.findall(r'loss (\S+)', printed)[-1]


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


def test_an_evaluation_says_what_runs_and_how_far_it_is(script, flags, tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(timm.create_model('deit_tiny_patch16_224', num_classes=4).state_dict(), tmp_path / 'w.pth')
    monkeypatch.setattr(engine, 'PROGRESS_SECONDS', 0)
    model = ['--model', 'deit_tiny_patch16_224', '--input-size', 224, '--batch-size', 16]
    evaluate = [*flags, *model, '--eval', '--resume', tmp_path / 'w.pth', '--evolve']
    printed = script('main_deit', *evaluate)
    line = 'deit_tiny_patch16_224, nearest, keeps 0.7 from block 4 and 0.3 from block 8, (.*) of 1.25 GMACs, 224 px\n'
    assert 0.8 < float(re.search(line, printed)[1]) < 0.9
    assert re.search(r'Test: \[1/2\]  [\d.]+ img/s  eta: 0:00:\d\d\nTest: \[2/2\]', printed)


def test_an_average_alone_is_evaluated(script, flags, tmp_path):
    state = timm.create_model('evo_deit_nano_patch4_32', num_classes=4).state_dict()
    for key in ('model_ema', 'state_dict_ema'):
        torch.save({key: state}, tmp_path / 'c.pth')
        printed = script('main_deit', *flags, '--eval', '--resume', tmp_path / 'c.pth')
        assert 'c.pth has only averaged weights; these are loaded' in printed and '(30 images)' in printed
    torch.save({'ema': state}, tmp_path / 'c.pth')
    with pytest.raises(InputError, match='c.pth: expected weights, tensors by name; found ema'):
        script('main_deit', *flags, '--eval', '--resume', tmp_path / 'c.pth')


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


def test_weights_of_timm_are_evaluated_without_a_file(script, flags, monkeypatch):
    """--pretrained: the weights that timm downloads; here none are, and the model is built as it is."""
    monkeypatch.setattr(models, 'create', lambda *args, pretrained, **kwargs: timm.create_model(args[0], img_size=32))
    data = [*flags, '--model', 'test_vit.r160_in1k', '--eval', '--pretrained']
    with pytest.raises(InputError, match='1000 classes and does not name them'):
        script('main_deit', *data)  # these are four folders of other names
    with pytest.raises(InputError, match='--eval needs --resume with .*, or --pretrained'):
        script('main_deit', *data[:-1])


def test_a_transformer_teaches_at_any_size(script, flags, tmp_path):
    teacher = timm.create_model('vit_tiny_patch16_224', num_classes=4, img_size=32)
    torch.save(teacher.state_dict(), tmp_path / 't.pth')
    distil = [
        '--distillation-type',
        'hard',
        '--teacher-model',
        'vit_tiny_patch16_224',
        '--teacher-path',
        tmp_path / 't.pth',
    ]
    assert 'done' in script('main_deit', *flags, '--epochs', 1, *distil)


def test_evaluation_needs_only_the_validation_folder(script, flags, tmp_path, image_folder):
    torch.manual_seed(0)
    torch.save(timm.create_model('evo_deit_nano_patch4_32', num_classes=4).state_dict(), tmp_path / 'w.pth')
    (tmp_path / 'val').symlink_to(image_folder / 'val')
    printed = script('main_deit', *flags, '--data-path', tmp_path, '--eval', '--resume', tmp_path / 'w.pth')
    assert '(30 images)' in printed


def test_accumulated_batches_are_one_large_batch(script, flags, tmp_path):
    plain = ['--mixup', 0, '--cutmix', 0, '--drop-path', 0, '--epochs', 1, '--opt', 'sgd', '--lr', 1, '--no-model-ema']
    for name, more in (('one', ['--batch-size', 16]), ('two', ['--batch-size', 8, '--grad-accum-steps', 2])):
        script('main_deit', *flags, *plain, *more, '--output_dir', tmp_path / name)
    one, two = (weights.read_checkpoint(tmp_path / name / 'checkpoint.pth')['model'] for name in ('one', 'two'))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize('size', [224, 384])
def test_photograph_sizes_train(script, image_folder, size, tmp_path):
    name = f'evo_deit_small_patch16_{size}'
    flags = [
        '--model',
        name,
        '--input-size',
        size,
        '--batch-size',
        2,
        '--data-path',
        tmp_path,
        '--device',
        'cpu',
        '--num_workers',
        0,
    ]
    for split, count in (('train', 2), ('val', 1)):
        folder = tmp_path / split / 'only'
        folder.mkdir(parents=True)
        for path in sorted((image_folder / split).rglob('*.png'))[:count]:
            (folder / path.name).write_bytes(path.read_bytes())
    assert 'loss: ' in script('main_deit', *flags, '--epochs', 1)


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


@pytest.mark.parametrize('flag, lowest', [('--seed', 0), ('--epochs', 1), ('--eval-interval', 1), ('--batch-size', 1)])
def test_numbers_that_are_too_small(script, capfd, flag, lowest):
    with pytest.raises(SystemExit) as end:
        script('main_deit', flag, lowest - 1)
    assert end.value.code == 2
    assert f'error: argument {flag}: expected {lowest} or more, found {lowest - 1} ' in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops(script, flags, tmp_path):
    flags = [*flags, '--epochs', 2, '--output_dir', tmp_path, '--opt', 'sgd', '--lr', 1e30, '--warmup-lr', 1e30]
    with pytest.raises(InputError, match='the loss of rank 0 is nan in epoch 0, step .*--precision'):
        script('main_deit', *flags)
    assert not (tmp_path / 'checkpoint.pth').exists()


def test_a_wrong_flag_ends_a_script_without_a_traceback(tmp_path):
    ran = subprocess.run(
        [sys.executable, 'main_deit.py', '--eval', '--resume', 'https://127.0.0.1:9/x.pth', '--data-path', tmp_path],
        cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 2 and 'Traceback' not in ran.stderr and 'Acc@1' not in ran.stdout
    assert ran.stderr.startswith('main_deit.py: error: ')


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


def test_models_that_are_not_ours_train_too(script, flags):
    printed = script('main_deit', *flags, '--model', 'resnet10t', '--epochs', 1)
    assert 'resnet10t' in printed and 'done' in printed
    args = engine.get_parser('', main_deit.RECIPE).parse_args(['--model', 'vit_tiny_patch16_224', '--input-size', '32'])
    assert models.build(args, 3).patch_embed.num_patches == 4


@pytest.mark.parametrize('opt', ['lamb', 'adan'])
def test_optimizers_that_count_steps_in_their_groups_resume_exactly(script, flags, tmp_path, opt):
    recipe = [*flags, '--opt', opt, '--lr', 0.05, '--warmup-epochs', 0, '--no-model-ema', '--epochs', 2]
    script('main_deit', *recipe, '--output_dir', tmp_path / 'whole')
    source = tmp_path / 'whole' / 'checkpoint-0001-000000.pth'
    script('main_deit', *recipe, '--output_dir', tmp_path / 'resumed', '--resume', source)
    whole, resumed = (weights.read_checkpoint(tmp_path / name / 'checkpoint.pth') for name in ('whole', 'resumed'))
    assert all(torch.equal(value, resumed['model'][key]) for key, value in whole['model'].items())


@pytest.mark.parametrize('value', ['0', '-1'])
def test_clipping_needs_a_norm(script, flags, value, capfd):
    with pytest.raises(SystemExit):
        script('main_deit', *flags, '--clip-grad', value)
    assert 'expected a number above 0' in capfd.readouterr().err


# --- flags that are out of range, or would do nothing


@pytest.mark.parametrize(
    'flag, value, expected',
    [
        ('--start_epoch', -3, '0 or more'),
        ('--stage-epoch', -1, '0 or more'),
        ('--warmup-epochs', -1, '0 or more'),
        ('--local_rank', -2, '-1 or more'),
        ('--model-ema-decay', 2, 'a number from 0 to 1'),
        ('--weight-decay', -1, 'a number from 0'),
        ('--momentum', 1.5, 'a number from 0 to 1'),
        ('--opt-eps', 'nan', 'a number from 0'),
        ('--lr', 'inf', 'a number from 0'),
        ('--lr', -1, 'a number from 0'),
        ('--lr-noise', 2, 'a number from 0 to 1'),
        ('--decay-epochs', 0, 'a number above 0'),
        ('--dist-timeout', 0, 'a number above 0'),
        ('--distillation-alpha', 1.5, 'a number from 0 to 1'),
        ('--distillation-tau', 0, 'a number above 0'),
    ],
)
def test_numbers_out_of_range_end_at_the_flag(script, capfd, flag, value, expected):
    with pytest.raises(SystemExit) as end:
        script('main_deit', f'{flag}={value}')
    assert end.value.code == 2
    assert capfd.readouterr().err.startswith(
        f'main_deit.py: error: argument {flag}: expected {expected}, found {value}'
    )


@pytest.mark.parametrize(
    'useless, says',
    [
        (['--fuse'], '--fuse needs --eval'),
        (['--mixup-off-epoch', 1, '--mixup', 0, '--cutmix', 0], 'nothing to turn off'),
        (['--eval-ema', '--no-model-ema'], '--no-model-ema keeps none'),
        (['--start_epoch', 3, '--epochs', 3], '--start_epoch: expected less than --epochs 3, found 3'),
        (
            ['--distillation-type', 'hard'],
            'needs --teacher-path, the weights of --teacher-model regnety_160; .*https://',
        ),
        (['--overwrite', '--auto-resume', '--output_dir', 'OUT'], '--overwrite starts over, .*give one of them'),
        (['--overwrite', '--resume', 'OUT/checkpoint.pth', '--output_dir', 'OUT'], '--overwrite starts over'),
    ],
)
def test_flags_that_would_do_nothing_are_refused_at_once(script, tmp_path, monkeypatch, useless, says):
    monkeypatch.setattr(models, 'build', lambda *args: pytest.fail('the model was built'))
    (tmp_path / 'checkpoint.pth').touch()
    useless = [str(flag).replace('OUT', str(tmp_path)) for flag in useless]
    with pytest.raises(InputError, match=says):
        script('main_deit', *useless, '--data-path', tmp_path / 'nowhere')


def test_only_models_that_select_have_stages(script, flags):
    assert 'epochs 0 to 0, stage-wise from epoch 0\n' in script('main_deit', *flags, '--epochs', 1)
    assert 'epochs 0 to 0\n' in script('main_deit', *flags, '--model', 'resnet10t', '--epochs', 1)


def test_what_the_training_left_open_is_not_called_none(capsys):
    args = engine.get_parser('', {}).parse_args(['--resume', 'c.pth', '--keep-ratio', '0.5'])
    checkpoint.restore_model_args(args, {'args': {'keep_ratio': None}})
    said = "c.pth was trained with the model's own keep_ratio, and is evaluated with [0.5]"
    assert said in capsys.readouterr().out


def test_another_number_of_training_images_is_noticed(script, flags, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / 'images')
    recipe = [*flags[:-1], tmp_path / 'images', '--epochs', 2]
    script('main_deit', *recipe, '--output_dir', tmp_path / 'run')
    source = tmp_path / 'run' / 'checkpoint-0001-000000.pth'
    content = weights.read_checkpoint(source)
    next((tmp_path / 'images' / 'train' / 'class0').iterdir()).unlink()
    with pytest.raises(InputError, match=r'train_images +64 +63\n'):
        script('main_deit', *recipe, '--resume', source)
    assert 'Epoch 1 done' in script('main_deit', *recipe, '--resume', source, '--accept-changes')
    # Checkpoints did not always say how many there were.
    del content['args']['train_images']
    torch.save(content, tmp_path / 'older.pth')
    assert 'Epoch 1 done' in script('main_deit', *recipe, '--resume', tmp_path / 'older.pth')


# adahessian needs second derivatives; kron keeps counters outside its state; others need a GPU.
OPTIMIZERS = list_optimizers(exclude_filters=['adahessian', 'kron*', 'bnb*', 'fused*'])


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_every_optimizer_takes_its_own_state(opt):
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def begin() -> engine.State:
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 40)
        args = engine.get_parser('', {}).parse_args(['--opt', opt, '--lr', '0.1', '--warmup-epochs', '0'])
        return optim.build_state(args, torch.nn.Sequential(*layers), 'fp32', 512)

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
    args = engine.get_parser('', {}).parse_args(['--weight-decay', '0'])
    model = torch.nn.Linear(2, 2)
    saved = optim.build_state(args, model, 'fp32', 512).state_dict()
    for value, fits in (('0', True), ('0.05', False)):
        state = optim.build_state(engine.get_parser('', {}).parse_args(['--weight-decay', value]), model, 'fp32', 512)
        with nullcontext() if fits else pytest.raises(InputError, match='--weight-decay 0 and .*1e-12.*--finetune'):
            state.load(saved | {'epoch': 0}, 'c.pth', {'weight_decay'})


# --- flags that timm's scripts have too


@pytest.mark.parametrize('warmup', [0, 2])
@pytest.mark.parametrize('name', ['evo_deit_nano_patch4_32', 'EvoLeViT_128S', 'vit_tiny_patch16_224'])
def test_layer_decay_slows_early_layers(name, warmup):
    model = models.create(name, 4, 64)
    if name.startswith('vit'):
        model = models.evolve(model)
    flags = ['--model', name, '--layer-decay', '0.5', '--lr', '1', '--warmup-epochs', str(warmup), '--warmup-lr', '0.5']
    state = optim.build_state(engine.get_parser('', {}).parse_args(flags), model, 'fp32', 512)
    rates = {id(p): group['lr'] for group in state.optimizer.param_groups for p in group['params']}
    assert rates.keys() == {id(p) for p in model.parameters()}
    assert engine.learning_rate(state) == (0.5 if warmup else 1.0)
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


def test_layer_decay_trains_and_resumes_exactly(script, flags, tmp_path):
    recipe = [*flags, '--layer-decay', 0.7, '--lr', 0.05, '--warmup-epochs', 0, '--no-model-ema', '--epochs', 2]
    script('main_deit', *recipe, '--output_dir', tmp_path / 'whole')
    log = read_log(tmp_path / 'whole')
    assert log[0]['train_lr'] == pytest.approx(0.05 * 16 / 512)
    source = tmp_path / 'whole' / 'checkpoint-0001-000000.pth'
    script('main_deit', *recipe, '--output_dir', tmp_path / 'resumed', '--resume', source)
    whole, resumed = (weights.read_checkpoint(tmp_path / name / 'checkpoint.pth') for name in ('whole', 'resumed'))
    assert all(torch.equal(value, resumed['model'][key]) for key, value in whole['model'].items())


@pytest.mark.parametrize('stage_epoch', [0, 1])
@pytest.mark.parametrize(
    'model, blocks',
    [
        (['evo_deit_nano_patch4_32'], 'blocks'),
        (['EvoLeViT_128S', '--input-size', 64], 'stages.0.blocks'),
        (['vit_tiny_patch16_224', '--evolve'], 'blocks'),
        (['vit_tiny_patch16_224'], 'blocks'),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else '',
)
def test_gradient_checkpointing_runs_blocks_twice_to_the_same_weights(
    script, flags, tmp_path, monkeypatch, model, blocks, stage_epoch
):
    calls, build = [], models.build

    def count_calls(*args):
        network = build(*args)
        for module in dict(network.named_modules())[blocks].modules():
            module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        return network

    monkeypatch.setattr(models, 'build', count_calls)
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
    with pytest.raises(InputError, match='--grad-checkpointing: .* cannot do that'):
        script('main_deit', *flags, *model, *output, '--grad-checkpointing', '--epochs', 1)
    assert (tmp_path / 'log.txt').exists(), 'nothing is removed for a run that does not start'


def test_mixup_ends_at_an_epoch(script, flags, monkeypatch):
    seen, train_step = [], engine.train_step

    def spy(state, net, criterion, batches, *args, **kwargs):
        batches = list(batches)
        seen.append((state.epoch, batches[0][1].is_floating_point()))
        return train_step(state, net, criterion, batches, *args, **kwargs)

    monkeypatch.setattr(engine, 'train_step', spy)
    script('main_deit', *flags, '--epochs', 3, '--mixup-off-epoch', 1)
    assert set(seen) == {(0, True), (1, False), (2, False)}


def test_an_evaluation_writes_its_results(script, flags, tmp_path):
    script('main_deit', *flags, '--epochs', 1, '--lr', 0.05, '--warmup-epochs', 0, '--output_dir', tmp_path)
    path, source = tmp_path / 'results.json', tmp_path / 'checkpoint.pth'
    script('main_deit', *flags, '--eval', '--resume', source, '--results-file', path)
    results, log = json.loads(path.read_text()), read_log(tmp_path)[0]
    assert (results['method'], results['schedule']['keep_ratio']) == ('evolve', [0.5, 0.5])
    assert [results[name] for name in ('acc1', 'acc5', 'loss')] == [log[f'test_{n}'] for n in ('acc1', 'acc5', 'loss')]
    expected = dict(
        model='evo_deit_nano_patch4_32', checkpoint=str(source), images=30, input_size=32, precision='fp32', ema=False,
        selection='stage-wise', fused=False, parameters=log['n_parameters'],
    )  # fmt: skip
    assert {name: results[name] for name in expected} == expected
    assert results['versions'].keys() == {'python', 'torch', 'torchvision', 'timm'}
    # Half of the patches, from the fifth block on: less arithmetic than with all of them.
    script('main_deit', *flags, '--eval', '--resume', source, '--results-file', path, '--keep-ratio', 1)
    assert 0 < results['gmacs'] < json.loads(path.read_text())['gmacs'] < 1
    for wrong, says in (
        (['--results-file', path], '--results-file needs --eval'),
        (['--eval', '--resume', source, '--results-file', tmp_path / 'no' / 'r.json'], 'its folder does not exist'),
    ):
        with pytest.raises(InputError, match=says):
            script('main_deit', *flags, *wrong)


def test_tensorboard_shows_what_the_log_has(script, flags, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = [*flags, '--epochs', 3, '--tensorboard', '--output_dir', tmp_path]
    stop_after(2, script, *recipe)
    script('main_deit', *recipe, '--resume', tmp_path / 'checkpoint-0001-000000.pth')  # epoch 1 again
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
    monkeypatch.setattr(models, 'build', lambda *args: pytest.fail('the model was built'))
    with pytest.raises(InputError, match='--tensorboard: .*pip install tensorboard'):
        script('main_deit', *flags, '--tensorboard', '--output_dir', tmp_path)
    with pytest.raises(InputError, match='--tensorboard logs a training to --output_dir'):
        script('main_deit', *flags, '--tensorboard')
