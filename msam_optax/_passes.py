"""The passes of a step: at the parameters, at the probes, and what is made of both."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import operator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msam_optax import _checks
from msam_optax import _devices
from msam_optax import _hyperparameters
from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import combinations
from msam_optax import metrics
from msam_optax import perturbation
from msam_optax import spaces


class Setting(NamedTuple):
  """What a method is, the same in every step, see :func:`sharpness_aware`."""

  metric: metrics.Metric
  rho: Any
  combination: combinations.Combination
  mask: Any
  param_specs: Any
  dtype: Any


class Start(NamedTuple):
  """What the probes of a step start from.

  Attributes:
    params: pytree of arrays, ``w``, in the dtype of the perturbation.
    grads: pytree of arrays like it, the clean gradient ``g``, zero where there is none.
    perturbed: which leaves are perturbed, a tree of bools.
    present: which leaves have a gradient, a tree of bools.
  """

  params: Any
  grads: Any
  perturbed: Any
  present: Any


class Probes(NamedTuple):
  """What the passes at the probes return.

  Attributes:
    grads: the gradient at each probe, a tuple of pytrees like the params.
    slope: scalar, the metric's; None if there is no probe.
    radius: scalar, the distance of the first probe from the parameters, or None.
    value: scalar, the loss at the first probe, or None.
    metric_state: the metric's next state.
    marks: trees of a scalar for each leaf of ``grads``, NaN where the step to the probe
      was not finite, and 0 elsewhere; none if the gradients are marked.
  """

  grads: tuple[Any, ...]
  slope: jax.Array | None
  radius: jax.Array | None
  value: Any
  metric_state: Any
  marks: tuple[Any, ...] = ()


def init_metric(setting: Setting, params: Any) -> Any:
  """The first state of the metric, which sees the leaves that are perturbed."""
  if not jax.tree.leaves(params):  # What optax.tree.map_params gives.
    return setting.metric.init(params)
  perturbed = _masks.perturbed(setting.mask, params)
  _checks.check_any(perturbed)
  _checks.check_params(params, perturbed)
  return setting.metric.init(_masks.restrict(params, perturbed))


def init_combination(setting: Setting, params: Any) -> Any:
  """The first state of the combination, which sees the leaves that have gradients."""
  real = _masks.restrict_to_real(params, _masks.trained(params))
  return setting.combination.init(real)


def start(grads: Any, params: Any, setting: Setting) -> Start:
  """Checks and completes what a step starts from.

  Args:
    grads: the clean gradient, a pytree like ``params`` with None where there is none.
    params: pytree of arrays.
    setting: what the method is.

  Returns:
    A :class:`Start`.
  """
  present = _masks.has_leaf(grads, params)
  grads = _masks.fill(grads, present, params)
  chosen = _masks.perturbed(setting.mask, params)
  perturbed = jax.tree.map(operator.and_, chosen, present)
  _checks.check_any(perturbed)
  _devices.check_sharded(grads, setting.param_specs, perturbed)
  return Start(
    params=_cast(params, setting.dtype, perturbed),
    grads=_cast(grads, setting.dtype, perturbed),
    perturbed=perturbed,
    present=present,
  )


def at_probes(
  begin: Start,
  evaluate: Callable[[Any], tuple[Any, Any]],
  setting: Setting,
  *,
  metric_state: Any,
  space: spaces.Space,
  count: Any = None,
  scales: Sequence[Any] | None = None,
  average: Callable[[Any], Any] = lambda grads: grads,
  marked: bool = True,
  unperturbed: Any = None,
  extra_args: Mapping[str, Any] | None = None,
) -> Probes:
  """The gradients at ``w + scale · δ``, marked where a pass was not finite.

  Args:
    begin: what they start from; its gradient is the one of the ascent.
    evaluate: ``params -> (value or None, grads)``.
    setting: what the method is.
    metric_state: the metric's state.
    space: how the gradients are spread over devices.
    count: int32 scalar, the steps so far, if ``rho`` is a schedule.
    scales: one scalar for each probe; by default those of the combination.
    average: ``grads -> grads``, what is done to gradients before the metric sees them.
    marked: whether the gradients are marked, or the marks returned.
    unperturbed: bool scalar of a loop, whether this is its turn at the params, in which
      the metric takes no gradients.
    extra_args: what else the metric may know.

  Returns:
    A :class:`Probes`.
  """
  w, g, perturbed, present = begin
  rho = _hyperparameters.value_at('rho', setting.rho, count)

  def probe_gradient(probe):
    value, grads = evaluate(probe)
    return value, _masks.fill(grads, present, w)

  def gradient(params):
    """What the metric calls."""
    if unperturbed is None:
      return average(probe_gradient(params)[1])
    like = jax.tree.map(jnp.zeros_like, g)
    return jax.lax.cond(
      unperturbed,
      lambda: like,
      lambda: jax.tree.map(
        lambda x, z: x.astype(z.dtype), average(probe_gradient(params)[1]), like
      ),
    )

  ascent, metric_state = metrics.ascend_on(
    perturbed,
    setting.metric,
    g,
    metric_state,
    w,
    {
      **(extra_args or {}),
      'space': space,
      'rho': rho,
      'grad_fn': gradient,
    },
  )
  where = {'mask': perturbed, 'param_specs': setting.param_specs}

  def at_scale(scale):
    length = _numerics.widen(rho, like=w) * _numerics.widen(scale, like=w)
    probe = perturbation.perturb(w, ascent, length, mask=perturbed)
    radius = perturbation.distance(length, ascent, probe, w, **where)
    if unperturbed is not None:
      # 0 · NaN is NaN: the clean pass of a loop sees no hyperparameter and no metric.
      probe = jax.tree.map(lambda x, p: jnp.where(unperturbed, x, p), w, probe)
      radius = jnp.where(unperturbed, 0.0, radius)
    _devices.check_probe(probe, w, g)
    marks = perturbation.unsound(g, ascent, radius, **where)
    if unperturbed is None:
      # Else XLA makes the probe anew at each use, and keeps the clean gradient for it.
      # A loop has room for that in any case, and holds more with the barrier.
      probe, radius, marks = _devices.barrier((probe, radius, marks))
    value, grads = probe_gradient(probe)
    return grads, radius, value, marks

  scales = setting.combination.scales if scales is None else scales
  probes = (at_scale(scale) for scale in scales)
  grads, radii, values, marks = zip(*probes, strict=True)
  if marked:
    grads, marks = perturbation.mark(grads, marks), ()
  return Probes(grads, ascent.slope, radii[0], values[0], metric_state, marks)


def is_due(begin: Start, state: Any, space: spaces.Space, setting: Setting) -> Any:
  """Whether this step has probes: what the ``due`` of the combination says."""
  g = _masks.restrict_to_real(begin.grads, _masks.trained(begin.params))
  assert setting.combination.due is not None
  due = setting.combination.due(g, state, space)
  combinations.check_due(due)
  return due


def combine(
  grads: tuple[Any, ...],
  state: Any,
  space: spaces.Space,
  setting: Setting,
  *,
  like: Any,
  params: Any,
) -> tuple[Any, Any]:
  """The update that a combination makes of the gradients of a step.

  Args:
    grads: ``(g, g₁, …)``, pytrees like ``like``.
    state: the combination's state.
    space: how the gradients are spread over devices.
    setting: what the method is.
    like: the clean gradient as it came. The update has its dtypes, and its values in
      leaves that are no gradients: FP8 scaling factors get the new values of the clean
      pass.
    params: the parameters, a pytree like ``like``.

  Returns:
    The update, a pytree like ``like``, and the combination's next state.
  """
  has_gradient = _masks.trained(params)
  real = tuple(_masks.restrict_to_real(g, has_gradient) for g in grads)
  try:
    result = setting.combination.combine(real, state, space)
  except Exception as error:
    if len(real) == 1:
      error.add_note(
        'This came from the `combine` of a Combination, which is called with `(g,)`'
        ' alone in a step that is not `due`.'
      )
    raise
  if not isinstance(result, tuple) or len(result) != 2:
    raise TypeError(
      'The `combine` of a Combination must return `(update, state)`, not a'
      f' {type(result).__name__}{_length(result)}. Without a state it returns the one'
      ' that it was given.'
    )
  update, state = result
  what = 'What the `combine` of a Combination returns must be like the gradients'
  _checks.check_like(update, real[0], what=what, dtypes=False)

  def of_leaf(trained, new, old):
    if not trained:
      return old
    if isinstance(new, _masks.Complex):
      new = jax.lax.complex(*(_numerics.widen(x) for x in new))
    return jnp.asarray(new).astype(jnp.result_type(old))

  return jax.tree.map(of_leaf, has_gradient, update, like), state


def _length(x):
  return f' of {len(x)}' if isinstance(x, (tuple, list)) else ''


def _cast(tree, dtype, perturbed):
  if dtype is None:
    return tree
  return jax.tree.map(
    lambda cast, x: jnp.asarray(x, dtype) if cast else x, perturbed, tree
  )
