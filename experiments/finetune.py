"""Fine-tuning a pretrained ViT: which way to make it faster costs least accuracy, and is a smaller image as good?

    python3 experiments/finetune.py --weights deit_tiny_patch16_224_in1k.pth --data-path cifar10

DeiT-Ti to CIFAR-10 at 224 px: 5,000 training and 2,000 validation images (the first of each class, from
{train,val}/<class>/*), 3 epochs of AdamW, batch 32, three seeds; the rate falls from 6e-4 to 0, times 0.7 for
each layer down. `smaller image` is the dense model at 176 px; all other methods are set to its arithmetic, 0.58 of that
at 224 px. A row has the top-1 of a method and seed after the last epoch, GMACs, and images a second in training,
alternating with dense. It goes on where it was stopped.

Rule, stated before it was run: of two methods one is better if the 95 % interval (Student's t over seeds) of the paired
difference in top-1 excludes 0; otherwise they are equal. Evolving is worth having here if 'nearest' is not worse than
`smaller image`.
"""

import time
from functools import partial
from pathlib import Path

from common import (
    Rows,
    build,
    draw_seeds,
    find_setting,
    get_parser,
    gmacs,
    method_flags,
    schedule,
    settings,
    train,
)
from torch import nn

METHODS = 'dense', 'smaller image', 'nearest', 'none', 'one', 'drop', 'fuse', 'merge'
SMALLER = 176  # px
RECIPE = """--sched-on-updates --warmup-epochs 0 --lr 1e-2 --min-lr 0 --layer-decay 0.7 --drop-path 0 --mixup 0
    --cutmix 0 --reprob 0 --scale 0.5 1 --color-jitter 0 --no-repeated-aug --no-model-ema --num_workers 1""".split()


def link_subset(root: Path, folder: Path, train: int, val: int) -> Path:
    """A folder with links to the first images of each class, so many in all."""
    for split, count in (('train', train), ('val', val)):
        classes = sorted(path for path in (root / split).iterdir() if path.is_dir())
        for name in classes:
            images = sorted(name.iterdir())[: count // len(classes)]
            if len(images) < count // len(classes):
                raise SystemExit(f'{name}: expected {count // len(classes)} images or more, found {len(images)}')
            (folder / split / name.name).mkdir(parents=True, exist_ok=True)
            for image in images:
                link = folder / split / name.name / image.name
                if not link.exists():
                    link.symlink_to(image.resolve())
    return folder


def main():
    parser = get_parser(__doc__, 'finetune')
    parser.add_argument('--runs', type=Path, default='output/finetune', help='folder of the training runs')
    parser.add_argument(
        '--images', type=int, nargs=2, default=(5000, 2000), metavar='N', help='of training, validation'
    )
    parser.add_argument('--epochs', type=int, default=3, help='of each run')
    parser.add_argument('--seeds', type=int, nargs='+', default=(0, 1, 2), help='those to run')
    parser.add_argument('--methods', nargs='+', default=METHODS, help='those to run')
    parser.set_defaults(batch_size=32)
    args = parser.parse_args()
    output, runs = Path(args.output), args.runs.absolute()

    def make(method: str, t: float) -> nn.Module:
        smaller = method == 'smaller image'
        return build(args, 'dense' if smaller else method, t, SMALLER if smaller else None)

    dense, budget = make('dense', 1.0), gmacs(make('smaller image', 1.0))
    setup = dict(model=args.model, weights=Path(args.weights).name, n_train=args.images[0], n_test=args.images[1])
    setup |= dict(data=Path(args.data_path).name, epochs=args.epochs, batch_size=args.batch_size)
    rows = Rows(output.with_suffix('.csv'), setup)
    data = link_subset(Path(args.data_path), runs / 'data', *args.images)
    common = ['--model', args.model, '--finetune', Path(args.weights).absolute(), '--data-path', data, *RECIPE]
    common += ['--aa', '', '--epochs', args.epochs, '--eval-interval', args.epochs, '--device', args.device]
    common += ['--batch-size', args.batch_size]
    for seed in args.seeds:
        for method in args.methods:
            if rows.has(method=method, seed=seed):
                continue
            started, t, flags = time.perf_counter(), 1.0, []
            if method == 'smaller image':
                flags = ['--input-size', SMALLER]
            elif method != 'dense':
                t = find_setting(partial(make, method), budget)
                flags = method_flags(*settings(method, t, dense))
            log = train([*common, *flags, '--seed', seed], runs / f'{method.replace(" ", "-")}-{seed}')
            rows.add(
                method=method, seed=seed, setting=t, schedule=schedule(method, t, dense), gmacs=gmacs(make(method, t)),
                top1=log['test_acc1'],
                seconds=round(time.perf_counter() - started),
            )  # fmt: skip
    rows.measure(args.speed, make, args.batch_size, train=True)
    if args.speed != 'none':
        draw_seeds(rows.ours(), ['dense', 'smaller image'], 'fine-tuned', output.with_suffix('.png'))


if __name__ == '__main__':
    main()
