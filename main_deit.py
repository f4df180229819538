"""Train and evaluate Evo-DeiT.

Evo-ViT-T, on one node with 8 GPUs (Evo-ViT-S: --model evo_deit_small_patch16_224 --batch-size 128, no --drop-path):

    python3 -m torch.distributed.launch --nproc_per_node=8 --use_env main_deit.py --model evo_deit_tiny_patch16_224 \\
        --drop-path 0 --batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save

Evaluate a checkpoint, one of the published ones too:

    python3 main_deit.py --model evo_deit_small_patch16_224 --eval --resume /path/to/checkpoint.pth --batch-size 256 \\
        --data-path /path/to/imagenet

On a laptop, with a data set that the program draws itself:

    python3 main_deit.py --model evo_deit_nano_patch4_32 --data-set SHAPES --input-size 32 --epochs 10 \\
        --output_dir output
"""

import engine
import utils

# DeiT's recipe is the default of every flag; these are left.
RECIPE = dict(model='evo_deit_small_patch16_224', drop_path=0.1)


def main():
    """Train or evaluate Evo-DeiT, as the flags say."""
    engine.main(engine.get_parser(__doc__, RECIPE).parse_args())


if __name__ == '__main__':
    utils.run_script(main)
