"""Precision: sums in float32 or wider, and norms that 1e-30 and 1e+30 survive."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def tree_norm(tree: Any) -> jax.Array:
  """The tree's Euclidean norm, scaled by its largest magnitude; 0 if not finite."""
  leaves, dtype = jax.tree.leaves(tree), wide_dtype(tree)
  largest = functools.reduce(
    jnp.maximum,
    [largest_magnitude(x).astype(dtype) for x in leaves],
    jnp.zeros([], dtype),
  )
  usable = (largest > 0) & jnp.isfinite(largest)
  scale = jax.lax.stop_gradient(jnp.where(usable, largest, 1.0))
  squares = sum(
    jnp.sum(jnp.square(x / scale.astype(x.dtype))).astype(dtype) for x in leaves
  )
  norm = scale * jnp.sqrt(jnp.where(usable, squares, 1.0))
  return jnp.where(usable & jnp.isfinite(norm), norm, 0.0)


def largest_magnitude(x: jax.Array) -> jax.Array:
  """``max|x|``, not finite if any entry is not; 0 for an empty array."""
  return jnp.max(jnp.abs(widen(x)), initial=0.0)


def widen(x: Any, like: Any = None) -> jax.Array:
  """``x`` in the dtype that ``like`` (by default itself) is computed in."""
  return jnp.asarray(x, wide_dtype(x if like is None else like))


def wide_dtype(tree: Any) -> jnp.dtype:
  """The dtype that a tree is computed in: float64 if a leaf has it, or float32."""
  dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
  return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)
