"""Rows of measurements, plain dictionaries: their table, file and plot, and what to know before trusting them."""

import csv
import json
import os
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from utils import InputError, atomic_write

# The columns of a file, each with its heading in the table, if it is shown there: few enough for a terminal.
COLUMNS = {
    'mode': 'mode', 'input': '', 'model': 'model', 'architecture': '', 'keep_ratio': 'keep', 'stages': '',
    'representative': '', 'selection': '', 'image_size': 'px', 'batch': 'batch', 'images_per_second': 'img/s',
    'images_per_second_p10': '', 'images_per_second_p90': '', 'ms': 'ms', 'ms_p90': '', 'ms_p99': '', 'n': '',
    'peak_mib': 'peak MiB', 'parameters': '', 'gmacs': 'GMACs', 'speedup': 'speed-up', 'speedup_p10': '',
    'speedup_p90': '', 'arithmetic_ratio': '', 'error': '', 'device': '', 'precision': '', 'autocast': '',
    'compile': '', 'channels_last': '', 'fused': '', 'threads': '', 'torch': '', 'timm': '', 'date': '', 'commit': '',
}  # fmt: skip
AXES = {'image_size': 'side of the images, px', 'batch': 'images a call', 'gmacs': 'GMACs an image'}
MODEL_WIDTH = 33  # longer names are cut off in the table
P99_CALLS = 100  # with fewer, the 99th percentile is hardly more than the slowest call
BUSY_LOAD = 0.5  # processes of others that may run before a measurement is called disturbed
DISTURBED = 1.5  # ratio of a row's img/s, 90th to 10th percentile, from which on it needs a warning


def check_file(path: str | None, suffixes: Iterable[str]):
    """InputError where a file cannot be written or, as it has other columns, not be added to."""
    if path is None:
        return
    if Path(path).suffix not in suffixes or not Path(path).absolute().parent.is_dir():
        raise InputError(f'{path}: expected a file in a folder that exists, named {" or ".join(suffixes)}')
    header = Path(path).read_text().partition('\n')[0] if path.endswith('.csv') and Path(path).exists() else ''
    if header and header.split(',') != list(COLUMNS):
        raise InputError(f'{path} has other columns than {",".join(COLUMNS)}; choose another file')


def summarise(row: dict, seconds: list[float], twin: dict | None = None, twin_seconds: list[float] = ()) -> dict:
    """Medians and percentiles of the seconds that calls took, and of their ratios to calls of the dense twin.

    `twin_seconds` are of the neighbouring calls, one for each.
    """
    p10, p50, p90, p99 = np.percentile(seconds, (10, 50, 90, 99)).tolist()
    summary = dict(ms=1000 * p50, n=len(seconds))
    if row['input'] == 'noise':  # end to end there are a few means of many calls, which say nothing about slow ones
        summary |= {'ms_p90': 1000 * p90} | ({'ms_p99': 1000 * p99} if len(seconds) >= P99_CALLS else {})
    for name, value in (('', p50), ('_p10', p90), ('_p90', p10)):
        summary[f'images_per_second{name}'] = row['batch'] / value
    if twin and 'gmacs' in row:
        speedups = np.percentile(np.array(twin_seconds) / seconds, (50, 10, 90)).tolist()
        summary |= dict(zip(('speedup', 'speedup_p10', 'speedup_p90'), speedups, strict=True))
        summary['arithmetic_ratio'] = twin['gmacs'] / row['gmacs']
    return summary


def circumstances(precision: str = 'fp32', device: torch.device | None = None) -> dict:
    """What must stand beside every measured number: hardware, precision, versions, commit, date.

    Without a `device` it is the GPU if this process has used one, else the CPU.
    """
    if device is None:
        device = torch.device('cuda' if torch.cuda.is_initialized() else 'cpu')
    name, info = str(device), Path('/proc/cpuinfo')
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    elif info.exists():
        cpu = re.search(r'^model name\s*: (.*)$', info.read_text(), re.M)
        name = f'{cpu[1] if cpu else name}, {os.cpu_count()} cores'
    commit = ''
    with suppress(OSError):  # without git
        git = ['git', 'describe', '--always', '--dirty', '--exclude', '*']
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return dict(
        device=name, precision=precision, threads=torch.get_num_threads(), torch=torch.__version__,
        timm=timm.__version__, commit=commit or 'unknown', date=datetime.now(UTC).isoformat(timespec='seconds'),
    )  # fmt: skip


def warn_if_busy(load: float, threads: int) -> Iterable[str]:
    """A warning where other programs use the machine, given its load average before the start."""
    cores = os.cpu_count()
    if load + threads > cores + BUSY_LOAD:
        used = f'load {load:.1f} of the last minute, {cores} cores, {threads} needed here'
        yield f'warning: the machine was busy before this started ({used}): times may be too long, speed-ups too small'


def warn_of_spread(rows: list[dict]) -> Iterable[str]:
    """A warning for each row whose calls differed so much that something else must have disturbed them."""
    for row in rows:
        spread = row.get('images_per_second_p90', 1) / row.get('images_per_second_p10', 1)
        if spread > DISTURBED:
            case = f'{row["mode"]}, {row["model"]}, {row["image_size"]} px, batch {row["batch"]}'
            yield f'warning: {case}: img/s differ by {spread:.1f} times (p90 / p10); take more calls or an idle machine'


def table_line(row: dict, model_width: int) -> str:
    """A line of the table for a row, or for the headings, of up to 120 letters; an error has lines of its own."""
    cells = []
    for name, heading in COLUMNS.items():
        value = row.get(name, '')
        if isinstance(value, float):
            value = f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'
        width = {'mode': 9, 'model': min(model_width, MODEL_WIDTH), 'keep_ratio': 9}.get(name, 7)
        if name == 'model' and len(value) > width:
            value = f'{value[: width - 1]}…'
        if heading:
            cells.append(f'{value:{"<" if name in ("mode", "model") else ">"}{max(width, len(heading))}}')
    error = fill(row.get('error', ''), 120, initial_indent='  ', subsequent_indent='  ')
    return '\n'.join(['  '.join(cells).rstrip(), *([error] if error else [])])


def write_row(row: dict, path: str | None):
    """Add a row to a file of comma-separated values or of JSON lines, if there is one."""
    if path is None:
        return
    row = {name: float(f'{row[name]:.6g}') if isinstance(row.get(name), float) else row.get(name) for name in COLUMNS}
    with open(path, 'a', newline='') as file:
        if path.endswith('.jsonl'):
            file.write(json.dumps(row) + '\n')
            return
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def plot(rows: list[dict], x: str, path: str):
    """Draw img/s against the column `x`, a panel for each mode, a line for each model and each value of what was swept
    besides `x`, bars from p10 to p90.

    A model has the colour of its dense twin, whose line is dashed and hollow.
    """
    rows = sorted((row for row in rows if 'gmacs' in row and 'error' not in row), key=lambda row: row[x])
    modes = list(dict.fromkeys(row['mode'] for row in rows))
    figure = Figure(figsize=(6 * max(1, len(modes)), 7), dpi=150, layout='constrained')
    colors, handles = {}, {}
    for i, mode in enumerate(modes, 1):
        panel = figure.add_subplot(1, len(modes), i, xlabel=AXES[x], ylabel='img/s', xscale='log', yscale='log')
        shown = [row for row in rows if row['mode'] == mode]
        several = [key for key in ('keep_ratio', 'batch') if key != x and len({r.get(key) for r in shown} - {None}) > 1]
        lines = {}
        for row in shown:
            values = [f'{COLUMNS[key]} {row[key]}' for key in several if row.get(key)]
            color = colors.setdefault((row['requested'], *values), len(colors))
            lines.setdefault((', '.join([row['model'], *values]), color), []).append(row)
        for (label, color), points in lines.items():
            ends = ('_p10', '', '_p90')
            low, middle, high = np.array([[row[f'images_per_second{end}'] for row in points] for end in ends])
            dense = points[0]['selection'] == 'no selection'
            handles[label] = panel.errorbar(
                [row[x] for row in points], middle, np.clip([middle - low, high - middle], 0, None), label=label,
                capsize=3, color=f'C{color}', marker='os^DvPX'[color % 7], markersize=7,
                **(dict(fillstyle='none', linestyle='--') if dense else {}),
            )  # fmt: skip
        panel.set_title(f'{mode}, {rows[0]["input"]}, {rows[0]["precision"]}; bars: p10 to p90\n{rows[0]["device"]}')
        for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
            axis.set_minor_locator(LogLocator(subs=range(2, 10) if high < 8 * low else (2, 3, 5)))
            axis.set_major_formatter('{x:g}')
            axis.set_minor_formatter('{x:g}')
        if x != 'gmacs':
            panel.set_xticks(sorted({row[x] for row in rows}))
            panel.set_xticks([], minor=True)
    columns = 2 * max(1, len(modes))
    figure.legend([*handles.values()], [*handles], loc='outside lower center', ncols=columns, fontsize=8, frameon=False)
    atomic_write(Path(path), lambda file: figure.savefig(file, format=Path(path).suffix[1:]))
