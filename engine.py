"""Training and evaluation of any model: one step, one epoch, one evaluation, and the loop over epochs.

A model takes images and returns logits; in training it may return a named tuple of logits, one for each head. A model
with token evolution has `set_schedule`. Nothing else here depends on the family.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

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
import networks
import optim
import output
import utils
from checkpoint import State
from measure import costs
from optim import global_batch, learning_rate, memory_format
from output import RunFolder
from stopping import StepCheck
from utils import InputError, at_least, make_autocast, pick_precision, print_rank0, set_backends

# Flags that may differ when a run is resumed; True: the run still continues bit for bit.
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
# The first group of --help: what most runs need, on one screen of 80 columns and 40 lines.
ESSENTIAL_FLAGS = (
    '--help --model --evolve --keep-ratio --data-path --data-set --input-size --batch-size --epochs --lr '
    '--output_dir --resume --auto-resume --finetune --eval --device --num_workers --seed'
).split()


def add_arguments(parser: argparse.ArgumentParser):
    """Add the flags of the training loop, the precision and the optimizer."""
    add = parser.add_argument_group('training').add_argument
    add('--epochs', type=at_least(1), default=300, metavar='N', help='passes over the training images')
    add('--start_epoch', type=at_least(0), default=0, metavar='N', help='first epoch, if no checkpoint sets it')
    about = 'select layer-wise before epoch N, stage-wise from then on (default: 2/3 of --epochs; 0 with --method)'
    add('--stage-epoch', type=at_least(0), metavar='N', help=about)
    add('--prune-warmup-epoch', type=at_least(0), default=0, metavar='N', help='no selection in the first N epochs')
    about = 'evaluate every N epochs, and after each of the last N'
    add('--eval-interval', type=at_least(1), default=1, metavar='N', help=about)
    add('--print-freq', type=at_least(1), default=50, metavar='N', help='print progress every N steps')
    about = 'default: bf16 on GPUs (fp16 before Ampere, tf32 with --no-amp), fp32 on CPUs; with --eval as in training'
    add('--precision', choices=['fp32', 'tf32', 'bf16', 'fp16'], help=about)
    on_off = argparse.BooleanOptionalAction
    add('--amp', action=on_off, default=True, help='half precision on GPUs, if --precision is not given')
    add('--fuse', action='store_true', help='with --eval: fold BatchNorm and drop heads that only training needs')
    add('--compile', action='store_true', help='torch.compile the model and the teacher')
    add('--grad-checkpointing', action='store_true', help='save memory: recompute blocks in the backward pass')
    about = 'turn off mixup and cutmix from epoch N on (0: never)'
    add('--mixup-off-epoch', type=at_least(0), default=0, metavar='N', help=about)
    optim.add_arguments(parser)


def get_parser(doc: str, recipe: dict) -> utils.Parser:
    """Parser with the flags of all modules; `recipe` holds the defaults of this script."""
    parser = utils.Parser(doc, usage='%(prog)s --model NAME --data-path PATH [options]')
    for module in (networks, datasets, losses, checkpoint, utils):
        module.add_arguments(parser)
    add_arguments(parser)
    parser.set_defaults(**recipe)
    parser.show_first('essential flags', ESSENTIAL_FLAGS)
    return parser


def parse_args(doc: str, recipe: dict) -> argparse.Namespace:
    """Parse the command line; InputError for missing files and for flags without effect, before anything is loaded."""
    parser = get_parser(doc, recipe)
    # A value that is there already hides the default, so None means that --model was not given.
    args = parser.parse_args(namespace=argparse.Namespace(model=None))
    checkpoint.check_paths(args)
    if args.eval:
        return args  # without --model, the checkpoint names its model
    args.model = args.model or parser.get_default('model')
    losses.check_teacher(args)
    if args.fuse:
        raise InputError('--fuse needs --eval: a folded model cannot be trained')
    if args.eval_ema and not args.model_ema:
        raise InputError('--eval-ema evaluates the EMA, which --no-model-ema turns off; give one of them')
    if args.mixup_off_epoch and not (args.mixup or args.cutmix or args.cutmix_minmax):
        raise InputError('--mixup-off-epoch: nothing to turn off; expected --mixup or --cutmix above 0')
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
    """Make one optimizer step from `count` batches of images (B, 3, H, W) and targets; returns the mean loss.

    `net` is the model, possibly wrapped in DistributedDataParallel. `accept` sees the loss before the update and may
    raise. Nothing here synchronizes with the GPU, except the inf check of fp16 with an optimizer that is not fused.
    """
    total = 0.0
    for i, (images, targets) in enumerate(batches, 1):
        # Accumulated gradients are exchanged once: only the last backward pass runs the all-reduce.
        skip_exchange = isinstance(net, DistributedDataParallel) and i < count
        with net.no_sync() if skip_exchange else nullcontext():
            with autocast():
                # Divided by `count`, so that the sum of the gradients is their mean.
                loss = criterion(images, net(images), targets) / count
            # The scale keeps small fp16 gradients above zero; outside fp16 the scaler does nothing.
            state.scaler.scale(loss).backward()
        total += loss.detach()
    # A loss that is not finite must not reach the weights.
    if accept is not None:
        accept(total)
    if clip_grad is not None:
        # Clip the true gradients, not those multiplied by the loss scale.
        state.scaler.unscale_(state.optimizer)
        # AGC also clips the heads, as the original recipe does (facebookresearch/LeViT, engine.py). Its paper and
        # timm's train.py leave the head out.
        dispatch_clip_grad(state.model.parameters(), clip_grad, clip_mode)
    # In fp16 the scaler skips the update after an overflow, and adapts the scale.
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.ema:
        state.ema.update(state.model)
    return total


# --- one epoch


class Progress:
    """Loss and throughput of an epoch. The sums stay on the device: only reading them waits for it."""

    def __init__(self, state: State, steps: int, images: int, device: torch.device):
        self.state, self.steps, self.images = state, steps, images
        # Two loss sums: over the epoch, and since the last printed line. A resumed epoch starts from the loss of its
        # earlier steps. Only rank 0 adds it, since it is already summed over all processes.
        earlier = state.loss_sum if utils.rank() == 0 else 0.0
        self.losses = torch.tensor([earlier, 0.0], dtype=torch.float64, device=device)
        self.first = self.last = state.step
        self.started = self.last_time = time.perf_counter()

    def total_losses(self) -> tuple[float, float]:
        """Both sums of losses, over all processes."""
        return tuple(utils.all_sum(self.losses.clone()).tolist())

    def report(self, epochs: int):
        """Print a line with the mean loss and the throughput since the last line."""
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
        """What the log keeps of the epoch."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            'epoch': self.state.epoch,
            'train_loss': self.total_losses()[0] / utils.world_size() / self.steps,
            'train_lr': learning_rate(self.state),
            'train_images_per_second': (self.steps - self.first) * self.images / seconds,
            'global_batch': self.images,
        }


def train_one_epoch(
    args: argparse.Namespace,
    state: State,
    step_on: Callable,
    loader: DataLoader,
    mixup: Mixup | None,
    check: StepCheck,
    folder: RunFolder,
) -> dict[str, float]:
    """Train from step `state.step` of the epoch to its end; returns the epoch's record for the log.

    `step_on(batches, count)` is `train_step` with the rest bound. If any process is asked to stop, the state is saved
    and all processes raise SystemExit.
    """
    device, accumulate = next(state.model.parameters()).device, args.grad_accum_steps
    steps = len(loader) // accumulate
    progress = Progress(state, steps, global_batch(loader.batch_size, accumulate), device)
    # The order of an epoch is a function of seed and epoch, so a resumed epoch skips the images it has seen.
    loader.sampler.set_epoch(state.epoch, start=state.step * accumulate * loader.batch_size)
    state.model.train()
    batches = iter(loader)
    for step in range(state.step, steps):
        state.scheduler.step_update(state.epoch * steps + step)  # no effect without --sched-on-updates
        place = f'in epoch {state.epoch}, step {step}, at rate {learning_rate(state):.3g}'
        inputs = islice(batches, accumulate)
        inputs = prepare_batches(inputs, mixup, device, args.channels_last, (args.seed, state.epoch, step))
        progress.losses += step_on(inputs, accumulate, accept=partial(check.check, place=place))
        state.step = step + 1

        # All processes learn of a request to stop after the same step, so they all stop there.
        interval = args.save_interval_steps
        if check.stop or (interval and state.step % interval == 0 and state.step < steps):
            check.check_last()  # on a GPU the last loss is still unread; a bad one must not be saved
            state.loss_sum, _ = progress.total_losses()
            folder.save(state)
        if check.stop:
            print_rank0(f'asked to stop: stopped {place}' + (f'; saved in {folder.path}' if folder.path else ''))
            raise SystemExit(check.exit_code())
        if state.step % args.print_freq == 0 or state.step == steps:
            progress.report(args.epochs)
    check.check_last()
    record = progress.record()
    if loader.dataset.max_broken:
        broken = utils.all_sum(loader.dataset.broken.to(device, torch.int32))  # images replaced in any process
        record['train_broken_images'] = int(broken.count_nonzero())
    return record


def prepare_batches(
    batches: Iterable, mixup: Mixup | None, device: torch.device, channels_last: bool, key: tuple[int, int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Move batches to the device and mix them. `key` is (seed, epoch, step).

    Mixup and stochastic depth depend only on the key, the rank and the index of the batch, so a resumed run repeats
    them exactly. Drawing a batch reseeds: run its forward pass before drawing the next one.
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
    """Top-1 and top-5 accuracy (percent) and loss over the images of all processes, each image counted once."""
    model.eval()
    device = next(model.parameters()).device
    # Sums stay on the device, so that no batch waits for the one before. In float64 counts and sums are exact enough.
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
        # By the clock: most evaluations between epochs need no line, a slow one on a CPU needs several.
        if (now := time.perf_counter()) - reported > PROGRESS_SECONDS:
            reported, speed = now, count * utils.world_size() / (now - started)
            left = timedelta(seconds=round((now - started) / step * (len(loader) - step)))
            print_rank0(f'{name}: [{step:>{len(str(len(loader)))}}/{len(loader)}]  {speed:.1f} img/s  eta: {left}')
    # Processes may have one image more or less than others, so sums and counts are added, not means.
    top1, top5, loss, count = utils.all_sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    results = {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count}
    print_rank0(
        f'{name}: * Acc@1 {results["acc1"]:.3f} Acc@5 {results["acc5"]:.3f} loss {results["loss"]:.3f}  '
        f'({count:.0f} images)'
    )
    return results


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device, default_model: str = '') -> dict[str, float]:
    """Evaluate --resume, or timm's weights with --pretrained; flags that are not given are those of the training."""
    model, config, classes, args = checkpoint.load_model(args, default_model, args.eval_ema)
    source = args.resume or f'{args.model} --pretrained'
    if not model.num_classes:
        raise InputError(f'{source} has no classifier to evaluate')
    precision = pick_precision(args.precision, device, args.amp)
    set_backends(precision, device)
    # Labels follow the classes of the checkpoint, in whatever order the folders are.
    data = utils.rank(), utils.world_size(), classes, model.num_classes
    _, loader = datasets.build_loaders(args, config, *data, train=False)
    model = model.to(device)
    if args.fuse:
        fuse(model)
    print_rank0(
        f'{datasets.describe(config)}\n{describe_setup(args.model, model, precision)}\n'
        f'{describe_model(args.model, model, config.input_size)}'
    )
    gmacs = count_gmacs(model, config.input_size) if args.results_file else None  # before it is compiled
    if args.compile:
        model.compile()
    results = evaluate(model, loader, make_autocast(precision, device))
    if args.results_file and utils.rank() == 0:
        about = dict(model=args.model, checkpoint=source, ema=args.eval_ema, images=len(loader.dataset))
        about |= dict(precision=precision, fused=args.fuse, gmacs=gmacs, parameters=count_parameters(model))
        about |= dict(method=getattr(model, 'method', None), selection=describe_schedule(model))
        about |= dict(schedule=model.schedule() if about['method'] else None, **config._asdict())
        output.write_results(Path(args.results_file), results | about)
    return results


@torch.no_grad()
def count_gmacs(model: nn.Module, input_size: int) -> float | None:
    """GMACs per image, or None if the model has an operator that cannot be counted."""
    weight = next(model.parameters())
    images = torch.zeros(1, 3, input_size, input_size, device=weight.device, dtype=weight.dtype)
    try:
        return costs.count_gmacs(model.eval(), [images])
    except InputError:
        return None


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fuse(model: nn.Module):
    """Fold a model in place for inference, by its own `fuse` or timm's; print if there is nothing to fold."""
    before = list(model.state_dict())
    if hasattr(model, 'fuse'):
        model.fuse()
    else:
        reparameterize_model(model, inplace=True)
    if list(model.state_dict()) == before:
        print_rank0(f'--fuse: {type(model).__name__} has nothing to fold')


# --- one line about a model


def describe_setup(name: str, model: nn.Module, precision: str) -> str:
    """Size, device, precision and number of processes, for the start of a run."""
    device = next(model.parameters()).device
    return f'{name}: {count_parameters(model):,} parameters, {device}, {precision}, {utils.world_size()} process(es)'


def describe_model(name: str, model: nn.Module, input_size: int) -> str:
    """Describe a model in one line: keep ratio of each stage, and GMACs, next to those with all patches."""
    evolves, gmacs = hasattr(model, 'set_schedule'), [count_gmacs(model, input_size)]
    if evolves and model.evolving:
        model.evolving = False
        gmacs.append(count_gmacs(model, input_size))
        model.evolving = True
    counts = ' of '.join(f'{count:.2f}' if count >= 0.1 else f'{count:.2g}' for count in gmacs if count)
    parts = [name, *(describe_evolution(model) if evolves else ['dense'])]
    return ', '.join([*parts, *([f'{counts} GMACs'] if counts else []), f'{input_size} px'])


def describe_evolution(model: nn.Module) -> list[str]:
    """How a model evolves: representative or method, and the fraction of patches that it keeps in each stage."""
    if not model.evolving:
        return ['all patches']
    schedule = model.schedule()
    if 'merge_r' in schedule:
        r = schedule['merge_r']
        reduction = f'merges {r} patches per block' if isinstance(r, int) else f'merges {sum(r)} patches in all'
        return [schedule['method'], reduction]
    representatives = {'none': 'no representative', 'one': 'one representative', 'nearest': 'nearest'}
    stages = zip(schedule['keep_ratio'], schedule['stages'], strict=True)
    kept = ' and '.join(f'{ratio:.3g} from block {block}' for ratio, block in stages) or 'all patches'
    parts = [schedule.get('method') or representatives[schedule['representative']], f'keeps {kept}']
    return parts if model.stage_wise else [*parts, 'layer-wise']


def describe_schedule(model: nn.Module) -> str:
    """When a model selects, and the method if it is not `evolve`, for logs and tables."""
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
    args: argparse.Namespace,
    state: State,
    criterion: nn.Module,
    mixup: Mixup | None,
    train_loader: DataLoader,
    val_loader: DataLoader,
    folder: RunFolder,
) -> dict[str, float]:
    """Train to the last epoch, with evaluations, checkpoints and the log; returns the last evaluation."""
    model, ema = state.model, state.ema.module if state.ema else None
    networks, device = [model, ema] if ema else [model], next(model.parameters()).device
    first, evolves = state.epoch, hasattr(model, 'set_schedule')
    print_rank0(describe_epochs(args, first, len(train_loader), selects=evolves and bool(model.first_blocks)))
    if args.grad_checkpointing:
        checkpoint_gradients(model)
    folder.clear()  # all checks have passed, so --overwrite may now remove the old run
    autocast, net = make_autocast(state.flags['precision'], device), wrap_model(model, criterion, args.compile)
    clip = dict(clip_grad=args.clip_grad, clip_mode=args.clip_mode)
    step_on = partial(train_step, state, net, criterion, autocast=autocast, **clip)
    check, started, test = StepCheck(device), time.perf_counter(), {}
    for epoch in range(first, args.epochs):
        # The schedule follows from the epoch alone; the EMA is another model, with a schedule of its own.
        for network in networks if evolves else ():
            network.set_schedule(epoch >= stage_wise_from(args), epoch >= args.prune_warmup_epoch)
        mixup_off = args.mixup_off_epoch and epoch >= args.mixup_off_epoch
        record = train_one_epoch(args, state, step_on, train_loader, None if mixup_off else mixup, check, folder)
        # BatchNorm statistics differ between processes: broadcast those of rank 0, which writes the checkpoint.
        for network in networks if utils.world_size() > 1 else ():
            distribute_bn(network, utils.world_size())
        if (epoch + 1) % args.eval_interval == 0 or epoch >= args.epochs - args.eval_interval:
            test = evaluate(model, val_loader, autocast)
            record |= {f'test_{key}': value for key, value in test.items()}
            if args.eval_ema:
                results = evaluate(ema, val_loader, autocast, 'Test of the EMA')
                record |= {f'test_ema_{key}': value for key, value in results.items()}
        # As in the original Evo-ViT, epoch e runs at the rate of epoch e - 1: epochs 0 and 1 both run at --warmup-lr.
        state.scheduler.step(epoch, record.get('test_acc1', state.best_acc1))
        # The state now points at the start of the next epoch: that is where a checkpoint of it resumes.
        state.epoch, state.step, state.loss_sum = epoch + 1, 0, 0.0
        finish_epoch(state, folder, record)
        left = round((time.perf_counter() - started) / (epoch + 1 - first) * (args.epochs - epoch - 1))
        print_rank0(f'Epoch {epoch} done, best Acc@1 {state.best_acc1:.3f}, time left {timedelta(seconds=left)}\n')
    if folder.path and first < args.epochs:
        # Without a best one if the run continues another folder's and was never better.
        files = [name for name in ('checkpoint.pth', 'best_checkpoint.pth') if (folder.path / name).exists()]
        print_rank0(
            f'written: {", ".join(files)} and log.txt in {folder.path}; '
            f'next: python3 {Path(sys.argv[0]).name} --eval --resume {folder.path / files[-1]} '
            f'--data-path {args.data_path}' + (f' --data-set {args.data_set}' if args.data_set != 'IMNET' else '')
        )
    return test


def stage_wise_from(args: argparse.Namespace) -> int:
    """First epoch with stage-wise selection: 200 of 300 in the original Evo-ViT, 0 for an evolved pretrained ViT."""
    if args.stage_epoch is not None:
        return args.stage_epoch
    return 0 if args.method else 2 * args.epochs // 3


def describe_epochs(args: argparse.Namespace, first: int, batches: int, selects: bool) -> str:
    """A line about the epochs to come; InputError if an epoch has fewer batches than a step needs."""
    count, epochs = args.grad_accum_steps, args.epochs
    if batches < count:
        raise InputError(f'--grad-accum-steps {count}: an epoch has only {batches} batches')
    text = f'{batches // count} steps an epoch, '
    if first >= epochs:
        return f'{text}all {epochs} epochs are done already; to keep training, pass a larger --epochs'
    stages = f', stage-wise from epoch {stage_wise_from(args)}' if selects else ''
    return f'{text}epochs {first} to {epochs - 1}{stages}'


def checkpoint_gradients(model: nn.Module):
    """Store only the inputs of blocks, and recompute the rest in the backward pass."""
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise InputError(f'--grad-checkpointing: {type(model).__name__} does not support it') from error


def wrap_model(model: nn.Module, criterion: nn.Module, compiled: bool) -> nn.Module:
    """The model as training calls it: compiled with its teacher if asked, in DistributedDataParallel if needed."""
    if compiled:
        model.compile()
        if criterion.teacher is not None:
            criterion.teacher.compile()
    if utils.world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)


def finish_epoch(state: State, folder: RunFolder, record: dict):
    """Update the best accuracy, and write a line of the log and the checkpoint."""
    improved = (record.get('test_acc1') or 0.0) > state.best_acc1  # False for NaN
    if improved:
        state.best_acc1 = record['test_acc1']
    record |= {
        'precision': state.flags['precision'],
        'best_acc1': state.best_acc1,
        'n_parameters': count_parameters(state.model),
        'selection': describe_schedule(state.model),
    }
    # The log comes first: after a crash between the two, the epoch is repeated and replaces its line. The other way
    # round, the run would resume with the next epoch, and the line would be missing.
    folder.log.write(record)
    folder.save(state, improved)
