"""What a run writes: checkpoints and the log in its folder, and the results of an evaluation."""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import utils
from checkpoint import State
from models import weights
from utils import InputError, print_rank0


class Log:
    """The log of a run: one line of JSON per epoch in `log.txt`, and on request events for TensorBoard.

    Without a folder nothing is written. InputError if TensorBoard is not installed.
    """

    def __init__(self, folder: Path | None = None, tensorboard: bool = False):
        self.folder, self.open_writer, self.writer = folder, None, None
        if folder and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(f'--tensorboard: {error}; pip install tensorboard, or leave it out') from error
            self.open_writer = partial(SummaryWriter, folder / 'tensorboard')

    def write(self, record: dict):
        """Add the record of an epoch. Drops records at or after this epoch, and partial lines."""
        if not self.folder:
            return
        path, lines = self.folder / 'log.txt', []
        for line in path.read_text(errors='replace').splitlines() if path.exists() else []:
            try:
                if json.loads(line)['epoch'] < record['epoch']:
                    lines.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        text = '\n'.join([*lines, json.dumps(finite)]) + '\n'
        utils.atomic_write(path, lambda file: file.write(text.encode()))
        if self.open_writer:
            self.writer = self.writer or self.open_writer(purge_step=record['epoch'])
            for name, value in record.items():
                if isinstance(value, int | float) and name != 'epoch':
                    self.writer.add_scalar(name.replace('_', '/', 1), value, record['epoch'])
            self.writer.flush()


class RunFolder(NamedTuple):
    """Where a run writes. Without a path, as on all processes but the first, nothing is written."""

    path: Path | None = None
    keep: int = 2  # checkpoints, besides the best
    stale: tuple[Path, ...] = ()  # files of an earlier run, which --overwrite replaces
    log: Log = Log()

    def clear(self):
        """Remove the earlier run; called once all checks of the new one have passed."""
        for path in self.stale:
            path.unlink()

    def save(self, state: State, best: bool = False):
        """Write `checkpoint.pth`, and `best_checkpoint.pth` if `best`; keep the last `keep` as `checkpoint-*.pth`."""
        if not self.path:
            return
        newest, write = self.path / 'checkpoint.pth', partial(torch.save, state.state_dict())
        # Write the best first: after a crash between the two, the resumed run repeats the epoch and writes both.
        if best:
            utils.atomic_write(self.path / 'best_checkpoint.pth', write)
        utils.atomic_write(newest, write)
        try:
            # A hard link costs neither time nor space.
            numbered = self.path / f'checkpoint-{state.epoch:04d}-{state.step:06d}.pth'
            numbered.unlink(missing_ok=True)
            os.link(newest, numbered)
            numbers = sorted(self.path.glob('checkpoint-*.pth'))
            here = numbers.index(numbered) + 1
            # Later ones belong to a run that has since been resumed from an earlier checkpoint.
            for other in numbers[: max(here - self.keep, 0)] + numbers[here:]:
                other.unlink()
        except OSError as error:
            print_rank0(f'warning: older checkpoints in {self.path} could not be linked or removed: {error}')


def prepare_output_dir(args: argparse.Namespace) -> RunFolder:
    """Create --output_dir; InputError if it is not writable, or holds another run without --overwrite."""
    if not args.output_dir or args.eval or int(os.environ.get('RANK', 0)) > 0:
        return RunFolder()
    path = Path(args.output_dir)
    log = Log(path, args.tensorboard)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f'--output_dir {path.absolute()} cannot be written to: {error}') from error
    existing = (*checkpoint.list_checkpoints(path), *path.glob('best_checkpoint.pth'), *path.glob('log.txt'))
    existing += tuple(path.glob('tensorboard/events.*'))
    # A checkpoint of another folder starts a new run here. After a restart by the launcher, this run wrote the folder.
    elsewhere = weights.is_url(args.resume) or Path(args.resume).resolve().parent != path.resolve()
    continues = args.auto_resume or (args.resume and (not elsewhere or utils.restarts()))
    if continues and args.overwrite and not utils.restarts():
        raise InputError('--overwrite starts over, --resume and --auto-resume continue a run; give one of them')
    if not existing or continues:
        return RunFolder(path, args.keep_checkpoints, log=log)
    # A job that was restarted by its launcher must not remove its own run.
    if not args.overwrite or utils.restarts():
        raise InputError(
            f'--output_dir {path} holds a run ({", ".join(file.name for file in existing)}): '
            '--resume or --auto-resume continues it, --overwrite starts over'
        )
    for source in filter(None, (args.resume, args.finetune, args.teacher_path)):
        if Path(source).exists() and any(file.samefile(source) for file in existing):
            raise InputError(f'{source} belongs to the run that --overwrite removes; move it to another folder first')
    return RunFolder(path, args.keep_checkpoints, existing, log)


def write_results(path: Path, results: dict):
    """Write the results of an evaluation as JSON, with the versions of the packages."""
    versions = {package: importlib.metadata.version(package) for package in ('torch', 'torchvision', 'timm')}
    text = json.dumps(results | {'versions': versions | {'python': platform.python_version()}}, indent=2)
    utils.atomic_write(path, lambda file: file.write(f'{text}\n'.encode()))
