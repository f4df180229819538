"""What the experiments share: methods at equal arithmetic, a CSV that resumes, intervals, circumstances."""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # experiments are run as scripts

import timm  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import models  # noqa: E402
from costs import count_gmacs  # noqa: E402
from models import rivals  # noqa: E402
from results import circumstances  # noqa: E402

BUDGETS = 0.9, 0.8, 0.66, 0.55, 0.45  # of the dense model's GMACs


def evolve(representative: str) -> Callable[[nn.Module, float], nn.Module]:
    """A method of one number t in (0, 1): ratios around t, as 0.7 and 0.3 are around 0.5."""

    def apply(model: nn.Module, t: float) -> nn.Module:
        return models.evolve(model, (min(t + 0.2, 1.0), max(t - 0.2, 0.02)), representative=representative)

    return apply


# Each takes a dense ViT and a number in (0, 1): the more, the more arithmetic.
METHODS: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    'nearest': evolve('nearest'),
    'none': evolve('none'),
    'one': evolve('one'),
    'drop': lambda model, t: rivals.apply(model, 'drop', keep_ratio=t),
    'fuse': lambda model, t: rivals.apply(model, 'fuse', keep_ratio=t),
    'merge': lambda model, t: rivals.apply(model, 'merge', r=merged_per_block(model, t)),
    'random': lambda model, t: rivals.apply(model, 'random', keep_ratio=(min(t + 0.2, 1.0), max(t - 0.2, 0.02))),
}


def merged_per_block(model: nn.Module, t: float) -> int:
    """How many patches each block merges, so that t of them would be left after the last."""
    return round((1 - t) * model.patch_embed.num_patches / len(model.blocks))


def add_arguments(parser: argparse.ArgumentParser, output: str):
    """Flags of every experiment; results go to OUTPUT.csv and OUTPUT.png."""
    parser.add_argument('--model', default='deit_tiny_patch16_224', help="a ViT of timm's that models.evolve takes")
    parser.add_argument('--weights', required=True, metavar='PATH', help='its weights: .pth, .safetensors or URL')
    parser.add_argument('--data-path', required=True, metavar='PATH')
    parser.add_argument('--output', default=f'experiments/{output}', metavar='PATH', help='without an ending')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=50)
    parser.add_argument('--limit', type=int, metavar='N', help='only the first N images, to try it')


def build(args: argparse.Namespace, method: str, t: float, img_size: int | tuple[int, int] | None = None) -> nn.Module:
    """The pretrained model in evaluation, dense or with a method at t."""
    model = timm.create_model(args.model)
    models.load_weights(model, args.weights)
    if img_size is not None:
        model.set_input_size(img_size)
    model = model if method == 'dense' else METHODS[method](model, t)
    return model.eval().to(args.device)


def gmacs(model: nn.Module) -> float:
    """GMACs an image, of the matrix products, convolutions and attentions."""
    x = torch.zeros(1, 3, *model.patch_embed.img_size, device=next(model.parameters()).device)
    with torch.inference_mode():
        return count_gmacs(model, [x])


def find_setting(make: Callable[[float], nn.Module], target: float) -> float:
    """The number t in (0, 1) at which a method has at most `target` GMACs, to within a hundredth of them if it can."""
    low, high = 0.0, 1.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if gmacs(make(middle)) <= target else (low, middle)
    return round(low, 4)


class Rows:
    """A CSV file of results; what it has of the same setup (model, weights, sizes) is not computed again."""

    def __init__(self, path: Path, setup: dict):
        self.path, self.setup, self.rows = path, setup, []
        if path.exists():
            with open(path, newline='') as file:
                self.rows = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]

    def ours(self) -> list[dict]:
        """The rows of this setup."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in self.setup.items())]

    def has(self, **key) -> bool:
        return any(all(row[name] == value for name, value in key.items()) for row in self.ours())

    def add(self, **row):
        """Write a row, with the circumstances of its measurement, and keep the file whole."""
        row = {
            k: float(f'{v:.5g}') if isinstance(v, float) else v for k, v in (row | self.setup | circumstances()).items()
        }
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix('.tmp')
        with open(temporary, 'w', newline='') as file:
            writer = csv.DictWriter(file, list(row), lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)
        print(', '.join(f'{k} {v}' for k, v in list(row.items())[:10]), flush=True)


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def paired_interval(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Mean of the paired difference of two (n,) tensors, and half of its 95 % interval."""
    difference = (ours.double() - theirs.double()).cpu()
    return difference.mean().item(), 1.96 * difference.std().item() / math.sqrt(len(difference))


def images_per_second(model: nn.Module, dense: nn.Module, batch_size: int, turns: int = 5) -> tuple[float, float]:
    """Images a second of a model, and how many times faster than dense it is: medians, the two measured in turns."""
    device = next(model.parameters()).device
    x = torch.randn(batch_size, 3, *model.patch_embed.img_size, device=device)
    seconds = {model: [], dense: []}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for each in (dense, model):
                started = time.perf_counter()
                each(x)
                if device.type == 'cuda':
                    torch.cuda.synchronize()
                if turn:  # the first is a warm-up
                    seconds[each].append(time.perf_counter() - started)
    ratios = torch.tensor(seconds[dense]) / torch.tensor(seconds[model])
    return batch_size / torch.tensor(seconds[model]).median().item(), ratios.median().item()
