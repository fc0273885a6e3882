"""What has other names, or another shape, in other versions of JAX."""

from typing import Any

import jax


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """``x`` as an array that varies along manual axes."""
  if not axes:
    return x
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(x, tuple(sorted(axes)), to='varying')
  return jax.lax.pvary(x, tuple(sorted(axes)))  # pyright: ignore


def how_to_vary(axis: Any) -> str:
  """What a user writes to have replicated parameters vary along an axis."""
  if hasattr(jax.lax, 'pcast'):
    return f'`params = jax.lax.pcast(params, {axis!r}, to="varying")`'
  return f'`params = jax.lax.pvary(params, {axis!r})`'


def varying_axes(x: Any) -> frozenset[str]:
  """The manual axes along which an array varies, where JAX tracks them."""
  kind = jax.typeof(x)
  kind = getattr(kind, 'manual_axis_type', kind)
  return getattr(kind, 'varying', None) or getattr(kind, 'vma', frozenset())
