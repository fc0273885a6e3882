"""The transformer that is compiled for TPUs, as plain functions of a dict of arrays."""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Sizes(NamedTuple):
  """Of a decoder-only transformer and of its batch.

  Attributes:
    layers: number of blocks, written out one after the other.
    width: of the residual stream; heads are 64 wide.
    vocabulary: number of tokens; the embedding is also the output layer.
    length: tokens a sequence.
    batch: sequences a device.
  """

  layers: int = 8
  width: int = 1024
  vocabulary: int = 32_768
  length: int = 1024
  batch: int = 2


def shapes(sizes: Sizes) -> dict[str, Any]:
  """The float32 parameters, as shapes: nothing is allocated."""
  d = sizes.width
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  block = {
    'norm_1': array(d),
    'qkv': array(d, 3 * d),
    'out': array(d, d),
    'norm_2': array(d),
    'up': array(d, 4 * d),
    'down': array(4 * d, d),
  }
  return {
    'embed': array(sizes.vocabulary, d),
    'blocks': [dict(block) for _ in range(sizes.layers)],
    'norm': array(d),
  }


def loss(
  params: dict[str, Any],
  tokens: jax.Array,
  *,
  constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
  remat: bool = False,
) -> jax.Array:
  """Mean cross entropy of the next token; arithmetic in bfloat16.

  Args:
    params: like :func:`shapes`.
    tokens: int32 ``[batch, length + 1]``.
    constrain: applied to the residual stream ``[batch, length, width]`` after the
      embedding and after every block.
    remat: whether blocks are recomputed in the backward pass.

  Returns:
    A scalar.
  """
  one_block = jax.checkpoint(_block) if remat else _block
  embed = params['embed'].astype(jnp.bfloat16)
  x = constrain(embed[tokens[:, :-1]])
  for block in params['blocks']:
    x = constrain(one_block(block, x))
  logits = (_norm(x, params['norm']) @ embed.T).astype(jnp.float32)
  entropy = optax.losses.softmax_cross_entropy_with_integer_labels
  return entropy(logits, tokens[:, 1:]).mean()


def _block(p, x):
  p = jax.tree.map(lambda w: w.astype(x.dtype), p)
  heads = lambda z: z.reshape(*z.shape[:2], -1, 64)
  q, k, v = map(heads, jnp.split(_norm(x, p['norm_1']) @ p['qkv'], 3, axis=-1))
  scores = jnp.einsum('bthd,bshd->bhts', q, k).astype(jnp.float32) / 8
  causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
  weights = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(x.dtype)
  x += jnp.einsum('bhts,bshd->bthd', weights, v).reshape(x.shape) @ p['out']
  return x + jax.nn.gelu(_norm(x, p['norm_2']) @ p['up']) @ p['down']


@functools.partial(jax.jit, inline=True)
def _norm(x, scale):
  square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(square + 1e-6).astype(x.dtype) * scale.astype(x.dtype)
