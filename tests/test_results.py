"""measure/results.py: what rows, tables, files, plots and warnings say of given seconds."""

import csv
import os
import re
import subprocess
import sys

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
    return row | results.summarize(row, seconds) | more


def test_speedup_is_the_median_ratio_of_neighbors():
    """A machine that becomes ten times slower half way does not change it."""
    slow = [1, 1, 10, 10, 10]
    dense = dict(input='noise', batch=8, gmacs=3.0)
    summary = results.summarize(dict(input='noise', batch=8, gmacs=2.0), slow, dense, [1.5 * s for s in slow])
    assert (summary['speedup'], summary['gmacs_ratio'], summary['n']) == (1.5, 1.5, 5)
    assert summary['images_per_second'] == 0.8 and summary['ms'] == 10_000


@pytest.mark.parametrize('calls', [99, 100])
def test_rare_calls_need_many(calls):
    summary = results.summarize(dict(input='noise', batch=1), [1.0] * calls)
    assert summary['ms_p90'] == 1000 and summary.get('ms_p99') == (1000 if calls == 100 else None)


def test_circumstances_are_those_of_this_process():
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout
    row = results.circumstances('bf16', torch.device('cpu'))
    assert re.fullmatch(rf'.+, {os.cpu_count()} cores', row['device']) and row['date'][:2] == '20'
    assert row['commit'].startswith(commit.strip()[:7] or 'unknown')
    expected = dict(precision='bf16', threads=torch.get_num_threads(), torch=torch.__version__, timm=timm.__version__)
    assert row.items() >= expected.items()


def test_rows_are_appended(tmp_path):
    file = tmp_path / 'results.csv'
    for batch in (1, 2):
        results.check_file(str(file), ['.csv'])
        results.write_row(row_of('a, b', 'c', 1 / 3, [1.0], batch=batch), str(file))
    with open(file) as lines:
        rows = list(csv.DictReader(lines))
    assert [(row['model'], row['batch'], row['gmacs'], row['error']) for row in rows] == [
        ('a, b', '1', '0.333333', ''), ('a, b', '2', '0.333333', ''),
    ]  # fmt: skip
    with pytest.raises(InputError, match='expected a file in an existing folder'):
        results.check_file(str(tmp_path / 'nowhere' / 'plot.png'), ['.png'])


def test_an_error_has_lines_of_its_own():
    row = dict(mode='inference', model='a' * 60, keep_ratio='0.7,0.3', image_size='1344x1344', batch=32)
    line, *error = results.table_line(row | {'error': 'word ' * 50}, 60).splitlines()
    assert 'a' * 32 + '…' in line and len(line) <= 120 and all(len(part) <= 120 for part in error)
    assert ' '.join(error).split() == ['word'] * 50


@pytest.mark.parametrize('load, cores, busy', [(3.0, 2, True), (1.6, 2, True), (1.4, 2, False), (3.0, 16, False)])
def test_a_busy_machine_is_warned_of(monkeypatch, load, cores, busy):
    monkeypatch.setattr(os, 'cpu_count', lambda: cores)
    warning = f'warning: the machine was busy before the start (load {load} in the last minute, {cores} cores'
    assert [line.startswith(warning) for line in results.warn_if_busy(load, 1)] == [True] * busy


@pytest.mark.parametrize('slowest, disturbed', [(1.2, False), (2, True), (12, True)])
def test_spread_is_warned_of(slowest, disturbed):
    rows = [row_of('steady', 'steady', 1.0, [1.0] * 9), dict(model='failed', error='out of memory')]
    rows.append(row_of('shaky', 'shaky', 2.0, [1.0, 1.0, 1.0, *[slowest] * 3]))
    expected = f'warning: latency, shaky, 224 px, batch 1: img/s vary {slowest:.1f}-fold (p90 / p10)'
    assert [line.startswith(expected) for line in results.warn_of_spread(rows)] == [True] * disturbed


def draw(monkeypatch, folder, rows: list[dict], x: str = 'gmacs') -> Figure:
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, file, format: figures.append(figure))
    results.plot(rows, x, str(folder / 'plot.png'))
    figures[0].draw_without_rendering()
    return figures[0]


def test_lines_differ_and_baselines_belong_to_their_models(monkeypatch, tmp_path):
    rows = [dict(model='failed', error='KeyError: nothing to draw')]
    for i in range(12):
        rows += [row_of(f'm{i}', f'm{i}', 1 + i, [1.0, 1 + i]), row_of(f'dense {i}', f'm{i}', 2 + i, [2.0, 2 + i])]
    figure = draw(monkeypatch, tmp_path, rows)
    panel, by_model = figure.axes[0], {row['model']: row for row in rows[1:]}
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == sorted(by_model)
    style = {}
    for container in panel.containers:
        (line, _, (bars,)), row = container, by_model[container.get_label()]
        speeds = [row[f'images_per_second{end}'] for end in ('_p10', '', '_p90')]
        np.testing.assert_allclose(line.get_xydata(), [[row['gmacs'], speeds[1]]])
        np.testing.assert_allclose(bars.get_segments()[0][:, 1], speeds[::2])
        style[row['model']] = line.get_color(), line.get_marker(), line.get_fillstyle(), line.get_linestyle()
    assert len(set(style.values())) == 24
    for i in range(12):
        ours, dense = style[f'm{i}'], style[f'dense {i}']
        assert ours[:2] == dense[:2] and (ours[2:], dense[2:]) == (('full', '-'), ('none', '--'))
    legend = figure.legends[0].get_window_extent()
    assert not legend.overlaps(panel.bbox) and figure.bbox.contains(*legend.min) and figure.bbox.contains(*legend.max)


def test_what_was_swept_besides_is_in_the_label(monkeypatch, tmp_path):
    """One line for each batch and keep ratio, not one that goes back and forth. Batches of two modes are no sweep."""
    rows = [
        row_of('m', 'm', 1.0, [1.0, 1.2], image_size=size, batch=batch, keep_ratio=ratio)
        for size in (64, 32) for batch in (1, 3) for ratio in ('0.5', '0.3')
    ]  # fmt: skip
    panel = draw(monkeypatch, tmp_path, rows, 'image_size').axes[0]
    assert [text.get_text() for text in panel.get_xticklabels()] == ['32', '64']
    labels = {container.get_label() for container in panel.containers}
    assert labels == {f'm, keep {ratio}, batch {batch}' for ratio in ('0.3', '0.5') for batch in (1, 3)}
    assert all(container.lines[0].get_xdata().tolist() == [32, 64] for container in panel.containers)
    rows = [row_of('m', 'm', 1.0, [1.0, 1.2], mode=mode, batch=batch) for mode, batch in (('a', 1), ('b', 32))]
    panels = draw(monkeypatch, tmp_path, rows).axes
    assert [[line.get_label() for line in panel.containers] for panel in panels] == [['m'], ['m']]


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere allocators do other things')
def test_what_is_timed_gets_no_new_memory():
    """Pages from the kernel would take time, more of it in the calls of one model than in those of another."""
    code = """if True:
        import resource, timm, torch
        from measure.timing import time_alternately

        torch.set_num_threads(1)
        model, x = timm.create_model('vit_tiny_patch16_224').eval(), torch.randn(16, 3, 224, 224)

        @torch.inference_mode()
        def forward():
            model(x)

        def new_pages(turns):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            time_alternately([forward], turns, 1, torch.device('cpu'))
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        new_pages(1)
        print(new_pages(4))
    """
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10_000, done.stdout  # for five calls, of which each would take tens of thousands
