"""Optimizer, learning rate, loss scale and EMA: the state of a run at its start."""

import argparse
from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import utils
from checkpoint import State
from datasets import DataConfig
from utils import InputError, above_zero, at_least, between, print_rank0

# Flags that may differ when a run is resumed; True: the run still continues bit for bit.
MAY_CHANGE = {'model_ema_force_cpu': True, 'channels_last': False}


def add_arguments(parser: argparse.ArgumentParser):
    """Add the flags of the optimizer, the learning rate and the EMA."""
    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='adamw', metavar='NAME', help='any timm optimizer')
    add('--opt-eps', type=between(0), default=1e-8, metavar='E', help='epsilon of the optimizer')
    add('--opt-betas', type=between(0, 1), nargs=2, metavar='B', help="betas (default: the optimizer's own)")
    about = 'layer-wise learning rate decay: each layer has F times the rate of the next'
    add('--layer-decay', type=between(0.01, 1), metavar='F', help=about)
    add('--clip-grad', type=above_zero, metavar='NORM', help='gradient clipping (default: off)')
    add('--clip-mode', choices=['norm', 'value', 'agc'], default='norm', help='clip the norm, each value, or by AGC')
    add('--momentum', type=between(0, 1), default=0.9, metavar='M', help='momentum of SGD and others')
    add('--weight-decay', type=between(0), default=0.05, metavar='W', help='not on biases, norms and positions')
    add('--channels-last', action='store_true', help='channels-last memory format')
    add('--grad-accum-steps', type=at_least(1), default=1, metavar='N', help='batches per process and optimizer step')
    add('--model-ema', action=argparse.BooleanOptionalAction, default=True, help='keep an EMA of the weights')
    add('--model-ema-decay', type=between(0, 1), default=0.99996, metavar='D', help='decay of the EMA per step')
    add('--model-ema-force-cpu', action='store_true', help='keep the EMA on the CPU')

    add = parser.add_argument_group('learning rate').add_argument
    add('--lr', type=between(0), default=5e-4, help='learning rate at a global batch of 512; scales linearly')
    add('--sched', default='cosine', metavar='NAME', help='any timm schedule')
    add('--sched-on-updates', action='store_true', help='update the rate every step, not every epoch; for short runs')
    add('--lr-noise', type=between(0, 1), nargs='+', metavar='PCT', help='epochs with noise, as fractions of the run')
    add('--lr-noise-pct', type=between(0), default=0.67, metavar='PCT', help='limit of the noise')
    add('--lr-noise-std', type=between(0), default=1.0, metavar='STD', help='standard deviation of the noise')
    add('--warmup-lr', type=between(0), default=1e-6, metavar='LR', help='learning rate at the start of the warm-up')
    add('--min-lr', type=between(0), default=1e-5, metavar='LR', help='learning rate at the end')
    add('--decay-epochs', type=above_zero, default=30, metavar='N', help='epochs between decays, for step schedules')
    add('--warmup-epochs', type=at_least(0), default=5, metavar='N', help='epochs of linear warm-up')
    add('--cooldown-epochs', type=int, default=10, metavar='N', help='accepted without effect, as in the original')
    add('--patience-epochs', type=at_least(0), default=10, metavar='N', help='for plateau schedules')
    add('--decay-rate', '--dr', type=between(0), default=0.1, metavar='F', help='factor of a decay')


def build_state(
    args: argparse.Namespace,
    model: nn.Module,
    precision: str,
    batch_size: int,
    config: DataConfig | None = None,
    classes: Sequence[str] = (),
    loader: DataLoader | None = None,
) -> State:
    """Build optimizer, schedule, loss scale and EMA of a model from flags; reads and writes no files.

    Precision, data configuration and classes go to the checkpoint. `loader` is the training loader, whose length
    --sched-on-updates needs. InputError for an optimizer or schedule that does not exist, or does not take its flags.
    """
    device = next(model.parameters()).device
    if hasattr(model, 'is_published'):  # Evo-DeiT and Evo-LeViT return all heads, timm's models the mean of theirs
        model.set_distilled_training(True)
    model.to(memory_format=memory_format(args.channels_last))  # before the EMA and the moments copy it
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None)
    images = global_batch(batch_size, args.grad_accum_steps)
    rate = args.lr * images / 512
    print_rank0(
        f'batch {batch_size} x {args.grad_accum_steps} accumulated x {utils.world_size()} processes = {images} images '
        f'a step (original: 1024 to 2048), learning rate {args.lr:g} * {images} / 512 = {rate:.3g}'
    )
    # A fused step is one kernel for all parameters.
    fused = {'fused': True} if args.opt.lower() in ('adam', 'adamw') else {}
    try:
        optimizer = create_optimizer_v2(model, **(optimizer_kwargs(args) | {'lr': rate} | fused))
        if getattr(optimizer, 'is_second_order', False):
            raise ValueError('it needs second derivatives, which a training step does not compute')
        steps = 1 if loader is None else max(len(loader) // args.grad_accum_steps, 1)
        scheduler, _ = create_scheduler(args, optimizer, updates_per_epoch=steps)
        if scheduler is None:  # timm's answer to 'none'
            raise ValueError('no such schedule, expected one of timm, such as cosine')
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise InputError(f'--opt {args.opt}, --sched {args.sched} or their flags: {error}') from error
    warn_of_warmup(args, rate)
    flags = vars(args) | {'device': device.type, 'precision': precision, 'world_size': utils.world_size()}
    flags |= {'train_images': None if loader is None else len(loader.dataset)} | (config._asdict() if config else {})
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    return State(model, ema, optimizer, scheduler, scaler, flags, list(classes), epoch=args.start_epoch)


def warn_of_warmup(args: argparse.Namespace, rate: float):
    """Warn if the warm-up takes the whole run, so that the learning rate never reaches its target."""
    warmup, start = args.warmup_epochs, args.warmup_lr
    # Without --sched-on-updates, epoch e runs at the rate of e - 1 (see engine.train).
    last = args.epochs if args.sched_on_updates else max(args.epochs - 2, 0)
    if warmup and warmup >= last + (not args.sched_on_updates) and start < rate:
        print_rank0(
            f'warning: --warmup-epochs {warmup} takes all of --epochs {args.epochs}: the learning rate only reaches '
            f'{start + (rate - start) * last / warmup:.3g}, not {rate:.3g}; use --warmup-epochs {args.epochs // 10}'
        )


def memory_format(channels_last: bool) -> torch.memory_format:
    """Memory format of images and of the weights of convolutions."""
    return torch.channels_last if channels_last else torch.contiguous_format


def learning_rate(state: State) -> float:
    """The learning rate of the next step, without the factors of --layer-decay."""
    group = state.optimizer.param_groups[-1]
    return group['lr'] / group.get('lr_scale', 1)


def global_batch(batch_size: int, accumulate: int) -> int:
    """Images per optimizer step, over all processes."""
    return batch_size * accumulate * utils.world_size()
