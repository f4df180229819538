"""How much faster is an evolved DINOv2-S of Hugging Face's transformers? Takes the flags of benchmark.py.

    python3 experiments/transformers_speed.py --results_file docs/benchmarks/cpu-transformers.csv

A few minutes on 2 cores: random weights, 518 px, batch size 8, evolved and dense in turns.
"""

import sys
from functools import partial

import common  # noqa: F401, puts the root on the path
import transformers

import benchmark
import models


def build(evolved: bool, num_classes: int) -> transformers.Dinov2Model:
    """facebook/dinov2-small without its weights."""
    config = dict(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**config))
    if evolved:
        schedule = models.evolve(model).encoder.evolution
        for name in ('schedule', 'set_schedule', 'evolving', 'stage_wise', 'method'):  # read for the columns of a row
            setattr(model, name, getattr(schedule, name))
    return model


if __name__ == '__main__':
    builds = [('transformers Dinov2Model evolved', True), ('transformers Dinov2Model', False)]
    benchmark.list_models = lambda case: [(label, partial(build, evolved)) for label, evolved in builds]
    case = '--model vit_small_patch14_dinov2 --evolve --bench inference --batch-size 8'
    sys.argv[1:1] = case.split()
    benchmark.utils.run_script(benchmark.main)
