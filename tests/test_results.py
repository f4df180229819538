"""results.py: what rows, tables, files, plots and warnings say of given seconds."""

import csv
import importlib
import os
import re
import subprocess

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from matplotlib.figure import Figure

from measure import results
from utils import InputError


def row_of(model: str, requested: str, gmacs: float, seconds: list[float], **more) -> dict:
    """A row of a model that was measured for `requested`."""
    row = dict(requested=requested, mode='latency', input='noise', model=model, gmacs=gmacs, batch=1, image_size=224)
    row |= dict(selection='stage-wise' if model == requested else 'no selection', precision='fp32', device='cpu')
    return row | results.summarise(row, seconds) | more


def test_speedup_is_the_median_ratio_of_neighbours():
    """A machine that becomes ten times slower half way does not change it."""
    slow = [1, 1, 10, 10, 10]
    twin = dict(input='noise', batch=8, gmacs=3.0)
    summary = results.summarise(dict(input='noise', batch=8, gmacs=2.0), slow, twin, [1.5 * s for s in slow])
    assert (summary['speedup'], summary['arithmetic_ratio'], summary['n']) == (1.5, 1.5, 5)
    assert summary['images_per_second'] == 0.8 and summary['ms'] == 10_000


@pytest.mark.parametrize('calls', [99, 100])
def test_rare_calls_need_many(calls):
    summary = results.summarise(dict(input='noise', batch=1), [1.0] * calls)
    assert summary['ms_p90'] == 1000 and summary.get('ms_p99') == (1000 if calls == 100 else None)


def test_circumstances_are_those_of_this_process(monkeypatch, tmp_path):
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout
    row = results.circumstances('bf16', torch.device('cpu'))
    assert re.fullmatch(rf'.+, {os.cpu_count()} cores', row['device']) and row['date'][:2] == '20'
    assert row['commit'].startswith(commit.strip()[:7] or 'unknown')
    expected = dict(precision='bf16', threads=torch.get_num_threads(), torch=torch.__version__, timm=timm.__version__)
    assert row.items() >= expected.items()
    # A row of an experiment has the same ones.
    monkeypatch.syspath_prepend(str(ROOT / 'experiments'))
    rows = importlib.import_module('common').Rows(tmp_path / 'rows.csv', {'model': 'm'})
    rows.add(top1=1.0)
    with open(tmp_path / 'rows.csv', newline='') as file:
        (written,) = csv.DictReader(file)
    assert written['device'] == row['device'] and (written['precision'], written['commit']) == ('fp32', row['commit'])


def test_files_are_added_to(tmp_path):
    file = tmp_path / 'results.csv'
    for batch in (1, 2):
        results.check_file(str(file), ['.csv'])
        results.write_row(row_of('a, b', 'c', 1 / 3, [1.0], batch=batch), str(file))
    with open(file) as lines:
        rows = list(csv.DictReader(lines))
    assert [(row['model'], row['batch'], row['gmacs'], row['error']) for row in rows] == [
        ('a, b', '1', '0.333333', ''), ('a, b', '2', '0.333333', ''),
    ]  # fmt: skip
    other = tmp_path / 'other.csv'
    other.write_text('model,speed\n')
    with pytest.raises(InputError, match='other.csv has other columns'):
        results.check_file(str(other), ['.csv'])
    with pytest.raises(InputError, match='plot.txt: expected a file in a folder that exists, named .png or .svg'):
        results.check_file(str(tmp_path / 'plot.txt'), ['.png', '.svg'])
    with pytest.raises(InputError, match='expected a file in a folder that exists'):
        results.check_file(str(tmp_path / 'nowhere' / 'plot.png'), ['.png'])


@pytest.mark.parametrize('load, cores, busy', [(3.0, 2, True), (1.6, 2, True), (1.4, 2, False), (3.0, 16, False)])
def test_a_busy_machine_is_warned_of(monkeypatch, load, cores, busy):
    monkeypatch.setattr(os, 'cpu_count', lambda: cores)
    warning = f'warning: the machine was busy before this started (load {load} of the last minute, {cores} cores'
    assert [line.startswith(warning) for line in results.warn_if_busy(load, 1)] == [True] * busy


@pytest.mark.parametrize('slowest, disturbed', [(1.2, False), (2, True), (12, True)])
def test_spread_is_warned_of(slowest, disturbed):
    rows = [row_of('steady', 'steady', 1.0, [1.0] * 9), dict(model='failed', error='out of memory')]
    rows.append(row_of('shaky', 'shaky', 2.0, [1.0, 1.0, 1.0, *[slowest] * 3]))
    expected = f'warning: latency, shaky, 224 px, batch 1: img/s differ by {slowest:.1f} times (p90 / p10)'
    assert [line.startswith(expected) for line in results.warn_of_spread(rows)] == [True] * disturbed


def draw(monkeypatch, folder, rows: list[dict], x: str = 'gmacs') -> Figure:
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, file, format: figures.append(figure))
    results.plot(rows, x, str(folder / 'plot.png'))
    figures[0].draw_without_rendering()
    return figures[0]


def test_a_plot_shows_each_point_with_its_spread(monkeypatch, tmp_path):
    rows = [row_of(f'm{i}', f'm{i}', 1.0 + i, [1.0, 1.0, 1.0, *[2.0 + i] * 3]) for i in range(3)]
    panel = draw(monkeypatch, tmp_path, [*rows, dict(model='failed', error='KeyError: nothing to draw')]).axes[0]
    assert len(panel.containers) == 3
    for i, (line, _, (bars,)) in enumerate(panel.containers):
        np.testing.assert_allclose(line.get_xydata(), [[1.0 + i, rows[i]['images_per_second']]])
        np.testing.assert_allclose(bars.get_segments()[0][:, 1], [1 / (2 + i), 1])


def test_lines_are_told_apart_and_twins_belong_together(monkeypatch, tmp_path):
    rows = []
    for i in range(12):
        rows += [row_of(f'm{i}', f'm{i}', 1 + i, [1.0, 1 + i]), row_of(f'dense {i}', f'm{i}', 2 + i, [2.0, 2 + i])]
    figure = draw(monkeypatch, tmp_path, rows)
    panel = figure.axes[0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == sorted(row['model'] for row in rows)
    style = {
        container.get_label(): (line.get_color(), line.get_marker(), line.get_fillstyle(), line.get_linestyle())
        for container in panel.containers
        for line in container.lines[:1]
    }
    assert len(set(style.values())) == len(rows)
    for i in range(12):
        ours, dense = style[f'm{i}'], style[f'dense {i}']
        assert ours[:2] == dense[:2] and (ours[2:], dense[2:]) == (('full', '-'), ('none', '--'))
    legend = figure.legends[0].get_window_extent()
    assert not legend.overlaps(panel.bbox) and figure.bbox.contains(*legend.min) and figure.bbox.contains(*legend.max)


def test_modes_with_other_batches_are_no_sweep(monkeypatch, tmp_path):
    rows = [row_of('m', 'm', 1.0, [1.0, 1.2], mode=mode, batch=batch) for mode, batch in (('a', 1), ('b', 32))]
    panels = draw(monkeypatch, tmp_path, rows).axes
    assert [[line.get_label() for line in panel.containers] for panel in panels] == [['m'], ['m']]


def test_what_else_was_swept_is_in_the_label(monkeypatch, tmp_path):
    """One line for each batch and keep ratio, not one that goes back and forth."""
    rows = [
        row_of('m', 'm', 1.0, [1.0, 1.2], image_size=size, batch=batch, keep_ratio=ratio)
        for size in (64, 32) for batch in (1, 3) for ratio in ('0.5', '0.3')
    ]  # fmt: skip
    panel = draw(monkeypatch, tmp_path, rows, 'image_size').axes[0]
    assert [text.get_text() for text in panel.get_xticklabels()] == ['32', '64']
    labels = {container.get_label() for container in panel.containers}
    assert labels == {f'm, keep {ratio}, batch {batch}' for ratio in ('0.3', '0.5') for batch in (1, 3)}
    assert all(container.lines[0].get_xdata().tolist() == [32, 64] for container in panel.containers)
