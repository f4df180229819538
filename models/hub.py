"""A model as a folder that timm and the Hugging Face hub read: `model.safetensors` and `config.json`.

hub.save(model, 'folder')
timm.create_model('local-dir:folder', pretrained=True)  # ours evolves; a ViT of timm is the dense one
hub.load('local-dir:folder')  # each as it was saved
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from timm.models import parse_model_name, save_for_hf
from timm.models._hub import download_from_hf
from torch import nn

from .evolving import SavedEvolution
from .vit import EvolvingViT, evolve

FILES = 'model.safetensors', 'config.json'


def save(model: nn.Module, folder: str | Path, about: dict | None = None):
    """Write a model into a folder, with its schedule, its size and what it expects of images.

    Args:
        about: preprocessing in timm's names, where it is not what the model was published with, and `classes`, their
            names in the order of the outputs.

    ValueError for a model that evolves by another method, which could not be made again.
    """
    if 'update_group' in vars(model):
        raise ValueError('expected a model that is dense, or evolved by models.evolve; found one of another method')
    about, config, model_args = dict(about or {}), {}, {}
    if classes := about.pop('classes', None):
        config['label_names'] = classes
    if isinstance(model, SavedEvolution):
        # When it selects is in its weights, the extra state.
        schedule = dict(keep_ratio=model.keep_ratio, stages=model.first_blocks, representative=model.representative)
        model_args = schedule | {'fused': model.fused}
    elif isinstance(model, EvolvingViT):
        config['evolve'] = model.schedule()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as whole:  # what was there before stays until all is written
        save_for_hf(model, whole, config, model_args, safe_serialization=True, data_config=about)
        for name in FILES:
            os.replace(Path(whole) / name, folder / name)


def load(source: str, **options) -> nn.Module:
    """The model of 'local-dir:FOLDER' or 'hf-hub:OWNER/NAME' with its weights, evolving as it did when it was saved.

    `options` go to timm.create_model: num_classes=10 gives it a new head.
    """
    model = timm.create_model(source, pretrained=True, **options)
    kind, name = parse_model_name(source)
    path = Path(name) / 'config.json' if kind == 'local-dir' else download_from_hf(name, 'config.json')
    schedule = json.loads(Path(path).read_text()).get('evolve')
    if schedule:
        evolving = schedule.pop('evolving')
        evolve(model, **schedule).evolving = evolving
    return model
