"""Train and evaluate Evo-DeiT.

Evo-ViT-T, on one node with 8 GPUs (Evo-ViT-S: --model evo_deit_small_patch16_224 --batch-size 128, no --drop-path):

    python3 -m torch.distributed.launch --nproc_per_node=8 --use_env main_deit.py --model evo_deit_tiny_patch16_224 \\
        --drop-path 0 --batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save

Evaluate a checkpoint, one of the published ones too:

    python3 main_deit.py --model evo_deit_small_patch16_224 --eval --resume /path/to/checkpoint.pth --batch-size 256 \\
        --data-path /path/to/imagenet

On a laptop, with a data set that the program draws itself:

    python3 main_deit.py --model evo_deit_nano_patch4_32 --data-set SHAPES --input-size 32 --epochs 10 --output_dir
    output
"""

import datasets
import engine
import losses
import models
import utils


def get_parser() -> utils.Parser:
    """All flags, with the recipe of DeiT (300 epochs, 1024 images a step) as defaults."""
    parser = utils.Parser(__doc__)
    for module in (models, datasets, losses, engine, utils):
        module.add_arguments(parser)
    parser.set_defaults(model='evo_deit_small_patch16_224', drop_path=0.1, weight_decay=0.05, recipe_batch=1024)
    return parser


def main():
    args = get_parser().parse_args()
    engine.check_arguments(args)
    device = utils.set_up_processes(args)
    train_loader, val_loader = datasets.build_loaders(args, utils.rank(), utils.world_size())
    num_classes = len(val_loader.dataset.classes)
    model = models.build(args, num_classes).to(device)
    criterion = losses.build_criterion(args, num_classes, device)
    mixup = datasets.build_mixup(args, num_classes)
    engine.run(args, model, criterion, train_loader, val_loader, mixup, device)


if __name__ == '__main__':
    utils.run_script(main)
