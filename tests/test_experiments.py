"""Each experiment runs to its end on toy data."""

import argparse
import csv
import importlib
import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image

sys.path.append(str(ROOT / 'experiments'))  # where scripts find them

import common  # noqa: E402
import gpu  # noqa: E402
import plots  # noqa: E402
import selection  # noqa: E402
from trained_decoder import compare  # noqa: E402

from measure import results  # noqa: E402
from models import evolution  # noqa: E402


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an experiment's main with flags, twice as if it had been stopped; returns its rows."""
    torch.manual_seed(0)
    torch.save(timm.create_model('vit_tiny_patch16_224').state_dict(), tmp_path / 'w.pth')
    monkeypatch.setattr(common, 'images_per_second', partial(common.images_per_second, turns=2))

    def start(name: str, *flags) -> list[dict]:
        path = tmp_path / 'out' / name
        given = ['--output', path, '--data-path', tmp_path, '--batch-size', 2]
        if name in ('finetune', 'from_scratch'):
            given += ['--runs', tmp_path / 'runs']
        if name in ('training_free', 'trained_decoder', 'selection'):
            given += ['--images', 'all']
        if name != 'from_scratch':
            given += ['--model', 'vit_tiny_patch16_224', '--weights', tmp_path / 'w.pth']
        monkeypatch.setattr(sys, 'argv', [name, *map(str, [*given, *flags])])
        for _ in range(2):  # the second time there is nothing left to compute, and it is plotted again
            importlib.import_module(name).main()
            rows = read_csv(path.with_suffix('.csv'))
            assert path.with_suffix('.png').stat().st_size > 10_000
        return rows

    return start


def read_csv(path) -> list[dict]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def noise(path, *size: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def run_gpu(monkeypatch, tmp_path, capsys):
    """Run the GPU script on the CPU with tiny settings; returns what it printed."""

    def start(*flags) -> str:
        flags = ['--device', 'cpu', '--tiny', '--output', tmp_path, *flags]
        monkeypatch.setattr(sys, 'argv', [str(ROOT / 'experiments' / 'gpu.py'), *map(str, flags)])
        gpu.main()
        return capsys.readouterr().out

    return start


def test_both_forms_of_attention_attend_to_each_member_of_a_cluster():
    for channels in (32, 63, 64, 80):
        q, k, v = torch.randn(3, 2, 3, 13, channels)
        size = torch.randint(1, 9, (2, 12))
        mask = evolution.log_size_mask(size.float(), torch.float32, 1)
        for i in range(2):
            repeats = torch.cat([torch.ones(1, dtype=torch.int64), size[i]])
            members = [x[i].repeat_interleave(repeats, 1) for x in (k, v)]
            expected = torch.nn.functional.scaled_dot_product_attention(q[i], *members)
            for form in (gpu.with_mask, gpu.with_channel):
                torch.testing.assert_close(form(q, k, v, mask)[i], expected, rtol=0, atol=1e-5)


def test_the_gpu_script_measures_what_is_missing(run_gpu, tmp_path):
    parts = ['attention', 'stage', 'deit', 'train', 'large']
    run_gpu('--here', '--parts', *parts)
    files = {path.name: path.read_text() for path in tmp_path.glob('gpu*.csv')}
    rows, kernels = (read_csv(tmp_path / name) for name in ('gpu.csv', 'gpu-kernels.csv'))
    dense = 'vit_tiny_patch16_224 depth=3 embed_dim=48 num_heads=3'
    names = {*(f'vit_tiny_patch16_224 {method}' for method in ('nearest', 'none', 'merge')), dense}
    for compiled in (True, False):
        some = [row for row in rows if (row['compile'] != 'no') == compiled]
        for batch in ('1', '2'):
            measured = [row['model'] for row in some if (row['mode'], row['batch']) == ('inference', batch)]
            assert sorted(measured) == sorted(names)
        assert {row['model'] for row in some if row['mode'] == 'train'} >= {'evo_deit_nano_patch4_32', dense}
        found = {(row['part'], row['what']) for row in kernels if (row['compile'] == 'yes') == compiled}
        stages = {('stage', method) for method in ('nearest', 'none', 'dense')}
        assert found == stages | {('attention', 'with_mask'), ('attention', 'with_channel')}
    assert all(float(row['ms']) > 0 for row in rows + kernels)
    # The second time nothing is missing, so no process is started.
    assert run_gpu('--parts', *parts) == ''.join(f'{part}: nothing missing\n' for part in parts)
    assert {path.name: path.read_text() for path in tmp_path.glob('gpu*.csv')} == files


@pytest.mark.slow
def test_a_part_without_time_says_what_is_missing(run_gpu):
    printed = run_gpu('--parts', 'train', '--minutes', 0)
    assert 'train: at most 1 seconds\ntrain: 4 missing\n    train, 64 px, batch 2: vit_tiny_patch16_224' in printed


def test_training_free(run, tmp_path, capsys):
    for folder, names in (('val', 'a'), ('b/val', 'ab')):
        for synset in ('n01440764', 'n01443537'):
            for name in names:
                noise(tmp_path / folder / synset / f'{name}.png', 230, 240)
    both = '--data-path', tmp_path, tmp_path / 'b', '--images', 'all', 'all'
    methods = '--methods', 'nearest', 'merge', 'smaller image', 'smaller, nearest'
    rows = run('training_free', '--budgets', 0.6, 'recommended', *methods, *both)
    names = ['dense', 'nearest', 'merge', 'smaller image', 'smaller, nearest', 'nearest', 'merge']
    assert [row['method'] for row in rows] == 3 * names
    sets = {row['images']: row['n'] for row in rows}
    assert list(sets.values()) == ['2', '4', '6'] and list(sets) == [tmp_path.name, 'b', f'{tmp_path.name}+b']
    first = rows[: len(names)]
    assert first[3]['schedule'] == 'image_size 176 176' and first[3]['grid'] == ''
    assert first[4]['schedule'] == 'image_size 208 208, keep_ratio 0.7 0.3, representative nearest'
    assert [row['schedule'] for row in first[5:]] == ['keep_ratio 0.7 0.3, representative nearest', 'merge_r 13']
    dense, *others = (float(row['gmacs']) for row in first)
    assert all(abs(gmacs / dense - 0.6) < 0.02 for gmacs in others[:3]) and 0.55 < others[3] / dense < 0.6
    assert all(row['commit'] for row in rows) and all(row['speedup'] == rows[1]['speedup'] for row in rows[1::7])
    for each in ('same', 'kl', 'top1', 'grid'):
        for i in (1, 2):  # pooled
            parts = [float(rows[i + 7 * k][each]) for k in range(3)]
            assert (2 * parts[0] + 4 * parts[1]) / 6 == pytest.approx(parts[2], rel=2e-3)
    assert float(rows[0]['kl']) == 0 < float(rows[1]['kl']) < 1
    printed = capsys.readouterr().out
    assert printed.count('\nnearest at budget 0.6, to merge: ') == 6 and 'all, 6 images' in printed
    assert (tmp_path / 'out' / 'training_free_headline.png').stat().st_size > 10_000
    # A trial with fewer images is not taken for the whole.
    rows = run('training_free', '--budgets', 0.6, '--methods', 'nearest', '--limit', 1)
    assert [row['n'] for row in rows[21:]] == ['1', '1']
    with pytest.raises(SystemExit, match='a list for each of 2 folders of --data-path, found 1'):
        run('training_free', *both[:-1])
    with pytest.raises(SystemExit, match='sets of different names, found val twice'):
        run('training_free', '--data-path', tmp_path / 'val', tmp_path / 'b/val', '--images', 'all', 'all')


def test_dense_prediction(run, tmp_path):
    for split in ('train', 'test'):
        for i in range(2):
            noise(tmp_path / split / f'{i}.jpg', 60, 80)
            (tmp_path / f'{split}annot').mkdir(exist_ok=True)
            labels = np.random.default_rng(i).integers(0, 12, (6, 8), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            Image.fromarray(labels).save(tmp_path / f'{split}annot' / f'{i}.png')
    methods = '--methods', 'nearest', 'smaller image'
    rows = run('dense_prediction', '--budgets', 0.6, *methods, '--seeds', 1, '--size', 96, 64)
    assert [row['method'] for row in rows] == ['dense', 'nearest', 'smaller image']
    assert rows[2]['schedule'] == 'image_size 48 80' and float(rows[2]['width']) == 96
    assert float(rows[0]['off']) == 0 and 0 <= float(rows[1]['miou']) <= 100


def test_trained_decoder(run, tmp_path, capsys):
    for i in range(3):
        noise(tmp_path / 'val' / 'n01440764' / f'{i}.png', 100 + i, 120)
    torch.manual_seed(0)
    widths = 192, 8, 4, 4
    weights = {'final_conv.weight': torch.randn(1, 4, 1, 1), 'final_conv.bias': torch.zeros(1)}
    for i in (1, 2, 3):
        weights[f'upconv{i}.weight'] = torch.randn(*widths[i - 1 : i + 1], 4, 4) / 8
        zeros = f'upconv{i}.bias', f'bn{i}.bias', f'bn{i}.running_mean'
        weights |= dict.fromkeys(zeros, torch.zeros(widths[i]))
        weights |= dict.fromkeys((f'bn{i}.weight', f'bn{i}.running_var'), torch.ones(widths[i]))
    torch.save(weights, tmp_path / 'decoder.pth')
    methods = 'nearest', 'late, merge_norm', 'smaller image'
    flags = '--decoder', tmp_path / 'decoder.pth', '--sizes', 64, '--budgets', 0.6, '--methods', *methods
    rows = run('trained_decoder', *flags)
    assert [(row['method'], row['size']) for row in rows] == [(name, '64') for name in ('dense', *methods)]
    assert rows[3]['schedule'] == 'image_size 48 48' and rows[2]['schedule'].startswith('merge_r 0 0 0 0 ')
    assert [float(rows[0][name]) for name in ('correlation', 'error', 'iou')] == [1, 0, 1]
    assert all(0 < float(row['error']) < 1 and float(row['correlation']) < 1 for row in rows[1:])
    assert all(float(row['gmacs']) < float(row['gmacs_whole']) and row['speedup'] for row in rows)
    printed = capsys.readouterr().out
    assert re.search('nearest at budget 0.6, to late, merge_norm: .* in correlation, .* in IoU', printed)


def test_maps_are_compared_image_by_image():
    dense = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.1, 0.2], [0.3, 0.4]], [[0.9, 0.9], [0.9, 0.1]]])
    maps = torch.stack([1 - dense[0], dense[1] / 2, torch.tensor([[0.9, 0.9], [0.1, 0.1]])])
    found = compare(maps, dense)
    assert found['error'].tolist() == pytest.approx([1, 0.125, 0.2])
    assert found['correlation'].tolist() == pytest.approx([-1, 1, 3**-0.5])
    assert found['iou'].tolist() == pytest.approx([0, 1, 2 / 3])  # nothing is above 0.5 in both maps of the second
    small = compare(torch.full((1, 1, 1), 0.7), torch.full((1, 2, 2), 0.7))  # resized; no map varies
    assert small['error'].item() == small['correlation'].item() == 0 and small['iou'].item() == 1


def test_selection(run, tmp_path, capsys):
    for name, height in (('a.png', 230), ('b.png', 300), ('c.png', 300), ('d.png', 230)):
        noise(tmp_path / 'val' / 'n01440764' / name, height, 240)
    # The box of c lies outside of its crop, and d has none.
    boxes = {'a.png': [[20, 20, 130, 220]], 'b.png': [[90, 20, 130, 220]], 'c.png': [[0, 0, 9, 9]]}
    (tmp_path / 'own.json').write_text(json.dumps(boxes))
    with pytest.raises(SystemExit, match='boxes.json: expected boxes.json, or a folder of XML files'):
        run('selection')
    rows = run('selection', '--boxes', tmp_path / 'own.json')
    assert 'without boxes, left out: 1 of 4 images, such as d.png' in capsys.readouterr().out
    assert {row['n'] for row in rows} == {'3'}
    assert [(row['method'], row['block']) for row in (rows[0], *rows[1::11])] == [
        ('centre', '0'), ('attention', '1'), ('novelty', '1'), ('random', '1'),
    ]  # fmt: skip
    assert all(0 < float(row['kept_of_box']) < 100 for row in rows)
    assert all(0 < float(row['kept_again_8px']) <= 100 for row in rows[1:])


def test_images_are_those_of_a_list(tmp_path):
    for number in (3, 4, 293):
        noise(tmp_path / 'val' / 'n01440764' / f'ILSVRC2012_val_{number:08}.JPEG', 8, 8)
    listing = tmp_path / 'list.txt'

    def found(text: str, limit: int | None = None) -> list[str]:
        listing.write_text(text)
        return [path.stem[-3:] for path in common.find_images(tmp_path, listing, limit)[0]]

    assert found('293\n4') == ['004', '293'] and found('293\n4', limit=1) == ['004']
    for text, message in (
        ('4 5', 'found 1 of 2; ILSVRC2012_val_00000005.JPEG is missing. --images all uses the 3 images'),
        ('4 n5', '--images .*list.txt: expected a file of numbers, or all: .*n5'),
        ('', 'expected images, found none'),
    ):
        with pytest.raises(SystemExit, match=message):
            found(text)
    with pytest.raises(SystemExit, match='expected a file of numbers, or all: .*No such file'):
        common.find_images(tmp_path, tmp_path / 'none.txt')
    parser = argparse.ArgumentParser()
    common.add_images(parser)
    assert len({*(ROOT / parser.get_default('images')).read_text().split()}) == 500


def test_boxes_are_read_from_the_xml_files_of_imagenet(tmp_path):
    box = '<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>'
    (tmp_path / 'a.xml').write_text(f'<annotation><object>{box}</object><object>{box}</object></annotation>')
    assert selection.load_boxes(tmp_path) == {'a.JPEG': [[1, 2, 30, 40]] * 2}


def test_the_setting_is_that_with_the_nearest_gmacs(monkeypatch):
    # A method in steps of ten: 42 is nearer to 40, 46 to 50.
    monkeypatch.setattr(common, 'gmacs', lambda model: model)
    steps = lambda t: 10 * round(10 * t)  # noqa: E731
    assert [steps(common.find_setting(steps, target)) for target in (42, 46)] == [40, 50]


def test_schedules_of_merging_merge_as_many_patches():
    assert common.merge_rates('merge', 120, 12) == 10
    assert common.merge_rates('late, merge_norm', 120, 12) == (0,) * 4 + (15,) * 8
    decreasing = common.merge_rates('decreasing, merge', 120, 12)
    assert decreasing[0] == 20 and decreasing[-1] == 0 and sum(decreasing) == 120
    assert list(decreasing) == sorted(decreasing, reverse=True)
    model = timm.create_model('vit_tiny_patch16_224')
    assert common.settings('merge_norm', 'recommended', model) == ('merge_norm', {'merge_r': 13})  # as in ToMe's paper
    assert common.settings('fuse', 'recommended', model) == ('fuse', {'keep_ratio': 0.7})  # as in EViT's


def test_rows_keep_the_commit_and_the_precision(monkeypatch, tmp_path):
    """A commit may read as a number."""
    for commit, precision in (('3e80123', {}), ('0123456', {'precision': 'bf16'})):
        circumstances = results.circumstances() | {'commit': commit}
        monkeypatch.setattr(common, 'circumstances', lambda name, row=circumstances: row | {'precision': name})
        common.Rows(tmp_path / 'a.csv', {'n': 2}).add(method=commit, **precision)
    rows = common.Rows(tmp_path / 'a.csv', {'n': 2}).rows
    assert [(row['commit'], row['precision']) for row in rows] == [('3e80123', 'fp32'), ('0123456', 'bf16')]
    assert rows[0]['device'] == circumstances['device'] and rows[0]['torch'] == torch.__version__


def test_speeds_of_a_gpu_stand_beside_those_of_a_cpu(monkeypatch, tmp_path):
    rows = common.Rows(tmp_path / 'a.csv', {'n': 2})
    for method in ('dense', 'a'):
        rows.add(method=method, setting=1.0)
    speeds = iter([2.0, 1.0, 3.0, 1.5])
    monkeypatch.setattr(common, 'circumstances', lambda _, device=None: {'device': str(device)})
    monkeypatch.setattr(common, 'images_per_second', lambda *_, **__: (speed := next(speeds), [speed] * 3))
    for device in ('cpu', 'cuda', 'cuda'):  # the third time there is nothing left to measure
        rows.measure('missing', device, lambda *_: None, 4)
    found = [(row['speedup'], row['gpu_speedup'], row['gpu_speed_batch']) for row in rows.rows]
    assert found == [(2, 3, 4), (1, 1.5, 4)]
    assert {(row['speed_device'], row['gpu_speed_device']) for row in rows.rows} == {('cpu', 'cuda')}


def test_a_line_goes_through_its_points_by_gmacs():
    speeds = {1.0: 0.9, 2.0: 1.4, 3.0: 1.1}  # on a GPU, more GMACs may be faster
    rows = [
        dict(method='nearest', gmacs=gmacs, gpu_speedup=speed, off=-gmacs, off_low=-gmacs - 1, off_high=0.0)
        | dict(gpu_speed_device='GPU', gpu_speed_precision='bf16', gpu_speed_batch=4)
        | dict(gpu_speedup_p10=speed / 2, gpu_speedup_p90=2 * speed)
        for gmacs, speed in speeds.items()
    ]
    (column,), (label,) = zip(*plots.speed_axes([*rows, {'method': 'merge'}]).items(), strict=True)
    assert (column, label) == ('gpu_speedup', 'speed-up over dense (thin: p10 to p90)\nGPU, bf16, batch 4')
    axes = plots.Figure().subplots()
    plots.draw_methods(axes, rows[::-1] + [{'method': 'nearest', 'gmacs': 9}], column, 'off', 'off')
    (container,) = axes.containers
    assert container.lines[0].get_xydata().tolist() == [[0.9, -1], [1.4, -2], [1.1, -3]]
    assert container.lines[2][0].get_segments()[0].tolist() == [[0.9, -2], [0.9, 0]]
    assert axes.collections[0].get_segments()[0].tolist() == [[0.45, -1], [1.8, -1]]


def test_methods_are_compared_over_pairs_of_one_seed_and_device():
    top1 = {('a', 0): 81.0, ('a', 1): 83.0, ('a', 2): 10.0, ('b', 0): 80.0, ('b', 1): 81.0}
    rows = [dict(method=method, seed=seed, top1=value, device='cpu') for (method, seed), value in top1.items()]
    rows.append(dict(method='b', seed=2, top1=90.0, device='gpu'))
    off, half, n = common.compare_seeds(rows, 'a', 'b')
    # Differences 1 and 2: mean 1.5, deviation 0.71, t of one degree of freedom 12.7.
    assert (off, n) == (1.5, 2) and half == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert common.verdict(off, half) == 'no significant difference' and common.verdict(-7, half) == 'worse'


def test_values_of_images_come_back_from_their_text():
    values = torch.rand(13, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(common.unpack(common.pack(values), 13), values, rtol=1e-3, atol=0)
    assert torch.equal(common.unpack(common.pack(values < 0.5), 13), (values < 0.5).float())


def test_boxes_go_where_the_crop_shows_them():
    # Twice as wide as high, halved, cropped to its middle: the left half of the crop, and one beside the crop.
    cover = selection.crop_boxes([[200, 0, 400, 400], [0, 0, 150, 400]], (800, 400), (400, 200), 200, 4).view(4, 4)
    assert cover[:, :2].eq(1).all() and cover[:, 2:].eq(0).all()
    mask = selection.center(4, 4)
    assert mask[1:3, 1:3].all() and mask.sum() == 4
    # A box over the upper half of the image: two of its eight patches are in the middle.
    cover = torch.zeros(4, 4).index_fill(0, torch.tensor([0, 1]), 1)
    assert selection.percent_of_box(mask[None], cover.view(1, 16)).tolist() == [25]


@pytest.fixture
def classes(tmp_path):
    for split in ('train', 'val'):
        for i in range(8):
            noise(tmp_path / split / f'class{i % 2}' / f'{i}.png', 32, 32)


def test_finetune(run, classes, script, monkeypatch):
    def run_here(flags):  # to start a process takes seconds; test_from_scratch does
        arguments = sys.argv
        script('main_deit', *flags)
        sys.argv = arguments

    monkeypatch.setattr(common, '_run_main', run_here)
    flags, methods = ('--images', 4, 2, '--epochs', 1), ['dense', 'smaller image', 'nearest', 'drop']
    run('finetune', *flags, '--seeds', 1, '--methods', 'dense', 'nearest')
    rows = run('finetune', *flags, '--seeds', 0, '--methods', *methods)[2:]
    assert [row['method'] for row in rows] == methods
    assert len({row['gmacs'] for row in rows}) == 4 and all(float(row['speedup']) > 0 for row in rows)
    assert all(abs(float(row['gmacs']) / float(rows[1]['gmacs']) - 1) < 0.03 for row in rows[2:])


@pytest.mark.slow
def test_from_scratch(run, classes):
    rows = run('from_scratch', '--epochs', 1, '--seeds', 0, '--methods', 'dense', 'nearest')
    assert [row['method'] for row in rows] == ['dense', 'nearest']
    assert float(rows[1]['gmacs']) < float(rows[0]['gmacs'])
