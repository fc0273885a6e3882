"""Precision: sums in float32 or wider, and norms that 1e-30 and 1e+30 survive."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from msam_optax.reductions import leaf_axes
from msam_optax.reductions import maxima
from msam_optax.reductions import total

# The bits of float32.
NAN, INFINITY = 0x7FC00000, 0x7F800000


def normalize(tree: Any, param_specs: Any = None) -> tuple[Any, jax.Array]:
  """The tree divided by its Euclidean norm, and the norm.

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
  scale = _scale(largest)
  squares = total([_sum_of_squares(x, scale) for x in leaves], axes, zero)
  root = jnp.sqrt(jnp.where(usable, squares, 1.0))
  # Where numbers below the smallest normal one count as zero, so may the root.
  usable &= (root > 0) & jnp.isfinite(scale * root)
  # Products, since XLA turns two divisions into one by what may be too large.
  inverse = 1.0 / jnp.where(usable, root, 1.0)
  unit = jax.tree.map(
    lambda x: jnp.where(usable, x * (1.0 / scale) * inverse, 0.0), tree
  )
  return unit, jnp.where(usable, scale * root, 0.0)


def norm(tree: Any, size: jax.Array, param_specs: Any = None) -> jax.Array:
  """The Euclidean norm of a tree, in one pass; not finite where an entry is not.

  Args:
    tree: pytree of real floating-point arrays, all of the same dtype.
    size: scalar, roughly the largest magnitude: to 15 decades in float32.
    param_specs: see :func:`normalize`.

  Returns:
    A scalar, whose derivative is 0, not NaN, where the norm is.
  """
  leaves, axes = jax.tree.leaves(tree), leaf_axes(param_specs, tree)
  zero = jnp.zeros([], wide_dtype(tree))
  scale = _scale(jnp.asarray(size, zero.dtype))
  square = total([_sum_of_squares(x, scale) for x in leaves], axes, zero)
  # Both branches finite, so that the derivative where nothing moved is 0, not NaN.
  root = jnp.sqrt(jnp.where(square == 0, 1.0, square))
  return jnp.where(square == 0, 0.0, scale * root)


def _scale(size):
  """About ``size``, to scale by so that no square over- or underflows.

  Its reciprocal is a normal number as well. The results do not depend on it, so their
  derivatives need not know it. (A power of two would round nothing; on the CPU it took
  as long to compile as all the rest.)
  """
  reach = 2.0 ** (jnp.finfo(size.dtype).maxexp - 28)
  usable = (size > 0) & jnp.isfinite(size)
  scale = jnp.where(usable, jnp.clip(size, 1 / reach, reach), 1.0)
  return jax.lax.stop_gradient(scale)


def _sum_of_squares(x, scale):
  return jnp.sum(jnp.square(x * (1.0 / scale)))


def largest_magnitude(x: jax.Array) -> jax.Array:
  """``max|x|``, infinite if any entry is not finite; 0 for an empty array."""
  x = widen(x)
  # Across devices a maximum may lose a NaN, so there is none in it; and an infinity
  # would be one that `jax_debug_infs` sees in healthy arrays.
  most = float(jnp.finfo(x.dtype).max)
  largest = jnp.max(jnp.where(jnp.isnan(x), most, jnp.abs(x)), initial=0.0)
  finite = largest < most
  return jnp.where(finite, largest, zero_if(finite, x.dtype, otherwise=INFINITY))


def is_infinite(x: jax.Array) -> jax.Array:
  """``jnp.isinf`` without the infinity that it compares with, see :func:`zero_if`."""
  return ~jnp.isfinite(x) & (x == x)


def zero_if(condition: jax.Array, dtype: Any, *, otherwise: int = NAN) -> jax.Array:
  """0 where a condition holds, and NaN (or infinity) where not.

  Where the condition holds no NaN is made on the way, as ``jnp.where`` would make one:
  that is what ``jax_debug_nans`` looks for. By way of its bits, and not of arithmetic
  such as 0/0, which a compiler may simplify.
  """
  bits = jnp.where(condition, 0, otherwise).astype(jnp.int32)
  return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def widen(x: Any, like: Any = None) -> jax.Array:
  """``x`` in the dtype that ``like`` (by default itself) is computed in."""
  return jnp.asarray(x, wide_dtype(x if like is None else like))


def wide_dtype(tree: Any) -> jnp.dtype:
  """The dtype that a tree is computed in: float64 if a leaf has it, or float32."""
  dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
  return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)
