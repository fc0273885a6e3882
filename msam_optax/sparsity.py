"""Sparse SAM's metric, which perturbs the coordinates with the largest gradients."""

from typing import Any
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from msam_optax import _devices
from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import _outer_products
from msam_optax import metrics
from msam_optax import spaces


class SparseState(NamedTuple):
  """State of :func:`sparse`.

  Attributes:
    count: int32 scalar, the steps so far.
    chosen: pytree of bools like the params, the coordinates that are perturbed.
    base: the base metric's state.
  """

  count: Any
  chosen: Any
  base: Any


def sparse(
  base: metrics.Metric = metrics.euclidean(),
  sparsity: float | jax.Array = 0.5,
  every: int | jax.Array = 100,
) -> metrics.Metric:
  """A metric that perturbs a part of the coordinates, those with the largest gradients.

  The direction is the base's, set to zero outside a set of coordinates, and not made
  longer for it, as the authors have it; the slope is ``⟨g, direction⟩``. The set is
  chosen anew in every ``k``-th step: of all coordinates of all leaves together the
  share ``1 − sparsity`` with the largest ``F``, the empirical Fisher information. That
  is the mean of the squares of the gradients that are given to ``update`` as
  ``gradients=`` (a pytree like the gradients with a leading axis of examples or
  micro-batches), and the square of the gradient itself where none are given.

  It does not make a step cheaper: every gradient is dense.

  Args:
    base: the metric whose direction is made sparse.
    sparsity: the share of the coordinates that are not perturbed, scalar, 0 <= s < 1.
      Coordinates with equal ``F`` are chosen together, so more may be perturbed.
    every: ``k``, the steps between two choices, whole number >= 1. The authors choose
      every five epochs.

  Returns:
    A :class:`Metric` with a :class:`SparseState`, one byte for each parameter. Each
    replica makes its own choice, unless ``sync_ascent`` is set; from ``gradients``,
    which differ between replicas, it always does.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if ``sparsity`` or ``every`` is out of its range; from ``ascend``, if
      ``gradients`` are not like the gradient.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean, sparse
    >>> metric = sparse(euclidean(), sparsity=0.5)
    >>> g = jnp.array([3.0, 0.1, -4.0, 0.2])
    >>> ascent, state = metric.ascend(g, metric.init(g), g)
    >>> print(ascent.direction)
    [ 0.5994  0.     -0.7992  0.    ]

  References:
    Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
    Approach <https://arxiv.org/abs/2210.05177>`_, 2022
  """
  metrics.check_metric('base', base)
  _hyperparameters.check_number('sparsity', sparsity)
  if not isinstance(sparsity, jax.core.Tracer) and sparsity >= 1:
    raise ValueError(
      f'`sparsity` must be less than 1, got {sparsity!r}: then nothing would move.'
    )
  _hyperparameters.check_whole('every', every)

  def init(params):
    everything = jax.tree.map(lambda w: jnp.ones_like(w, bool), params)
    return SparseState(jnp.zeros([], jnp.int32), everything, base.init(params))

  def ascend(grads, state, params, *, space=spaces.LOCAL, gradients=None, **extra_args):
    if gradients is not None:
      gradients = _outer_products.like_grads(grads, gradients)
    share = 1.0 - _hyperparameters.value_at('sparsity', sparsity)
    # At run time it may be out of its range, and nothing is chosen by it.
    k, unsound = _hyperparameters.whole_at(every)
    sound = jnp.asarray((share > 0.0) & (share <= 1.0) & (unsound == 0.0))
    _, norm = space.normalize(grads)

    def vary(chosen):
      return _varying(chosen, grads, gradients, norm)

    def choose():
      new = _largest(_information(grads, gradients, space), share, space)
      usable = sound & (norm > 0)
      return vary(jax.tree.map(lambda n, o: jnp.where(usable, n, o), new, state.chosen))

    due = state.count % k == 0
    chosen = jax.lax.cond(due, choose, lambda: vary(state.chosen))
    ascent, base_state = base.ascend(
      grads, state.base, params, space=space, gradients=gradients, **extra_args
    )
    direction = jax.tree.map(
      lambda c, d: jnp.where(c, d, 0.0) + _numerics.zero_if(sound, d.dtype),
      chosen,
      ascent.direction,
    )
    slope = space.dot(grads, direction)
    count = optax.safe_increment(state.count)
    return metrics.Ascent(direction, slope), SparseState(count, chosen, base_state)

  return metrics.Metric(init, ascend)


def _varying(chosen, grads, gradients, norm):
  """The choice, in the types of one that is made of these gradients on each device."""

  def of_leaf(c, *others):
    axes = frozenset().union(*(_devices.varying_axes(x) for x in (*others, norm)))
    return _devices.as_varying(c, axes - _devices.varying_axes(c))

  trees = (grads,) if gradients is None else (grads, gradients)
  return jax.tree.map(of_leaf, chosen, *trees)


def _information(grads, gradients, space):
  """The root of the empirical Fisher information of each coordinate, up to a factor."""
  if gradients is None:
    unit, _ = space.normalize(grads)
    return jax.tree.map(jnp.abs, unit)
  units, _ = space.normalize(gradients)
  return jax.tree.map(lambda g: jnp.sqrt(jnp.sum(jnp.square(g), axis=0)), units)


def _largest(tree, share, space):
  """Which entries are among a share of them, the largest of the whole tree.

  Of float32 numbers that are not negative the order is that of their bits. So the
  smallest that is chosen is found by 31 halvings, exactly, and without a sort, which
  would need all leaves and all their shards in one place.
  """
  bits = jax.tree.map(
    lambda x: jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32), tree
  )
  ones = jax.tree.map(jnp.ones_like, tree)
  total = space.dot(ones, ones)
  wanted = jnp.maximum(jnp.floor(jnp.asarray(share, total.dtype) * total), 1.0)

  def halve(i, smallest):
    candidate = smallest + (1 << (30 - i))
    above = jax.tree.map(lambda b: (b >= candidate).astype(total.dtype), bits)
    return jnp.where(space.dot(above, above) >= wanted, candidate, smallest)

  zero = jnp.zeros_like(wanted, jnp.int32)  # It varies over devices as the tree does.
  smallest = jax.lax.fori_loop(0, 31, halve, zero)
  return jax.tree.map(lambda b: b >= smallest, bits)
