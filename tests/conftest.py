"""What several test files share: a small folder of images, scripts run in this process, small networks."""

import argparse
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import engine
import main_deit
from image_data.shapes import Shapes

ROOT = Path(__file__).parent.parent
NANO = [
    *('--model', 'evo_deit_nano_patch4_32', '--input-size', 32, '--batch-size', 16, '--num_workers', 0),
    *('--device', 'cpu', '--print-freq', 1),
]
TRAINED = ['--epochs', 2, '--lr', 0.05, '--warmup-epochs', 0, '--model-ema-decay', 0.5]

torch.set_num_threads(1)  # small models; threads that wait for each other on busy cores cost more


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """train/ with 64 and val/ with 30 images of 32 px in 4 classes."""
    root = tmp_path_factory.mktemp('images')
    for split, count in (('train', 64), ('val', 30)):
        shapes = Shapes(split, 32)
        for i in range(count):
            image, _ = shapes[i]
            folder = root / split / f'class{i % 4}'
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def flags(image_folder):
    """Flags of a small training."""
    return [*NANO, '--data-path', image_folder]


def run_main(name: str, *flags):
    """Run a script's main with flags, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [f'{name}.py', *map(str, flags)])
        try:
            importlib.import_module(name).main()
        finally:  # training handles both signals
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def script(capfd):
    """Run a script's main with flags; returns what it printed."""

    def run(name: str, *flags) -> str:
        run_main(name, *flags)
        return capfd.readouterr().out

    return run


@pytest.fixture(scope='session')
def trained_run(flags, tmp_path_factory):
    """Folder of a finished run of two epochs, layer-wise and stage-wise, for tests that only read it."""
    folder = tmp_path_factory.mktemp('trained')
    run_main('main_deit', *flags, *TRAINED, '--eval-ema', '--output_dir', folder)
    return folder


def arguments(*flags, recipe: dict = main_deit.RECIPE) -> argparse.Namespace:
    """The flags of a training script, parsed."""
    return engine.get_parser('', recipe).parse_args([str(flag) for flag in flags])


def read_log(folder) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def accuracy(printed: str) -> str:
    """The last top-1 that was printed."""
    return re.findall(r'\* Acc@1 (\S+)', printed)[-1]


def launch(*command) -> subprocess.Popen:
    """Start `python -m` with a launcher's command in the project's folder."""
    kept = {key: value for key, value in os.environ.items() if key not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-m', *map(str, command)], cwd=ROOT, env=kept | {'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


# --- networks


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(model: nn.Module, batch: int = 2) -> Tensor:
    """Noise of the size that a model takes."""
    size = model.img_size if hasattr(model, 'img_size') else model.patch_embed.img_size
    return noise(batch, 3, *size, seed=batch)


def nano(**kwargs) -> nn.Module:
    """A small Evo-DeiT in evaluation, 16 patches."""
    torch.manual_seed(0)
    arguments = dict(img_size=16, num_classes=10, embed_dim=32) | kwargs
    return timm.create_model('evo_deit_nano_patch4_32', **arguments).eval()


def small_vit(name: str = 'vit_tiny_patch16_224', **kwargs) -> nn.Module:
    """A ViT of timm, five narrow blocks on 5 x 5 patches, its weights not so mild that every selection is as good."""
    torch.manual_seed(0)
    arguments = dict(depth=5, embed_dim=192, num_heads=3, img_size=70 if 'patch14' in name else 80, num_classes=10)
    model = timm.create_model(name, **(arguments | kwargs)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model


def without_gradient(model: nn.Module) -> list[str]:
    """Parameters that have no gradient, or one that is not finite."""
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def untouched(model: nn.Module) -> list[str]:
    """Parameters that have no gradient, or one of zeros, where one is due."""
    names = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to all keys of a softmax changes nothing; its gradient is rounding.
    return [name for name in names if not name.endswith(('qkv.bias', 'k_norm.bias'))]
