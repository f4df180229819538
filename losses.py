"""The training loss: one criterion for all heads of a model, with or without a teacher."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

import networks
import utils
from datasets import DataConfig
from models import weights
from utils import HALF, InputError, above_zero, between, print_rank0

ORIGINAL_TEACHER = 'https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth'
# Flags that may differ when a run is resumed; True: the run still continues bit for bit.
MAY_CHANGE = {'teacher_path': True}


def add_arguments(parser: argparse.ArgumentParser):
    """Add the flags of the loss and the teacher."""
    add = parser.add_argument_group('loss and distillation').add_argument
    add('--teacher-model', default='regnety_160', metavar='NAME', help='any timm model, as teacher')
    add('--teacher-path', default='', metavar='PATH', help="path or URL of the teacher's weights")
    add(
        '--distillation-type', choices=['none', 'soft', 'hard', 'cls'], default='none',
        help="learn the teacher's probabilities (soft) or its decision (hard, also called cls)",
    )  # fmt: skip
    add('--bce-loss', action='store_true', help='binary cross-entropy for the labels')
    add('--distillation-alpha', type=between(0, 1), default=0.5, metavar='A', help="weight of the teacher's loss")
    add('--distillation-tau', type=above_zero, default=1.0, metavar='T', help='temperature of soft distillation')


def check_teacher(args: argparse.Namespace):
    """InputError if a teacher is asked for, and the file with its weights is not given or does not exist."""
    if args.distillation_type == 'none':
        return
    advice = f'; ImageNet: {ORIGINAL_TEACHER}. --distillation-type none trains without a teacher'
    if not args.teacher_path:
        needed = f'--teacher-path, the weights of --teacher-model {args.teacher_model}'
        raise InputError(f'--distillation-type {args.distillation_type} needs {needed}{advice}')
    utils.check_source('--teacher-path', args.teacher_path, advice)


def soft_distillation(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """KL divergence of probabilities at temperature `tau`, from logits (B, classes).

    Averaged over all B * classes entries and multiplied by tau^2, as in the original Evo-ViT and DeiT.
    """
    student, teacher = F.log_softmax(student / tau, 1), F.log_softmax(teacher / tau, 1)
    return F.kl_div(student, teacher, reduction='sum', log_target=True) * tau**2 / student.numel()


class Criterion(nn.Module):
    """Loss of a model's heads against the labels and, with a teacher, against its predictions.

    Heads whose names end in `_dist` learn from the teacher, the others from the labels. If a model has no such heads,
    all of its heads learn both. Without a teacher all heads learn from the labels. The loss is averaged over heads.

    Args:
        label_smoothing: for integer labels; the soft labels of mixup are smoothed already.
        teacher: maps images to logits (B, classes); called once per batch, without gradients.
        hard: learn the teacher's decision instead of its probabilities at temperature `tau`.
        alpha: weight of the teacher's loss; the labels have 1 - alpha.
        teacher_autocast: context manager for the teacher; by default it runs in the precision of the model.
        bce: binary cross-entropy for the labels.
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
        """Mean loss; images (B, 3, H, W), logits (B, classes) or a named tuple, targets (B,) or (B, classes)."""
        heads = outputs._asdict() if hasattr(outputs, '_asdict') else {'head': outputs}
        heads = {name: _full_precision(logits) for name, logits in heads.items()}  # a loss in bf16 has 3 digits
        distilled = [logits for name, logits in heads.items() if name.endswith('_dist')] or list(heads.values())
        labelled = [logits for name, logits in heads.items() if self.teacher is None or not name.endswith('_dist')]
        # Mixup gives soft labels (B, classes), which it has smoothed; integer labels are smoothed here.
        label_loss = self.soft_label_loss if targets.is_floating_point() else self.label_loss
        base = _mean(label_loss(logits, targets) for logits in labelled)
        if self.teacher is None:
            return base
        with torch.no_grad(), self.teacher_autocast():
            teacher_logits = _full_precision(self.teacher(images))  # once for all heads
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


class Renormalize(nn.Module):
    """Change the normalization of images (B, 3, H, W) from one (mean, std) to another."""

    def __init__(self, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]):
        super().__init__()
        mean, std, new_mean, new_std = (torch.tensor(values)[:, None, None] for values in (*before, *after))
        self.register_buffer('scale', std / new_std)
        self.register_buffer('shift', (mean - new_mean) / new_std)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def build_criterion(
    args: argparse.Namespace, config: DataConfig, num_classes: int, device: torch.device, label_smoothing: float = 0.0
) -> Criterion:
    """Build the criterion from flags and load its teacher; InputError if the teacher's weights do not fit.

    `config` says how the images are normalized. On a GPU the teacher runs in half precision: it needs no gradients, and
    would otherwise take most of the training time.
    """
    if args.distillation_type == 'none':
        return Criterion(label_smoothing, bce=args.bce_loss)
    try:
        teacher = networks.create(args.teacher_model, num_classes, config.input_size)
        weights.load_weights(teacher, args.teacher_path, report=print_rank0)
    except InputError as error:
        advice = f'train a teacher for these classes first: main_deit.py --model {args.teacher_model} --output_dir ...'
        if num_classes == 1000:
            advice = f'the original teacher, regnety_160 for ImageNet, is at {ORIGINAL_TEACHER}'
        raise InputError(f'teacher, --teacher-model and --teacher-path: {error}\n{advice}') from error
    # The loader normalizes for the student. A teacher trained with another mean and std would silently be wrong.
    cfg = networks.published_cfg(args.teacher_model)
    if (cfg.mean, cfg.std) != (config.mean, config.std):
        print_rank0(f'teacher: its images are normalized with mean {cfg.mean}, std {cfg.std}, as in its training')
        teacher = nn.Sequential(Renormalize((config.mean, config.std), (cfg.mean, cfg.std)), teacher)
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
    hard, alpha, tau = args.distillation_type != 'soft', args.distillation_alpha, args.distillation_tau
    return Criterion(label_smoothing, teacher, hard, alpha, tau, autocast, args.bce_loss)
