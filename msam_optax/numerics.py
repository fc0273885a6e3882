"""Precision: sums in float32 or wider, and norms that 1e-30 and 1e+30 survive."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from msam_optax.reductions import leaf_axes
from msam_optax.reductions import maxima
from msam_optax.reductions import total


def normalize(tree: Any, param_specs: Any = None) -> tuple[Any, jax.Array]:
  """The tree divided by its Euclidean norm, and the norm.

  All is scaled by the largest magnitude first, so that no square over- or underflows.

  Args:
    tree: pytree of real floating-point arrays, all of the same dtype.
    param_specs: how its leaves are sharded inside ``shard_map``, see
      :func:`leaf_axes`; the norm is that of the whole tree.

  Returns:
    The tree of length one, and the norm, a scalar; zeros, both, where the norm is
    zero or not finite.
  """
  leaves, axes = jax.tree.leaves(tree), leaf_axes(param_specs, tree)
  zero = jnp.zeros([], wide_dtype(tree))
  magnitudes = maxima([largest_magnitude(x) for x in leaves], axes)
  largest = functools.reduce(jnp.maximum, magnitudes, zero)
  usable = (largest > 0) & jnp.isfinite(largest)
  # The results do not depend on the scale, so their derivatives need not know it.
  scale = jax.lax.stop_gradient(jnp.where(usable, largest, 1.0))
  squares = total([jnp.sum(jnp.square(x / scale)) for x in leaves], axes, zero)
  root = jnp.sqrt(jnp.where(usable, squares, 1.0))
  usable &= jnp.isfinite(scale * root)
  unit = jax.tree.map(lambda x: jnp.where(usable, x / scale / root, 0.0), tree)
  return unit, jnp.where(usable, scale * root, 0.0)


def largest_magnitude(x: jax.Array) -> jax.Array:
  """``max|x|``, infinite if any entry is not finite; 0 for an empty array."""
  x = widen(x)
  # Across devices a maximum may lose a NaN, as it does on the CPU.
  return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), initial=0.0)


def widen(x: Any, like: Any = None) -> jax.Array:
  """``x`` in the dtype that ``like`` (by default itself) is computed in."""
  return jnp.asarray(x, wide_dtype(x if like is None else like))


def wide_dtype(tree: Any) -> jnp.dtype:
  """The dtype that a tree is computed in: float64 if a leaf has it, or float32."""
  dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
  return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)
