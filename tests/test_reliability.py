"""What holds when things go wrong: the cases of docs/reliability.md that no other test file proves.

A run here is one or two real processes, forked from a server that has imported everything; torchrun where it matters.
"""

import argparse
import copy
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from conftest import NANO as SMALL
from conftest import ROOT, accuracy, arguments, free_port, launch, read_log
from faults import faulty_step
from PIL import Image, ImageFile
from timm.utils import ModelEmaV3
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

import checkpoint
import datasets
import engine
import losses
import networks
import optim
import output
import utils
from image_data import shapes
from models import weights
from utils import InputError

NANO = [*SMALL, '--epochs', 2]
# Mixup, cutmix, drop path and repeated augmentation are on by default; fp16 has a loss scale, which is state too.
WHOLE = [
    *(*NANO, '--lr', 0.01, '--warmup-epochs', 1, '--warmup-lr', 0.001, '--model-ema-decay', 0.9),
    *('--precision', 'fp16', '--save-interval-steps', 1, '--keep-checkpoints', 9),
]


# --- processes


@pytest.fixture(scope='session')
def forks():
    """A way to start processes that have everything imported and no state of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')
        patch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), str(ROOT / 'tests')]))
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['main_deit', 'main_levit', 'visualize', 'test_reliability'])
        started = context.Process(target=int)
        started.start()
        started.join()
        yield context


def run_rank(script: str, flags: list, env: dict, out: Path, file_limit: int | None, fault: str = ''):
    """One process of a run: the script with its flags, in a process group of its own, printing to a file."""
    os.setsid()
    multiprocessing.set_start_method('fork', force=True)  # of workers, as in a process from a shell
    printed = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ.update(env)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if fault:
        engine.train_step = faulty_step(fault)
    sys.argv = [f'{script}.py', *map(str, flags)]
    utils.run_script(importlib.import_module(script).main)


class Run:
    """A script that runs in `ranks` processes."""

    def __init__(self, forks, out: Path, *flags, ranks=1, script='main_deit', fault='', file_limit=None):
        self.out = out
        env = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
        self.processes = []
        for rank in range(ranks):
            places = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': ranks}
            own = env | ({key: str(value) for key, value in places.items()} if ranks > 1 else {})
            process = forks.Process(target=run_rank, args=(script, flags, own, out, file_limit, fault))
            process.start()
            self.processes.append(process)

    @property
    def printed(self) -> str:
        return self.out.read_text() if self.out.exists() else ''

    def wait_for(self, text: str, seconds: float = 120):
        until = time.monotonic() + seconds
        while text not in self.printed:
            assert time.monotonic() < until and any(p.is_alive() for p in self.processes), self.printed
            time.sleep(0.005)

    def send(self, number: int):
        """A signal to the processes and all that they started."""
        for process in self.processes:
            os.killpg(process.pid, number)

    def end(self, seconds: float = 120) -> list[int]:
        """Exit codes."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0.01))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, self.printed
        return codes


@pytest.fixture
def start(forks, tmp_path, image_folder):
    """Start a run; those that a test leaves are ended."""
    runs = []

    def run(*flags, **kwargs) -> Run:
        flags = flags if '--data-path' in flags else ('--data-path', image_folder, *flags)
        runs.append(Run(forks, tmp_path / f'printed{len(runs)}', *flags, **kwargs))
        return runs[-1]

    yield run
    for process in itertools.chain(*(run.processes for run in runs)):
        if process.is_alive():
            process.kill()


@pytest.fixture(scope='session')
def whole(forks, tmp_path_factory, image_folder):
    """Folder of a run that nothing interrupted, by the number of processes and of workers."""
    done = {}

    def folder(ranks: int = 1, workers: int = 0, script: str = 'main_deit', flags=()) -> Path:
        key = ranks, workers, script
        if key not in done:
            done[key] = tmp_path_factory.mktemp('whole')
            run = Run(
                forks, done[key] / 'printed', *WHOLE, '--data-path', image_folder, '--num_workers', workers, *flags,
                '--output_dir', done[key], ranks=ranks, script=script,
            )  # fmt: skip
            assert run.end() == [0] * ranks, run.printed
        return done[key]

    return folder


def same(one, two) -> bool:
    """Whether two trees of dicts, lists, tensors and numbers are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def differences(one: Path, two: Path) -> set[str]:
    """What differs between two runs: pieces of the last checkpoints, of the best ones, lines of the log."""
    found = set()
    for name in ('checkpoint.pth', 'best_checkpoint.pth'):
        a, b = (weights.read_checkpoint(folder / name) for folder in (one, two))
        for content in (a, b):
            content['args'] = {key: value for key, value in content['args'].items() if key not in engine.MAY_CHANGE}
        found |= {f'{name}: {key}' for key in a | b if not same(a.get(key), b.get(key))}
    logs = [read_log(folder) for folder in (one, two)]
    for line in itertools.chain(*logs):
        del line['train_images_per_second']
    return found | ({'log.txt'} if logs[0] != logs[1] else set())


def continued(whole: Path, folder: Path, *names: str) -> Path:
    """A folder with some of the files of a run."""
    folder.mkdir()
    for name in names:
        shutil.copy(whole / name, folder / name.split('/')[-1])
    return folder


# --- a run is interrupted


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('workers', [0, 2])
def test_row_03_an_interrupted_run_ends_as_one_that_was_not(start, whole, tmp_path, ranks, workers):
    flags = [*WHOLE, '--num_workers', workers, '--auto-resume', '--output_dir']
    # Killed in the first step of an epoch, and in the middle of one.
    places = {'edge': f'kill:{ranks - 1}:1:0', 'middle': f'kill:{ranks - 1}:1:{3 - ranks}'}
    runs = [start(*flags, tmp_path / name, ranks=ranks, fault=fault) for name, fault in places.items()]
    assert all(-signal.SIGKILL in run.end() for run in runs)
    found = [weights.read_checkpoint(tmp_path / name / 'checkpoint.pth') for name in places]
    assert [(c['epoch'] + 1, c['step']) for c in found] == [(1, 0), (1, 3 - ranks)]
    runs = [start(*flags, tmp_path / name, ranks=ranks) for name in places]
    assert [run.end() for run in runs] == [[0] * ranks] * 2, [run.printed for run in runs]
    for name in places:
        assert differences(whole(ranks, workers), tmp_path / name) == set()


@pytest.mark.slow
def test_row_03_levit(start, whole, tmp_path):
    flags = [*('--model', 'EvoLeViT_128S', '--input-size', 64, '--distillation-type', 'none', '--precision', 'fp32')]
    run = start(*WHOLE, *flags, '--output_dir', tmp_path / 'run', script='main_levit', fault='kill:0:1:2')
    assert run.end() == [-signal.SIGKILL]
    run = start(*WHOLE, *flags, '--auto-resume', '--output_dir', tmp_path / 'run', script='main_levit')
    assert run.end() == [0], run.printed
    assert differences(whole(1, 0, 'main_levit', flags), tmp_path / 'run') == set()


@pytest.fixture
def resumed(script, image_folder, tmp_path):
    """Run a copy of a checkpoint to its end, changed by a function; returns the folder."""

    def run(source: Path, change, *flags) -> Path:
        content = weights.read_checkpoint(source)
        change(content)
        folder = tmp_path / f'resumed{len(list(tmp_path.iterdir()))}'
        folder.mkdir()
        shutil.copy(source.parent / 'log.txt', folder)
        torch.save(content, folder / 'changed.pth')
        more = ['--data-path', image_folder, '--output_dir', folder, '--resume', folder / 'changed.pth']
        script('main_deit', *WHOLE, *more, *flags)
        return folder

    return run


def test_row_04_each_piece_of_state_counts(whole, resumed):
    source = whole() / 'checkpoint-0001-000002.pth'

    def keep(content):
        content['best_acc1'] = 99.0

    def drop(name, value=None):
        return lambda content: (keep(content), content.update({name: value}))

    complete = resumed(source, keep)
    assert not differences_of_last(whole(), complete, but='best_acc1')
    torch.manual_seed(0)
    other = timm.create_model('evo_deit_nano_patch4_32', num_classes=4).state_dict()
    pieces = dict(model=other, model_ema=None, optimizer=None, scaler=None, step=0, best_acc1=0.0)
    for name, value in pieces.items():
        assert differences_of_last(complete, resumed(source, drop(name, value))), name
    # The sum of the epoch's loss ends in the log; the seed stands for the state of all random numbers.
    losses = [read_log(folder)[-1]['train_loss'] for folder in (complete, resumed(source, drop('loss_sum', 0.0)))]
    assert losses[0] != losses[1]
    assert differences_of_last(complete, resumed(source, keep, '--seed', 1, '--accept-changes'))


def differences_of_last(one: Path, two: Path, but: str = '') -> bool:
    one, two = (weights.read_checkpoint(folder / 'checkpoint.pth') for folder in (one, two))
    return not all(same(one[key], two[key]) for key in one if key not in ('args', but))


def test_row_04_the_schedule_counts_where_it_has_state(script, resumed, image_folder, tmp_path):
    """Plateau schedules have, and noise on top of their rate, which comes back before the next epoch."""
    plateau = ['--sched', 'plateau', '--patience-epochs', 0, '--warmup-epochs', 0, '--epochs', 3, '--precision', 'fp32']
    for name, key, more in (('plateau', 'best', []), ('noise', 'restore_lr', ['--lr-noise', 0.0, 1.0])):
        flags, folder = [*plateau, *more], tmp_path / name
        script('main_deit', *WHOLE, *flags, '--data-path', image_folder, '--output_dir', folder)
        source = folder / 'checkpoint-0002-000000.pth'
        assert not differences_of_last(folder, resumed(source, lambda content: None, *flags))
        changed = {'best': 100.0, 'restore_lr': None}[key]
        other = resumed(source, lambda c, k=key, v=changed: c['lr_scheduler'].update({k: v}), *flags)
        assert differences_of_last(folder, other)


def write(path: Path, content: dict):
    utils.atomic_write(path, partial(torch.save, content))


def write_for_ever(path: Path, durable: bool):
    values = torch.zeros(4_000_000)
    for i in itertools.count(1):
        content = {'model': {'w': values.fill_(i)}, 'number': i}
        write(path, content) if durable else torch.save(content, path)


@pytest.mark.slow
@pytest.mark.parametrize('durable', [True, False], ids=['as written here', 'without protection'])
def test_row_06_killed_while_saving(forks, tmp_path, durable):
    path, rng, damaged = tmp_path / 'c.pth', np.random.default_rng(0), 0
    for _ in range(10):
        process = forks.Process(target=write_for_ever, args=(path, durable))
        process.start()
        while not path.exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.02, 0.3))
        process.kill()
        process.join()
        try:
            found = weights.read_checkpoint(path)
            assert bool((found['model']['w'] == found['number']).all())
        except InputError:
            damaged += 1
    assert damaged == 0 if durable else damaged > 0


def test_row_07_order_of_a_save(tmp_path, monkeypatch):
    path = tmp_path / 'c.pth'
    write(path, {'model': {'w': torch.zeros(3)}})
    done = []

    def spy(name, describe):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, **k: (done.append((name, *describe(a))), real(*a, **k))[1])

    spy('fsync', lambda a: (Path(os.readlink(f'/proc/self/fd/{a[0]}')),))
    spy('replace', lambda a: map(Path, a))
    spy('unlink', lambda a: map(Path, a))
    write(path, {'model': {'w': torch.ones(3)}})
    temporary = tmp_path / '.c.pth.tmp'
    assert done == [('fsync', temporary), ('replace', temporary, path), ('fsync', tmp_path)]


def test_row_08_damage_is_refused(tmp_path):
    path = tmp_path / 'c.pth'
    content = {'model': {f'w{i}': torch.arange(3000.0) for i in range(4)}, 'epoch': 3}
    write(path, content)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for bad in (
        good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
        good[:4096] + bytes(4096) + good[8192:],
        good[:-1],
        good[: len(good) // 2],
        good[:100],
    ):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=f'{path} .*damaged'):
            weights.read_checkpoint(path)
    # A flipped bit anywhere is noticed, or is in none of the content.
    for place in rng.integers(0, len(good), 200):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.integers(8)]) + good[place + 1 :])
        try:
            assert same(weights.read_checkpoint(path), content), place
        except InputError as error:
            assert str(path) in str(error)


@pytest.mark.slow
def test_row_09_a_damaged_newest_checkpoint(start, whole, script, tmp_path, image_folder):
    names = ['checkpoint.pth', 'best_checkpoint.pth', 'checkpoint-0002-000000.pth', 'checkpoint-0001-000003.pth']
    folder = continued(whole(), tmp_path / 'run', *names, 'log.txt')
    for name in (names[0], names[2]):
        damage(folder / name)
    run = start(*WHOLE, '--output_dir', folder, '--auto-resume')
    assert run.end() == [0], run.printed
    assert 'checkpoint.pth is damaged' in run.printed
    assert re.search(f'going back to .*{names[3]}, at epoch 1, step 3', run.printed)
    assert differences(whole(), folder) == set()
    damage(folder / names[0])
    with pytest.raises(InputError, match=r'checkpoint\.pth is damaged'):
        script('main_deit', *WHOLE, '--data-path', image_folder, '--resume', folder / names[0])


def damage(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_row_11_a_loss_that_is_not_finite_on_one_rank(start, tmp_path):
    run = start(*NANO, '--output_dir', tmp_path / 'run', ranks=2, fault='nan:1:1:0')
    run.wait_for('Epoch 0 done')
    began = time.monotonic()
    assert run.end() == [2, 2]
    assert time.monotonic() - began < 10
    assert run.printed.count('the loss of rank 1 is nan in epoch 1, step 0, at rate') == 2
    found = weights.read_checkpoint(tmp_path / 'run' / 'checkpoint.pth')
    assert found['epoch'] == 0
    assert all(bool(value.isfinite().all()) for value in [*found['model'].values(), *found['model_ema'].values()])


def test_row_11_infinity_too_and_that_it_matters(script, image_folder, tmp_path, monkeypatch):
    check = engine.StepCheck(torch.device('cpu'))
    check.check(torch.tensor(1.0), 'here')
    with pytest.raises(InputError, match='the loss of rank 0 is inf here'):
        check.check(torch.tensor(float('inf')), 'here')
    monkeypatch.setattr(engine.StepCheck, 'check', lambda *args, **kwargs: None)
    monkeypatch.setattr(engine, 'train_step', faulty_step('nan:0:1:0'))
    script('main_deit', *NANO, '--data-path', image_folder, '--output_dir', tmp_path)
    assert not weights.read_checkpoint(tmp_path / 'checkpoint.pth')['model']['head.weight'].isfinite().any()


@pytest.fixture
def delayed_check():
    """A check that reads the answer one step later, as on a GPU."""
    check = engine.StepCheck(torch.device('cpu'))
    check.delayed = True
    yield check
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_row_11_and_row_13_on_a_gpu_a_step_is_read_one_step_later(delayed_check):
    delayed_check.check(torch.tensor(1.0), 'in step 0')
    delayed_check.check(torch.tensor(float('nan')), 'in step 1')  # queued, not read
    with pytest.raises(InputError, match='the loss of rank 0 is nan in step 1'):
        delayed_check.check(torch.tensor(1.0), 'in step 2')
    # What is still open is read before a checkpoint is written.
    delayed_check.check(torch.tensor(float('inf')), 'in step 3')
    with pytest.raises(InputError, match='the loss of rank 0 is inf in step 3'):
        delayed_check.check_last()
    os.kill(os.getpid(), signal.SIGTERM)
    delayed_check.check(torch.tensor(1.0), 'in step 4')
    assert not delayed_check.stop
    delayed_check.check(torch.tensor(1.0), 'in step 5')
    assert delayed_check.stop


@pytest.mark.slow
def test_row_11_on_gpus_no_checkpoint_holds_a_bad_update(script, image_folder, tmp_path, delayed_check, monkeypatch):
    monkeypatch.setattr(engine, 'StepCheck', lambda device: delayed_check)
    monkeypatch.setattr(engine, 'train_step', faulty_step('nan:0:0:1'))
    with pytest.raises(InputError, match='the loss of rank 0 is nan in epoch 0, step 1'):
        script(
            'main_deit', *NANO, '--data-path', image_folder, '--output_dir', tmp_path, '--save-interval-steps', 1,
            '--keep-checkpoints', 9,
        )  # fmt: skip
    written = sorted(tmp_path.glob('checkpoint-*.pth'))
    assert [path.name for path in written] == ['checkpoint-0000-000001.pth']
    assert all(value.isfinite().all() for value in weights.read_checkpoint(written[0])['model'].values())


def torchrun(*flags, restarts: int = 0, fault: str = ''):
    script = ['tests/faults.py', fault] if fault else ['main_deit.py']
    launcher = ['--nproc_per_node=2', f'--max_restarts={restarts}', f'--master_port={free_port()}']
    return launch('torch.distributed.run', *launcher, *script, *flags)


@pytest.mark.slow
def test_row_12_a_killed_rank_and_a_launcher_that_restarts(whole, image_folder, tmp_path):
    flags = [*WHOLE, '--data-path', image_folder, '--output_dir', tmp_path / 'run', '--auto-resume']
    running = torchrun(*flags, restarts=1, fault='kill:1:1:1')
    printed, _ = running.communicate(timeout=240)
    assert running.returncode == 0, printed
    assert 'resuming at epoch 1, step 1' in printed
    assert differences(whole(2), tmp_path / 'run') == set()


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_row_13_a_launcher_is_asked_to_end(start, whole, image_folder, tmp_path, number):
    folder = tmp_path / 'run'
    running = torchrun(*WHOLE, '--data-path', image_folder, '--num_workers', 2, '--output_dir', folder)
    printed = ''
    while '[1/2]' not in printed:
        printed += (line := running.stdout.readline())
        assert line, printed
    running.send_signal(number)
    printed += running.communicate(timeout=120)[0]
    assert running.returncode != 0 and 'asked to stop: stopped in epoch' in printed, printed
    check_resume(start, folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_row_13_a_process_group_is_asked_to_end(start, whole, tmp_path, number, code):
    folder = tmp_path / 'run'
    run = start(*WHOLE, '--num_workers', 2, '--output_dir', folder, ranks=2)
    run.wait_for('[1/2]')
    run.send(number)
    if number == signal.SIGTERM:  # launchers send it twice
        time.sleep(0.02)
        run.send(number)
    assert run.end() == [code, code], run.printed
    assert run.printed.count('asked to stop: stopped') == 1 and 'Traceback' not in run.printed
    assert run.printed.count('stopping after the next step') == (number == signal.SIGINT)
    check_resume(start, folder, whole)


@pytest.mark.slow
def test_row_13_a_second_ctrl_c_ends_at_once(start):
    run = start(*NANO, fault='stall:0:0:1')
    run.wait_for('[1/4]')
    run.send(signal.SIGINT)
    run.wait_for('Ctrl-C again stops at once')
    assert run.processes[0].is_alive()
    run.send(signal.SIGINT)
    assert run.end(5) == [-signal.SIGINT] and 'Traceback' not in run.printed


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2])
def test_row_13_ctrl_c_ends_an_evaluation_with_a_line(start, tmp_path, ranks):
    path = tmp_path / 'weights.pth'
    torch.save(timm.create_model('evo_deit_nano_patch4_32', num_classes=10).state_dict(), path)
    run = start(*NANO, '--eval', '--resume', path, '--data-set', 'SHAPES', ranks=ranks)
    run.wait_for('weights loaded')
    run.send(signal.SIGINT)
    assert run.end() == [130] * ranks, run.printed
    assert run.printed.endswith('main_deit.py: interrupted\n') and 'Traceback' not in run.printed


def check_resume(start, folder: Path, whole):
    """A run of two processes that was asked to stop goes on as if it had not been."""
    found = weights.read_checkpoint(folder / 'checkpoint.pth')
    assert (found['epoch'] + 1, found['step']) < (2, 0), 'it came to its end'
    run = start(*WHOLE, '--num_workers', 2, '--output_dir', folder, '--auto-resume', ranks=2)
    assert run.end() == [0, 0], run.printed
    assert f'resuming at epoch {found["epoch"] + 1}, step {found["step"]}' in run.printed
    assert differences(whole(2, 2), folder) == set()


def test_row_13_workers_outlive_the_signal(image_folder):
    args = arguments('--data-path', image_folder, '--input-size', 32, '--batch-size', 4, '--num_workers', 1)
    # Without the protection the signal ends the worker, and PyTorch raises a RuntimeError for it.
    batches = iter(datasets.build_loaders(args, datasets.data_config(args, args.model))[1])
    next(batches)
    for worker in batches._workers:
        subprocess.run(['kill', str(worker.pid)], check=True)  # as from another process
        os.kill(worker.pid, signal.SIGINT)  # as from a terminal
    assert len(list(batches)) == 7
    for worker in batches._workers:
        worker.terminate()  # as the interpreter does when it ends
        worker.join(10)
        assert worker.exitcode == 0


@pytest.mark.slow
def test_row_14_a_rank_that_is_stuck(start, tmp_path):
    run = start(*NANO, '--dist-timeout', 6, ranks=2, fault='stall:1:0:1')
    run.wait_for('[1/2]')
    began = time.monotonic()
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 1 and run.processes[1].is_alive()
    assert 4 < time.monotonic() - began < 30
    assert 'did not respond within --dist-timeout seconds' in run.printed


@pytest.mark.slow
def test_row_15_an_exception_on_one_rank(image_folder):
    running = torchrun(*NANO, '--data-path', image_folder, fault='exception:1:0:1')
    printed, began = '', None
    for line in running.stdout:
        printed += line
        if began is None and 'injected fault' in line:
            began = time.monotonic()
    assert running.wait(60) != 0 and time.monotonic() - began < 10
    summary = printed.split('Root Cause')[1]
    assert 'rank      : 1' in summary and 'RuntimeError: injected fault' in summary and 'inject_fault' in summary


# --- several processes


def run_in_group(work, rank: int, ranks: int, port: int, out: Path):
    """Save what `work(rank, ranks)` returns in a process group."""
    store = dist.TCPStore('127.0.0.1', port, ranks, rank == 0)
    dist.init_process_group('gloo', store=store, rank=rank, world_size=ranks)
    torch.save(work(rank, ranks), out / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture
def in_group(forks, tmp_path):
    """What a function returns in each of some processes."""

    def run(work, ranks: int) -> list:
        port = free_port()
        processes = [forks.Process(target=run_in_group, args=(work, r, ranks, port, tmp_path)) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        return [torch.load(tmp_path / f'{rank}.pth') for rank in range(ranks)]

    return run


SGD = '--opt', 'sgd', '--lr', 1, '--warmup-epochs', 0, '--no-model-ema'


def accumulate(rank: int, ranks: int) -> tuple[list[int], torch.Tensor]:
    """A training step of two batches: how often gradients were exchanged, and what became of the weights."""
    data, model = images_and_model(4 * ranks)
    state = optim.build_state(arguments(*SGD), model, 'fp32', 128)
    net, exchanges = torch.nn.parallel.DistributedDataParallel(model), []

    def count(_, bucket):
        exchanges.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    net.register_comm_hook(None, count)
    images, labels = (tensor[4 * rank : 4 * rank + 4] for tensor in data.tensors)
    batches = zip(images.split(2), labels.split(2), strict=True)
    engine.train_step(state, net, losses.Criterion(), batches, 2, engine.make_autocast('fp32', torch.device('cpu')))
    return exchanges, model[1].weight.data


@pytest.mark.slow
def test_accumulated_gradients_are_exchanged_once(in_group):
    (one, weight), (two, other) = in_group(accumulate, 2)
    assert one == two == [48 * 7] and torch.equal(weight, other)
    # All images in one batch of one process.
    data, model = images_and_model(8)
    state = optim.build_state(arguments(*SGD), model, 'fp32', 256)
    autocast = engine.make_autocast('fp32', torch.device('cpu'))
    engine.train_step(state, model, losses.Criterion(), [data.tensors], 1, autocast)
    torch.testing.assert_close(model[1].weight.data, weight)


# --- evaluation


def images_and_model(size: int, seed: int = 0) -> tuple[TensorDataset, torch.nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 4, 4, generator=generator)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 7, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(7, 48, generator=generator))
    return TensorDataset(images, torch.arange(size) % 7), model


def evaluate_shard(size: int, batch: int, rank: int, ranks: int) -> dict[str, float]:
    data, model = images_and_model(size)
    loader = DataLoader(data, batch, sampler=engine.datasets.eval_shard(size, rank, ranks))
    return engine.evaluate(model, loader, engine.make_autocast('fp32', torch.device('cpu')))


CASES = [(size, batch) for size in (3, *range(12, 18)) for batch in range(1, 7)]


def evaluate_cases(rank: int, ranks: int) -> list[dict]:
    return [evaluate_shard(*case, rank, ranks) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [2, 5])
def test_row_16_evaluation_over_processes(in_group, ranks):
    single = evaluate_cases(0, 1)
    for results in in_group(evaluate_cases, ranks):
        for case, one, many in zip(CASES, single, results, strict=True):
            assert (many['acc1'], many['acc5']) == (one['acc1'], one['acc5']), case
            assert many['loss'] == pytest.approx(one['loss'], rel=1e-6), case


@pytest.mark.parametrize('ranks', range(1, 9))
def test_row_16_up_to_eight_ranks(monkeypatch, ranks):
    for case in CASES:
        one, parts = evaluate_shard(*case, 0, 1), []
        with monkeypatch.context() as patch:
            patch.setattr(utils, 'all_sum', lambda values, parts=parts: (parts.append(values), sum(parts))[1])
            many = [evaluate_shard(*case, rank, ranks) for rank in range(ranks)][-1]
        assert many == pytest.approx(one, rel=1e-6) and many['acc1'] == one['acc1'], case


def test_row_17_batch_size_of_evaluation():
    results = [evaluate_shard(30, batch, 0, 1) for batch in (1, 4, 7, 30)]
    assert len({(r['acc1'], r['acc5']) for r in results}) == 1
    assert [r['loss'] for r in results] == pytest.approx([results[0]['loss']] * 4, rel=1e-6)


@pytest.mark.slow
def test_row_18_evaluation_in_a_new_process(start, whole):
    log = read_log(whole(2))
    runs = [
        start(*NANO, '--precision', 'fp16', '--eval', '--resume', whole(2) / name)
        for name in ('checkpoint-0001-000000.pth', 'checkpoint.pth')
    ]
    for run, line, schedule in zip(runs, log, ('layer-wise', 'stage-wise'), strict=True):
        assert run.end() == [0], run.printed
        assert (', layer-wise, ' in run.printed) == (schedule == 'layer-wise') and line['selection'] == schedule
        assert accuracy(run.printed) == f'{line["test_acc1"]:.3f}'


# --- input that is wrong or hostile


@pytest.mark.parametrize('interpolation', ['bicubic', 'random'])
def test_row_01_the_default_augmentation_never_raises(interpolation):
    args = arguments('--input-size', 32, '--train-interpolation', interpolation)
    transform = datasets.build_transform(datasets.data_config(args, args.model), datasets.augmentation(args))
    image, _ = shapes.Shapes('train', 32)[0]
    utils.seed_all(0)
    for _ in range(10_000):
        assert transform(image).shape == (3, 32, 32)


PATH_FLAGS = [
    ('main_deit', ['--resume']),
    ('main_deit', ['--eval', '--resume']),
    ('main_deit', ['--finetune']),
    ('main_levit', ['--teacher-path']),
    ('visualize', ['--resume']),
]


@pytest.mark.slow
@pytest.mark.parametrize('script, flags', [*PATH_FLAGS, ('main_levit', ['--distillation-type', 'none', '--resume'])])
def test_row_02_wrong_paths(start, tmp_path, script, flags):
    wrong = tmp_path / 'no' / 'such.pth'
    # There is no data either, but that is not what the message is about.
    run = start(*flags, wrong, '--data-path', tmp_path, '--output_dir', tmp_path / 'out', script=script)
    assert run.end() == [2]
    assert f'{flags[-1]} {wrong}: {wrong} is not a file' in run.printed
    assert 'Acc@1' not in run.printed and 'Traceback' not in run.printed


class Malicious:
    def __init__(self, proof: Path):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


WRITERS = {
    'zip': torch.save,
    'legacy': partial(torch.save, _use_new_zipfile_serialization=False),
    'raw': lambda content, path: path.write_bytes(pickle.dumps(content, 2)),
}


@pytest.mark.parametrize('kind', WRITERS)
@pytest.mark.parametrize('place', ['whole', 'args', 'namespace', 'weights'])
def test_row_10_code_in_a_checkpoint_never_runs(tmp_path, kind, place):
    bad, path, proof = Malicious(tmp_path / 'ran'), tmp_path / 'bad.pth', tmp_path / 'ran'
    good = {'w': torch.ones(1)} if kind != 'raw' else {}
    content = {
        'whole': bad,
        'args': {'model': good, 'args': bad},
        'namespace': {'model': good, 'args': argparse.Namespace(x=[bad])},
        'weights': {'model': good | {'v': bad}},
    }[place]
    WRITERS[kind](content, path)
    with pytest.raises(InputError, match=str(path)) as error:
        weights.read_checkpoint(path)
    assert not proof.exists() and 'weights_only' not in str(error.value)
    if kind != 'raw':
        torch.load(path, weights_only=False)
        assert proof.exists(), 'the file is not dangerous: this test shows nothing'


@pytest.mark.parametrize('kind', WRITERS)
@pytest.mark.parametrize('name, flags', PATH_FLAGS)
def test_row_10_by_every_flag(script, image_folder, tmp_path, kind, name, flags):
    path, proof = tmp_path / 'bad.pth', tmp_path / 'ran'
    WRITERS[kind]({'model': {}, 'args': Malicious(proof)}, path)
    small = [*NANO, '--data-path', image_folder]
    if name == 'main_levit':
        small += ['--model', 'EvoLeViT_128S', '--input-size', 64, '--teacher-model', 'regnety_002']
    if name == 'visualize':
        small = [*NANO[:6], '--data-path', image_folder, '--output_dir', tmp_path / 'out']
    with pytest.raises(InputError, match=r'bad\.pth'):
        script(name, *small, *flags, path)
    assert not proof.exists()


@pytest.mark.parametrize('size', [(3000, 1), (12, 1300), (9000, 8000)])
def test_row_21_huge_images_are_refused_undecoded(tmp_path, size, monkeypatch):
    path = tmp_path / 'a.png'
    Image.new('1', size).save(path)
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda *args: pytest.fail('it was decoded'))
    with pytest.raises(InputError, match=f'{path}.*{size[0]} x {size[1]}'):
        datasets.load_image(path)


@pytest.mark.parametrize('workers', [0, 2])
def test_row_20_broken_training_images_are_tolerated_on_request(image_folder, tmp_path, script, capfd, workers):
    root = tmp_path / 'images'
    shutil.copytree(image_folder, root)
    broken = sorted((root / 'train' / 'class1').iterdir())[:2]
    broken[0].write_bytes(b'')
    broken[1].write_bytes(broken[1].read_bytes()[:-60])
    flags = [*NANO, '--epochs', 1, '--data-path', root, '--no-repeated-aug', '--num_workers', workers]
    with pytest.raises(InputError, match=f'{root}/train/class1/.*(\n.*)*--max-broken-images allows 0'):
        script('main_deit', *flags)
    with pytest.raises(InputError, match='2 broken training images, --max-broken-images allows 1'):
        script('main_deit', *flags, '--max-broken-images', 1)
    capfd.readouterr()
    printed = script('main_deit', *flags, '--max-broken-images', 2, '--output_dir', tmp_path / 'out')
    assert all(printed.count(str(path)) == 1 for path in broken) and '(2 so far)' in printed
    assert read_log(tmp_path / 'out')[0]['train_broken_images'] == 2
    # The same is not tolerated in evaluation.
    (root / 'val' / 'class0' / '0.png').write_bytes(b'')
    with pytest.raises(InputError, match=f'{root}/val/class0/0.png'):
        script('main_deit', *flags, '--max-broken-images', 2)


def test_row_22_exif_turns_pictures_and_not_evaluation(tmp_path):
    visualize = pytest.importorskip('visualize')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('L', (40, 30)).save(tmp_path / 'turned.jpg', exif=exif)
    upright, read = visualize.load_upright(tmp_path / 'turned.jpg'), datasets.load_image(tmp_path / 'turned.jpg')
    assert (upright.size, read.size) == ((30, 40), (40, 30)) and upright.mode == read.mode == 'RGB'


def test_row_24_one_line_says_what_a_file_is(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as archive:
        archive.writestr('a.txt', 'a')
    with pytest.raises(InputError, match='a zip file') as error:
        weights.read_checkpoint(tmp_path / 'x.pth')
    assert '\n' not in str(error.value) and 'weights_only' not in str(error.value)


# --- what is kept, and going on from it


@pytest.mark.slow
def test_row_27_a_full_disk(start, whole, tmp_path):
    folder = continued(whole(2), tmp_path / 'run', 'checkpoint-0001-000001.pth', 'log.txt')
    newest = folder / 'checkpoint-0001-000001.pth'
    newest.rename(folder / 'checkpoint.pth')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    # The system refuses to let a file grow beyond a limit, as it does on a full disk.
    run = start(*WHOLE, '--auto-resume', '--output_dir', folder, ranks=2, file_limit=1_000_000)
    codes = run.end(60)
    assert codes[0] == 2, run.printed
    assert 'checkpoint.pth could not be written; the old file' in run.printed
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    # The log, a small file, comes before the checkpoint; going on from there replaces its last line again.
    assert after.pop('log.txt') and after == {name: content for name, content in before.items() if name != 'log.txt'}
    assert [line['epoch'] for line in read_log(folder)] == [0, 1]


def build_state(args: argparse.Namespace) -> engine.State:
    """A new run's state, of a small model without an EMA."""
    args.model_ema = False
    return optim.build_state(args, torch.nn.Linear(3, 2), args.precision or 'fp32', batch_size=512)


def resume(args: argparse.Namespace, content: dict, source: str = 'c.pth') -> engine.State:
    """A new run's state after it took over a checkpoint."""
    state = build_state(args)
    changed = checkpoint.compare_flags(content, source, state.flags, engine.MAY_CHANGE, args.accept_changes)
    state.load(content, source, changed)
    return state


def trained(*flags, steps: int = 2) -> dict:
    """A checkpoint in the middle of epoch 3."""
    state = build_state(arguments(*flags))
    for _ in range(2):
        state.model(torch.ones(1, 3)).sum().backward()
        state.optimizer.step()
    state.epoch, state.step, state.loss_sum = 3, steps, 1.5
    return state.state_dict()


@pytest.mark.parametrize(
    'name, value',
    [
        ('lr', 0.1), ('epochs', 7), ('sched', 'step'), ('batch_size', 8), ('opt', 'sgd'), ('seed', 5),
        ('weight_decay', 0.1), ('drop_path', 0.3), ('mixup', 0.0), ('model', 'EvoLeViT_128S'), ('warmup_epochs', 0),
    ],
)  # fmt: skip
def test_row_28_changed_flags(name, value, capsys):
    content, flag = trained(), '--' + name.replace('_', '-')
    with pytest.raises(InputError, match=rf'then +now\n +{name} +\S+ +{value}\n.*--accept-changes') as error:
        resume(arguments(flag, value), content)
    assert len(str(error.value).splitlines()) == 4
    state = resume(arguments(flag, value, '--accept-changes'), content)
    assert f'{value}' in capsys.readouterr().out
    other_images = name in ('batch_size', 'seed')
    assert (state.epoch, state.step) == (3, 0 if other_images else 2)
    assert bool(state.optimizer.state_dict()['state']) == (name != 'opt')


def test_row_28_rates_and_schedules_are_those_of_now():
    content = trained('--sched', 'cosine', '--epochs', 300, '--warmup-epochs', 0)
    for flags in (['--lr', 0.2], ['--epochs', 10], ['--sched', 'step', '--decay-epochs', 1]):
        args = arguments('--sched', 'cosine', '--epochs', 300, '--warmup-epochs', 0, *flags, '--accept-changes')
        fresh = build_state(args)
        fresh.scheduler.step(2)
        assert resume(args, content).optimizer.param_groups[0]['lr'] == fresh.optimizer.param_groups[0]['lr']


def test_row_28_moments_lie_in_memory_as_their_parameters():
    def begin(memory_format) -> engine.State:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Flatten())
        channels_last = ['--channels-last'] * (memory_format == torch.channels_last)
        return optim.build_state(arguments('--lr', 1, *channels_last), model, 'fp32', batch_size=64)

    def step(state):
        state.model(torch.arange(27.0).view(1, 3, 3, 3)).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    one, two = begin(torch.contiguous_format), begin(torch.channels_last)
    step(one)
    two.load(copy.deepcopy(one.state_dict()), 'c.pth')
    for parameter, moments in two.optimizer.state.items():
        assert moments['exp_avg'].stride() == parameter.stride()
    step(one)
    step(two)
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[key], value)


@pytest.mark.slow
def test_row_29_another_number_of_processes(whole, script, image_folder, tmp_path):
    folder = continued(whole(2), tmp_path / 'run', 'checkpoint-0001-000001.pth', 'log.txt')
    flags = [*WHOLE, '--data-path', image_folder, '--output_dir', folder]
    printed = script('main_deit', *flags, '--resume', folder / 'checkpoint-0001-000001.pth')
    assert 'world_size was 2, now 1: the run continues, but not bit for bit' in printed
    assert 'the epoch restarts' in printed and 'Epoch 1 done' in printed
    assert re.search(r'Epoch: \[1/2\]  \[(\d+)/', printed)[1] == '1'
    assert [line['epoch'] for line in read_log(folder)] == [0, 1]


@pytest.mark.slow
def test_row_29_processes_that_find_different_checkpoints(forks, whole, image_folder, tmp_path):
    continued(whole(2), tmp_path / 'first', 'checkpoint.pth')
    port, runs = str(free_port()), []
    for rank, folder in enumerate(('first', 'second')):
        env = {'RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        flags = [*WHOLE, '--data-path', image_folder, '--output_dir', tmp_path / folder, '--auto-resume']
        runs.append(forks.Process(target=run_rank, args=('main_deit', flags, env, tmp_path / f'out{rank}', None)))
        runs[-1].start()
    for rank, run in enumerate(runs):
        run.join(60)
        assert run.exitcode == 2
        assert 'start at different places, (epoch, step): (2, 0), (0, 0)' in (tmp_path / f'out{rank}').read_text()


def test_row_30_other_precisions_and_devices(capsys):
    with_scale, without = trained('--precision', 'fp16'), trained('--precision', 'fp32')
    without['args']['device'] = 'cuda'
    assert with_scale['scaler'] and not without['scaler']
    for content, now in ((with_scale, 'bf16'), (without, 'fp16')):
        state = resume(arguments('--precision', now), content)
        printed = capsys.readouterr().out
        assert 'its loss scale is ignored' in printed and f'precision was {content["args"]["precision"]}' in printed
        assert state.epoch == 3 and state.scaler.is_enabled() == (now == 'fp16')
    assert 'device was cuda, now cpu: the run continues, but not bit for bit' in printed
    scaler = resume(arguments('--precision', 'fp16'), with_scale | {'scaler': with_scale['scaler'] | {'scale': 8.0}})
    assert scaler.scaler.get_scale() == 8


@pytest.mark.parametrize('saved', [None, {}, argparse.Namespace(seed=0), 'text'])
def test_row_31_a_checkpoint_that_does_not_say_its_seed(saved, capsys):
    resume(arguments(), trained() | {'args': saved})
    assert 'data order and augmentation may differ' in capsys.readouterr().out


@pytest.mark.slow
def test_row_32_workers_change_nothing(whole):
    assert differences(whole(1, 0), whole(1, 2)) == set()


def test_row_33_no_images_to_validate(image_folder, script, tmp_path):
    (tmp_path / 'train').symlink_to(image_folder / 'train')
    (tmp_path / 'val' / 'class0').mkdir(parents=True)
    with pytest.raises(InputError, match=f'{tmp_path}/val: no images in class0'):
        script('main_deit', *NANO, '--data-path', tmp_path)
    with pytest.raises(InputError, match='64 training images give each of 1 processes 64.*batch of 65'):
        script('main_deit', *NANO, '--data-path', image_folder, '--batch-size', 65)
    with pytest.raises(InputError, match='--batch-size 15 is odd'):
        script('main_deit', *NANO, '--data-path', image_folder, '--batch-size', 15)


@pytest.mark.parametrize('label', [3, -1])
def test_row_34_labels_beyond_the_classes(label):
    with pytest.raises(InputError, match=f'b.jpg has label {label}, but there are 3 classes'):
        datasets.ImageFiles([('a.jpg', 2), ('b.jpg', label)], ['x', 'y', 'z'], None)


def test_row_35_an_output_folder_that_is_not_free(script, image_folder, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(networks, 'build', lambda *args: pytest.fail('the model was built'))
    flags = [*NANO, '--data-path', image_folder, '--output_dir']
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match=f'--output_dir {tmp_path}/file/a cannot be written to'):
        script('main_deit', *flags, tmp_path / 'file' / 'a')
    folder = continued(whole(), tmp_path / 'run', 'checkpoint.pth', 'checkpoint-0001-000000.pth', 'log.txt')
    before = sorted(folder.iterdir())
    with pytest.raises(InputError, match='holds a run .*--resume or --auto-resume continues it, --overwrite'):
        script('main_deit', *flags, folder)
    assert sorted(folder.iterdir()) == before
    # A checkpoint from elsewhere would start another run here.
    shutil.copy(folder / 'checkpoint.pth', tmp_path / 'other.pth')
    with pytest.raises(InputError, match='holds a run'):
        script('main_deit', *flags, folder, '--resume', tmp_path / 'other.pth')
    assert sorted(folder.iterdir()) == before
    output.prepare_output_dir(arguments('--output_dir', folder, '--resume', folder / 'checkpoint.pth'))
    with pytest.raises(InputError, match='belongs to the run that --overwrite removes'):
        (tmp_path / 'link.pth').hardlink_to(folder / 'checkpoint.pth')
        script('main_deit', *flags, folder, '--overwrite', '--resume', tmp_path / 'link.pth')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    with pytest.raises(InputError, match='holds a run'):
        output.prepare_output_dir(arguments('--overwrite', '--output_dir', folder))
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    # What is wrong otherwise is found before anything is removed; what the new run starts from is not removed.
    with pytest.raises(InputError, match='nowhere'):
        script('main_deit', *NANO, '--data-path', tmp_path / 'nowhere', '--overwrite', '--output_dir', folder)
    with pytest.raises(InputError, match='belongs to the run that --overwrite removes'):
        script('main_deit', *flags, folder, '--overwrite', '--finetune', folder / 'checkpoint.pth')
    for flag in ('--auto-resume', '--overwrite'):
        found = output.prepare_output_dir(arguments(flag, '--output_dir', folder))
        assert sorted(folder.iterdir()) == before
        found.clear()
        assert sorted(folder.iterdir()) == (before if flag == '--auto-resume' else [])
    with pytest.raises(InputError, match='--auto-resume looks for checkpoints in --output_dir'):
        script('main_deit', *NANO, '--auto-resume')


@pytest.mark.slow
@pytest.mark.parametrize('script', ['main_deit', 'main_levit'])
def test_row_36_a_wrong_data_path(start, tmp_path, script):
    (tmp_path / 'data' / 'training').mkdir(parents=True)
    run = start('--distillation-type', 'none', '--data-path', tmp_path / 'data', script=script)
    assert run.end() == [2]
    assert f'{tmp_path}/data/train does not exist' in run.printed and 'holds training' in run.printed


@pytest.mark.parametrize('name', ['hf-hub:timm/vit', 'local-dir:/tmp/x', '../evo_deit', 'evo_deit_tiny_patch16', ''])
def test_row_37_unknown_models(name, monkeypatch):
    monkeypatch.setattr('socket.socket.connect', lambda *args: pytest.fail('the network was asked'))
    monkeypatch.setattr('builtins.open', lambda *args, **kwargs: pytest.fail('a file was read'))
    with pytest.raises(InputError, match=r'there is no model .*(Nearest|timm.list_models)'):
        networks.build(arguments('--model', name), 10)


@pytest.mark.parametrize('name', ['../x', '..', 'a/b', '/x', 'a\\b'])
def test_row_38_names_that_lead_elsewhere(name, tmp_path):
    visualize = pytest.importorskip('visualize')
    flags = ['--resume', 'x', '--img-path', 'x', '--output_dir', str(tmp_path / 'out'), '--save-name', name]
    with pytest.raises(InputError, match='--save-name'):
        visualize.check_arguments(visualize.get_parser().parse_args(flags))
    assert not list(tmp_path.iterdir())


def test_row_40_the_log_after_a_crash(tmp_path):
    path, log = tmp_path / 'log.txt', output.Log(tmp_path)
    for epoch in range(3):
        log.write({'epoch': epoch, 'loss': float('nan'), 'run': 1})
    path.write_text(path.read_text() + 'no json\n[1]\n{"epoch": 3, "lo')
    for epoch in (2, 3):
        log.write({'epoch': epoch, 'loss': float('inf'), 'run': 2})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [(line['epoch'], line['run'], line['loss']) for line in lines] == [
        (0, 1, None), (1, 1, None), (2, 2, None), (3, 2, None),
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ['log.txt']


def test_row_26_and_row_40_killed_between_the_files_of_an_epoch(tmp_path, monkeypatch):
    """The newest checkpoint comes last: until it is there, a run does the epoch again, and with it the other files."""
    state, folder = build_state(arguments()), output.RunFolder(tmp_path, log=output.Log(tmp_path))
    state.epoch = 1
    engine.finish_epoch(state, folder, {'epoch': 0, 'test_acc1': 40.0})
    real = utils.atomic_write

    def killed(path, write):
        if path.name == 'checkpoint.pth':
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(utils, 'atomic_write', killed)
    state.epoch = 2
    with pytest.raises(KeyboardInterrupt):
        engine.finish_epoch(state, folder, {'epoch': 1, 'test_acc1': 60.0})
    assert weights.read_checkpoint(tmp_path / 'best_checkpoint.pth')['best_acc1'] == 60
    assert weights.read_checkpoint(tmp_path / 'checkpoint.pth')['best_acc1'] == 40
    assert [line['epoch'] for line in read_log(tmp_path)] == [0, 1]


def test_row_41_the_last_are_kept_and_the_best(tmp_path, monkeypatch, capsys):
    state, folder = build_state(arguments()), output.RunFolder(tmp_path, keep=2)

    def save(epoch: int, best: bool = False) -> list[str]:
        state.epoch = epoch
        folder.save(state, best)
        assert weights.read_checkpoint(tmp_path / 'checkpoint.pth')['epoch'] == epoch - 1
        return sorted(int(p.name[11:15]) for p in tmp_path.glob('checkpoint-*.pth'))

    def refuse(*args):
        raise OSError('links are not allowed')

    assert [save(1), save(2, best=True), save(3), save(4)] == [[1], [1, 2], [2, 3], [3, 4]]
    assert weights.read_checkpoint(tmp_path / 'best_checkpoint.pth')['epoch'] == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, 'link', refuse)
        assert save(5) == [3, 4]
    printed = capsys.readouterr().out
    assert 'warning: older checkpoints' in printed and 'links are not allowed' in printed
    assert save(6) == [4, 6]
    # Going back to an earlier one leaves the later ones behind.
    assert save(3) == [3]


def test_row_43_no_launcher_in_a_slurm_allocation(script, image_folder, monkeypatch, whole):
    for name, value in {'SLURM_PROCID': 3, 'SLURM_NTASKS': 8, 'SLURM_LOCALID': 3, 'SLURM_JOB_ID': 1}.items():
        monkeypatch.setenv(name, str(value))
    printed = script('main_deit', *NANO, '--data-path', image_folder, '--eval', '--resume', whole() / 'checkpoint.pth')
    assert ', 1 process(es)' in printed and '(30 images)' in printed


def test_row_44_no_average_in_the_file(capsys):
    content, state = trained(), build_state(arguments())
    state.ema = ModelEmaV3(state.model)
    state.load(content, 'c.pth')
    assert 'c.pth has no averaged weights; the EMA starts from its weights' in capsys.readouterr().out
    for average, weight in zip(state.ema.module.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(average, weight) and torch.equal(
            weight, content['model'][{2: 'weight', 1: 'bias'}[weight.ndim]]
        )


@torch.no_grad()
def test_row_45_models_and_threads_do_not_disturb_each_other():
    torch.manual_seed(0)
    cases = []
    for name, size in (('evo_deit_nano_patch4_32', 32), ('EvoLeViT_128S', 64)):
        model = timm.create_model(name, num_classes=4, img_size=size).eval()
        model.set_schedule(stage_wise=size == 32)
        cases.append((model, torch.randn(2, 3, size, size)))
    alone = [model(images) for model, images in cases]
    features = [model.forward_features(images) for model, images in cases]
    again = [model.forward_head(feature) for (model, _), feature in zip(cases, features, strict=True)]
    assert all(map(torch.equal, alone, again))
    for (model, images), expected in zip(cases, alone, strict=True):
        found = {}

        def call(part, model=model, images=images, found=found):
            for _ in range(4):
                with torch.no_grad():
                    found[part] = model(images.flip(0) if part else images)

        threads = [threading.Thread(target=call, args=(part,)) for part in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(found[0], expected)
        torch.testing.assert_close(found[1], expected.flip(0))
