"""Which images a process sees, and in what order, in training and in evaluation.

The order of an epoch is a function of (seed, epoch), and a position in it is one number. So there is no state to save,
an epoch can be resumed in the middle, and nothing depends on the number of workers.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

REPEATS = 3
# An epoch has as many images as the data set, rounded down to a multiple of this, as in the original RASampler.
ROUND = 256


class RepeatedAugSampler(Sampler):
    """Repeated augmentation: a shuffled order with each image `repeats` times in a row, dealt out to the processes.

    Yields (epoch, position, index): the position in the epoch, counted over all processes, and the image there. The
    copies of an image thus go to neighboring processes. All processes get equally many. With `repeats` above 1 an epoch
    is still about as long as the data set, so it sees one image in `repeats`; `repeats=1` is plain shuffling.

    Source: the original RASampler (same order with seed 0), whose epochs of fewer than 256 images are empty.
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1, seed: int = 0, repeats: int = REPEATS):
        self.size, self.rank, self.world_size, self.seed, self.repeats = size, rank, world_size, seed, repeats
        rounded = repeats > 1 and size >= ROUND
        self.length = size // ROUND * ROUND // world_size if rounded else -(-size // world_size)
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0):
        """Choose the epoch, and how many of this process's images to skip: those seen before a resume."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        # torch's CPU generator only uses the low 32 bits of its seed, so (seed, epoch) cannot be packed as seed << 32.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for i in range(self.start, self.length):
            position = self.rank + i * self.world_size
            yield self.epoch, position, order[position // self.repeats % self.size]

    def __len__(self) -> int:
        """Images of a whole epoch in this process, whatever its start."""
        return self.length


def eval_shard(size: int, rank: int = 0, world_size: int = 1) -> range:
    """Indices that one process evaluates. Together, processes evaluate each image exactly once."""
    return range(rank, size, world_size)
