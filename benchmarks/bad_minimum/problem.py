"""The problem: Fashion-MNIST in five parts, and a small residual net for it."""

from pathlib import Path
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

FILE = Path(__file__).parents[1] / 'data' / 'fashion' / 'fashion_6000_2000.npz'
CLASSES = 10
VALIDATION = 500
GROUPS = 4
INIT = nnx.initializers.lecun_uniform()


class Parts(NamedTuple):
  """Images ``[n, 28, 28, 1]`` in [0, 1] with labels; no image is in two parts.

  Attributes:
    train: what is fine-tuned on, with true labels.
    wrong: other images, with wrong labels, that only the bad start has learnt.
    validation: chooses the rho of each method.
    test: chooses nothing.
  """

  train: tuple[np.ndarray, np.ndarray]
  wrong: tuple[np.ndarray, np.ndarray]
  validation: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]


def split_fashion(seed: int, *, train: int, wrong: int) -> Parts:
  """Draws the images to train with, and moves the labels of some to other classes.

  Args:
    seed: of which images are rightly and wrongly labelled, and how wrongly.
    train: number of images with true labels, out of 6,000.
    wrong: number of other images, out of the same, each with a label of another
      class, all others being equally likely.

  Returns:
    The parts. Validation and test are the same for every seed: the first 500 and the
    other 1,500 of the images that Fashion-MNIST keeps for the test.

  Raises:
    ValueError: if there are not enough images.
  """
  with np.load(FILE) as file:
    x, y, xt, yt = (file[name] for name in ('x', 'y', 'xt', 'yt'))
  if train + wrong > len(y):
    raise ValueError(f'There are {len(y)} images, not {train} + {wrong}.')
  rng = np.random.default_rng(seed)
  rows = rng.permutation(len(y))[: train + wrong]
  x, y, xt = _scale(x[rows]), y[rows].astype(np.int32), _scale(xt)
  y[train:] = (y[train:] + rng.integers(1, CLASSES, wrong)) % CLASSES
  yt = yt.astype(np.int32)
  return Parts(
    train=(x[:train], y[:train]),
    wrong=(x[train:], y[train:]),
    validation=(xt[:VALIDATION], yt[:VALIDATION]),
    test=(xt[VALIDATION:], yt[VALIDATION:]),
  )


def _scale(images: np.ndarray) -> np.ndarray:
  return (images[..., None] / 255).astype(np.float32)


class Block(nnx.Module):
  """Two 3 x 3 convolutions beside a shortcut, GroupNorm after each convolution."""

  def __init__(self, channels_in: int, channels: int, stride: int, *, rngs: nnx.Rngs):
    self.conv_1 = _conv(channels_in, channels, 3, stride, rngs)
    self.norm_1 = nnx.GroupNorm(channels, num_groups=GROUPS, rngs=rngs)
    self.conv_2 = _conv(channels, channels, 3, 1, rngs)
    self.norm_2 = nnx.GroupNorm(channels, num_groups=GROUPS, rngs=rngs)
    same = stride == 1 and channels_in == channels
    self.shortcut = None if same else _conv(channels_in, channels, 1, stride, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    h = nnx.relu(self.norm_1(self.conv_1(x)))
    h = self.norm_2(self.conv_2(h))
    return nnx.relu(h + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
  """ResNet-8: a convolution, three blocks, mean over the picture, a dense layer.

  GroupNorm instead of BatchNorm: nothing is carried but the parameters, so that the
  loss at the probe is a function of them alone.
  """

  def __init__(self, width: int, classes: int, *, stride: int, rngs: nnx.Rngs):
    self.conv = _conv(1, width, 3, stride, rngs)
    self.norm = nnx.GroupNorm(width, num_groups=GROUPS, rngs=rngs)
    self.block_1 = Block(width, width, 1, rngs=rngs)
    self.block_2 = Block(width, 2 * width, 2, rngs=rngs)
    self.block_3 = Block(2 * width, 4 * width, 2, rngs=rngs)
    self.dense = nnx.Linear(4 * width, classes, kernel_init=INIT, rngs=rngs)

  def __call__(self, x: ArrayLike) -> jax.Array:
    x = nnx.relu(self.norm(self.conv(jnp.asarray(x))))
    x = self.block_3(self.block_2(self.block_1(x)))
    return self.dense(jnp.mean(x, axis=(1, 2)))


def _conv(channels_in, channels, size, stride, rngs):
  return nnx.Conv(
    channels_in,
    channels,
    (size, size),
    strides=stride,
    use_bias=False,
    kernel_init=INIT,
    rngs=rngs,
  )
