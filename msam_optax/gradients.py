"""The two-pass method as a function that takes gradients."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

import jax

from msam_optax.metrics import Metric
from msam_optax.metrics import monge
from msam_optax.transformation import sharpness_aware


def value_and_grad(
  loss_fn: Callable[..., Any],
  metric: Metric = monge(),
  rho: float | jax.Array = 0.05,
  *,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  perturbation_dtype: Any = None,
) -> Callable[..., tuple[Any, Any]]:
  """Takes the place of ``jax.value_and_grad``: the gradient is sharpness-aware.

  The value (and the auxiliary output) are those at the parameters ``w``, the
  gradient is the one at the probe ``w + δ``, ``δ = ρ G⁻¹g/√(gᵀG⁻¹g)``. Nothing
  else in a training loop changes, so this works under every Optax wrapper and in
  every trainer; :func:`sharpness_aware` is the same as an Optax transformation,
  with schedules and with scalars to log.

  Args:
    loss_fn: function to differentiate; returns a scalar, or ``(scalar, aux)``. Both
      passes call it with the same arguments, so also with the same random keys.
    metric: what uphill means; one without state, e.g. ``monge(alpha=1.0)``.
    rho: ``ρ``, the radius, scalar >= 0, a number or an array. For a schedule, make
      the function inside the training step and give ``rho=schedule(step)``.
    argnums: positional argument, or arguments, that hold the parameters.
    has_aux: whether ``loss_fn`` returns ``(scalar, aux)``.
    mask: which leaves of the parameters are moved, see :func:`sharpness_aware`.
      With several ``argnums`` it is for the tuple of these arguments. (Leaves that
      JAX cannot differentiate, as integers, belong into another argument.)
    axis_name: the mapped axis over which the gradient at the probe is averaged. The
      value and the auxiliary output are those of each replica.
    sync_ascent: whether to average the gradient for the ascent, too.
    perturbation_dtype: floating dtype in which ``loss_fn`` gets the probe, by
      default that of the parameters.

  Returns:
    A function with the arguments of ``loss_fn`` that returns ``(value, grads)``, or
    ``((value, aux), grads)``; ``grads`` has the structure, shapes and dtypes of the
    parameters.

  Raises:
    TypeError: if ``metric`` is no metric, or a parameter not real floating point.
    ValueError: if ``rho`` is a schedule, negative or not finite, if the metric has a
      state, or the mask does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean, value_and_grad
    >>> loss = lambda w: jnp.sum(w**2)
    >>> value, grads = value_and_grad(loss, euclidean(), rho=0.5)(
    ...     jnp.array([0.6, 0.8]))
    >>> print(value, grads)
    1.0 [1.8 2.4]

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  at_probe = without_state(
    metric,
    rho,
    mask=mask,
    axis_name=axis_name,
    sync_ascent=sync_ascent,
    perturbation_dtype=perturbation_dtype,
  )
  clean = jax.value_and_grad(loss_fn, argnums, has_aux=has_aux)
  gradient = jax.grad(loss_fn, argnums, has_aux=has_aux)

  @functools.wraps(loss_fn)
  def value_and_grad_fn(*args, **kwargs):
    value, grads = clean(*args, **kwargs)

    def grad_fn(probe):
      result = gradient(*_replace(args, argnums, probe), **kwargs)
      return result[0] if has_aux else result

    return value, at_probe(grads, _select(args, argnums), grad_fn)

  return value_and_grad_fn


def without_state(
  metric: Metric, rho: float | jax.Array, **options: Any
) -> Callable[[Any, Any, Callable[[Any], Any]], Any]:
  """One update of :func:`sharpness_aware`, for what has nowhere to keep a state.

  Args:
    metric: a metric without state.
    rho: ``ρ``, scalar >= 0, a number or an array.
    **options: the keyword arguments of :func:`sharpness_aware`.

  Returns:
    ``(grads, params, grad_fn) -> grads at the probe``.

  Raises:
    ValueError: if ``rho`` is a schedule; when called, if the metric has a state.
  """
  if callable(rho):
    raise ValueError(
      'A schedule for `rho` needs a step count, which `value_and_grad` does not'
      ' have: give its value, as in `value_and_grad(loss_fn, metric,'
      ' rho=schedule(step))` inside the training step, or use the'
      ' transformation `sharpness_aware(metric, rho=schedule)`.'
    )
  tx = sharpness_aware(metric, rho, **options)

  def at_probe(grads, params, grad_fn):
    if jax.tree.leaves(metric.init(params)):
      raise ValueError(
        'This metric keeps a state from step to step (a schedule for `alpha`, for'
        ' example, counts), and `value_and_grad` has nowhere to keep it: use the'
        ' transformation `sharpness_aware(metric, rho)` in `optax.chain`.'
      )
    grads, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    return grads

  return at_probe


def _select(args, argnums):
  """The parameters among the arguments: one, or a tuple of several."""
  if isinstance(argnums, Sequence):
    return tuple(args[i] for i in argnums)
  return args[argnums]


def _replace(args, argnums, params):
  """The arguments with other parameters."""
  if not isinstance(argnums, Sequence):
    argnums, params = (argnums,), (params,)
  new = list(args)
  for i, p in zip(argnums, params, strict=True):
    new[i] = p
  return new
