"""Weights: safe to read, exact to load."""

import argparse
import collections
import hashlib
import http.server
import os
import pathlib
import threading
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from conftest import nano
from timm.layers import resample_abs_pos_embed

import models
from models import weights
from models.weights import InputError


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save({'model': nano().state_dict(), 'epoch': 3}, path)
    return path


def test_files_of_the_original_with_a_namespace_load(tmp_path):
    arguments = argparse.Namespace(lr=0.1, output_dir=pathlib.PosixPath('a'), nested=argparse.Namespace(x=[1, None]))
    content = {'model': {'w': torch.ones(2)}, 'args': arguments}
    for zipped in (True, False):
        torch.save(content, tmp_path / 'p.pth', _use_new_zipfile_serialization=zipped)
        assert weights.read_checkpoint(tmp_path / 'p.pth')['args'] == arguments


@pytest.mark.parametrize(
    'content, says',
    [
        (b'', 'empty'),
        (b'<!DOCTYPE html><html>', 'web page'),
        (b'hello', 'text file'),
        (bytes(5000), 'zeros'),
        ((80).to_bytes(8, 'little') + b'{' + b'"a"' * 40, 'safetensors'),
        (b'a' * 257 + b'ustar' + bytes(300), 'tar'),
        (b'PK\x03\x04' + bytes(range(256)), 'cut short'),
        (b'\x80\x02}q\x00', 'pickle'),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, says):
    path = tmp_path / 'x.pth'
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        weights.read_checkpoint(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value) and 'weights_only' not in str(error.value)


def test_missing_files_folders_and_whole_models(tmp_path):
    with pytest.raises(InputError, match='does not exist'):
        weights.read_checkpoint(tmp_path / 'none.pth')
    (tmp_path / 'model.bin').touch()
    with pytest.raises(InputError, match='a folder.*model.bin'):
        weights.read_checkpoint(tmp_path)
    torch.save(torch.nn.Linear(1, 1), tmp_path / 'whole.pth')
    with pytest.raises(InputError, match='Linear'):
        weights.read_checkpoint(tmp_path / 'whole.pth')
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / 'script.pth')
    with pytest.raises(InputError, match='TorchScript'):
        weights.read_checkpoint(tmp_path / 'script.pth')


def test_safetensors_are_read_whatever_their_name(tmp_path):
    model, state = nano(), nano(drop_rate=0.0).state_dict()
    state['head.bias'] = torch.arange(10.0)
    for name in ('w.safetensors', 'w.pth'):
        safetensors.torch.save_file(state, tmp_path / name)
        assert not any(weights.load_weights(model, tmp_path / name))
        assert torch.equal(model.head.bias, state['head.bias'])
    whole = (tmp_path / 'w.safetensors').read_bytes()
    header = 8 + int.from_bytes(whole[:8], 'little')
    for content in (whole[:5], whole[:50], whole[:header], whole[:-1], whole + b'x', whole[:20] + b'\xff' + whole[21:]):
        (tmp_path / 'w.safetensors').write_bytes(content)
        with pytest.raises(InputError, match='w.safetensors is damaged'):
            weights.read_checkpoint(tmp_path / 'w.safetensors')
    (tmp_path / 'w.safetensors').write_text('<html>')
    with pytest.raises(InputError, match='not a safetensors file: it is a web page'):
        weights.read_checkpoint(tmp_path / 'w.safetensors')


# --- addresses


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    folder = tmp_path / 'www'
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{running.server_address[1]}'
        running.shutdown()


def test_row_39_addresses_are_read_and_their_hash_checked(server, saved, tmp_path, capsys):
    folder, address = server
    content = saved.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (folder / f'w-{digest[:8]}.pth').write_bytes(content)
    (folder / 'w-0badbad0.pth').write_bytes(content)
    (folder / 'plain.pth').write_bytes(content)
    cache = tmp_path / 'cache' / 'hub' / 'checkpoints'

    assert weights.read_checkpoint(f'{address}/w-{digest[:8]}.pth')['epoch'] == 3
    assert [p.name for p in cache.iterdir()] == [f'w-{digest[:8]}.pth']
    (cache / f'w-{digest[:8]}.pth').write_bytes(content[:-1])
    with pytest.raises(InputError, match=f'sha256 {digest[:8]}, found'):
        weights.read_checkpoint(f'{address}/w-{digest[:8]}.pth')
    assert weights.read_checkpoint(f'{address}/w-{digest[:8]}.pth')['epoch'] == 3

    with pytest.raises(InputError, match=f'sha256 0badbad0, found {digest}'):
        weights.read_checkpoint(f'{address}/w-0badbad0.pth')
    assert weights.read_checkpoint(f'{address}/plain.pth#sha256={digest}')['epoch'] == 3
    assert weights.read_checkpoint(f'{address}/plain.pth')['epoch'] == 3
    with pytest.raises(InputError, match='could not be downloaded'):
        weights.read_checkpoint(f'{address}/none-12345678.pth')
    for name in ('short.pth', f'short-{digest[:8]}.pth'):
        (folder / name).write_bytes(content[:-100])
        with pytest.raises(InputError, match='damaged' if name == 'short.pth' else f'sha256 {digest[:8]}, found'):
            weights.read_checkpoint(f'{address}/{name}')
    torch.save({'model': {}, 'args': Malicious(tmp_path / 'ran')}, folder / 'bad.pth')
    with pytest.raises(InputError, match='could run code'):
        weights.read_checkpoint(f'{address}/bad.pth')
    assert not (tmp_path / 'ran').exists()
    assert sorted(p.name for p in cache.iterdir()) == ['plain.pth', f'w-{digest[:8]}.pth']
    safetensors.torch.save_file({'w': torch.ones(3)}, folder / 'w.safetensors')
    assert weights.read_checkpoint(f'{address}/w.safetensors')['w'].tolist() == [1, 1, 1]
    (folder / 'page.pth').write_text('<html>')
    with pytest.raises(InputError, match='web page'):
        weights.read_checkpoint(f'{address}/page.pth')


# --- loading


def test_what_a_checkpoint_may_look_like():
    model, state = nano(), nano(drop_rate=0.0).state_dict()
    for name in state:
        if state[name].is_floating_point():
            state[name] = state[name] + 1
    wrapped = {f'module._orig_mod.{key}': value for key, value in state.items()}
    for checkpoint in (state, collections.OrderedDict(state), {'model': state}, {'state_dict': wrapped, 'epoch': 1}):
        target = nano()
        assert not any(weights.load_weights(target, dict(checkpoint)))
        assert torch.equal(target.head.weight, state['head.weight'])
    weights.load_weights(model, {'model': nano().state_dict(), 'model_ema': state}, use_ema=True)
    assert torch.equal(model.head.weight, state['head.weight'])
    with pytest.raises(InputError, match='no averaged weights'):
        weights.load_weights(model, {'model': state}, use_ema=True)
    with pytest.raises(InputError, match='expected weights'):
        weights.load_weights(model, {'epoch': 3})


def test_models_of_timm_are_adapted_for_finetuning():
    """A dense ViT to other classes and another size, its positions resized by timm."""
    torch.manual_seed(0)
    state = timm.create_model('vit_small_patch16_224', img_size=32, depth=1).state_dict()
    model = timm.create_model('vit_small_patch16_224', img_size=48, depth=1, num_classes=10)
    head = model.head.weight.clone()
    with pytest.raises(InputError, match='1000 classes, the model 10'):
        weights.load_weights(model, state)
    loaded = weights.load_weights(model, state, adapt=True)
    assert loaded.missing == ['head.bias', 'head.weight'] and set(loaded.dropped) == set(loaded.missing)
    assert torch.equal(model.head.weight, head) and torch.equal(model.pos_embed[:, 0], state['pos_embed'][:, 0])
    assert torch.equal(model.blocks[0].attn.qkv.weight, state['blocks.0.attn.qkv.weight'])
    bare = {k: v for k, v in state.items() if not k.startswith('head')}
    loaded = weights.load_weights(model, bare, adapt=True)
    assert loaded.missing == ['head.bias', 'head.weight'] and not loaded.dropped
    with pytest.raises(InputError, match='cannot be adapted|does not fit'):
        weights.load_weights(model, state | {'pos_embed': torch.zeros(1, 9, 384)}, adapt=True)
    with pytest.raises(InputError, match='does not fit'):
        weights.load_weights(model, timm.create_model('resnet10t').state_dict(), adapt=True)


def test_another_image_size_resizes_positions_and_nothing_else(capsys):
    torch.manual_seed(0)
    vit = partial(timm.create_model, 'vit_small_patch16_224', depth=1, num_classes=10)
    state = vit(img_size=64).state_dict()
    assert not weights.load_weights(model := vit(img_size=(32, 96)), state).missing
    said = "the checkpoint: positions resized to the model's image size: pos_embed (1, 17, 384) to (1, 13, 384)\n"
    assert capsys.readouterr().out == said
    expected = resample_abs_pos_embed(state['pos_embed'], [2, 6])
    torch.testing.assert_close(model.pos_embed, expected)
    others = [key for key in state if key != 'pos_embed']
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in others)
    with pytest.raises(InputError, match='of another shape: pos_embed .*patch_embed.proj.weight'):
        weights.load_weights(vit(img_size=64, patch_size=8), state)
    with pytest.raises(InputError, match='of another shape: pos_embed'):
        weights.load_weights(vit(img_size=32), state, resize=False)


def test_row_05_other_models_do_not_load(tmp_path):
    model, state = nano(), nano().state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match='4 classes, the model 10'):
        weights.load_weights(model, {'model': nano(num_classes=4).state_dict()})
    with pytest.raises(InputError, match='of another shape') as error:
        weights.load_weights(model, {'model': nano(embed_dim=64).state_dict()})
    assert len(str(error.value).splitlines()) < 15
    with pytest.raises(InputError, match=r'\d+ not expected: .*stem'):
        weights.load_weights(model, {'model': timm.create_model('regnety_002').state_dict()})
    for key in ('blocks.3.attn.qkv.weight', 'norm.bias', 'pos_embed'):
        with pytest.raises(InputError, match=f'1 missing: {key}'):
            weights.load_weights(model, {'model': {k: v for k, v in state.items() if k != key}})
    published = model.to_published(state)
    del published['vs.3.v.weight']
    with pytest.raises(InputError, match='qks.3.qk.weight'):
        weights.load_weights(model, {'model': published})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def evolved(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=6, embed_dim=48, num_classes=10)
    return models.evolve(model.eval(), **kwargs)


@pytest.mark.parametrize('make', [nano, evolved])
def test_the_schedule_of_a_checkpoint_comes_with_its_weights(make, tmp_path, capsys):
    trained = make(keep_ratio=(0.75, 0.25), stages=(2, 5), representative='one').eval()
    trained.set_schedule(stage_wise=False)
    path, x = tmp_path / 'checkpoint.pth', torch.randn(2, 3, *trained.patch_embed.img_size)
    torch.save({'model': trained.state_dict(), 'schedule': trained.schedule()}, path)
    model = make().eval()
    models.load_weights(model, path)
    assert model.schedule() == trained.schedule() and torch.equal(model(x), trained(x))
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and f'{path}: the model now evolves as in training' in printed
    assert f'keep_ratio [0.75, 0.25] instead of {list(make().keep_ratio)}' in printed
    assert 'stage_wise False instead of True' in printed
    models.load_weights(model, path)
    assert not capsys.readouterr().out


def test_a_schedule_that_stays_is_said(tmp_path, capsys):
    """In fine-tuning the model's counts, and a dense model has none."""
    trained = evolved(keep_ratio=(0.75, 0.25))
    checkpoint = {'model': trained.state_dict(), 'schedule': trained.schedule()}
    model = evolved()
    models.load_weights(model, checkpoint, adapt=True)
    assert model.keep_ratio == (0.7, 0.3)
    assert (
        'keeps its own schedule; the weights were trained with keep_ratio [0.75, 0.25] instead of [0.7, 0.3]'
        in capsys.readouterr().out
    )
    dense = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=6, embed_dim=48, num_classes=10)
    models.load_weights(dense, checkpoint)
    printed = capsys.readouterr().out
    assert 'does not evolve' in printed and 'keep_ratio=[0.75, 0.25]' in printed and printed.count('\n') == 1
    models.load_weights(dense, {'model': trained.state_dict(), 'schedule': None})
    assert not capsys.readouterr().out


def test_the_schedule_of_another_method_is_not_taken_for_evolution(capsys):
    """Merging has no stages: with its schedule alone an evolved model would be dense without a word."""
    for method in ('drop', 'merge'):
        trained = models.apply(evolved(), method)
        checkpoint = {'model': trained.state_dict(), 'schedule': trained.schedule()}
        model = evolved()
        before = model.schedule()
        models.load_weights(model, checkpoint)
        assert model.schedule() == before
        assert f'the weights were trained with {method}; this model keeps evolve' in capsys.readouterr().out
        models.load_weights(models.apply(evolved(), method), checkpoint)
        assert not capsys.readouterr().out
        dense = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=6, embed_dim=48, num_classes=10)
        models.load_weights(dense, checkpoint)
        printed = capsys.readouterr().out
        assert f"models.apply(model, '{method}', ...)" in printed and 'models.evolve' not in printed


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('evo_deit_nano_patch4_32', dict(img_size=16, embed_dim=32)),
        ('EvoLeViT_128S', dict(img_size=64)),
        ('vit_tiny_patch16_224', dict(img_size=64, depth=2)),
        ('deit_tiny_distilled_patch16_224', dict(img_size=64, depth=2)),
        ('resnet10t', {}),
        ('convnext_atto', dict(depths=(1, 1, 1, 1))),
    ],
)
def test_a_model_without_classes_takes_weights_with_a_head(name, kwargs, capsys):
    torch.manual_seed(0)
    trained = timm.create_model(name, num_classes=10, **kwargs).eval()
    features = timm.create_model(name, num_classes=0, **kwargs).eval()
    loaded = models.load_weights(features, {'model': trained.state_dict()})
    unused = set(trained.state_dict()) - set(features.state_dict())
    assert set(loaded.dropped) == unused and unused and not loaded.missing
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and 'the model has no classes; the head of the weights is not loaded' in printed
    assert torch.equal(features.state_dict()[key := next(iter(trained.state_dict()))], trained.state_dict()[key])
    other = timm.create_model('resnet18', num_classes=10).state_dict()
    with pytest.raises(InputError, match='not expected'):
        models.load_weights(features, other)
