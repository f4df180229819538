"""Train and evaluate Evo-DeiT, and with --evolve any ViT of timm.

Evo-ViT-T, on one node with 8 GPUs (Evo-ViT-S: --model evo_deit_small_patch16_224 --batch-size 128, no --drop-path):

    python3 -m torch.distributed.launch --nproc_per_node=8 --use_env main_deit.py --model evo_deit_tiny_patch16_224 \\
        --drop-path 0 --batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save

Evaluate a checkpoint, one of the published ones too:

    python3 main_deit.py --model evo_deit_small_patch16_224 --eval --resume /path/to/checkpoint.pth --batch-size 256 \\
        --data-path /path/to/imagenet

Evaluate a pretrained ViT that is evolved without training:

    python3 main_deit.py --model deit_tiny_patch16_224 --evolve --eval --resume deit_tiny_patch16_224.pth \\
        --data-path /path/to/imagenet

On a laptop, with a data set that the program draws itself:

    python3 main_deit.py --model evo_deit_nano_patch4_32 --data-set SHAPES --input-size 32 --epochs 10 \\
        --output_dir output
"""

import checkpoint
import datasets
import engine
import losses
import models
import optim
import output
import utils

# DeiT's recipe is the default of every flag; these are left.
RECIPE = dict(model='evo_deit_small_patch16_224', drop_path=0.1)


def main() -> dict[str, float]:
    """Train or evaluate Evo-DeiT, as the flags say; returns the last evaluation."""
    args = engine.parse_args(__doc__, RECIPE)
    folder = output.prepare_output_dir(args)
    device = utils.set_up_processes(args)
    if args.eval:
        return engine.evaluate_checkpoint(args, device, RECIPE['model'])
    precision = utils.pick_precision(args.precision, device, args.amp)
    utils.set_backends(precision, device)
    config = datasets.data_config(args, args.model)
    train_loader, val_loader = datasets.build_loaders(args, config, utils.rank(), utils.world_size())
    classes = val_loader.dataset.classes
    model = models.build(args, len(classes), config.input_size).to(device)
    checkpoint.load_pretrained(model, args.finetune)
    checkpoint.fit_schedule(args, model, config)
    utils.print_rank0(f'{datasets.describe(config)}\n{engine.describe(args.model, model, precision)}')
    criterion = losses.build_criterion(args, config, len(classes), device, args.smoothing)
    mixup = datasets.build_mixup(args, len(classes))
    state = optim.build_state(args, model, precision, args.batch_size, config, classes, train_loader)
    checkpoint.resume(args, state, engine.MAY_CHANGE)
    return engine.train(engine.Plan.from_args(args), state, criterion, mixup, train_loader, val_loader, folder)


if __name__ == '__main__':
    utils.run_script(main)
