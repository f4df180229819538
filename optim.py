"""Optimizer, learning rate, loss scale and EMA: with a model, the state of a run at its start."""

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

# Flags that may differ between a run and its continuation, and whether it goes on bit for bit even so.
MAY_CHANGE = {'model_ema_force_cpu': True, 'channels_last': False}


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the optimizer, the learning rate and the EMA."""
    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='adamw', metavar='NAME', help='any optimizer of timm')
    add('--opt-eps', type=between(0), default=1e-8, help='epsilon of the optimizer')
    add('--opt-betas', type=between(0, 1), nargs=2, help="default: the optimizer's own")
    add('--layer-decay', type=between(0.01, 1), metavar='F', help='the rate of a layer is F times that of the next')
    add('--clip-grad', type=above_zero, metavar='NORM', help='clip gradients (default: not)')
    add('--clip-mode', choices=['norm', 'value', 'agc'], default='norm', help='the norm, each value, or adaptive (AGC)')
    add('--momentum', type=between(0, 1), default=0.9, help='of optimizers that have one')
    add('--weight-decay', type=between(0), default=0.05, help='not on biases, norms, positions')
    add('--channels-last', action='store_true', help='memory order of images and convolutions')
    add('--grad-accum-steps', type=at_least(1), default=1, metavar='N', help='batches a process adds up for one step')
    add('--model-ema', action=argparse.BooleanOptionalAction, default=True, help='keep an EMA of the weights')
    add('--model-ema-decay', type=between(0, 1), default=0.99996, help='of the EMA, for each step')
    add('--model-ema-force-cpu', action='store_true', help='keep the EMA on the CPU')

    add = parser.add_argument_group('learning rate').add_argument
    add('--lr', type=between(0), default=5e-4, help='for 512 images a step; scaled to the global batch')
    add('--sched', default='cosine', metavar='NAME', help='any schedule of timm')
    add('--sched-on-updates', action='store_true', help='a rate for each step, not for each epoch: for short runs')
    add('--lr-noise', type=between(0, 1), nargs='+', metavar='PCT', help='share of the epochs with noisy learning rate')
    add('--lr-noise-pct', type=between(0), default=0.67, help='limit of the noise')
    add('--lr-noise-std', type=between(0), default=1.0, help='deviation of the noise')
    add('--warmup-lr', type=between(0), default=1e-6, help='at the start of the warm-up')
    add('--min-lr', type=between(0), default=1e-5, help='at the end')
    add('--decay-epochs', type=above_zero, default=30, help='epochs between decays, for step schedules')
    add('--warmup-epochs', type=at_least(0), default=5, help='epochs of linear warm-up')
    add('--cooldown-epochs', type=int, default=10, help='accepted without effect: as published, there is no cooldown')
    add('--patience-epochs', type=at_least(0), default=10, help='epochs without progress, for plateau schedules')
    add('--decay-rate', '--dr', type=between(0), default=0.1, help='factor of a decay')


def build_state(
    args: argparse.Namespace,
    model: nn.Module,
    precision: str,
    batch_size: int,
    config: DataConfig | None = None,
    classes: Sequence[str] = (),
    loader: DataLoader | None = None,
) -> State:
    """Optimizer, schedule, loss scale and EMA of a model, as the flags say; nothing is read or written.

    The rest is what holds where the flags leave it open, and what the data is: checkpoints keep it. `loader` is that of
    training, whose length --sched-on-updates needs.
    """
    device = next(model.parameters()).device
    if hasattr(model, 'is_published'):  # ours learn with all their heads, as published, timm's with the mean of theirs
        model.set_distilled_training(True)
    model.to(memory_format=memory_format(args.channels_last))  # first: EMA and moments take it over
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None)
    images = global_batch(batch_size, args.grad_accum_steps)
    rate = args.lr * images / 512
    print_rank0(
        f'batch {batch_size} x {args.grad_accum_steps} accumulated x {utils.world_size()} processes = {images} images '
        f'a step (published: 1024 to 2048), learning rate {args.lr:g} * {images} / 512 = {rate:.3g}'
    )
    # One kernel for all parameters, where the optimizer has one.
    fused = {'fused': True} if args.opt.lower() in ('adam', 'adamw') else {}
    try:
        optimizer = create_optimizer_v2(model, **(optimizer_kwargs(args) | {'lr': rate} | fused))
        if getattr(optimizer, 'is_second_order', False):
            raise ValueError('it needs second derivatives, which a training step does not compute')
        steps = 1 if loader is None else max(len(loader) // args.grad_accum_steps, 1)
        scheduler, _ = create_scheduler(args, optimizer, updates_per_epoch=steps)
        if scheduler is None:  # timm's answer to 'none', and before 1.0.31 to any name that it does not know
            raise ValueError('no such schedule, expected one of timm, such as cosine')
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise InputError(f'--opt {args.opt}, --sched {args.sched} or their flags: {error}') from error
    warn_of_warmup(args, rate)
    flags = vars(args) | {'device': device.type, 'precision': precision, 'world_size': utils.world_size()}
    flags |= {'train_images': None if loader is None else len(loader.dataset)} | (config._asdict() if config else {})
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    return State(model, ema, optimizer, scheduler, scaler, flags, list(classes), epoch=args.start_epoch)


def warn_of_warmup(args: argparse.Namespace, rate: float):
    """Say where the warm-up takes the whole run, so that the learning rate never becomes what was asked for."""
    epochs, warmup, start = args.epochs, args.warmup_epochs, args.warmup_lr
    # The last place in the schedule, see `train`; from step to step it is a step before the end of the last epoch.
    last = epochs if args.sched_on_updates else max(epochs - 2, 0)
    too_long = warmup >= last if args.sched_on_updates else warmup > last
    if warmup and too_long and start < rate:
        print_rank0(
            f'warning: --warmup-epochs {warmup} takes all of --epochs {epochs}: the learning rate goes from '
            f'{start:.3g} to {start + (rate - start) * last / warmup:.3g} and never reaches {rate:.3g}; '
            f'use --warmup-epochs {epochs // 10}, or a higher --warmup-lr'
        )


def memory_format(channels_last: bool) -> torch.memory_format:
    """The order in memory of images and of the weights of convolutions."""
    return torch.channels_last if channels_last else torch.contiguous_format


def learning_rate(state: State) -> float:
    """The learning rate of the step that comes, without the factors of --layer-decay."""
    group = state.optimizer.param_groups[-1]
    return group['lr'] / group.get('lr_scale', 1)


def global_batch(batch_size: int, accumulate: int) -> int:
    """Images that one optimizer step sees, over all processes."""
    return batch_size * accumulate * utils.world_size()
