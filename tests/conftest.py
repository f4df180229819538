"""What several test files need: a small folder of images, and a script run in this process."""

import importlib
import json
import sys

import pytest
import torch

from datasets import Shapes

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

    return run


def read_log(folder) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
