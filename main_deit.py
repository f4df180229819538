"""Train and evaluate Evo-DeiT, or any timm ViT with --evolve.

Evo-ViT-T on one node with 8 GPUs (Evo-ViT-S: --model evo_deit_small_patch16_224 --batch-size 128, no --drop-path):

    python3 -m torch.distributed.launch --nproc_per_node=8 --use_env main_deit.py --model evo_deit_tiny_patch16_224 \\
        --drop-path 0 --batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save

Evaluate a checkpoint of this code or of the original Evo-ViT:

    python3 main_deit.py --model evo_deit_small_patch16_224 --eval --resume /path/to/checkpoint.pth --batch-size 256 \\
        --data-path /path/to/imagenet

Evaluate a pretrained ViT with token evolution, without training:

    python3 main_deit.py --model deit_tiny_patch16_224 --evolve --eval --resume deit_tiny_patch16_224.pth \\
        --data-path /path/to/imagenet

Train on a laptop, on a synthetic data set that needs no files:

    python3 main_deit.py --model evo_deit_nano_patch4_32 --data-set SHAPES --input-size 32 --epochs 10 \\
        --output_dir output
"""

import checkpoint
import datasets
import engine
import losses
import networks
import optim
import output
import utils

# The defaults of all flags are DeiT's recipe, except for these.
RECIPE = dict(model='evo_deit_small_patch16_224', drop_path=0.1)


def main(doc: str = __doc__, recipe: dict = RECIPE) -> dict[str, float]:
    """Train or evaluate a model; returns the last evaluation. main_levit.py calls this with its own recipe."""
    # Flags, files and folders are checked first: a mistake shows up before anything is loaded.
    args = engine.parse_args(doc, recipe)
    folder = output.prepare_output_dir(args)
    device = utils.set_up_processes(args)
    if args.eval:
        return engine.evaluate_checkpoint(args, device, recipe['model'])
    precision = utils.pick_precision(args.precision, device, args.amp)
    utils.set_backends(precision, device)

    # Data comes before the model, which needs the number of classes.
    config = datasets.data_config(args, args.model)
    train_loader, val_loader = datasets.build_loaders(args, config, utils.rank(), utils.world_size())
    classes = val_loader.dataset.classes
    model = networks.build(args, len(classes), config.input_size).to(device)
    checkpoint.load_finetune(model, args.finetune)
    checkpoint.choose_schedule(args, model, config)
    utils.print_rank0(f'{datasets.describe(config)}\n{engine.describe_setup(args.model, model, precision)}')

    # The criterion holds the teacher; the state holds everything that training changes, and so what a checkpoint holds.
    criterion = losses.build_criterion(args, config, len(classes), device, args.smoothing)
    mixup = datasets.build_mixup(args, len(classes))
    state = optim.build_state(args, model, precision, args.batch_size, config, classes, train_loader)
    checkpoint.resume(args, state, engine.MAY_CHANGE)
    return engine.train(args, state, criterion, mixup, train_loader, val_loader, folder)


if __name__ == '__main__':
    utils.run_script(main)
