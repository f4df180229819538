"""Learning curves of runs from their log.txt: loss, top-1 and learning rate."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils import InputError

# Distinguishable with color blindness (Okabe and Ito), and in gray by the markers.
COLORS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', 'black'
MARKERS = 'osD^vPX'


def read_logs(sources: Sequence[str]) -> dict[str, list[dict]]:
    """The logs of runs by the names of their folders, or by their paths if two names are the same."""
    paths = [Path(source).expanduser() for source in sources]
    names = [(path.parent if path.name == 'log.txt' else path).resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else list(sources)
    return {name: read_log(path) for name, path in zip(names, paths, strict=True)}


def read_log(source: Path) -> list[dict]:
    """The lines of a run's log, one per epoch, from its folder or file; InputError if there are none."""
    path = source / 'log.txt' if source.is_dir() else source
    expected = 'expected the --output_dir of a run whose first epoch is done'
    if not path.is_file():
        raise InputError(f'--log {source}: {path.absolute()} is not a file; {expected}')
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        [line['epoch'] + 0 for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'--log {path}: expected a line of JSON with "epoch" per epoch ({error})') from error
    if not lines:
        raise InputError(f'--log {path} is empty; {expected}')
    return lines


def draw_curves(runs: dict[str, list[dict]]) -> Figure:
    """Loss, top-1 and learning rate over the epochs of each run."""
    figure = Figure((11, 3.6), layout='constrained')
    loss, top1, rate = figure.subplots(1, 3)
    names = []
    for i, (name, lines) in enumerate(runs.items()):
        style = dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1.2)
        plot(loss, lines, 'train_loss', **style)
        plot(loss, lines, 'test_loss', linestyle='--', markerfacecolor='white', **style)
        plot(top1, lines, 'test_acc1', **style)
        plot(top1, lines, 'test_ema_acc1', linestyle=':', markerfacecolor='white', **style)
        plot(rate, lines, 'train_lr', **style)
        best = max(lines, key=lambda line: line.get('test_acc1') or 0)
        text = f': best {best["test_acc1"]:.2f} % in epoch {best["epoch"]}' if best.get('test_acc1') else ''
        names.append(Line2D([], [], label=name + text, **style))
    if len(runs) == 1:
        mark_selection(top1, lines)
    for axes, title in ((loss, 'loss'), (top1, 'validation top-1 (%)'), (rate, 'learning rate')):
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    # At least ten points, so that the noise of a converged run does not look like progress.
    bottom, top = top1.get_ylim()
    top = min(top, 100.5)
    top1.set_ylim(min(bottom, top - 10), top)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis='y', style='sci', scilimits=(-2, 2))
    add_legend(loss, {'train_loss': ('training', '-'), 'test_loss': ('validation', '--')}, runs)
    add_legend(top1, {'test_acc1': ('weights', '-'), 'test_ema_acc1': ('their EMA', ':')}, runs)
    figure.legend(handles=names, loc='outside lower center', ncols=min(2, len(runs)), frameon=False)
    return figure


def plot(axes: Axes, lines: Sequence[dict], key: str, **style):
    """A curve over the epochs whose line has a number."""
    points = [(line['epoch'], line[key]) for line in lines if line.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def mark_selection(axes: Axes, lines: Sequence[dict]):
    """A vertical line where the kind of selection changes, which may cost accuracy at first."""
    for before, line in zip(lines, lines[1:], strict=False):
        if before.get('selection') != line.get('selection'):
            axes.axvline(line['epoch'] - 0.5, color='gray', linestyle='-.', linewidth=1)
            place = dict(
                xy=(line['epoch'] - 0.5, 0.02), xycoords=('data', 'axes fraction'), fontsize=8, color='dimgray'
            )
            axes.annotate(f' {line["selection"]}', **place)


def add_legend(axes: Axes, styles: dict[str, tuple[str, str]], runs: dict[str, list[dict]]):
    """A legend of the line styles, if several are drawn."""
    drawn = [value for key, value in styles.items() if any(key in line for lines in runs.values() for line in lines)]
    if len(drawn) > 1:
        axes.legend(handles=[Line2D([], [], color='black', linestyle=s, label=n) for n, s in drawn], frameon=False)
