"""Train and evaluate Evo-LeViT, distilled from a RegNetY-160.

Evo-LeViT-128, on one node with 8 GPUs (384 px: --model EvoLeViT_384_384 --input-size 384 --batch-size 128):

    python3 -m torch.distributed.launch --nproc_per_node=8 --use_env main_levit.py --model EvoLeViT_128 \\
        --batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save

The teacher's weights are looked for in ./regnety_160-a5fe301d.pth; --teacher-path takes another path or a URL, and
--distillation-type none trains without. Evaluate a checkpoint, one of the published ones too:

    python3 main_levit.py --model EvoLeViT_128 --eval --resume /path/to/checkpoint.pth --data-path /path/to/imagenet
"""

import checkpoint
import datasets
import engine
import losses
import models
import optim
import output
import utils

# LeViT's recipe, where it differs from DeiT's, which is the default of every flag.
RECIPE = dict(
    model='EvoLeViT_128S',
    batch_size=256,
    weight_decay=0.025,
    clip_grad=0.01,
    clip_mode='agc',
    distillation_type='cls',
    teacher_path='./regnety_160-a5fe301d.pth',
    eval_interval=20,
    amp=False,
)


def main() -> dict[str, float]:
    """Train or evaluate Evo-LeViT, as the flags say; returns the last evaluation."""
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
