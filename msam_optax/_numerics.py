"""Precision: what is computed in float32 or wider, and numbers that are not finite."""

from typing import Any

import jax
import jax.numpy as jnp

# The bits of float32.
NAN, INFINITY = 0x7FC00000, 0x7F800000


def largest_magnitude(x: jax.Array) -> jax.Array:
  """``max|x|``, infinite if any entry is not finite; 0 for an empty array."""
  x = widen(x)
  # Across devices a maximum may lose a NaN, so there is none in it; and an infinity
  # would be one that `jax_debug_infs` sees in healthy arrays.
  most = float(jnp.finfo(x.dtype).max)
  largest = jnp.max(jnp.where(jnp.isnan(x), most, jnp.abs(x)), initial=0.0)
  finite = largest < most
  return jnp.where(finite, largest, zero_if(finite, x.dtype, otherwise=INFINITY))


def zeros_like(tree: Any) -> Any:
  """Zeros for a state, not weakly typed, as a parameter may be and no gradient is."""
  return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.result_type(x)), tree)


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


def is_inexact(x: Any) -> bool:
  """Whether a leaf is floating point or complex."""
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def inverse_hypot(x: jax.Array, square: jax.Array | None = None) -> jax.Array:
  """``1/√(1 + x²)``, also where ``x²`` overflows; ``square`` may say what ``x²`` is."""
  largest = 1.0 / jnp.finfo(x.dtype).eps
  huge = jnp.abs(x) > largest
  square = jnp.square(jnp.where(huge, 0.0, x)) if square is None else square
  hypot = jnp.sqrt(1.0 + jnp.where(huge, 0.0, square))
  # The last of all is the division: see `spaces.normalize`.
  return 1.0 / jnp.where(huge, jnp.abs(x), hypot)


def divisor(weight: jax.Array | None) -> Any:
  """A weight, or one where it is zero: what is empty adds nothing, and not 0/0."""
  return 1.0 if weight is None else jnp.where(weight == 0, 1.0, weight)


def multiply(factor: jax.Array, tree: Any) -> Any:
  """The tree times a scalar, in its own dtypes."""
  return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)


def divide(tree: Any, count: int | jax.Array) -> Any:
  """The tree divided by a scalar, in its own dtypes."""
  if isinstance(count, int):
    return jax.tree.map(lambda x: x / count, tree)
  return jax.tree.map(lambda x: x / count.astype(x.dtype), tree)
