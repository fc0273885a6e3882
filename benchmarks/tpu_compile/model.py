"""The transformer that is compiled for TPUs: one of Flax NNX, of shapes only."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from benchmarks.common.networks import Transformer


class Sizes(NamedTuple):
  """Of a decoder-only transformer and of its batch.

  Attributes:
    layers: number of blocks, written out one after the other.
    width: of the residual stream.
    vocabulary: number of tokens.
    length: tokens a sequence.
    batch: sequences a chip.
  """

  layers: int = 4
  width: int = 1024
  vocabulary: int = 32_768
  length: int = 1024
  batch: int = 2


class Abstract(NamedTuple):
  """A model without numbers.

  Attributes:
    graph: what ``nnx.merge`` makes it from.
    params: its parameters, as float32 shapes.
    rest: its other variables.
  """

  graph: Any
  params: Any
  rest: Any


def abstract(sizes: Sizes) -> Abstract:
  """The model in shapes: nothing is allocated."""
  make = lambda: Transformer(
    sizes.vocabulary, sizes.length, sizes.width, sizes.layers, rngs=nnx.Rngs(0)
  )
  return Abstract(*nnx.split(nnx.eval_shape(make), nnx.Param, ...))


def make_loss(
  model: Abstract,
  *,
  constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
  remat: bool = False,
) -> Callable[[Any, jax.Array], jax.Array]:
  """The mean cross entropy of the next token.

  Args:
    model: of :func:`abstract`.
    constrain: applied to the residual stream ``[batch, length, width]`` after the
      embedding and after every block.
    remat: whether blocks are recomputed in the backward pass.

  Returns:
    ``(params, tokens) -> scalar``; tokens are int32 ``[batch, length + 1]``.
  """

  def loss(params, tokens):
    net = nnx.merge(model.graph, params, model.rest)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    x = net.embed(inputs) + net.position(jnp.arange(inputs.shape[1]))[None]
    x = constrain(x)
    apply = nnx.remat(_apply) if remat else _apply
    for block in net.blocks.layers:
      x = constrain(apply(block, x))
    logits = net.head(net.norm(x))
    entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return entropy(logits, labels).mean()

  return loss


def _apply(block, x):
  return block(x)
