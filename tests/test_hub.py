"""A folder for timm and the Hugging Face hub gives the model back as it was, and hubconf.py the models by name."""

import json

import pytest
import timm
import torch
from conftest import ROOT

import hubconf
import models
from models import hub, rivals
from models.weights import InputError

NANO = 'evo_deit_nano_patch4_32'


def logits(model: torch.nn.Module, size: int) -> torch.Tensor:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize(
    'name, size, options, attributes',
    [
        (NANO, 32, dict(num_classes=10), {}),
        (NANO, 64, dict(img_size=64, stages=(2, 5), keep_ratio=(0.6, 0.3)), dict(stage_wise=False)),
        (NANO, 32, {}, dict(representative='nearest', keep_ratio=0.3, global_pool='token')),
        ('EvoLeViT_128S', 64, dict(img_size=64, num_classes=7), dict(learned_tradeoff=False, keep_ratio=0.3)),
        ('EvoLeViT_128S', 64, dict(img_size=64, stages=(3, 6), representative='none'), dict(evolving=False)),
    ],
)
def test_timm_creates_a_saved_model(name, size, options, attributes, fused, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for attribute, value in attributes.items():
        setattr(model, attribute, value)
    model = model.fuse() if fused else model
    hub.save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    created = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    torch.testing.assert_close(logits(created, size), logits(model, size), rtol=0, atol=0)
    assert created.schedule() == model.schedule() and created.fused == fused


def test_a_vit_of_timm_is_dense_for_timm_and_evolves_with_hub_load(tmp_path):
    model = timm.create_model('test_vit', img_size=64, num_classes=5)
    dense = logits(model, 64)
    model = models.evolve(model, (0.6, 0.2), stages=(1, 4), representative='one', stage_wise=False)
    hub.save(model, tmp_path)
    torch.testing.assert_close(logits(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), 64), dense)
    loaded = hub.load(f'local-dir:{tmp_path}')
    assert not torch.equal(logits(model, 64), dense)
    torch.testing.assert_close(logits(loaded, 64), logits(model, 64), rtol=0, atol=0)
    assert loaded.schedule() == model.schedule()
    assert logits(hub.load(f'local-dir:{tmp_path}', num_classes=3), 64).shape == (2, 3)


@pytest.mark.parametrize('out_indices', [(1, 3), (0,)])
def test_a_saved_vit_is_a_backbone_that_evolves(out_indices, tmp_path):
    model = models.evolve(timm.create_model('test_vit', img_size=64), (0.6, 0.2), stages=(1, 4)).eval()
    hub.save(model, tmp_path)
    backbone = hub.load(f'local-dir:{tmp_path}', features_only=True, out_indices=out_indices).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=list(out_indices), intermediates_only=True)
    torch.testing.assert_close(backbone(x), expected)


def test_options_that_do_not_fit_saved_weights_are_named(tmp_path):
    hub.save(models.evolve(timm.create_model('test_vit', img_size=64)), tmp_path)
    with pytest.raises(InputError, match=r"do not fit a model with \{'depth': 4\}"):
        hub.load(f'local-dir:{tmp_path}', depth=4)


def test_a_hub_address_is_downloaded_by_timm(tmp_path, monkeypatch):
    """The hub's own downloads are replaced by this folder."""
    model = models.evolve(timm.create_model('test_vit', img_size=64), 0.5)
    hub.save(model, tmp_path)

    def download(*names, **kwargs):
        return str(tmp_path / (kwargs.get('filename') or names[-1]))

    monkeypatch.setattr('timm.models._hub.hf_hub_download', download)
    torch.testing.assert_close(logits(hub.load('hf-hub:somebody/model'), 64), logits(model, 64), rtol=0, atol=0)


def test_images_and_classes_are_in_the_configuration(tmp_path):
    model = timm.create_model('evo_deit_nano_patch4_32', num_classes=2)
    about = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, crop_pct=1.0, classes=['cat', 'dog'])
    hub.save(model, tmp_path, about)
    created = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    config = timm.data.resolve_model_data_config(created)
    found = tuple(config['mean']), config['crop_pct'], tuple(config['input_size'])
    assert found == (about['mean'], about['crop_pct'], about['input_size'])
    assert json.loads((tmp_path / 'config.json').read_text())['label_names'] == ['cat', 'dog']
    assert about['classes'] == ['cat', 'dog']


def test_a_model_of_another_method_is_refused_and_what_was_there_stays(tmp_path):
    model = timm.create_model('test_vit', img_size=64)
    hub.save(model, tmp_path)
    before = (tmp_path / 'config.json').read_bytes()
    with pytest.raises(ValueError, match='another method'):
        hub.save(rivals.apply(model, 'drop', keep_ratio=0.5), tmp_path)
    assert (tmp_path / 'config.json').read_bytes() == before


def test_torch_hub_has_our_models_and_evolve():
    names = [*models.evo_deit.default_cfgs, *models.evo_levit.default_cfgs, 'evolve', 'load']
    assert all(callable(getattr(hubconf, name)) for name in names) and len(names) == 23
    model = torch.hub.load(str(ROOT), 'evo_deit_nano_patch4_32', source='local', num_classes=10, keep_ratio=0.3)
    assert model.keep_ratio == (0.3, 0.3) and logits(model, 32).shape == (2, 10)
    evolved = torch.hub.load(str(ROOT), 'evolve', 'test_vit', source='local', keep_ratio=(0.6, 0.2), img_size=64)
    assert evolved.keep_ratio == (0.6, 0.2) and logits(evolved, 64).shape == (2, 1000)
