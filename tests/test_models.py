"""The registry: names, and sizes of images, for our models and timm's."""

import pytest
import timm
import torch

import models
from utils import InputError


@pytest.mark.parametrize(
    'wrong, first',
    [
        ('evo_deit_smal', 'evo_deit_small_patch16_224'),
        ('EVO_DEIT_TINY', 'evo_deit_tiny_patch16_224'),
        ('evodeit_tiny_patch16_224', 'evo_deit_tiny_patch16_224'),
        ('EvoLeViT_128s', 'EvoLeViT_128S'),
        ('evolevit256', 'EvoLeViT_256'),
        ('vit_small_patch16_225', 'vit_small_patch16_224'),
        ('resnet5', 'resnet50'),
    ],
)
def test_nearest_names(wrong, first):
    assert models.nearest_names(wrong).startswith(f'Nearest: {first},')


def test_ours_are_suggested_for_a_name_like_ours():
    near = models.nearest_names('evo_deit_smal').removeprefix('Nearest: ').split(', ')
    assert len(near) == 5 and all(name.startswith(('evo_deit', 'EvoLeViT')) for name in near)


@pytest.mark.parametrize(
    'name, size, message',
    [
        ('evo_deit_tiny_patch16_224', 200, 'expected a multiple of 16.*found 200: 8 pixels.*Nearest: 192 and 208'),
        ('deit_tiny_patch16_224', 200, 'expected a multiple of 16.*found 200: 8 pixels.*Nearest: 192 and 208'),
        ('vit_tiny_patch16_224', 10, 'found 10: 10 pixels.*Nearest: 16$'),
        ('swin_tiny_patch4_window7_224', 225, 'expected a multiple of 4.*Nearest: 224 and 228'),
        ('convnext_atto', 65, 'expected a multiple of 4.*Nearest: 64 and 68'),
        ('EvoLeViT_128S', 200, 'expected multiples of 16, found .200, 200.'),
    ],
)
def test_sizes_that_a_model_would_cut_are_refused(name, size, message):
    with torch.device('meta'), pytest.raises(InputError, match=message):
        models.create(name, 10, size)


def test_sizes_that_a_model_takes():
    for name, size in (('evo_deit_tiny_patch16_224', 208), ('deit_tiny_patch16_224', 192), ('resnet18', 201)):
        with torch.device('meta'):
            assert models.create(name, 10, size).num_classes == 10


def test_a_model_that_pads_takes_any_size():
    model = timm.create_model('vit_tiny_patch16_224', depth=1, dynamic_img_size=True, dynamic_img_pad=True)
    models.check_input_size(model, 'vit_tiny_patch16_224', 200)
    with pytest.raises(InputError, match='found 200'):
        models.check_input_size(timm.create_model('vit_tiny_patch16_224', depth=1), 'vit_tiny_patch16_224', 200)
