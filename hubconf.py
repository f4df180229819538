"""Entry points of torch.hub: our models by name, and `evolve` for any ViT of timm.

model = torch.hub.load('.', 'evo_deit_tiny_patch16_224', source='local', num_classes=10)
model = torch.hub.load('.', 'evolve', 'deit_tiny_patch16_224', source='local', pretrained=True)
"""

dependencies = ['torch', 'torchvision', 'timm', 'safetensors', 'numpy']

import timm  # noqa: E402

import models  # noqa: E402
from models.hub import load  # noqa: E402, F401


def evolve(name, keep_ratio=(0.7, 0.3), stages=None, representative='nearest', stage_wise=True, **options):
    """A ViT of timm with slow-fast evolution; `options` go to timm.create_model, such as pretrained=True."""
    return models.evolve(timm.create_model(name, **options), keep_ratio, stages, representative, stage_wise)


for _module in (models.evo_deit, models.evo_levit):
    globals().update({_name: timm.models.model_entrypoint(_name) for _name in _module.default_cfgs})
