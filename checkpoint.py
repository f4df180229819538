"""The state of a run: saved, to go on exactly from, and to evaluate."""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS

import datasets
import models
import utils
from image_data.files import load_image
from models import weights
from utils import InputError, at_least, print_rank0

# Flags that may differ between a run and its continuation, and whether it goes on bit for bit even so.
MAY_CHANGE = dict.fromkeys(
    'output_dir resume auto_resume overwrite accept_changes finetune pretrained eval eval_ema save_interval_steps '
    'keep_checkpoints results_file tensorboard fit_schedule'.split(),
    True,
)
# Flags that older checkpoints do not name, with what held then.
NEWER_FLAGS = {'layer_decay': None, 'bce_loss': False, 'mixup_off_epoch': 0, 'method': None, 'model_kwargs': None}
# With another one of these, the steps that were done of an epoch saw other images.
ORDER_OF_IMAGES = {'world_size', 'batch_size', 'grad_accum_steps', 'repeated_aug', 'seed', 'train_images'}
# States of optimizers that have the shape of their parameter, or are one number.
MOMENTS = {'exp_avg', 'exp_avg_sq', 'momentum_buffer'}
# Flags of the model that an evaluation takes from the training, besides those of the images.
SCHEDULE_FLAGS = 'stages', 'keep_ratio', 'representative', 'merge_r'  # of one method, and of no other
MODEL_FLAGS = 'model', 'method', *SCHEDULE_FLAGS, 'model_kwargs'


def add_arguments(parser: argparse.ArgumentParser):
    """Flags of what is kept, of resuming from it, and of evaluating it."""
    add = parser.add_argument_group('checkpoints').add_argument
    add('--output_dir', default='', metavar='PATH', help='for checkpoints and the log; nothing is written without')
    add('--resume', default='', metavar='PATH', help='checkpoint (path or URL) to resume from, or to evaluate')
    add('--auto-resume', action='store_true', help='resume from the newest good one in --output_dir, if any')
    add('--overwrite', action='store_true', help='start over where --output_dir holds another run')
    add('--accept-changes', action='store_true', help='resume although flags differ; the new ones count')
    add('--finetune', default='', metavar='PATH', help='weights to start from; another head or image size is adapted')
    add('--eval', action='store_true', help='evaluate --resume and stop')
    add('--eval-ema', action='store_true', help='evaluate the EMA of the weights (in training: also the EMA)')
    add('--results-file', default='', metavar='PATH', help='with --eval: a JSON file for the results')
    add('--tensorboard', action='store_true', help='training: the log for TensorBoard too (pip install .[logging])')
    add('--save-interval-steps', type=at_least(0), default=0, metavar='N', help='save every N steps too (0: not)')
    add('--keep-checkpoints', type=at_least(1), default=2, metavar='K', help='keep the last K, besides the best')


def check_arguments(args: argparse.Namespace):
    """InputError, before anything is read or built, for files that do not exist and flags that need another one."""
    utils.check_source('--resume', args.resume)
    utils.check_source('--finetune', args.finetune)
    if args.auto_resume and not args.output_dir:
        raise InputError('--auto-resume looks for checkpoints in --output_dir, which is not given')
    if args.eval and not (args.resume or args.pretrained):
        raise InputError("--eval needs --resume with the checkpoint to evaluate, or --pretrained for timm's weights")
    if args.results_file and not args.eval:
        raise InputError('--results-file needs --eval; training writes its results to log.txt in --output_dir')
    if args.results_file and not Path(args.results_file).absolute().parent.is_dir():
        raise InputError(f'--results-file {args.results_file}: its folder does not exist')
    if args.tensorboard and (args.eval or not args.output_dir):
        raise InputError('--tensorboard logs a training to --output_dir; it needs that, and no --eval')


# --- the state of a run


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
    flags: dict = field(default_factory=dict)  # of the run, for `compare_flags` when it is resumed
    classes: list[str] = field(default_factory=list)  # names, in the order of the labels
    epoch: int = 0  # the one to train
    step: int = 0  # steps done of it
    loss_sum: float = 0.0  # of these steps, over all processes
    best_acc1: float = 0.0

    def state_dict(self) -> dict:
        """A checkpoint: tensors and plain data, which load without running code. `epoch` is the last whole one."""
        return {
            'model': self.model.state_dict(),
            'model_ema': self.ema.module.state_dict() if self.ema else None,
            # Also in the state dict of the published networks, but timm's, evolved, have none there.
            'schedule': self.model.schedule() if hasattr(self.model, 'schedule') else None,
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self._plateau().state_dict() | {'restore_lr': getattr(self.scheduler, 'restore_lr', None)},
            'scaler': self.scaler.state_dict(),
            'epoch': self.epoch - 1,
            'step': self.step,
            'loss_sum': self.loss_sum,
            'best_acc1': self.best_acc1,
            'classes': self.classes,
            'args': self.flags,
        }

    def load(self, content: dict, source: str, changed: set[str] = frozenset()):
        """Take over a checkpoint, printing what it lacks. Of the flags named in `changed`, this run's values count."""
        load_strict(self.model, content, source)
        if self.ema:
            if content.get('model_ema'):
                load_strict(self.ema.module, content, source, use_ema=True)
            else:
                self.ema.set(self.model)
                print_rank0(f'{source} has no averaged weights; the average starts from its weights')
        if 'epoch' not in content:
            print_rank0(f'{source} holds weights alone; training starts with them at epoch {self.epoch}')
            return
        self.epoch = content['epoch'] + 1
        for name in ('step', 'loss_sum', 'best_acc1'):
            setattr(self, name, content.get(name, 0))
        if self.step and changed & ORDER_OF_IMAGES:
            print_rank0(f'{source}: its {self.step} steps of this epoch saw other images; the epoch starts over')
            self.step, self.loss_sum = 0, 0.0
        if self.epoch > 0:
            # The schedule is a function of the epoch; a schedule that was changed counts from here.
            self.scheduler.step(self.epoch - 1, self.best_acc1)
        published = hasattr(self.model, 'is_published') and self.model.is_published(weights.find_weights(content))
        if content.get('optimizer') is None or published or 'opt' in changed:
            # The published optimizer state follows another order and number of parameters.
            print_rank0(f'{source}: the optimizer starts anew, at epoch {self.epoch} and its learning rate')
        else:
            self._load_optimizer(content['optimizer'], source)
            if self._plateau() is not self.scheduler and 'sched' not in changed:
                saved = dict(content['lr_scheduler'])
                # The rates without this epoch's noise, to which timm's schedule goes back before the next.
                self.scheduler.restore_lr = saved.pop('restore_lr', None)
                self._plateau().load_state_dict(saved)
                for i, group in enumerate(self.optimizer.param_groups):
                    group['lr'] = content['optimizer']['param_groups'][i]['lr']
        if self.scaler.is_enabled() and content.get('scaler'):
            self.scaler.load_state_dict(content['scaler'])
        elif self.scaler.is_enabled() or content.get('scaler'):
            print_rank0(f'{source} was saved in another precision; the loss scale is left out')

    def _load_optimizer(self, saved: dict, source: str):
        groups, parameters = self.optimizer.state_dict()['param_groups'], []
        for group in self.optimizer.param_groups:
            parameters += group['params']
        if [len(group['params']) for group in saved['param_groups']] != [len(group['params']) for group in groups]:
            raise InputError(
                f'{source}: its optimizer groups parameters in another way, as --weight-decay 0 and --layer-decay do. '
                'Give the values of then (--weight-decay 1e-12 in place of 0), or take its weights with --finetune'
            )
        # Checked here, because AdamW takes moments of any shape and fails, or worse, does not, in the first step.
        moments = [(int(i), state[name]) for i, state in saved['state'].items() for name in MOMENTS & state.keys()]
        if any(torch.is_tensor(v) and v.shape not in ((), parameters[i].shape) for i, v in moments):
            raise InputError(f'{source}: its optimizer state is of other parameters; take its weights with --finetune')
        # Some optimizers (LAMB, Adan) count their steps in the groups; all else there is what the flags say.
        for group, before in zip(groups, saved['param_groups'], strict=True):
            group |= {key: value for key, value in before.items() if key.endswith('step')}
        self.optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
        # A fused step takes it for granted that moments lie in memory as their parameter does (--channels-last).
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _plateau(self):
        # timm's plateau schedule leaves half of its state out; torch's, inside it, does not.
        return getattr(self.scheduler, 'lr_scheduler', self.scheduler)


def load_strict(model: nn.Module, content: dict, source: str, use_ema=False, training=True) -> weights.Loaded:
    """Load weights of which nothing may be missing: a wrong accuracy is worse than none.

    Evaluation (`training` False) takes a plain ViT too, whose head an Evo-DeiT reads as it was trained.
    """
    advice = 'To start training from weights of another model, image size or classes, use --finetune.'
    if not training:
        advice = 'Evaluation needs the --model of the training, and a data set with its classes.'
    try:
        content = {key: value for key, value in content.items() if key != 'schedule'}  # that of the flags counts
        loaded = weights.load_weights(model, content, use_ema, report=print_rank0, resize=not training, name=source)
    except InputError as error:
        raise InputError(f'{error}\n{advice}') from error
    if training and loaded.filled:
        raise InputError(f'{source} has no {", ".join(loaded.filled)}, which training needs. {advice}')
    return loaded


# --- starting from a checkpoint


def load_pretrained(model: nn.Module, source: str):
    """Load the weights of --finetune, adapted, and print what is new in the model and what is not used of the file."""
    if not source:
        return
    loaded = weights.load_weights(model, source, adapt=True, report=print_rank0)
    copies = f'copies in the model: {", ".join(loaded.filled)}; ' if loaded.filled else ''
    print_rank0(
        f'{source}: loaded; new in the model: {", ".join(loaded.missing) or "nothing"}; {copies}'
        f'not used of the file: {", ".join(loaded.dropped) or "nothing"}'
    )
    if 'head_cls.weight' in loaded.filled:
        print_rank0("both heads start from the file's: head reads the mean of the patches, head_cls the class token")


def fit_schedule(args: argparse.Namespace, model: nn.Module, config: datasets.DataConfig, training: bool = True):
    """Give an evolved ViT the schedule that images in the folder --fit-schedule choose, if any, and print it.

    A run that goes on keeps the one that it began with. InputError for training that begins with random weights.
    """
    folder = args.fit_schedule
    if not folder:
        return
    found = find_resume_checkpoint(args.output_dir if args.auto_resume else '', args.resume) if training else None
    if found and (saved := saved_flags(found[1])).get('fit_schedule'):
        args.stages, args.keep_ratio = saved['stages'], saved['keep_ratio']
        models.evolve(model, args.keep_ratio, args.stages)
        print_rank0(f'{found[0]}: the schedule is the one that the run began with')
        return
    if training and not (args.finetune or args.pretrained):
        raise InputError(
            '--fit-schedule compares predictions, so it needs trained weights: add --finetune or --pretrained'
        )
    paths = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in IMG_EXTENSIONS)
    if len(paths) < 2:
        raise InputError(f'--fit-schedule: expected a folder with some 64 images, found {len(paths)} in {folder}')
    paths, transform = paths[:: math.ceil(len(paths) / 64)], datasets.build_transform(config)
    try:
        models.fit_schedule(model, torch.stack([transform(load_image(path)) for path in paths]))
    except ValueError as error:
        raise InputError(f'--fit-schedule: {error}') from error
    chosen = [list(model.first_blocks), list(model.keep_ratio)]
    if dist.is_initialized():  # rounding differs between devices: the choice of rank 0 counts
        dist.broadcast_object_list(chosen)
        models.evolve(model, chosen[1], chosen[0])
    # From here on they are as if given: a checkpoint saves them with its flags, and a resume compares them.
    args.stages, args.keep_ratio = chosen
    stages, ratios = (' '.join(map(str, values)) for values in (args.stages, args.keep_ratio))
    print_rank0(f'{folder}: {len(paths)} images choose --stages {stages} --keep-ratio {ratios}')


def resume(args: argparse.Namespace, state: State, may_change: dict[str, bool]):
    """Go on from the checkpoint of --resume or --auto-resume, if there is one, and print where.

    `may_change` are the MAY_CHANGE of all modules. Raises InputError where other flags or the classes differ, but for
    --accept-changes, and where the processes do not all find the same place.
    """
    if checkpoint := find_resume_checkpoint(args.output_dir if args.auto_resume else '', args.resume):
        source, content = checkpoint
        changed = compare_flags(content, source, state.flags, may_change, args.accept_changes)
        trained = saved_classes(content)
        if trained and state.classes and (differences := datasets.compare_classes(trained, state.classes)):
            _refuse_change(f'{source} was trained on other classes: {differences}', 'data', args.accept_changes)
        state.load(content, source, changed)
        place, best = f'epoch {state.epoch}, step {state.step}', f'{state.best_acc1:.3f}'
        print_rank0(f'{source}: resuming at {place}, best Acc@1 so far {best}')
    place = torch.tensor([state.epoch, state.step], device=next(state.model.parameters()).device)
    places = [tuple(place) for place in utils.all_gather(place).tolist()]
    if len(set(places)) > 1:  # as with an output folder on each node's own disk
        found = ', '.join(map(str, places))
        raise InputError(f'processes would begin at different places, (epoch, step): {found}; they need one checkpoint')


def find_resume_checkpoint(folder: str, source: str) -> tuple[str, dict] | None:
    """The checkpoint to resume from, its name and content: the newest good one in `folder`, if any, else `source`."""
    checkpoints, damaged = list_checkpoints(Path(folder)) if folder else [], []
    for path in checkpoints:
        try:
            content = weights.read_checkpoint(path, print_rank0)
        except InputError as error:
            damaged.append(str(error))
            continue
        if damaged:
            newest = next((path.stem.split('-')[1:] for path in checkpoints if '-' in path.stem), None)
            until = f' up to epoch {int(newest[0])}, step {int(newest[1])}' if newest else ''
            lost = f'from epoch {content["epoch"] + 1}, step {content["step"]} on, all is lost{until}'
            print_rank0(f'warning: {"; ".join(damaged)}\nwarning: going back to {path}; {lost}')
        return str(path), content
    if checkpoints:
        raise InputError('--auto-resume: no checkpoint can be read:\n  ' + '\n  '.join(damaged))
    return (source, weights.read_checkpoint(source, print_rank0)) if source else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The last checkpoints in a folder, the newest first; that one has two names."""
    return [*folder.glob('checkpoint.pth'), *sorted(folder.glob('checkpoint-*.pth'), reverse=True)]


def compare_flags(content: dict, source: str, flags: dict, may_change: dict[str, bool], accept: bool) -> set[str]:
    """Compare `flags` with those of a checkpoint, print what differs, and return the names.

    Raises InputError with a table of those that change what is trained, but for `accept`.
    """
    saved = saved_flags(content)
    if 'seed' not in saved:
        print_rank0(f'{source} holds no flags: the order of images and their augmentation may not go on as they began')
        return set()
    saved = NEWER_FLAGS | saved
    changed = [(name, old, flags[name]) for name, old in sorted(saved.items()) if name in flags and old != flags[name]]
    longer = {'epochs'} if flags.get('epochs', 0) > saved.get('epochs', math.inf) else set()
    if rows := [row for row in changed if row[0] not in may_change.keys() | longer]:
        rows = [('', 'then', 'now'), *rows]
        table = '\n'.join(f'  {name:24} {old!s:>20} {new!s:>20}' for name, old, new in rows)
        _refuse_change(f'{source} was trained with other flags:\n{table}', 'flags', accept)
    for name, old, new in changed:
        if not may_change.get(name, True):
            print_rank0(f'{source}: {name} was {old}, now {new}: training goes on, but not exactly as it would have')
        if name in longer:
            print_rank0(f'{source}: epochs was {old}, now {new}: from here on the schedules are those of {new} epochs')
    return {name for name, _, _ in changed}


def _refuse_change(message: str, what: str, accept: bool):
    if not accept:
        raise InputError(f'{message}\nUse the {what} of then, or --accept-changes to go on with those of now.')
    print_rank0(message)


# --- what a checkpoint says of itself


def saved_flags(content: dict) -> dict:
    """The flags that a checkpoint was trained with; published files have a Namespace, bare weights nothing."""
    flags = content.get('args')
    flags = dict(flags) if isinstance(flags, dict) else {}
    if isinstance(flags.get('representative'), bool):  # as it was before there was a third choice
        flags['representative'] = 'one' if flags['representative'] else 'none'
    if 'evolve' in flags:  # as it was before there was --method
        flags['method'] = 'evolve' if flags.pop('evolve') else None
    return flags


def saved_model(content: dict) -> str | None:
    """The name of the model of a checkpoint, where it has one: of ours, published, or of timm's train.py."""
    args = content.get('args')
    names = (saved_flags(content).get('model'), getattr(args, 'model', None), content.get('arch'))
    return next((name for name in names if isinstance(name, str) and name), None)


def saved_classes(content: dict) -> list[str] | None:
    """Names of the classes, in the order of the outputs, where a checkpoint has them."""
    names = content.get('classes')
    named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return names if named else None


def find_classes(content: dict, model_name: str, use_ema: bool = False) -> tuple[list[str] | None, int | None]:
    """Names of the classes of a model's checkpoint, and their number; None where it does not tell."""
    state = weights.find_weights(content, use_ema)
    classifier = models.published_cfg(model_name).classifier or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    outputs = [len(state[f'{head}.weight']) for head in heads if f'{head}.weight' in state]
    # The published Evo-LeViT has head.l where ours has head.linear.
    outputs += [len(value) for key, value in state.items() if key.startswith('head.') and value.ndim == 2]
    return saved_classes(content), outputs[0] if outputs else None


def restore_model_args(args: argparse.Namespace, content: dict) -> argparse.Namespace:
    """The flags for evaluating a checkpoint: what is not given of model, images and precision is as in its training.

    Where the model or the image size is given and differs, that is printed.
    """
    saved, restored = saved_flags(content), {}
    if name := saved_model(content):
        saved['model'] = name
    if args.fit_schedule or (args.method and args.method != saved.get('method')):
        saved = {name: value for name, value in saved.items() if name not in SCHEDULE_FLAGS}
    for name in (*MODEL_FLAGS, *datasets.DataConfig._fields):
        given = getattr(args, name)
        if name in saved and given in (None, False):
            restored[name] = saved[name]
        elif name in (*MODEL_FLAGS, 'input_size') and given != saved.get(name, given):
            before = f"the model's own {name}" if saved[name] is None else f'{name} {saved[name]}'
            print_rank0(f'{args.resume} was trained with {before}, and is evaluated with {given}')
    # Where the device has TF32, that is the default without --amp; elsewhere such a run is evaluated in fp32.
    trained = saved.get('precision') or 'fp32'
    restored['precision'] = getattr(args, 'precision', None) or (None if trained == 'tf32' else trained)
    return argparse.Namespace(**vars(args) | restored | {'amp': False})


class Restored(NamedTuple):
    """What a checkpoint gives to those that run its model."""

    model: nn.Module  # with the weights and the schedule, in evaluation mode
    config: datasets.DataConfig  # what the model expects of images
    classes: list[str] | None  # names in the order of the outputs, where the checkpoint has them
    args: argparse.Namespace  # the flags that hold


def load_model(args: argparse.Namespace, default_model: str = '', use_ema: bool = False) -> Restored:
    """The model of --resume as it was trained, but for flags that are given; for evaluation, pictures and export.

    Without --resume the model is as --model, --pretrained and the rest create it. `default_model` is for checkpoints
    that do not say their model. InputError where nothing says it, and where the weights do not fit.
    """
    source = args.resume
    content = weights.read_checkpoint(source, print_rank0) if source else {}
    args = restore_model_args(args, content)
    if not args.model:
        if not default_model:
            said = f'{source} does not say of which model it is; ' if source else ''
            raise InputError(f'{said}expected --model with the name of a model')
        if source:
            print_rank0(f'{source} does not say of which model it is; --model {default_model} is taken')
        args.model = default_model
    try:
        classes, count = find_classes(content, args.model, use_ema) if source else (None, None)
    except InputError as error:
        raise InputError(f'{source}: {error}') from error
    if not source:
        count = models.published_cfg(args.model).num_classes
    args.pretrained = args.pretrained and not source  # the weights are those of the file
    config = datasets.data_config(args, args.model)
    model = models.build(args, count or 0, config.input_size)
    if source:
        load_for_evaluation(model, content, source, use_ema)
    fit_schedule(args, model, config, training=False)
    return Restored(model.eval(), config, classes, args)


def load_for_evaluation(model: nn.Module, content: dict, source: str, use_ema: bool = False):
    """Load the weights of a checkpoint, with the selection that they were saved with."""
    loaded = load_strict(model, content, source, use_ema, training=False)
    print_rank0(f'{source}: {"averaged weights" if use_ema else "weights"} loaded')
    if not hasattr(model, 'set_schedule') or '_extra_state' in weights.find_weights(content, use_ema):
        return
    if schedule := content.get('schedule'):
        model.set_schedule(schedule['stage_wise'], schedule['evolving'])
    elif loaded.filled or '_extra_state' not in model.state_dict():
        print_rank0(f'{source}: weights of a plain ViT, evolved without training')
    else:
        print_rank0(f'{source} does not say whether it is stage-wise or layer-wise; it is taken for a finished model')
