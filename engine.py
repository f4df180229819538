"""Training and evaluation of any model: one step, one epoch, one evaluation, the loop over epochs.

A model is called on images and returns logits, in training perhaps a named tuple of them. A model with slow-fast
evolution has `set_schedule`; that is all this module knows of families.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import dispatch_clip_grad, distribute_bn, reparameterize_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoint
import datasets
import losses
import models
import optim
import output
import utils
from checkpoint import State
from measure import costs
from optim import global_batch, learning_rate, memory_format
from output import RunFolder
from stopping import StepCheck
from utils import InputError, at_least, make_autocast, pick_precision, print_rank0, set_backends

# Flags that may differ between a run and its continuation, and whether it goes on bit for bit even so.
MAY_CHANGE = {
    **dict.fromkeys(('print_freq', 'fuse', 'start_epoch', 'amp'), True),
    **dict.fromkeys(('precision', 'compile', 'grad_checkpointing'), False),
    'eval_interval': False,  # plateau schedules and the best checkpoint depend on it
    **utils.MAY_CHANGE,
    **checkpoint.MAY_CHANGE,
    **datasets.MAY_CHANGE,
    **losses.MAY_CHANGE,
    **optim.MAY_CHANGE,
}


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of the loop: epochs, precision, and those of the optimizer."""
    add = parser.add_argument_group('training').add_argument
    add('--epochs', type=at_least(1), default=300, help='passes over the training images')
    add('--start_epoch', type=at_least(0), default=0, help='first epoch, where no checkpoint says it')
    add(
        '--stage-epoch', type=at_least(0), metavar='N',
        help='select before each layer until this epoch, then before each stage (default: two thirds of the epochs; '
        '0 with --method)',
    )  # fmt: skip
    add('--prune-warmup-epoch', type=at_least(0), default=0, metavar='N', help='first N epochs without selection')
    add('--eval-interval', type=at_least(1), default=1, metavar='N', help='evaluate every N epochs, and in the last N')
    add('--print-freq', type=at_least(1), default=50, metavar='N', help='steps between two lines of progress')
    add(
        '--precision', choices=['fp32', 'tf32', 'bf16', 'fp16'],
        help='tf32: float32 with faster, rounded products, on GPUs; bf16, fp16: autocast (default: in training on a '
        'GPU bf16, or fp16 where it has none, or with --no-amp tf32, and on a CPU fp32; with --eval that of the '
        'training, on any device, if the checkpoint says it, else fp32)',
    )  # fmt: skip
    on_off = argparse.BooleanOptionalAction
    add('--amp', action=on_off, default=True, help='half precision where --precision is not given')
    add('--fuse', action='store_true', help='with --eval: fold BatchNorms and drop training heads')
    add('--compile', action='store_true', help='compile the model and the teacher with torch.compile')
    add('--grad-checkpointing', action='store_true', help='save memory: run blocks again in the backward pass')
    add(
        '--mixup-off-epoch', type=at_least(0), default=0, metavar='N',
        help='train without mixup and cutmix from epoch N on (0: never)',
    )  # fmt: skip
    optim.add_arguments(parser)


def get_parser(description: str, recipe: dict) -> utils.Parser:
    """Parser with the flags of all modules; `recipe` holds the defaults in which a script differs from the others."""
    parser = utils.Parser(description)
    for module in (models, datasets, losses, checkpoint, utils):
        module.add_arguments(parser)
    add_arguments(parser)
    parser.set_defaults(**recipe)
    return parser


def parse_args(description: str, recipe: dict) -> argparse.Namespace:
    """The flags of this process; InputError for missing files and useless flags, before anything is read or built."""
    parser = get_parser(description, recipe)
    args = parser.parse_args(namespace=argparse.Namespace(model=None))
    checkpoint.check_arguments(args)
    if args.eval:
        return args  # a model that is not given is the checkpoint's
    args.model = args.model or parser.get_default('model')
    losses.check_arguments(args)
    if args.fuse:
        raise InputError('--fuse needs --eval: a model that was folded cannot be trained')
    if args.eval_ema and not args.model_ema:
        raise InputError('--eval-ema evaluates the EMA of the weights, and --no-model-ema keeps none; give one of them')
    if args.mixup_off_epoch and not (args.mixup or args.cutmix or args.cutmix_minmax):
        raise InputError(
            f'--mixup-off-epoch {args.mixup_off_epoch}: nothing to turn off; expected --mixup or --cutmix above 0'
        )
    if args.start_epoch >= args.epochs:
        raise InputError(f'--start_epoch: expected less than --epochs {args.epochs}, found {args.start_epoch}')
    return args


# --- one step


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
        # AGC too clips all parameters, the heads among them, as in the published recipe (facebookresearch/LeViT,
        # engine.py). Its paper and timm's train.py leave the head out.
        dispatch_clip_grad(state.model.parameters(), clip_grad, clip_mode)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.ema:
        state.ema.update(state.model)
    return total


# --- one epoch


class Plan(NamedTuple):
    """How a run trains: the flags of these names."""

    epochs: int
    stage_epoch: int  # the first with one selection a stage
    prune_warmup_epoch: int
    grad_accum_steps: int
    clip_grad: float | None
    clip_mode: str
    channels_last: bool
    compile: bool
    grad_checkpointing: bool
    mixup_off_epoch: int
    seed: int
    print_freq: int
    eval_interval: int
    eval_ema: bool
    save_interval_steps: int

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> 'Plan':
        """Published: stage-wise from epoch 200 of 300; a pretrained ViT, evolved, needs no earlier ones."""
        stage_epoch = 0 if args.method else 2 * args.epochs // 3
        if args.stage_epoch is not None:
            stage_epoch = args.stage_epoch
        return cls(**{name: getattr(args, name) for name in cls._fields} | {'stage_epoch': stage_epoch})


class Progress:
    """Loss and speed of an epoch. The sums stay on the device, so that only reading them waits for it."""

    def __init__(self, state: State, steps: int, images: int, device: torch.device):
        self.state, self.steps, self.images = state, steps, images
        # Of the whole epoch, and since the last report; what is done of the epoch already counts once, on rank 0.
        self.losses = torch.tensor([state.loss_sum * (utils.rank() == 0), 0.0], dtype=torch.float64, device=device)
        self.first = self.last = state.step
        self.started = self.last_time = time.perf_counter()

    def total_losses(self) -> tuple[float, float]:
        """Sums over all processes of the losses of the epoch's steps, and of those since the last report."""
        return tuple(utils.all_sum(self.losses.clone()).tolist())

    def report(self, epochs: int):
        """Print a line; its loss and speed are means since the last one."""
        step, steps, now = self.state.step, self.steps, time.perf_counter()
        loss = self.total_losses()[1] / utils.world_size() / (step - self.last)
        left = timedelta(seconds=round((now - self.started) / (step - self.first) * (steps - step)))
        memory = f'  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB' if self.losses.is_cuda else ''
        print_rank0(
            f'Epoch: [{self.state.epoch}/{epochs}]  [{step:>{len(str(steps))}}/{steps}]  '
            f'loss: {loss:.4f}  lr: {learning_rate(self.state):.3g}  '
            f'{self.images * (step - self.last) / (now - self.last_time):.1f} img/s  eta: {left}{memory}'
        )
        self.losses[1], self.last, self.last_time = 0.0, step, now

    def record(self) -> dict[str, float]:
        """What the log has of the epoch."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            'epoch': self.state.epoch,
            'train_loss': self.total_losses()[0] / utils.world_size() / self.steps,
            'train_lr': learning_rate(self.state),
            'train_images_per_second': (self.steps - self.first) * self.images / seconds,
            'global_batch': self.images,
        }


def train_one_epoch(
    state: State,
    step_on: Callable,
    loader: DataLoader,
    mixup: Mixup | None,
    plan: Plan,
    check: StepCheck,
    folder: RunFolder,
) -> dict[str, float]:
    """Train on the batches of an epoch from `state.step` on; returns what the log has of it.

    `step_on` is `train_step` for a number of batches. Where a process was asked to stop, all of them save and raise
    SystemExit with 128 and the signal.
    """
    device, accumulate = next(state.model.parameters()).device, plan.grad_accum_steps
    steps = len(loader) // accumulate
    progress = Progress(state, steps, global_batch(loader.batch_size, accumulate), device)
    loader.sampler.set_epoch(state.epoch, start=state.step * accumulate * loader.batch_size)
    state.model.train()
    batches = iter(loader)
    for step in range(state.step, steps):
        state.scheduler.step_update(state.epoch * steps + step)  # does nothing without --sched-on-updates
        place = f'in epoch {state.epoch}, step {step}, at rate {learning_rate(state):.3g}'
        inputs = islice(batches, accumulate)
        inputs = prepare_batches(inputs, mixup, device, plan.channels_last, (plan.seed, state.epoch, step))
        progress.losses += step_on(inputs, accumulate, accept=partial(check.check, place=place))
        state.step = step + 1

        interval = plan.save_interval_steps
        if check.stop or (interval and state.step % interval == 0 and state.step < steps):
            check.check_last()
            state.loss_sum, _ = progress.total_losses()
            folder.save(state)
        if check.stop:
            print_rank0(f'asked to stop: stopped {place}' + (f'; saved in {folder.path}' if folder.path else ''))
            raise SystemExit(check.exit_code())
        if state.step % plan.print_freq == 0 or state.step == steps:
            progress.report(plan.epochs)
    check.check_last()
    record = progress.record()
    if loader.dataset.max_broken:  # images that were replaced in any process
        broken = utils.all_sum(loader.dataset.broken.to(device, torch.int32))
        record['train_broken_images'] = int(broken.count_nonzero())
    return record


def prepare_batches(
    batches: Iterable[tuple[Tensor, Tensor]],
    mixup: Mixup | None,
    device: torch.device,
    channels_last: bool,
    key: tuple[int, int, int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device, mixed.

    Mixup and stochastic depth are functions of `key`, (seed, epoch, step), as an image's augmentation is of its place.
    """
    for i, (images, targets) in enumerate(batches):
        utils.seed_all(*key, 1 + utils.rank(), i)
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        images = images.contiguous(memory_format=memory_format(channels_last))
        yield mixup(images, targets) if mixup else (images, targets)


# --- evaluation


PROGRESS_SECONDS = 10  # between two lines of an evaluation


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, autocast: Callable, name: str = 'Test') -> dict[str, float]:
    """Top-1, top-5 (percent) and loss over the images of all processes, each image counted once."""
    model.eval()
    device = next(model.parameters()).device
    sums, count = torch.zeros(3, dtype=torch.float64, device=device), 0
    started = reported = time.perf_counter()
    for step, (images, targets) in enumerate(loader, 1):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets, reduction='none').double().sum()
        correct = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        sums += torch.stack([correct[:, :1].sum(), correct.sum(), loss])
        count += len(targets)
        # By the clock: most evaluations between epochs need no line, and a slow one on a CPU needs several.
        if (now := time.perf_counter()) - reported > PROGRESS_SECONDS:
            done, reported = step / len(loader), now
            left, speed = timedelta(seconds=max(round((now - started) * (1 / done - 1)), 0)), count / (now - started)
            print_rank0(
                f'{name}: [{step:>{len(str(len(loader)))}}/{len(loader)}]  '
                f'{speed * utils.world_size():.1f} img/s  eta: {left}'
            )
    top1, top5, loss, count = utils.all_sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    results = {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count}
    print_rank0(
        f'{name}: * Acc@1 {results["acc1"]:.3f} Acc@5 {results["acc5"]:.3f} loss {results["loss"]:.3f}  '
        f'({count:.0f} images)'
    )
    return results


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device, default_model: str = '') -> dict[str, float]:
    """Evaluate the checkpoint of --resume as it was trained, but for flags that are given; or timm's --pretrained."""
    use_ema = args.eval_ema
    model, config, classes, args = checkpoint.load_model(args, default_model, use_ema)
    source = args.resume or f'{args.model} --pretrained'
    if not model.num_classes:
        raise InputError(f'{source} has no classifier that could be evaluated')
    precision = pick_precision(args.precision, device, args.amp)
    set_backends(precision, device)
    data = utils.rank(), utils.world_size(), classes, model.num_classes
    _, loader = datasets.build_loaders(args, config, *data, train=False)
    model = model.to(device)
    if args.fuse:
        fuse(model)
    print_rank0(
        f'{datasets.describe(config)}\n{describe(args.model, model, precision)}\n'
        f'{describe_model(args.model, model, config.input_size)}'
    )
    gmacs = count_gmacs(model, config.input_size) if args.results_file else None
    if args.compile:
        model.compile()
    results = evaluate(model, loader, make_autocast(precision, device))
    if args.results_file and utils.rank() == 0:
        about = dict(model=args.model, checkpoint=source, ema=use_ema, images=len(loader.dataset), precision=precision)
        evolves = hasattr(model, 'schedule')
        about |= dict(method=model.method, schedule=model.schedule()) if evolves else dict(method=None, schedule=None)
        about |= dict(selection=describe_schedule(model), fused=args.fuse, gmacs=gmacs, **config._asdict())
        output.write_results(Path(args.results_file), results | about | {'parameters': count_parameters(model)})
    return results


@torch.no_grad()
def count_gmacs(model: nn.Module, input_size: int) -> float | None:
    """GMACs of an image, or None where the model has an operator that cannot be counted."""
    weight = next(model.parameters())
    images = torch.zeros(1, 3, input_size, input_size, device=weight.device, dtype=weight.dtype)
    try:
        return costs.count_gmacs(model.eval(), [images])
    except InputError:
        return None


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


def describe_model(name: str, model: nn.Module, input_size: int) -> str:
    """A line about what a model computes: who is kept where, GMACs beside those of the same model with all patches."""
    evolves, gmacs = hasattr(model, 'set_schedule'), [count_gmacs(model, input_size)]
    if evolves and model.evolving:
        model.evolving = False
        gmacs.append(count_gmacs(model, input_size))
        model.evolving = True
    counts = ' of '.join(f'{count:.2f}' if count >= 0.1 else f'{count:.2g}' for count in gmacs if count)
    parts = [name, *(describe_evolution(model) if evolves else ['dense'])]
    return ', '.join([*parts, *([f'{counts} GMACs'] if counts else []), f'{input_size} px'])


def describe_evolution(model: nn.Module) -> list[str]:
    """How a model evolves, in words: representative or method, and which share of patches it keeps from which block."""
    if not model.evolving:
        return ['all patches']
    schedule = model.schedule()
    method, stages = schedule.get('method'), zip(schedule['keep_ratio'], schedule['stages'], strict=True)
    if 'merge_r' in schedule:
        r = schedule['merge_r']
        return [
            method,
            f'{r} patches fewer after each block' if isinstance(r, int) else f'{sum(r)} patches fewer in all',
        ]
    representatives = {'none': 'no representative', 'one': 'one representative', 'nearest': 'nearest'}
    words = [method or representatives[schedule['representative']]]
    *most, last = [f'{ratio:.3g} from block {block}' for ratio, block in stages] or ['all patches']
    words.append(f'keeps {" and ".join([", ".join(most), last] if most else [last])}')
    return words if model.stage_wise else [*words, 'layer-wise']


def describe_schedule(model: nn.Module) -> str:
    """In words, where a model selects, and by which method if it is another one."""
    if not hasattr(model, 'set_schedule'):
        return 'no selection'
    if not model.evolving:
        return 'all patches'
    when = 'stage-wise' if model.stage_wise else 'layer-wise'
    if model.method == 'evolve':
        return when
    return f'{model.method}, {when}' if model.first_blocks else model.method


# --- a run


def train(
    plan: Plan,
    state: State,
    criterion: nn.Module,
    mixup: Mixup | None,
    train_loader: DataLoader,
    val_loader: DataLoader,
    folder: RunFolder,
) -> dict[str, float]:
    """Train for all epochs, evaluating, saving and logging on the way; returns the last evaluation."""
    model, ema, device = state.model, state.ema.module if state.ema else None, next(state.model.parameters()).device
    networks, first, evolves = [model, ema] if ema else [model], state.epoch, hasattr(model, 'set_schedule')
    print_rank0(describe_plan(plan, first, len(train_loader), evolves and bool(model.first_blocks)))
    if plan.grad_checkpointing:
        checkpoint_gradients(model)
    folder.clear()
    autocast, net = make_autocast(state.flags['precision'], device), wrap(model, criterion, plan.compile)
    clip = dict(clip_grad=plan.clip_grad, clip_mode=plan.clip_mode)
    step_on = partial(train_step, state, net, criterion, autocast=autocast, **clip)
    check, started, test = StepCheck(device), time.perf_counter(), {}
    for epoch in range(first, plan.epochs):
        for network in networks if evolves else ():
            network.set_schedule(epoch >= plan.stage_epoch, epoch >= plan.prune_warmup_epoch)
        mixed = None if plan.mixup_off_epoch and epoch >= plan.mixup_off_epoch else mixup
        record = train_one_epoch(state, step_on, train_loader, mixed, plan, check, folder)
        for network in networks if utils.world_size() > 1 else ():
            # The first process writes the files: its BatchNorm statistics count.
            distribute_bn(network, utils.world_size())
        if (epoch + 1) % plan.eval_interval == 0 or epoch >= plan.epochs - plan.eval_interval:
            test = evaluate(model, val_loader, autocast)
            record |= {f'test_{key}': value for key, value in test.items()}
            if plan.eval_ema:
                results = evaluate(ema, val_loader, autocast, 'Test of the EMA')
                record |= {f'test_ema_{key}': value for key, value in results.items()}
        # As published: the rate of epoch e is the schedule's at e - 1, so epochs 0 and 1 both have the warm-up rate.
        state.scheduler.step(epoch, record.get('test_acc1', state.best_acc1))
        state.epoch, state.step, state.loss_sum = epoch + 1, 0, 0.0
        finish_epoch(state, folder, record)
        left = round((time.perf_counter() - started) / (epoch + 1 - first) * (plan.epochs - epoch - 1))
        print_rank0(f'Epoch {epoch} done, best Acc@1 {state.best_acc1:.3f}, time left {timedelta(seconds=left)}\n')
    if folder.path and first < plan.epochs:
        print_rank0(f'written: {", ".join(str(path) for path in sorted(folder.path.glob("*")))}')
    return test


def describe_plan(plan: Plan, first: int, batches: int, selects: bool) -> str:
    """A line about the epochs that come; InputError where one is less than a step."""
    count, epochs = plan.grad_accum_steps, plan.epochs
    if batches < count:
        raise InputError(f'--grad-accum-steps {count}: an epoch has only {batches} batches')
    text = f'{batches // count} steps an epoch, '
    if first >= epochs:
        return f'{text}all {epochs} epochs are done already; to train on, give a larger --epochs'
    return f'{text}epochs {first} to {epochs - 1}' + (f', stage-wise from epoch {plan.stage_epoch}' if selects else '')


def checkpoint_gradients(model: nn.Module):
    """Let a model keep the inputs of its blocks alone and run them again in the backward pass."""
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise InputError(f'--grad-checkpointing: {type(model).__name__} cannot do that') from error


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
    folder.log.write(record)
    folder.save(state, improved)
