"""Plots that the experiments share."""

from collections.abc import Sequence
from pathlib import Path

from common import METHODS, compare_seeds, t_interval, verdict
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Label, line and color of each method; they differ in gray and for color-blind readers too.
LOOKS = {
    'nearest': ('evolve (nearest)', 'o-', '#0072B2'),
    'random': ('nearest, random scores', 'x:', 'grey'),
    'merge': ('merge (ToMe)', '^:', '#D55E00'),
    'merge_norm': ('merge, keeping lengths', 'h:', '#882255'),
    'decreasing, merge': ('merge, decreasing rates', '<:', '#D55E00'),
    'decreasing, merge_norm': ('merge, keeping lengths, decreasing rates', '2:', '#882255'),
    'late, merge': ('merge, from a third of the depth on', '^-.', '#999933'),
    'late, merge_norm': ('merge, keeping lengths, from a third on', 'h-.', '#661100'),
    'drop': ('drop (top-k)', 'D-.', '#CC79A7'),
    'fuse': ('fuse (EViT)', 'v-.', '#56B4E9'),
    'none': ('evolve (none)', 's--', '#E69F00'),
    'one': ('evolve (one)', 'P--', '#009E73'),
    'dense': ('dense', '+', 'black'),
    'smaller image': ('dense, smaller image', 'X--', 'black'),
    'smaller, nearest': ('evolve, smaller image', '*-', 'black'),
    'smaller, merge': ('merge, smaller image', '>:', 'black'),
}
GMACS_AXIS = 'GMACs per image\n(methods at one budget are shown side by side)'


def speed_axes(rows: Sequence[dict]) -> dict[str, str]:
    """Columns of speed-ups measured on a CPU and on a GPU, as far as there are any, with axis labels."""
    found = {}
    for kind in ('', 'gpu_'):
        measured = [row for row in rows if row.get(f'{kind}speedup', '') != '']
        names = [f'{kind}speed_{name}' for name in ('device', 'precision', 'batch')]
        how = [' and '.join(sorted({str(row[name]) for row in measured})) for name in names]
        if measured:
            found[f'{kind}speedup'] = 'speed-up over dense (thin: p10 to p90)\n{}, {}, batch {}'.format(*how)
    return found


def draw_methods(axes: Axes, rows: Sequence[dict], x: str, y: str, interval: str = ''):
    """Plot y over x, one line per method in the order of GMACs, with bars from `interval`_low to `interval`_high.

    For a speed-up on x, a thin line goes from its 10th to its 90th percentile.
    """
    rows = [row for row in rows if row.get(x, '') != '']
    for method, (name, style, color) in LOOKS.items():
        if own := sorted((row for row in rows if row['method'] == method), key=lambda row: row['gmacs']):
            bars = [[row[y] - row[f'{interval}_low'], row[f'{interval}_high'] - row[y]] for row in own if interval]
            # At equal GMACs the intervals would overlap; smaller images have other GMACs.
            shift = 0.003 * (METHODS.index(method) - 3) if x == 'gmacs' and method in METHODS else 0
            places = [row[x] * (1 + shift) for row in own]
            # Filled markers for methods of others.
            others = method in ('drop', 'fuse') or method.endswith(('merge', 'merge_norm'))
            fill = color if others else 'none'
            look = dict(fmt=style, color=color, mfc=fill, label=name, linewidth=1.2, markersize=6)
            if x.endswith('speedup'):
                ends = ([row[f'{x}_{end}'] for row in own] for end in ('p10', 'p90'))
                axes.hlines([row[y] for row in own], *ends, color=color, linewidth=0.5)
            bars = list(zip(*bars, strict=True)) or None
            axes.errorbar(places, [row[y] for row in own], bars, elinewidth=0.7, capsize=1.5, **look)


def save(figure: Figure, path: Path):
    figure.savefig(path, dpi=150)
    print(f'wrote {path}')


def draw_seeds(rows: list[dict], title: str, path: Path):
    """Print top-1 and the verdicts for nearest and dense against every other method; plot top-1 over speed-up."""
    methods, speeds, points = list(dict.fromkeys(row['method'] for row in rows)), speed_axes(rows), []
    for method in methods:
        own = [row for row in rows if row['method'] == method]
        mean = t_interval(row['top1'] for row in own)[0]
        times = [f'{own[0].get(column) or "?"} on {label.splitlines()[1]}' for column, label in speeds.items()]
        print(f'{method}: {mean:.2f} % ({len(own)} runs); speed-up in training: {"; ".join(times)}')
        off, half, pairs = compare_seeds(rows, method, 'dense')
        if pairs > 1:
            points.append(own[0] | dict(off=off, off_low=off - half, off_high=off + half))
    for reference in ('nearest', 'dense'):
        for method in methods:
            off, half, pairs = compare_seeds(rows, reference, method)
            if pairs and method != reference:
                print(f'{reference}: {off:+.2f} ± {half:.2f} to {method} ({pairs} pairs), {verdict(off, half)}')
    figure = Figure((1 + 4.5 * len(speeds), 4.5), layout='constrained')
    for axes, (column, label) in zip(figure.subplots(1, len(speeds), squeeze=False).flat, speeds.items(), strict=True):
        draw_methods(axes, points, column, 'off', 'off')
        axes.axhline(0, color='black', linewidth=0.8, linestyle=':')
        axes.set(xlabel=label, ylabel='top-1 minus dense, percentage points')
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False, fontsize=8)
    title += ': mean and 95 % interval over pairs of one seed and device; speed-up in training'
    figure.suptitle(title, fontsize=10)
    save(figure, path)
