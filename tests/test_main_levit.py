"""main_levit.py as its users run it."""

import pytest
import timm
import torch
from conftest import NANO, ROOT, accuracy, free_port, launch, read_log

from models import weights
from utils import InputError


@pytest.fixture(scope='module')
def flags(image_folder, tmp_path_factory):
    torch.manual_seed(0)
    teacher = timm.create_model('regnety_002', num_classes=4)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save({'model': teacher.state_dict()}, path)
    model = ['--model', 'EvoLeViT_128S', '--input-size', 64, '--data-path', image_folder]
    return [*NANO, *model, '--teacher-model', 'regnety_002', '--teacher-path', path]


def test_distributed_training_resumes_and_evaluates_to_the_logged_accuracy(script, flags, tmp_path):
    flags = [*flags, '--epochs', 2, '--stage-epoch', 1, '--output_dir', tmp_path, '--eval-interval', 1, '--lr', 5e-3]
    command = ['torch.distributed.launch', '--nproc_per_node=2', '--use_env', f'--master_port={free_port()}']
    # Every parameter gets a gradient in both schedules: DistributedDataParallel would stop otherwise.
    printed, _ = (running := launch(*command, 'main_levit.py', *flags)).communicate(timeout=240)
    assert running.returncode == 0, printed
    assert 'teacher: regnety_002, cls distillation' in printed
    log = read_log(tmp_path)
    assert [line['selection'] for line in log] == ['layer-wise', 'stage-wise']

    first = tmp_path / 'checkpoint-0001-000000.pth'
    for path, line in ((first, log[0]), (tmp_path / 'checkpoint.pth', log[1])):
        for fuse in ([], ['--fuse']):
            printed = script('main_levit', *flags, '--eval', '--resume', path, *fuse)
            assert (', layer-wise, ' in printed) == (path == first)
            assert accuracy(printed) == f'{line["test_acc1"]:.3f}'
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
        script('main_levit', *flags[:-4])
    command = ['torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}', ROOT / 'main_levit.py']
    printed, _ = launch(*command, '--teacher-path', 'no.pth').communicate(timeout=240)
    assert printed.count('no.pth is not a file') >= 2 and 'losses.py' not in printed, printed
    assert '--distillation-type none trains without a teacher' in printed
