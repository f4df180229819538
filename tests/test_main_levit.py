"""main_levit.py as its users run it, and that it needs nothing of its own."""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, accuracy, free_port, launch, read_log
from golden import fill

import engine
import main_levit
from models import weights
from utils import InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def flags(image_folder, tmp_path_factory):
    torch.manual_seed(0)
    teacher = timm.create_model('regnety_002', num_classes=4)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save({'model': teacher.state_dict()}, path)
    return [
        *('--model', 'EvoLeViT_128S', '--input-size', 64, '--batch-size', 16, '--num_workers', 0, '--device', 'cpu'),
        *('--teacher-model', 'regnety_002', '--teacher-path', path, '--data-path', image_folder, '--print-freq', 1),
    ]


def test_the_recipe_is_the_published_one():
    args = engine.get_parser('', main_levit.RECIPE).parse_args([])
    expected = dict(
        epochs=300, batch_size=256, lr=5e-4, opt='adamw', weight_decay=0.025, clip_grad=0.01, clip_mode='agc',
        drop_path=None, distillation_type='cls', distillation_alpha=0.5, teacher_model='regnety_160',
        teacher_path='./regnety_160-a5fe301d.pth', prune_warmup_epoch=0, eval_interval=20,
        amp=False, mixup=0.8,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    spelled = '--clip-grad 0.01 --clip-mode agc --prune-warmup-epoch 0 --teacher-path ./regnety_160-a5fe301d.pth'
    engine.get_parser('', main_levit.RECIPE).parse_args([*spelled.split(), '--distillation-type', 'cls'])


def test_weight_decay_is_as_published():
    published = json.loads((fill.HERE / 'recipe.json').read_text())['no_weight_decay']['EvoLeViT_128S']
    model = timm.create_model('EvoLeViT_128S')
    optimizer = timm.optim.create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.025)
    without = {id(p) for g in optimizer.param_groups if g['weight_decay'] == 0 for p in g['params']}
    names = model.to_published({key: p for key, p in model.state_dict(keep_vars=True).items() if key != '_extra_state'})
    doubled = {key for key in names if key.startswith('stage_blocks.')}
    assert {key for key, p in names.items() if id(p) in without} - doubled == set(published) - doubled


def test_distributed_training_resumes_and_evaluates_to_the_logged_accuracy(script, flags, tmp_path):
    flags = [*flags, '--epochs', 2, '--stage-epoch', 1, '--output_dir', tmp_path, '--eval-interval', 1, '--lr', 5e-3]
    command = ['torch.distributed.launch', '--nproc_per_node=2', '--use_env', f'--master_port={free_port()}']
    # Every parameter gets a gradient in both schedules: DistributedDataParallel would stop otherwise.
    printed, _ = (running := launch(*command, 'main_levit.py', *flags)).communicate(timeout=240)
    assert running.returncode == 0, printed
    assert 'teacher: regnety_002, cls distillation' in printed
    log = read_log(tmp_path)
    assert [line['selection'] for line in log] == ['layer-wise', 'stage-wise']

    evaluate = ['--eval', '--resume', tmp_path / 'checkpoint.pth']
    for fuse in ([], ['--fuse']):
        printed = script('main_levit', *flags, *evaluate, *fuse)
        assert ', layer-wise, ' not in printed and accuracy(printed) == f'{log[1]["test_acc1"]:.3f}'

    # The checkpoint before the stage-wise epoch, which is still there.
    first = tmp_path / 'checkpoint-0001-000000.pth'
    for fuse in ([], ['--fuse']):
        printed = script('main_levit', *flags, '--eval', '--resume', first, *fuse)
        assert ', layer-wise, ' in printed and accuracy(printed) == f'{log[0]["test_acc1"]:.3f}'
    printed = script('main_levit', *flags, '--resume', first)
    assert 'world_size was 2, now 1' in printed
    assert [line['epoch'] for line in read_log(tmp_path)] == [0, 1]


def test_without_a_teacher_and_without_selection_at_first(script, flags, tmp_path):
    flags = [*flags, '--distillation-type', 'none', '--epochs', 2, '--prune-warmup-epoch', 1, '--output_dir', tmp_path]
    script('main_levit', *flags)
    assert [line['selection'] for line in read_log(tmp_path)] == ['all patches', 'stage-wise']
    moments = weights.read_checkpoint(tmp_path / 'checkpoint.pth')['optimizer']['state']
    model = timm.create_model('EvoLeViT_128S', img_size=64, num_classes=4)
    assert len(moments) == len(list(model.parameters()))


def test_a_missing_teacher_says_where_it_is(script, flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r'--teacher-path \./regnety_160-a5fe301d.pth: .*is not a file.*https://'):
        script('main_levit', *flags[:10], '--data-path', flags[-3])
    command = ['torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}', ROOT / 'main_levit.py']
    printed, _ = launch(*command, '--teacher-path', 'no.pth').communicate(timeout=240)
    assert printed.count('no.pth is not a file') >= 2 and 'losses.py' not in printed, printed
    assert '--distillation-type none trains without a teacher' in printed
