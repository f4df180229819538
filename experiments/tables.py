"""Generate the tables of README.md and docs/ from measured rows.

    python3 -m experiments.tables            # rewrite the text between <!-- table: NAME --> and <!-- end -->
    python3 -m experiments.tables --check    # exit with an error if a table is not up to date

Every number in these tables comes from a row of experiments/*.csv or docs/benchmarks/*.csv. `*` marks a paired
difference whose 95 % interval excludes 0.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'experiments')]

from common import EQUAL_GMACS, Rows, compare_seeds, paired_interval, t_interval, unpack, verdict  # noqa: E402

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)', re.S)
JUDGE, CHOICE, BOTH = 'imagenet_800', 'imagenet_500', 'imagenet_500+imagenet_800'
NAMES = {
    'dense': 'dense', 'nearest': '**evolved** (`nearest`)', 'merge': 'ToMe (`merge`)', 'merge_norm': '`merge_norm`',
    'decreasing, merge': 'decreasing `merge`', 'decreasing, merge_norm': 'decreasing `merge_norm`',
    'late, merge': 'late `merge`', 'late, merge_norm': 'late `merge_norm`', 'smaller image': 'smaller image',
    'smaller, nearest': 'evolved smaller image', 'smaller, merge': 'merged smaller image', 'fuse': 'EViT (`fuse`)',
    'drop': '`drop`', 'none': '`none` (as in Evo-ViT)', 'one': '`one`', 'random': '`nearest`, random scores',
}  # fmt: skip
SHORT = NAMES | {'merge': '`merge`', 'fuse': '`fuse`', 'none': '`none`'}  # in lists
TABLES = {}


def table(function: Callable) -> Callable:
    """Register a function that returns a table, under its own name."""
    TABLES[function.__name__.replace('_', '-')] = function
    return function


@cache
def read(path: str) -> list[dict]:
    """The rows of a CSV, numbers as numbers."""
    return Rows(ROOT / path, {}).rows


def select(path: str, **key) -> list[dict]:
    """The rows of a CSV that have these values."""
    return [row for row in read(path) if all(row.get(name) == value for name, value in key.items())]


def find(path: str, **key) -> dict | None:
    """The one row of a CSV that has these values, None if there is none."""
    rows = select(path, **key)
    if len(rows) > 1:
        raise ValueError(f'{path}: expected one row with {key}, found {len(rows)}')
    return rows[0] if rows else None


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(line).rstrip() + ' |' for line in (header, ['---'] * len(header), *lines))


def signed(value: float, digits: int = 1) -> str:
    text = f'{value:+.{digits}f}'
    return text[1:] if float(text) == 0 else text.replace('-', '−')


def difference(off: float, half: float, digits: int = 1) -> str:
    """A paired difference with its interval, starred where that excludes 0."""
    return f'{signed(off, digits)} ± {half:.{digits}f}' + ('\\*' if abs(off) > half else '')


def interval(row: dict, name: str = 'off', digits: int = 1) -> str:
    """A difference whose interval has two ends, starred where these exclude 0."""
    low, high = row[f'{name}_low'], row[f'{name}_high']
    star = '\\*' if low > 0 or high < 0 else ''
    return f'{signed(row[name], digits)} ({signed(low, digits)} to {signed(high, digits)}){star}'


def speed(row: dict | None, column: str = 'speedup') -> str:
    return f'{row[column]:.2f}' if row and row.get(column, '') != '' else 'not measured'


# --- classification without training

FREE = 'experiments/training_free.csv'
FRACTIONS = 0.9, 0.8, 0.66, 0.55, 0.45
FREE_METHODS = (
    'nearest', 'merge', 'merge_norm', 'decreasing, merge', 'decreasing, merge_norm', 'smaller image', 'fuse', 'drop',
    'none', 'one', 'random',
)  # fmt: skip


def by_fraction(
    cell: Callable[[dict], str], methods: Sequence[str] = FREE_METHODS, fractions: Sequence[float] = FRACTIONS
) -> str:
    """A line for each method, a column for each fraction of dense GMACs."""
    lines = []
    for method in methods:
        rows = [find(FREE, images=JUDGE, method=method, budget=fraction) for fraction in fractions]
        if any(rows):
            lines.append([NAMES[method], *(cell(row) if row else '' for row in rows)])
    return markdown(['fraction of dense GMACs', *(f'{fraction:.2f}' for fraction in fractions)], lines)


@table
def training_free() -> str:
    return by_fraction(
        lambda row: difference(row['off'], row['interval']) + (f', {speed(row)}' if row.get('speedup') else '')
    )


@table
def training_free_kl() -> str:
    def cell(row: dict) -> str:
        cosine = f', {row["grid"]:.3f}' if row['grid'] != '' else ''
        return f'{row["kl"]:.4f}, {row["same"]:.1f}{cosine}'

    methods = 'nearest', 'merge', 'merge_norm', 'smaller image', 'fuse', 'none', 'random'
    return by_fraction(cell, methods, (0.8, 0.66, 0.55))


@table
def training_free_sets() -> str:
    """What the sets say of the same rows: the one that choices were made on, the one that judges, both together."""
    lines = []
    for method in ('nearest', 'merge'):
        for fraction in (0.66, 0.55):
            rows = [find(FREE, images=images, method=method, budget=fraction) for images in (CHOICE, JUDGE, BOTH)]
            if all(rows):
                cells = (f'{difference(row["off"], row["interval"])}, {row["kl"]:.4f}' for row in rows)
                lines.append([NAMES[method], f'{fraction:.2f}', *cells])
    dense = {images: find(FREE, images=images, method='dense') for images in (CHOICE, JUDGE, BOTH)}
    what = 'used to choose the defaults', 'test', 'both'
    heads = (f'{row["n"]:.0f} images ({word})' for row, word in zip(dense.values(), what, strict=True))
    return markdown(['', 'fraction', *heads], lines)


@table
def training_free_smaller() -> str:
    lines, dense = [], find(FREE, images=JUDGE, method='dense')['gmacs']
    for method in ('smaller, nearest', 'smaller, merge', 'smaller image'):
        for row in sorted(select(FREE, images=JUDGE, method=method), key=lambda row: -row['gmacs']):
            size = re.search(r'image_size (\d+)', row['schedule'])[1]
            off = difference(row['off'], row['interval'])
            lines.append([NAMES[method], size, f'{row["gmacs"] / dense:.2f}', off, f'{row["kl"]:.3f}', speed(row)])
    unique = [line for i, line in enumerate(lines) if line not in lines[:i]]
    return markdown(['', 'px', 'fraction', 'top-1 minus dense', 'KL', 'speed-up'], unique)


def compare_images(ours: dict, theirs: dict, column: str, scale: float = 1) -> tuple[float, float]:
    """The paired difference of two rows over their images, and half of its 95 % interval."""
    return paired_interval(*(scale * unpack(row[column], int(row['n'])) for row in (ours, theirs)))


def split(pairs: Sequence[tuple[dict, dict]], column: str, sign: int) -> list[str]:
    """Of pairs of rows: the second methods that the first is better than, and those that it is worse than."""
    found = {'better': [], 'worse': [], 'no significant difference': []}
    for ours, theirs in pairs:
        off, half = compare_images(ours, theirs, column)
        found[verdict(sign * off, half)].append(SHORT[theirs['method']])
    better, worse = found['better'], found['worse']
    return ['all others' if len(names) == len(pairs) else ', '.join(names) or '–' for names in (better, worse)]


@table
def training_free_verdicts() -> str:
    lines = []
    for fraction in FRACTIONS:
        mine = find(FREE, images=JUDGE, method='nearest', budget=fraction)
        methods = *FREE_METHODS[1:], 'smaller, nearest', 'smaller, merge'
        others = [find(FREE, images=JUDGE, method=method, budget=fraction) for method in methods]
        pairs = [(mine, row) for row in others if row and abs(row['gmacs'] / mine['gmacs'] - 1) <= EQUAL_GMACS]
        lines.append([f'{fraction:.2f}', *split(pairs, 'right', 1), *split(pairs, 'kl_images', -1)])
    heads = 'better in top-1 than', 'worse in top-1 than', 'closer to dense (KL) than', 'farther (KL) than'
    return markdown(['fraction', *heads], lines)


@table
def training_free_recommended() -> str:
    """The schedules that the authors of each method recommend; ours are the defaults of `models.evolve`."""
    dense, lines = find(FREE, images=JUDGE, method='dense')['gmacs'], []
    for row in select(FREE, images=JUDGE, budget='recommended'):
        schedule = row['schedule'].partition(', representative')[0].replace('_', ' ')
        cells = f'{row["gmacs"] / dense:.2f}', difference(row['off'], row['interval']), f'{row["kl"]:.3f}'
        lines.append([NAMES[row['method']], schedule, *cells, speed(row)])
    return markdown(['', 'schedule', 'fraction', 'top-1 minus dense', 'KL', 'speed-up'], lines)


# --- dense prediction

CAMVID = 'experiments/dense_prediction.csv'


@table
def camvid() -> str:
    lines = []
    for method in ('nearest', 'merge', 'merge_norm', 'smaller image', 'drop', 'none'):
        rows = [find(CAMVID, method=method, budget=fraction) for fraction in (0.8, 0.66, 0.55, 0.45)]
        lines.append([NAMES[method], *(f'{interval(row)}, {speed(row)}' for row in rows)])
    return markdown(['fraction of dense GMACs', '0.80', '0.66', '0.55', '0.45'], lines)


@table
def camvid_large() -> str:
    rows = [row for row in read('experiments/dense_prediction_large.csv') if row['method'] != 'dense']
    lines = [[NAMES[row['method']], interval(row), speed(row)] for row in sorted(rows, key=lambda row: -row['off'])]
    return markdown(['0.66 of dense GMACs', 'mIoU minus dense', 'speed-up'], lines)


DECODER = 'experiments/trained_decoder.csv'
DECODER_FRACTIONS = 0.8, 0.66, 0.55
MEASURES = {'correlation': 1, 'error': -1, 'iou': 1}  # 1: more is closer to dense


def decoder(size: int) -> str:
    """A line for each method, a column for each fraction of dense GMACs: the measures and the speed-up."""
    lines = []
    for method in dict.fromkeys(
        row['method'] for row in select(DECODER, images=CHOICE, size=size) if row['method'] != 'dense'
    ):
        rows = [
            find(DECODER, images=CHOICE, size=size, method=method, budget=fraction) for fraction in DECODER_FRACTIONS
        ]
        cells = (
            ', '.join([f'{row[name]:.3f}' for name in MEASURES] + ([speed(row)] if row.get('speedup') else []))
            if row else 'not measured'
            for row in rows
        )  # fmt: skip
        lines.append([NAMES[method], *cells])
    return markdown(['fraction of dense GMACs', *(f'{fraction:.2f}' for fraction in DECODER_FRACTIONS)], lines)


@table
def decoder_224() -> str:
    return decoder(224)


@table
def decoder_448() -> str:
    return decoder(448)


@table
def decoder_verdicts() -> str:
    """Evolving beside each method: better or worse if all three measures say so."""
    lines = []
    for size in (224, 448):
        for fraction in DECODER_FRACTIONS:
            rows = select(DECODER, images=CHOICE, size=size, budget=fraction)
            mine, *others = sorted(rows, key=lambda row: row['method'] != 'nearest') or [None]
            if mine is None or mine['method'] != 'nearest':
                continue
            found = {'better': [], 'worse': [], 'neither': []}
            for row in others:
                if abs(row['gmacs'] / mine['gmacs'] - 1) > EQUAL_GMACS:
                    continue
                verdicts = set()
                for name, sign in MEASURES.items():
                    off, half = compare_images(mine, row, f'{name}_images')
                    verdicts.add(verdict(sign * off, half))
                word = verdicts.pop() if len(verdicts) == 1 else 'neither'
                found[word if word in found else 'neither'].append(SHORT[row['method']])
            lines.append([str(size), f'{fraction:.2f}', *(', '.join(names) or '–' for names in found.values())])
    return markdown(['px', 'fraction', 'better than', 'worse than', 'neither'], lines)


# --- fine-tuning and training from scratch


def training(path: str, methods: Sequence[str]) -> str:
    rows = [row for row in read(path) if row['method'] in methods]
    lines = []
    for method in methods:
        own = [row for row in rows if row['method'] == method]
        pairs = {(row['seed'], row['device']) for row in rows if row['method'] == 'dense'}
        mean, _ = t_interval(row['top1'] for row in own if (row['seed'], row['device']) in pairs)
        cells = []
        for ours, theirs in ((method, 'dense'), ('nearest', method)):
            off, half, n = compare_seeds(rows, ours, theirs)
            cells.append('' if ours == theirs else f'{difference(off, half, 2)}, n = {n}')
        lines.append([NAMES[method], f'{mean:.2f}', *cells, speed(own[0]), speed(own[0], 'gpu_speedup')])
    heads = 'minus dense', '`nearest` minus method', 'training speed-up, CPU', 'training speed-up, H100'
    return markdown(['', 'top-1, %', *heads], lines)


@table
def fine_tuning() -> str:
    methods = 'dense', 'nearest', 'merge', 'smaller image', 'drop', 'fuse', 'one', 'none'
    return training('experiments/finetune.csv', methods)


@table
def from_scratch() -> str:
    return training('experiments/from_scratch.csv', ('dense', 'nearest', 'none', 'one'))


# --- speed

EVO_DEIT = tuple(f'evo_deit_{size}_patch16_224' for size in ('tiny', 'small', 'base'))
EVO_LEVIT = tuple(f'EvoLeViT_{size}' for size in ('128S', '128', '192', '256', '384'))


def benchmark(file: str, model: str, **key) -> dict | None:
    return find(f'docs/benchmarks/{file}.csv', model=model, **key)


def value_and_speed(row: dict | None, column: str) -> str:
    if row is None:
        return 'not measured'
    value = row[column]
    return f'{value:,.0f} ({row["speedup"]:.2f})' if value >= 100 else f'{value:.1f} ({row["speedup"]:.2f})'


@table
def speed_cpu() -> str:
    lines = []
    for model in EVO_DEIT + EVO_LEVIT:
        eager, latency = (benchmark('cpu', model, mode=mode) for mode in ('inference', 'latency'))
        compiled = [benchmark('cpu-compiled', model, mode=mode) for mode in ('inference', 'latency')]
        cells = value_and_speed(eager, 'images_per_second'), value_and_speed(compiled[0], 'images_per_second')
        cells += value_and_speed(latency, 'ms'), value_and_speed(compiled[1], 'ms')
        train = value_and_speed(benchmark('cpu-train', model), 'images_per_second')
        lines.append([f'`{model}`', f'{eager["gmacs_ratio"]:.2f}', *cells, train])
    names = 'img/s', 'img/s, compiled', 'ms, batch 1', 'ms, compiled', 'training, img/s'
    return markdown(['', 'ratio of GMACs', *names], lines)


GPU_ROWS = {
    'batch 256, bfloat16, compiled': dict(mode='inference', batch=256, precision='bf16', compile='CUDA graphs'),
    'batch 256, bfloat16': dict(mode='inference', batch=256, precision='bf16', compile='no'),
    'batch 256, float32': dict(mode='inference', batch=256, precision='fp32', compile='no'),
    'batch 32, bfloat16': dict(mode='inference', batch=32, precision='bf16', compile='no'),
    'batch 32, float32': dict(mode='inference', batch=32, precision='fp32', compile='no'),
    'batch 1, bfloat16, compiled': dict(batch=1, precision='bf16', compile='CUDA graphs'),
    'batch 1, bfloat16': dict(batch=1, precision='bf16', compile='no'),
    'batch 1, float32': dict(batch=1, precision='fp32', compile='no'),
    'training, batch 256, bfloat16': dict(mode='train', batch=256, precision='bf16', compile='no'),
}


@table
def speed_gpu() -> str:
    """Speed-ups on an H100, of the original networks and of timm's, evolved with the first form of nearest.

    At batch 1 the rows of a network have the mode `latency` or `inference`, which are the same call there.
    """
    evolved = [f'deit_{size}_patch16_224 evolved' for size in ('tiny', 'small', 'base')]
    lines = []
    for name, key in GPU_ROWS.items():
        rows = [select('docs/benchmarks/h100.csv', model=model, **key) for model in (*EVO_DEIT, *EVO_LEVIT, *evolved)]
        lines.append([name, *(speed(own[0]) if own else '' for own in rows)])
    names = 'Evo-DeiT-T', 'S', 'B', 'Evo-LeViT-128S', '128', '192', '256', '384', 'DeiT-T evolved', 'S', 'B'
    return markdown(['', *names], lines)


def evolved_rows(device: str) -> dict[tuple, dict]:
    """The newest row of each evolved model, representative and batch size on a device, 'AMD' or 'Intel'."""
    rows = {}
    for row in sorted(read('docs/benchmarks/cpu-evolved.csv'), key=lambda row: row['date']):
        if row['speedup'] != '' and row['device'].startswith(device):
            rows[row['model'].partition(' ')[0], row['representative'], row['batch']] = row
    return rows


@table
def speed_evolved() -> str:
    lines = []
    rows = evolved_rows('AMD')
    for model, representative, batch in sorted(rows, key=lambda key: (key[1], -key[2])):
        row = rows[model, representative, batch]
        spread = f'{row["speedup"]:.2f} ({row["speedup_p10"]:.2f} to {row["speedup_p90"]:.2f})'
        values = f'{batch:.0f}', f'{row["gmacs_ratio"]:.2f}', f'{row["images_per_second"]:.1f}', spread
        lines.append([f'`{model}`', representative, *values])
    header = 'representative', 'batch', 'ratio of GMACs', 'img/s', 'speed-up (p10 to p90)'
    table = markdown(['', *header], lines)
    xeon = evolved_rows('Intel').items()
    at_32, at_1 = (
        ' and '.join(f'{row["speedup"]:.2f}' for key, row in xeon if key[1:] == ('nearest', batch)) for batch in (32, 1)
    )
    return f'{table}\n\nThe second form of `nearest` on an Intel Xeon: {at_32} at batch 32, {at_1} at batch 1.'


@table
def speed_transformers() -> str:
    *_, evolved, dense = sorted(read('docs/benchmarks/cpu-transformers.csv'), key=lambda row: row['date'])
    return (
        f"A DINOv2-S of Hugging Face's transformers, {evolved['image_size']:.0f} px, batch {evolved['batch']:.0f}, has "
        f'a speed-up of {evolved["speedup"]:.2f} on the EPYC (p10 to p90: {evolved["speedup_p10"]:.2f} to '
        f'{evolved["speedup_p90"]:.2f}). The ratio of GMACs is {evolved["gmacs_ratio"]:.2f}. Peak memory is '
        f'{evolved["peak_mib"] / dense["peak_mib"]:.2f} times dense.'
    )


# --- the first screen


@table
def headline() -> str:
    """Dense, evolved, ToMe and a smaller image at about the same GMACs, on the images that judge."""
    lines = []
    for method, name in (
        ('dense', 'dense'), ('nearest', '**evolved**'), ('merge', 'ToMe'), ('smaller image', 'smaller image'),
    ):  # fmt: skip
        fraction = 1 if method == 'dense' else 0.66
        row = find(FREE, images=JUDGE, method=method, budget='recommended' if method == 'nearest' else fraction)
        camvid = find(CAMVID, method=method, budget=fraction)
        star = '\\*' if camvid['off_low'] > 0 or camvid['off_high'] < 0 else ''
        top1, miou = f'{row["top1"]:.1f}', f'{camvid["miou"]:.1f}'
        if fraction < 1:
            top1 += f' ({difference(row["off"], row["interval"])})'
            miou += f' ({signed(camvid["off"])}{star})'
        speeds = ['1', '1'] if fraction == 1 else [speed(row), speed(row, 'gpu_speedup')]
        if method == 'nearest':
            key = GPU_ROWS['batch 256, bfloat16']
            old = dict(model='deit_tiny_patch16_224 evolved', representative='nearest')
            first_form = find('docs/benchmarks/h100.csv', **old, **key)
            speeds[1] = f'{speed(first_form)} (earlier version)'
        lines.append([name, f'{row["gmacs"]:.2f}', top1, f'{row["kl"]:.3f}', miou, *speeds])
    heads = 'GMACs', 'ImageNet top-1', 'KL to dense', 'CamVid mIoU', 'speed-up, 2 EPYC cores', 'speed-up, H100'
    return markdown(['DeiT-Ti, no training', *heads], lines)


@table
def claim() -> str:
    row = find(FREE, images=JUDGE, method='nearest', budget='recommended')
    names = [f'deit_{size}_patch16_224 evolved' for size in ('tiny', 'base')]
    compiled, eager = (
        ' to '.join(
            speed(find('docs/benchmarks/h100.csv', model=name, representative='nearest', **GPU_ROWS[key]))
            for name in names
        )
        for key in ('batch 256, bfloat16, compiled', 'batch 256, bfloat16')
    )
    xeon = evolved_rows('Intel')['deit_tiny_patch16_224', 'nearest', 32]
    return (
        f'DeiT-Ti on two CPU cores: speed-up {speed(row)} on an AMD EPYC ({speed(xeon)} on an Intel Xeon, earlier '
        f'version), top-1 {difference(row["off"], row["interval"])} points on {row["n"]:.0f} ImageNet images. On an '
        f'H100 in bfloat16 it gains little or is slower: {compiled} compiled, {eager} eager (batch 256, DeiT-Ti to '
        'DeiT-B, measured with an earlier version).'
    )


def write(text: str) -> str:
    """A page with its tables rewritten."""

    def replace(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f'expected a table of {", ".join(TABLES)}, found {match[2]}')
        return f'{match[1]}{TABLES[match[2]]()}\n{match[3]}'

    return BLOCK.sub(replace, text)


def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; fail if a table is not up to date')
    args, old = parser.parse_args(arguments), []
    for page in PAGES:
        text = page.read_text()
        if (new := write(text)) != text:
            old.append(page.name)
            if not args.check:
                page.write_text(new)
    if args.check and old:
        raise SystemExit(f'{", ".join(old)}: tables are not up to date; run python3 -m experiments.tables')
    print(f'written: {", ".join(old)}' if old else 'all tables are up to date')


if __name__ == '__main__':
    main()
