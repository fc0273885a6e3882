"""The networks whose steps are weighed: a transformer, a convolutional net, an MLP."""

from collections.abc import Callable
import functools
import itertools
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax


class Problem(NamedTuple):
  """A loss with parameters and a batch to take it at.

  Attributes:
    loss: ``(params, batch) -> scalar``, the mean cross entropy.
    params: pytree of float32 arrays.
    batch: inputs and integer labels.
  """

  loss: Callable[[Any, Any], jax.Array]
  params: Any
  batch: Any


class Block(nnx.Module):
  """A pre-norm transformer block."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
    self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
    self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    causal = nnx.make_causal_mask(x[..., 0])
    x = x + self.attention(self.norm_1(x), mask=causal)
    return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Transformer(nnx.Module):
  """A decoder that predicts the next of ``vocabulary`` tokens."""

  def __init__(
    self, vocabulary: int, length: int, width: int, layers: int, *, rngs: nnx.Rngs
  ):
    self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
    self.position = nnx.Embed(length, width, rngs=rngs)
    self.blocks = nnx.Sequential(*(Block(width, 4, rngs=rngs) for _ in range(layers)))
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, vocabulary, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[-1]))[None]
    return self.head(self.norm(self.blocks(x)))


class ConvNet(nnx.Module):
  """Convolutions with GroupNorm, and a dense layer."""

  def __init__(self, width: int, layers: int, classes: int, *, rngs: nnx.Rngs):
    sizes = [1, *(2**i * width for i in range(layers))]
    layers_of = lambda n, m: (
      nnx.Conv(n, m, (3, 3), strides=1 if n == 1 else 2, rngs=rngs),
      nnx.GroupNorm(m, num_groups=4, rngs=rngs),
      nnx.relu,
    )
    self.body = nnx.Sequential(
      *itertools.chain.from_iterable(
        itertools.starmap(layers_of, itertools.pairwise(sizes))
      )
    )
    self.head = nnx.Linear(sizes[-1], classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.head(self.body(x).mean(axis=(1, 2)))


class MLP(nnx.Module):
  """Dense layers of one width."""

  def __init__(self, width: int, layers: int, classes: int, *, rngs: nnx.Rngs):
    dense = [nnx.Linear(width, width, rngs=rngs) for _ in range(layers - 1)]
    self.body = nnx.Sequential(
      *itertools.chain.from_iterable((layer, nnx.relu) for layer in dense)
    )
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.head(self.body(x))


def transformer(
  *,
  vocabulary: int = 256,
  length: int = 64,
  width: int = 128,
  layers: int = 2,
  batch=16,
) -> Problem:
  """A decoder-only transformer on random tokens."""
  tokens = jax.random.randint(jax.random.key(0), (batch, length + 1), 0, vocabulary)
  model = Transformer(vocabulary, length, width, layers, rngs=nnx.Rngs(0))
  return _problem(model, (tokens[:, :-1], tokens[:, 1:]))


def conv_net(
  *, size: int = 28, width: int = 16, layers: int = 3, classes: int = 10, batch=64
) -> Problem:
  """A convolutional net on random images."""
  images = jax.random.normal(jax.random.key(0), (batch, size, size, 1))
  labels = jax.random.randint(jax.random.key(1), (batch,), 0, classes)
  return _problem(ConvNet(width, layers, classes, rngs=nnx.Rngs(0)), (images, labels))


def mlp(*, width: int = 256, layers: int = 6, classes: int = 10, batch=512) -> Problem:
  """A multilayer perceptron on random vectors."""
  inputs = jax.random.normal(jax.random.key(0), (batch, width))
  labels = jax.random.randint(jax.random.key(1), (batch,), 0, classes)
  return _problem(MLP(width, layers, classes, rngs=nnx.Rngs(0)), (inputs, labels))


def _problem(model: nnx.Module, batch: Any) -> Problem:
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  return Problem(functools.partial(_cross_entropy, graph, rest), params, batch)


def _cross_entropy(graph, rest, params, batch):
  x, y = batch
  logits = nnx.merge(graph, params, rest)(x)
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
