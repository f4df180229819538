"""Data sets by timm's names: torchvision's and Hugging Face's train, resume and evaluate like folders."""

import base64
import gzip
import importlib
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, accuracy, read_log
from PIL import Image
from test_datasets import flags, make_dataset

import datasets
from utils import InputError

NANO = ['--model', 'evo_deit_nano_patch4_32', '--input-size', 32, '--batch-size', 8, '--device', 'cpu']
NANO += ['--warmup-epochs', 0, '--print-freq', 100, '--num_workers', 0, '--no-model-ema']


def write_mnist(root: Path, count: int = 20) -> Path:
    """Files as torchvision has them of MNIST; the label of image i is i modulo 10."""
    raw = root / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for split in ('train', 't10k'):
        for kind, array in (('images-idx3', pixels), ('labels-idx1', np.arange(count, dtype=np.uint8) % 10)):
            header = struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape)
            (raw / f'{split}-{kind}-ubyte').write_bytes(header + array.tobytes())
            (raw / f'{split}-{kind}-ubyte.gz').write_bytes(gzip.compress(b''))
    return root


def test_torchvisions_are_read_by_index(tmp_path):
    args = flags('--data-set', 'torch/mnist', '--data-path', write_mnist(tmp_path), '--input-size', 32)
    dataset = make_dataset(False, args)
    image, label = dataset[13]
    assert len(dataset) == 20 and label == 3 and image.shape == (3, 32, 32)
    assert len(dataset.classes) == 10 and dataset.classes[3] == '3 - three'


@pytest.mark.parametrize(
    'name, message',
    [
        ('torch/mnist', 'torch/mnist, validation split, --data-path .*: Dataset not found'),
        ('torch/nonsense', 'Unknown torchvision dataset nonsense'),
    ],
)
def test_what_timm_cannot_make_is_named(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make_dataset(False, flags('--data-set', name, '--data-path', tmp_path))


@pytest.mark.parametrize('name', ['wds/', 'tfds/mnist', 'nonsense', 'torch'])
def test_other_names_are_refused_at_the_start(name, capsys):
    with pytest.raises(SystemExit):
        flags('--data-set', name)
    assert f'INAT19, SHAPES, torch/NAME, hfds/NAME; found {name}' in capsys.readouterr().err


def test_an_image_folder_of_torchvision_gives_what_ours_gives(image_folder, tmp_path, script):
    """Training, resuming and evaluation, bit for bit: both are read by index."""
    runs = []
    for name in ('IMNET', 'torch/image_folder'):
        common = [*NANO, '--data-path', image_folder, '--data-set', name, '--no-fast-decode']
        out = tmp_path / name.replace('/', '_')
        script('main_deit', *common, '--epochs', 2, '--output_dir', out / 'whole', '--save-interval-steps', 3)
        script('main_deit', *common, '--epochs', 2, '--output_dir', out / 'on', '--resume',
               sorted((out / 'whole').glob('checkpoint-0001*'))[0])  # fmt: skip
        printed = script('main_deit', *common, '--eval', '--resume', out / 'on' / 'checkpoint.pth')
        assert accuracy(printed) == f'{read_log(out / "on")[-1]["test_acc1"]:.3f}'
        runs += [torch.load(out / run / 'checkpoint.pth') for run in ('whole', 'on')]
    assert runs[0]['classes'] == runs[2]['classes']
    for run in runs[1:]:
        for key, value in runs[0]['model'].items():
            assert torch.equal(value, run['model'][key]) or '_extra' in key


def test_a_broken_image_is_named_and_not_replaced(tmp_path):
    (tmp_path / 'val' / 'ant').mkdir(parents=True)
    (tmp_path / 'val' / 'ant' / 'a.png').write_bytes(b'no image')
    args = flags('--data-set', 'torch/image_folder', '--data-path', tmp_path)
    with pytest.raises(InputError, match='torch/image_folder, image 0: .*a.png holds no image'):
        make_dataset(False, args)[0]


HUGGING_FACE = """
import base64, json, types
Image = lambda decode: None

class Table(list):
    cast_column = lambda self, *_: self

def load_dataset(name, split, cache_dir):
    rows, names = json.load(open(f'{name}/{split}.json'))
    table = Table({'image': {'bytes': base64.b64decode(image)}, 'label': label} for image, label in rows)
    table.features = {'label': types.SimpleNamespace(**({'names': names} if names else {}))}
    table.info = types.SimpleNamespace(features=table.features, splits={split: None})
    return table
"""


def test_hugging_faces_are_read_by_index(tmp_path, monkeypatch):
    """Their package has the name of our module; this stand-in for it is found, and ours stays what it is."""
    (tmp_path / 'datasets.py').write_text(HUGGING_FACE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    rows = []
    for i in range(6):
        Image.new('RGB', (32, 32), (40 * i, 0, 0)).save(file := io.BytesIO(), 'png')
        rows.append((base64.b64encode(b'torn' if i == 5 else file.getvalue()).decode(), i % 2 if i else -1))
    (tmp_path / 'validation.json').write_text(json.dumps([rows, ['ant', 'bee']]))
    (tmp_path / 'test.json').write_text(json.dumps([rows, None]))
    args = flags('--data-set', f'hfds/{tmp_path}', '--data-path', tmp_path, '--input-size', 32, '--mean', 0, '--std', 1)
    dataset = make_dataset(False, args, ['ant', 'bee'])
    assert importlib.import_module('datasets') is datasets and dataset.classes == ['ant', 'bee']
    images, labels = zip(*(dataset[i] for i in range(1, 5)), strict=True)
    assert labels == (1, 0, 1, 0)
    torch.testing.assert_close(torch.stack(images)[:, 0].mean((1, 2)), torch.arange(1, 5) * 40 / 255)
    with pytest.raises(InputError, match='image 5: .*no image'):
        dataset[5]
    with pytest.raises(InputError, match='image 0: label -1, but there are 2 classes'):
        dataset[0]
    args.val_split = 'test'
    with pytest.raises(InputError, match='does not name its classes; expected --num-classes'):
        make_dataset(False, args)
    args.num_classes = 2
    assert make_dataset(False, args).classes == ['0', '1']
