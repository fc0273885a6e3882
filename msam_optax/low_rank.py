"""Metrics of several gradients: a matrix ``B`` and outer products, a sum of low rank.

With gradients ``g₁, …, gᵣ`` the metric is ``G = B + (α²/r) Σ gᵢgᵢᵀ``: Monge's where
there is only the gradient itself, ``B`` plus the empirical Fisher matrix where there is
that of each example. Nothing larger than ``r × r`` is solved.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import _devices
from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import _outer_products
from msam_optax import metrics
from msam_optax import perturbation
from msam_optax import spaces


class LowRankState(NamedTuple):
  """State of :func:`low_rank_monge` where it remembers gradients.

  Attributes:
    count: int32 scalar, the finite gradients so far; the next has row ``count % rank``.
    gradients: pytree like the params and in their dtypes, with a first axis of length
      ``rank``: the last gradients, zero where there was none yet.
  """

  count: Any
  gradients: Any


class NeighborhoodState(NamedTuple):
  """State of :func:`neighborhood_monge`.

  Attributes:
    count: int32 scalar, the steps so far. It makes each step's noise another.
  """

  count: Any


def low_rank_monge(
  rank: int | None = None,
  alpha: _hyperparameters.Hyperparameter = 1.0,
  base: metrics.Metric = metrics.euclidean(),
) -> metrics.Metric:
  """Monge's metric of several gradients, ``G = B + (α²/r) Σ gᵢgᵢᵀ``.

  With a ``rank`` they are the last gradients, this one among them: a step is held back
  along all that was steep lately. While there are fewer, ``r`` is their number, so the
  first step is Monge's, and with rank 1 every step is.

  Without, they are those that ``update`` gets as ``gradients``: one for each
  micro-batch or example, stacked along a first axis::

      gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, examples)
      tx.update(grads, state, params, grad_fn=grad_fn, gradients=gradients)

  Then there is no state. With that of the whole batch alone it is Monge's metric, with
  those of all examples ``B`` plus the empirical Fisher matrix.

  A step takes about ``r²`` inner products of gradients, and the memory is ``r`` copies
  of the params. With replicas (``axis_name``) it has their mean gradients; the
  ``gradients`` are those of each replica.

  Args:
    rank: ``r``, how many gradients are remembered, >= 1. None: they are given.
    alpha: ``α``, scalar >= 0: a number or an array, such as :func:`fisher_alpha`, and
      with a ``rank`` an Optax schedule, counted in finite gradients.
    base: the matrix ``B``: a metric without state that is the same for every gradient,
      such as ``euclidean()`` or ``adaptive()``. For one that is not (``monge()``,
      ``diagonal_fisher()``, a norm) the direction is NaN, unless it is nearly so.

  Returns:
    A :class:`Metric`, with a :class:`LowRankState` if there is a rank.

  Raises:
    TypeError: if ``rank`` is no integer, or ``base`` no metric.
    ValueError: if ``rank`` is less than 1, or ``alpha`` negative or not finite; from
      ``init``, if ``base`` has a state; from ``ascend``, if ``gradients`` are missing,
      not like the gradient, or not wanted.

  Examples:
    Two examples, whose gradients are perpendicular:

    >>> import jax.numpy as jnp
    >>> from msam_optax import low_rank_monge
    >>> metric, w = low_rank_monge(alpha=1.0), jnp.zeros(3)
    >>> gradients = jnp.array([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    >>> g = jnp.mean(gradients, axis=0)
    >>> ascent, _ = metric.ascend(g, metric.init(w), w, gradients=gradients)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [0.252 0.378 0.   ] 0.8819

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025
  """
  metrics.check_metric('base', base)
  if rank is None:
    _hyperparameters.check_number('alpha', alpha)
    return _of_given(alpha, base)
  _hyperparameters.check_whole(
    'rank', rank, instead=', or None for gradients that are given'
  )
  _hyperparameters.check_hyperparameter('alpha', alpha)

  def init(params):
    _outer_products.check_fixed(base, params, 'low_rank_monge')
    stack = lambda zero: jnp.stack([zero] * rank)
    zeros = _numerics.zeros_like(params)
    return LowRankState(jnp.zeros([], jnp.int32), jax.tree.map(stack, zeros))

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    if extra_args.get('gradients') is not None:
      raise ValueError(
        f'`update` was given `gradients`, and low_rank_monge(rank={rank}) remembers'
        ' those of its last steps instead: leave out the rank, or the gradients.'
      )
    mean = space.mean(grads)
    finite = spaces.all_finite(mean, space.param_specs)
    row = state.count % rank

    def put(rows, g):
      # In float32 first: rounded, this gradient would seem to leave the memory's span.
      rows = _numerics.widen(rows)
      kept = jax.lax.dynamic_index_in_dim(rows, row, keepdims=False)
      new = jnp.where(finite, jnp.asarray(g, rows.dtype), kept)
      return jax.lax.dynamic_update_index_in_dim(rows, new, row, 0)

    gradients = jax.tree.map(put, state.gradients, mean)
    count = jnp.where(finite, optax.safe_increment(state.count), state.count)
    ascent = _outer_products.ascend(
      grads,
      gradients,
      params,
      alpha=_hyperparameters.value_at('alpha', alpha, state.count),
      base=base,
      number=jnp.clip(count, 1, rank),
      space=space,
      extra_args=extra_args,
    )
    stored = jax.tree.map(
      lambda x, old: x.astype(old.dtype), gradients, state.gradients
    )
    return ascent, LowRankState(count, stored)

  return metrics.Metric(init, ascend)


def neighborhood_monge(
  samples: int,
  radius: float | jax.Array,
  alpha: _hyperparameters.Hyperparameter = 1.0,
  base: metrics.Metric = metrics.euclidean(),
  *,
  key: jax.Array,
) -> metrics.Metric:
  """Monge's metric of gradients nearby, ``G = B + (α²/r) Σ gᵢgᵢᵀ``.

  The ``gᵢ`` are gradients at ``r`` random points, each at the distance ``radius`` from
  the parameters. A step is held back along all that is steep around, not only here.
  With a radius of 0 it is Monge's metric.

  **It costs a gradient a sample**: with ``samples=2`` and one probe a step computes
  four gradients. They are computed one after the other, and kept until the step ends.

  Args:
    samples: ``r``, how many points, >= 1.
    radius: their Euclidean distance from the parameters, scalar >= 0, a number or an
      array.
    alpha: ``α``, scalar >= 0: a number, an array or an Optax schedule of the step.
    base: the matrix ``B``, see :func:`low_rank_monge`.
    key: a random key. The points of a step depend on it and on the number of the step
      alone, so that a training that is resumed goes on as if it had not stopped.
      Replicas draw the same.

  Returns:
    A :class:`Metric` with a :class:`NeighborhoodState`. ``ascend`` needs the params and
    ``grad_fn``, which :func:`sharpness_aware` passes to it.

  Raises:
    TypeError: if ``samples`` is no integer, ``base`` no metric, or ``key`` no key.
    ValueError: if ``samples`` is less than 1, or a number negative or not finite; from
      ``init``, if ``base`` has a state; from ``ascend``, without ``grad_fn``.

  Examples:
    Of a quadratic loss, at its minimum: the gradient here is small, and Monge SAM would
    go as far as SAM.

    >>> import jax, jax.numpy as jnp
    >>> from msam_optax import neighborhood_monge
    >>> grad_fn = jax.grad(lambda w: 50.0 * jnp.sum(w**2))
    >>> metric = neighborhood_monge(samples=1, radius=0.1, key=jax.random.key(0))
    >>> w = jnp.array([1e-6])
    >>> ascent, _ = metric.ascend(grad_fn(w), metric.init(w), w, grad_fn=grad_fn)
    >>> print(ascent.direction)
    [0.0995]
  """
  _hyperparameters.check_whole('samples', samples)
  _check_key(key)
  _hyperparameters.check_number('radius', radius)
  _hyperparameters.check_hyperparameter('alpha', alpha)
  metrics.check_metric('base', base)

  def init(params):
    _outer_products.check_fixed(base, params, 'neighborhood_monge')
    return NeighborhoodState(jnp.zeros([], jnp.int32))

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    grad_fn = extra_args.get('grad_fn')
    if grad_fn is None or params is None:
      raise ValueError(
        'neighborhood_monge() takes gradients near the params, and needs these and'
        ' `grad_fn`: `tx.update(grads, state, params, grad_fn=grad_fn)`.'
      )
    distance = _hyperparameters.value_at('radius', radius)

    def gradient_near(key):
      unit, norm = space.normalize(_noise(key, params, space.param_specs))
      nearby = perturbation.perturb(params, metrics.Ascent(unit, norm), distance)
      return jax.tree.map(jnp.asarray, grad_fn(nearby))

    keys = jax.random.split(jax.random.fold_in(key, state.count), samples)
    ascent = _outer_products.ascend(
      grads,
      jax.lax.map(gradient_near, keys),
      params,
      alpha=_hyperparameters.value_at('alpha', alpha, state.count),
      base=base,
      number=samples,
      space=space,
      extra_args=extra_args,
    )
    return ascent, NeighborhoodState(optax.safe_increment(state.count))

  return metrics.Metric(init, ascend)


def fisher_alpha(
  grads: Any, gradients: Any, *, space: spaces.Space = spaces.LOCAL
) -> jax.Array:
  """The ``α`` for which Monge's metric is closest to the empirical Fisher matrix.

  Of all ``I + α² g gᵀ`` the closest to ``F = (1/r) Σ gᵢgᵢᵀ`` in the Frobenius norm has

      α² = max(0, (gᵀFg − ‖g‖²)/‖g‖⁴),     gᵀFg = (1/r) Σ ⟨gᵢ, g⟩².

  It is 0 where ``F`` is less than the identity along ``g``: where gradients are short.

  Args:
    grads: ``g``, pytree of real arrays.
    gradients: ``gᵢ``, those of micro-batches or of examples: a pytree like ``g`` with
      one more axis, the first, in each leaf.
    space: how they are spread over devices.

  Returns:
    ``α``, a scalar in float32 or wider, for ``monge(alpha)``; in a step that is
    compiled, make the metric inside it.

  Raises:
    ValueError: if ``gradients`` are not like ``grads``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import fisher_alpha
    >>> gradients = jnp.array([[4.0, 0.0], [0.0, 3.0]])
    >>> print(f'{fisher_alpha(jnp.mean(gradients, axis=0), gradients):.4f}')
    0.9583
  """
  gradients = _outer_products.like_grads(grads, gradients)
  unit, n = space.normalize(grads)
  along = jax.vmap(lambda g: space.dot(g, unit))(gradients)
  largest = jnp.max(jnp.abs(along))
  scale = jnp.where(largest > 0, largest, 1.0)
  x = scale * jnp.sqrt(jnp.mean(jnp.square(along / scale)))
  excess = jnp.sqrt(jnp.maximum(x - 1.0, 0.0)) * jnp.sqrt(x + 1.0)
  return excess / jnp.where(n > 0, n, 1.0)


def _check_key(key):
  try:
    jax.eval_shape(jax.random.fold_in, key, 0)
  except (TypeError, ValueError) as error:
    raise TypeError(
      '`key` of neighborhood_monge() must be one random key, such as'
      f' `jax.random.key(0)`, got {key!r}.'
    ) from error


def _of_given(alpha, base):
  """The metric of the gradients that ``update`` is given."""

  def init(params):
    _outer_products.check_fixed(base, params, 'low_rank_monge')
    return optax.EmptyState()

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    gradients = extra_args.get('gradients')
    if gradients is None:
      raise ValueError(
        'low_rank_monge() without a rank is the metric of gradients that are given:'
        ' `tx.update(grads, state, params, grad_fn=grad_fn, gradients=gradients)`, one'
        ' for each example or micro-batch; or give the rank, how many to remember.'
      )
    gradients = _outer_products.like_grads(grads, gradients)
    ascent = _outer_products.ascend(
      grads,
      gradients,
      params,
      alpha=_hyperparameters.value_at('alpha', alpha),
      base=base,
      number=len(jax.tree.leaves(gradients)[0]),
      space=space,
      extra_args=extra_args,
    )
    return ascent, state

  return metrics.Metric(init, ascend)


def _noise(key, params, param_specs):
  """Normal numbers like the params; parts of a leaf on several devices differ."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, max(len(leaves), 1))
  drawn = []
  for w, key, axes in zip(
    leaves, keys, _devices.leaf_axes(param_specs, params), strict=False
  ):
    for axis in axes:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    noise = jax.random.normal(key, jnp.shape(w), _numerics.wide_dtype(w))
    sharding = _devices.explicit_sharding(w)
    drawn.append(noise if sharding is None else jax.sharding.reshard(noise, sharding))
  return structure.unflatten(drawn)
