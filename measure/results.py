"""Measured rows, as dictionaries: the table, the file, the plot, and warnings about noise."""

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

# Columns of a results file, with their headings in the printed table; those without a heading are not printed.
COLUMNS = {
    'mode': 'mode', 'input': '', 'model': 'model', 'architecture': '', 'keep_ratio': 'keep', 'stages': '',
    'representative': '', 'selection': '', 'image_size': 'px', 'batch': 'batch', 'images_per_second': 'img/s',
    'images_per_second_p10': '', 'images_per_second_p90': '', 'ms': 'ms', 'ms_p90': '', 'ms_p99': '', 'n': '',
    'peak_mib': 'peak MiB', 'parameters': '', 'gmacs': 'GMACs', 'speedup': 'speed-up', 'speedup_p10': '',
    'speedup_p90': '', 'gmacs_ratio': '', 'error': '', 'device': '', 'precision': '', 'autocast': '',
    'compile': '', 'channels_last': '', 'fused': '', 'threads': '', 'torch': '', 'timm': '', 'date': '', 'commit': '',
}  # fmt: skip
AXES = {'image_size': 'image size, px', 'batch': 'batch size', 'gmacs': 'GMACs per image'}
MODEL_WIDTH = 33  # the table truncates longer names
P99_CALLS = 100  # with fewer calls, the 99th percentile is just the slowest one
BUSY_LOAD = 0.5  # load by other programs above which a warning is printed
DISTURBED = 1.5  # ratio of p90 to p10 of img/s above which a warning is printed


def check_file(path: str | None, suffixes: Iterable[str]):
    """Raises InputError if a file cannot be written, or has other columns than the rows to append."""
    if path is None:
        return
    if Path(path).suffix not in suffixes or not Path(path).absolute().parent.is_dir():
        raise InputError(f'{path}: expected a file in an existing folder, named {" or ".join(suffixes)}')
    header = Path(path).read_text().partition('\n')[0] if path.endswith('.csv') and Path(path).exists() else ''
    if header and header.split(',') != list(COLUMNS):
        raise InputError(f'{path}: expected the columns {",".join(COLUMNS)}, found {header}; choose another file')


def summarize(row: dict, seconds: list[float], dense: dict | None = None, dense_seconds: list[float] = ()) -> dict:
    """Medians and percentiles of the seconds per call, and of the speed-up over the dense baseline.

    `dense_seconds` are those of the neighboring calls of the baseline, in the same order.
    """
    p10, p50, p90, p99 = np.percentile(seconds, (10, 50, 90, 99)).tolist()
    summary = dict(ms=1000 * p50, n=len(seconds))
    if row['input'] == 'noise':  # end to end, each value is a mean over many batches, which hides slow calls
        summary |= {'ms_p90': 1000 * p90} | ({'ms_p99': 1000 * p99} if len(seconds) >= P99_CALLS else {})
    for name, value in (('', p50), ('_p10', p90), ('_p90', p10)):
        summary[f'images_per_second{name}'] = row['batch'] / value
    if dense and 'gmacs' in row:
        speedups = np.percentile(np.array(dense_seconds) / seconds, (50, 10, 90)).tolist()
        summary |= dict(zip(('speedup', 'speedup_p10', 'speedup_p90'), speedups, strict=True))
        summary['gmacs_ratio'] = dense['gmacs'] / row['gmacs']
    return summary


def circumstances(precision: str = 'fp32', device: torch.device | None = None) -> dict:
    """The circumstances of a measurement: hardware, precision, versions, commit, date.

    `device` defaults to the GPU if this process has used one, else the CPU.
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
    """A warning if other programs use the machine; `load` is its load average before the start."""
    cores = os.cpu_count()
    if load + threads > cores + BUSY_LOAD:
        used = f'load {load:.1f} in the last minute, {cores} cores, {threads} needed here'
        yield f'warning: the machine was busy before the start ({used}): times may be too long, speed-ups too small'


def warn_of_spread(rows: list[dict]) -> Iterable[str]:
    """A warning for each row whose calls differ so much that something else must have disturbed them."""
    for row in rows:
        spread = row.get('images_per_second_p90', 1) / row.get('images_per_second_p10', 1)
        if spread > DISTURBED:
            case = f'{row["mode"]}, {row["model"]}, {row["image_size"]} px, batch {row["batch"]}'
            yield f'warning: {case}: img/s vary {spread:.1f}-fold (p90 / p10); use more calls or an idle machine'


def table_line(row: dict, model_width: int) -> str:
    """A line of the table, at most 120 characters, for a row or for the headings; an error gets lines of its own."""
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


def write_row(row: dict, path: str):
    """Append a row to a .csv or .jsonl file."""
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
    """Plot img/s over the column `x`: a panel per mode, a line per model and per value of another swept column.

    Bars go from p10 to p90. A model has the color of its dense baseline, which is dashed and hollow.
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
