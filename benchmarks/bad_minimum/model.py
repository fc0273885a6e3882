"""A small residual net for small grey pictures."""

from flax import nnx
import jax
import jax.numpy as jnp

GROUPS = 4
INIT = nnx.initializers.lecun_uniform()


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

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu(self.norm(self.conv(x)))
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
