"""What several test files need: a small folder of images, and a script run in this process."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shapes import Shapes

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # small models; threads that wait for each other on busy cores cost more


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """train/ with 64 and val/ with 30 images of 32 px in 4 classes."""
    root = tmp_path_factory.mktemp('images')
    for split, count in (('train', 64), ('val', 30)):
        shapes = Shapes(split, 32)
        for i in range(count):
            image, _ = shapes[i]
            folder = root / split / f'class{i % 4}'
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f'{i}.png')
    return root


@pytest.fixture
def script(monkeypatch, capfd):
    """Run a script's main with flags; returns what it printed."""

    def run(name: str, *flags) -> str:
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, flags)])
        importlib.import_module(name).main()
        return capfd.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training handles both, from its start on
    signal.signal(signal.SIGINT, signal.default_int_handler)


def read_log(folder) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def accuracy(printed: str) -> str:
    """The last top-1 that was printed."""
    return re.findall(r'\* Acc@1 (\S+)', printed)[-1]


def launch(*command) -> subprocess.Popen:
    """Start `python -m` with a launcher's command in the project's folder."""
    kept = {key: value for key, value in os.environ.items() if key not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-m', *map(str, command)], cwd=ROOT, env=kept | {'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
