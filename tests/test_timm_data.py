"""Data sets by timm's names: torchvision's, Hugging Face's and tar shards train, resume and evaluate like folders."""

import gzip
import io
import json
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import accuracy, read_log
from PIL import Image
from test_datasets import batches, flags, make_dataset, make_loaders

import datasets
import visualize
from image_data.shapes import Shapes
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


def write_shards(root: Path, train=(9, 9, 9, 9), val=(5, 3, 4)) -> Path:
    """Shards of SHAPES at 32 px with ten classes; an image's file is named after its index."""
    root.mkdir(exist_ok=True)
    splits = {}
    for name, lengths in (('train', train), ('validation', val)):
        images, index, files = Shapes('train' if name == 'train' else 'val', 32), 0, []
        for i, length in enumerate(lengths):
            files.append(f'{name}-{i}.tar')
            with tarfile.open(root / files[-1], 'w') as tar:
                for _ in range(length):
                    image, label = images[index]
                    image.save(content := io.BytesIO(), 'png')
                    for ending, data in (('png', content.getvalue()), ('cls', str(label).encode())):
                        info = tarfile.TarInfo(f'{index:04}.{ending}')
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    index += 1
        splits[name] = dict(name=name, num_samples=index, filenames=files, shard_lengths=list(lengths))
    (root / '_info.json').write_text(json.dumps({'splits': splits}))
    return root


def test_torchvisions_are_read_by_index(tmp_path):
    args = flags('--data-set', 'torch/mnist', '--data-path', write_mnist(tmp_path), '--input-size', 32)
    dataset = make_dataset(False, args)
    image, label = dataset[13]
    assert len(dataset) == 20 and label == 3 and image.shape == (3, 32, 32)
    assert len(dataset.classes) == 10 and dataset.classes[3] == '3 - three'
    with pytest.raises(InputError, match='the checkpoint has 7 classes, the data set 10'):
        make_dataset(False, args, None, 7)
    with pytest.raises(InputError, match='other classes than training: the same names in another order'):
        make_dataset(False, args, dataset.classes[::-1], 10)


@pytest.mark.parametrize(
    'name, message',
    [
        ('torch/mnist', 'torch/mnist, validation split, --data-path .*: Dataset not found'),
        ('torch/nonsense', 'Unknown torchvision dataset nonsense'),
        ('torch/imagenet', 'torch/imagenet, validation split'),
    ],
)
def test_what_timm_cannot_make_is_named(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make_dataset(False, flags('--data-set', name, '--data-path', tmp_path))


@pytest.mark.parametrize('name', ['tfds/mnist', 'nonsense', 'torch'])
def test_other_names_are_refused_at_the_start(name, capsys):
    with pytest.raises(SystemExit):
        flags('--data-set', name)
    assert f'SHAPES, torch/, hfds/, wds/..., found {name}' in capsys.readouterr().err


def test_an_image_folder_of_torchvision_gives_what_ours_gives(image_folder, tmp_path, script):
    """Training, resuming and evaluation, bit for bit: both are read by index."""
    runs = []
    for name in ('IMNET', 'torch/image_folder'):
        common = [*NANO, '--data-path', image_folder, '--data-set', name, '--no-fast-decode']
        out = tmp_path / name.replace('/', '_')
        script('main_deit', *common, '--epochs', 2, '--output_dir', out / 'whole')
        script('main_deit', *common, '--epochs', 2, '--output_dir', out / 'resumed', '--save-interval-steps', 3)
        script('main_deit', *common, '--epochs', 2, '--output_dir', out / 'on', '--resume',
               sorted((out / 'resumed').glob('checkpoint-0001*'))[0])  # fmt: skip
        whole, on = (torch.load(out / run / 'checkpoint.pth') for run in ('whole', 'on'))
        assert all(torch.equal(value, on['model'][key]) for key, value in whole['model'].items() if '_extra' not in key)
        printed = script('main_deit', *common, '--eval', '--resume', out / 'on' / 'checkpoint.pth')
        assert accuracy(printed) == f'{read_log(out / "on")[-1]["test_acc1"]:.3f}'
        runs.append((whole, accuracy(printed)))
    assert runs[0][1] == runs[1][1] and runs[0][0]['classes'] == runs[1][0]['classes']
    assert all(
        torch.equal(value, runs[1][0]['model'][key])
        for key, value in runs[0][0]['model'].items()
        if '_extra' not in key
    )


def test_a_broken_image_is_named_and_not_replaced(image_folder, tmp_path):
    for split in ('train', 'val'):
        (tmp_path / split / 'ant').mkdir(parents=True)
        (tmp_path / split / 'ant' / 'a.png').write_bytes(b'no image')
    args = flags('--data-set', 'torch/image_folder', '--data-path', tmp_path)
    with pytest.raises(InputError, match='torch/image_folder, image 0: .*a.png holds no image'):
        make_dataset(False, args)[0]


def test_hugging_faces_are_read_by_index(tmp_path, monkeypatch):
    """Its package is named as our module is; both stay what they are."""
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    monkeypatch.syspath_prepend(str(Path(datasets.__file__).parent))
    with datasets.timm_data._hugging_face():
        theirs = pytest.importorskip('datasets')
        content = []
        for i in range(6):
            Image.new('RGB', (32, 32), (40 * i, 0, 0)).save(file := io.BytesIO(), 'png')
            content.append({'bytes': b'torn' if i == 5 else file.getvalue(), 'path': None})
        features = theirs.Features({'image': theirs.Image(), 'label': theirs.ClassLabel(names=['ant', 'bee'])})
        for split in ('train', 'validation'):
            table = theirs.Dataset.from_dict({'image': content, 'label': [0, 1] * 3}, features=features)
            table.to_parquet(tmp_path / 'set' / 'data' / f'{split}-00000.parquet')
    import datasets as ours

    assert ours is datasets
    args = flags('--data-set', f'hfds/{tmp_path}/set', '--data-path', tmp_path / 'cache', '--input-size', 32,
                 '--mean', 0, '--std', 1, '--num_workers', 2, '--batch-size', 5)  # fmt: skip
    val = make_loaders(args, classes=['ant', 'bee'])[1]
    assert val.dataset.classes == ['ant', 'bee']
    images, labels = next(iter(val))
    assert labels.tolist() == [0, 1, 0, 1, 0]
    torch.testing.assert_close(images[:, 0].mean((1, 2)), torch.arange(5) * 40 / 255)
    with pytest.raises(InputError, match='image 5: .*no image'):
        val.dataset[5]


# --- tar shards


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip('webdataset')
    return write_shards(tmp_path / 'shards')


def stream_flags(root: Path, *more):
    return flags(
        '--data-set', 'wds/', '--data-path', root, '--num-classes', 10, '--input-size', 32, '--batch-size', 3, *more
    )


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('world_size', [1, 2, 5])
def test_processes_evaluate_each_image_of_shards_once(shards, workers, world_size):
    args, exact = stream_flags(shards, '--num_workers', workers), Shapes('val', 32)
    args.eval = True
    found = [batch for rank in range(world_size) for batch in make_loaders(args, rank, world_size)[1]]
    transform = datasets.build_transform(datasets.data_config(args, args.model))
    expected = {tuple(transform(exact[i][0]).flatten()[::97].tolist()): exact[i][1] for i in range(12)}
    images = [tuple(image.flatten()[::97].tolist()) for batch, _ in found for image in batch]
    assert sorted(images) == sorted(expected)
    assert [expected[image] for image in images] == torch.cat([labels for _, labels in found]).tolist()


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_of_a_stream_is_a_function_of_seed_and_epoch(shards, workers):
    args = stream_flags(shards, '--num_workers', workers)
    whole = make_loaders(args)[0]
    epochs = [batches(whole, epoch) for epoch in (0, 1)]
    resumed = batches(make_loaders(args)[0], 1)
    assert len(resumed) == len(whole) == 12
    for (images, labels), (images2, labels2) in zip(epochs[1], resumed, strict=True):
        assert torch.equal(images, images2) and torch.equal(labels, labels2)
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(*epochs, strict=True))
    args.seed = 1
    assert not all(
        torch.equal(a, b) for (a, _), (b, _) in zip(epochs[1], batches(make_loaders(args)[0], 1), strict=True)
    )


def test_processes_train_on_different_shards(shards):
    args = stream_flags(shards, '--aa', '', '--color-jitter', 0, '--reprob', 0)
    ranks = [batches(make_loaders(args, rank, 2)[0], 0) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [6, 6]
    with pytest.raises(InputError, match='4 shards are too few for 5 processes'):
        make_loaders(args, 0, 5)


def test_a_stream_trains_resumes_and_evaluates(shards, tmp_path, script):
    common = [*NANO, '--data-path', shards, '--data-set', 'wds/', '--mixup', 0, '--cutmix', 0]
    with pytest.raises(InputError, match='expected --num-classes'):
        script('main_deit', *common, '--epochs', 1)
    common += ['--epochs', 2]
    printed = script('main_deit', *common, '--num-classes', 10, '--output_dir', tmp_path / 'whole')
    assert re.search('wds/: a stream, .*without repeated augmentation.*same --num_workers', printed)
    assert '(12 images)' in printed
    script('main_deit', *common, '--num-classes', 10, '--output_dir', tmp_path / 'on', '--resume',
           tmp_path / 'whole' / 'checkpoint-0001-000000.pth')  # fmt: skip
    whole, on = (torch.load(tmp_path / run / 'checkpoint.pth') for run in ('whole', 'on'))
    assert all(torch.equal(value, on['model'][key]) for key, value in whole['model'].items() if '_extra' not in key)
    printed = script('main_deit', *common, '--eval', '--resume', tmp_path / 'on' / 'checkpoint.pth')
    assert accuracy(printed) == f'{read_log(tmp_path / "on")[-1]["test_acc1"]:.3f}'


def test_shards_that_are_not_there(shards, tmp_path):
    args = stream_flags(tmp_path)
    with pytest.raises(InputError, match='split train not found in info'):
        make_loaders(args)
    args.train_split = 'shards/train-{0..1}.tar'
    with pytest.raises(InputError, match='num_samples not specified'):
        make_loaders(args)


def test_pictures_need_data_that_is_read_by_index():
    args = visualize.get_parser().parse_args(['--resume', __file__, '--data-set', 'wds/', '--data-path', 'x'])
    with pytest.raises(InputError, match='wds/ is a stream'):
        visualize.check_arguments(args)


@pytest.mark.parametrize('workers', [0, 2])
def test_labels_beyond_the_classes_are_named(shards, workers):
    args = stream_flags(shards, '--num_workers', workers)
    args.num_classes = 4
    args.eval = True
    with pytest.raises(InputError, match='wds/ has label [4-9], but there are 4 classes, counted from 0'):
        list(make_loaders(args)[1])
