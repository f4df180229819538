"""Training from scratch: what does evolving cost in accuracy, and what does it give in time?

    python3 experiments/from_scratch.py --data-path cifar10

An hour of one core a run, on an H100 five minutes with eleven others beside it. Result, of three pairs: nearest is
1.8 ± 1.4 points above none, and not told apart from dense (62.5 %, +0.5 ± 3.1) and one (+2.6 ± 3.6); nothing else is
told apart. Nearest is 1.40 times as fast as dense to train on a CPU, 0.76 times on an H100.

`evo_deit_nano_patch4_32` on all of CIFAR-10 ({train,val}/<class>/*), by the recipe of docs/training.md: 8 epochs, batch
128, three seeds; its dense twin, and half of the patches informative with every kind of representative. The twin is
DeiT as published, with one head on the class token; the evolved network has two, and predicts from the mean of its
patches. As published, the first two thirds of the epochs select before each block, the others before each stage. A row
has the top-1 of a method and seed after the last epoch, GMACs, and images a second in training (stage-wise),
alternating with dense. It goes on where it was stopped.

Rule, stated before it was run: of two methods one is better if the 95 % interval (Student's t over seeds) of the paired
difference in top-1 excludes 0; otherwise the data do not tell them apart.
"""

from pathlib import Path

from common import Rows, get_parser, gmacs, run_seeds, train
from plots import draw_seeds
from torch import nn

import models

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
    output, (twin, options) = Path(args.output), models.dense_twin(args.model)
    size = models.published_cfg(args.model).input_size[-1]
    classes = len(list((Path(args.data_path) / 'train').iterdir()))

    def make(method: str, _=None) -> nn.Module:
        name, arguments = (twin, options) if method == 'dense' else (args.model, {'representative': method})
        return models.create(name, classes, size, **arguments).eval().to(args.device)

    setup = dict(model=args.model, epochs=args.epochs, batch_size=args.batch_size)
    rows = Rows(output.with_suffix('.csv'), setup)
    common = ['--data-path', Path(args.data_path).absolute(), '--input-size', size, '--epochs', args.epochs, *RECIPE]
    common += ['--aa', '', '--eval-interval', args.epochs, '--device', args.device]
    common += ['--batch-size', args.batch_size]

    def run(method: str, seed: int) -> dict:
        flags = ['--model', args.model, '--representative', method]
        if method == 'dense':
            flags = ['--model', twin, '--model-kwargs', *(f'{name}={value}' for name, value in options.items())]
        log = train([*common, *flags, '--seed', seed], args.runs.absolute() / f'{method}-{seed}')
        row = dict(setting=1.0, gmacs=gmacs(make(method)), top1=log['test_acc1'])
        return row | dict(precision=log['precision'], data=Path(args.data_path).name)

    run_seeds(rows, args.seeds, args.methods, run)
    rows.measure(args.speed, args.device, make, args.batch_size, train=True)
    if args.speed != 'none':
        draw_seeds(rows.ours(), 'trained from scratch', output.with_suffix('.png'))


if __name__ == '__main__':
    main()
