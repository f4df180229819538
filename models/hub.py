"""Save and load a model as a folder for timm and the Hugging Face hub: `model.safetensors` and `config.json`.

hub.save(model, 'folder')
timm.create_model('local-dir:folder', pretrained=True)  # our models evolve, a ViT of timm is dense
hub.load('local-dir:folder')  # each evolves as it was saved
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from timm.models import parse_model_name, save_for_hf
from timm.models._features import FeatureGetterNet
from timm.models._hub import download_from_hf
from torch import nn

from .evolving import SavedEvolution
from .vit import EvolvingViT, evolve
from .weights import InputError

FILES = 'model.safetensors', 'config.json'


def save(model: nn.Module, folder: str | Path, about: dict | None = None):
    """Save a model into a folder, with its schedule, its size and the preprocessing of images.

    Args:
        about: preprocessing in timm's names, if it is not that of the model's pretrained configuration, and `classes`,
            the names of the outputs in order.

    ValueError for a model with a rival's method, which `load` could not restore.
    """
    if 'update_group' in vars(model):
        raise ValueError('expected a model that is dense, or evolved by models.evolve, found one of another method')
    about, config, model_args = dict(about or {}), {}, {}
    if classes := about.pop('classes', None):
        config['label_names'] = classes
    if isinstance(model, SavedEvolution):
        # stage_wise and evolving are in its weights, as extra state.
        schedule = dict(keep_ratio=model.keep_ratio, stages=model.first_blocks, representative=model.representative)
        model_args = schedule | {'fused': model.fused}
    elif isinstance(model, EvolvingViT):
        config['evolve'] = model.schedule()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:  # previous files stay until all is written
        save_for_hf(model, temporary, config, model_args, safe_serialization=True, data_config=about)
        for name in FILES:
            os.replace(Path(temporary) / name, folder / name)


def load(source: str, **options) -> nn.Module:
    """Load the model of 'local-dir:FOLDER' or 'hf-hub:OWNER/NAME', with its weights and its schedule.

    `options` go to timm.create_model: num_classes=10 gives it a new head, features_only=True makes it a backbone.
    InputError for options that change the shape of saved weights, such as depth.
    """
    try:
        model = timm.create_model(source, pretrained=True, **options)
    except RuntimeError as error:
        if 'Error(s) in loading state_dict' not in str(error):
            raise
        raise InputError(f'{source}: the saved weights do not fit a model with {options}: {error}') from error
    kind, name = parse_model_name(source)
    path = Path(name) / 'config.json' if kind == 'local-dir' else download_from_hf(name, 'config.json')
    schedule = json.loads(Path(path).read_text()).get('evolve')
    if schedule:
        evolving = schedule.pop('evolving')
        network = model.model if isinstance(model, FeatureGetterNet) else model
        # timm drops the blocks after the last feature, and with them later stages.
        stages = [block for block in schedule['stages'] if block < len(network.blocks)]
        schedule |= {'stages': stages, 'keep_ratio': schedule['keep_ratio'][: len(stages)]}
        evolve(network, **schedule).evolving = evolving
    return model
