"""Samples as tensors, and which of them a training step sees.

What training sees is a pure function of (seed, step). *Draws* are numbered from 0 on: step k consists of the draws
k * batch_size up to (k + 1) * batch_size; pass p over the data set takes its draws in a permutation keyed by (seed, p);
a draw's augmentation is keyed by (seed, draw). Workers, restarts and ranks change nothing in the data.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bisenet.classes import ClassTable
from bisenet.config import AugmentConfig
from bisenet.data.samples import Sample, read_sample
from bisenet.data.transforms import training_transform

_ORDER, _AUGMENTATION = 0, 1  # keep the two uses of a seed apart


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of (draw, index of the sample), without state.

    Passes follow each other without a seam: a batch may hold the end of one and the start of the next, and a data set
    smaller than the batch is walked several times in one.

    Args:
        length: number of samples.
        batch_size: samples per step over all ranks.
        seed: keys the permutations.
        start: the first step.
        rank: yields this rank's part of each step; the parts of all ranks in order are the step.
        world: number of ranks.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``world``.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, *, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % world:
            raise ValueError(f"data.batch_size: got {batch_size}, accepted: multiples of the {world} devices")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world
        current, order = -1, np.empty(0, int)
        for step in itertools.count(self.start):
            first = step * self.batch_size + self.rank * share
            batch: list[tuple[int, int]] = []
            for draw in range(first, first + share):
                number, position = divmod(draw, self.length)
                if number != current:
                    current = number
                    order = np.random.default_rng((self.seed, _ORDER, number)).permutation(self.length)
                batch.append((draw, int(order[position])))
            yield batch


class TrainingSet(Dataset[dict[str, Tensor]]):
    """Augmented samples, by (draw, index): ``image`` uint8 (3, H, W) and ``mask`` uint8 (H, W) of the crop's size."""

    def __init__(self, samples: Sequence[Sample], table: ClassTable, augment: AugmentConfig, seed: int) -> None:
        self.samples = samples
        self.table = table
        self.transform = training_transform(augment, table.ignore_index)
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        draw, index = item
        image, mask = read_sample(self.samples[index], self.table)
        key = np.random.SeedSequence((self.seed, _AUGMENTATION, draw)).generate_state(1)
        self.transform.set_random_seed(int(key[0]))
        augmented = self.transform(image=image, mask=mask)
        return _to_tensors(augmented["image"], augmented["mask"])


class EvaluationSet(Dataset[dict[str, Tensor]]):
    """Whole pictures, by index: ``image`` uint8 (3, H, W), ``mask`` uint8 (H, W) and ``index`` int64 ()."""

    def __init__(self, samples: Sequence[Sample], table: ClassTable) -> None:
        self.samples = samples
        self.table = table

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**_to_tensors(*read_sample(self.samples[index], self.table)), "index": torch.tensor(index)}


def _to_tensors(image: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    return {"image": torch.from_numpy(planes), "mask": torch.from_numpy(np.ascontiguousarray(mask))}
