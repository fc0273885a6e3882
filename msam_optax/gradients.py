"""The two-pass method as a drop-in replacement for ``jax.value_and_grad``."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from msam_optax import _checks
from msam_optax import _devices
from msam_optax import _hyperparameters
from msam_optax import _loops
from msam_optax import _losses
from msam_optax import _masks
from msam_optax import _microbatches
from msam_optax import _numerics
from msam_optax import _passes
from msam_optax import combinations
from msam_optax import metrics
from msam_optax import perturbation
from msam_optax import spaces
from msam_optax import transformation
from msam_optax.monge import monge


def value_and_grad(
  loss_fn: Callable[..., Any],
  metric: metrics.Metric = monge(),
  rho: float | jax.Array = 0.05,
  combination: combinations.Combination = combinations.probe_gradient(),
  *,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  has_weight: bool = False,
  mask: Any = None,
  axis_name: Any = None,
  shards: int | None = None,
  data_argnums: int | Sequence[int] | None = None,
  data_argnames: str | Sequence[str] = (),
  vectorize_shards: bool = False,
  ascent_fraction: float = 1.0,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
  loss_scale: float | jax.Array | None = None,
  compile_once: bool = False,
) -> Callable[..., tuple[Any, Any]]:
  """A drop-in replacement for ``jax.value_and_grad``, with a sharpness-aware gradient.

  The value (and the auxiliary output) are those at the parameters ``w``, the
  gradient is the one at the probe ``w + δ``, ``δ = ρ G⁻¹g/√(gᵀG⁻¹g)``, or what another
  ``combination`` makes of the two. Nothing else in a training loop changes, so this
  works under every Optax wrapper and in every trainer; :func:`sharpness_aware` is the
  same as an Optax transformation, with schedules and with scalars to log.

  The batch may be divided: over the devices of a mapped axis (``axis_name``), into
  micro-batches on each of them (``shards``), or both. By default each micro-batch
  perturbs along its own gradient, and the gradients at their probes are averaged:
  m-sharpness, with ``m`` the number of micro-batches. With ``sync_ascent`` all perturb
  along the average of their gradients, which gives the same as the whole batch at once.

  A mean over tokens or other examples of which micro-batches have different numbers
  needs ``has_weight``: then ``loss_fn`` returns the sum over its examples and their
  number, and every mean is one over examples, not over micro-batches.

  Args:
    loss_fn: function to differentiate; returns a scalar, see ``has_aux`` and
      ``has_weight``. Both passes call it with the same arguments, so also with the
      same random keys.
    metric: how the length of a perturbation is measured; one without state, e.g.
      ``monge(alpha=1.0)``.
    rho: ``ρ``, the radius, scalar >= 0, a number or an array. For a schedule, make
      the function inside the training step and give ``rho=schedule(step)``.
    combination: what is made of the gradients, see :func:`sharpness_aware`; one without
      state and with a probe in every step, e.g. ``surrogate_gap(0.6)``.
    argnums: positional argument, or arguments, that hold the parameters; negative
      numbers count from the back. Leaves that JAX cannot differentiate, as integers
      and functions, belong in another argument.
    has_aux: whether ``loss_fn`` returns ``(loss, aux)``; with ``shards`` or
      ``compile_once`` the latter holds arrays only.
    has_weight: whether the loss is ``(total, weight)``, two scalars: the sum over
      examples, and their number or summed weight, integer or real, which may not
      depend on the parameters. The loss is ``total / weight``, each summed over all
      micro-batches and, with ``axis_name``, over all devices. A micro-batch of weight
      zero adds nothing. Value float32 or wider.
    mask: which leaves of the parameters are perturbed, see :func:`sharpness_aware`.
      With several ``argnums`` it is for the tuple of these arguments.
    axis_name: the mapped axis over which the gradient at the probe is averaged. The
      value (without ``has_weight``) and the auxiliary output are those of each
      device. In the chain, ``loss = total / jax.lax.pmean(weight, axis_name)`` has the
      same mean over examples.
    shards: number of micro-batches, >= 1. Row ``i`` of the batch is in micro-batch
      ``i % shards``, as in ``optax.microbatching``, so that a batch that ``jit`` has
      sharded over devices stays where it is. Without ``has_weight`` the ``loss_fn``
      must return the mean over its batch, and the value is the mean of theirs; the
      auxiliary output is stacked, ``[shards, ...]``.
    data_argnums: positional argument, or arguments, that hold the batch: ``shards``
      cuts every array with axes in them along its first axis, whose length is the same
      in all and a multiple of ``shards``. All else goes whole to each micro-batch:
      class weights, model state, random keys. By default the batch is the one argument
      besides the parameters that holds arrays with axes.
    data_argnames: keyword argument, or arguments, that hold the batch.
    vectorize_shards: whether to compute all micro-batches at once (``vmap``; as fast
      as the whole batch, with a probe and a gradient in memory for each) instead of
      one after the other (``scan``; the memory of one).
    ascent_fraction: the part of the batch, of each micro-batch if it is divided, whose
      gradient is the one of the ascent: ``1/k`` for a whole number ``k``. It is the
      rows 0, ``k``, ``2k`` …, so that each device has its share, and a step costs
      ``1 + 1/k`` gradients. Value and auxiliary output are those of this part; what
      holds the batch is found or named as for ``shards``. In the chain, give ``update``
      the gradient of a part, and the ``grad_fn`` of the whole.
    sync_ascent: whether to average the gradient for the ascent as well.
    param_specs: how the parameters are sharded inside ``shard_map``, see
      :func:`sharpness_aware`.
    perturbation_dtype: floating dtype in which ``loss_fn`` gets the probe, by
      default that of the parameters.
    loss_scale: for half precision, scalar > 0: the loss is multiplied by it before it
      is differentiated, and the gradient divided by it right after, in float32 or
      wider. So value, gradient, ``rho`` and ``alpha`` are those of the loss as it is.
      Where the scaled gradient overflows, in either pass, the result is not finite.
    compile_once: whether to run both passes as two iterations of one loop, so that
      the program holds one copy of the gradient: less to compile, less code, and no
      second copy for an automatic partitioner to shard worse. Meant for large models
      on accelerators; convolutions in a loop are many times slower on the CPU. The
      clean pass also gets the parameters in ``perturbation_dtype`` then.

  Returns:
    A function with the arguments of ``loss_fn`` that returns ``(value, grads)``, or
    ``((value, aux), grads)``; ``grads`` has the structure, shapes and dtypes of the
    parameters.

  Raises:
    TypeError: if ``loss_fn`` is no function, or returns what the arguments do not say;
      if ``metric`` is no metric, or a parameter not real floating point.
    ValueError: if ``rho`` is a schedule, negative or not finite, if the metric has a
      state, the mask does not fit, ``sync_ascent`` has nothing to average over, the
      batch cannot be cut into ``shards`` or by ``ascent_fraction``, or it is not clear
      which arguments hold it.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean, value_and_grad
    >>> loss = lambda w: jnp.sum(w**2)
    >>> value, grads = value_and_grad(loss, euclidean(), rho=0.5)(
    ...     jnp.array([0.6, 0.8]))
    >>> print(value, grads)
    1.0 [1.8 2.4]

    Four examples, in two micro-batches, each with its own probe:

    >>> loss = lambda w, x: jnp.mean((x - w) ** 2)
    >>> w, x = jnp.array(0.0), jnp.array([1.0, 1.0, 3.0, 3.0])
    >>> value, grads = value_and_grad(loss, euclidean(), rho=0.5, shards=2)(w, x)
    >>> print(value, grads)
    5.0 -5.0

    Of the examples one is padding, so the second micro-batch counts half as much:

    >>> def loss(w, x, is_real):
    ...   return jnp.sum((x - w) ** 2 * is_real), jnp.sum(is_real)
    >>> f = value_and_grad(
    ...     loss, euclidean(), rho=0.5, shards=2, data_argnums=(1, 2), has_weight=True)
    >>> value, grads = f(w, x, jnp.array([1.0, 0.0, 1.0, 1.0]))
    >>> print(f'{value:.4f} {grads:.4f}')
    6.3333 -5.6667

    Class weights, however many, go whole to each micro-batch:

    >>> def loss(w, class_weights, x, label):
    ...   return jnp.mean(class_weights[label] * (x - w) ** 2)
    >>> f = value_and_grad(
    ...     loss, euclidean(), rho=0.5, shards=2, data_argnums=(2, 3))
    >>> value, grads = f(w, jnp.array([1.0, 2.0]), x, jnp.array([0, 0, 1, 1]))
    >>> print(value, grads)
    9.5 -8.5

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  _check_loss_fn(loss_fn)
  _devices.check_axis_name(axis_name)
  _check_division(axis_name, shards, sync_ascent, vectorize_shards)
  parts = _parts(ascent_fraction, compile_once)
  _check_data(shards, parts, data_argnums, data_argnames)
  without_state(
    metric,
    rho,
    combination,
    mask=mask,
    param_specs=param_specs,
    perturbation_dtype=perturbation_dtype,
  )  # Raises early what it raises.
  _check_scale(loss_scale, perturbation_dtype)

  data = {
    'argnums': argnums,
    'data_argnums': data_argnums,
    'data_argnames': data_argnames,
  }
  in_microbatches = functools.partial(
    _microbatches.over_microbatches,
    shards=None if shards is None else int(shards),
    vectorize=vectorize_shards,
    **data,
  )
  clean = _loops.clean_pass(
    loss_fn, argnums, has_aux=has_aux, has_weight=has_weight, loss_scale=loss_scale
  )
  setting = _passes.Setting(
    metric, rho, combination, mask, param_specs, perturbation_dtype
  )
  is_mean = sync_ascent or (axis_name, shards) == (None, None)
  metric_space = spaces.over if is_mean else spaces.without_mean
  # Each micro-batch has its own passes, or all passes are of all micro-batches.
  inside = in_microbatches if sync_ascent else lambda one_pass: one_pass
  shared = {
    'setting': setting,
    'space': metric_space(param_specs=param_specs),
    'argnums': argnums,
    'axis_name': axis_name if sync_ascent else None,
  }
  if compile_once:
    wide = has_weight or loss_scale is not None
    gradients_of = _loops.in_one_loop(inside(clean), wide=wide, **shared)
  else:
    part = None if parts == 1 else _microbatches.on_part(clean, parts=parts, **data)
    ascent = None if part is None else inside(part)
    gradients_of = _loops.in_a_row(inside(clean), ascent=ascent, **shared)
  if not sync_ascent:
    gradients_of = in_microbatches(gradients_of, gradients=1 + len(combination.scales))

  @functools.wraps(loss_fn)
  def value_and_grad_fn(*args, **kwargs):
    _microbatches.positions('argnums', argnums, args, kwargs)
    params = _loops.select(args, argnums)
    _checks.check_differentiable(params)
    combination_state = _passes.init_combination(setting, params)
    _check_stateless(_passes.init_metric(setting, params), combination_state)
    _devices.check_axes(params, param_specs, axis_name)
    _check_overwritten(params, shards, axis_name)
    output, grads = gradients_of(*args, **kwargs)
    if output.marks is not None:
      grads = grads[0], *perturbation.mark(grads[1:], output.marks)
    if not sync_ascent:
      _devices.check_varying(grads[0], axis_name)
      space = spaces.over(axis_name, param_specs, weight=output.weight)
    elif compile_once:
      space = spaces.over(None, param_specs)  # The loop has averaged all of them.
    else:
      grads = grads[0], *_shares(grads[1:], output.weight, axis_name)
      space = spaces.over(axis_name, param_specs, averaged=grads[0])
    grads, _ = _passes.combine(
      grads, combination_state, space, setting, like=grads[0], params=params
    )
    value, grads = _whole(output, grads, axis_name)
    grads = jax.tree.map(lambda g, w: g.astype(jnp.result_type(w)), grads, params)
    return (value, output.aux) if has_aux else value, grads

  return value_and_grad_fn


def without_state(
  metric: metrics.Metric,
  rho: float | jax.Array,
  combination: combinations.Combination,
  **options: Unpack[transformation.Options],
) -> Callable[[Any, Any, Callable[[Any], Any]], Any]:
  """One update of :func:`sharpness_aware`, for what has nowhere to keep a state.

  Args:
    metric: a metric without state.
    rho: ``ρ``, scalar >= 0, a number or an array.
    combination: a combination without state.
    **options: the keyword arguments of :func:`sharpness_aware`.

  Returns:
    ``(grads, params, grad_fn) -> update``.

  Raises:
    ValueError: if ``rho`` is a schedule, or the combination skips probes; when called,
      if the metric or the combination has a state.
  """
  if _hyperparameters.is_schedule(rho):
    raise ValueError(
      'A schedule for `rho` needs a step count, which `value_and_grad` does not'
      ' have: give its value, as in `value_and_grad(loss_fn, metric,'
      ' rho=schedule(step))` inside the training step, or use the'
      ' transformation `sharpness_aware(metric, rho=schedule)`.'
    )
  tx = transformation.sharpness_aware(metric, rho, combination, **options)
  if combination.due is not None:
    raise ValueError(
      'This combination decides from step to step whether it has probes (`due`), and'
      ' `value_and_grad` has them in every step: use the transformation'
      ' `sharpness_aware(metric, rho, combination)` in `optax.chain`.'
    )

  def update(grads, params, grad_fn):
    state: Any = tx.init(params)
    _check_stateless(state.metric_state, state.combination_state)
    new, _ = tx.update(grads, state, params, grad_fn=grad_fn)
    return new

  return update


def _check_stateless(metric_state, combination_state):
  """Raises if there is a state, which a function has nowhere to keep."""
  if jax.tree.leaves(metric_state):
    raise ValueError(
      'This metric keeps a state from step to step (a schedule for `alpha`, for'
      ' example, counts), and `value_and_grad` has nowhere to keep it: use the'
      ' transformation `sharpness_aware(metric, rho)` in `optax.chain`.'
    )
  if jax.tree.leaves(combination_state):
    raise ValueError(
      'This combination keeps a state from step to step, and `value_and_grad` has'
      ' nowhere to keep it: use the transformation `sharpness_aware(metric, rho,'
      ' combination)` in `optax.chain`.'
    )


def _shares(grads, weight, axis_name):
  """Gradients whose plain mean over replicas is the one by weights.

  A plain mean leaves what is a mean already as it is, and so also a sum of such a
  gradient and one of each replica. By weights it would not where one of them is zero.
  """
  if weight is None or axis_name is None:
    return grads
  mean = _numerics.divisor(jax.lax.pmean(weight, axis_name))
  return _numerics.multiply(_numerics.divisor(weight) / mean, grads)


def _whole(output, grads, axis_name):
  """The loss and its gradient, of the whole batch where there are weights."""
  if output.weight is None:
    return output.value, grads
  total, weight = output.value, output.weight
  if axis_name is not None:
    total, weight = jax.lax.psum((total, weight), axis_name)
  # One, but 0/0 if the whole batch is empty, as a plain loss would have it.
  ratio = _numerics.divisor(weight) / weight
  return total / weight, _losses.map_gradients(
    lambda g: g * ratio.astype(g.dtype), grads
  )


def _check_loss_fn(loss_fn):
  if not callable(loss_fn):
    raise TypeError(
      f'`loss_fn` must be a function that returns the loss, got {loss_fn!r}: the'
      ' parameters go to the function that `value_and_grad(loss_fn, metric, rho)`'
      ' returns.'
    )


def _check_division(axis_name, shards, sync_ascent, vectorize):
  whole = isinstance(shards, (int, np.integer)) and not isinstance(shards, bool)
  if shards is not None and not (whole and shards >= 1):
    raise ValueError(f'`shards` must be a whole number >= 1, got {shards!r}.')
  if vectorize and shards is None:
    raise ValueError('`vectorize_shards` needs `shards`, the number of micro-batches.')
  if sync_ascent and axis_name is None and shards is None:
    raise ValueError(
      '`sync_ascent=True` averages the gradient for the ascent over devices or'
      ' micro-batches: name the mapped axis, as in `axis_name="batch"`, or give'
      ' `shards`, the number of micro-batches.'
    )


def _check_data(shards, parts, argnums, names):
  if (shards, parts) == (None, 1) and (argnums is not None or names):
    raise ValueError(
      '`data_argnums` and `data_argnames` name the arguments that `shards` cuts: give'
      ' `shards`, the number of micro-batches; with `shards=1` the batch stays whole.'
    )


def _parts(ascent_fraction, compile_once):
  """How many parts the batch has of which one is that of the ascent."""
  is_number = isinstance(ascent_fraction, (int, float, np.floating))
  if not is_number or not 0 < ascent_fraction <= 1:
    raise ValueError(
      '`ascent_fraction` must be in (0, 1], and a number of Python, got'
      f' {ascent_fraction!r}.'
    )
  parts = round(1 / ascent_fraction)
  if abs(parts * ascent_fraction - 1) > 1e-6:
    raise ValueError(
      '`ascent_fraction` must be one over a whole number, as 1/4, got'
      f' {ascent_fraction!r}.'
    )
  if parts > 1 and compile_once:
    raise ValueError(
      '`compile_once` runs the same pass twice, and `ascent_fraction` makes the first'
      ' one smaller: give one of them.'
    )
  return parts


def _check_scale(loss_scale, perturbation_dtype):
  if loss_scale is None:
    return
  if isinstance(loss_scale, (int, float)) and loss_scale <= 0:
    raise ValueError(f'`loss_scale` must be > 0, got {loss_scale!r}.')
  _hyperparameters.check_number('loss_scale', loss_scale)
  if perturbation_dtype is not None and jnp.finfo(perturbation_dtype).nexp < 8:
    raise ValueError(
      f'With `loss_scale` the gradient is divided by it in float32, and in the'
      f' `perturbation_dtype` {jnp.dtype(perturbation_dtype)} it would underflow: leave'
      ' that out, and let the model cast.'
    )


def _check_overwritten(params, shards, axis_name):
  argument = 'axis_name' if shards is None else 'shards'
  if (shards, axis_name) != (None, None) and any(
    jax.tree.leaves(_masks.overwritten(params))
  ):
    raise ValueError(
      f'The parameters hold the collection {_masks.OVERWRITTEN!r}, whose "gradients"'
      f' are new values, which `{argument}` cannot average. Give the whole batch, under'
      ' jit with sharded arrays if it is on several devices.'
    )
