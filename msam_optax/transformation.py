"""The two-pass method as an Optax transformation."""

import functools
import operator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax.checks import check_admits
from msam_optax.checks import check_arrays
from msam_optax.checks import check_averaged
from msam_optax.checks import check_axes
from msam_optax.checks import check_axis_name
from msam_optax.checks import check_first
from msam_optax.checks import check_like
from msam_optax.checks import check_params
from msam_optax.checks import check_probe
from msam_optax.checks import check_sharded
from msam_optax.checks import check_unmasked
from msam_optax.checks import check_varying
from msam_optax.checks import pair_hint
from msam_optax.evaluation import evaluation
from msam_optax.hyperparameters import check_hyperparameter
from msam_optax.hyperparameters import Hyperparameter
from msam_optax.hyperparameters import value_at
from msam_optax.masks import admitted
from msam_optax.masks import fill
from msam_optax.masks import has_leaf
from msam_optax.masks import leave_out
from msam_optax.masks import resolve_mask
from msam_optax.metrics import check_metric
from msam_optax.metrics import Metric
from msam_optax.numerics import wide_dtype
from msam_optax.numerics import widen
from msam_optax.perturbation import ascend
from msam_optax.perturbation import distance
from msam_optax.perturbation import expected_size
from msam_optax.perturbation import magnitudes_of
from msam_optax.perturbation import perturb
from msam_optax.perturbation import settle
from msam_optax.reductions import all_finite
from msam_optax.reductions import mean


class SharpnessAwareState(NamedTuple):
  """State of :func:`sharpness_aware`; all but ``metric_state`` are scalars.

  Read it with ``optax.tree.get(opt_state, 'slope')``. The floats are float32, or
  float64 if a parameter is; zero before the first step, and where not recorded.

  Attributes:
    count: int32, the steps so far: calls of ``update``.
    slope: the metric's slope ``√(gᵀG⁻¹g)``, so ``ρ · slope`` is the predicted rise.
    radius: ``‖δ‖₂`` as really used, after mask, schedule and rounding: zero in
      bfloat16 says that the perturbation was lost.
    probe_value: ``ℓ(w+δ)``; recorded if ``value_and_grad_fn`` is given.
    rise: ``ℓ(w+δ) − ℓ(w)``; recorded if ``value_and_grad_fn`` and ``value`` are. If it
      is negative at a small radius, what came into ``update`` was no gradient.
    finite: bool, whether the update is finite, so the gradient at the params and the
      one at the probe; True before the first step. (Inside ``optax.MultiSteps`` it is
      that of the last step that was taken: put the method before it in a chain.)
    metric_state: the metric's own state.
  """

  count: Any
  slope: jax.Array
  radius: jax.Array
  probe_value: jax.Array
  rise: jax.Array
  finite: jax.Array
  metric_state: Any


def sharpness_aware(
  metric: Metric,
  rho: Hyperparameter,
  *,
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Replaces the gradient by the gradient at the worst point nearby.

  ``update`` takes the gradient ``g`` at the parameters ``w``, goes uphill to the
  probe ``w + δ``, ``δ = ρ G⁻¹g/√(gᵀG⁻¹g)``, and returns the gradient there, to be
  chained with any optimizer::

    tx = optax.chain(sharpness_aware(monge(), rho=0.05), optax.adam(1e-3))
    grad_fn = lambda params: jax.grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)

  ``update`` needs ``params`` and one of the keyword arguments ``grad_fn(params) ->
  grads`` and ``value_and_grad_fn(params) -> (value, grads)``; the latter also
  records the loss at the probe and, if ``value=`` (the loss at ``w``) is given,
  its rise. Other extra arguments are left to others in the chain.

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
  covers both. Leaves whose
  gradient is None are not moved. The collection in which Flax keeps its FP8 scaling
  factors is not moved either, and gets the new values of the clean pass.

  Args:
    metric: what uphill means, e.g. ``monge()`` or ``euclidean()``.
    rho: ``ρ``, the radius, scalar >= 0: a number, an array, or an Optax schedule,
      counted in calls of ``update``.
    mask: which leaves are moved and are part of the norm, in Optax's convention: a
      tree of bools like the params (or a prefix of it), or a function from params
      to one. By default all; they must be real floating point.
    axis_name: the mapped axis (of ``pmap``, ``vmap`` or ``shard_map``) over which the
      gradient at the probe is averaged, and so are the scalars in the state. The
      params must be replicated over it; under ``jit`` with sharded arrays, which may
      be sharded in any way, nothing is to be named.
    sync_ascent: whether to average the gradient for the ascent over ``axis_name``,
      too. By default each replica goes uphill on its own (m-sharpness).
    param_specs: how the params are sharded inside ``shard_map``: the tree of
      ``PartitionSpec`` (or a prefix of it) that it has as ``in_specs`` for them.
      The norm is then that of the whole, summed over the axes that they name. By
      default each device has all of every leaf.
    perturbation_dtype: floating dtype in which ascent and probe are computed and
      ``grad_fn`` is called, by default that of the params. bfloat16 parameters
      round small perturbations away: take ``jnp.float32`` and let the model cast.

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
  check_metric('metric', metric)
  check_hyperparameter('rho', rho)
  check_axis_name(axis_name)
  if sync_ascent and axis_name is None:
    raise ValueError(
      '`sync_ascent=True` averages the ascent gradient over a mapped axis: name'
      ' it, as in `axis_name="batch"`.'
    )
  _check_dtype(perturbation_dtype)

  average = functools.partial(mean, axis_name=axis_name)

  def init(params):
    params = _fast(params)
    check_unmasked(params)
    check_arrays(params)
    # optax.tree.map_params calls with a stand-in without leaves.
    if jax.tree.leaves(params):
      moved = admitted(mask, params)
      check_admits(moved)
      check_params(params, moved)
    # Four arrays, not four times one: a donated buffer may be given only once.
    zeros = [jnp.zeros([], wide_dtype(params)) for _ in range(4)]
    return SharpnessAwareState(
      jnp.zeros([], jnp.int32),
      *zeros,
      finite=jnp.ones([], bool),
      metric_state=metric.init(params),
    )

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
    evaluate = evaluation(grad_fn, value_and_grad_fn, extra_args)
    params = _fast(params)
    _check_inputs(updates, params, extra_args)
    present = has_leaf(updates, params)
    updates = fill(updates, present, params)
    moved = jax.tree.map(operator.and_, admitted(mask, params), present)
    check_admits(moved)
    check_axes(params, param_specs, axis_name)
    check_averaged(params, axis_name)
    check_varying(updates, axis_name)
    check_sharded(updates, param_specs, moved)
    w = _cast(params, perturbation_dtype, moved)
    g = _cast(updates, perturbation_dtype, moved)
    ascent, metric_state = ascend(
      metric,
      average(g) if sync_ascent else g,
      state.metric_state,
      w,
      mask=moved,
      param_specs=param_specs,
    )
    radius_now = value_at('rho', rho, state.count)
    probe = perturb(w, ascent, radius_now, mask=moved)
    check_probe(probe, params, updates)
    probe_value, probe_grads = evaluate(
      probe, leave_out(g, present), dtypes=perturbation_dtype is None
    )
    probe_grads = fill(probe_grads, present, params)
    magnitudes = magnitudes_of(updates, param_specs)
    size = expected_size(radius_now, ascent, magnitudes, moved)
    radius = distance(probe, w, size, mask=moved, param_specs=param_specs)
    new_updates = settle(probe_grads, updates, magnitudes, radius, average)
    scalars = {
      'slope': ascent.slope,
      'radius': radius,
      'probe_value': probe_value,
      'rise': _rise(value, probe_value),
    }
    new_state = SharpnessAwareState(
      count=optax.safe_increment(state.count),
      finite=all_finite(new_updates, param_specs),
      metric_state=metric_state,
      **{
        name: _record(average(new), like=getattr(state, name))
        for name, new in scalars.items()
      },
    )
    return leave_out(new_updates, present), new_state

  return optax.GradientTransformationExtraArgs(init, update)


def normalize_by(
  metric: Metric, *, param_specs: Any = None
) -> optax.GradientTransformation:
  """The ascent direction ``G⁻¹g/√(gᵀG⁻¹g)`` as a plain transformation.

  It makes every metric an adversary for Optax's own SAM wrapper. This is Monge
  SAM::

    optax.contrib.sam(
        optimizer, optax.chain(normalize_by(monge()), optax.sgd(rho)),
        opaque_mode=True)

  Args:
    metric: the metric ``G``.
    param_specs: the params' ``PartitionSpec``s, if sharded inside ``shard_map``, see
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
  check_metric('metric', metric)

  def init(params):
    return metric.init(params)

  def update(updates, state, params=None):
    check_sharded(updates, param_specs, resolve_mask(None, updates))
    ascent, state = ascend(
      metric,
      updates,
      state,
      params,
      mask=admitted(None, updates),
      param_specs=param_specs,
    )
    return ascent.direction, state

  return optax.GradientTransformation(init, update)


def _fast(params):
  """The parameters that gradients are taken at, where optax.lookahead has two sets."""
  return params.fast if isinstance(params, optax.LookaheadParams) else params


def _check_inputs(grads, params, extra_args):
  if params is None:
    raise ValueError(
      'A sharpness-aware transformation perturbs the parameters and needs them:'
      ' `tx.update(grads, state, params, grad_fn=grad_fn)`.'
    )
  check_unmasked(params)
  check_arrays(params)
  what = 'The gradients given to `update` must be like the params'
  expected = leave_out(params, has_leaf(grads, params))
  check_like(grads, expected, what=pair_hint(grads, params) + what, dtypes=False)
  check_first(grads, extra_args.get('grad'))


def _check_dtype(dtype):
  if isinstance(dtype, jax.Array):
    raise TypeError(
      '`perturbation_dtype` was given as an array. Under optax.inject_hyperparams name'
      " it in `static_args`, or write it as a string, 'float32'."
    )
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f'`perturbation_dtype` must be a floating dtype, got {dtype}.')


def _cast(tree, dtype, admitted):
  if dtype is None:
    return tree
  return jax.tree.map(
    lambda cast, x: jnp.asarray(x, dtype) if cast else x, admitted, tree
  )


def _rise(value, probe_value):
  if value is None or probe_value is None:
    return None
  if jnp.shape(value):
    raise ValueError(
      '`value`, the loss at the params, must be a scalar, got shape'
      f' {jnp.shape(value)}.'
    )
  return widen(probe_value, like=(value, probe_value)) - widen(
    value, like=(value, probe_value)
  )


def _record(new, *, like):
  """``new`` as an array of the type that the state has; zero for None."""
  return jnp.zeros_like(like) if new is None else jnp.asarray(new, like.dtype)
