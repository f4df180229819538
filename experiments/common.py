"""What the experiments share: methods at equal GMACs, a CSV that resumes, training, intervals, speed."""

import argparse
import base64
import copy
import csv
import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # experiments are run as scripts

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from timm.data import ImageNetInfo, create_transform, resolve_data_config  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.transforms import Compose  # noqa: E402

import models  # noqa: E402
from measure.costs import count_gmacs  # noqa: E402
from measure.results import circumstances  # noqa: E402
from measure.timing import progress, time_alternately  # noqa: E402
from utils import atomic_write  # noqa: E402

# Validation images of ImageNet. The defaults were chosen on the first list, and not on the second.
IMAGES = [ROOT / 'experiments' / f'imagenet_{n}.txt' for n in (500, 800)]
BUDGETS = 0.9, 0.8, 0.66, 0.55, 0.45  # fractions of dense GMACs
TOLERANCE = 0.09  # relative; a method that does not come closer to a budget has no row
EQUAL_GMACS = 0.08  # relative; methods whose GMACs differ by more are not compared


def around(t: float) -> tuple[float, float]:
    """Keep ratios of two stages, t + 0.2 and t - 0.2; closer to t where t is small."""
    # At a distance of 0.2 the last stage would keep almost nothing: see docs/log.md.
    distance = min(0.2, 0.4 * t)
    return round(min(t + distance, 1.0), 4), round(max(t - distance, 0.02), 4)


METHODS = 'nearest', 'none', 'one', 'drop', 'fuse', 'merge', 'merge_norm', 'random'
MERGING = 'merge', 'merge_norm'
# Merging schedules: ToMe's decreasing one, and merging only from the first evolving block on.
SCHEDULED = tuple(f'{schedule}, {method}' for schedule in ('decreasing', 'late') for method in MERGING)
# On smaller images: the method of models.apply, if any, and its arguments.
SMALLER = {
    'smaller image': (None, {}),
    'smaller, nearest': ('evolve', dict(keep_ratio=(0.7, 0.3), representative='nearest')),
    'smaller, merge': ('merge', dict(merge_r=8)),
}
# The schedules of the papers, for networks of 12 blocks: ours, Evo-ViT's, EViT's.
RECOMMENDED = {
    'nearest': dict(keep_ratio=(0.7, 0.3), representative='nearest'),
    'none': dict(keep_ratio=0.5, representative='none'),
    'one': dict(keep_ratio=0.5, representative='one'),
    'drop': dict(keep_ratio=0.7),
    'fuse': dict(keep_ratio=0.7),
}


def merge_rates(method: str, total: float, depth: int) -> int | tuple[int, ...]:
    """Patches merged per block (one number, or one per block), about `total` in all."""
    if method in MERGING:
        return round(total / depth)
    if method.startswith('decreasing'):  # linearly, from twice the mean to zero
        return tuple(round(2 * total / depth * (1 - i / (depth - 1))) for i in range(depth))
    dense = depth // 3
    return (0,) * dense + (round(total / (depth - dense)),) * (depth - dense)


def settings(method: str, t: float | str, model: nn.Module) -> tuple[str, dict]:
    """The method of models.apply, if any, and its arguments at t in (0, 1); GMACs grow with t.

    t = 'recommended' is the schedule of the method's own paper.
    """
    if method in SMALLER:
        return SMALLER[method]
    name = method.rpartition(', ')[2]
    if name in MERGING:
        patches, depth = model.patch_embed.num_patches, len(model.blocks)
        # At t = 0, none would be left after half of the blocks. ToMe's paper: 13 of 196 in each of 12 blocks.
        total = 12 * 13 / 196 * patches if t == 'recommended' else 2 * (1 - t) * patches
        return name, dict(merge_r=merge_rates(method, total, depth))
    if t == 'recommended':
        return method if method in ('drop', 'fuse') else 'evolve', RECOMMENDED[method]
    if method == 'random':
        return method, dict(keep_ratio=around(t))
    if method in ('drop', 'fuse'):
        return method, dict(keep_ratio=round(t, 4))
    return 'evolve', dict(keep_ratio=around(t), representative=method)


def schedule(method: str, t: float | str, model: nn.Module) -> str:
    """Arguments of a method at t, for the rows: 'keep_ratio 0.7 0.3, representative nearest'; '' for dense."""
    if method == 'dense':
        return ''
    size = dict(image_size=smaller(model, t)) if method in SMALLER else {}
    arguments = size | settings(method, t, model)[1]
    return ', '.join(f'{k} {" ".join(map(str, v)) if isinstance(v, tuple) else v}' for k, v in arguments.items())


def smaller(model: nn.Module, t: float) -> tuple[int, int]:
    """Height and width of the model's images times t, in whole patches."""
    patch, size = model.patch_embed.patch_size[0], model.patch_embed.img_size
    return tuple(patch * max(round(t * side / patch), 1) for side in size)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description as written; shows defaults."""


def get_parser(
    description: str,
    output: str,
    model: str = 'deit_tiny_patch16_224',
    pretrained: bool = True,
    speed: bool = True,
    several: bool = False,
) -> argparse.ArgumentParser:
    """The flags of every experiment; results go to OUTPUT.csv and OUTPUT.png."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    add, device = parser.add_argument, 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--model', default=model, metavar='NAME', help='a model of timm')
    if pretrained:
        add('--weights', required=True, metavar='PATH', help='its weights: .pth, .safetensors or URL')
    folders = {'nargs': '+'} if several else {}
    add('--data-path', required=True, metavar='PATH', help='folder of the data, see above', **folders)
    add('--output', default=f'experiments/{output}', metavar='PATH', help='writes PATH.csv and PATH.png')
    add('--device', default=device, help='cpu, cuda, ...')
    add('--batch-size', type=int, default=32, metavar='N', help='images per batch')
    if speed:
        add(
            '--speed', choices=['missing', 'all', 'none'], default='missing',
            help='rows whose speed is measured at the end, on a quiet machine; with none, nothing is plotted either',
        )  # fmt: skip
    return parser


@lru_cache(maxsize=1)
def pretrained(name: str, weights: str) -> nn.Module:
    """A model of timm with its weights. Copy it before changing it: it is cached, since a search needs it often."""
    model = timm.create_model(name)
    models.load_weights(model, weights)
    return model


def build(
    args: argparse.Namespace, method: str, t: float | str, img_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """The pretrained model in eval mode. `t` is the setting of the method or, in SMALLER, the scale of the image."""
    model = copy.deepcopy(pretrained(args.model, args.weights))
    if img_size is not None:
        model.set_input_size(img_size)
    if method in SMALLER:
        model.set_input_size(smaller(model, t))
    if method != 'dense':
        name, arguments = settings(method, t, model)
        if name:
            models.apply(model, name, **arguments)
    return model.eval().to(args.device)


def gmacs(model: nn.Module) -> float:
    """GMACs per image."""
    x = torch.zeros(1, 3, *model.patch_embed.img_size, device=next(model.parameters()).device)
    with torch.inference_mode():
        return count_gmacs(model, [x])


def find_setting(make: Callable[[float], nn.Module], target: float) -> float:
    """The t in (0, 1) at which the GMACs of `make(t)` are nearest to `target`, by bisection."""
    low, high, found = 0.0, 1.0, {}
    for _ in range(9):
        middle = (low + high) / 2
        found[middle] = gmacs(make(middle))
        low, high = (middle, high) if found[middle] <= target else (low, middle)
    return round(min(found, key=lambda t: abs(found[t] - target)), 4)


def combine(methods: Iterable[str], budgets: Iterable[float | str]) -> list[tuple[str, float | str]]:
    """Dense, and every method at every budget; 'recommended' only for methods whose paper recommends a schedule."""
    pairs = [(method, budget) for budget in budgets for method in methods]
    return [
        ('dense', 1.0),
        *(pair for pair in pairs if pair[1] != 'recommended' or pair[0] in (*RECOMMENDED, *MERGING)),
    ]


class Budgets:
    """Models at fractions of the dense GMACs. `make` builds a model from a method and its setting."""

    def __init__(self, make: Callable[[str, float | str], nn.Module]):
        self.make, self.dense, self._settings = make, make('dense', 1.0), {}
        self.dense_gmacs = gmacs(self.dense)

    def build(self, method: str, budget: float | str) -> tuple[float | str, nn.Module, float] | None:
        """Setting, model and GMACs of a method at a budget, or None if no setting comes within TOLERANCE of it."""
        key = method, budget
        if key not in self._settings:
            search = method != 'dense' and budget != 'recommended'
            make = partial(self.make, method)
            self._settings[key] = find_setting(make, budget * self.dense_gmacs) if search else budget
        t = self._settings[key]
        model = self.make(method, t)
        cost = gmacs(model)
        if budget != 'recommended' and abs(cost / (budget * self.dense_gmacs) - 1) > TOLERANCE:
            return None
        if method in SMALLER and smaller(self.dense, t) == tuple(self.dense.patch_embed.img_size):  # is not smaller
            return None
        return t, model, cost


class Rows:
    """A CSV file of results. Rows of the same setup (model, weights, sizes) are not computed again."""

    def __init__(self, path: Path, setup: dict):
        self.path, self.setup, self.rows = path, setup, []
        if path.exists():
            with open(path, newline='') as file:
                self.rows = [{k: _number(k, v) for k, v in row.items()} for row in csv.DictReader(file)]

    def ours(self) -> list[dict]:
        """The rows of this setup."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in self.setup.items())]

    def has(self, **key) -> bool:
        return any(all(row[name] == value for name, value in key.items()) for row in self.ours())

    def missing(self, keys: Iterable[tuple[str, float | str]]) -> list[tuple[str, float | str]]:
        """Methods and budgets without a row of this setup."""
        return [(method, budget) for method, budget in keys if not self.has(method=method, budget=budget)]

    def add(self, **row):
        """Add a row, with the circumstances of its measurement, and write the file."""
        row |= self.setup | circumstances(row.get('precision', 'fp32'))
        row = {k: float(f'{v:.5g}') if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        self.write()
        print(', '.join(f'{k} {v}' for k, v in list(row.items())[:10]), flush=True)

    def write(self):
        names, text = list(dict.fromkeys(name for row in self.rows for name in row)), io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, lambda file: file.write(text.getvalue().encode()))

    def measure(
        self,
        which: str,
        device: str,
        make: Callable[[str, float], nn.Module],
        batch_size: int,
        train: bool = False,
    ):
        """Measure img/s of the rows whose speed is missing, or of all, once per method and setting.

        `make` builds a model from both, on the device. GPU columns have the prefix `gpu_`, so a row can have both.
        """
        kind = 'gpu_' if torch.device(device).type == 'cuda' else ''
        pending = [row for row in self.ours() if which == 'all' or row.get(f'{kind}speedup', '') == '']
        groups = list(dict.fromkeys((row['method'], row['setting']) for row in pending))
        if which == 'none' or not groups:
            return
        conditions = circumstances('bf16' if kind else 'fp32', torch.device(device))
        dense = make('dense', 1.0)
        for key in groups:
            speed, speedups = images_per_second(make(*key), dense, batch_size, train=train)
            low, speedup, high = np.percentile(speedups, (10, 50, 90)).tolist()
            measured = dict(images_per_second=round(speed, 2), speedup=round(speedup, 3))
            measured |= dict(speedup_p10=round(low, 3), speedup_p90=round(high, 3), speed_batch=batch_size)
            measured |= {f'speed_{name}': value for name, value in conditions.items()}
            for row in pending:
                if (row['method'], row['setting']) == key:
                    row.update({f'{kind}{name}': value for name, value in measured.items()})
            print(*key, f'{speed:.1f} img/s, speed-up {speedup:.2f}', flush=True)
            self.write()


def _number(column: str, text: str) -> float | int | str:
    for kind in (int, float) if column != 'commit' else ():  # a hash such as 3e80123 would become a float
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def add_images(parser: argparse.ArgumentParser, several: bool = False):
    """The flags that select images of ImageNet, from one folder or from several."""
    kind, what = (dict(nargs='+'), 'for each folder, numbers') if several else ({}, 'numbers')
    parser.add_argument(
        '--images', default=IMAGES if several else IMAGES[0], metavar='FILE', **kind,
        help=f'{what} of the validation images to use; all: every image in the folder',
    )  # fmt: skip
    parser.add_argument('--limit', type=int, metavar='N', help='only the first N images, for a trial')


def find_sets(args: argparse.Namespace) -> dict[str, tuple[list[Path], Tensor]]:
    """Image files and labels of each folder of --data-path, by the name of its set."""
    lists = args.images[: len(args.data_path)] if args.images is IMAGES else args.images
    if len(lists) != len(args.data_path):
        raise SystemExit(
            f'--images: expected a list for each of {len(args.data_path)} folders of --data-path, found {len(lists)}'
        )
    sets = {}
    for folder, images in zip(args.data_path, lists, strict=True):
        name = Path(folder).name if images == 'all' else Path(images).stem
        if name in sets:
            raise SystemExit(f'--data-path, --images: expected sets of different names, found {name} twice')
        sets[name] = find_images(folder, images, args.limit)
    return sets


def find_images(folder: str | Path, images: str | Path, limit: int | None = None) -> tuple[list[Path], Tensor]:
    """Files and labels of the images of a list, or 'all', from folders named by ImageNet's synsets."""
    root = Path(folder)
    root = root / 'val' if (root / 'val').is_dir() else root
    label = {synset: i for i, synset in enumerate(ImageNetInfo().label_names())}
    paths = sorted(path for path in root.glob('*/*') if path.parent.name in label)
    if not paths:
        raise SystemExit(f'{root}: expected folders named by synsets, such as n01440764, with images')
    if images != 'all':
        try:
            names = {f'ILSVRC2012_val_{int(number):08}' for number in Path(images).read_text().split()}
        except (OSError, ValueError) as error:
            raise SystemExit(f'--images {images}: expected a file of numbers, or all: {error}') from error
        found = [path for path in paths if path.stem in names]
        if missing := names - {path.stem for path in found}:
            raise SystemExit(
                f'{root}: expected the images of {images}, found {len(found)} of {len(names)}; {min(missing)}.JPEG is '
                f'missing. --images all uses the {len(paths)} images that are there'
            )
        paths = found
    paths = paths[:limit]
    if not paths:
        raise SystemExit(f'--images {images}, --limit {limit}: expected images, found none')
    return paths, torch.tensor([label[path.parent.name] for path in paths])


def load_images(paths: list[Path], model: nn.Module) -> Tensor:
    """Images (n, 3, H, W), preprocessed for the model at its current size."""
    size = 3, *model.patch_embed.img_size
    transform = create_transform(**resolve_data_config({'input_size': size}, model=model), is_training=False)
    return torch.stack([transform(Image.open(path).convert('RGB')) for path in progress(paths, 'loading images')])


def pack(values: Tensor) -> str:
    """Values of images, (n,), as text in a row, so that paired intervals can be computed later.

    Booleans become hexadecimal bits, numbers float16 in base64.
    """
    if values.dtype == torch.bool:
        return '0x' + np.packbits(values.cpu().numpy()).tobytes().hex()
    return 'f16:' + base64.b64encode(values.cpu().numpy().astype('<f2').tobytes()).decode()


def unpack(text: str, n: int) -> Tensor:
    """The values that were packed, (n,), as float32."""
    if text.startswith('0x'):
        values = np.unpackbits(np.frombuffer(bytes.fromhex(text[2:]), dtype=np.uint8))[:n]
    else:
        values = np.frombuffer(base64.b64decode(text.removeprefix('f16:')), dtype='<f2')
    return torch.from_numpy(values.astype(np.float32))


def image_transform(config: dict) -> tuple[int, Callable, Callable]:
    """From timm's configuration of a model: the crop in px, and transforms that resize and normalize a PIL image."""
    resize, *_, to_tensor, normalize = create_transform(**config, is_training=False).transforms
    return config['input_size'][-1], resize, Compose([to_tensor, normalize])


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Mean of values (n,), and half of its 95 % interval."""
    values = values.double().cpu()
    deviation = values.std().item() if len(values) > 1 else math.inf
    return values.mean().item(), 1.96 * deviation / math.sqrt(len(values))


def paired_interval(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Mean of the paired difference of two (n,) tensors, and half of its 95 % interval."""
    return mean_interval(ours.double() - theirs.double())


def train(flags: Sequence, folder: Path) -> dict:
    """Run or resume main_deit.py in its own process; returns the last record of its log."""
    _run_main([*flags, '--output_dir', folder, '--auto-resume'])
    return json.loads((folder / 'log.txt').read_text().splitlines()[-1])


def evaluate(flags: Sequence, folder: Path) -> float:
    """Top-1 of the last checkpoint of a run, by main_deit.py."""
    results = folder / 'evaluation.json'
    _run_main([*flags, '--eval', '--resume', folder / 'checkpoint.pth', '--results-file', results])
    return json.loads(results.read_text())['acc1']


def _run_main(flags: Sequence):
    subprocess.run([str(word) for word in (sys.executable, ROOT / 'main_deit.py', *flags)], check=True)


def run_seeds(rows: Rows, seeds: Iterable[int], methods: Iterable[str], run: Callable[[str, int], dict]):
    """Add the missing rows of each method and seed; `run` makes them."""
    for seed in seeds:
        for method in methods:
            if not rows.has(method=method, seed=seed):
                started = time.perf_counter()
                row = dict(method=method, seed=seed) | run(method, seed)
                rows.add(**row, seconds=round(time.perf_counter() - started))


def method_flags(method: str, arguments: dict) -> list[str]:
    """Flags of main_deit.py for a method of models.apply."""
    flags = ['--method', method]
    for name, value in arguments.items():
        flags += [f'--{name.replace("_", "-")}', *(value if isinstance(value, tuple) else [value])]
    return [str(flag) for flag in flags]


def t_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean of a few values, and half of its 95 % interval by Student's t, infinite for one value."""
    values = torch.tensor(list(values), dtype=torch.float64)
    n = len(values)
    if n < 2:
        return values.mean().item(), math.inf
    # Of n - 1 degrees of freedom; beyond 6 values that of 6, which makes the interval wider.
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(n, 2.571)
    return values.mean().item(), quantile * values.std().item() / math.sqrt(n)


def images_per_second(
    model: nn.Module, dense: nn.Module, batch_size: int, turns: int = 15, train: bool = False
) -> tuple[float, np.ndarray]:
    """Median img/s of a model, and its speed-up over dense in each turn of the two, (turns,).

    Of inference, or with `train` of AdamW steps; autocast to bfloat16 on GPUs. Each model gets images of its own size.
    """
    steps = [_make_step(each, batch_size, train) for each in (dense, model)]
    seconds = time_alternately(steps, turns, 1, next(model.parameters()).device)
    return batch_size / np.median(seconds[:, 1]).item(), seconds[:, 0] / seconds[:, 1]


def _make_step(model: nn.Module, batch_size: int, train: bool) -> Callable:
    device = next(model.parameters()).device
    x = torch.randn(batch_size, 3, *model.patch_embed.img_size, device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda'):
            return model(x)

    if not train:
        model.eval()
        return torch.inference_mode()(forward)
    targets = torch.zeros(batch_size, dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.0)

    def step():
        logits = forward()
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_seeds(rows: Sequence[dict], method: str, other: str) -> tuple[float, float, int]:
    """Mean difference in top-1 of two methods, half of its 95 % interval, and the number of pairs.

    A pair shares seed and device, because devices train in different precision.
    """
    ours, theirs = (
        {(row['seed'], row['device']): row['top1'] for row in rows if row['method'] == each} for each in (method, other)
    )
    both = ours.keys() & theirs.keys()
    return *t_interval(ours[pair] - theirs[pair] for pair in both), len(both)


def verdict(difference: float, half: float) -> str:
    """The rule of all experiments: if the interval contains 0, two methods do not differ significantly."""
    return 'no significant difference' if abs(difference) <= half else 'better' if difference > 0 else 'worse'


def report(rows: Sequence[dict], reference: str, measures: dict[str, tuple[str, float, int, int]]):
    """Print the paired differences of a method to all others at equal GMACs (EQUAL_GMACS), with the verdicts.

    `measures` are packed columns with (unit, factor, digits, sign); the sign is 1 if higher is better, else -1.
    """
    ours = {row['budget']: row for row in rows if row['method'] == reference}
    for row in rows:
        mine = ours.get(row['budget'])
        if mine is None or row is mine or abs(row['gmacs'] / mine['gmacs'] - 1) > EQUAL_GMACS:
            continue
        found = []
        for column, (unit, scale, digits, sign) in measures.items():
            off, half = paired_interval(*(scale * unpack(each[column], each['n']) for each in (mine, row)))
            found.append(f'{off:+.{digits}f} ± {half:.{digits}f} {unit}, {verdict(sign * off, half)}')
        print(f'{reference} at budget {row["budget"]}, to {row["method"]}: {"; ".join(found)}')
