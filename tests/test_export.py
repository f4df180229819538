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


CASES = {  # flags of trained models, whose schedules are not the default
    'evo_deit_nano_patch4_32': dict(keep_ratio=[0.3], stages=[3, 6], input_size=32),
    'EvoLeViT_128S': dict(keep_ratio=[0.4], representative='none', input_size=64),
    VIT: dict(method='evolve', keep_ratio=[0.6, 0.2], stages=[2, 4], input_size=64),
}


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of training by the model's name; and the model."""

    def save(name: str) -> tuple[Path, torch.nn.Module]:
        flags, path = CASES[name], tmp_path / f'{name}.pth'
        schedule = {key: value for key, value in flags.items() if key in ('keep_ratio', 'stages', 'representative')}
        model = small(name, img_size=flags['input_size'], **({} if name == VIT else schedule))
        model = models.evolve(model, **schedule) if name == VIT else model
        flags = dict(model=name, mean=[0.5], std=[0.25], precision='fp32', seed=0) | flags
        content = {'model': model.state_dict(), 'schedule': model.schedule(), 'args': flags}
        torch.save(content | {'classes': [f'class {i}' for i in range(10)]}, path)
        return path, model

    return save


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('format', ['pt2', 'hub', 'onnx'])
def test_a_checkpoint_is_exported_as_it_was_trained(name, format, trained, script, tmp_path):
    if format == 'onnx':
        pytest.importorskip('onnxruntime')
    source, model = trained(name)
    path = tmp_path / f'exported.{format}'
    fuse = () if name == VIT else ('--fuse',)
    said = script('export', '--resume', source, '--format', format, '--output', path, '--check', *fuse)
    assert f'{path} agrees with the model' in said
    size = sum(file.stat().st_size for file in export.list_files(path, format))
    assert said.splitlines()[-1].startswith(f'wrote {path}, {size / 1e6:,.1f} MB; load it with ')
    x = torch.randn(3, 3, *2 * [CASES[name]['input_size']])
    with torch.no_grad():
        torch.testing.assert_close(export.load_program(path, format)(x), model(x), rtol=0, atol=1e-4)
    if format == 'hub':
        about = json.loads((path / 'config.json').read_text())
        about = about['pretrained_cfg'] | {'classes': about['label_names']}
    elif format == 'pt2':
        extra = {'preprocessing.json': ''}
        torch.export.load(path, extra_files=extra)
        about = json.loads(extra['preprocessing.json'])
    else:
        import onnxruntime

        about = json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map['preprocessing'])
    assert about['classes'][3] == 'class 3' and about['mean'] == [0.5] * 3


@pytest.mark.parametrize('format', ['pt2', 'onnx'])
def test_half_precision(format, trained, script, tmp_path):
    if format == 'onnx':
        pytest.importorskip('onnxruntime')
    flags = '--resume', trained('evo_deit_nano_patch4_32')[0], '--precision', 'fp16', '--format', format, '--check'
    assert 'agrees with the model' in script('export', *flags, '--output', tmp_path / 'half')
    x = torch.randn(3, 3, 32, 32, dtype=torch.float16)
    assert export.load_program(tmp_path / 'half', format)(x).dtype == torch.float16


def test_the_dense_baseline_is_timed_beside_it(trained, script, monkeypatch, tmp_path):
    monkeypatch.setattr(export, 'TURNS', 2)
    flags = '--resume', trained(VIT)[0], '--format', 'pt2', '--output', tmp_path / 'a'
    said = script('export', *flags, '--bench', '1', '3')
    assert re.findall(r'batch (\d): evolved [\d.]+ img/s, dense [\d.]+ img/s; speed-up [\d.]+', said) == ['1', '3']
    assert f'torch {torch.__version__.split("+")[0]}' in said and '1 threads' in said
    args = export.get_parser().parse_args(['--model', VIT, '--evolve', '--model-kwargs', 'depth=3'])
    model, config, _, args = export.load_for_export(args)
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
    with pytest.raises(InputError, match='c.pth does not name its model; expected --model'):
        script('export', *run, tmp_path / 'other')


def test_a_difference_is_an_error(monkeypatch, tmp_path, capsys):
    model, images = small(VIT, img_size=64), torch.randn(10, 3, 64, 64)
    off = torch.zeros(10, 1)
    monkeypatch.setattr(export, 'load_program', lambda *_: lambda images: off + model(images))
    export.check(model, 'pt2', tmp_path / 'logits.pt2', images, 1e-4)
    assert 'agrees with the model: largest difference 0' in capsys.readouterr().out
    for value, shown in ((0.1, '1.0e-01'), (float('nan'), 'nan')):
        off[2] = value
        with pytest.raises(InputError, match=f'differs from the model .* largest difference {shown}'):
            export.check(model, 'pt2', tmp_path / 'logits.pt2', images, 1e-4)


def test_what_is_checked_looks_like_photographs():
    """Neighboring pixels resemble each other, unlike noise; the batch is another one than that of the export."""
    config = datasets.DataConfig(96, (0.5,), (0.25,), 0.9, 'center', 'bicubic')
    images = export.check_images(config, torch.float16)
    assert images.shape == (10, 3, 96, 96) and images.dtype == torch.float16 and export.EXPORT_BATCH != 10
    images = images.float()
    assert (images[..., 1:] - images[..., :-1]).abs().mean() < 0.2 * images.std()


@pytest.mark.parametrize('format', ['pt2', 'hub'])
def test_nothing_is_replaced_unless_asked(format, trained, script, tmp_path):
    path = tmp_path / f'model.{format}'
    flags = '--resume', trained('evo_deit_nano_patch4_32')[0], '--format', format, '--output', path
    script('export', *flags)
    files = export.list_files(path, format)
    before = {file: file.stat().st_mtime_ns for file in files}
    with pytest.raises(InputError, match=f'{re.escape(str(path))}.* exists; .*--overwrite'):
        script('export', *flags)
    assert {file: file.stat().st_mtime_ns for file in files} == before
    script('export', *flags, '--overwrite')
    assert all(file.stat().st_mtime_ns > before[file] for file in files)
    with pytest.raises(InputError, match='expected a (file|folder) for --format'):
        script('export', *flags[:2], '--format', 'hub' if format == 'pt2' else 'pt2', '--output', path)


def test_an_onnx_file_adds_nothing_in_parallel(trained, script, tmp_path):
    """ONNX Runtime lets threads add to the same rows without a lock: results would differ from run to run."""
    onnx = pytest.importorskip('onnx')
    script('export', '--resume', trained(VIT)[0], '--output', tmp_path / 'a.onnx')
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


def test_packages_that_are_not_installed_are_named(trained, script, monkeypatch, tmp_path):
    source, _ = trained(VIT)
    monkeypatch.setattr(export, 'installed', lambda package: package in ('torch', 'onnx'))
    with pytest.raises(InputError, match='pip install onnxscript'):
        script('export', '--resume', source)
    monkeypatch.setattr(export, 'installed', lambda package: package != 'onnxruntime')
    monkeypatch.setattr(export, 'write', lambda model, path, *_: path.write_bytes(b''))
    said = script('export', '--resume', source, '--check', '--output', tmp_path / 'model.onnx')
    assert '--check: skipped, because the package onnxruntime is not installed' in said
