"""The probe: the parameters, moved uphill by the radius."""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from msam_optax.checks import check_params
from msam_optax.masks import admitted
from msam_optax.masks import overwritten
from msam_optax.metrics import Ascent
from msam_optax.metrics import Metric
from msam_optax.numerics import largest_magnitude
from msam_optax.numerics import norm
from msam_optax.numerics import wide_dtype
from msam_optax.numerics import widen
from msam_optax.numerics import zero_if
from msam_optax.reductions import is_inexact
from msam_optax.reductions import leaf_axes
from msam_optax.reductions import maxima


def perturb(
  params: Any, ascent: Ascent, rho: float | jax.Array, *, mask: Any = None
) -> Any:
  """The probe ``w + ρ · direction`` on the leaves that the mask admits.

  The sum is taken in float32 or wider and rounded once, to the parameters' dtype.
  The parameters themselves are not touched: to go back, go on with them, and
  never subtract the perturbation again.

  Args:
    params: pytree of arrays; the leaves to be moved are real floating point.
    ascent: the direction, a pytree like ``params``, and slope under some metric, as
      exact as the dtype of the gradients was.
    rho: ``ρ``, scalar, the length of the perturbation under that metric; downhill
      where it is negative.
    mask: which leaves are moved, a tree of bools like ``params`` (or a prefix) or
      a function from params to one; by default all.

  Returns:
    A pytree with the structure, shapes and dtypes of ``params``.

  Raises:
    TypeError: if a leaf to be moved is integer or complex.
    ValueError: if the mask does not fit ``params``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean, perturb
    >>> metric, w = euclidean(), jnp.array([1.0, 1.0])
    >>> ascent, _ = metric.ascend(jnp.array([3.0, -4.0]), metric.init(w), w)
    >>> print(perturb(w, ascent, rho=0.5))
    [1.3 0.6]
  """
  mask = admitted(mask, params)
  check_params(params, mask)

  def move(moved, w, direction):
    if not moved:
      return w
    step = widen(rho, like=w) * widen(direction, like=w)
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


def ascend(
  metric: Metric,
  grads: Any,
  state: Any,
  params: Any,
  *,
  mask: Any = None,
  param_specs: Any = None,
) -> tuple[Ascent, Any]:
  """The metric's ascent over the admitted leaves: the others are not in its norm."""

  def admit(moved, g):
    if moved:
      return g
    dtype = jnp.result_type(g)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.zeros(jnp.shape(g), dtype if floating else jnp.float32)

  grads = jax.tree.map(admit, admitted(mask, params), grads)
  # A metric that is not made for sharded parameters need not know of them.
  if param_specs is None:
    return metric.ascend(grads, state, params)
  parameters = inspect.signature(metric.ascend).parameters.values()
  if not any(p.name == 'param_specs' or p.kind is p.VAR_KEYWORD for p in parameters):
    raise TypeError(
      'With `param_specs` a metric must take `ascend(grads, state, params, *,'
      ' param_specs)` and sum over the axes of the mesh that they name.'
    )
  return metric.ascend(grads, state, params, param_specs=param_specs)


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

  def difference(moved, p, w):
    if not moved:
      return jnp.zeros([], wide_dtype(params))
    return widen(widen(p, like=w) - widen(w), like=params)

  differences = jax.tree.map(difference, admitted(mask, params), probe, params)
  return norm(differences, size, param_specs)


def expected_size(
  rho: Any, ascent: Ascent, magnitudes: Any, mask: Any = None
) -> jax.Array:
  """Roughly how long a perturbation is, without another pass over its arrays.

  A direction of one size everywhere has that of ``slope / max|g|``, since the slope is
  ``⟨g, direction⟩``, and no direction is shorter. The root of it is as far from that as
  from a direction of size one, and so never far from either.

  Args:
    rho: ``ρ``, scalar.
    ascent: the ascent along which the perturbation is.
    magnitudes: of the clean gradients, see :func:`magnitudes_of`.
    mask: which leaves are moved, a tree of bools.

  Returns:
    A scalar; it may be zero or not finite, where nothing is known.
  """
  moved = jax.tree.map(lambda m, x: x if m else jnp.zeros_like(x), mask, magnitudes)
  largest = functools.reduce(jnp.maximum, jax.tree.leaves(moved))
  slope = ascent.slope.astype(largest.dtype)
  ratio = jnp.where(largest > 0, slope / jnp.where(largest > 0, largest, 1.0), 1.0)
  return widen(rho, like=largest) * jnp.sqrt(jax.lax.stop_gradient(ratio))


def magnitudes_of(grads: Any, param_specs: Any = None) -> Any:
  """The largest magnitude in each leaf, infinite where an entry is not finite.

  Args:
    grads: pytree of arrays; 0 for leaves that are not floating point or complex.
    param_specs: how the leaves are sharded inside ``shard_map``: the largest is that
      of all parts.

  Returns:
    A tree of scalars like ``grads``, float32 or wider.
  """

  def of_leaf(g):
    if not is_inexact(g):
      return jnp.zeros([], wide_dtype(grads))
    # Of real arrays no `abs` before it, so that a metric's own pass is the same one.
    is_complex = jnp.issubdtype(jnp.result_type(g), jnp.complexfloating)
    return widen(largest_magnitude(jnp.abs(g) if is_complex else g), like=grads)

  leaves, structure = jax.tree.flatten(jax.tree.map(of_leaf, grads))
  return structure.unflatten(maxima(leaves, leaf_axes(param_specs, grads)))


def settle(
  probe_grads: Any,
  grads: Any,
  magnitudes: Any,
  radius: jax.Array,
  average: Callable[[Any], Any],
) -> Any:
  """The gradient at the probe, averaged over replicas and fit to be applied.

  Where a leaf of the clean gradient is not finite, or the probe is not, the result is
  NaN, whatever the gradient at the probe: what follows in the chain must be able to
  see it. FP8 scaling factors get the new values of the clean pass.

  Args:
    probe_grads: gradient at the probe, a pytree like ``grads``.
    grads: the clean gradient.
    magnitudes: of the clean gradient, see :func:`magnitudes_of`.
    radius: scalar, the probe's distance from the parameters.
    average: takes the mean over replicas, in the dtypes of ``probe_grads``.

  Returns:
    A pytree with the structure, shapes and dtypes of ``grads``.
  """

  def poison(magnitude, g_probe):
    if not is_inexact(g_probe):
      return g_probe
    # That the result depends on the radius has a second use: XLA then measures it
    # before an optimizer overwrites donated parameters, and need not copy them.
    usable = jnp.isfinite(magnitude) & jnp.isfinite(radius)
    return jnp.where(usable, g_probe, zero_if(usable, g_probe.dtype))

  def restore(replaced, x, g):
    if replaced:
      return g
    return x.astype(jnp.result_type(g)) if is_inexact(x) else x

  averaged = average(jax.tree.map(poison, magnitudes, probe_grads))
  return jax.tree.map(restore, overwritten(grads), averaged, grads)
