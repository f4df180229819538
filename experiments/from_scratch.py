"""What does evolving cost in accuracy, and what does it save in time, when training from scratch?

    python3 experiments/from_scratch.py --data-path cifar10

A run takes an hour on one core, or five minutes on an H100 that eleven other runs share. There are 12 runs. An
interrupted command resumes.

`evo_deit_nano_patch4_32` is trained on all of CIFAR-10 ({train,val}/<class>/*) with the recipe of docs/training.md: 8
epochs, batch size 128, three seeds. So are its dense baseline and the network with every kind of representative, with
half of the patches informative. The baseline is the original DeiT, with one head on the class token; the evolved
network has two, and predicts from the mean of its patches. As in the original Evo-ViT, it selects before each block in
the first two thirds of the epochs, and before each stage in the others. A row holds top-1 after the last epoch, GMACs,
and img/s in training (stage-wise), timed in turns with dense.

Rule, stated before the run: a method is better than another if the 95 % interval (Student's t over seeds) of their
paired difference in top-1 excludes 0; otherwise they do not differ significantly.
"""

from pathlib import Path

from common import Rows, get_parser, gmacs, run_seeds, train
from plots import draw_seeds
from torch import nn

import networks

METHODS = 'dense', 'none', 'one', 'nearest'
RECIPE = """--warmup-epochs 1 --warmup-lr 5e-4 --lr 4e-3 --drop-path 0 --mixup 0 --cutmix 0 --reprob 0
    --color-jitter 0 --no-repeated-aug --model-ema-decay 0.999 --num_workers 1""".split()


def main():
    parser = get_parser(__doc__, 'from_scratch', 'evo_deit_nano_patch4_32', pretrained=False)
    parser.add_argument('--runs', type=Path, default='output/from_scratch', help='folder of the training runs')
    parser.add_argument('--epochs', type=int, default=8, help='of each run')
    parser.add_argument('--seeds', type=int, nargs='+', default=(0, 1, 2), help='those to run')
    parser.add_argument('--methods', nargs='+', default=METHODS, help='those to run')
    parser.set_defaults(batch_size=128)
    args = parser.parse_args()
    output, (baseline, options) = Path(args.output), networks.dense_baseline(args.model)
    size = networks.published_cfg(args.model).input_size[-1]
    classes = len(list((Path(args.data_path) / 'train').iterdir()))

    def make(method: str, _=None) -> nn.Module:
        name, arguments = (baseline, options) if method == 'dense' else (args.model, {'representative': method})
        return networks.create(name, classes, size, **arguments).eval().to(args.device)

    setup = dict(model=args.model, epochs=args.epochs, batch_size=args.batch_size)
    rows = Rows(output.with_suffix('.csv'), setup)
    common = ['--data-path', args.data_path, '--input-size', size, '--epochs', args.epochs, *RECIPE]
    common += ['--aa', '', '--eval-interval', args.epochs, '--device', args.device]
    common += ['--batch-size', args.batch_size]

    def run(method: str, seed: int) -> dict:
        flags = ['--model', args.model, '--representative', method]
        if method == 'dense':
            flags = ['--model', baseline, '--model-kwargs', *(f'{name}={value}' for name, value in options.items())]
        log = train([*common, *flags, '--seed', seed], args.runs / f'{method}-{seed}')
        row = dict(setting=1.0, gmacs=gmacs(make(method)), top1=log['test_acc1'])
        return row | dict(precision=log['precision'], data=Path(args.data_path).name)

    run_seeds(rows, args.seeds, args.methods, run)
    rows.measure(args.speed, args.device, make, args.batch_size, train=True)
    if args.speed != 'none':
        draw_seeds(rows.ours(), 'trained from scratch', output.with_suffix('.png'))


if __name__ == '__main__':
    main()
