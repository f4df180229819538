"""Train and evaluate Evo-LeViT, distilled from a RegNetY-160.

Evo-LeViT-128 on one node with 8 GPUs (384 px: --model EvoLeViT_384_384 --input-size 384 --batch-size 128):

    python3 -m torch.distributed.launch --nproc_per_node=8 --use_env main_levit.py --model EvoLeViT_128 \\
        --batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save

The teacher's weights are read from ./regnety_160-a5fe301d.pth; --teacher-path takes another path or a URL, and
--distillation-type none trains without a teacher. Evaluate a checkpoint of this code or of the original Evo-ViT:

    python3 main_levit.py --model EvoLeViT_128 --eval --resume /path/to/checkpoint.pth --data-path /path/to/imagenet
"""

import main_deit
import utils

# Where LeViT's recipe differs from DeiT's, which is the default of every flag.
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
    """Train or evaluate Evo-LeViT; returns the last evaluation."""
    return main_deit.main(__doc__, RECIPE)


if __name__ == '__main__':
    utils.run_script(main)
