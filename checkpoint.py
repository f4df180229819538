"""The state of a run on disk: saving it, resuming from it exactly, and getting a model back for evaluation.

From a file to weights in a model:

    resume                      training: finds and reads the file, compares flags and classes
        State.load                  weights, optimizer, place in the run
    load_model                  evaluation, pictures, export: reads the file, builds its model by its flags
        load_for_evaluation         weights, and the selection they were saved with
    both: load_all_weights      all weights, or an error with advice; the model keeps the schedule of its flags
        weights.load_weights        names, shapes, positions
    load_finetune               --finetune: weights.load_weights alone; heads and positions are adapted

The schedule in evaluation: stages and keep ratios come from the command line, else from the flags in the checkpoint
(restore_model_args). Layer-wise or stage-wise comes from the state dict, else from `schedule` in the checkpoint
(load_for_evaluation). In training, the flags and the epoch decide.
"""

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
import networks
import utils
from image_data.files import load_image
from models import weights
from utils import InputError, at_least, print_rank0

# Flags that may differ when a run is resumed; True: the run still continues bit for bit.
MAY_CHANGE = dict.fromkeys(
    'output_dir resume auto_resume overwrite accept_changes finetune pretrained eval eval_ema save_interval_steps '
    'keep_checkpoints results_file tensorboard fit_schedule'.split(),
    True,
)
# If one of these changed, the finished steps of an interrupted epoch saw different images, so it restarts.
ORDER_OF_IMAGES = {'world_size', 'batch_size', 'grad_accum_steps', 'repeated_aug', 'seed', 'train_images'}
# Flags that evaluation restores from the checkpoint, besides preprocessing. A schedule is valid for one method only.
SCHEDULE_FLAGS = 'stages', 'keep_ratio', 'representative', 'merge_r'
MODEL_FLAGS = 'model', 'method', *SCHEDULE_FLAGS, 'model_kwargs'


def add_arguments(parser: argparse.ArgumentParser):
    """Add the flags of saving, resuming and evaluating."""
    add = parser.add_argument_group('checkpoints').add_argument
    add('--output_dir', default='', metavar='PATH', help='folder for checkpoints and log; without it none are written')
    add('--resume', default='', metavar='PATH', help='checkpoint (path or URL) to resume or evaluate')
    add('--auto-resume', action='store_true', help='resume from the newest intact checkpoint in --output_dir, if any')
    add('--overwrite', action='store_true', help='start over, replacing the run in --output_dir')
    add('--accept-changes', action='store_true', help='resume with the new values even if flags or classes changed')
    add('--finetune', default='', metavar='PATH', help='weights to start from; heads and positions are adapted')
    add('--eval', action='store_true', help='only evaluate --resume')
    add('--eval-ema', action='store_true', help='with --eval: evaluate the EMA; in training: evaluate it too')
    add('--results-file', default='', metavar='PATH', help='with --eval: write the results as JSON')
    add('--tensorboard', action='store_true', help='write the log for TensorBoard too (pip install .[logging])')
    add('--save-interval-steps', type=at_least(0), default=0, metavar='N', help='also save every N steps (0: off)')
    add('--keep-checkpoints', type=at_least(1), default=2, metavar='K', help='keep the last K, besides the best')


def check_paths(args: argparse.Namespace):
    """InputError, before anything is loaded, for missing files and for flags that lack another one."""
    utils.check_source('--resume', args.resume)
    utils.check_source('--finetune', args.finetune)
    if args.auto_resume and not args.output_dir:
        raise InputError('--auto-resume looks for checkpoints in --output_dir, which is not given')
    if args.eval and not (args.resume or args.pretrained):
        raise InputError("--eval needs --resume with a checkpoint, or --pretrained for timm's weights")
    if args.results_file and not args.eval:
        raise InputError('--results-file needs --eval; training writes its results to log.txt in --output_dir')
    if args.results_file and not Path(args.results_file).absolute().parent.is_dir():
        raise InputError(f'--results-file {args.results_file}: its folder does not exist')
    if args.tensorboard and (args.eval or not args.output_dir):
        raise InputError('--tensorboard logs training to --output_dir; it needs that flag, and no --eval')


# --- the state of a run


@dataclass
class State:
    """Everything that training changes, and so everything that a checkpoint holds.

    Random numbers need no state: they are functions of the seed and the place in the run.
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    flags: dict = field(default_factory=dict)  # of the run; a resume compares them
    classes: list[str] = field(default_factory=list)  # names in the order of the labels
    epoch: int = 0  # the epoch to train
    step: int = 0  # finished steps of this epoch
    loss_sum: float = 0.0  # of these steps, over all processes
    best_acc1: float = 0.0

    def state_dict(self) -> dict:
        """A checkpoint of tensors and plain data, which load without running code. `epoch` is the last finished one."""
        return {
            'model': self.model.state_dict(),
            'model_ema': self.ema.module.state_dict() if self.ema else None,
            # Evo-DeiT and Evo-LeViT also keep stage_wise and evolving in their state dict; a timm ViT does not.
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
        """Load a checkpoint and print what it lacks. State that depends on a flag in `changed` is not restored."""
        load_all_weights(self.model, content, source)
        if self.ema and content.get('model_ema'):
            load_all_weights(self.ema.module, content, source, use_ema=True)
        elif self.ema:
            self.ema.set(self.model)
            print_rank0(f'{source} has no averaged weights; the EMA starts from its weights')
        if 'epoch' not in content:
            print_rank0(f'{source} holds only weights; training starts with them at epoch {self.epoch}')
            return

        # Where the run stopped. Within an epoch, only the same order of images can be continued.
        self.epoch = content['epoch'] + 1
        for name in ('step', 'loss_sum', 'best_acc1'):
            setattr(self, name, content.get(name, 0))
        if self.step and changed & ORDER_OF_IMAGES:
            print_rank0(
                f'{source}: the order of images changed; the epoch restarts ({self.step} finished steps dropped)'
            )
            self.step, self.loss_sum = 0, 0.0

        # The learning rate is a function of the epoch and the flags; only plateau schedules have state of their own.
        if self.epoch > 0:
            self.scheduler.step(self.epoch - 1, self.best_acc1)
        original = hasattr(self.model, 'is_published') and self.model.is_published(weights.find_weights(content))
        if content.get('optimizer') is None or original or 'opt' in changed:
            # The original Evo-ViT has other parameters, in another order, so its optimizer state does not fit.
            print_rank0(f'{source}: the optimizer starts from scratch, at the learning rate of epoch {self.epoch}')
        else:
            self._load_optimizer(content['optimizer'], source)
            if self._plateau() is not self.scheduler and 'sched' not in changed:
                self._load_plateau(content)

        if self.scaler.is_enabled() and content.get('scaler'):
            self.scaler.load_state_dict(content['scaler'])
        elif self.scaler.is_enabled() or content.get('scaler'):
            print_rank0(f'{source} was saved in another precision; its loss scale is ignored')

    def _load_optimizer(self, saved: dict, source: str):
        groups = self.optimizer.state_dict()['param_groups']
        if [len(group['params']) for group in saved['param_groups']] != [len(group['params']) for group in groups]:
            raise InputError(
                f'{source}: its optimizer has other parameter groups; --weight-decay 0 and --layer-decay change them. '
                'Resume with the original values (--weight-decay 1e-12 instead of 0), or start with --finetune'
            )
        # LAMB and Adan count steps in their groups. Everything else there follows from the flags of this run.
        for group, before in zip(groups, saved['param_groups'], strict=True):
            group |= {key: value for key, value in before.items() if key.endswith('step')}
        self.optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
        # Fused steps assume that moments have the strides of their parameter, which --channels-last changes.
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _load_plateau(self, content: dict):
        saved = dict(content['lr_scheduler'])
        # With --lr-noise, timm's schedule returns to these rates before the next epoch.
        self.scheduler.restore_lr = saved.pop('restore_lr', None)
        self._plateau().load_state_dict(saved)
        for group, before in zip(self.optimizer.param_groups, content['optimizer']['param_groups'], strict=True):
            group['lr'] = before['lr']

    def _plateau(self):
        # timm's plateau schedule wraps torch's. torch's state dict is complete, timm's is not.
        return getattr(self.scheduler, 'lr_scheduler', self.scheduler)


def load_all_weights(model: nn.Module, content: dict, source: str, use_ema=False, training=True) -> weights.Loaded:
    """Load all weights; InputError otherwise, since a missing tensor would silently give a wrong accuracy.

    For evaluation (`training=False`) positions are resized, and an Evo-DeiT also takes the weights of a plain ViT: the
    tensors that these lack (`norm_cls`, `head_cls`) become copies.
    """
    advice = 'To start training from weights of another model, image size or classes, use --finetune.'
    if not training:
        advice = 'Evaluation needs the --model of the training, and a data set with its classes.'
    try:
        content = {key: value for key, value in content.items() if key != 'schedule'}  # the model has that of the flags
        loaded = weights.load_weights(model, content, use_ema, report=print_rank0, resize=not training, name=source)
    except InputError as error:
        raise InputError(f'{error}\n{advice}') from error
    if training and loaded.filled:
        raise InputError(f'{source} has no {", ".join(loaded.filled)}, which training needs. {advice}')
    return loaded


# --- starting a run


def load_finetune(model: nn.Module, source: str):
    """Load the weights of --finetune, adapted to the model; print what is new and what is not used."""
    if not source:
        return
    loaded = weights.load_weights(model, source, adapt=True, report=print_rank0)
    copies = f'copies in the model: {", ".join(loaded.filled)}; ' if loaded.filled else ''
    print_rank0(
        f'{source}: loaded; new in the model: {", ".join(loaded.missing) or "nothing"}; {copies}'
        f'not used from the file: {", ".join(loaded.dropped) or "nothing"}'
    )


def choose_schedule(args: argparse.Namespace, model: nn.Module, config: datasets.DataConfig, training: bool = True):
    """With --fit-schedule, choose stages and keep ratios of an evolved ViT on the images of a folder, and print them.

    A resumed run keeps the schedule that it began with. InputError for training from random weights.
    """
    folder = args.fit_schedule
    if not folder:
        return
    found = find_resume_checkpoint(args.output_dir if args.auto_resume else '', args.resume) if training else None
    if found and (saved := saved_flags(found[1])).get('fit_schedule'):
        args.stages, args.keep_ratio = saved['stages'], saved['keep_ratio']
        models.evolve(model, args.keep_ratio, args.stages)
        print_rank0(f'{found[0]}: keeping the schedule of the run')
        return
    if training and not (args.finetune or args.pretrained):
        raise InputError('--fit-schedule needs trained weights: add --finetune or --pretrained')
    paths = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in IMG_EXTENSIONS)
    if len(paths) < 2:
        raise InputError(f'--fit-schedule: expected a folder with about 64 images, found {len(paths)} in {folder}')
    paths, transform = paths[:: math.ceil(len(paths) / 64)], datasets.build_transform(config)
    try:
        models.fit_schedule(model, torch.stack([transform(load_image(path)) for path in paths]))
    except ValueError as error:
        raise InputError(f'--fit-schedule: {error}') from error
    chosen = [list(model.first_blocks), list(model.keep_ratio)]
    if dist.is_initialized():  # rounding differs between devices, so rank 0 decides
        dist.broadcast_object_list(chosen)
        models.evolve(model, chosen[1], chosen[0])
    # From here on they count as given: a checkpoint saves them with its flags, and a resume compares them.
    args.stages, args.keep_ratio = chosen
    stages, ratios = (' '.join(map(str, values)) for values in (args.stages, args.keep_ratio))
    print_rank0(f'{folder}: chose --stages {stages} --keep-ratio {ratios} on {len(paths)} images')


# --- resuming a run


def resume(args: argparse.Namespace, state: State, may_change: dict[str, bool]):
    """Continue from the checkpoint of --resume or --auto-resume, if there is one, and print where.

    `may_change` is the MAY_CHANGE of all modules. InputError if other flags or the classes differ (unless
    --accept-changes is set), or if the processes would not all start at the same epoch and step.
    """
    if found := find_resume_checkpoint(args.output_dir if args.auto_resume else '', args.resume):
        source, content = found
        changed = compare_flags(content, source, state.flags, may_change, args.accept_changes)
        trained = saved_classes(content)
        if trained and state.classes and (differences := datasets.compare_classes(trained, state.classes)):
            _check_change(f'{source} was trained on other classes: {differences}', 'data', args.accept_changes)
        state.load(content, source, changed)
        place, best = f'epoch {state.epoch}, step {state.step}', f'{state.best_acc1:.3f}'
        print_rank0(f'{source}: resuming at {place}, best Acc@1 so far {best}')
    # Nodes that do not share --output_dir find different checkpoints, or none.
    place = torch.tensor([state.epoch, state.step], device=next(state.model.parameters()).device)
    places = [tuple(place) for place in utils.all_gather(place).tolist()]
    if len(set(places)) > 1:
        found = ', '.join(map(str, places))
        raise InputError(f'processes start at different places, (epoch, step): {found}; all need the same checkpoint')


def find_resume_checkpoint(folder: str, source: str) -> tuple[str, dict] | None:
    """Name and content of the newest intact checkpoint in `folder`, if it has any, else of `source`."""
    checkpoints, damaged = list_checkpoints(Path(folder)) if folder else [], []
    for path in checkpoints:
        try:
            content = weights.read_checkpoint(path, print_rank0)
        except InputError as error:
            damaged.append(str(error))
            continue
        if damaged:
            place = f'epoch {content["epoch"] + 1}, step {content["step"]}'
            print_rank0(f'warning: {"; ".join(damaged)}\nwarning: going back to {path}, at {place}')
        return str(path), content
    if checkpoints:
        raise InputError('--auto-resume: no checkpoint can be read:\n  ' + '\n  '.join(damaged))
    return (source, weights.read_checkpoint(source, print_rank0)) if source else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The last checkpoints in a folder, newest first; checkpoint.pth is a second name of the newest."""
    return [*folder.glob('checkpoint.pth'), *sorted(folder.glob('checkpoint-*.pth'), reverse=True)]


def compare_flags(content: dict, source: str, flags: dict, may_change: dict[str, bool], accept: bool) -> set[str]:
    """Compare `flags` with those of a checkpoint; print and return the names of those that differ.

    Raises InputError with a table if one of them changes what is trained, unless `accept`.
    """
    saved = saved_flags(content)
    if 'seed' not in saved:
        print_rank0(f'{source} holds no flags; data order and augmentation may differ')
        return set()
    changed = {name: (old, flags[name]) for name, old in sorted(saved.items()) if flags.get(name, old) != old}
    allowed = set(may_change)
    if 'epochs' in changed and changed['epochs'][0] < changed['epochs'][1]:
        allowed.add('epochs')  # training on is no mistake
        old, new = changed['epochs']
        print_rank0(f'{source}: epochs was {old}, now {new}: schedules now span {new} epochs')
    if refused := {name: values for name, values in changed.items() if name not in allowed}:
        rows = [('', 'then', 'now'), *((name, *values) for name, values in refused.items())]
        table = '\n'.join(f'  {name:24} {old!s:>20} {new!s:>20}' for name, old, new in rows)
        _check_change(f'{source} was trained with other flags:\n{table}', 'flags', accept)
    for name, (old, new) in changed.items():
        if not may_change.get(name, True):
            print_rank0(f'{source}: {name} was {old}, now {new}: the run continues, but not bit for bit')
    return set(changed)


def _check_change(message: str, what: str, accept: bool):
    """Print the message if the change is accepted, else raise it as InputError."""
    if not accept:
        raise InputError(f'{message}\nResume with the original {what}, or pass --accept-changes.')
    print_rank0(message)


# --- what a checkpoint says about itself


def saved_flags(content: dict) -> dict:
    """The training flags; {} for checkpoints of the original, whose Namespace has other flags, and for bare weights."""
    flags = content.get('args')
    flags = dict(flags) if isinstance(flags, dict) else {}
    if 'evolve' in flags:  # version 0.2 had no --method
        flags['method'] = 'evolve' if flags.pop('evolve') else None
    return flags


def saved_model(content: dict) -> str | None:
    """The name of the model, from a checkpoint of this code, of the original Evo-ViT, or of timm's train.py."""
    original = getattr(content.get('args'), 'model', None)
    for name in (saved_flags(content).get('model'), original, content.get('arch')):
        if name and isinstance(name, str):
            return name
    return None


def saved_classes(content: dict) -> list[str] | None:
    """Names of the classes in the order of the outputs, if a checkpoint has them."""
    names = content.get('classes')
    named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return names if named else None


def find_classes(content: dict, model_name: str, use_ema: bool = False) -> tuple[list[str] | None, int | None]:
    """Names and number of the classes of a checkpoint; None for what it does not say."""
    state = weights.find_weights(content, use_ema)
    classifier = networks.published_cfg(model_name).classifier or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    outputs = [len(state[f'{head}.weight']) for head in heads if f'{head}.weight' in state]
    # The original Evo-LeViT has head.l where ours has head.linear.
    outputs += [len(value) for key, value in state.items() if key.startswith('head.') and value.ndim == 2]
    return saved_classes(content), outputs[0] if outputs else None


# --- from a checkpoint to a model


class Restored(NamedTuple):
    """A model from a checkpoint, with what is needed to run it."""

    model: nn.Module  # with weights and schedule, in evaluation mode
    config: datasets.DataConfig  # what the model expects of its images
    classes: list[str] | None  # names in the order of the outputs, if the checkpoint has them
    args: argparse.Namespace  # flags, completed by those of the training


def load_model(args: argparse.Namespace, default_model: str = '', use_ema: bool = False) -> Restored:
    """Restore the model of --resume for evaluation, pictures and export. Flags that are given replace those saved.

    Without --resume, the model is built from flags, as for --pretrained. `default_model` is for checkpoints that do not
    name their model. InputError if nothing names it, and if the weights do not fit.
    """
    source = args.resume
    content = weights.read_checkpoint(source, print_rank0) if source else {}
    args = restore_model_args(args, content)
    if not args.model:
        unnamed = f'{source} does not name its model; ' if source else ''
        if not default_model:
            raise InputError(f'{unnamed}expected --model with the name of a model')
        if source:
            print_rank0(f'{unnamed}using --model {default_model}')
        args.model = default_model
    try:
        classes, count = find_classes(content, args.model, use_ema) if source else (None, None)
    except InputError as error:
        raise InputError(f'{source}: {error}') from error
    if not source:
        count = networks.published_cfg(args.model).num_classes
    args.pretrained = args.pretrained and not source  # the file has the weights
    config = datasets.data_config(args, args.model)
    model = networks.build(args, count or 0, config.input_size)
    if source:
        load_for_evaluation(model, content, source, use_ema)
    choose_schedule(args, model, config, training=False)
    return Restored(model.eval(), config, classes, args)


def restore_model_args(args: argparse.Namespace, content: dict) -> argparse.Namespace:
    """Complete the flags: model, preprocessing and precision default to those of the training.

    Prints given flags of the model, and a given image size, that differ from the training.
    """
    saved, restored = saved_flags(content), {}
    if name := saved_model(content):
        saved['model'] = name
    # Keep ratios of one method mean something else to another, so another method starts from its own defaults.
    if args.fit_schedule or (args.method and args.method != saved.get('method')):
        saved = {name: value for name, value in saved.items() if name not in SCHEDULE_FLAGS}
    for name in (*MODEL_FLAGS, *datasets.DataConfig._fields):
        given = getattr(args, name)
        if name in saved and given in (None, False):
            restored[name] = saved[name]
        elif name in (*MODEL_FLAGS, 'input_size') and given != saved.get(name, given):
            before = f"the model's own {name}" if saved[name] is None else f'{name} {saved[name]}'
            print_rank0(f'{args.resume} was trained with {before}, and is evaluated with {given}')
    # A run in TF32 may be evaluated anywhere: without AMP, None picks TF32 on GPUs that have it, and fp32 elsewhere.
    trained = saved.get('precision') or 'fp32'
    restored['precision'] = getattr(args, 'precision', None) or (None if trained == 'tf32' else trained)
    return argparse.Namespace(**vars(args) | restored | {'amp': False})


def load_for_evaluation(model: nn.Module, content: dict, source: str, use_ema: bool = False):
    """Load the weights of a checkpoint, and the selection that they were saved with: layer-wise or stage-wise."""
    loaded = load_all_weights(model, content, source, use_ema, training=False)
    print_rank0(f'{source}: {"averaged weights" if use_ema else "weights"} loaded')
    if not hasattr(model, 'set_schedule') or '_extra_state' in weights.find_weights(content, use_ema):
        return  # nothing to select, or the state dict has set it
    if schedule := content.get('schedule'):
        model.set_schedule(schedule['stage_wise'], schedule['evolving'])
    elif loaded.filled or '_extra_state' not in model.state_dict():
        print_rank0(f'{source}: weights of a plain ViT, evolved without training')
    else:
        print_rank0(f'{source} does not say whether it selects layer-wise or stage-wise; assuming stage-wise')
