"""What a run keeps on disk: all of its state, to go on exactly from; the best and the last checkpoints; the log."""

import argparse
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

import datasets
import models
import utils
from models import weights
from utils import InputError, say

# Flags that may differ between a run and its continuation; all others change what is trained.
FREE = {
    *('resume', 'auto_resume', 'overwrite', 'accept_changes', 'output_dir', 'data_path', 'teacher_path', 'finetune'),
    *('device', 'num_workers', 'pin_mem', 'dist_url', 'dist_timeout', 'local_rank', 'world_size', 'dist_eval'),
    *('print_freq', 'eval', 'eval_ema', 'eval_interval', 'fuse', 'save_interval_steps', 'keep_checkpoints', 'compile'),
    *('start_epoch', 'model_ema_force_cpu', 'max_broken_images', 'precision', 'recipe_precision'),
    'channels_last',
}
# Of these, what changes the last digits of every number.
INEXACT = 'world_size', 'device', 'precision', 'channels_last', 'compile'


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of what is kept, and of going on from it."""
    group = parser.add_argument_group('checkpoints')
    add = group.add_argument
    add('--output_dir', default='', metavar='PATH', help='for checkpoints and the log; nothing is written without')
    add('--resume', default='', metavar='PATH', help='checkpoint (path or address) to go on from, or to evaluate')
    add('--auto-resume', action='store_true', help='go on from the newest good one in --output_dir, if any')
    add('--overwrite', action='store_true', help='begin anew where --output_dir holds another run')
    add('--accept-changes', action='store_true', help='resume although flags differ; those of now count')
    add('--finetune', default='', metavar='PATH', help='weights to start from; another head or image size is adapted')
    add('--save-interval-steps', type=int, default=0, metavar='N', help='save every N steps too (0: epochs alone)')
    add('--keep-checkpoints', type=int, default=2, metavar='K', help='keep the last K, besides the best')


@dataclass
class State:
    """All that a run changes, and so all that a checkpoint holds.

    Random numbers need no state: they are functions of the seed and the place in the run.
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    epoch: int = 0  # the one to train
    step: int = 0  # steps done of it
    loss_sum: float = 0.0  # of these steps, over all processes
    best_acc1: float = 0.0
    classes: list[str] = field(default_factory=list)  # names, in the order of the labels

    def state_dict(self, args: argparse.Namespace) -> dict:
        """A checkpoint: tensors and plain data, which load without running code. `epoch` is the last whole one."""
        return {
            'model': self.model.state_dict(),
            'model_ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self._plateau().state_dict(),
            'scaler': self.scaler.state_dict(),
            'epoch': self.epoch - 1,
            'step': self.step,
            'loss_sum': self.loss_sum,
            'best_acc1': self.best_acc1,
            'classes': self.classes,
            'args': dict(vars(args)) | {'world_size': utils.world_size()},
        }

    def load(self, checkpoint: dict, source: str, args: argparse.Namespace):
        """Take all over from a checkpoint, saying what it does not hold. Rates and the like are those of `args`."""
        changed = check_changes(args, checkpoint, source)
        load_exactly(self.model, checkpoint, source)
        check_classes(args, checkpoint, source, self.classes)
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
        for name in ('step', 'loss_sum', 'best_acc1'):
            setattr(self, name, checkpoint.get(name, 0))
        if self.step and changed & {'world_size', 'batch_size', 'grad_accum_steps', 'repeated_aug', 'seed'}:
            say(f'{source}: its {self.step} steps of epoch {self.epoch} saw other images; the epoch starts again')
            self.step, self.loss_sum = 0, 0.0
        if self.epoch > 0:
            # The schedule is a function of the epoch; a schedule that was changed counts from here.
            self.scheduler.step(self.epoch - 1, self.best_acc1)
        self._load_optimizer(checkpoint, source, args, changed)
        if self.scaler.is_enabled() and checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        elif self.scaler.is_enabled() or checkpoint.get('scaler'):
            say(f'{source} was saved in another precision; the loss scale is left out')

    def _load_optimizer(self, checkpoint: dict, source: str, args: argparse.Namespace, changed: set[str]):
        saved, own = checkpoint.get('optimizer'), self.optimizer.state_dict()
        published = hasattr(self.model, 'is_published') and self.model.is_published(weights.find_weights(checkpoint))
        if saved is None or published or 'opt' in changed:
            # The published optimizer state follows another order and number of parameters.
            say(f'{source}: the optimizer starts anew, at epoch {self.epoch} and its rate')
            return
        groups = [[len(group['params']) for group in state['param_groups']] for state in (saved, own)]
        parameters = [p for group in self.optimizer.param_groups for p in group['params']]
        shapes = all(
            value.shape in ((), parameters[int(i)].shape)
            for i, moments in saved['state'].items()
            for value in moments.values()
            if isinstance(value, torch.Tensor) and int(i) < len(parameters)
        )
        # Checked here, because AdamW takes moments of any shape and fails, or worse, does not, in the first step.
        if groups[0] != groups[1] or not shapes:
            raise InputError(
                f'{source}: its optimizer state is of other parameters; --finetune takes the weights alone'
            )
        self.optimizer.load_state_dict({'state': saved['state'], 'param_groups': own['param_groups']})
        # A fused step takes it for granted that moments lie in memory as their parameter does (--channels-last).
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if args.sched == 'plateau' and 'sched' not in changed:
            self._plateau().load_state_dict(checkpoint['lr_scheduler'])
            for group, before in zip(self.optimizer.param_groups, saved['param_groups'], strict=True):
                group['lr'] = before['lr']

    def _plateau(self):
        # timm's plateau schedule leaves half of its state out; torch's, inside it, does not.
        return getattr(self.scheduler, 'lr_scheduler', self.scheduler)


def check_changes(args: argparse.Namespace, checkpoint: dict, source: str) -> set[str]:
    """Compare the flags with the checkpoint's, say which differ, and return their names.

    Raises InputError with a table of those that change what is trained, but for --accept-changes.
    """
    saved, now = checkpoint.get('args'), vars(args) | {'world_size': utils.world_size()}
    if not isinstance(saved, dict) or 'seed' not in saved:
        say(f'{source} does not say its flags: the order of images and their augmentation may not go on as they began')
        return set()
    changed = [(name, saved[name], now[name]) for name in sorted(saved) if name in now and saved[name] != now[name]]
    if rows := [row for row in changed if row[0] not in FREE]:
        rows = [('', 'then', 'now'), *rows]
        table = '\n'.join(f'  {name:24} {before!s:>20} {after!s:>20}' for name, before, after in rows)
        table = f'{source} was trained with other flags:\n{table}'
        if not args.accept_changes:
            raise InputError(f'{table}\nGive those of then, or --accept-changes to go on with those of now.')
        say(table)
    for name, before, after in changed:
        if name in INEXACT:
            say(f'{source}: {name} was {before}, now {after}: training goes on, but not exactly as it would have')
    return {name for name, _, _ in changed}


def check_classes(args: argparse.Namespace, checkpoint: dict, source: str, classes: list[str]):
    """InputError where a run would go on with other classes than it had, but for --accept-changes."""
    trained = saved_classes(checkpoint)
    if trained and classes and (differences := datasets.compare_classes(trained, classes)):
        message = f'{source} was trained on other classes: {differences}'
        if not args.accept_changes:
            raise InputError(f'{message}\nUse the data of then, or --accept-changes to go on with that of now.')
        say(message)


def saved_classes(content: dict) -> list[str] | None:
    """Names of the classes, in the order of the outputs, where a checkpoint has them."""
    names = content.get('classes')
    named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return names if named else None


def find_classes(content: dict, args: argparse.Namespace) -> tuple[list[str] | None, int | None]:
    """Names of the classes of a checkpoint of --model, and their number; None where it does not say."""
    names = saved_classes(content)
    try:
        state = weights.find_weights(content, getattr(args, 'eval_ema', False))
    except InputError as error:
        raise InputError(f'{args.resume}: {error}') from error
    classifier = models.published_cfg(args.model).classifier or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    outputs = [len(state[f'{head}.weight']) for head in heads if f'{head}.weight' in state]
    # The published Evo-LeViT has head.l where ours has head.linear.
    outputs += [len(value) for key, value in state.items() if key.startswith('head.') and value.ndim == 2]
    num_classes = outputs[0] if outputs else None
    if names and num_classes not in (None, len(names)):
        raise InputError(f'{args.resume} names {len(names)} classes, but its head has {num_classes} outputs')
    return names, num_classes


def saved_flags(content: dict) -> dict:
    """The flags that a checkpoint was trained with; published files have a Namespace, bare weights nothing."""
    saved = content.get('args')
    return saved if isinstance(saved, dict) else {}


def recall_model(args: argparse.Namespace, content: dict):
    """For evaluation: flags of the model that were not given are those of its training, and a difference is said."""
    saved = saved_flags(content)
    for name in ('keep_ratio', 'representative', 'input_size'):
        if name not in saved:
            continue
        then, now = saved[name], getattr(args, name)
        if now is None:
            setattr(args, name, then)
        elif now != then:
            say(f'{args.resume} was trained with {name} {then}, and is evaluated with {now}')
    for name in ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation'):
        if getattr(args, name) is None:
            setattr(args, name, saved_flags(content).get(name))


def load_exactly(
    model: nn.Module, checkpoint: dict, source: str, use_ema: bool = False, training: bool = True
) -> weights.Loaded:
    """Load weights of which nothing may be missing: a wrong accuracy is worse than none.

    Evaluation (`training` False) takes a plain ViT too, whose head an Evo-DeiT reads as it was trained.
    """
    try:
        loaded = weights.load_weights(model, checkpoint, use_ema, report=say)
    except InputError as error:
        if training:
            advice = 'To start training from weights of another model, image size or classes, use --finetune.'
        else:
            advice = 'Evaluation needs the --model and --input-size of the training, and a data set with its classes.'
        raise InputError(f'{source}: {error}\n{advice}') from error
    if training and loaded.filled:
        raise InputError(
            f'{source} has no {", ".join(loaded.filled)}, which training needs. To start training from its other '
            'weights, use --finetune.'
        )
    return loaded


def kept(folder: Path) -> list[Path]:
    """The last checkpoints in a folder, the newest first; that one has two names."""
    return [p for p in (folder / 'checkpoint.pth',) if p.exists()] + sorted(
        folder.glob('checkpoint-*.pth'), reverse=True
    )


def claim_output(args: argparse.Namespace):
    """Make --output_dir, and refuse to write into the run of somebody else, or earlier, but for --overwrite."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.probe-{os.getpid()}'
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f'--output_dir {folder.absolute()} cannot be written to: {error}') from error
    there = files_of_run(folder)
    if there and not (args.resume or args.auto_resume):
        # What a launcher starts again must not remove what it wrote itself.
        if not args.overwrite or utils.restarts():
            raise InputError(
                f'--output_dir {folder} holds a run ({", ".join(p.name for p in there)}): '
                '--resume or --auto-resume goes on with it, --overwrite begins anew'
            )
        for source in filter(None, (args.finetune, args.teacher_path)):
            if Path(source).exists() and any(path.samefile(source) for path in there):
                raise InputError(f'{source} is of the run that --overwrite removes; move it to another folder first')


def files_of_run(folder: Path) -> list[Path]:
    """What a run has written into its folder."""
    return [p for p in (*kept(folder), folder / 'best_checkpoint.pth', folder / 'log.txt') if p.exists()]


def clear_output(args: argparse.Namespace):
    """With --overwrite, remove the run that is there; called when nothing is left that could stop the new one."""
    if args.output_dir and args.overwrite and not (args.resume or args.auto_resume) and utils.rank() == 0:
        for path in files_of_run(Path(args.output_dir)):
            path.unlink()


def find_start(args: argparse.Namespace) -> tuple[str, dict] | None:
    """The checkpoint to go on from, and its name: with --auto-resume the newest good one, else that of --resume."""
    there, damaged = kept(Path(args.output_dir)) if args.auto_resume and args.output_dir else [], []
    for path in there:
        try:
            found = weights.read_checkpoint(path, say)
        except InputError as error:
            damaged.append(str(error))
            continue
        if damaged:
            lost = [p.stem.split('-')[1:] for p in there if '-' in p.stem][:1]
            until = f' up to epoch {int(lost[0][0])}, step {int(lost[0][1])}' if lost else ''
            place = f'epoch {found["epoch"] + 1}, step {found["step"]}'
            say(f'warning: {"; ".join(damaged)}\nwarning: going back to {path}; from {place} on, all is lost{until}')
        return str(path), found
    if there:
        raise InputError('--auto-resume: no checkpoint can be read:\n  ' + '\n  '.join(damaged))
    return (args.resume, weights.read_checkpoint(args.resume, say)) if args.resume else None


def save(args: argparse.Namespace, state: State, best: bool = False):
    """On the first process write `checkpoint.pth`, keep the last ones beside it, and the best."""
    if not args.output_dir or utils.rank() > 0:
        return
    folder, content = Path(args.output_dir), state.state_dict(args)
    newest = folder / 'checkpoint.pth'
    # The best first: its accuracy must not be on record in the newest before its weights are there.
    if best:
        utils.write_checkpoint(folder / 'best_checkpoint.pth', content)
    utils.write_checkpoint(newest, content)
    try:
        # A second name for the same file: a link costs neither time nor space.
        numbered = folder / f'checkpoint-{state.epoch:04d}-{state.step:06d}.pth'
        numbered.unlink(missing_ok=True)
        os.link(newest, numbered)
        numbers = sorted(folder.glob('checkpoint-*.pth'))
        here = numbers.index(numbered) + 1
        # Later ones are of a run that went another way from an earlier checkpoint, as are later lines of the log.
        for other in numbers[: max(here - args.keep_checkpoints, 0)] + numbers[here:]:
            other.unlink()
    except OSError as error:
        say(f'warning: older checkpoints in {folder} could not be kept or removed: {error}')


def write_log(path: Path, record: dict):
    """Put one line of JSON for an epoch into the log, in place of lines of this epoch or later and of torn ones."""
    lines = []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else []:
        try:
            if json.loads(line)['epoch'] < record['epoch']:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    text = '\n'.join([*lines, json.dumps(finite)]) + '\n'
    utils.write_whole(path, lambda file: file.write(text.encode()))
