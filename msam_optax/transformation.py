"""The two-pass method as an Optax transformation."""

import functools
from typing import Any
from typing import NamedTuple
from typing import TypedDict

import jax
import jax.core
import jax.numpy as jnp
import optax

from msam_optax import _checks
from msam_optax import _devices
from msam_optax import _evaluation
from msam_optax import _hyperparameters
from msam_optax import _loops
from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import _passes
from msam_optax import combinations
from msam_optax import metrics
from msam_optax import spaces


class Options(TypedDict, total=False):
  """The keyword arguments of :func:`sharpness_aware`, which every method has."""

  mask: Any
  axis_name: Any
  sync_ascent: bool
  param_specs: Any
  perturbation_dtype: Any


class SharpnessAwareState(NamedTuple):
  """State of :func:`sharpness_aware`; all but the last two are scalars.

  Read it with ``optax.tree.get(opt_state, 'slope')``. The floats are float32, or
  float64 if a parameter is; zero before the first step, and where not recorded.

  Attributes:
    count: int32, the steps so far: calls of ``update``.
    slope: the metric's slope ``√(gᵀG⁻¹g)``, so ``ρ · slope`` is the predicted rise.
    radius: ``‖δ‖₂`` as really used, after mask and schedule; in bfloat16 and float16
      after rounding as well, so that zero says that the perturbation was lost. Of the
      first probe, as are the next two: of ``scales[0] · δ`` where a combination has
      other scales than 1.
    loss: ``ℓ(w)``; recorded if ``update`` takes it itself, or is given ``value``. (A
      name that no parameter has, as ``value`` is one of attention.)
    probe_value: ``ℓ(w+δ)``; recorded if ``value_and_grad_fn`` is given.
    rise: ``ℓ(w+δ) − ℓ(w)``; recorded if ``value_and_grad_fn`` and ``value`` are. If it
      is negative at a small radius, what came into ``update`` was no gradient.
    finite: bool, whether the update is finite, so the gradient at the params and the
      one at the probe; True before the first step. (Inside ``optax.MultiSteps`` it is
      that of the last step that was made: put the method before it in a chain.)
    metric_state: the metric's own state, of the leaves that are perturbed.
    combination_state: the combination's own state.
  """

  count: Any
  slope: jax.Array
  radius: jax.Array
  loss: jax.Array
  probe_value: jax.Array
  rise: jax.Array
  finite: jax.Array
  metric_state: Any
  combination_state: Any


def sharpness_aware(
  metric: metrics.Metric,
  rho: _hyperparameters.Hyperparameter,
  combination: combinations.Combination = combinations.probe_gradient(),
  *,
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Replaces the gradient with the gradient at the worst point nearby.

  ``update`` gets the gradient ``g`` at the parameters ``w``, moves uphill to the
  probe ``w + δ``, ``δ = ρ G⁻¹g/√(gᵀG⁻¹g)``, and returns the gradient there (or what
  another ``combination`` makes of both), for any optimizer behind it in a chain::

    tx = optax.chain(sharpness_aware(monge(), rho=0.05), optax.adam(1e-3))
    grad_fn = lambda params: jax.grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)

  ``update`` needs ``params`` and one of the keyword arguments ``grad_fn(params) ->
  grads`` and ``value_and_grad_fn(params) -> (value, grads)``; the latter also
  records the loss at the probe and, if ``value=`` (the loss at ``w``) is given,
  its rise. All extra arguments reach the metric and the rest of the chain.

  **Without a gradient**, ``update`` takes both itself, and records the loss at ``w``::

    f = lambda params: jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(None, state, params, value_and_grad_fn=f)
    value = optax.tree.get(state, 'loss')

  Under ``jit`` all passes are turns of one loop, so the program holds one copy of the
  gradient: less to compile, less code, and on many chips much less memory. (On a CPU
  convolutions in a loop are many times slower: give the gradient there. A combination
  that is not ``due`` in every step has two copies.) With ``perturbation_dtype`` the
  clean pass gets the parameters in that dtype as well. Nothing that needs a gradient,
  or the loss as ``value``, may then stand around it; and clipping before it does
  nothing.

  **It comes first in the chain.** What reaches it must be the gradient at ``params``:
  behind an optimizer it would perturb downhill and return a gradient that is added to
  the parameters, and behind clipping its radius would be another. It cannot tell by
  itself. Pass the gradient a second time, ``grad=grads``, and it raises an error if it
  receives anything else.

  Where the gradient is zero there is no perturbation, and the plain gradient goes
  through. Where it is not finite there is none either, and the result is not finite
  in the same leaves, so that ``optax.apply_if_finite`` sees it. The same holds for a
  gradient at the probe that is not finite. Under loss scaling that happens first, and
  the scaler's own flag covers the clean pass only: ``optax.tree.get(state, 'finite')``
  covers both. Leaves whose gradient is None are not perturbed. The collection in which
  Flax keeps its FP8 scaling factors is not perturbed either, and gets the new values of
  the clean pass.

  Args:
    metric: how the length of a perturbation is measured, e.g. ``monge()`` or
      ``euclidean()``.
    rho: ``ρ``, the radius, scalar >= 0: a number, an array, or an Optax schedule,
      counted in calls of ``update``.
    combination: the update that is made of the gradients, e.g. ``surrogate_gap(0.6)``;
      by default the gradient at the probe.
    mask: which leaves are perturbed, in Optax's convention: a tree of bools like the
      params (or a prefix of it), or a function from params to one. The metric sees no
      others. By default all; they must be real floating point.
    axis_name: the mapped axis (of ``pmap``, ``vmap`` or ``shard_map``) over which the
      gradient at the probe is averaged, and so are the scalars in the state. The
      params must be replicated over it. A metric's state is that of each replica,
      unless the metric uses ``space.mean``. Under ``jit`` with sharded arrays, which
      may be sharded in any way, nothing is to be named.
    sync_ascent: whether to average the gradient for the ascent over ``axis_name`` as
      well. By default each replica perturbs along its own (m-sharpness).
    param_specs: how the params are sharded inside ``shard_map``: the tree of
      ``PartitionSpec`` (or a prefix of it) that it has as ``in_specs`` for them.
      The norm is then that of the whole, summed over the axes that they name. By
      default each device has all of every leaf.
    perturbation_dtype: floating dtype in which ascent and probe are computed and
      ``grad_fn`` is called, by default that of the params. bfloat16 parameters
      round small perturbations away: give ``jnp.float32``, and let the model compute
      in it. If it casts the probe back, the perturbation is lost all the same.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` whose updates have exactly the
    structure, shapes and dtypes of the incoming gradients.

  Raises:
    TypeError: if ``rho`` is no hyperparameter, ``perturbation_dtype`` not floating.
    ValueError: if ``rho`` is negative or not finite, or ``sync_ascent`` lacks its
      ``axis_name``. ``init`` and ``update`` name what is wrong with their arguments.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import euclidean, sharpness_aware
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(sharpness_aware(euclidean(), rho=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.6, 0.8])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'slope'):.4f}")
    [-0.18 -0.24] 2.0000

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  metrics.check_metric('metric', metric)
  _hyperparameters.check_hyperparameter('rho', rho)
  combinations.check_combination(combination)
  _devices.check_axis_name(axis_name)
  if sync_ascent and axis_name is None:
    raise ValueError(
      '`sync_ascent=True` averages the ascent gradient over a mapped axis: name'
      ' it, as in `axis_name="batch"`.'
    )
  _checks.check_dtype('perturbation_dtype', perturbation_dtype)

  setting = _passes.Setting(
    metric, rho, combination, mask, param_specs, perturbation_dtype
  )
  average = functools.partial(spaces.mean, axis_name=axis_name)
  ascent_mean = average if sync_ascent else lambda grads: grads

  def averaged_for_ascent(grads):
    _devices.check_varying(grads, axis_name)
    return ascent_mean(grads)

  def space_of(means):
    means = means if sync_ascent else ()
    return spaces.over(axis_name, param_specs, averaged=means)

  def init(params):
    params = _fast(params)
    _checks.check_unmasked(params)
    _checks.check_arrays(params)
    # Five arrays, not five times one: a donated buffer may be given only once.
    zeros = [jnp.zeros([], _numerics.wide_dtype(params)) for _ in range(5)]
    # A combination remembers means, also where the params were cast to vary.
    replicas = _devices.of_replicas(params, axis_name)
    return SharpnessAwareState(
      jnp.zeros([], jnp.int32),
      *zeros,
      finite=jnp.ones([], bool),
      metric_state=_passes.init_metric(setting, params),
      combination_state=_passes.init_combination(setting, replicas),
    )

  def clean_pass(evaluate, updates, state, params, value, extra_args):
    """What is known before the probes, and the probes if all passes are one loop."""
    if updates is None and combination.due is None and _is_traced((params, state)):
      loss, begin, like, probes = _loops.from_params(
        evaluate,
        params,
        setting,
        space=space_of,
        average=averaged_for_ascent,
        names=axis_name if sync_ascent else (),
        value=value,
        metric_state=state.metric_state,
        count=state.count,
        extra_args=extra_args,
      )
      return _Clean(begin, like, loss if value is None else value, probes)
    loss = None
    if updates is None:
      loss, updates = evaluate(params)
    _check_gradients(updates, params, extra_args)
    begin = _passes.start(updates, params, setting)
    begin = begin._replace(grads=averaged_for_ascent(begin.grads))
    like = _masks.fill(updates, begin.present, params)
    return _Clean(begin, like, loss if value is None else value, None)

  def probe_passes(evaluate, clean, state, space, extra_args):
    wanted = _masks.leave_out(clean.begin.grads, clean.begin.present)
    known = {} if clean.value is None else {'value': clean.value}
    return _passes.at_probes(
      clean.begin,
      lambda probe: evaluate(probe, wanted, dtypes=perturbation_dtype is None),
      setting,
      metric_state=state.metric_state,
      space=space,
      count=state.count,
      average=ascent_mean,
      extra_args={**extra_args, **known},
    )

  def combined(clean, probes, state, params, space):
    """The update, and the parts of the next state that a step may skip."""
    updates, combination_state = _passes.combine(
      (clean.begin.grads, *probes.grads),
      state.combination_state,
      space,
      setting,
      like=clean.like,
      params=params,
    )
    scalars = _scalars(probes, clean.value, state, average)
    return updates, {
      'metric_state': probes.metric_state,
      'combination_state': combination_state,
      **scalars,
    }

  def update(
    updates,
    state,
    params=None,
    *,
    grad_fn=None,
    value_and_grad_fn=None,
    value=None,
    **extra_args,
  ):
    evaluate = _evaluation.evaluation(grad_fn, value_and_grad_fn, extra_args)
    params = _fast(params)
    _check_params(params, extra_args)
    _devices.check_axes(params, param_specs, axis_name)
    _checks.check_averaged(params, axis_name)

    clean = clean_pass(evaluate, updates, state, params, value, extra_args)
    in_loop = clean.probes.grads if clean.probes else ()
    space = space_of((clean.begin.grads, *in_loop))

    def with_probes():
      probes = clean.probes or probe_passes(evaluate, clean, state, space, extra_args)
      return combined(clean, probes, state, params, space)

    def without_probes():
      none = _passes.Probes((), None, None, None, state.metric_state)
      return combined(clean, none, state, params, space)

    if combination.due is None:
      new_updates, recorded = with_probes()
    else:
      due = _passes.is_due(clean.begin, state.combination_state, space, setting)
      new_updates, recorded = _devices.either(due, with_probes, without_probes)
    new_state = SharpnessAwareState(
      count=optax.safe_increment(state.count),
      finite=spaces.all_finite(new_updates, param_specs),
      **recorded,
    )
    return _masks.leave_out(new_updates, clean.begin.present), new_state

  return optax.GradientTransformationExtraArgs(init, update)


def normalize_by(
  metric: metrics.Metric, *, param_specs: Any = None
) -> optax.GradientTransformation:
  """The ascent direction ``G⁻¹g/√(gᵀG⁻¹g)`` as a plain transformation.

  It makes every metric an adversary for Optax's own SAM wrapper. This is Monge
  SAM::

    optax.contrib.sam(
        optimizer, optax.chain(normalize_by(monge()), optax.sgd(rho)),
        opaque_mode=True)

  Args:
    metric: the metric ``G``.
    param_specs: how the params are sharded inside ``shard_map``, see
      :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformation` whose state is the metric's.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import monge, normalize_by
    >>> tx, g = normalize_by(monge(alpha=1.0)), jnp.array([0.0, 0.75])
    >>> print(tx.update(g, tx.init(g), g)[0])
    [0.  0.8]
  """
  metrics.check_metric('metric', metric)

  def init(params):
    if not jax.tree.leaves(params):
      return metric.init(params)
    return metric.init(_masks.restrict(params, _masks.perturbed(None, params)))

  def update(updates, state, params=None):
    every = _masks.resolve_mask(None, updates)
    _devices.check_sharded(updates, param_specs, every)
    perturbed = _masks.perturbed(None, updates)
    extra_args = {'space': spaces.over(None, param_specs)}
    ascent, state = metrics.ascend_on(
      perturbed, metric, updates, state, params, extra_args
    )
    return metrics.directions_of_all(ascent, perturbed, updates), state

  return optax.GradientTransformation(init, update)


class _Clean(NamedTuple):
  """What is known of a step before its probes.

  Attributes:
    begin: what the probes start from; its gradient is the one of the ascent.
    like: the clean gradient as it came, zero where there is none.
    value: scalar, the loss at the params, or None.
    probes: the passes at the probes, if they were made in one loop with the clean one.
  """

  begin: _passes.Start
  like: Any
  value: Any
  probes: _passes.Probes | None


def _fast(params):
  """The parameters that the loss is evaluated at: optax.lookahead has two sets."""
  return params.fast if isinstance(params, optax.LookaheadParams) else params


def _is_traced(tree):
  """Whether this is part of a program that is compiled as a whole.

  Operation by operation a loop would be compiled anew in every step.
  """
  return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _is_none(x):
  return x is None


def _check_params(params, extra_args):
  if params is None:
    raise ValueError(
      'A sharpness-aware transformation perturbs the parameters and needs them:'
      ' `tx.update(grads, state, params, grad_fn=grad_fn)`, or, if it is to take both'
      ' gradients, `tx.update(None, state, params, value_and_grad_fn=f)`.'
    )
  _checks.check_unmasked(params)
  _checks.check_arrays(params)
  if reserved := sorted({'rho', 'space', 'grads'} & set(extra_args)):
    raise ValueError(
      f'`update` was given {reserved[0]!r}, an argument that a metric gets from the'
      ' transformation itself. Give the radius when you make the method, as a schedule'
      ' if it changes: `msam(rho=schedule)`; and other arguments another name.'
    )


def _check_gradients(grads, params, extra_args):
  if jax.tree.leaves(params) and not jax.tree.leaves(grads, is_leaf=_is_none):
    raise ValueError(
      f'`update` was given no gradients, but an empty {type(grads).__name__}. To have'
      ' it take both gradients, give None: `tx.update(None, state, params,'
      ' value_and_grad_fn=f)`. An nnx.Optimizer makes this of None, and what a pass'
      ' changes about a model (BatchNorm statistics, random counters) would be lost:'
      ' give it the gradients of `flax_nnx.value_and_grad(..., compile_once=True)`.'
    )
  what = 'The gradients given to `update` must be like the params'
  expected = _masks.leave_out(params, _masks.has_leaf(grads, params))
  _checks.check_like(
    grads, expected, what=_checks.gradient_hint(grads, params) + what, dtypes=False
  )
  _checks.check_first(grads, extra_args.get('grad'))


def _rise(value, probe_value):
  if value is None or probe_value is None:
    return None
  if jnp.shape(value):
    raise ValueError(
      '`value`, the loss at the params, must be a scalar, got shape'
      f' {jnp.shape(value)}.'
    )
  return _numerics.widen(probe_value, like=(value, probe_value)) - _numerics.widen(
    value, like=(value, probe_value)
  )


def _scalars(probes, value, state, average):
  """What is recorded of a step, in the types that the state has; zero for None."""
  recorded = {
    'slope': probes.slope,
    'radius': probes.radius,
    'loss': value,
    'probe_value': probes.value,
    'rise': _rise(value, probes.value),
  }

  def record(name, new):
    old = getattr(state, name)
    if new is None:
      return jnp.zeros_like(old)
    # As the state does, so that both branches of a step that may be skipped agree.
    new = jnp.asarray(average(new), old.dtype)
    axes = _devices.varying_axes(old) - _devices.varying_axes(new)
    return _devices.as_varying(new, axes)

  return {name: record(name, new) for name, new in recorded.items()}
