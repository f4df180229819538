"""Pictures show what the models select; files are whole or not there; wrong input is named."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from golden import fill
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import nn

import datasets
import models
import visualize
from image_data import shapes
from models import weights
from models.evolution import Selection
from pictures import curves, drawing
from utils import InputError

NANO = 'evo_deit_nano_patch4_32'


def photograph(width: int, height: int) -> Image.Image:
    """Noise, whose patches all differ."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 200, (height, width, 3)).astype(np.uint8))


def unfaded(image: np.ndarray, copy: np.ndarray, rows: int) -> list[int]:
    """Raster indices of the patches that a written copy shows as they are.

    All others must be 30 % image on 70 % veil, which is white but for gray lines, both in each patch.
    """
    edges = [-(-len(image) * i // rows) for i in range(rows + 1)]
    patches = []
    for i in range(rows * rows):
        y, x = (slice(edges[at], edges[at + 1]) for at in divmod(i, rows))
        if np.array_equal(copy[y, x], image[y, x]):
            patches.append(i)
        else:
            white, gray = (np.abs(copy[y, x] - (0.3 * image[y, x] + 0.7 * v)).max(2) <= 0.51 for v in (255, 128))
            assert (white | gray).all() and white.any() and gray.any()
    return patches


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Write random weights of a model; returns the path."""
    folder = tmp_path_factory.mktemp('weights')

    def make(name: str, num_classes: int = 4, **kwargs):
        path = folder / f'{name}_{num_classes}.pth'
        if not path.exists():
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=num_classes, **kwargs)
            for p in model.parameters():
                p.data += 0.05 * torch.randn_like(p)  # fresh weights attend alike to all
            torch.save({'model': model.state_dict()}, path)
        return path

    return make


@pytest.fixture
def draw(script, checkpoint, tmp_path):
    """Draw with random weights of the nano model, by default in.png to out/; returns what was printed."""

    def run(*flags, paths=('in.png',), resume=None, model=NANO) -> str:
        photograph(40, 32).save(tmp_path / 'in.png')
        flags = [*flags, *(['--img-path', *(tmp_path / path for path in paths)] if paths else [])]
        flags += ['--model', model] if model else []
        return script('visualize', *flags, '--resume', resume or checkpoint(model), '--output_dir', tmp_path / 'out')

    return run


def drawn(tmp_path, folder: str = 'out') -> set[str]:
    return {path.name for path in (tmp_path / folder).iterdir()}


def load_model(*flags) -> nn.Module:
    """The model that the script would draw."""
    args = visualize.get_parser().parse_args([str(flag) for flag in flags])
    return visualize.load_selecting_model(args, 'evo_deit_small_vis_patch16_224').model


@pytest.mark.parametrize('schedule', ['stage', 'layer'])
def test_pictures_show_the_golden_selection(schedule, tmp_path):
    description, golden = fill.load('evo_deit_tiny_patch16_224')
    model = timm.create_model('evo_deit_tiny_patch16_224').eval()
    weights.load_weights(model, {'model': fill.published_state(description)})
    model.set_schedule(schedule == 'stage')
    with torch.inference_mode():
        predictions = visualize.predict(model, fill.images('golden', 2, 224), [None, None])
    for i, prediction in enumerate(predictions):
        visualize.write_copies(tmp_path, str(i), prediction)
        image = read(tmp_path / f'{i}.png')
        for block in (4, 8) if schedule == 'stage' else range(4, 12):
            copy = read(tmp_path / f'{i}_block{block}.png')
            assert unfaded(image, copy, 14) == golden[f'kept_{schedule}_block{block}'][i].tolist()


@pytest.mark.parametrize(
    'name, kwargs, grids',
    [
        (NANO, {}, [8, 8]), ('evo_deit_small_patch16_384', dict(embed_dim=64, num_heads=2), [24, 24]),
        ('EvoLeViT_128', dict(img_size=32), [2, 1, 1]), ('EvoLeViT_128', {}, [14, 7, 4]),
    ],
)  # fmt: skip
def test_pictures_show_the_selection_of_every_model(name, kwargs, grids):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **kwargs).eval()
    side = kwargs.get('img_size', model.default_cfg['input_size'][1])
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        predictions = visualize.predict(model, images, [0, 1])
        logits, selections = model.forward_with_selection(images)
    for i, prediction in enumerate(predictions):
        np.testing.assert_allclose(prediction.probabilities, logits[i].softmax(0), atol=1e-6)
        for (selection, kept), rows in zip(selections.items(), grids, strict=True):
            shown, score, *_ = prediction.selections[selection]
            assert unfaded(prediction.image, drawing.fade(prediction.image, shown), rows) == kept[i].tolist()
            assert score[shown].min(initial=np.inf) >= score[~shown].max()
            assert score.mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize('side, rows', [(32, 8), (224, 28), (224, 4), (384, 24)])
def test_placeholders_are_told_from_kept_patches_on_any_image(side, rows):
    """Seen in gray too: each patch has pixels that change visibly, and marks of its own on an even image."""
    noise = np.random.default_rng(0).integers(0, 2, (side, side, 3))
    plain = [np.full((side, side, 3), level) for level in range(0, 256, 5)]
    colors = [np.broadcast_to(255 * np.array(rgb), (side, side, 3)) for rgb in np.ndindex(2, 2, 2)]
    for image in (*plain, *colors, 40 * noise, 215 + 40 * noise, 255 * noise):
        image = image.astype(np.uint8)
        faded = drawing.fade(image, np.zeros((rows, rows), bool))
        before, after = (
            np.stack([part for row in np.array_split(gray, rows) for part in np.array_split(row, rows, 1)])
            for gray in (np.asarray(Image.fromarray(pixels).convert('L')).astype(int) for pixels in (image, faded))
        )
        assert np.abs(after - before).max((1, 2)).min() >= 40
        if np.ptp(before) == 0:
            assert np.ptp(after, axis=(1, 2)).min() >= 80


@pytest.mark.parametrize('rows', [14, 7])
def test_a_coarser_patch_covers_the_one_it_comes_from(rows):
    """Down-sampling takes every second row and column; the picture of a coarse patch must show that very place."""
    image, coarse = np.zeros((224, 224, 3), np.uint8), (rows + 1) // 2
    for i in range(coarse):
        fine, kept = np.zeros((rows, rows), bool), np.zeros((coarse, coarse), bool)
        fine[2 * i, 0] = kept[i, 0] = True
        assert (drawing.fade(image, kept)[drawing.fade(image, fine) == 0] == 0).all()


@pytest.mark.parametrize('name', [NANO, 'EvoLeViT_128', 'evolved'])
def test_clusters_are_those_of_the_model(name):
    """Also on grids that are not square: kept patches as they are, the others in the mean color of their cluster."""
    torch.manual_seed(0)
    if name == 'evolved':
        vit = VisionTransformer((32, 64), patch_size=4, embed_dim=64, depth=6, num_heads=2, num_classes=4)
        model = models.evolve(vit).eval()
    else:
        model = timm.create_model(name, num_classes=4, representative='nearest').eval()
    height, width = getattr(model, 'img_size', None) or model.patch_embed.img_size
    images = torch.randn(2, 3, height, width)
    with torch.inference_mode():
        predictions, selections = visualize.predict(model, images, [None, None]), model.forward_blocks(images)[1]
        expected = model(images).softmax(1)
    for i, prediction in enumerate(predictions):
        np.testing.assert_allclose(prediction.probabilities, expected[i], atol=1e-6)
        for selection, chosen in selections.items():
            prefix = chosen.cluster.shape[1] - chosen.score.shape[1]
            kept, cluster = chosen.kept, chosen.cluster[:, prefix:] - prefix
            shown = prediction.selections[selection]
            rows, columns = shown.kept.shape
            assert np.flatnonzero(shown.kept).tolist() == kept[i].sort().values.tolist()
            with warnings.catch_warnings(action='error'):
                picture = drawing.mosaic(prediction.image, shown.kept, shown.cluster)
            y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
            labels, informative = cluster[i].reshape(rows, columns).numpy()[y][:, x], shown.kept[y][:, x]
            np.testing.assert_array_equal(picture[informative], prediction.image[informative])
            for number in np.unique(labels[~informative]):
                mean = prediction.image[labels == number].mean(0)
                inner = picture[(labels == number) & ~informative]
                # Pixels have the mean color or, at the edge, a darker or lighter one.
                filled = (np.abs(inner - mean) <= 0.51).all(1)
                line = 0.55 * mean + (0.45 * 255 if mean @ (0.299, 0.587, 0.114) < 128 else 0)
                assert filled.any() and (filled | (np.abs(inner - line) <= 0.51).all(1)).all()


@pytest.mark.parametrize(
    'patches, height, width, grid',
    [(196, 224, 224, (14, 14)), (336, 224, 384, (14, 24)), (24, 224, 384, (4, 6)), (16, 224, 224, (4, 4))],
)
def test_grids_have_the_shape_of_the_image(patches, height, width, grid):
    assert visualize.grid_shape(patches, height, width) == grid
    assert visualize.grid_shape(patches, width, height) == grid[::-1]


def test_grids_that_are_not_square_are_outlined_in_place():
    """The kept patch of a 2 x 4 grid, and the line around it."""
    kept = np.zeros((2, 4), bool)
    kept[1, 2] = True
    axes = Figure().subplots()
    drawing.draw_view(axes, drawing.View('', '', drawing.fade(np.zeros((32, 64, 3), np.uint8), kept), kept))
    corners = {tuple(point) for line in axes.collections[0].get_segments() for point in line}
    assert corners == {(0.5, 0.25), (0.75, 0.25), (0.5, 0.5), (0.75, 0.5)}
    assert axes.images[0].get_extent() == [0, 1, 0.5, 0]
    assert len(axes.collections[0].get_segments()) == 4


def test_any_vit_of_timm_is_evolved(draw, tmp_path):
    """From a plain state dict, with the flags of the schedule; without --evolve it is refused."""
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', num_classes=4, img_size=64).eval()
    save_file(model.state_dict(), tmp_path / 'w.safetensors')
    vit = dict(model='vit_tiny_patch16_224', resume=tmp_path / 'w.safetensors')
    with pytest.raises(InputError, match='or --evolve'):
        draw('--input-size', 64, **vit)
    with pytest.raises(InputError, match='--method merge selects no patches'):
        draw('--input-size', 64, '--method', 'merge', **vit)
    assert not drawn(tmp_path)
    draw('--input-size', 64, '--evolve', '--keep-ratio', 0.75, 0.25, '--stages', 3, 6, **vit)
    blocks = {f'in_block{i}{suffix}.png' for i in (3, 6) for suffix in ('', '_clusters')}
    assert drawn(tmp_path) == blocks | {'in_sheet.png', 'in.png'}
    image = read(tmp_path / 'out' / 'in.png')
    assert [len(unfaded(image, read(tmp_path / f'out/in_block{i}.png'), 4)) for i in (3, 6)] == [12, 4]
    draw('--input-size', 64, '--evolve', '--representative', 'none', '--save-name', 'b', **vit)
    rest = {f'b{suffix}.png' for suffix in ('', '_sheet', '_block4', '_block8')}
    assert drawn(tmp_path) == blocks | {'in_sheet.png', 'in.png'} | rest


def test_a_sheet_of_a_grid_without_clusters():
    """Where the only patch of a grid is a placeholder, nobody represents it."""
    model = timm.create_model('EvoLeViT_128', num_classes=2, img_size=32, representative='nearest').eval()
    with torch.inference_mode():
        (prediction,) = visualize.predict(model, torch.randn(1, 3, 32, 32), [1])
    clusters = [selection.cluster is not None for selection in prediction.selections.values()]
    figure = drawing.draw_sheet(prediction, ['ant', 'bee'])
    # The image, three selections with their scores, and the clusters of one.
    assert clusters == [True, False, False] and sum(bool(axes.images) for axes in figure.axes) == 1 + 2 * 3 + 1


def test_a_backbone_without_a_head_is_shown(draw, tmp_path, image_folder):
    model = timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=32)
    save_file(model.state_dict(), tmp_path / 'w.safetensors')
    flags = ['--input-size', 32, '--evolve', '--stages', 6, '--keep-ratio', 0.5]
    flags += ['--data-path', image_folder, '--batch-size', 2]
    printed = draw(*flags, model='vit_tiny_patch16_224', resume=tmp_path / 'w.safetensors', paths=())
    assert '[2/2]' in printed and '%' not in printed and len(drawn(tmp_path)) == 2 * 4 + 1


def test_a_contact_sheet_shows_the_clusters_of_the_last_selection():
    prediction = drawing.Prediction(np.zeros((32, 32, 3), np.uint8), None, np.array([0.2, 0.8]), {})
    for block in range(4):
        kept = np.arange(16).reshape(4, 4) < 8
        prediction.selections[f'blocks.{block}'] = Selection(kept, np.ones((4, 4)), np.arange(16).reshape(4, 4) % 8)
    figure = drawing.draw_contact([prediction] * 7, ['ant', 'bee'])
    shown = [axes for axes in figure.axes if axes.images]
    texts = [text.get_text() for axes in shown for text in axes.texts]
    assert len(shown) == 7 * 5 and texts.count('bee 80%') == 7
    bands = texts.count('image')
    titles = [f'block {block}:\n8 of 16\ninformative' for block in (0, 2, 3)]
    assert bands >= 1 and [texts.count(title) for title in (*titles, '8 patches\nrepresent\nall 16')] == [bands] * 4


def test_the_commands_of_the_readme(script, checkpoint, tmp_path):
    path = checkpoint('evo_deit_small_vis_patch16_224', 2)
    common = ['--model', 'evo_deit_small_vis_patch16_224', '--resume', path, '--output_dir', tmp_path / 'save']
    for kind in 'ab':
        folder = tmp_path / 'imagenet/val' / kind
        folder.mkdir(parents=True)
        photograph(300, 250).save(folder / 'x.jpeg')
    printed = script('visualize', *common, '--data-path', tmp_path / 'imagenet', '--batch-size', 64)
    assert f'written: {tmp_path}/save/seed0_contact.png, and a sheet' in printed
    printed = script('visualize', *common, '--img-path', ROOT / 'imgs/a.jpg', '--save-name', 'evo_test')
    assert f'written: {tmp_path}/save/evo_test_sheet.png' in printed
    names = drawn(tmp_path, 'save')
    assert {'evo_test.png', 'evo_test_block4.png', 'evo_test_block8.png', 'evo_test_sheet.png'} < names
    assert {'seed0_contact.png'} < names and len(names) == 4 + 2 * 4 + 1
    assert sum(name.endswith(('_right_block8.png', '_wrong_block8.png')) for name in names) == 2


def test_a_batch_is_a_function_of_the_seed(script, checkpoint, image_folder, tmp_path):
    flags = ['--model', NANO, '--resume', checkpoint(NANO)]
    flags += ['--data-path', image_folder, '--batch-size', 2, '--output_dir']
    for folder, seed in (('one', 3), ('two', 3), ('three', 4)):
        printed = script('visualize', *flags, tmp_path / folder, '--seed', seed)
    assert '[2/2]' in printed
    one, two, three = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ('one', 'two', 'three'))
    assert one == two
    chosen = [{name.split('_')[2] for name in pictures if 'block4' in name} for pictures in (one, three)]
    assert len(chosen[0]) == 2 and chosen[0] != chosen[1]
    dataset = datasets.ImageFiles(*datasets.image_folder(image_folder / 'val'), np.asarray)
    for name in one:
        if name.endswith('_sheet.png'):
            kind, seed, index, verdict, _ = name.split('_')
            image, label = dataset[int(index)]
            assert dataset.classes[label] == kind and seed == 'seed3' and verdict in ('right', 'wrong')
            np.testing.assert_array_equal(read(tmp_path / 'one' / name.replace('_sheet', '')), image)


@pytest.mark.parametrize('kind, magic', [('png', b'\x89PNG'), ('jpg', b'\xff\xd8'), ('pdf', b'%PDF')])
def test_formats(draw, tmp_path, kind, magic):
    draw('--format', kind)
    assert (tmp_path / f'out/in_sheet.{kind}').read_bytes().startswith(magic)
    assert drawn(tmp_path) == {'in.png', 'in_block4.png', 'in_block8.png', f'in_sheet.{kind}'}


def test_pictures_are_of_the_model_that_the_checkpoint_says(draw, checkpoint, tmp_path):
    """Its network, schedule, size and classes, without flags."""
    args = dict(model=NANO, keep_ratio=[0.25], representative=True, input_size=16, precision='bf16')
    names = ['ant', 'bee', 'cat', 'dog', 'emu']
    torch.save(torch.load(checkpoint(NANO, 5, img_size=16)) | {'args': args, 'classes': names}, tmp_path / 'a.pth')
    model = load_model('--resume', tmp_path / 'a.pth', '--model', NANO)
    assert (model.keep_ratio, model.representative) == ((0.25, 0.25), 'one')
    assert model.patch_embed.img_size == (16, 16)
    printed = draw(model=None, resume=tmp_path / 'a.pth')
    assert f'{NANO}, one representative, keeps 0.25 from block 4 and 0.25 from block 8, ' in printed
    assert any(f'in: {name} ' in printed for name in names) and 'trained in bf16, computed in fp32' in printed


def test_pictures_show_the_image_whatever_its_normalization(draw, tmp_path):
    photograph(32, 32).save(tmp_path / 'a.png')
    draw('--mean', 0.2, paths=['a.png'])
    np.testing.assert_array_equal(read(tmp_path / 'out' / 'a.png'), read(tmp_path / 'a.png'))


def test_a_plain_vit_is_shown_from_its_class_token(tmp_path):
    torch.manual_seed(0)
    plain = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, num_heads=2, num_classes=4).eval()
    save_file(plain.state_dict(), tmp_path / 'w.safetensors')
    model, x = load_model('--model', NANO, '--resume', tmp_path / 'w.safetensors'), torch.randn(2, 3, 32, 32)
    model.set_schedule(True, evolving=False)
    with torch.no_grad():
        predictions, expected = visualize.predict(model, x, [None, None]), plain(x).softmax(1)
    np.testing.assert_allclose([p.probabilities for p in predictions], expected, atol=1e-6)


def test_layers_and_animation(draw, tmp_path):
    draw('--layer-wise-prune', '--animate', model='EvoLeViT_128S')
    layers = {f'in_stage{i}_block{j}.png' for i, depth in ((1, 3), (2, 4)) for j in range(depth)}
    assert drawn(tmp_path) == layers | {'in.png', 'in_sheet.png', 'in.gif'}
    with Image.open(tmp_path / 'out/in.gif') as gif:
        assert (gif.n_frames, gif.info['loop']) == (1 + len(layers), 0)


def test_frames_go_through_the_selections():
    """Their pixels are those of the copies; titles leave the image where it is."""
    model = timm.create_model(NANO, num_classes=4, representative='nearest').eval()
    with torch.inference_mode():
        (prediction,) = visualize.predict(model, torch.randn(1, 3, 32, 32), [None])
    frames, views = drawing.draw_frames(prediction), drawing.views(prediction, prediction.selections)
    titles = ['image', 'block 4: 32 of 64 informative', '32 patches represent all 64', 'block 8: 32 of 64 informative']
    assert [frame.axes[0].get_title() for frame in frames[:4]] == titles
    for frame, view in zip(frames, views, strict=True):
        np.testing.assert_array_equal(frame.axes[0].images[0].get_array(), view.pixels)
        frame.canvas.draw()
    assert len({tuple(frame.axes[0].get_window_extent().bounds) for frame in frames}) == 1


def test_any_photograph(draw, tmp_path):
    """Gray, palette, transparent and turned images are shown upright and in three channels, resized and cropped."""
    turned, folder = Image.Exif(), tmp_path / 'photos'
    folder.mkdir()
    turned[0x0112] = 6  # to be turned by a quarter
    half = Image.new('RGB', (64, 32), 'black')
    half.paste('white', (0, 0, 32, 32))  # its left half; upright, the upper one
    half.convert('L').save(folder / 'gray.jpg', quality=95)
    half.convert('P').save(folder / 'palette.png', exif=turned)
    half.save(folder / 'turned.jpg', exif=turned, quality=95)
    clear = half.convert('RGBA')
    clear.putalpha(half.convert('L').point(lambda v: 255 - v))  # white where it is clear
    clear.save(folder / 'clear.png', exif=turned)
    draw('--save-name', 'any', paths=['photos'])
    for name in ('gray', 'palette', 'turned', 'clear'):
        image = read(tmp_path / f'out/any_{name}.png').astype(int)
        assert image.shape == (32, 32, 3) and (np.ptp(image, axis=2) < 8).all()
        bright, dark = (image[:, :12], image[:, 20:]) if name == 'gray' else (image[:12], image[20:])
        assert bright.min() > 200 and dark.max() < 55
    assert (tmp_path / 'out/any_contact1.png').exists()
    assert not list((tmp_path / 'out').glob('.*'))


@pytest.mark.parametrize(
    'files', ['a.jpg a.png a_1.jpg', 'a.jpg A.png', 'a.jpg a_block4_clusters.jpg', 'a.jpg a_Sheet.jpg contact1.jpg']
)
def test_no_picture_takes_the_name_of_another(files, draw, tmp_path):
    (tmp_path / 'photos').mkdir()
    for i, name in enumerate(files.split()):
        Image.new('RGB', (32, 32), (40 * i, 0, 0)).save(tmp_path / 'photos' / name)
    draw(paths=['photos'])
    # For each image: what the model sees, two selections, a sheet; and one contact sheet.
    assert len({name.casefold() for name in drawn(tmp_path)}) == 4 * len(files.split()) + 1


def test_names_are_those_of_the_files_where_they_can_be():
    files = [Path('x/IMG_1.jpg'), Path('x/IMG_12.png'), Path('y/IMG.jpg')]
    assert visualize.picture_names(files, 'p_') == ['p_IMG_1', 'p_IMG_12', 'p_IMG']
    numbered = ['p_1_IMG_1', 'p_2_IMG_12', 'p_3_IMG', 'p_4_IMG']
    assert visualize.picture_names([*files, Path('z/IMG.jpg')], 'p_') == numbered


def test_pictures_of_an_earlier_run_are_mentioned(draw, tmp_path):
    assert 'which holds' not in draw()
    assert 'out, which holds 4 files; those with the same names are replaced' in draw('--save-name', 'b')
    assert len(drawn(tmp_path)) == 8


class Chooser(nn.Module):
    """Selects half of 8 x 8 patches by a score that a function gives for the indices of the images."""

    def __init__(self, score):
        super().__init__()
        self.score, self.unused, self.seen = score, nn.Parameter(torch.zeros(1)), 0

    def forward_blocks(self, images):
        score = torch.stack([self.score(self.seen + i) for i in range(len(images))])
        self.seen += len(images)
        return None, {'blocks.4': Selection(score.topk(32).indices, score)}, []


def test_the_coverage_of_the_object():
    dataset = shapes.Shapes('val', 32, length=150, transform=lambda _: torch.zeros(3, 32, 32))

    def covered(index: int) -> torch.Tensor:
        mask = torch.from_numpy(dataset.mask(index)).float()
        return nn.functional.avg_pool2d(mask[None], 4).flatten() + 1e-6 * torch.arange(64)

    torch.manual_seed(0)
    found = {}
    for name, score in (('best', covered), ('worst', lambda i: -covered(i)), ('chance', lambda _: torch.rand(64))):
        fractions, found['by chance'] = visualize.object_coverage(Chooser(score), dataset, 64)['blocks.4']
        assert len(fractions) == 150
        found[name] = fractions.mean()
    assert found['best'] > 0.99 and found['worst'] < 0.15 and found['by chance'] == 0.5
    assert found['chance'] == pytest.approx(0.5, abs=0.03)


def test_score_is_printed_and_drawn(draw, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.Shapes.LENGTHS, 'val', 20)
    flags = ['--data-set', 'SHAPES', '--score', '--batch-size', 1, '--layer-wise-prune']
    printed = draw(*flags, resume=checkpoint(NANO, 10), paths=())
    assert printed.count('% of the object, chance 50.0 %') == 8 and '20 images' in printed and 'scored' not in printed
    assert 'score.png' in drawn(tmp_path)


def test_the_figure_of_the_score_has_its_numbers():
    coverage = {'blocks.4': (np.array([0.5, 1.0]), 0.7), 'blocks.8': (np.array([0.25, 0.25]), 0.3)}
    (axes,) = drawing.draw_coverage(coverage).axes
    mean, chance = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() in 'os']
    assert list(mean.get_ydata()) == [75, 25] and list(chance.get_ydata()) == pytest.approx([70, 30])
    (bars,) = axes.collections
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    assert ends[0] == pytest.approx((75 - 1.96 * 25 / 2**0.5, 75 + 1.96 * 25 / 2**0.5)) and ends[1] == (25, 25)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ['block 4', 'block 8']
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {'of the object', 'by chance'}


def test_a_broken_image_does_not_stop_the_others(draw, tmp_path, capfd):
    (tmp_path / 'photos').mkdir()
    for name in 'bd':
        photograph(40, 40).save(tmp_path / 'photos' / f'{name}.png')
    for name in ('a.jpg', 'c.png'):
        (tmp_path / 'photos' / name).write_bytes(b'no photograph')
    with pytest.raises(SystemExit) as end:
        draw(paths=['photos'])
    assert end.value.code == 1
    assert sorted(name for name in drawn(tmp_path) if 'sheet' in name) == ['b_sheet.png', 'd_sheet.png']
    errors = capfd.readouterr().err
    assert '2 of 4 images could not be drawn' in errors and 'a.jpg' in errors and 'c.png' in errors


def test_the_noise_of_a_run_that_converged_does_not_fill_its_panel():
    lines = [{'epoch': epoch, 'test_acc1': top1} for epoch, top1 in enumerate((99.65, 99.95))]
    bottom, top = curves.draw_curves({'run': lines}).axes[1].get_ylim()
    assert top <= 100.5 and top - bottom >= 10


def test_wrong_input_is_named_and_leaves_nothing(script, checkpoint, tmp_path, image_folder):
    nano, plain = checkpoint(NANO), checkpoint('deit_tiny_patch16_224')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'torn.jpg').write_bytes(b'\xff\xd8\xff\xe0 no photograph')
    photograph(40, 40).save(tmp_path / 'a.jpg')
    dense = torch.load(nano)
    dense['model']['_extra_state'] = torch.tensor([1, 0, dense['model']['_extra_state'][2]])  # stage-wise, not evolving
    torch.save(dense, tmp_path / 'dense.pth')
    good = {'--model': NANO, '--resume': nano, '--img-path': tmp_path / 'a.jpg'}
    good |= {'--output_dir': tmp_path / 'out'}
    for wrong, message in (
        ({'--save-name': '../x'}, "'../x': expected up to 50"),
        ({'--save-name': '.'}, 'leading dot'),
        ({'--save-name': '/etc/x'}, 'without folders'),
        ({'--save-name': 'x' * 300}, 'expected up to 50'),
        ({'--img-path': tmp_path / 'none.jpg'}, 'none.jpg does not exist'),
        ({'--img-path': tmp_path / 'empty'}, 'holds no images'),
        ({'--img-path': tmp_path / 'torn.jpg'}, 'torn.jpg'),
        ({'--img-path': None}, 'no images: expected'),
        ({'--img-path': None, '--data-path': tmp_path / 'none'}, 'none/val does not exist'),
        ({'--data-set': 'SHAPES'}, '4 classes, the data set 10'),
        ({'--data-path': image_folder, '--score': None}, 'expected --data-set SHAPES, found IMNET'),
        ({'--resume': tmp_path / 'none.pth'}, 'none.pth is not a file'),
        ({'--resume': tmp_path / 'a.jpg'}, 'a.jpg is not a readable checkpoint'),
        ({'--resume': plain}, 'does not fit EvoDeiT'),
        ({'--resume': tmp_path / 'dense.pth'}, 'every patch is informative'),
        ({'--model': 'deit_tiny_patch16_224', '--resume': plain}, 'selects no patches'),
        ({'--model': 'evo_deit_nona_patch4_32'}, NANO),
        ({'--output_dir': tmp_path}, 'could overwrite'),
        ({'--output_dir': tmp_path / 'a.jpg/out'}, 'cannot be written to'),
    ):
        flags = [(k, v) for k, v in (good | wrong).items() if v is not None or k == '--score']
        with pytest.raises(InputError, match=message):
            script('visualize', *[part for pair in flags for part in pair if part is not None])
        assert not list(tmp_path.glob('out/*')) and not list(tmp_path.glob('out/.*')), wrong


def write_run(folder, losses=(2.0, 1.5, 1.25)) -> list[dict]:
    """A run's log, as training writes it; evaluated in the first and the last epoch."""
    folder.mkdir(parents=True)
    lines = []
    for epoch, loss in enumerate(losses):
        line = dict(epoch=epoch, train_loss=loss, train_lr=1e-3 / (epoch + 1))
        line |= dict(selection='layer-wise' if epoch < 2 else 'stage-wise')
        if epoch in (0, len(losses) - 1):
            line |= dict(test_loss=loss - 0.1, test_acc1=50.0 + epoch, test_ema_acc1=None if epoch else 40.0)
        lines.append(line)
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return lines


def curves_of(axes) -> list[list[tuple]]:
    lines = [line for line in axes.lines if len(line.get_xdata()) != 2 or line.get_marker() != 'None']
    return [list(zip(*line.get_data(), strict=True)) for line in lines]


def test_learning_curves_are_the_numbers_of_the_log(tmp_path, script):
    lines = {'a': write_run(tmp_path / 'a'), 'b': write_run(tmp_path / 'b', (3.0, 2.5))}
    runs = curves.read_logs([str(tmp_path / name) for name in lines])
    figure = curves.draw_curves(runs)
    loss, top1, rate = figure.axes
    assert (loss.get_title(), top1.get_title(), rate.get_title()) == ('loss', 'validation top-1 (%)', 'learning rate')
    assert {axes.get_xlabel() for axes in figure.axes} == {'epoch'}
    expected = []
    for run in lines.values():
        expected.append([(line['epoch'], line['train_loss']) for line in run])
        expected.append([(line['epoch'], line['test_loss']) for line in run if 'test_loss' in line])
    assert curves_of(loss) == expected
    assert curves_of(rate) == [[(line['epoch'], line['train_lr']) for line in run] for run in lines.values()]
    assert [curve for curve in curves_of(top1) if curve[0][1] == 50] == [[(0, 50), (2, 52)], [(0, 50), (1, 51)]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ['a: best 52.00 % in epoch 2', 'b: best 51.00 % in epoch 1']
    # Without color too, runs differ by their markers, and training from validation by the line.
    assert len({line.get_marker() for line in rate.lines}) == 2
    assert [line.get_linestyle() for line in loss.lines] == ['-', '--'] * 2
    out = tmp_path / 'out'
    said = script('visualize', '--log', tmp_path / 'a', tmp_path / 'b' / 'log.txt', '--output_dir', out)
    assert f'written: {out / "curves.png"}' in said
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['curves.png']


def test_the_curves_of_one_run_show_where_selection_changes(tmp_path):
    write_run(tmp_path / 'a')
    figure = curves.draw_curves(curves.read_logs([str(tmp_path / 'a')]))
    assert [text.get_text() for text in figure.axes[1].texts] == [' stage-wise']
    assert list(figure.axes[1].lines[-1].get_xdata()) == [1.5, 1.5]


def test_logs_of_runs_with_the_same_name_are_told_apart(tmp_path):
    for name in 'ab':
        write_run(tmp_path / name / 'run')
    sources = [str(tmp_path / name / 'run') for name in 'ab']
    assert list(curves.read_logs(sources)) == sources


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'is not a file.*first epoch'), ('', 'is empty'), ('[1]\n', 'expected a line'),
        ('{"epoch": 0}\nnot json\n', 'expected a line of JSON'),
    ],
)  # fmt: skip
def test_logs_that_cannot_be_drawn(content, message, tmp_path, script):
    if content is not None:
        (tmp_path / 'log.txt').write_text(content)
    with pytest.raises(InputError, match=f'--log {tmp_path}.*{message}'):
        script('visualize', '--log', tmp_path, '--output_dir', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'flags, message',
    [
        ([], 'expected --resume'),
        (['--log', 'x', '--resume', 'y'], 'leave out --resume, or'),
        (['--log', 'x', '--score', '--animate'], 'leave out --score, --animate, or'),
    ],
)
def test_a_checkpoint_or_a_log_is_needed(flags, message, script):
    with pytest.raises(InputError, match=message):
        script('visualize', *flags)
