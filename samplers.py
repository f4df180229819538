"""Which images a process sees and in what order, in training and in evaluation.

The order of an epoch is a function of (seed, epoch), and a place in it is one number. So there is no state to save, an
epoch can begin in its middle, and nothing depends on how many workers load the images.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

REPEATS = 3
# Published: an epoch has as many images as the data set, rounded down to a multiple of this.
ROUND = 256


class RepeatedAugSampler(Sampler):
    """Shuffled order in which each image comes `repeats` times in a row, so that neighbouring processes augment it.

    Yields (epoch, position, index): a place in the epoch, counted over all processes, and the image there. Processes
    take places in turn, and equally many. With `repeats` above 1 an epoch is still about as long as the data set, so it
    sees one image in `repeats`; `repeats=1` is plain shuffling, which sees all.

    Source: the published RASampler, the same order with seed 0. There, an epoch of fewer than 256 images is empty.
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1, seed: int = 0, repeats: int = REPEATS):
        self.size, self.rank, self.world_size, self.seed, self.repeats = size, rank, world_size, seed, repeats
        rounded = repeats > 1 and size >= ROUND
        self.length = size // ROUND * ROUND // world_size if rounded else -(-size // world_size)
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0):
        """Choose the epoch, and how many of this process's images of it to leave out because they were seen already."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        # torch's CPU generator uses the low 32 bits of its seed, so the two numbers cannot simply stand side by side.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for i in range(self.start, self.length):
            position = self.rank + i * self.world_size
            yield self.epoch, position, order[position // self.repeats % self.size]

    def __len__(self) -> int:
        """Images of a whole epoch on this process, wherever it starts."""
        return self.length


def eval_shard(size: int, rank: int = 0, world_size: int = 1) -> range:
    """Indices that one process evaluates: all processes together, each image exactly once; counts may differ by one."""
    return range(rank, size, world_size)
