"""The training loss: one criterion over all heads of a model, with or without a teacher."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

import models
import utils
from datasets import DataConfig
from models import weights
from utils import HALF, InputError, above_zero, between, print_rank0

PUBLISHED_TEACHER = 'https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth'
MAY_CHANGE = {'teacher_path': True}  # between a run and its continuation, which goes on bit for bit


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the loss and the teacher."""
    add = parser.add_argument_group('loss and distillation').add_argument
    add('--teacher-model', default='regnety_160', metavar='NAME', help='any timm model')
    add('--teacher-path', default='', metavar='PATH', help="path or URL of the teacher's weights")
    add(
        '--distillation-type', choices=['none', 'soft', 'hard', 'cls'], default='none',
        help="learn from the teacher's probabilities (soft) or its decision (hard; cls is an old name of it)",
    )  # fmt: skip
    add('--bce-loss', action='store_true', help='learn labels by binary cross-entropy, each class by itself')
    add('--distillation-alpha', type=between(0, 1), default=0.5, help="the teacher's share of the loss")
    add('--distillation-tau', type=above_zero, default=1.0, help='temperature of soft distillation')


def check_arguments(args: argparse.Namespace):
    """InputError where a teacher is asked for whose file is not given or does not exist."""
    if args.distillation_type == 'none':
        return
    advice = (
        f'; the published teacher, for ImageNet, is at {PUBLISHED_TEACHER}. '
        '--distillation-type none trains without a teacher'
    )
    if not args.teacher_path:
        weights_of = f'--teacher-path, the weights of --teacher-model {args.teacher_model}'
        raise InputError(f'--distillation-type {args.distillation_type} needs {weights_of}{advice}')
    utils.check_source('--teacher-path', args.teacher_path, advice)


def soft_distillation(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Divergence of softened probabilities, logits (B, classes), per entry and rescaled by tau^2 as published."""
    student, teacher = F.log_softmax(student / tau, 1), F.log_softmax(teacher / tau, 1)
    return F.kl_div(student, teacher, reduction='sum', log_target=True) * tau**2 / student.numel()


class Criterion(nn.Module):
    """Loss of a model's heads against the labels and, with a teacher, against what the teacher says.

    Heads whose names end in `_dist` learn from the teacher and the others from the labels. A model without such heads
    learns both with all its heads; without a teacher all heads learn from the labels. Several heads count by their
    mean.

    Args:
        label_smoothing: for integer labels; soft ones, from mixup, are smoothed already.
        teacher: maps images to logits (B, classes), once a batch, without gradients.
        teacher_autocast: a context for it; without one it has the precision of the model.
        hard: learn the teacher's decision; otherwise its probabilities at temperature `tau`.
        alpha: the teacher's share of the loss.
        bce: labels count by timm's binary cross entropy of each class.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        hard: bool = True,
        alpha: float = 0.5,
        tau: float = 1.0,
        teacher_autocast: Callable = nullcontext,
        bce: bool = False,
    ):
        super().__init__()
        self.hard, self.alpha, self.tau = hard, alpha, tau
        self.label_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.soft_label_loss = nn.CrossEntropyLoss()
        if bce:
            self.label_loss = self.soft_label_loss = BinaryCrossEntropy(label_smoothing)
        self.teacher, self.teacher_autocast = teacher, teacher_autocast

    def forward(self, images: Tensor, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """images (B, 3, rows, columns), outputs logits or a named tuple of logits, targets (B,) or (B, classes)."""
        heads = outputs._asdict() if hasattr(outputs, '_asdict') else {'head': outputs}
        heads = {name: _full_precision(logits) for name, logits in heads.items()}
        distilled = [logits for name, logits in heads.items() if name.endswith('_dist')] or list(heads.values())
        labelled = [logits for name, logits in heads.items() if self.teacher is None or not name.endswith('_dist')]
        label_loss = self.soft_label_loss if targets.is_floating_point() else self.label_loss
        base = _mean(label_loss(logits, targets) for logits in labelled)
        if self.teacher is None:
            return base
        with torch.no_grad(), self.teacher_autocast():
            teacher_logits = _full_precision(self.teacher(images))
        if self.hard:
            teaching = _mean(F.cross_entropy(logits, teacher_logits.argmax(1)) for logits in distilled)
        else:
            teaching = _mean(soft_distillation(logits, teacher_logits, self.tau) for logits in distilled)
        return (1 - self.alpha) * base + self.alpha * teaching


def _mean(values: Iterable[Tensor]) -> Tensor:
    values = list(values)
    return sum(values) / len(values)


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Renormalise(nn.Module):
    """Images (B, 3, rows, columns) normalised by pairs of mean and standard deviation: from one to another."""

    def __init__(self, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]):
        super().__init__()
        mean, std, new_mean, new_std = (torch.tensor(values)[:, None, None] for values in (*before, *after))
        self.register_buffer('scale', std / new_std)
        self.register_buffer('shift', (mean - new_mean) / new_std)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def build_criterion(
    args: argparse.Namespace,
    config: DataConfig,
    num_classes: int,
    device: torch.device,
    label_smoothing: float = 0.0,
) -> Criterion:
    """The criterion that the flags ask for, its teacher loaded; InputError where the teacher's weights do not fit.

    `config` says how the images are normalised. On a GPU the teacher has half precision: it is only asked, and would
    take most of the time of a run.
    """
    if args.distillation_type == 'none':
        return Criterion(label_smoothing, bce=args.bce_loss)
    try:
        teacher = models.create(args.teacher_model, num_classes, config.input_size)
        weights.load_weights(teacher, args.teacher_path, report=print_rank0)
    except InputError as error:
        raise InputError(
            f'teacher, --teacher-model and --teacher-path: {error}\n{advise_teacher(args.teacher_model, num_classes)}'
        ) from error
    cfg = models.published_cfg(args.teacher_model)
    if (cfg.mean, cfg.std) != (config.mean, config.std):
        print_rank0(f'teacher: its images are normalised by mean {cfg.mean}, std {cfg.std}, as it was trained')
        teacher = nn.Sequential(Renormalise((config.mean, config.std), (cfg.mean, cfg.std)), teacher)
    teacher = teacher.to(device).eval().requires_grad_(False)
    autocast, precision = nullcontext, ''
    if device.type == 'cuda':
        precision = utils.half_precision(device)
        autocast = partial(torch.autocast, 'cuda', dtype=HALF[precision])
        teacher = teacher.to(memory_format=torch.channels_last)
    print_rank0(
        f'teacher: {args.teacher_model}, {args.distillation_type} distillation, alpha {args.distillation_alpha}'
        + (f', in {precision}' if precision else '')
    )
    hard = args.distillation_type != 'soft'
    alpha, tau = args.distillation_alpha, args.distillation_tau
    return Criterion(label_smoothing, teacher, hard, alpha, tau, autocast, args.bce_loss)


def advise_teacher(teacher_model: str, num_classes: int) -> str:
    """Where weights of a teacher of so many classes come from: the published teacher knows ImageNet's 1,000 alone."""
    if num_classes == 1000:
        return f'the published teacher, regnety_160 for ImageNet, is at {PUBLISHED_TEACHER}'
    return (
        f'a teacher of these {num_classes} classes has to be trained first: '
        f'main_deit.py --model {teacher_model} --output_dir ...'
    )
