"""Training and evaluation of any model: one step, one epoch, one evaluation, the loop over epochs.

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

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, reparameterize_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoint
import datasets
import losses
import models
import utils
from checkpoint import RunFolder, State
from models import weights
from utils import InputError, at_least, print_rank0

# Flags that may differ between a run and its continuation, and whether it goes on bit for bit even so.
MAY_CHANGE = {
    **dict.fromkeys(('print_freq', 'eval_interval', 'fuse', 'start_epoch', 'model_ema_force_cpu', 'amp'), True),
    **dict.fromkeys(('precision', 'channels_last', 'compile'), False),
    **utils.MAY_CHANGE,
    **checkpoint.MAY_CHANGE,
    **datasets.MAY_CHANGE,
    **losses.MAY_CHANGE,
}


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the loop: epochs, optimizer, schedules, precision."""
    add = parser.add_argument_group('training').add_argument
    add('--epochs', type=at_least(1), default=300, help='passes over the training images')
    add('--start_epoch', type=int, default=0, help='first epoch, where no checkpoint says it')
    add(
        '--stage-epoch', type=int, metavar='N',
        help='select before each layer until this epoch, then before each stage (default: two thirds of the epochs; '
        'with --method 0)',
    )  # fmt: skip
    add('--prune-warmup-epoch', type=int, default=0, metavar='N', help='first N epochs without selection')
    add(
        '--eval-interval',
        type=at_least(1),
        default=1,
        metavar='N',
        help='evaluate every N epochs, and each of the last N',
    )
    add('--print-freq', type=at_least(1), default=50, metavar='N', help='steps between two lines of progress')
    add(
        '--precision', choices=['fp32', 'tf32', 'bf16', 'fp16'],
        help='tf32: float32 with faster, rounded products, on GPUs; bf16, fp16: autocast (default: in training on a '
        'GPU bf16, or fp16 where it has none, or with --no-amp tf32, and on a CPU fp32; with --eval that of the '
        'training, on any device, if the checkpoint says it, else fp32)',
    )  # fmt: skip
    add(
        '--amp',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='half precision where --precision is not given',
    )
    add('--channels-last', action='store_true', help='training: memory order of images and convolutions')
    add('--fuse', action='store_true', help='with --eval: fold BatchNorms and drop training heads')
    add('--compile', action='store_true', help='compile the model and the teacher with torch.compile')

    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='adamw', metavar='NAME', help='any optimizer of timm')
    add('--opt-eps', type=float, default=1e-8, help='epsilon of the optimizer')
    add('--opt-betas', type=float, nargs=2, help="default: the optimizer's own")
    add('--clip-grad', type=utils.above_zero, metavar='NORM', help='clip gradients (default: not)')
    add('--clip-mode', choices=['norm', 'value', 'agc'], default='norm', help='the norm, each value, or adaptive (AGC)')
    add('--momentum', type=float, default=0.9, help='of optimizers that have one')
    add('--weight-decay', type=float, default=0.05, help='not on biases, norms, positions')
    add('--grad-accum-steps', type=at_least(1), default=1, metavar='N', help='batches a process adds up for one step')
    add('--model-ema', action=argparse.BooleanOptionalAction, default=True, help='keep an EMA of the weights')
    add('--model-ema-decay', type=float, default=0.99996, help='of the EMA, for each step')
    add('--model-ema-force-cpu', action='store_true', help='keep the EMA on the CPU')

    add = parser.add_argument_group('learning rate').add_argument
    add('--lr', type=float, default=5e-4, help='for 512 images a step; scaled to the global batch')
    add('--sched', default='cosine', metavar='NAME', help='any schedule of timm')
    add('--lr-noise', type=float, nargs='+', metavar='PCT', help='epochs, as a share of all, with noisy learning rate')
    add('--lr-noise-pct', type=float, default=0.67, help='limit of the noise')
    add('--lr-noise-std', type=float, default=1.0, help='deviation of the noise')
    add('--warmup-lr', type=float, default=1e-6, help='at the start of the warm-up')
    add('--min-lr', type=float, default=1e-5, help='at the end')
    add('--decay-epochs', type=float, default=30, help='epochs between decays, for step schedules')
    add('--warmup-epochs', type=int, default=5, help='epochs of linear warm-up')
    add('--cooldown-epochs', type=int, default=10, help='accepted without effect: as published, there is no cooldown')
    add('--patience-epochs', type=int, default=10, help='epochs without progress, for plateau schedules')
    add('--decay-rate', '--dr', type=float, default=0.1, help='factor of a decay')


def get_parser(description: str, recipe: dict) -> utils.Parser:
    """Parser with the flags of all modules; `recipe` holds the defaults in which a script differs from the others."""
    parser = utils.Parser(description)
    for module in (models, datasets, losses, checkpoint, utils):
        module.add_arguments(parser)
    add_arguments(parser)
    parser.set_defaults(**recipe)
    return parser


def parse_args(description: str, recipe: dict) -> argparse.Namespace:
    """The flags of this process; InputError for files that are not there, before anything is read or built."""
    args = get_parser(description, recipe).parse_args()
    checkpoint.check_arguments(args)
    if not args.eval:
        losses.check_arguments(args)
    return args


# --- precision and device


def pick_precision(precision: str | None, device: torch.device, amp: bool = True) -> str:
    """The precision asked for, or on a GPU the fastest safe one: half precision with `amp`, else TF32, or fp32.

    The published recipes in fp32 had TF32 products where the device has them: it was PyTorch's default.
    """
    has_tf32 = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == 'tf32' and not has_tf32:
        raise InputError(f'--precision tf32 is a mode of NVIDIA GPUs since Ampere, the device is {device}; use fp32')
    if precision:
        return precision
    if amp and device.type == 'cuda':
        return utils.half_precision(device)
    return 'tf32' if has_tf32 else 'fp32'


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


# --- one step


class StepGuard:
    """Where all processes agree, in each step, whether to go on: every loss is finite, and none was asked to stop.

    On a CPU they agree before the update. On a GPU the losses are gathered there and read one step later, so that the
    host never waits for a step that it has just queued: one update from a bad loss is made before all stop. So no
    checkpoint may be written before `check_last`.

    From here on SIGTERM and SIGINT (Ctrl-C) ask the process to stop after a step; a second SIGINT ends it at once.
    """

    def __init__(self, device: torch.device):
        self.delayed = device.type == 'cuda'
        self.received = 0  # the signal that asked this process to stop
        self.stop_signal = 0  # the same of any process, known to all of them after the same step
        self.pending: tuple[Tensor, torch.cuda.Event | None, str] | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._receive)

    def _receive(self, number: int, _):
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if utils.rank() == 0:  # print may not be called here: the signal may have come within another print
                os.write(2, b'\nstopping after the next step; Ctrl-C again stops at once, without saving\n')

    def check(self, loss: Tensor, place: str):
        """Take the loss of a step; InputError, in all processes, where that of one is not finite."""
        self.check_last()
        reports, copied = utils.all_gather(torch.stack([loss, torch.full_like(loss, self.received)])), None
        if self.delayed:
            reports = torch.empty_like(reports, device='cpu', pin_memory=True).copy_(reports, non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        self.pending = reports, copied, place
        if not self.delayed:
            self.check_last()

    def check_last(self):
        """Read what was gathered in the last step, where that has not been done."""
        if self.pending is None:
            return
        (reports, copied, place), self.pending = self.pending, None
        if copied:
            copied.synchronize()
        losses, signals = reports.T.tolist()  # (processes, 2)
        self.stop_signal = self.stop_signal or int(max(signals))
        if bad := [(rank, loss) for rank, loss in enumerate(losses) if not math.isfinite(loss)]:
            raise InputError(
                f'the loss of rank {bad[0][0]} is {bad[0][1]} {place}; all stop, checkpoints are as they were. '
                'A lower --lr, --clip-grad 1, or --precision bf16 or fp32 may help'
            )


class ModelEma(ModelEmaV3):
    """timm's EMA of a model, which follows its schedule too: that is state, but no tensor to average."""

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
    clip_grad: float | None = None,
    clip_mode: str = 'norm',
    accept: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """One optimizer step from `count` batches of images (B, 3, rows, columns) and targets; returns the mean loss.

    `net` is the model as it is called, perhaps inside DistributedDataParallel. `accept` sees the loss before the update
    and may raise. Nothing here waits for a GPU, unless the optimizer is not fused and fp16 has to look for overflows.
    """
    total = 0.0
    for i, (images, targets) in enumerate(batches, 1):
        # Gradients of earlier batches need not be exchanged: the last exchange carries their sum.
        wait = isinstance(net, DistributedDataParallel) and i < count
        with net.no_sync() if wait else nullcontext():
            with autocast():
                loss = criterion(images, net(images), targets) / count
            state.scaler.scale(loss).backward()
        total += loss.detach()
    if accept is not None:
        accept(total)
    if clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        dispatch_clip_grad(state.model.parameters(), clip_grad, clip_mode)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.ema:
        state.ema.update(state.model)
    return total


# --- one epoch


class Progress:
    """Loss and speed of an epoch. The sums stay on the device, so that only `report` and `total_loss` wait for it."""

    def __init__(self, state: State, steps: int, images: int, device: torch.device):
        self.state, self.steps, self.images = state, steps, images
        # Of the whole epoch, and since the last report; what is done of the epoch already counts once, on rank 0.
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.sums[0] = state.loss_sum if utils.rank() == 0 else 0.0
        self.first = self.last = state.step
        self.started = self.last_time = time.perf_counter()

    def total_loss(self) -> float:
        """Sum of the losses of the epoch's steps, over all processes."""
        return utils.all_sum(self.sums.clone())[0].item()

    def report(self, epochs: int):
        """Print a line; its loss and speed are means since the last one."""
        step, steps, now = self.state.step, self.steps, time.perf_counter()
        loss = utils.all_sum(self.sums.clone())[1].item() / utils.world_size() / (step - self.last)
        left = timedelta(seconds=round((now - self.started) / (step - self.first) * (steps - step)))
        memory = f'  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB' if self.sums.is_cuda else ''
        print_rank0(
            f'Epoch: [{self.state.epoch}/{epochs}]  [{step:>{len(str(steps))}}/{steps}]  '
            f'loss: {loss:.4f}  lr: {learning_rate(self.state):.3g}  '
            f'{self.images * (step - self.last) / (now - self.last_time):.1f} img/s  eta: {left}{memory}'
        )
        self.sums[1], self.last, self.last_time = 0.0, step, now

    def summary(self) -> dict[str, float]:
        """What the log has of the epoch."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            'epoch': self.state.epoch,
            'train_loss': self.total_loss() / utils.world_size() / self.steps,
            'train_lr': learning_rate(self.state),
            'train_images_per_second': (self.steps - self.first) * self.images / seconds,
            'global_batch': self.images,
        }


def train_one_epoch(
    state: State,
    train_on: Callable,
    prepare: Callable,
    loader: DataLoader,
    guard: StepGuard,
    folder: RunFolder,
    accumulate: int,
    epochs: int,
    print_freq: int,
    save_interval: int = 0,
) -> dict[str, float]:
    """Train on the batches of an epoch from `state.step` on; returns what the log has of it.

    `prepare` gives batches on the device, see `prepare_batches`, and `train_on` makes a step of `accumulate` of them,
    see `train_step`. Saves every `save_interval` steps (0: never). Where a process was asked to stop, all of them save
    and raise SystemExit with 128 and the signal.
    """
    device, steps = next(state.model.parameters()).device, len(loader) // accumulate
    progress = Progress(state, steps, global_batch(loader.batch_size, accumulate), device)
    loader.sampler.set_epoch(state.epoch, start=state.step * accumulate * loader.batch_size)
    state.model.train()
    batches = iter(loader)
    for step in range(state.step, steps):
        place = f'in epoch {state.epoch}, step {step}, at rate {learning_rate(state):.3g}'
        inputs = prepare(islice(batches, accumulate), key=(state.epoch, step))
        progress.sums += train_on(inputs, accumulate, accept=partial(guard.check, place=place))
        state.step = step + 1
        save_now = save_interval and state.step % save_interval == 0 and state.step < steps
        if guard.stop_signal or save_now:
            guard.check_last()
            state.loss_sum = progress.total_loss()
            folder.save(state)
        if guard.stop_signal:
            print_rank0(f'asked to stop: stopped {place}' + (f'; saved in {folder.path}' if folder.path else ''))
            raise SystemExit(128 + guard.stop_signal)
        if state.step % print_freq == 0 or state.step == steps:
            progress.report(epochs)
    guard.check_last()
    return progress.summary() | count_broken_images(loader, device)


def count_broken_images(loader: DataLoader, device: torch.device) -> dict[str, int]:
    """Images that --max-broken-images has let pass in any process, where it allows some."""
    if not loader.dataset.max_broken:
        return {}
    broken = utils.all_sum(loader.dataset.broken.to(device, torch.int32))
    return {'train_broken_images': int(broken.count_nonzero())}


def prepare_batches(
    batches: Iterable[tuple[Tensor, Tensor]],
    mixup: Mixup | None,
    device: torch.device,
    layout: torch.memory_format,
    seed: int,
    key: tuple[int, int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device, mixed.

    Mixup and stochastic depth are functions of `key`, (epoch, step), as the augmentation of an image is of its place.
    """
    for i, (images, targets) in enumerate(batches):
        utils.seed_all(seed, *key, 1 + utils.rank(), i)
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        images = images.contiguous(memory_format=layout)
        yield mixup(images, targets) if mixup else (images, targets)


def learning_rate(state: State) -> float:
    """The learning rate of the step that comes, without the layer-wise factors that some optimizers have."""
    return state.optimizer.param_groups[-1]['lr']


def global_batch(batch_size: int, accumulate: int) -> int:
    """Images that one optimizer step sees, over all processes."""
    return batch_size * accumulate * utils.world_size()


# --- evaluation


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
        correct = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        sums += torch.stack([correct[:, :1].sum(), correct.sum(), loss])
        count += len(targets)
    top1, top5, loss, count = utils.all_sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    results = {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count}
    print_rank0(
        f'{name}: * Acc@1 {results["acc1"]:.3f} Acc@5 {results["acc5"]:.3f} loss {results["loss"]:.3f}  '
        f'({count:.0f} images)'
    )
    return results


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Evaluate the checkpoint of --resume as it was trained, but for flags that are given."""
    content = weights.read_checkpoint(args.resume, print_rank0)
    args = checkpoint.restore_model_args(args, content)
    precision = pick_precision(args.precision, device, args.amp)
    set_backends(precision, device)
    config = datasets.data_config(args, args.model)
    classes, count = checkpoint.find_classes(content, args.model, args.eval_ema)
    _, loader = datasets.build_loaders(args, config, utils.rank(), utils.world_size(), classes, count, train=False)
    model = models.build(args, len(loader.dataset.classes), config.input_size).to(device)
    print_rank0(f'{datasets.describe(config)}\n{describe(args.model, model, precision)}')
    checkpoint.load_for_evaluation(model, content, args.resume, args.eval_ema)
    print_rank0(f'{args.resume}: {describe_schedule(model)}')
    if args.fuse:
        fuse(model)
    if args.compile:
        model.compile()
    return evaluate(model, loader, make_autocast(precision, device))


def fuse(model: nn.Module):
    """Fold a model in place for inference, as far as it or timm can, and say where there is nothing to fold."""
    before = list(model.state_dict())
    if hasattr(model, 'fuse'):
        model.fuse()
    else:
        reparameterize_model(model, inplace=True)
    if list(model.state_dict()) == before:
        print_rank0(f'--fuse: {type(model).__name__} has nothing that can be folded; it is evaluated as it is')


def describe(name: str, model: nn.Module, precision: str) -> str:
    """A line about a model and what it runs on."""
    device = next(model.parameters()).device
    return f'{name}: {count_parameters(model):,} parameters, {device}, {precision}, {utils.world_size()} process(es)'


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def describe_schedule(model: nn.Module) -> str:
    """In words, where a model selects."""
    if not hasattr(model, 'set_schedule'):
        return 'no selection'
    return ('stage-wise' if model.stage_wise else 'layer-wise') if model.evolving else 'all patches'


# --- a run


def build_state(
    args: argparse.Namespace,
    model: nn.Module,
    precision: str,
    batch_size: int,
    config: datasets.DataConfig | None = None,
    classes: Sequence[str] = (),
) -> State:
    """Optimizer, schedule, loss scale and EMA of a model, as the flags say; nothing is read or written.

    `precision` and `config` are what holds where the flags leave it open; checkpoints keep them, and `classes`.
    """
    device = next(model.parameters()).device
    model.to(memory_format=layout(args.channels_last))  # first: EMA and moments take it over
    ema = None
    if args.model_ema:
        ema = ModelEma(model, decay=args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None)
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
        scheduler, _ = create_scheduler(args, optimizer)
        if scheduler is None:  # timm's answer to 'none', and before 1.0.31 to any name that it does not know
            raise ValueError('no such schedule, expected one of timm, such as cosine')
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise InputError(f'--opt {args.opt}, --sched {args.sched} or their flags: {error}') from error
    warn_of_warmup(args, rate)
    flags = vars(args) | {'device': device.type, 'precision': precision, 'world_size': utils.world_size()}
    flags |= config._asdict() if config else {}
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    return State(model, ema, optimizer, scheduler, scaler, flags, list(classes), epoch=args.start_epoch)


def layout(channels_last: bool) -> torch.memory_format:
    """The order in memory of images and of the weights of convolutions."""
    return torch.channels_last if channels_last else torch.contiguous_format


def warn_of_warmup(args: argparse.Namespace, rate: float):
    """Say where the warm-up takes the whole run, so that the learning rate never becomes what was asked for."""
    last = max(args.epochs - 2, 0)  # the place in the schedule of the last epoch, see `train`
    if last < args.warmup_epochs and args.warmup_lr < rate:
        reached = args.warmup_lr + (rate - args.warmup_lr) * last / args.warmup_epochs
        print_rank0(
            f'warning: --warmup-epochs {args.warmup_epochs} takes all of --epochs {args.epochs}: the learning rate '
            f'goes from {args.warmup_lr:.3g} to {reached:.3g} and never reaches {rate:.3g}; '
            f'use --warmup-epochs {args.epochs // 10}, or a higher --warmup-lr'
        )


def train(
    args: argparse.Namespace,
    state: State,
    criterion: nn.Module,
    mixup: Mixup | None,
    train_loader: DataLoader,
    val_loader: DataLoader,
    folder: RunFolder,
) -> dict[str, float]:
    """Train for all epochs, evaluating, saving and logging on the way; returns the last evaluation."""
    count, stage_epoch, first = args.grad_accum_steps, first_stage_wise_epoch(args), state.epoch
    if len(train_loader) < count:
        raise InputError(f'--grad-accum-steps {count}: an epoch has only {len(train_loader)} batches')
    plan = f'epochs {first} to {args.epochs - 1}, stage-wise from epoch {stage_epoch}'
    if first >= args.epochs:
        plan = f'all {args.epochs} epochs are done already; to train on, give a larger --epochs and --accept-changes'
    print_rank0(f'{len(train_loader) // count} steps an epoch, {plan}')
    folder.clear()
    model, ema, device = state.model, state.ema.module if state.ema else None, next(state.model.parameters()).device
    autocast, net = make_autocast(state.flags['precision'], device), wrap(model, criterion, args.compile)
    clip = dict(clip_grad=args.clip_grad, clip_mode=args.clip_mode)
    step = partial(train_step, state, net, criterion, autocast=autocast, **clip)
    prepare = partial(prepare_batches, mixup=mixup, device=device, layout=layout(args.channels_last), seed=args.seed)
    guard, started, test = StepGuard(device), time.perf_counter(), {}
    for epoch in range(first, args.epochs):
        if hasattr(model, 'set_schedule'):
            model.set_schedule(epoch >= stage_epoch, epoch >= args.prune_warmup_epoch)
        record = train_one_epoch(
            state, step, prepare, train_loader, guard, folder, count, args.epochs, args.print_freq,
            args.save_interval_steps,
        )  # fmt: skip
        for network in (model, ema) if ema else (model,):
            if utils.world_size() > 1:  # the first process writes the files: its BatchNorm statistics count
                distribute_bn(network, utils.world_size())
        if (epoch + 1) % args.eval_interval == 0 or epoch >= args.epochs - args.eval_interval:
            test = evaluate(model, val_loader, autocast)
            record |= {f'test_{key}': value for key, value in test.items()}
            if args.eval_ema and ema:
                results = evaluate(ema, val_loader, autocast, 'Test of the EMA')
                record |= {f'test_ema_{key}': value for key, value in results.items()}
        # As published: the rate of epoch e is the schedule's at e - 1, so epochs 0 and 1 both have the warm-up rate.
        state.scheduler.step(epoch, record.get('test_acc1', state.best_acc1))
        state.epoch, state.step, state.loss_sum = epoch + 1, 0, 0.0
        finish_epoch(state, folder, record)
        left = round((time.perf_counter() - started) / (epoch + 1 - first) * (args.epochs - epoch - 1))
        print_rank0(f'Epoch {epoch} done, best Acc@1 {state.best_acc1:.3f}, time left {timedelta(seconds=left)}\n')
    if folder.path:
        print_rank0(f'written: {", ".join(str(path) for path in sorted(folder.path.glob("*")))}')
    return test


def wrap(model: nn.Module, criterion: nn.Module, compiled: bool) -> nn.Module:
    """The model as training calls it, with several processes in DistributedDataParallel; compiles the teacher too."""
    if compiled:
        model.compile()
        if criterion.teacher is not None:
            criterion.teacher.compile()
    if utils.world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)


def first_stage_wise_epoch(args: argparse.Namespace) -> int:
    """The first epoch with one selection a stage; published: 200 of 300. A pretrained ViT needs no earlier ones."""
    if args.stage_epoch is not None:
        return args.stage_epoch
    return 0 if args.method else 2 * args.epochs // 3


def finish_epoch(state: State, folder: RunFolder, record: dict):
    """Keep the best accuracy, write the checkpoint and a line of the log."""
    improved = (record.get('test_acc1') or 0.0) > state.best_acc1  # False for NaN
    if improved:
        state.best_acc1 = record['test_acc1']
    record |= {
        'precision': state.flags['precision'],
        'best_acc1': state.best_acc1,
        'n_parameters': count_parameters(state.model),
        'selection': describe_schedule(state.model),
    }
    # The log first: once the checkpoint is there, a run goes on with the next epoch, and would never write this line.
    folder.write_log(record)
    folder.save(state, improved)
