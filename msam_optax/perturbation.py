"""The probe: the parameters, moved uphill by the radius."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from msam_optax import _checks
from msam_optax import _devices
from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import spaces


def perturb(
  params: Any, ascent: metrics.Ascent, rho: float | jax.Array, *, mask: Any = None
) -> Any:
  """The probe ``w + ρ · direction`` on the leaves that the mask selects.

  The sum is taken in float32 or wider and rounded once, to the parameters' dtype.
  The parameters themselves are not touched: continue with them, and never subtract the
  perturbation again.

  Args:
    params: pytree of arrays; the leaves to be perturbed are real floating point.
    ascent: the direction, a pytree like ``params``, and slope under some metric, as
      exact as the dtype of the gradients was. Leaves that are not perturbed may be
      missing, each an ``optax.MaskedNode``.
    rho: ``ρ``, scalar, the length of the perturbation under that metric; downhill
      where it is negative.
    mask: which leaves are perturbed, a tree of bools like ``params`` (or a prefix) or
      a function from params to one; by default all.

  Returns:
    A pytree with the structure, shapes and dtypes of ``params``.

  Raises:
    TypeError: if a leaf to be perturbed is integer or complex.
    ValueError: if the mask does not fit ``params``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean, perturb
    >>> metric, w = euclidean(), jnp.array([1.0, 1.0])
    >>> ascent, _ = metric.ascend(jnp.array([3.0, -4.0]), metric.init(w), w)
    >>> print(perturb(w, ascent, rho=0.5))
    [1.3 0.6]
  """
  mask = _masks.perturbed(mask, params)
  _checks.check_params(params, mask)

  def move(perturbed, w, direction):
    if not perturbed:
      return w
    step = _numerics.widen(rho, like=w) * _numerics.widen(direction, like=w)
    return _add(jnp.asarray(w), step)

  return jax.tree.map(move, mask, params, ascent.direction)


@jax.custom_jvp
def _add(w, step):
  """``w + step`` in the step's dtype, rounded to that of ``w``; -0.0 + 0.0 is -0.0."""
  return jnp.where(step == 0, w, (w.astype(step.dtype) + step).astype(w.dtype))


@_add.defjvp
def _(primals, tangents):
  w, step = primals
  dw, dstep = tangents
  return _add(w, step), (dw.astype(step.dtype) + dstep).astype(w.dtype)


def distance(
  probe: Any,
  params: Any,
  size: jax.Array,
  *,
  mask: Any = None,
  param_specs: Any = None,
) -> jax.Array:
  """``‖probe − w‖₂``, so with what rounding to the params' dtype has left of it.

  It is not finite where the probe is not; ``size`` says roughly how long it will be.
  """

  def difference(perturbed, p, w):
    if not perturbed:
      return jnp.zeros([], _numerics.wide_dtype(params))
    moved = _numerics.widen(p, like=w) - _numerics.widen(w)
    return _numerics.widen(moved, like=params)

  mask = _masks.perturbed(mask, params)
  differences = jax.tree.map(difference, mask, probe, params)
  return spaces.norm(differences, size, param_specs)


def expected_size(
  rho: Any, ascent: metrics.Ascent, magnitudes: Any, mask: Any
) -> jax.Array:
  """Roughly how long a perturbation is, without another pass over its arrays.

  A direction of one size everywhere has that of ``slope / max|g|``, since the slope is
  ``⟨g, direction⟩``, and no direction is shorter; one in few coordinates has size
  one. The geometric mean of both guesses is never far from either.

  Args:
    rho: ``ρ``, scalar.
    ascent: the ascent along which the perturbation is.
    magnitudes: of the clean gradients, see :func:`magnitudes_of`.
    mask: which leaves are perturbed, a tree of bools.

  Returns:
    A scalar; it may be zero or not finite, where nothing is known.
  """
  moved = jax.tree.map(lambda m, x: x if m else jnp.zeros_like(x), mask, magnitudes)
  largest = functools.reduce(
    jnp.maximum, jax.tree.leaves(moved), jnp.zeros([], ascent.slope.dtype)
  )
  slope = ascent.slope.astype(largest.dtype)
  ratio = jnp.where(largest > 0, slope / jnp.where(largest > 0, largest, 1.0), 1.0)
  return _numerics.widen(rho, like=largest) * jnp.sqrt(jax.lax.stop_gradient(ratio))


def magnitudes_of(grads: Any, param_specs: Any = None) -> Any:
  """The largest magnitude in each leaf, infinite where an entry is not finite.

  Args:
    grads: pytree of arrays; 0 for leaves that are not floating point or complex.
    param_specs: how the leaves are sharded inside ``shard_map``: the largest is that
      of all shards.

  Returns:
    A tree of scalars like ``grads``, float32 or wider.
  """

  def of_leaf(g):
    if not _numerics.is_inexact(g):
      return jnp.zeros([], _numerics.wide_dtype(grads))
    # Of real arrays no `abs` before it, so that a metric's own pass is the same one.
    is_complex = jnp.issubdtype(jnp.result_type(g), jnp.complexfloating)
    largest = _numerics.largest_magnitude(jnp.abs(g) if is_complex else g)
    return _numerics.widen(largest, like=grads)

  leaves, structure = jax.tree.flatten(jax.tree.map(of_leaf, grads))
  axes = _devices.leaf_axes(param_specs, grads)
  return structure.unflatten(_devices.maxima(leaves, axes))


def mark_non_finite(probe_grads: Any, magnitudes: Any, radius: jax.Array) -> Any:
  """The gradient at a probe, NaN where the step to it was not finite.

  Where a leaf of the clean gradient is not finite, or the probe is not, the result is
  NaN, whatever the gradient at the probe: what follows in the chain must be able to
  see it. That is before any mean over replicas, so that all see the same.

  Args:
    probe_grads: gradient at the probe.
    magnitudes: of the clean gradient, see :func:`magnitudes_of`.
    radius: scalar, the probe's distance from the parameters.

  Returns:
    A pytree like ``probe_grads``.
  """

  def mark(magnitude, g):
    if not _numerics.is_inexact(g):
      return g
    # That the result depends on the radius has a second use: XLA then measures it
    # before an optimizer overwrites donated parameters, and need not copy them.
    usable = jnp.isfinite(magnitude) & jnp.isfinite(radius)
    return jnp.where(usable, g, _numerics.zero_if(usable, g.dtype))

  return jax.tree.map(mark, magnitudes, probe_grads)
