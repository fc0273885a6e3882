"""The sizes of `benchmarks.bad_minimum`."""

from typing import NamedTuple


class Settings(NamedTuple):
  """All that is the same for every method.

  Attributes:
    train: number of images with true labels.
    wrong: number of images with wrong labels that the bad start also fits.
    width: channels of the first block.
    stride: of the first convolution; 2 makes the whole net four times cheaper.
    batch: images per step.
    start_epochs: passes over right and wrong, at most, to make the bad start.
    start_rate: Adam's learning rate there.
    epochs: passes over the right ones in fine-tuning.
    learning_rate: SGD's learning rate in fine-tuning, without momentum.
    every: epochs between two looks at the accuracies.
    alpha: that of Monge SAM and LE-SAM.
    rhos: the grid of radii, the same for every method.
    seeds: each sets images, wrong labels, initial weights and order of the batches.
  """

  train: int
  wrong: int
  width: int
  stride: int
  batch: int
  start_epochs: int
  start_rate: float
  epochs: int
  learning_rate: float
  every: int
  alpha: float
  rhos: tuple[float, ...]
  seeds: tuple[int, ...]


QUICK = Settings(
  train=1000,
  wrong=1000,
  width=8,
  stride=2,
  batch=50,
  start_epochs=200,
  start_rate=3e-3,
  epochs=12,
  learning_rate=0.01,
  every=4,
  alpha=1.0,
  # Steps of √2 where some method is at its best, larger ones elsewhere.
  rhos=(0.05, 0.2, 0.4, 0.57, 0.8, 1.13, 1.6, 2.26, 3.2),
  seeds=(0, 1, 2),
)
FULL = QUICK._replace(
  train=3000,
  wrong=3000,
  width=16,
  stride=1,
  batch=128,
  epochs=25,
  every=1,
  seeds=(0, 1, 2, 3, 4),
)
SMOKE = QUICK._replace(
  train=40,
  wrong=20,
  width=4,
  stride=4,
  batch=20,
  start_epochs=2,
  epochs=1,
  every=1,
  rhos=(0.1, 0.8),
  seeds=(0, 1),
)
