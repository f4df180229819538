"""Training and evaluation of any model: one step, one epoch, one evaluation, and the run over epochs.

A model is called on images and returns logits, in training perhaps a named tuple of them. A model with slow-fast
evolution has `set_schedule`; that is all this module knows of families.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import datasets
import losses
import models
import utils
from utils import InputError, say


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the run: epochs, optimizer, schedules, precision, checkpoints."""
    group = parser.add_argument_group('run')
    group.add_argument('--epochs', type=int, default=300, help='passes over the training images')
    group.add_argument('--start_epoch', type=int, default=0, help='first epoch, where no checkpoint says it')
    group.add_argument(
        '--stage-epoch',
        type=int,
        metavar='N',
        help='select before each layer until this epoch, then before each stage (default: two thirds of the epochs)',
    )
    group.add_argument(
        '--prune-warmup-epoch', type=int, default=0, metavar='N', help='first N epochs without selection'
    )
    group.add_argument(
        '--output_dir', default='', metavar='PATH', help='where checkpoints and the log go; nothing is written without'
    )
    group.add_argument(
        '--resume', default='', metavar='PATH', help='checkpoint (path or address) to go on from, or to evaluate'
    )
    group.add_argument(
        '--finetune', default='', metavar='PATH', help='weights to start from; another head or image size is adapted'
    )
    group.add_argument('--eval', action='store_true', help='evaluate and stop')
    group.add_argument('--eval-ema', action='store_true', help='evaluate the averaged weights (in training: these too)')
    group.add_argument(
        '--eval-interval', type=int, default=1, metavar='N', help='evaluate every N epochs, and every one of the last N'
    )
    group.add_argument('--print-freq', type=int, default=50, metavar='N', help='steps between two lines of progress')
    group.add_argument(
        '--precision',
        choices=['fp32', 'bf16', 'fp16'],
        help='autocast in training and evaluation (default: on a GPU bf16, or fp16 where it has none; on a CPU fp32)',
    )
    group.add_argument('--fuse', action='store_true', help='with --eval: fold BatchNorms first, where a model has them')
    group.add_argument('--compile', action='store_true', help='compile the model and the teacher with torch.compile')

    group = parser.add_argument_group('optimizer')
    group.add_argument('--opt', default='adamw', metavar='NAME', help='any optimizer of timm')
    group.add_argument('--opt-eps', type=float, default=1e-8, help='epsilon of the optimizer')
    group.add_argument('--opt-betas', type=float, nargs='+', help="default: the optimizer's own")
    group.add_argument('--clip-grad', type=float, metavar='NORM', help='clip gradients (default: not)')
    group.add_argument(
        '--clip-mode',
        choices=['norm', 'value', 'agc'],
        default='norm',
        help='clip the norm, each value, or adaptively (AGC)',
    )
    group.add_argument('--momentum', type=float, default=0.9, help='of optimizers that have one')
    group.add_argument('--weight-decay', type=float, default=0.05, help='not on biases, norms, positions')
    group.add_argument(
        '--grad-accum-steps', type=int, default=1, metavar='N', help='batches a process adds up for one step'
    )
    group.add_argument('--model-ema', action=argparse.BooleanOptionalAction, default=True, help='average the weights')
    group.add_argument('--model-ema-decay', type=float, default=0.99996, help='of the average, for each step')
    group.add_argument('--model-ema-force-cpu', action='store_true', help='keep the averaged weights on the CPU')

    group = parser.add_argument_group('learning rate')
    group.add_argument('--lr', type=float, default=5e-4, help='for 512 images a step; scaled to the global batch')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='any schedule of timm')
    group.add_argument(
        '--lr-noise', type=float, nargs='+', metavar='PCT', help='epochs, as a share of all, with noisy rate'
    )
    group.add_argument('--lr-noise-pct', type=float, default=0.67, help='limit of the noise')
    group.add_argument('--lr-noise-std', type=float, default=1.0, help='deviation of the noise')
    group.add_argument('--warmup-lr', type=float, default=1e-6, help='rate at the start of the warm-up')
    group.add_argument('--min-lr', type=float, default=1e-5, help='rate at the end')
    group.add_argument('--decay-epochs', type=float, default=30, help='epochs between decays, for step schedules')
    group.add_argument('--warmup-epochs', type=int, default=5, help='epochs of linear warm-up')
    group.add_argument(
        '--cooldown-epochs', type=int, default=10, help='epochs at the last rate, where --epochs leaves them'
    )
    group.add_argument('--patience-epochs', type=int, default=10, help='epochs without progress, for plateau schedules')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, help='factor of a decay')


def get_parser(description: str, recipe: dict) -> utils.Parser:
    """Parser with the flags of all modules; `recipe` holds the defaults in which a script differs from the others."""
    parser = utils.Parser(description)
    for add in (models.add_arguments, datasets.add_arguments, losses.add_arguments, add_arguments, utils.add_arguments):
        add(parser)
    parser.set_defaults(**recipe)
    return parser


def main(args: argparse.Namespace) -> dict[str, float]:
    """A script from its flags to the last evaluation, which it returns."""
    check_arguments(args)
    device = utils.set_up_processes(args)
    train_loader, val_loader = datasets.build_loaders(args, utils.rank(), utils.world_size())
    num_classes = len(val_loader.dataset.classes)
    model = models.build(args, num_classes).to(device)
    precision = pick_precision(args, device)
    say(
        f'{args.model}: {count_parameters(model):,} parameters, {device}, {precision}, {utils.world_size()} process(es)'
    )
    if args.eval:
        return evaluate_checkpoint(args, model, val_loader, make_autocast(precision, device))
    criterion = losses.build_criterion(args, num_classes, device)
    return train(args, model, criterion, train_loader, val_loader, datasets.build_mixup(args, num_classes), precision)


@dataclass
class State:
    """All that a run changes, and so all that a checkpoint holds."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    epoch: int = 0  # the next one
    best_acc1: float = 0.0

    def state_dict(self, args: argparse.Namespace) -> dict:
        """A checkpoint after epoch `self.epoch - 1`: tensors and plain data, so that it loads without running code."""
        return {
            'model': self.model.state_dict(),
            'model_ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self.scheduler.state_dict(),
            'scaler': self.scaler.state_dict(),
            'epoch': self.epoch - 1,
            'best_acc1': self.best_acc1,
            'args': {name: value for name, value in vars(args).items()},
        }

    def load(self, checkpoint: dict, source: str):
        """Take everything over from a checkpoint, saying what it does not hold."""
        load_exactly(self.model, checkpoint, source)
        if self.ema:
            if checkpoint.get('model_ema'):
                load_exactly(self.ema.module, checkpoint, source, use_ema=True)
            else:
                self.ema.set(self.model)
                say(f'{source} has no averaged weights; the average starts from its weights')
        if 'epoch' not in checkpoint:
            say(f'{source} holds weights alone; training starts with them at epoch {self.epoch}')
            return
        self.epoch = checkpoint['epoch'] + 1
        self.best_acc1 = checkpoint.get('best_acc1', 0.0)
        published = hasattr(self.model, 'is_published') and self.model.is_published(utils.find_weights(checkpoint))
        if checkpoint.get('optimizer') is None or published:
            # The published optimizer state follows another order and number of parameters.
            self.scheduler.step(checkpoint['epoch'])
            say(f'{source}: the optimizer starts anew, at epoch {self.epoch} and its rate')
            return
        self.optimizer.load_state_dict(checkpoint['optimizer'])
        self.scheduler.load_state_dict(checkpoint['lr_scheduler'])
        if self.scaler.is_enabled() and checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        elif self.scaler.is_enabled() or checkpoint.get('scaler'):
            say(f'{source} was saved in another precision; the loss scale starts anew')


def load_exactly(model: nn.Module, checkpoint: dict, source: str, use_ema: bool = False):
    """Load weights of which nothing may be missing: a wrong accuracy is worse than none."""
    try:
        loaded = utils.load_weights(model, checkpoint, use_ema)
    except InputError as error:
        raise InputError(f'{source}: {error}\nTo start from weights that differ, use --finetune.') from error
    if loaded.missing:
        raise InputError(
            f'{source} holds a plain vision transformer, without {", ".join(loaded.missing)}: --finetune starts from it'
        )


def pick_precision(args: argparse.Namespace, device: torch.device) -> str:
    """The precision asked for, or the fastest safe one of the device."""
    if args.precision:
        return args.precision
    if device.type != 'cuda':
        return 'fp32'
    return 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'


def make_autocast(precision: str, device: torch.device) -> partial:
    """A context for forward passes: autocast to half precision, or nothing in fp32."""
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': None}[precision]
    return partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)


def check_arguments(args: argparse.Namespace):
    """Refuse, before anything is read or built, what cannot end well."""
    for flag in ('resume', 'finetune', 'teacher_path'):
        source = getattr(args, flag)
        if flag == 'teacher_path' and (args.eval or args.distillation_type == 'none'):
            continue
        if source and not utils.is_address(source) and not Path(source).is_file():
            where = f'; the published teacher is at {losses.PUBLISHED_TEACHER}' if flag == 'teacher_path' else ''
            raise InputError(f'--{flag.replace("_", "-")} {source}: {Path(source).absolute()} is not a file{where}')
    if args.eval and not args.resume:
        raise InputError(
            '--eval needs --resume with the checkpoint to evaluate; without one, random weights would be scored'
        )
    if args.grad_accum_steps < 1:
        raise InputError(f'--grad-accum-steps: expected 1 or more, found {args.grad_accum_steps}')
    if args.output_dir and not args.eval:
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f'--output_dir {args.output_dir} cannot be made: {error}') from error


def train_step(
    state: State,
    net: nn.Module,
    criterion: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    autocast: Callable,
    args: argparse.Namespace,
) -> Tensor:
    """One optimizer step from `count` batches of images (B, 3, rows, columns) and targets; returns the mean loss,
    detached.

    `net` is the model as it is called, perhaps inside DistributedDataParallel. Nothing here waits for the device.
    """
    total = 0.0
    for i, (images, targets) in enumerate(batches, 1):
        # Gradients of earlier batches need not be exchanged: the last exchange carries their sum.
        waits = isinstance(net, DistributedDataParallel) and i < count
        with net.no_sync() if waits else nullcontext():
            with autocast():
                loss = criterion(images, net(images), targets) / count
            state.scaler.scale(loss).backward()
        total += loss.detach()
    if args.clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        dispatch_clip_grad(state.model.parameters(), args.clip_grad, args.clip_mode)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.ema:
        state.ema.update(state.model)
    return total


def train_one_epoch(
    state: State,
    net: nn.Module,
    criterion: nn.Module,
    loader: DataLoader,
    mixup: Mixup | None,
    autocast: Callable,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Train on each batch of `loader` once; returns the mean loss, the rate of the last step and images a second."""
    net.train()
    device = next(state.model.parameters()).device
    count = args.grad_accum_steps
    steps = len(loader) // count
    loss_sum = torch.zeros(2, device=device)  # of the epoch, of the steps since the last line of progress
    images_per_step = loader.batch_size * count * utils.world_size()
    started = lap = time.perf_counter()
    batches = iter(loader)
    for step in range(steps):
        # Mixup and stochastic depth too are functions of the place in the run. (Data sets seed by (seed, epoch,
        # position).)
        utils.seed_all(args.seed, state.epoch, step, 1 + utils.rank())
        loss_sum += train_step(
            state, net, criterion, _prepare(islice(batches, count), mixup, device), count, autocast, args
        )
        if (step + 1) % args.print_freq == 0 or step + 1 == steps:
            mean = utils.all_sum(loss_sum.clone()) / utils.world_size()
            epoch_loss, lap_loss = mean.tolist()
            loss_sum[1] = 0
            now = time.perf_counter()
            since = (step + 1) % args.print_freq or args.print_freq
            left = timedelta(seconds=round((now - started) / (step + 1) * (steps - step - 1)))
            say(
                f'Epoch: [{state.epoch}/{args.epochs}]  [{step + 1:>{len(str(steps))}}/{steps}]  '
                f'loss: {lap_loss / since:.4f}  '
                f'lr: {state.optimizer.param_groups[-1]["lr"]:.3g}  {images_per_step * since / (now - lap):.1f} img/s  '
                f'eta: {left}'
                + (f'  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB' if device.type == 'cuda' else '')
            )
            lap = now
            if not math.isfinite(lap_loss):
                raise InputError(
                    f'the loss is {lap_loss} in epoch {state.epoch}, in the {since} steps before step {step + 1}; '
                    'training stops, checkpoints are as after the last epoch. '
                    'A lower --lr, --clip-grad 1, or --precision bf16 or fp32 may help'
                )
    seconds = time.perf_counter() - started
    return {
        'train_loss': epoch_loss / steps,
        'train_lr': state.optimizer.param_groups[-1]['lr'],
        'train_images_per_second': steps * images_per_step / seconds,
    }


def _prepare(batches: Iterable, mixup: Mixup | None, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in batches:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        yield mixup(images, targets) if mixup else (images, targets)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, autocast: Callable, name: str = 'Test') -> dict[str, float]:
    """Top-1, top-5 (percent) and loss over the images of all processes, each image once; also how many there were."""
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, targets in loader:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets, reduction='none').double().sum()
        best = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        sums += torch.stack([best[:, :1].sum(), best.sum(), loss, torch.tensor(len(targets), device=device)])
    top1, top5, loss, count = utils.all_sum(sums).tolist()
    results = {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count}
    say(
        f'{name}: * Acc@1 {results["acc1"]:.3f} Acc@5 {results["acc5"]:.3f} loss {results["loss"]:.3f}  '
        f'({count:.0f} images)'
    )
    return results


def evaluate_checkpoint(
    args: argparse.Namespace, model: nn.Module, val_loader: DataLoader, autocast: Callable
) -> dict[str, float]:
    """Evaluate what --resume names, with the selection that its weights were saved with."""
    load_exactly(model, utils.read_checkpoint(args.resume), args.resume, args.eval_ema)
    say(f'{args.resume}: {"averaged weights" if args.eval_ema else "weights"} loaded, {describe_schedule(model)}')
    if args.fuse and hasattr(model, 'fuse'):
        model.fuse()
    if args.compile:
        model.compile()
    return evaluate(model, val_loader, autocast)


def start(args: argparse.Namespace, model: nn.Module, precision: str, steps: int) -> State:
    """What a run begins with: weights, average, optimizer and schedules, new or from a checkpoint, and say so."""
    device = next(model.parameters()).device
    if args.finetune:
        loaded = utils.load_weights(model, args.finetune, adapt=True)
        say(
            f'{args.finetune}: loaded; new in the model: {", ".join(loaded.missing) or "nothing"}; '
            f'not used of the file: {", ".join(loaded.dropped) or "nothing"}'
        )
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None)
    images = global_batch(args)
    rate = args.lr * images / 512
    optimizer = create_optimizer_v2(model, **(optimizer_kwargs(args) | {'lr': rate}))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    state = State(model, ema, optimizer, create_scheduler(args, optimizer)[0], scaler, args.start_epoch)
    if args.resume:
        state.load(utils.read_checkpoint(args.resume), args.resume)
        say(f'{args.resume}: going on with epoch {state.epoch}, best Acc@1 so far {state.best_acc1:.3f}')
    say(
        f'batch {args.batch_size} x {args.grad_accum_steps} accumulated x {utils.world_size()} processes = '
        f'{images} images a step (published: {args.recipe_batch}), '
        f'learning rate {args.lr:g} * {images} / 512 = {rate:.3g}, '
        f'{steps} steps an epoch, epochs {state.epoch} to {args.epochs - 1}, stage-wise from epoch {stage_epoch(args)}'
    )
    return state


def global_batch(args: argparse.Namespace) -> int:
    """Images that one optimizer step sees, over all processes."""
    return args.batch_size * args.grad_accum_steps * utils.world_size()


def stage_epoch(args: argparse.Namespace) -> int:
    """The first epoch with one selection a stage; published: 200 of 300."""
    return 2 * args.epochs // 3 if args.stage_epoch is None else args.stage_epoch


def train(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    mixup: Mixup | None,
    precision: str,
) -> dict[str, float]:
    """Train for all epochs, evaluating, saving and logging on the way; returns the last evaluation."""
    device = next(model.parameters()).device
    autocast = make_autocast(precision, device)
    steps = len(train_loader) // args.grad_accum_steps
    if steps == 0:
        raise InputError(f'--grad-accum-steps {args.grad_accum_steps}: an epoch has only {len(train_loader)} batches')
    state = start(args, model, precision, steps)
    networks = [model, state.ema.module] if state.ema else [model]
    if args.compile:
        model.compile()
    net = model
    if utils.world_size() > 1:
        net = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)

    test, started, first = {}, time.perf_counter(), state.epoch
    for epoch in range(first, args.epochs):
        for network in networks:
            if hasattr(network, 'set_schedule'):
                network.set_schedule(epoch >= stage_epoch(args), epoch >= args.prune_warmup_epoch)
        train_loader.sampler.set_epoch(epoch)
        record = train_one_epoch(state, net, criterion, train_loader, mixup, autocast, args)
        for network in networks:
            share_buffers(network)
        if (epoch + 1) % args.eval_interval == 0 or epoch >= args.epochs - args.eval_interval:
            test = evaluate(model, val_loader, autocast)
            record |= {f'test_{key}': value for key, value in test.items()}
            if args.eval_ema and state.ema:
                averaged = evaluate(state.ema.module, val_loader, autocast, 'Test of the average')
                record |= {f'test_ema_{key}': value for key, value in averaged.items()}
        # As published: the rate of epoch e is the schedule's at e - 1, so epochs 0 and 1 both have the warm-up rate.
        state.scheduler.step(epoch, record.get('test_acc1', state.best_acc1))
        state.epoch = epoch + 1
        save_epoch(args, state, record | {'precision': precision, 'epoch': epoch})
        left = (time.perf_counter() - started) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        say(f'Epoch {epoch} done, best Acc@1 {state.best_acc1:.3f}, time left {timedelta(seconds=round(left))}\n')
    return test


def save_epoch(args: argparse.Namespace, state: State, record: dict):
    """Keep the best accuracy; on the first process write the checkpoint, the best one, and a line of the log."""
    improved = record.get('test_acc1', 0.0) > state.best_acc1  # False for NaN
    if improved:
        state.best_acc1 = record['test_acc1']
    if not args.output_dir or utils.rank() > 0:
        return
    output = Path(args.output_dir)
    checkpoint = state.state_dict(args)
    utils.write_checkpoint(output / 'checkpoint.pth', checkpoint)
    if improved:
        utils.write_checkpoint(output / 'best_checkpoint.pth', checkpoint)
    record |= {
        'best_acc1': state.best_acc1,
        'n_parameters': count_parameters(state.model),
        'selection': describe_schedule(state.model),
        'global_batch': global_batch(args),
    }
    write_log(output / 'log.txt', record)
    if state.epoch == args.epochs:
        say(f'written: {output / "checkpoint.pth"}, {output / "best_checkpoint.pth"}, {output / "log.txt"}')


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def describe_schedule(model: nn.Module) -> str:
    """In words, where a model selects."""
    if not hasattr(model, 'set_schedule'):
        return 'no selection'
    return ('stage-wise' if model.stage_wise else 'layer-wise') if model.evolving else 'all patches'


def share_buffers(model: nn.Module):
    """Give every process the buffers (BatchNorm statistics) of the first one, whose file will hold them."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def write_log(path: Path, record: dict):
    """Put one line of JSON for an epoch into the log, in place of lines of this epoch or later and of torn ones."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)['epoch'] < record['epoch']:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    temporary = path.with_name(f'.{path.name}.tmp')
    temporary.write_text('\n'.join([*lines, json.dumps(finite)]) + '\n')
    os.replace(temporary, path)
