"""Sharpness-aware training with one gradient per step.

The gradient of the last step, or the mean of the last ones, is a good guess of where
uphill is. So the training loop keeps the *probe* ``p = w + δ`` instead of the clean
parameters ``w``: the one gradient that it takes is the one at the probe. A wrapper of
the optimizer does the rest. With the perturbation ``δ`` of this step and ``δ'`` of the
next it returns

    update = (w' + δ') − (w + δ) = (w' − w) − δ + δ',      w' − w: the optimizer's step.

What the sum on the right needs is small and stored: ``δ`` as it was applied, or the
scalar by which the optimizer's momentum gives it. So the parameters are rounded once a
step, when the update is added to them, as in plain training.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import _checks
from msam_optax import _devices
from msam_optax import _hyperparameters
from msam_optax import _masks
from msam_optax import _momentum
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import spaces
from msam_optax.monge import monge


class LaggedState(NamedTuple):
  """State of :func:`lagged`.

  Attributes:
    count: int32 scalar, the steps so far.
    perturbation: ``δ`` as it was applied, in the dtypes of the params, with an
      ``optax.MaskedNode`` for leaves that are not perturbed; zero before the first
      step. None if ``clean_dtype`` is given.
    clean: the clean parameters in ``clean_dtype``; None if it is not given.
    metric_state: the metric's state, of the leaves that are perturbed.
    base_state: the base optimizer's state.
  """

  count: Any
  perturbation: Any
  clean: Any
  metric_state: Any
  base_state: Any


class MomentumSAMState(NamedTuple):
  """State of :func:`momentum_sam`.

  Attributes:
    count: int32 scalar, the steps so far.
    scale: scalar, float32 or wider: the perturbation as it was applied is ``-scale``
      times the momentum in ``base_state``; zero before the first step.
    perturbed: which leaves are perturbed, without arrays: an ``optax.EmptyState`` for
      all of them, or a tree like the params with one for each that is, and an
      ``optax.MaskedNode`` for each that is not.
    clean: the clean parameters in ``clean_dtype``; None if it is not given.
    base_state: the base optimizer's state.
  """

  count: Any
  scale: jax.Array
  perturbed: Any
  clean: Any
  base_state: Any


def lagged(
  base_optimizer: optax.GradientTransformation,
  metric: metrics.Metric = monge(),
  rho: _hyperparameters.Hyperparameter = 0.05,
  *,
  mask: Any = None,
  param_specs: Any = None,
  clean_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Sharpness-aware training along the last gradient: one gradient per step.

  The probe of a step is taken along the gradient at the probe before, ``h``:

      δ′ = ρ · direction(h),   h = ∇ℓ(w + δ)   (δ = 0 in the first step),

  where the direction is that of the metric: ``h/‖h‖`` for ``euclidean()``, which is
  single-step SAM, and ``h/(‖h‖√(1 + α²‖h‖²))`` for ``monge(alpha)``. The base optimizer
  gets ``h`` and the clean parameters ``w``; its weight decay is one of ``w``.

  **The parameters of the training loop are the probe**, and so is the loss that it
  reports. Evaluate at ``eval_params(opt_state, params)``. It wraps the whole optimizer,
  and nothing comes behind it that changes the update::

      tx = lagged(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
      grads = jax.grad(loss)(params, batch)         # the only gradient
      updates, state = tx.update(grads, state, params)

  It needs one copy of the parameters. Use it where a second gradient is too expensive
  and the batches of consecutive steps have similar gradients; :func:`momentum_sam`
  needs no copy, and averages the noise of small batches.

  Args:
    base_optimizer: any Optax optimizer, with everything that makes the step.
    metric: how the length of a perturbation is measured, e.g. ``monge()`` or
      ``euclidean()``. It sees the gradient at the probe and the new clean parameters.
    rho: ``ρ``, the radius, scalar >= 0: a number, an array or an Optax schedule,
      counted in calls of ``update``. It may change from step to step: the perturbation
      that was applied is stored.
    mask: which leaves are perturbed, in Optax's convention: a tree of bools like the
      params (or a prefix of it), or a function from params to one. By default all; they
      must be real floating point.
    param_specs: how the params are sharded inside ``shard_map``, see
      :func:`sharpness_aware`.
    clean_dtype: floating dtype in which the clean parameters are kept, in place of the
      perturbation, and given to the base optimizer, as are the gradients. Give
      ``'float32'`` for bfloat16 parameters, which round small steps and perturbations
      away. The copy alone counts then: other changes of the params are lost.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` whose state is a
    :class:`LaggedState`. Its extra arguments reach the metric and the base optimizer.

  Raises:
    TypeError: if an argument is of a wrong type.
    ValueError: if ``rho`` is negative or not finite.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import euclidean, eval_params, lagged
    >>> loss = lambda w: jnp.sum(w**2) / 2
    >>> tx = lagged(optax.sgd(0.5), euclidean(), rho=0.1)
    >>> params = jnp.array([0.6, 0.8])
    >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(params, eval_params(state, params))
    [0.36 0.48] [0.3 0.4]

  References:
    Ji et al., `A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve
    Efficient and Accurate Sparse Training
    <https://openreview.net/forum?id=MJgMMqMDu4>`_, 2024
  """
  metrics.check_metric('metric', metric)
  _hyperparameters.check_hyperparameter('rho', rho)
  _checks.check_optimizer(base_optimizer, 'lagged(optax.adamw(1e-3))')
  _checks.check_dtype('clean_dtype', clean_dtype)
  base = optax.with_extra_args_support(base_optimizer)

  def init(params):
    _checks.check_arrays(params)
    clean = _copy(params, clean_dtype)
    w = params if clean is None else clean
    moved = _restricted(w, mask)
    return LaggedState(
      count=jnp.zeros([], jnp.int32),
      perturbation=_numerics.zeros_like(moved) if clean is None else None,
      clean=clean,
      metric_state=metric.init(moved),
      base_state=base.init(w),
    )

  def update(updates, state, params=None, **extra_args):
    perturbed = _check_inputs('lagged', updates, params, mask, param_specs)
    w = _without(params, state.perturbation) if state.clean is None else state.clean
    grads = _cast(updates, clean_dtype)
    step, base_state = base.update(grads, state.base_state, w, **extra_args)
    new = optax.apply_updates(w, step)

    rho_now = _hyperparameters.value_at('rho', rho, state.count)
    space = spaces.over(None, param_specs)
    ascent, metric_state = metrics.ascend_on(
      perturbed,
      metric,
      grads,
      state.metric_state,
      new,
      {**extra_args, 'space': space, 'rho': rho_now},
    )
    perturbation = jax.tree.map(
      lambda d, w: (_numerics.widen(rho_now, like=w) * d).astype(w.dtype),
      jax.tree.map(_numerics.widen, ascent.direction),
      _masks.restrict(new, perturbed),
    )
    if state.clean is None:
      step = _moved(step, state.perturbation, perturbation)
      clean = None
    else:
      step = _difference(_with(new, perturbation), params)
      perturbation, clean = None, new
    count = optax.safe_increment(state.count)
    return step, LaggedState(count, perturbation, clean, metric_state, base_state)

  return optax.GradientTransformationExtraArgs(init, update)


def momentum_sam(
  base_optimizer: optax.GradientTransformation,
  rho: _hyperparameters.Hyperparameter = 1.0,
  alpha: _hyperparameters.Hyperparameter = 0.0,
  *,
  momentum: str | None = None,
  mask: Any = None,
  param_specs: Any = None,
  clean_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum-SAM: the probe is along the optimizer's own momentum, at no extra cost.

  With the momentum ``v`` of the base optimizer, the mean of past gradients that SGD and
  Adam keep anyway, the next gradient is taken at

      w − ρ v/(‖v‖ √(1 + α²‖v‖²)),

  which is ``w − ρ v/‖v‖`` for ``α = 0``, as in the paper. That is *downhill*, along the
  step to come, as Nesterov's gradient is. For Adam, ``v`` is the first moment as it is
  stored. It takes one gradient per step, and two scalars beside the base optimizer's
  state. The base optimizer gets the gradient at the probe and the clean
  parameters ``w``; its weight decay is one of ``w``. (The paper's SGD decays the
  probe: put ``optax.add_decayed_weights`` before this wrapper in a chain.)

  **The parameters of the training loop are the probe**, and so is the loss that it
  reports. Evaluate at ``eval_params(opt_state, params)``. It wraps the whole optimizer,
  and nothing comes behind it that changes the update::

      tx = momentum_sam(optax.adamw(1e-3), rho=1.0)
      grads = jax.grad(loss)(params, batch)         # the only gradient
      updates, state = tx.update(grads, state, params)

  Radii are larger than SAM's: the authors' code has 3 for SGD on CIFAR, 0.3 for SGD on
  ImageNet and 1 for AdamW, the default here.
  ``trace`` of SGD is a sum, not a mean: it is about ``1/(1 − decay)`` times a gradient,
  so give ``(1 − decay)`` times the ``alpha`` of :func:`monge`.

  Args:
    base_optimizer: an Optax optimizer that keeps a momentum, with everything that makes
      the step. Where ``optax.partition`` or ``optax.masked`` gives leaves to several
      optimizers, each leaf moves along its own, and those without do not move.
    rho: ``ρ``, the radius, scalar >= 0: a number, an array or an Optax schedule,
      counted in calls of ``update``. It may change from step to step: the scale that
      was applied is stored.
    alpha: ``α``, scalar >= 0, likewise; 0 is the paper.
    momentum: the name of the field in the base optimizer's state that holds ``v``, by
      default ``trace`` (SGD) or ``mu`` (the Adam family, Lion, Muon).
    mask: which leaves are perturbed, in Optax's convention, see :func:`lagged`.
    param_specs: how the params are sharded inside ``shard_map``, see
      :func:`sharpness_aware`.
    clean_dtype: floating dtype of a copy of the clean parameters, see :func:`lagged`.
      By default there is none.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` whose state is a
    :class:`MomentumSAMState`. Its extra arguments reach the base optimizer.

  Raises:
    TypeError: if an argument is of a wrong type.
    ValueError: if ``rho`` or ``alpha`` is negative or not finite. ``init`` raises one
      if the base optimizer keeps no momentum, or several for one leaf, or one of steps
      and not of gradients, as ``optax.rmsprop(momentum=…)`` and ``optax.lars`` do.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import eval_params, momentum_sam
    >>> loss = lambda w: jnp.sum(w**2) / 2
    >>> tx = momentum_sam(optax.sgd(0.5, momentum=0.9), rho=0.1)
    >>> params = jnp.array([0.6, 0.8])
    >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(params, eval_params(state, params))
    [0.24 0.32] [0.3 0.4]

  References:
    Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational
    Overhead <https://arxiv.org/abs/2401.12033>`_, 2024
  """
  _hyperparameters.check_hyperparameter('rho', rho)
  _hyperparameters.check_hyperparameter('alpha', alpha)
  _checks.check_optimizer(base_optimizer, 'momentum_sam(optax.adamw(1e-3))')
  _momentum.check_name(momentum)
  _checks.check_dtype('clean_dtype', clean_dtype)
  base = optax.with_extra_args_support(base_optimizer)

  def init(params):
    _checks.check_arrays(params)
    clean = _copy(params, clean_dtype)
    w = params if clean is None else clean
    moved = _restricted(w, mask)
    base_state = base.init(w)
    if jax.tree.leaves(moved):  # None in what optax.tree.map_params gives.
      _momentum.find(base_state, w, momentum)
      _momentum.check_is_of_gradients(base, w, momentum)
    return MomentumSAMState(
      count=jnp.zeros([], jnp.int32),
      scale=jnp.zeros([], _numerics.wide_dtype(w)),
      perturbed=_marks(moved),
      clean=clean,
      base_state=base_state,
    )

  def update(updates, state, params=None, **extra_args):
    _check_inputs('momentum_sam', updates, params, mask, param_specs)
    if state.clean is None:
      before = _along(_momentum_of(state, params, momentum), state.scale)
      w = _without(params, before)
    else:
      before, w = None, state.clean
    grads = _cast(updates, clean_dtype)
    step, base_state = base.update(grads, state.base_state, w, **extra_args)

    v = _momentum_of(state._replace(base_state=base_state), params, momentum)
    _, norm = spaces.over(None, param_specs).normalize(v)
    scale = _scale_of(
      norm.astype(state.scale.dtype),
      _hyperparameters.value_at('rho', rho, state.count),
      _hyperparameters.value_at('alpha', alpha, state.count),
    )
    after = _along(v, scale)
    if state.clean is None:
      step, clean = _moved(step, before, after), None
    else:
      clean = optax.apply_updates(w, step)
      step = _difference(_with(clean, after), params)
    count = optax.safe_increment(state.count)
    return step, MomentumSAMState(count, scale, state.perturbed, clean, base_state)

  return optax.GradientTransformationExtraArgs(init, update)


def eval_params(opt_state: Any, params: Any, *, momentum: str | None = None) -> Any:
  """The clean parameters ``w`` of :func:`lagged` and :func:`momentum_sam`.

  The parameters of the training loop are ``w + δ``, where the next gradient is taken.
  Evaluate, average and export ``w``; continue the training with ``w + δ``. BatchNorm
  has statistics of the probe as well: see
  :func:`msam_optax.flax_linen.reestimate_batch_stats` and
  :func:`msam_optax.flax_nnx.reestimate_batch_stats`.

  Args:
    opt_state: the state, that of the wrapper or any in which it is, as in
      ``optax.MultiSteps`` or ``optax.inject_hyperparams``.
    params: the parameters of the training loop that belong to it.
    momentum: what :func:`momentum_sam` was given, if anything.

  Returns:
    A pytree like ``params``, in their dtypes. (With ``clean_dtype``,
    ``optax.tree.get(opt_state, 'clean')`` has all digits.)

  Raises:
    ValueError: if there is no state of these methods, or it is not one of ``params``.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from msam_optax import eval_params, momentum_sam
    >>> tx, params = momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5), jnp.zeros(2)
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(params, eval_params(state, params))
    [-0.6 -0.8] [-0.3 -0.4]
  """
  kinds = (LaggedState, MomentumSAMState)
  is_ours = lambda x: isinstance(x, kinds)
  states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]
  if not states:
    raise ValueError(
      'eval_params found no state of `lagged` or `momentum_sam` in what it was given as'
      ' `opt_state`. The parameters of all other methods are the clean ones already.'
    )
  for state in states:  # Several in optax.partition, each of its own leaves.
    params = _clean(state, params, momentum)
  return params


def _clean(state, params, momentum):
  if state.clean is not None:
    return jax.tree.map(
      lambda w, p: p if _momentum.is_masked(w) else w.astype(jnp.result_type(p)),
      _momentum.aligned(state.clean, params),
      params,
      is_leaf=_momentum.is_masked,
    )
  if isinstance(state, LaggedState):
    return _without(params, _momentum.aligned(state.perturbation, params))
  if jnp.ndim(state.scale):  # It would be broadcast along other axes.
    raise ValueError(
      'The state given to eval_params is one of several models or devices, stacked'
      f' along {jnp.ndim(state.scale)} axis: map over it,'
      ' `jax.vmap(eval_params)(opt_state, params)`.'
    )
  v = _momentum_of(state, params, momentum)
  return _without(params, _along(v, state.scale))


def _marks(moved):
  """Where leaves are perturbed, as structure alone, of the tree of these leaves."""
  if not jax.tree.leaves(moved):  # What optax.tree.map_params gives.
    return moved
  if not any(
    map(_momentum.is_masked, jax.tree.leaves(moved, is_leaf=_momentum.is_masked))
  ):
    return optax.EmptyState()
  return jax.tree.map(
    lambda x: x if _momentum.is_masked(x) else optax.EmptyState(),
    moved,
    is_leaf=_momentum.is_masked,
  )


def _momentum_of(state, params, name):
  """The momentum of the leaves that are perturbed."""
  hide = lambda tree: jax.tree.map(lambda _: optax.MaskedNode(), tree)
  return jax.tree.map(
    lambda mark, tree: hide(tree) if _momentum.is_masked(mark) else tree,
    state.perturbed,
    _momentum.find(state.base_state, params, name),
    is_leaf=lambda x: isinstance(x, (optax.MaskedNode, optax.EmptyState)),
  )


def _scale_of(norm, rho, alpha):
  """``ρ/(‖v‖√(1 + α²‖v‖²))``, and 0 where no finite number takes ``v`` to length ρ."""
  rho, alpha = (_numerics.widen(x, like=norm) for x in (rho, alpha))
  length = rho * _numerics.inverse_hypot(alpha * norm)
  largest = jnp.finfo(norm.dtype).max
  usable = (norm > length / largest) | jnp.isnan(length)
  return jnp.where(usable, length / jnp.where(norm > 0, norm, 1.0), 0.0)


def _along(v, scale):
  """``−scale · v`` in float32 or wider; zero, not NaN, for a scale of zero."""
  return jax.tree.map(
    lambda x: jnp.where(
      scale == 0, 0.0, -_numerics.widen(scale, like=x) * _numerics.widen(x)
    ),
    v,
  )


def _with(params, delta):
  """``params + δ``, in the dtypes of the params."""
  return _combine(lambda p, d: p + d, params, delta)


def _without(params, delta):
  """``params − δ``, in the dtypes of the params."""
  return _combine(lambda p, d: p - d, params, delta)


def _combine(function, params, delta):
  def of_leaf(d, p):
    if _momentum.is_masked(d):
      return p
    p = jnp.asarray(p)
    return function(_numerics.widen(p), _numerics.widen(d, like=p)).astype(p.dtype)

  return jax.tree.map(of_leaf, delta, params, is_leaf=_momentum.is_masked)


def _moved(step, before, after):
  """``step − δ + δ'``, in the dtypes of the step."""

  def of_leaf(old, new, u):
    if _momentum.is_masked(old):
      return u
    change = _numerics.widen(new, like=u) - _numerics.widen(old, like=u)
    return (_numerics.widen(u) + change).astype(jnp.result_type(u))

  return jax.tree.map(of_leaf, before, after, step, is_leaf=_momentum.is_masked)


def _difference(target, params):
  """The update that makes of ``params`` the target, rounded to their dtypes."""

  def of_leaf(q, p):
    q = q.astype(jnp.result_type(p))
    if not jnp.issubdtype(q.dtype, jnp.floating):
      return q - p
    return (_numerics.widen(q) - _numerics.widen(p)).astype(q.dtype)

  return jax.tree.map(of_leaf, target, params)


def _copy(params, dtype):
  """A copy in a dtype, so that both may be donated; None for None."""
  if dtype is None:
    return None
  return jax.tree.map(lambda p: jnp.array(p, copy=True), _cast(params, dtype))


def _cast(tree, dtype):
  """A tree with its real floating-point leaves in a dtype, if there is one."""
  if dtype is None:
    return tree
  is_real = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
  return jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_real(x) else x, tree)


def _restricted(params, mask):
  """The leaves that are perturbed, checked."""
  if not jax.tree.leaves(params):  # What optax.tree.map_params gives.
    return params
  perturbed = _masks.perturbed(mask, params)
  _checks.check_any(perturbed)
  _checks.check_params(params, perturbed)
  return _masks.restrict(params, perturbed)


def _check_inputs(name, grads, params, mask, param_specs):
  """Raises unless an update can be made; returns which leaves are perturbed."""
  if params is None:
    raise ValueError(f'{name} needs the parameters: `tx.update(grads, state, params)`.')
  if grads is None:
    raise ValueError(
      f'{name} has one gradient per step, the one at the parameters of the training'
      ' loop, and does not take it itself: `loss, grads ='
      ' jax.value_and_grad(loss_fn)(params, batch)`, then `tx.update(grads, state,'
      ' params)`.'
    )
  _checks.check_arrays(params)
  what = 'The gradients given to `update` must be like the params'
  _checks.check_like(grads, params, what=what, dtypes=False)
  perturbed = _masks.perturbed(mask, params)
  _devices.check_sharded(grads, param_specs, perturbed)
  return perturbed
