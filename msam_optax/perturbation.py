"""The probe: the parameters, moved uphill by the radius."""

import functools
import operator
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

  rho = jnp.asarray(rho)
  return jax.tree.map(
    lambda moves, w, direction: _moved(w, direction, rho) if moves else w,
    mask,
    params,
    ascent.direction,
  )


@jax.jit
def _moved(w, direction, rho):
  step = _numerics.widen(rho, like=w) * _numerics.widen(direction, like=w)
  return _add(jnp.asarray(w), step)


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
  length: jax.Array,
  ascent: metrics.Ascent,
  probe: Any,
  params: Any,
  *,
  mask: Any,
  param_specs: Any = None,
) -> jax.Array:
  """``‖probe − w‖₂``, how far the probe is from the parameters.

  It is measured, with what rounding has left of the step, unless the metric knows how
  long its direction is and no leaf is narrower than float32. There a measurement would
  read all parameters again, and differ only if ``ρ`` is about a millionth of ``‖w‖``.

  Args:
    length: scalar, the length of the step under the metric.
    ascent: along which the step is.
    probe: pytree of arrays, the parameters that the step leads to.
    params: pytree of arrays, where it begins.
    mask: which leaves are perturbed, a tree of bools.
    param_specs: how the leaves are sharded inside ``shard_map``.

  Returns:
    A scalar, float32 or wider. Measured, it is not finite where the probe is not.
  """
  after, before = _masks.restrict(probe, mask), _masks.restrict(params, mask)
  if ascent.length is not None and not _are_narrow((before, ascent.direction)):
    return jnp.abs(_numerics.widen(length, like=ascent.length)) * ascent.length

  def difference(p, w):
    step = _numerics.widen(p, like=w) - _numerics.widen(w)
    return _numerics.widen(step, like=params)

  return spaces.norm(jax.tree.map(difference, after, before), param_specs)


def unsound(
  grads: Any,
  ascent: metrics.Ascent,
  radius: jax.Array,
  *,
  mask: Any,
  param_specs: Any = None,
) -> Any:
  """NaN for each leaf in which a step is not finite before its probe, 0 for the others.

  A leaf is not finite if its clean gradient is not, and none is if the step is not. A
  slope that is a number, and not zero, says that all leaves that the metric has seen
  are finite. If it is none, they are read again. Where the metric has the Euclidean
  norm of what it has seen, a leaf too large for a sum of squares is not finite then.

  Args:
    grads: pytree of arrays, the clean gradients.
    ascent: what the metric made of them.
    radius: scalar, the length of the step.
    mask: which leaves are perturbed, a tree of bools: those that the metric has seen.
    param_specs: how the leaves are sharded inside ``shard_map``.

  Returns:
    A tree of float32 scalars like ``grads``.
  """
  leaves, structure = jax.tree.flatten(jax.lax.stop_gradient(grads))
  is_seen = jax.tree.leaves(mask)
  seen = [g for g, chosen in zip(leaves, is_seen, strict=True) if chosen]
  finite = jnp.isfinite(ascent.slope) & (ascent.slope != 0)
  if ascent.length is not None:
    # These are the sums of the metric, and XLA takes them once.
    flags = [_is_infinite(spaces.sum_of_squares(g)) for g in seen]
  else:
    nothing = [jnp.where(finite, 0.0, 1.0)] * len(seen)
    flags = _devices.unless(
      finite, nothing, lambda seen: [spaces.has_non_finite(g) for g in seen], seen
    )
  rest = iter(flags)
  bad = [
    next(rest) if chosen else spaces.has_non_finite(g)
    for g, chosen in zip(leaves, is_seen, strict=True)
  ]
  bad = _devices.maxima(bad, _devices.leaf_axes(param_specs, grads))
  moved = jnp.isfinite(radius)
  zero_if = lambda sound: _numerics.zero_if(sound, jnp.float32)
  # They end with a root, so that XLA does not compute them once more for each leaf.
  # There is a NaN only if a leaf needs it: one is looked for in healthy steps.
  all_good = functools.reduce(operator.and_, [x == 0 for x in bad], moved)
  if_good, if_bad = (
    jnp.sqrt(zero_if(moved)),
    jnp.sqrt(zero_if(all_good | finite & moved)),
  )
  marks = [
    jnp.where(x == 0, if_good, if_bad) if chosen else zero_if((x == 0) & moved)
    for x, chosen in zip(bad, is_seen, strict=True)
  ]
  return structure.unflatten(marks)


@jax.jit
def _is_infinite(square):
  return jnp.where(jnp.isfinite(square), 0.0, 1.0)


def mark(grads: Any, marks: Any) -> Any:
  """Gradients at a probe, NaN where the step to it was not finite.

  That is so whatever the gradient there is: what follows in the chain must be able to
  see it. It is before any mean over replicas, so that all see the same.

  Args:
    grads: pytree of arrays.
    marks: of :func:`unsound`.

  Returns:
    A pytree like ``grads``.
  """

  # If it was measured, the radius is in the marks, and they have a second use: XLA then
  # measures it before an optimizer overwrites donated parameters, and need not copy
  # them.
  return jax.tree.map(
    lambda m, g: _marked(m, g) if _numerics.is_inexact(g) else g, marks, grads
  )


@jax.jit
def _marked(nan_or_zero, g):
  return g + nan_or_zero.astype(g.dtype)


def _are_narrow(tree):
  return any(jnp.finfo(jnp.result_type(x)).bits < 32 for x in jax.tree.leaves(tree))
