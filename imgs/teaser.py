"""The picture of the README: what a dense and an evolved DeiT-Ti compute and predict, side by side.

python3 imgs/teaser.py --weights deit_tiny_patch16_224_in1k.pth --images PHOTO.jpg ... --output imgs/teaser.webp
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from timm.data import create_transform, resolve_model_data_config  # noqa: E402

import models  # noqa: E402
from experiments.tables import FREE, JUDGE, find  # noqa: E402
from pictures.drawing import fade, prediction_text  # noqa: E402
from visualize import class_names, load_upright, predict  # noqa: E402

NAME, GRAY = 'deit_tiny_patch16_224', '#808890'  # legible on white and on dark pages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', required=True)
    parser.add_argument('--images', nargs='+', required=True)
    parser.add_argument('--output', default='imgs/teaser.webp')
    args = parser.parse_args()
    dense, evolved = timm.create_model(NAME), models.evolve(timm.create_model(NAME))
    for model in (dense, evolved):
        models.load_weights(model.eval(), args.weights)
    transform = create_transform(**resolve_model_data_config(dense), is_training=False)
    images = torch.stack([transform(load_upright(Path(path))) for path in args.images])
    classes = class_names(None, 1000)
    with torch.inference_mode():
        top, best = dense(images).softmax(1).max(1)
        predictions = predict(evolved, images, [None] * len(images))
    rows = [find(FREE, images=JUDGE, method=method, budget=budget) for method, budget in
            (('dense', 1), ('nearest', 'recommended'))]  # fmt: skip
    heads = [
        f'dense\n{rows[0]["gmacs"]:.2f} GMACs\n\n196 patches in\nevery block',
        f'evolved\n{rows[1]["gmacs"]:.2f} GMACs\nspeed-up {rows[1]["speedup"]:.2f}\non a CPU\n\n'
        '58 patches in\nblocks 8 to 11',
    ]
    figure = Figure((8.3, 3.4), dpi=200, facecolor='none')
    grid = figure.subplots(2, len(images), squeeze=False)
    figure.subplots_adjust(0.135, 0.06, 1, 1, 0.03, 0.16)
    for column, prediction in enumerate(predictions):
        kept = prediction.selections['blocks.8'].kept
        texts = f'{classes[best[column]]} {top[column]:.0%}', prediction_text(prediction, classes)[1]
        pixels = prediction.image, fade(prediction.image, kept)
        for axes, picture, text in zip(grid[:, column], pixels, texts, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
            axes.text(0.5, -0.04, text, color=GRAY, fontsize=9, ha='center', va='top', transform=axes.transAxes)
    for axes, head in zip(grid[:, 0], heads, strict=True):
        title, _, rest = head.partition('\n')
        axes.text(
            -0.08, 0.97, title, color=GRAY, fontsize=11, weight='bold', ha='right', va='top', transform=axes.transAxes
        )
        axes.text(-0.08, 0.83, rest, color=GRAY, fontsize=9, ha='right', va='top', transform=axes.transAxes)
    figure.savefig(args.output, pil_kwargs=dict(quality=85))
    print(f'written: {args.output}')


if __name__ == '__main__':
    main()
