"""The two-pass method as a function that takes gradients."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msam_optax.checks import check_axes
from msam_optax.checks import check_axis_name
from msam_optax.masks import resolve_mask
from msam_optax.metrics import Metric
from msam_optax.metrics import monge
from msam_optax.shards import mean_over_devices
from msam_optax.shards import over_shards
from msam_optax.shards import zeros_like
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
  shards: int | None = None,
  vectorize_shards: bool = False,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
  compile_once: bool = False,
) -> Callable[..., tuple[Any, Any]]:
  """Takes the place of ``jax.value_and_grad``: the gradient is sharpness-aware.

  The value (and the auxiliary output) are those at the parameters ``w``, the
  gradient is the one at the probe ``w + δ``, ``δ = ρ G⁻¹g/√(gᵀG⁻¹g)``. Nothing
  else in a training loop changes, so this works under every Optax wrapper and in
  every trainer; :func:`sharpness_aware` is the same as an Optax transformation,
  with schedules and with scalars to log.

  The batch may be in parts: on the devices of a mapped axis (``axis_name``), in
  micro-batches on each of them (``shards``), or both. By default every part goes
  uphill on its own, and the gradients at their probes are averaged: m-sharpness,
  with ``m`` the number of parts. With ``sync_ascent`` all go uphill together, along
  the average of their gradients, which gives the same as the whole batch at once.

  Args:
    loss_fn: function to differentiate; returns a scalar, or ``(scalar, aux)``. Both
      passes call it with the same arguments, so also with the same random keys.
    metric: what uphill means; one without state, e.g. ``monge(alpha=1.0)``.
    rho: ``ρ``, the radius, scalar >= 0, a number or an array. For a schedule, make
      the function inside the training step and give ``rho=schedule(step)``.
    argnums: positional argument, or arguments, that hold the parameters.
    has_aux: whether ``loss_fn`` returns ``(scalar, aux)``; with ``shards`` or
      ``compile_once`` it holds arrays only.
    mask: which leaves of the parameters are moved, see :func:`sharpness_aware`.
      With several ``argnums`` it is for the tuple of these arguments. (Leaves that
      JAX cannot differentiate, as integers, belong into another argument.)
    axis_name: the mapped axis over which the gradient at the probe is averaged. The
      value and the auxiliary output are those of each replica.
    shards: number of micro-batches, >= 1, into which the first axis of every array
      among the other arguments is cut; scalars, as typed random keys, go whole to
      each. The value is the mean of theirs, the auxiliary output is stacked. The
      ``loss_fn`` must take the mean over its batch. Parts are consecutive rows. Where
      ``jit`` has the batch on several devices and parts come one after the other, begin
      the loss with ``batch = jax.lax.with_sharding_constraint(batch, sharding)``, so
      that each is laid over all: else every device may compute whole parts. With
      explicit sharding that is done.
    vectorize_shards: whether to take all micro-batches at once (``vmap``; as fast as
      the whole batch, with a probe and a gradient in memory for each), and not one
      after the other (``scan``; the memory of one).
    sync_ascent: whether to average the gradient for the ascent, too.
    param_specs: how the parameters are sharded inside ``shard_map``, see
      :func:`sharpness_aware`.
    perturbation_dtype: floating dtype in which ``loss_fn`` gets the probe, by
      default that of the parameters.
    compile_once: whether to run both passes as two iterations of one loop, so that
      the program holds one copy of the gradient: less to compile, less code, and no
      second copy for an automatic partitioner to shard worse. Meant for large models
      on accelerators; convolutions in a loop are many times slower on the CPU. The
      clean pass, too, then gets the parameters in ``perturbation_dtype``, and a metric
      of your own must have the direction zero where the gradient is.

  Returns:
    A function with the arguments of ``loss_fn`` that returns ``(value, grads)``, or
    ``((value, aux), grads)``; ``grads`` has the structure, shapes and dtypes of the
    parameters.

  Raises:
    TypeError: if ``metric`` is no metric, or a parameter not real floating point.
    ValueError: if ``rho`` is a schedule, negative or not finite, if the metric has a
      state, the mask does not fit, ``sync_ascent`` has nothing to average over, or the
      batch cannot be cut into ``shards``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean, value_and_grad
    >>> loss = lambda w: jnp.sum(w**2)
    >>> value, grads = value_and_grad(loss, euclidean(), rho=0.5)(
    ...     jnp.array([0.6, 0.8]))
    >>> print(value, grads)
    1.0 [1.8 2.4]

    Four examples, in two micro-batches, each with a probe of its own:

    >>> loss = lambda w, x: jnp.mean((x - w) ** 2)
    >>> value, grads = value_and_grad(loss, euclidean(), rho=0.5, shards=2)(
    ...     jnp.array(0.0), jnp.array([1.0, 1.0, 3.0, 3.0]))
    >>> print(value, grads)
    5.0 -5.0

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  check_axis_name(axis_name)
  _check_parts(axis_name, shards, sync_ascent, vectorize_shards)
  at_probe = without_state(
    metric,
    rho,
    mask=mask,
    param_specs=param_specs,
    perturbation_dtype=perturbation_dtype,
  )

  in_parts = functools.partial(
    over_shards,
    shards=None if shards is None else int(shards),
    argnums=argnums,
    has_aux=has_aux,
    vectorize=vectorize_shards,
  )
  average = lambda grads: mean_over_devices(grads, axis_name)
  plain = jax.value_and_grad(loss_fn, argnums, has_aux=has_aux)
  both = functools.partial(
    _looped if compile_once else _straight,
    at_probe=at_probe,
    argnums=argnums,
    cast=lambda tree: _cast(tree, perturbation_dtype, mask),
  )
  if sync_ascent:
    take = both(in_parts(plain), average=average, synced=axis_name)
  else:
    take = in_parts(both(plain, average=lambda grads: grads, synced=()))

  @functools.wraps(loss_fn)
  def value_and_grad_fn(*args, **kwargs):
    _check_argnums(argnums, args)
    check_axes(_select(args, argnums), param_specs, axis_name)
    output, grads = take(*args, **kwargs)
    grads = grads if sync_ascent else average(grads)
    return output, jax.tree.map(
      lambda g, w: g.astype(jnp.result_type(w)), grads, _select(args, argnums)
    )

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


def _straight(take, *, at_probe, argnums, cast, average, synced):
  """The clean pass, and the pass at the probe."""
  del synced

  def both(*args, **kwargs):
    output, grads = take(*args, **kwargs)
    g = cast(average(grads))
    grad_fn = lambda probe: take(*_replace(args, argnums, probe), **kwargs)[1]
    return output, average(at_probe(g, _select(args, argnums), grad_fn))

  return both


def _looped(take, *, at_probe, argnums, cast, average, synced):
  """Both passes as the iterations of ``g ← ∇ℓ(w + δ(g))``, from ``g = 0``.

  A gradient of zero is no perturbation, so the first iteration is the clean pass.
  """

  def both(*args, **kwargs):
    params = _select(args, argnums)

    def one_pass(g, _):
      outputs = []

      def grad_fn(probe):
        output, grads = take(*_replace(args, argnums, probe), **kwargs)
        outputs.append(output)
        return jax.tree.map(lambda x, g: x.astype(g.dtype), grads, g)

      return average(at_probe(g, params, grad_fn)), outputs[0]

    start = cast(zeros_like(params, synced))
    grads, outputs = jax.lax.scan(one_pass, start, length=2)
    return jax.tree.map(lambda x: x[0], outputs), grads

  return both


def _check_parts(axis_name, shards, sync_ascent, vectorize):
  whole = isinstance(shards, (int, np.integer)) and not isinstance(shards, bool)
  if shards is not None and not (whole and shards >= 1):
    raise ValueError(f'`shards` must be a whole number >= 1, got {shards!r}.')
  if vectorize and shards is None:
    raise ValueError('`vectorize_shards` needs `shards`, the number of micro-batches.')
  if sync_ascent and axis_name is None and shards is None:
    raise ValueError(
      '`sync_ascent=True` averages the ascent gradient over the parts of a batch: name'
      ' the mapped axis that they lie on, as in `axis_name="batch"`, or cut the batch'
      ' with `shards`.'
    )


def _check_argnums(argnums, args):
  for i in argnums if isinstance(argnums, Sequence) else (argnums,):
    if not -len(args) <= i < len(args):
      raise ValueError(
        f'`argnums` is {argnums}, but there are {len(args)} positional arguments: give'
        ' the parameters by position.'
      )


def _cast(tree, dtype, mask):
  """Gradients in a dtype, but for leaves that are not moved."""
  if dtype is None:
    return tree
  return jax.tree.map(
    lambda moved, x: x.astype(dtype) if moved else x, resolve_mask(mask, tree), tree
  )


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
