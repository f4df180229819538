"""Images in, batches out: what is read, what is refused, and that batches are a function of (seed, epoch, position)."""

import dataclasses
import json
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

import datasets
import utils
from datasets import Seeded, build_mixup
from image_data import files as image_files
from image_data.files import CropLoader, load_image
from image_data.shapes import Shapes
from utils import InputError


def flags(*argv, evaluate: bool = False):
    parser = utils.Parser('')
    utils.add_arguments(parser)
    datasets.add_arguments(parser)
    parser.add_argument('--model', default='evo_deit_tiny_patch16_224')
    args = parser.parse_args(['--num_workers', '0', *map(str, argv)])
    args.eval = evaluate
    return args


def config(args) -> datasets.DataConfig:
    return datasets.data_config(args, args.model)


def make_transform(train: bool, args):
    return datasets.build_transform(config(args), datasets.augmentation(args) if train else None)


def make_dataset(train: bool, args, classes=None, num_classes=None):
    return datasets.build_dataset(args, config(args), train, classes, num_classes)


def make_loaders(args, rank: int = 0, world_size: int = 1, **known):
    return datasets.build_loaders(args, config(args), rank, world_size, train=not args.eval, **known)


def small(root: Path, *argv, evaluate: bool = False):
    """Flags for batches of 4 images of 32 px in `root`."""
    return flags('--data-path', root, '--input-size', 32, '--batch-size', 4, *argv, evaluate=evaluate)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A smooth picture, which JPEG keeps."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def folder(root: Path, counts: dict[str, int]) -> Path:
    for i, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            picture(seed=100 * i + k).save(root / name / f'{k}.png')
    return root


@pytest.fixture
def image_root(tmp_path):
    """An image folder that a test may change."""
    folder(tmp_path / 'train', {'ant': 4, 'bee': 4, 'cat': 5})
    folder(tmp_path / 'val', {'ant': 2, 'bee': 2, 'cat': 3})
    return tmp_path


# --- flags


@pytest.mark.parametrize(
    'wrong, message',
    [
        ('--cutmix-minmax 2 1', 'from 0 to 1, found 2'),
        ('--cutmix-minmax 0.8 0.2', 'expected the smaller number first, found 0.8 0.2'),
        ('--mean nan', 'from 0 to 1, found nan'),
        ('--mean 0.5 0.5 123', 'from 0 to 1, found 123'),
        ('--std 0', 'from 0.001 to 1, found 0'),
        ('--crop-pct 1.5', 'from 0.01 to 1, found 1.5'),
        ('--crop-pct 0', 'from 0.01 to 1, found 0'),
        ('--input-size 0', 'expected 1 or more, found 0'),
        ('--num_workers -1', 'expected 0 or more, found -1'),
        ('--max-broken-images -1', 'expected 0 or more, found -1'),
        ('--recount 0', 'expected 1 or more, found 0'),
        ('--reprob 1.1', 'from 0 to 1, found 1.1'),
        ('--color-jitter -0.4', '0 or more, found -0.4'),
        ('--scale 1 0.5', 'expected the smaller number first, found 1 0.5'),
        ('--mixup inf', '0 or more, found inf'),
        ('--cutmix -1', '0 or more, found -1'),
        ('--mixup-prob 2', 'from 0 to 1, found 2'),
        ('--mixup-switch-prob -1', 'from 0 to 1, found -1'),
        ('--smoothing 2', 'from 0 to 1, found 2'),
        ('--aa rand-m9-foo3', "timm has no policy 'rand-m9-foo3'"),
    ],
)
def test_flags_out_of_range_are_one_line_at_the_start(wrong, message, capsys):
    with pytest.raises(SystemExit) as end:
        flags(*wrong.split())
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count('\n') == 1
    assert f'argument {wrong.split()[0]}: ' in printed and message in printed


# --- image files


def write_modes(path: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """Files in many modes, with the RGB pixels that each stands for."""
    rgb = np.asarray(picture())
    gray = rgb[..., 0]
    alpha = np.where(np.arange(40) < 20, 255, 0).astype(np.uint8)[None].repeat(30, 0)
    as_rgb = np.stack([gray] * 3, 2)
    deep = np.minimum(gray.astype(int) * 257 + 100, 65535).astype(np.uint16)

    def over_white(colors: np.ndarray) -> np.ndarray:
        return np.where(alpha[..., None] == 255, colors, 255)

    palette = Image.fromarray(rgb).quantize(16)
    colors = np.asarray(palette.convert('RGB'))
    clear = int(np.asarray(palette)[0, 0])
    keyed = Image.fromarray(gray)
    keyed_colors = np.where(np.asarray(palette)[..., None] == clear, 255, colors)
    both = Image.fromarray(np.dstack([rgb, alpha]))
    cases = {
        'gray': (keyed, 'png', {}, as_rgb),
        'gray with a transparent value': (keyed, 'png', {'transparency': 7}, np.where(as_rgb == 7, 255, as_rgb)),
        'gray and alpha': (Image.merge('LA', (keyed, Image.fromarray(alpha))), 'png', {}, over_white(as_rgb)),
        'RGBA': (both, 'png', {}, over_white(rgb)),
        'RGBA as WEBP': (both, 'webp', {'lossless': True}, over_white(rgb)),
        'palette': (palette, 'png', {}, colors),
        'palette with a transparent entry': (palette, 'png', {'transparency': clear}, keyed_colors),
        '1 bit': (Image.fromarray(gray > 128), 'png', {}, np.where(as_rgb > 128, 255, 0)),
        '16 bits': (Image.fromarray(deep), 'png', {}, as_rgb),
        '16 bits as TIFF': (Image.fromarray(deep), 'tiff', {}, as_rgb),
        '16 bits as PGM': (Image.fromarray(deep), 'ppm', {}, as_rgb),
        'CMYK': (Image.fromarray(rgb).convert('CMYK'), 'tiff', {}, rgb),
        'BMP': (Image.fromarray(rgb), 'bmp', {}, rgb),
    }
    out = {}
    for name, (image, kind, options, expected) in cases.items():
        out[name] = path / f'{name}.jpg', expected  # Pillow goes by the content, not by the name
        image.save(out[name][0], kind, **options)
    return out


def test_row_23_every_mode_becomes_the_right_rgb(tmp_path):
    for name, (path, expected) in write_modes(tmp_path).items():
        image = load_image(path)
        assert image.mode == 'RGB', name
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=name)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_jpeg_pixels_are_torchvisions(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # says "turn by 90 degrees"; torchvision ignores it, and so do we
    picture().convert(mode).save(tmp_path / 'a.jpg', exif=exif)
    image = load_image(tmp_path / 'a.jpg')
    assert image.size == (40, 30)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(pil_loader(tmp_path / 'a.jpg')))


@pytest.fixture
def large_jpegs(tmp_path):
    """train/ and val/ with JPEGs of 1000 x 800, whose crops to 224 px allow 1/4, 1/2 and no reduction."""
    for split in ('train', 'val'):
        for i in range(2):
            path = tmp_path / split / f'class{i}' / 'a.jpg'
            path.parent.mkdir(parents=True)
            picture(1000, 800, seed=i).save(path, quality=95)
    return tmp_path


@pytest.mark.parametrize('decoder', ['torchvision', 'Pillow'])
def test_large_jpegs_are_decoded_small_for_the_same_crop(large_jpegs, monkeypatch, decoder):
    if decoder == 'Pillow':
        monkeypatch.setattr(image_files, 'decode_jpeg', None)
    drafts, draft = [], JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, 'draft', lambda self, *args: drafts.append(args) or draft(self, *args))
    crop = make_transform(True, flags()).transforms[0]
    path = large_jpegs / 'train/class0/a.jpg'
    for seed in range(40):
        random.seed(seed)
        exact = np.asarray(crop(load_image(path)), np.float32)
        after = random.getstate()
        random.seed(seed)
        before = len(drafts)
        difference = np.abs(np.asarray(CropLoader(crop)(path), np.float32) - exact)
        assert random.getstate() == after
        # Decoded small, by another filter, but the same place: a crop that is off by a pixel differs by more.
        assert difference.mean() < 0.6 if len(drafts) > before else difference.max() <= 2
    assert 0 < len(drafts) < 40


def write_odd_jpegs(path: Path) -> list[Path]:
    """JPEGs that Pillow reads: without end marker, padded, a second picture inside, progressive, of a pixel or two."""
    large = picture(1000, 800)
    for name, image, options in (
        ('plain', picture(400, 300), {}), ('large', large, {}), ('progressive', large, {'progressive': True}),
        ('gray', large.convert('L'), {}), ('cmyk', large.convert('CMYK'), {}), ('one', picture(1, 1), {}),
        ('two', picture(2, 1), {}), ('line', picture(1, 90), {}),
    ):  # fmt: skip
        image.save(path / f'{name}.jpg', **options)
    large.save(path / 'several.jpg', format='MPO', save_all=True, append_images=[picture(30, 30)])
    for name in ('plain', 'large'):
        content = (path / f'{name}.jpg').read_bytes()
        (path / f'{name}_padded.jpg').write_bytes(content[:-2] + bytes(200))
    return sorted(path.glob('*.jpg'))


def test_what_pillow_reads_is_read_the_fast_way_too(tmp_path):
    crop = make_transform(True, flags()).transforms[0]
    for path in write_odd_jpegs(tmp_path):
        load_image(path)
        for seed in range(25):
            random.seed(seed)
            assert CropLoader(crop)(path).size == (224, 224), path


def test_truncated_files_are_refused_at_any_reduction(tmp_path):
    crop = make_transform(True, flags()).transforms[0]
    for size in ((400, 300), (1000, 800)):
        picture(*size).save(tmp_path / 'a.jpg')
        content = (tmp_path / 'a.jpg').read_bytes()
        (tmp_path / 'a.jpg').write_bytes(content[: len(content) // 2])
        for seed in range(25):
            random.seed(seed)
            with pytest.raises(InputError, match='a.jpg cannot be read: .*truncated'):
                CropLoader(crop)(tmp_path / 'a.jpg')


def test_a_reduced_crop_sees_nothing_around_it(tmp_path):
    image = np.full((800, 1000, 3), 255, np.uint8)
    image[160:640, 160:640] = 0
    Image.fromarray(image).save(tmp_path / 'a.jpg', quality=100)
    crop = make_transform(True, flags()).transforms[0]
    crop.get_params = lambda *_: (160, 160, 480, 480)
    assert np.asarray(CropLoader(crop)(tmp_path / 'a.jpg')).max() <= 2


KINDS = [(mode, kind) for mode in ('RGB', 'L') for kind in ('png', 'bmp', 'webp', 'tiff', 'jpg')]


@pytest.mark.parametrize('mode, kind', [*KINDS, ('CMYK', 'tiff'), ('CMYK', 'jpg')])
def test_any_file_is_cropped_the_fast_way(tmp_path, kind, mode):
    path = tmp_path / f'a.{kind}'
    picture(400, 300).convert(mode).save(path)
    for interpolation in ('bicubic', 'bilinear', 'random'):
        crop = make_transform(True, flags('--train-interpolation', interpolation)).transforms[0]
        random.seed(5)
        exact = np.asarray(crop(load_image(path)), np.float32)
        random.seed(5)
        assert np.abs(np.asarray(CropLoader(crop)(path)) - exact).max() <= 2


def test_pixels_are_exact_in_evaluation_and_where_the_flag_says_so(large_jpegs):
    args, path = flags('--data-path', large_jpegs, '--no-fast-decode'), 'class1/a.jpg'
    for train, fast in ((True, False), (True, True), (False, True)):
        args.fast_decode = fast
        dataset, differ = make_dataset(train, args), 0
        for seed in range(5):
            utils.seed_all(seed)
            exact = make_transform(train, args)(load_image(large_jpegs / ('train' if train else 'val') / path))
            utils.seed_all(seed)
            differ += not torch.equal(dataset[1][0], exact)
        assert bool(differ) == (train and fast)


def png_header(width: int, height: int) -> bytes:
    header = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    pixels = struct.pack('>I', 1000) + b'IDAT'  # none follow: reading them would fail
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + header + struct.pack('>I', zlib.crc32(header)) + pixels


def broken_files(path: Path) -> dict[str, tuple[Path, str]]:
    """Files that must be refused, with a word of the reason."""
    picture().save(path / 'whole.jpg')
    whole = (path / 'whole.jpg').read_bytes()
    picture().save(path / 'whole.png')
    corrupt = bytearray((path / 'whole.png').read_bytes())
    corrupt[60:90] = bytes(30)
    files = {
        'truncated': (whole[: len(whole) // 2], 'truncated'),
        'corrupt': (bytes(corrupt), ''),
        'empty': (b'', 'no image in a supported'),
        'text': (b'not an image\n', 'no image in a supported'),
        'eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'no image in a supported'),
        'large': (png_header(9000, 8000), '9000 x 8000'),
        'larger than Pillow opens': (png_header(60000, 60000), '3600000000 pixels'),
        'wide': (png_header(3000, 1), '3000 x 1'),
        'tall': (png_header(10, 1001), '10 x 1001'),
    }
    out = {}
    for name, (content, word) in files.items():
        out[name] = path / f'{name}.jpg', word
        out[name][0].write_bytes(content)
    out['gif'] = path / 'gif.jpg', 'no image in a supported'
    picture().save(out['gif'][0], 'gif')
    out['float'] = path / 'float.jpg', 'mode F'
    Image.fromarray(np.ones((9, 9), np.float32)).save(out['float'][0], 'tiff')
    out['absent'] = path / 'absent.jpg', 'No such file'
    return out


@pytest.mark.parametrize('fast', [False, True])
def test_unusable_files_are_refused_by_name(tmp_path, fast):
    read = CropLoader(make_transform(True, flags()).transforms[0]) if fast else load_image
    for path, word in broken_files(tmp_path).values():
        with pytest.raises(InputError) as error:
            read(path)
        assert str(path) in str(error.value)
        assert word in str(error.value)


def test_an_error_of_the_crop_is_not_an_unreadable_image(image_root, monkeypatch):
    def breaks(*_):
        raise ValueError('a bug')

    monkeypatch.setattr(image_files.RandomResizedCropAndInterpolation, 'get_params', breaks)
    data = Seeded(make_dataset(True, flags('--data-path', image_root)), seed=0, max_broken=5)
    with pytest.raises(ValueError, match='^a bug$') as error:
        data[0, 0, 0]
    assert not isinstance(error.value, InputError)


# --- image folders


def test_row_19_folder_labels_go_by_name_and_hidden_files_are_left_out(image_root, capsys):
    folder(image_root / 'train' / '.ipynb_checkpoints', {'x': 2})
    folder(image_root / 'train' / 'bee', {'.thumbnails': 1})
    (image_root / 'train' / 'bee' / '._0.png').write_bytes(b'')
    (image_root / 'train' / 'bee' / 'notes.txt').write_text('')
    data = make_dataset(True, flags('--data-path', image_root))
    assert data.classes == ['ant', 'bee', 'cat']
    assert [label for _, label in data.samples] == [0] * 4 + [1] * 4 + [2] * 5
    assert capsys.readouterr().out.count('.ipynb_checkpoints') == 1


def test_row_19_validation_classes_are_those_of_training(image_root, capsys):
    (image_root / 'val' / 'ant').rename(image_root / 'val' / '.ant')
    args = small(image_root)
    val = make_loaders(args)[1].dataset
    assert val.classes == ['ant', 'bee', 'cat']
    assert {Path(path).parent.name: label for path, label in val.samples} == {'bee': 1, 'cat': 2}
    assert 'no images of 1 of 3 classes: ant' in capsys.readouterr().out
    folder(image_root / 'val', {'dog': 1})
    with pytest.raises(InputError, match='1 classes that training lacks: dog'):
        make_loaders(args)


def labels(data: datasets.ImageFiles) -> dict[str, int]:
    return {Path(path).parent.name: label for path, label in data.samples}


def test_classes_without_names_are_those_of_imagenet_or_the_folders_in_order(image_root, tmp_path, capsys):
    synsets = ImageNetInfo().label_names()
    folder(tmp_path / 'imagenet' / 'val', {synsets[700]: 1, synsets[3]: 1})
    args = flags('--data-path', tmp_path / 'imagenet', evaluate=True)
    data = make_dataset(False, args, num_classes=1000)
    assert labels(data) == {synsets[700]: 700, synsets[3]: 3} and data.classes == synsets
    assert 'no images of 998 of 1000 classes' in capsys.readouterr().out
    assert labels(make_dataset(False, args, num_classes=2)) == {synsets[3]: 0, synsets[700]: 1}
    assert 'does not name its 2 classes; using the sorted folders' in capsys.readouterr().out
    with pytest.raises(InputError, match='10 classes without names, but .*val has 2 class folders'):
        make_dataset(False, args, num_classes=10)
    args.data_path = image_root
    with pytest.raises(InputError, match='3 class folders, 3 of which are not ImageNet synsets: ant, bee, cat'):
        make_dataset(False, args, num_classes=1000)


def test_other_data_sets_have_the_classes_of_the_checkpoint():
    args = flags('--data-set', 'SHAPES', '--input-size', 32, evaluate=True)
    names = Shapes('val', 32).classes
    assert make_dataset(False, args, names, 10).classes == make_dataset(False, args, None, 10).classes == names
    with pytest.raises(InputError, match='the checkpoint has 4 classes, the data set 10'):
        make_dataset(False, args, None, 4)
    with pytest.raises(InputError, match='SHAPES has other classes than training: the same names in another order'):
        make_dataset(False, args, names[::-1], 10)
    with pytest.raises(InputError, match=f'the data lacks 1 .a ball. and has 1 others .{names[0]}.'):
        make_dataset(False, args, ['a ball', *names[1:]], 10)


def test_missing_data_is_named_with_what_is_there(tmp_path):
    (tmp_path / 'training').mkdir()
    there = f'does not exist: .*{tmp_path} holds training'
    for args, message in (
        (flags('--data-path', tmp_path), f'{tmp_path}/train {there}'),
        (flags('--data-path', tmp_path / 'no' / 'such', evaluate=True), f'{tmp_path}/no/such/val {there}'),
        (flags('--data-path', tmp_path, '--data-set', 'CIFAR10'), f'{tmp_path}/cifar-10-batches-py {there}'),
        (flags('--data-path', tmp_path, '--data-set', 'INAT'), f'{tmp_path}/train2018.json {there}'),
    ):
        with pytest.raises(InputError, match=message):
            make_loaders(args)
    (tmp_path / 'train').mkdir()
    with pytest.raises(InputError, match='no class folders; it holds nothing'):
        make_loaders(flags('--data-path', tmp_path))
    folder(tmp_path / 'train', {'ant': 1, 'bee': 0})
    (tmp_path / 'train' / 'bee' / 'a.txt').write_text('')
    with pytest.raises(InputError, match=f'no images in bee; {tmp_path}/train/bee holds a.txt'):
        make_loaders(flags('--data-path', tmp_path))


def test_too_few_images_for_several_processes_are_named_with_numbers(image_root):
    with pytest.raises(InputError, match='13 training images give each of 2 processes 7 an epoch.*batch of 8'):
        make_loaders(flags('--data-path', image_root, '--batch-size', 8), world_size=2)


# --- other data sets


def write_inat(root: Path, file_name: str = 'train_val2018/Plants/{}.jpg', categories=(0, 1)) -> Path:
    """iNaturalist with three categories; images are of `categories` in turn."""
    known = [{'id': i, 'name': f'species {i}', 'kingdom': 'Plantae' if i else 'Fungi'} for i in range(3)]
    (root / 'categories.json').write_text(json.dumps(known))
    (root / 'train_val2018' / 'Plants').mkdir(parents=True, exist_ok=True)
    for split, count in (('train', 6), ('val', 3)):
        images = [{'id': 10 + i, 'file_name': file_name.format(f'{split}{i}')} for i in range(count)]
        labels = [{'image_id': 10 + i, 'category_id': categories[i % len(categories)]} for i in reversed(range(count))]
        (root / f'{split}2018.json').write_text(json.dumps({'images': images, 'annotations': labels}))
        for i in range(count):
            picture().save(root / 'train_val2018' / 'Plants' / f'{split}{i}.jpg')
    return root


def inat_flags(root: Path, *argv):
    return small(root, '--data-set', 'INAT', *argv)


def test_nothing_to_validate_is_said(tmp_path):
    write_inat(tmp_path)
    (tmp_path / 'val2018.json').write_text(json.dumps({'images': [], 'annotations': []}))
    with pytest.raises(InputError, match=f'--data-set INAT in {tmp_path}: no validation images'):
        make_loaders(inat_flags(tmp_path))


def test_inaturalist_reads_its_lists(tmp_path):
    write_inat(tmp_path)
    train, val = (loader.dataset for loader in make_loaders(inat_flags(tmp_path)))
    assert val.classes == ['species 0', 'species 1', 'species 2']
    assert [label for _, label in val.samples] == [0, 1, 0]
    assert [val[i][0].shape for i in range(3)] == [(3, 32, 32)] * 3
    kingdoms = make_dataset(True, inat_flags(tmp_path, '--inat-category', 'kingdom'))
    assert kingdoms.classes == ['Fungi', 'Plantae'] and [label for _, label in kingdoms.samples] == [0, 1] * 3
    with pytest.raises(InputError, match='3 categories lack a genus'):
        make_dataset(True, inat_flags(tmp_path, '--inat-category', 'genus'))
    first = Path(val.samples[0][0])
    first.unlink()
    with pytest.raises(InputError, match=f'{first} does not exist'):
        make_dataset(False, inat_flags(tmp_path))


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'file_name': '../{}.jpg'}, 'names a path outside'),
        ({'file_name': '/{}.jpg'}, 'names a path outside'),
        ({'file_name': 'a/../../{}.jpg'}, 'names a path outside'),
        ({'categories': [7]}, 'train2018.json: .*train0.jpg has category 7, none of the 3'),
    ],
)
def test_inaturalist_paths_stay_inside_and_labels_are_known(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        make_dataset(True, inat_flags(write_inat(tmp_path, **wrong)))


@pytest.mark.parametrize(
    'name,base,label', [('CIFAR10', 'cifar-10-batches-py', 'labels'), ('CIFAR', 'cifar-100-python', 'fine_labels')]
)
def test_cifar_is_read_as_torchvision_unpacks_it(tmp_path, monkeypatch, name, base, label):
    kind = torchvision.datasets.CIFAR10 if name == 'CIFAR10' else torchvision.datasets.CIFAR100
    (tmp_path / base).mkdir()
    args = small(tmp_path, '--data-set', name, '--mean', 0, '--std', 1)
    with pytest.raises(InputError, match=f'{tmp_path}/{base} is not the whole of {kind.__name__}'):
        make_dataset(True, args)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for file, _ in kind.train_list + kind.test_list:
        (tmp_path / base / file).write_bytes(pickle.dumps({'data': pixels, label: [3, 1]}))
    (tmp_path / base / kind.meta['filename']).write_bytes(pickle.dumps({kind.meta['key']: list('abcd')}))
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *args: True)
    data = make_dataset(False, args)
    assert data.classes == list('abcd')
    image, target = data[0]
    assert target == 3
    torch.testing.assert_close(image, torch.from_numpy(pixels[0]).view(3, 32, 32) / 255)


# --- transforms


def reference_transform(train: bool, size: int):
    """The transform of the original Evo-ViT, built from torchvision and timm."""
    bicubic = transforms.InterpolationMode.BICUBIC
    normalise = [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    if not train:
        resize = transforms.Resize(size if size <= 32 else int(256 / 224 * size), bicubic)
        return transforms.Compose([resize, transforms.CenterCrop(size), *normalise])
    transform = timm.data.create_transform(
        size, is_training=True, color_jitter=0.4, auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic',
        re_prob=0.25, re_mode='pixel', re_count=1,
    )  # fmt: skip
    if size <= 32:
        crop = transforms.RandomCrop(size, padding=4)
        transform.transforms[0] = transforms.Compose([transforms.Resize(size, bicubic), crop])
    return transform


@pytest.mark.parametrize(
    'name, size',
    [
        ('evo_deit_tiny_patch16_224', 224), ('evo_deit_small_vis_patch16_224', 224), ('EvoLeViT_128S', 224),
        ('evo_deit_small_patch16_384', 384), ('EvoLeViT_384_384', 384), ('evo_deit_nano_patch4_32', 32),
    ],
)  # fmt: skip
def test_published_models_see_the_published_pixels(name, size):
    args = flags('--model', name)
    for train in (False, True):
        ours, theirs = make_transform(train, args), reference_transform(train, size)
        for i, shape in enumerate([(500, 375), (333, 512), (40, 30)]):
            image = picture(*shape, seed=i)
            utils.seed_all(i)
            expected = theirs(image)
            utils.seed_all(i)
            assert torch.equal(ours(image), expected)


@pytest.mark.parametrize(
    'name, mode, size',
    [
        ('vit_small_patch16_224', 'center', 224), ('coat_lite_medium_384', 'squash', 384),
        ('deepseek_vit_412m', 'border', None),
    ],
)  # fmt: skip
def test_other_models_see_what_timm_gives_them(name, mode, size):
    args = flags('--model', name)
    found = config(args)
    published = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert found.crop_mode == mode and size in (None, found.input_size)
    for shape in ((500, 375), (333, 512)):
        expected = timm.data.create_transform(**published, is_training=False)(picture(*shape))
        assert torch.equal(make_transform(False, args)(picture(*shape)), expected)


def test_flags_stand_in_for_the_configuration_and_the_start_says_so():
    args = flags('--model', 'vit_small_patch16_224')
    expected = 'images: 224 px, evaluated at crop_pct 0.9 (center), bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5'
    assert datasets.describe(config(args)) == expected
    given = ['--input-size', 96, '--mean', 0.1, '--std', 0.2, 0.3, 0.4, '--crop-pct', 1, '--crop-mode', 'squash']
    args = flags('--model', 'vit_small_patch16_224', *given, '--interpolation', 'bilinear')
    assert config(args) == datasets.DataConfig(96, (0.1,) * 3, (0.2, 0.3, 0.4), 1.0, 'squash', 'bilinear')
    expected = picture(300, 200).resize((96, 96), Image.Resampling.BILINEAR)
    expected = (np.asarray(expected) / 255 - 0.1) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(make_transform(False, args)(picture(300, 200)).permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (['--mean', 0.1, 0.2], r'--mean: expected 1 or 3 values, found \[0.1, 0.2\]'),
        (['--std', 0.1, 0.2, 0.3, 0.4], r'--std: expected 1 or 3 values, found \[0.1, 0.2, 0.3, 0.4\]'),
        (['--model', 'vit_base_patch16_sapiens2'], 'takes images of 3 x 1024 x 768; expected 3 channels and a square'),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        config(flags(*wrong))


def test_an_unknown_crop_mode_is_refused(monkeypatch):
    cfg = dataclasses.replace(timm.get_pretrained_cfg('resnet50'), crop_mode='spiral')
    monkeypatch.setattr(datasets.networks, 'published_cfg', lambda name: cfg)
    with pytest.raises(InputError, match='crop_mode spiral; expected one of center, squash, border'):
        config(flags('--model', 'resnet50'))


@pytest.mark.parametrize('size', [24, 32, 40])
@pytest.mark.parametrize('shape', [(32, 32), (70, 31), (9, 40)])
def test_any_image_fits_any_size(size, shape):
    for train in (True, False):
        assert make_transform(train, flags('--input-size', size))(picture(*shape)).shape == (3, size, size)


def test_scale_limits_how_much_of_an_image_a_random_crop_takes():
    ramp = torch.linspace(0, 255, 100).repeat(100, 1)  # columns get lighter: the range of a crop is its width
    image = Image.fromarray(ramp.byte().numpy()).convert('RGB')

    def widths(*scale):
        off = ['--aa', '', '--color-jitter', 0, '--reprob', 0, '--mean', 0, '--std', 1]
        transform = make_transform(True, flags('--input-size', 64, *off, *scale))
        crops = [transform(image)[0] for _ in range(60)]
        return [(crop.max() - crop.min()).item() for crop in crops]

    assert min(widths()) < 0.5, 'published: from 0.08 of the image on'
    assert min(widths('--scale', 0.8, 1)) > 0.75
    assert max(widths('--scale', 0.08, 0.1)) < 0.5
    with pytest.raises(InputError, match='--scale: images up to 32 px'):
        widths('--scale', 0.5, 1, '--input-size', 32)


def test_default_augmentation_runs_over_many_images():
    data = Seeded(Shapes('train', 40, transform=make_transform(True, flags('--input-size', 40))), seed=0)
    for i in range(1000):
        assert data[0, i, i][0].isfinite().all()


# --- loaders


def batches(loader, epoch: int, start: int = 0) -> list:
    loader.sampler.set_epoch(epoch, start)
    return list(loader)


def assert_same(batches: list, others: list):
    for (images, labels), (images2, labels2) in zip(batches, others, strict=True):
        assert torch.equal(images, images2) and torch.equal(labels, labels2)


def test_batches_are_the_same_bits_with_any_number_of_workers(image_root, monkeypatch):
    monkeypatch.setattr(datasets.os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
    runs = []
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        random.seed(workers)
        np.random.seed(workers)
        loader = make_loaders(small(image_root, '--num_workers', workers))[0]
        assert loader.num_workers == workers
        runs.append([batches(loader, epoch) for epoch in (0, 1)])
    for run in runs[1:]:
        for epoch, same in zip(runs[0], run, strict=True):
            assert_same(epoch, same)
    assert len(runs[0][0]) == 3 and not torch.equal(runs[0][0][0][0], runs[0][1][0][0])


def test_the_seed_changes_order_and_augmentation(image_root):
    first, second = (make_loaders(small(image_root, '--seed', seed))[0] for seed in (0, 1))
    assert list(first.sampler) != list(second.sampler)
    assert not torch.equal(first.dataset[0, 0, 0][0], second.dataset[0, 0, 0][0])


@pytest.mark.parametrize('workers', [0, 1])
def test_evaluating_leaves_the_random_numbers_alone(image_root, workers):
    def state() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    loader, before = make_loaders(small(image_root, '--num_workers', workers, evaluate=True))[1], state()
    list(loader)
    assert state() == before


def test_training_data_can_be_sent_to_another_process():
    data = Seeded(make_dataset(True, flags('--data-set', 'SHAPES', '--input-size', 32)), seed=3)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[2, 40, 5][0], data[2, 40, 5][0])
    assert not torch.equal(copy[2, 40, 5][0], data[2, 41, 5][0])


@pytest.mark.parametrize('processes, expected', [(1, 8), (2, 4), (16, 1)])
def test_workers_are_at_most_the_cores_of_a_process(image_root, monkeypatch, processes, expected):
    monkeypatch.setattr(datasets.os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    assert make_loaders(small(image_root, '--num_workers', 10, evaluate=True))[1].num_workers == expected


def test_mixup_is_off_where_nothing_is_mixed():
    off = ['--mixup', 0, '--cutmix', 0]
    assert build_mixup(flags(*off), 10) is None
    assert build_mixup(flags(*off, '--cutmix-minmax', 0.2, 0.8), 10) is not None
    images, targets = build_mixup(flags('--mixup-prob', 0), 10)(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(targets.max(1).values, torch.full((4,), 0.91))
