"""What is exported gives the logits of the model, at a batch size that it was not exported with."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

import datasets
import export
import models
from utils import InputError

VIT = 'test_vit'  # of timm, six blocks


def small(name: str, **options) -> torch.nn.Module:
    """A model for inference whose weights and BatchNorms are not those of the start."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints of training, with schedules that are not the default: flags by name, and the models."""
    deit = small('evo_deit_nano_patch4_32', keep_ratio=0.3, stages=(3, 6))
    levit = small('EvoLeViT_128S', img_size=64, representative='none')
    levit.set_schedule(stage_wise=False)
    vit = models.evolve(small(VIT, img_size=64), (0.6, 0.2), stages=(2, 4))
    flags = [
        dict(model='evo_deit_nano_patch4_32', keep_ratio=[0.3], stages=[3, 6]),
        dict(model='EvoLeViT_128S', representative='none', input_size=64),
        dict(model=VIT, evolve=True, keep_ratio=[0.6, 0.2], stages=[2, 4], input_size=64),
    ]
    saved = {}
    for model, args in zip((deit, levit, vit), flags, strict=True):
        path = tmp_path / f'{args["model"]}.pth'
        args = dict(evolve=False, mean=[0.5], std=[0.25], precision='fp32', seed=0) | args
        content = {'model': model.state_dict(), 'schedule': model.schedule(), 'args': args}
        torch.save(content | {'classes': [f'class {i}' for i in range(10)]}, path)
        saved[args['model']] = path, model
    return saved


@pytest.mark.parametrize('name', ['evo_deit_nano_patch4_32', 'EvoLeViT_128S', VIT])
@pytest.mark.parametrize('format', ['pt2', 'hub', 'onnx'])
def test_a_checkpoint_is_exported_as_it_was_trained(name, format, checkpoints, script, tmp_path):
    if format == 'onnx':
        pytest.importorskip('onnxruntime')
    source, model = checkpoints[name]
    path = tmp_path / f'exported.{format}'
    fuse = () if name == VIT else ('--fuse',)
    said = script('export', '--model', name, '--resume', source, '--format', format, '--output', path, '--check', *fuse)
    assert f'{path} agrees with the model' in said
    x = torch.randn(3, 3, *(model.img_size if name == 'EvoLeViT_128S' else model.patch_embed.img_size))
    with torch.no_grad():
        found, expected = export.load_program(path, format)(x), model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    size = path.stat().st_size if format != 'hub' else sum(file.stat().st_size for file in path.iterdir())
    assert f'{size / 1e6:,.1f} MB' in said
    if format == 'hub':
        about = json.loads((path / 'config.json').read_text())
        assert about['label_names'][3] == 'class 3' and about['pretrained_cfg']['mean'] == [0.5] * 3
        return
    if format == 'pt2':
        extra = {'preprocessing.json': ''}
        torch.export.load(path, extra_files=extra)
        about = json.loads(extra['preprocessing.json'])
    else:
        import onnxruntime

        about = json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map['preprocessing'])
    assert about['classes'][3] == 'class 3' and about['mean'] == [0.5] * 3


@pytest.mark.parametrize('format', ['pt2', 'onnx'])
def test_half_precision(format, checkpoints, script, tmp_path):
    if format == 'onnx':
        pytest.importorskip('onnxruntime')
    flags = '--resume', checkpoints['evo_deit_nano_patch4_32'][0], '--precision', 'fp16', '--format', format, '--check'
    assert 'agrees with the model' in script('export', *flags, '--output', tmp_path / 'half')
    x = torch.randn(3, 3, 32, 32, dtype=torch.float16)
    assert export.load_program(tmp_path / 'half', format)(x).dtype == torch.float16


def test_the_dense_model_is_timed_beside_it(checkpoints, script, monkeypatch, tmp_path):
    monkeypatch.setattr(export, 'TURNS', 2)
    flags = '--resume', checkpoints[VIT][0], '--format', 'pt2', '--output', tmp_path / 'a'
    said = script('export', *flags, '--bench', '1', '3')
    assert re.findall(r'batch (\d): evolved [\d.]+ img/s, dense [\d.]+ img/s; speed-up [\d.]+', said) == ['1', '3']
    assert f'torch {torch.__version__.split("+")[0]}' in said and '1 threads' in said


def test_the_dense_model_has_the_same_size():
    args = export.get_parser().parse_args(['--model', VIT, '--evolve', '--model-kwargs', 'depth=3'])
    model, config, _, args = export.load_model(args)
    assert len(export.build_dense(args, model, config.input_size).blocks) == len(model.blocks) == 3


def test_a_checkpoint_says_what_is_exported(script, tmp_path):
    state = timm.create_model('vit_tiny_patch16_224', img_size=48, num_classes=4, depth=3).state_dict()
    flags = {'model': 'vit_tiny_patch16_224', 'model_kwargs': {'depth': 3}, 'input_size': 48, 'method': 'evolve'}
    torch.save({'model': state, 'args': flags}, tmp_path / 'c.pth')
    run = ['--resume', tmp_path / 'c.pth', '--format', 'hub', '--output']
    said = script('export', *run, tmp_path / 'hub')
    assert 'vit_tiny_patch16_224, nearest, keeps 0.7 from block 1 and 0.3 from block 2, ' in said
    assert (tmp_path / 'hub' / 'config.json').exists()
    with pytest.raises(InputError, match='leave --fuse out'):  # known once the checkpoint was read
        script('export', *run, tmp_path / 'other', '--fuse')
    torch.save(state, tmp_path / 'c.pth')
    with pytest.raises(InputError, match='c.pth does not say of which model it is; expected --model'):
        script('export', *run, tmp_path / 'other')


def test_a_difference_is_an_error(monkeypatch, tmp_path, capsys):
    model = models.evolve(small(VIT, img_size=64))
    config = datasets.DataConfig(64, (0.5,), (0.5,), 1.0, 'center', 'bicubic')
    off, images = torch.zeros(10, 1), export.check_images(config, torch.float32)
    monkeypatch.setattr(export, 'load_program', lambda *_: lambda images: off + model(images))
    export.check(model, 'pt2', tmp_path / 'logits.pt2', images, 1e-4)
    assert 'agrees with the model: largest difference 0' in capsys.readouterr().out
    off[2], off[5] = 0.1, 0.2
    with pytest.raises(InputError, match='differs from the model in 2 images: largest difference 2.0e-01'):
        export.check(model, 'pt2', tmp_path / 'logits.pt2', images, 1e-4)
    off[5] = float('nan')
    with pytest.raises(InputError, match='in 2 images: largest difference nan'):
        export.check(model, 'pt2', tmp_path / 'logits.pt2', images, 1e-4)


def test_what_is_checked_looks_like_photographs():
    """Normalised as the model wants; neighbouring pixels resemble each other, and no two images are the same."""
    config = datasets.DataConfig(96, (0.5,), (0.25,), 0.9, 'center', 'bicubic')
    images = export.check_images(config, torch.float16)
    assert images.shape == (10, 3, 96, 96) and images.dtype == torch.float16
    assert len(images) != export.EXPORT_BATCH and images.min() >= -2 and images.max() <= 2
    images = images.float()
    assert (images[..., 1:] - images[..., :-1]).abs().mean() < 0.2 * images.std()
    assert torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(1e3).min() > 1


@pytest.mark.parametrize('format', ['pt2', 'hub'])
def test_nothing_is_replaced_unless_asked(format, checkpoints, script, tmp_path):
    path = tmp_path / f'model.{format}'
    flags = '--resume', checkpoints['evo_deit_nano_patch4_32'][0], '--format', format, '--output', path
    script('export', *flags)
    files = [path] if format == 'pt2' else [*path.iterdir()]
    before = {file: file.stat().st_mtime_ns for file in files}
    with pytest.raises(InputError, match=f'{re.escape(str(path))}.* exists; .*--overwrite'):
        script('export', *flags)
    assert {file: file.stat().st_mtime_ns for file in files} == before
    script('export', *flags, '--overwrite')
    assert all(file.stat().st_mtime_ns > before[file] for file in files)
    with pytest.raises(InputError, match='expected a (file|folder) for --format'):
        script('export', *flags[:2], '--format', 'hub' if format == 'pt2' else 'pt2', '--output', path)


def test_an_onnx_file_adds_nothing_in_parallel(checkpoints, script, tmp_path):
    """ONNX Runtime lets threads add to the same rows without a lock: results would differ from run to run."""
    onnx = pytest.importorskip('onnx')
    script('export', '--resume', checkpoints[VIT][0], '--output', tmp_path / 'a.onnx')
    adding = [
        node.op_type
        for node in onnx.load(tmp_path / 'a.onnx').graph.node
        if any(attribute.name == 'reduction' and attribute.s != b'none' for attribute in node.attribute)
    ]
    assert 'ScatterND' not in adding


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--model', VIT), 'expected --resume .* or --pretrained .*; found neither'),
        (('--model', VIT, '--pretrained', '--resume', 'weights.pth'), 'found both'),
        (('--pretrained',), '--model: expected the name'),
        (('--model', VIT, '--resume', 'nothing.pth'), 'nothing.pth is not a file'),
        (('--model', VIT, '--pretrained', '--eval-ema'), '--eval-ema needs --resume'),
        (('--model', VIT, '--pretrained', '--format', 'pt2', '--bench', '1'), 'add --evolve'),
        (('--model', VIT, '--pretrained', '--format', 'hub', '--fuse'), 'leave --fuse out'),
        (('--model', VIT, '--pretrained', '--format', 'hub', '--evolve', '--bench', '1'), 'found hub'),
        (
            ('--model', 'swin_tiny_patch4_window7_224', '--resume', 'weights.pth', '--format', 'pt2', '--evolve'),
            'cannot be evolved',
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(flags, message, script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save(small(VIT).state_dict(), 'weights.pth')
    with pytest.raises(InputError, match=message):
        script('export', *flags)
    assert [*Path().iterdir()] == [Path('weights.pth')]


def test_packages_that_are_not_installed_are_named(checkpoints, script, monkeypatch, tmp_path):
    monkeypatch.setattr(export, 'installed', lambda package: package in ('torch', 'onnx'))
    with pytest.raises(InputError, match='pip install onnxscript'):
        script('export', '--resume', checkpoints[VIT][0])
    monkeypatch.setattr(export, 'installed', lambda package: package != 'onnxruntime')
    monkeypatch.setattr(export, 'write', lambda model, path, *_: path.write_bytes(b''))
    said = script('export', '--resume', checkpoints[VIT][0], '--check', '--output', tmp_path / 'model.onnx')
    assert 'not checked: that needs the package onnxruntime' in said
