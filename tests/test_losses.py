"""The criterion against the original code, and how often it asks the teacher."""

import json
import re
from collections import namedtuple
from contextlib import nullcontext
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import arguments
from golden import fill
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms.functional import normalize

import datasets
import losses
import main_levit
import networks
from losses import Criterion

RECIPE = json.loads((fill.HERE / 'recipe.json').read_text())['losses']
NAMES = {'avg': 'head', 'avg_dist': 'head_dist', 'cls': 'head_cls', 'cls_dist': 'head_cls_dist'}


def logits(name: str) -> torch.Tensor:
    return torch.from_numpy(fill.rng(f'golden/loss/{name}').standard_normal((RECIPE['batch'], RECIPE['classes'])) * 2)


def targets(kind: str) -> torch.Tensor:
    if kind == 'SoftTargetCrossEntropy':
        return torch.from_numpy(
            fill.rng('golden/loss/soft').standard_normal((RECIPE['batch'], RECIPE['classes']))
        ).softmax(1)
    return torch.from_numpy(fill.rng('golden/loss/labels').integers(0, RECIPE['classes'], RECIPE['batch']))


class Teacher(nn.Module):
    """Says the golden logits, and counts how often it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, images):
        self.asked += 1
        return logits('teacher')


@pytest.mark.parametrize(
    'row', RECIPE['rows'], ids=lambda row: f'{row["case"]}, {row["criterion"]}, {row.get("alpha")}'
)
def test_losses_are_as_published(row):
    heads = re.search(r'\((.*)\)', row['case'])[1].split(', ')
    outputs = namedtuple('Heads', [NAMES[h] for h in heads])(*map(logits, heads))
    smoothing = 0.1 if 'Smoothing' in row['criterion'] else 0.0
    teacher = Teacher() if 'distillation' in row['case'] and 'without' not in row['case'] else None
    criterion = Criterion(smoothing, teacher, 'hard' in row['case'], row.get('alpha', 0.5), row.get('tau', 1.0))
    loss = criterion(None, outputs, targets(row['criterion']))
    assert loss.item() == pytest.approx(row['loss'], abs=1e-6)
    assert teacher is None or teacher.asked == 1


def test_one_output_and_all_heads_without_teacher():
    y, named = targets('labels'), namedtuple('Heads', NAMES.values())
    each = [Criterion()(None, logits(name), y) for name in NAMES]
    together = Criterion()(None, named(*map(logits, NAMES)), y)
    torch.testing.assert_close(together, sum(each) / 4)
    assert Criterion()(None, logits('avg').bfloat16(), y).dtype == torch.float32  # whatever the precision of the model


@pytest.mark.parametrize('hard', [True, False])
def test_a_model_without_distillation_heads_learns_with_all(hard):
    named = namedtuple('Heads', ['head', 'head_cls'])
    outputs = named(logits('avg').requires_grad_(), logits('cls').requires_grad_())
    Criterion(0.1, Teacher(), hard, alpha=1.0, tau=2.0)(None, outputs, targets('labels')).backward()
    assert outputs.head.grad.any() and outputs.head_cls.grad.any()


@pytest.mark.parametrize('alpha', [None, 0.3])
def test_binary_cross_entropy_of_the_labels(alpha):
    """Of labels smoothed as timm does it, of mixed ones as they are; what a teacher says is learned as before."""
    outputs, share = logits('avg'), 1.0 if alpha is None else 1 - alpha
    distillation = 0.0 if alpha is None else alpha * F.cross_entropy(outputs, logits('teacher').argmax(1))
    criterion = Criterion(0.1, None if alpha is None else Teacher(), True, alpha or 0.5, bce=True)
    labels, soft = targets('labels'), targets('SoftTargetCrossEntropy')
    smoothed = F.one_hot(labels, RECIPE['classes']) * 0.9 + 0.1 / RECIPE['classes']
    for given, expected in ((labels, smoothed), (soft, soft)):
        loss = share * F.binary_cross_entropy_with_logits(outputs, expected.double()) + distillation
        torch.testing.assert_close(criterion(None, outputs, given), loss)


def test_the_teacher_has_a_precision_of_its_own_and_no_gradients():
    seen = []

    class Linear(nn.Linear):
        def forward(self, images):
            seen.append((torch.is_autocast_enabled('cpu'), torch.is_grad_enabled(), super().forward(images).dtype))
            return super().forward(images)

    half = partial(torch.autocast, 'cpu', dtype=torch.bfloat16)
    teacher, images = Linear(5, RECIPE['classes']), torch.randn(RECIPE['batch'], 5)
    for autocast, student in ((half, nullcontext), (nullcontext, half), (nullcontext, nullcontext)):
        with student():
            Criterion(0.1, teacher, False, teacher_autocast=autocast)(images, logits('avg'), targets('labels'))
    bf16, fp32 = (True, False, torch.bfloat16), (False, False, torch.float32)
    assert seen == [bf16, bf16, fp32]


@pytest.mark.parametrize('capability, name, dtype', [((9, 0), 'bf16', torch.bfloat16), ((7, 0), 'fp16', torch.float16)])
def test_on_a_gpu_the_teacher_has_half_precision(monkeypatch, tmp_path, capsys, capability, name, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    real = nn.Module.to
    monkeypatch.setattr(nn.Module, 'to', lambda self, *args, **kwargs: real(self, **kwargs))  # no GPU to move it to
    torch.save(timm.create_model('regnety_002', num_classes=4).state_dict(), tmp_path / 't.pth')
    flags = ['--teacher-model', 'regnety_002', '--teacher-path', tmp_path / 't.pth', '--precision', 'fp32']
    args = arguments(*flags, recipe=main_levit.RECIPE)
    config = datasets.data_config(args, args.model)
    criterion = losses.build_criterion(args, config, 4, torch.device('cuda'))
    assert criterion.teacher_autocast.args == ('cuda',) and criterion.teacher_autocast.keywords == {'dtype': dtype}
    assert f'teacher: regnety_002, cls distillation, alpha 0.5, in {name}' in capsys.readouterr().out
    criterion = losses.build_criterion(args, config, 4, torch.device('cpu'))
    assert criterion.teacher_autocast is nullcontext
    assert capsys.readouterr().out == 'teacher: regnety_002, cls distillation, alpha 0.5\n'


def test_a_teacher_sees_images_as_it_was_trained(tmp_path, capsys):
    """vit_tiny was trained with mean and std 0.5, the student with ImageNet's; regnety_002 as the student."""
    pixels = torch.rand(2, 3, 32, 32)
    images = normalize(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    for name, expected in (('vit_tiny_patch16_224', 2 * pixels - 1), ('regnety_002', images)):
        torch.manual_seed(0)
        network = networks.create(name, 4, 32).eval()
        torch.save(network.state_dict(), tmp_path / 't.pth')
        flags = f'--model evo_deit_nano_patch4_32 --input-size 32 --distillation-type hard --teacher-model {name}'
        args = arguments(*flags.split(), '--teacher-path', tmp_path / 't.pth')
        config = datasets.data_config(args, args.model)
        teacher = losses.build_criterion(args, config, 4, torch.device('cpu')).teacher
        torch.testing.assert_close(teacher(images), network(expected), rtol=1e-4, atol=1e-5)
        assert ('normalized with mean (0.5, 0.5, 0.5)' in capsys.readouterr().out) == (name != 'regnety_002')
