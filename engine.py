"""Training and evaluation of any model: one step, one epoch, one evaluation, and the run over epochs.

A model is called on images and returns logits, in training perhaps a named tuple of them. A model with slow-fast
evolution has `set_schedule`; that is all this module knows of families.
"""

import argparse
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
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
from timm.utils import ModelEmaV3, dispatch_clip_grad, reparameterize_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoint
import datasets
import losses
import models
import utils
from checkpoint import State
from models import weights
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
    group.add_argument('--eval', action='store_true', help='evaluate and stop')
    group.add_argument('--eval-ema', action='store_true', help='evaluate the averaged weights (in training: these too)')
    group.add_argument(
        '--eval-interval', type=int, default=1, metavar='N', help='evaluate every N epochs, and every one of the last N'
    )
    group.add_argument('--print-freq', type=int, default=50, metavar='N', help='steps between two lines of progress')
    group.add_argument(
        '--precision',
        choices=['fp32', 'tf32', 'bf16', 'fp16'],
        help='tf32: float32 with faster, rounded products, on GPUs; bf16, fp16: autocast (default: in training on a '
        'GPU bf16, or fp16 where it has none, or tf32 where the recipe is fp32, and on a CPU fp32; with --eval that of '
        'the training, on any device, if the checkpoint says it, else fp32)',
    )
    group.add_argument('--channels-last', action='store_true', help='training: memory order of images and convolutions')
    group.add_argument('--fuse', action='store_true', help='with --eval: fold BatchNorms and drop training heads')
    group.add_argument('--compile', action='store_true', help='compile the model and the teacher with torch.compile')

    group = parser.add_argument_group('optimizer')
    group.add_argument('--opt', default='adamw', metavar='NAME', help='any optimizer of timm')
    group.add_argument('--opt-eps', type=float, default=1e-8, help='epsilon of the optimizer')
    group.add_argument('--opt-betas', type=float, nargs=2, help="default: the optimizer's own")
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
        '--cooldown-epochs', type=int, default=10, help='accepted without effect: as published, there is no cooldown'
    )
    group.add_argument('--patience-epochs', type=int, default=10, help='epochs without progress, for plateau schedules')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, help='factor of a decay')


def get_parser(description: str, recipe: dict) -> utils.Parser:
    """Parser with the flags of all modules; `recipe` holds the defaults in which a script differs from the others."""
    parser = utils.Parser(description)
    for module in (models, datasets, losses, checkpoint, utils):
        module.add_arguments(parser)
    add_arguments(parser)
    parser.set_defaults(**{'recipe_precision': None} | recipe)
    return parser


def main(args: argparse.Namespace) -> dict[str, float]:
    """A script from its flags to the last evaluation, which it returns."""
    check_arguments(args)
    device = utils.set_up_processes(args)
    content = weights.read_checkpoint(args.resume, say) if args.eval else {}
    args.device, args.precision = device.type, pick_precision(args, device, content)
    set_backends(args.precision, device)
    if args.eval:
        checkpoint.recall_model(args, content)
    config = datasets.data_config(args, args.model)
    vars(args).update(config._asdict())
    say(datasets.describe(config))
    known = checkpoint.find_classes(content, args) if args.eval else (None, None)
    train_loader, val_loader = datasets.build_loaders(
        args, config, utils.rank(), utils.world_size(), *known, train=not args.eval
    )
    num_classes = len(val_loader.dataset.classes)
    model = models.build(args, num_classes).to(device)
    say(
        f'{args.model}: {count_parameters(model):,} parameters, {device}, {args.precision}, '
        f'{utils.world_size()} process(es)'
    )
    if args.eval:
        return evaluate_checkpoint(args, content, model, val_loader, make_autocast(args.precision, device))
    criterion = losses.build_criterion(args, num_classes, device)
    mixup = datasets.build_mixup(args, num_classes)
    return train(args, model, criterion, train_loader, val_loader, mixup, args.precision)


def pick_precision(args: argparse.Namespace, device: torch.device, content: dict | None = None) -> str:
    """The precision asked for, or the recipe's, or the fastest safe one of the device.

    A recipe in fp32 has TF32 products where the device has them, as the published runs had: it was PyTorch's default.
    In evaluation, where none is asked for, that of the training, if the checkpoint (`content`) says it, else fp32.
    """
    new = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    if args.precision == 'tf32' and not new:
        raise InputError(f'--precision tf32 is a mode of NVIDIA GPUs since Ampere, the device is {device}; use fp32')
    if args.precision:
        return args.precision
    if args.eval:
        saved = checkpoint.saved_flags(content or {}).get('precision') or 'fp32'
        return 'fp32' if saved == 'tf32' and not new else saved
    if args.recipe_precision == 'fp32':
        return 'tf32' if new else 'fp32'
    return args.recipe_precision or (utils.half_precision(device) if device.type == 'cuda' else 'fp32')


def set_backends(precision: str, device: torch.device):
    """PyTorch's global switches: TF32 in products of float32, or not; cuDNN tries which convolution is the fastest."""
    # By their older names: after the newer `fp32_precision`, torch.compile, which still reads these, raises an error.
    with warnings.catch_warnings(action='ignore'):  # some versions say that there are newer names
        torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
        torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    torch.backends.cudnn.benchmark = device.type == 'cuda'  # worth it, as all batches have the same shape


def make_autocast(precision: str, device: torch.device) -> partial:
    """A context for forward passes: autocast to half precision, or nothing in fp32 and tf32."""
    dtype = losses.HALF.get(precision)
    return partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)


def check_arguments(args: argparse.Namespace):
    """Refuse, before anything is read or built, what cannot end well."""
    for flag in ('resume', 'finetune', 'teacher_path'):
        source = getattr(args, flag)
        if flag == 'teacher_path' and (args.eval or args.distillation_type == 'none'):
            continue
        if source and not weights.is_url(source) and not Path(source).is_file():
            where = (
                f'; the published teacher, for ImageNet, is at {losses.PUBLISHED_TEACHER}'
                if flag == 'teacher_path'
                else ''
            )
            raise InputError(f'--{flag.replace("_", "-")} {source}: {Path(source).absolute()} is not a file{where}')
    if args.auto_resume and not args.output_dir:
        raise InputError('--auto-resume looks for checkpoints in --output_dir, which is not given')
    if args.eval and not args.resume:
        raise InputError(
            '--eval needs --resume with the checkpoint to evaluate; without one, random weights would be scored'
        )
    for name in ('epochs', 'batch_size', 'grad_accum_steps', 'keep_checkpoints', 'print_freq', 'eval_interval'):
        if getattr(args, name) < 1:
            raise InputError(f'--{name.replace("_", "-")}: expected 1 or more, found {getattr(args, name)}')
    if args.seed < 0:
        raise InputError(f'--seed: expected 0 or more, found {args.seed}')
    if args.output_dir and not args.eval and int(os.environ.get('RANK', 0)) == 0:
        checkpoint.claim_output(args)


class StepGuard:
    """Where all processes agree, in each step, whether to go on: every loss is finite, and none was asked to end.

    On a CPU they agree before the update. On a GPU the losses are gathered there and read one step later, so that the
    host never waits for a step that it has just queued: one update from a bad loss is made before all stop. So no
    checkpoint may be written before `check_last`.

    From here on SIGTERM and SIGINT (Ctrl-C) ask the process to end after a step; a second SIGINT ends it at once.
    """

    def __init__(self, device: torch.device):
        self.delayed = device.type == 'cuda'
        self.asked = 0  # the signal that asked this process to end
        self.stop_signal = 0  # the signal that any process got; the same step in all of them
        self.unread: tuple[Tensor, torch.cuda.Event, str] | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask)

    def _ask(self, number: int, _):
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if utils.rank() == 0:  # print may not be called here: the signal may have come within another print
                os.write(2, b'\nstopping after the next step; Ctrl-C again stops at once, without saving\n')

    def check(self, loss: Tensor, place: str):
        """Take the loss of a step; InputError, in all processes, where that of one is not finite."""
        self.check_last()
        verdicts = utils.all_gather(torch.stack([loss, torch.full_like(loss, self.asked)]))
        if self.delayed:
            host = torch.empty_like(verdicts, device='cpu', pin_memory=True).copy_(verdicts, non_blocking=True)
            self.unread = host, torch.cuda.current_stream().record_event(), place
        else:
            self._read(verdicts, place)

    def check_last(self):
        """Read what a GPU has gathered in the last step; on a CPU that was done at once."""
        if self.unread:
            (verdicts, copied, place), self.unread = self.unread, None
            copied.synchronize()
            self._read(verdicts, place)

    def _read(self, verdicts: Tensor, place: str):
        losses, signals = verdicts.T.tolist()  # (processes, 2)
        self.stop_signal = self.stop_signal or int(max(signals))
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            raise InputError(
                f'the loss of rank {bad[0]} is {losses[bad[0]]} {place}; all stop, checkpoints are as they were. '
                'A lower --lr, --clip-grad 1, or --precision bf16 or fp32 may help'
            )


class ModelEma(ModelEmaV3):
    """timm's average of a model, which follows its schedule too: that is state, but no tensor to average."""

    def update(self, model: nn.Module, step: int | None = None):
        super().update(model, step)
        self._follow(model)

    def set(self, model: nn.Module):
        super().set(model)
        self._follow(model)

    def _follow(self, model: nn.Module):
        if hasattr(model, 'set_schedule'):
            self.module.set_schedule(model.stage_wise, model.evolving)


def train_step(
    state: State,
    net: nn.Module,
    criterion: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    autocast: Callable,
    args: argparse.Namespace,
    accept: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """One optimizer step from `count` batches of images (B, 3, rows, columns) and targets; returns the mean loss.

    `net` is the model as it is called, perhaps inside DistributedDataParallel. `accept` sees the loss before the update
    and may raise. Nothing here waits for a GPU, unless the optimizer is not fused and fp16 has to look for overflows.
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
    if accept is not None:
        accept(total)
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
    guard: StepGuard,
) -> dict[str, float]:
    """Train on the batches of an epoch from `state.step` on; returns the mean loss, the rate and images a second.

    Saves on the way where the flags ask for it, and before it ends, with exit code 128 and the signal, where a process
    was asked to.
    """
    net.train()
    device = next(state.model.parameters()).device
    count, steps = args.grad_accum_steps, len(loader) // args.grad_accum_steps
    first, images = state.step, global_batch(args)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # sums: of the epoch, since the last line of progress
    sums[0] = state.loss_sum if utils.rank() == 0 else 0.0
    loader.sampler.set_epoch(state.epoch, start=first * count * args.batch_size)
    started = lap = time.perf_counter()
    batches, shown = iter(loader), first
    for step in range(first, steps):
        place = f'in epoch {state.epoch}, step {step}, at rate {state.optimizer.param_groups[-1]["lr"]:.3g}'
        factor = utils.inject_fault(state.epoch, step)
        key = args.seed, state.epoch, step, 1 + utils.rank()
        inputs = _prepare(islice(batches, count), mixup, device, key, factor, memory_format(args))
        sums += train_step(state, net, criterion, inputs, count, autocast, args, partial(guard.check, place=place))
        state.step = step + 1
        interval = args.save_interval_steps and state.step % args.save_interval_steps == 0
        if guard.stop_signal or (interval and state.step < steps):
            guard.check_last()
            state.loss_sum = utils.all_sum(sums.clone())[0].item()
            sums[0] = state.loss_sum if utils.rank() == 0 else 0.0
            checkpoint.save(args, state)
        if guard.stop_signal:
            say(f'asked to end: stopped {place}' + (f'; saved in {args.output_dir}' if args.output_dir else ''))
            raise SystemExit(128 + guard.stop_signal)
        if state.step % args.print_freq == 0 or state.step == steps:
            lap_loss = utils.all_sum(sums.clone())[1].item() / utils.world_size() / (state.step - shown)
            now = time.perf_counter()
            left = timedelta(seconds=round((now - started) / (state.step - first) * (steps - state.step)))
            say(
                f'Epoch: [{state.epoch}/{args.epochs}]  [{state.step:>{len(str(steps))}}/{steps}]  '
                f'loss: {lap_loss:.4f}  lr: {state.optimizer.param_groups[-1]["lr"]:.3g}  '
                f'{images * (state.step - shown) / (now - lap):.1f} img/s  eta: {left}'
                + (f'  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB' if device.type == 'cuda' else '')
            )
            sums[1], lap, shown = 0.0, now, state.step
    guard.check_last()
    seconds = max(time.perf_counter() - started, 1e-9)
    return {
        'train_loss': utils.all_sum(sums)[0].item() / utils.world_size() / steps,
        'train_lr': state.optimizer.param_groups[-1]['lr'],
        'train_images_per_second': (steps - first) * images / seconds,
    }


def _prepare(
    batches: Iterable,
    mixup: Mixup | None,
    device: torch.device,
    key: tuple[int, ...],
    factor: float,
    memory_format: torch.memory_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    for i, (images, targets) in enumerate(batches):
        # Mixup and stochastic depth too are functions of the place in the run, as the data set's augmentation is.
        utils.seed_all(*key, i)
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        images = images.contiguous(memory_format=memory_format)
        if factor != 1:
            images = images * factor
        yield mixup(images, targets) if mixup else (images, targets)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, autocast: Callable, name: str = 'Test') -> dict[str, float]:
    """Top-1, top-5 (percent) and loss over the images of all processes, each image once; also how many there were."""
    model.eval()
    device = next(model.parameters()).device
    sums, count = torch.zeros(3, dtype=torch.float64, device=device), 0
    for images, targets in loader:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets, reduction='none').double().sum()
        best = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        sums += torch.stack([best[:, :1].sum(), best.sum(), loss])
        count += len(targets)
    top1, top5, loss, count = utils.all_sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    results = {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count}
    say(
        f'{name}: * Acc@1 {results["acc1"]:.3f} Acc@5 {results["acc5"]:.3f} loss {results["loss"]:.3f}  '
        f'({count:.0f} images)'
    )
    return results


def evaluate_checkpoint(
    args: argparse.Namespace, content: dict, model: nn.Module, val_loader: DataLoader, autocast: Callable
) -> dict[str, float]:
    """Evaluate what --resume names and `content` holds, with the selection that its weights were saved with."""
    loaded = checkpoint.load_exactly(model, content, args.resume, args.eval_ema, training=False)
    if hasattr(model, 'set_schedule') and '_extra_state' not in weights.find_weights(content, args.eval_ema):
        if loaded.filled:
            say(f'{args.resume} holds a plain vision transformer: its selection is one that it was not trained for')
        else:
            say(f'{args.resume} does not say its selection, stage-wise or layer-wise; it is taken for a finished model')
    say(f'{args.resume}: {"averaged weights" if args.eval_ema else "weights"} loaded, {describe_schedule(model)}')
    if args.fuse:
        fuse(model)
    if args.compile:
        model.compile()
    return evaluate(model, val_loader, autocast)


def fuse(model: nn.Module):
    """Fold a model in place for inference, as far as it or timm can, and say where there is nothing to fold."""
    before = list(model.state_dict())
    if hasattr(model, 'fuse'):
        model.fuse()
    else:
        reparameterize_model(model, inplace=True)
    if list(model.state_dict()) == before:
        say(f'--fuse: {type(model).__name__} has nothing that can be folded; it is evaluated as it is')


def start(args: argparse.Namespace, model: nn.Module, precision: str, steps: int, classes: Sequence[str] = ()) -> State:
    """What a run begins with: weights, average, optimizer and schedules, new or from a checkpoint, and say so."""
    device = next(model.parameters()).device
    if args.finetune:
        loaded = weights.load_weights(model, args.finetune, adapt=True, report=say)
        copies = f'copies in the model: {", ".join(loaded.filled)}; ' if loaded.filled else ''
        say(
            f'{args.finetune}: loaded; new in the model: {", ".join(loaded.missing) or "nothing"}; {copies}'
            f'not used of the file: {", ".join(loaded.dropped) or "nothing"}'
        )
        if 'head_cls.weight' in loaded.filled:
            say("both heads start from the file's: head reads the mean of the patches, head_cls the class token")
    ema = None
    if args.model_ema:
        ema = ModelEma(model, decay=args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None)
    images = global_batch(args)
    rate = args.lr * images / 512
    # One kernel for all parameters, where the optimizer has one.
    fused = {'fused': True} if args.opt.lower() in ('adam', 'adamw') else {}
    try:
        optimizer = create_optimizer_v2(model, **(optimizer_kwargs(args) | {'lr': rate} | fused))
        scheduler, _ = create_scheduler(args, optimizer)
        if scheduler is None:  # timm's answer to 'none', and before 1.0.31 to any name that it does not know
            raise ValueError('no such schedule, expected one of timm, such as cosine')
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise InputError(f'--opt {args.opt}, --sched {args.sched} or their flags: {error}') from error
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    warn_of_warmup(args, rate)
    state = State(model, ema, optimizer, scheduler, scaler, args.start_epoch, classes=list(classes))
    if found := checkpoint.find_start(args):
        source, content = found
        state.load(content, source, args)
        say(f'{source}: going on with epoch {state.epoch}, step {state.step}, best Acc@1 so far {state.best_acc1:.3f}')
    check_agreement(state, device)
    say(
        f'batch {args.batch_size} x {args.grad_accum_steps} accumulated x {utils.world_size()} processes = '
        f'{images} images a step (published: 1024 to 2048), '
        f'learning rate {args.lr:g} * {images} / 512 = {rate:.3g}, '
        f'{steps} steps an epoch, epochs {state.epoch} to {args.epochs - 1}, stage-wise from epoch {stage_epoch(args)}'
    )
    return state


def check_agreement(state: State, device: torch.device):
    """InputError where processes would begin at different places, as with an output folder on each node's own disk."""
    places = utils.all_gather(torch.tensor([state.epoch, state.step], device=device))
    places = [tuple(place) for place in places.tolist()]
    if len(set(places)) > 1:
        raise InputError(
            f'processes would begin at different places, (epoch, step): {", ".join(map(str, places))}; '
            'all of them must find the same checkpoint'
        )


def warn_of_warmup(args: argparse.Namespace, rate: float):
    """Say where the warm-up takes the whole run, so that the learning rate never becomes what was asked for."""
    last = max(args.epochs - 2, 0)  # the place in the schedule of the last epoch, see `train`
    if last < args.warmup_epochs and args.warmup_lr < rate:
        reached = args.warmup_lr + (rate - args.warmup_lr) * last / args.warmup_epochs
        say(
            f'warning: --warmup-epochs {args.warmup_epochs} takes all of --epochs {args.epochs}: the learning rate '
            f'goes from {args.warmup_lr:.3g} to {reached:.3g} and never reaches {rate:.3g}; '
            f'use --warmup-epochs {args.epochs // 10}, or a higher --warmup-lr'
        )


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """The order in memory of images and of the weights of convolutions."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


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
    model.to(memory_format=memory_format(args))  # before its average and its optimizer's moments, which take it over
    state = start(args, model, precision, steps, val_loader.dataset.classes)
    checkpoint.clear_output(args)
    networks = [model, state.ema.module] if state.ema else [model]
    if args.compile:
        model.compile()
    net = model
    if utils.world_size() > 1:
        net = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)

    if state.epoch >= args.epochs:
        say(f'all {args.epochs} epochs are done already; to train on, give a larger --epochs and --accept-changes')
    guard = StepGuard(device)
    test, started, first = {}, time.perf_counter(), state.epoch
    for epoch in range(first, args.epochs):
        if hasattr(model, 'set_schedule'):
            model.set_schedule(epoch >= stage_epoch(args), epoch >= args.prune_warmup_epoch)
        record = train_one_epoch(state, net, criterion, train_loader, mixup, autocast, args, guard)
        if args.max_broken_images:
            broken = utils.all_sum(train_loader.dataset.broken.to(device, torch.int32))
            record['train_broken_images'] = int(broken.count_nonzero())
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
        state.epoch, state.step, state.loss_sum = epoch + 1, 0, 0.0
        finish_epoch(args, state, record | {'precision': precision, 'epoch': epoch})
        left = (time.perf_counter() - started) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        say(f'Epoch {epoch} done, best Acc@1 {state.best_acc1:.3f}, time left {timedelta(seconds=round(left))}\n')
    return test


def finish_epoch(args: argparse.Namespace, state: State, record: dict):
    """Keep the best accuracy, write the checkpoint and a line of the log."""
    improved = (record.get('test_acc1') or 0.0) > state.best_acc1  # False for NaN
    if improved:
        state.best_acc1 = record['test_acc1']
    if not args.output_dir or utils.rank() > 0:
        return
    record |= {
        'best_acc1': state.best_acc1,
        'n_parameters': count_parameters(state.model),
        'selection': describe_schedule(state.model),
        'global_batch': global_batch(args),
    }
    output = Path(args.output_dir)
    # The log first: once the checkpoint is there, a run goes on with the next epoch, and would never write this line.
    checkpoint.write_log(output / 'log.txt', record)
    checkpoint.save(args, state, improved)
    if state.epoch == args.epochs:
        say(f'written: {", ".join(str(p) for p in sorted(output.glob("*")))}')


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
