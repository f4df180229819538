"""Which way to make a pretrained ViT faster costs least accuracy in fine-tuning, and is a smaller image as good?

    python3 experiments/finetune.py --weights deit_tiny_patch16_224_in1k.pth --data-path cifar10

A run takes half an hour on one core (dense 48 minutes), or two minutes on an H100 that eleven other runs share. There
are 24 runs. An interrupted command resumes.

DeiT-Ti is fine-tuned on CIFAR-10 at 224 px: 5,000 training and 5,000 validation images (the first of each class, from
{train,val}/<class>/*), 3 epochs of AdamW, batch size 32, three seeds. The learning rate falls from 1.25e-3 to 0, times
0.7 for each layer down; it was chosen for the dense model, see docs/log.md. `smaller image` is the dense model at 176
px; all other methods are set to its GMACs, 0.59 of those at 224 px. (The images have 32 px, so 176 px loses nothing of
them and neighboring patches are alike. This favors a smaller image, and clusters.) The seed sets the new head and the
order and crops of the images, which are the same for all methods. A row holds top-1 after the last epoch, GMACs, and
img/s in training, timed in turns with dense.

Rule, stated before the run: a method is better than another if the 95 % interval (Student's t over seeds) of their
paired difference in top-1 excludes 0; otherwise they do not differ significantly. Evolving is worth having here if the
interval of `nearest` minus `smaller image` lies above -1 point.
"""

from functools import partial
from pathlib import Path

from common import (
    Rows,
    build,
    evaluate,
    find_setting,
    get_parser,
    gmacs,
    method_flags,
    run_seeds,
    schedule,
    settings,
    smaller,
    train,
)
from plots import draw_seeds

METHODS = 'dense', 'smaller image', 'nearest', 'none', 'one', 'drop', 'fuse', 'merge'
SIDE = 176 / 224  # of the smaller image, relative to the others
RECIPE = """--sched-on-updates --warmup-epochs 0 --lr 2e-2 --min-lr 0 --layer-decay 0.7 --drop-path 0 --mixup 0
    --cutmix 0 --reprob 0 --scale 0.5 1 --color-jitter 0 --no-repeated-aug --no-model-ema""".split()


def link_subset(root: Path, folder: Path, **counts: int) -> Path:
    """A folder with links to the first images of each class, as many per split in total as `counts` say."""
    for split, count in counts.items():
        classes = sorted(path for path in (root / split).iterdir() if path.is_dir())
        each = max(count // len(classes), 1)  # main_deit.py needs an image of each class
        for name in classes:
            images = sorted(name.iterdir())[:each]
            if len(images) < each:
                raise SystemExit(f'{name}: expected {each} images or more, found {len(images)}')
            (folder / split / name.name).mkdir(parents=True, exist_ok=True)
            for image in images:
                link = folder / split / name.name / image.name
                if not link.exists():
                    link.symlink_to(image.resolve())
    return folder


def main():
    parser = get_parser(__doc__, 'finetune')
    parser.add_argument('--runs', type=Path, default='output/finetune', help='folder of the training runs')
    about = 'training and validation images'
    parser.add_argument('--images', type=int, nargs=2, default=(5000, 5000), metavar='N', help=about)
    parser.add_argument('--epochs', type=int, default=3, help='of each run')
    parser.add_argument('--seeds', type=int, nargs='+', default=(0, 1, 2), help='those to run')
    parser.add_argument('--methods', nargs='+', default=METHODS, help='those to run')
    args = parser.parse_args()
    output, runs = Path(args.output), args.runs

    make = partial(build, args)
    dense, budget = make('dense', 1.0), gmacs(make('smaller image', SIDE))
    setup = dict(model=args.model, weights=Path(args.weights).name, n_train=args.images[0], n_test=args.images[1])
    setup |= dict(epochs=args.epochs, batch_size=args.batch_size)
    rows = Rows(output.with_suffix('.csv'), setup)
    root = Path(args.data_path)
    test = link_subset(root, runs / 'test', val=args.images[1])
    # main_deit.py evaluates after every epoch, here on one image per class. Top-1 is evaluated once, at the end.
    data = link_subset(root, runs / 'data', train=args.images[0], val=1)
    network = ['--model', args.model, '--device', args.device, '--batch-size', args.batch_size, '--num_workers', 1]
    recipe = ['--finetune', args.weights, '--data-path', data, '--epochs', args.epochs, *RECIPE]
    recipe += ['--aa', '']

    def run(method: str, seed: int) -> dict:
        t, flags, folder = 1.0, [], runs / f'{method.replace(" ", "-")}-{seed}'
        if method == 'smaller image':
            t = SIDE
            flags = ['--input-size', smaller(dense, t)[0]]
        elif method != 'dense':
            t = find_setting(partial(make, method), budget)
            flags = method_flags(*settings(method, t, dense))
        log = train([*network, *flags, *recipe, '--seed', seed], folder)
        top1 = evaluate([*network, *flags, '--data-path', test], folder)
        row = dict(setting=t, schedule=schedule(method, t, dense), gmacs=gmacs(make(method, t)), top1=top1)
        return row | dict(precision=log['precision'], data=root.name)

    run_seeds(rows, args.seeds, args.methods, run)
    rows.measure(args.speed, args.device, make, args.batch_size, train=True)
    if args.speed != 'none':
        draw_seeds(rows.ours(), 'fine-tuned', output.with_suffix('.png'))


if __name__ == '__main__':
    main()
