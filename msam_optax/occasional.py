"""Combinations that probe in some steps only: the others cost one gradient.

Which steps, the ``due`` of a :class:`Combination` says, from the gradient at the params
and from what the combination remembers. To skip steps by a clock alone needs nothing of
this file: ``optax.conditionally_transform(msam(), lambda step: step % 5 == 0)``.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import combinations


class ReusedState(NamedTuple):
  """State of :func:`reused`.

  Attributes:
    count: int32 scalar, the steps so far.
    aside: pytree of arrays like the gradients, in the dtypes of the params: of the last
      gradient at a probe the component that is perpendicular to the gradient at the
      params, divided by its length; zeros before the first.
  """

  count: Any
  aside: Any


class SteepState(NamedTuple):
  """State of :func:`when_steep`.

  Attributes:
    count: int32 scalar, the steps so far.
    mean: scalar, float32 or wider, the running mean of ``‖g‖²``.
    variance: scalar, float32 or wider, its running variance.
    base: the state of the combination that is used in steep steps.
  """

  count: Any
  mean: jax.Array
  variance: jax.Array
  base: Any


def reused(
  every: int | jax.Array = 5, alpha: float | jax.Array = 0.7
) -> combinations.Combination:
  """LookSAM's update: a probe in every ``k``-th step, whose result is used until then.

  In the steps 0, ``k``, ``2k`` … it is the gradient ``g₁`` at the probe. Its
  component perpendicular to the plain gradient is remembered,

      v = g₁ − ⟨g₁, g⟩/⟨g, g⟩ g,

  and in the other steps it is added to the plain gradient, scaled to a fixed share of
  that gradient's length:

      g + α (‖g‖/‖v‖) v.

  So ``k`` steps cost ``k + 1`` gradients. With replicas all gradients are means before
  the formula, so that each remembers the same.

  Args:
    every: ``k``, whole number >= 1. 1 is a probe in every step.
    alpha: ``α``, scalar >= 0. 0 is the plain gradient between the probes.

  Returns:
    A :class:`Combination` with a :class:`ReusedState`, one copy of the params.

  Raises:
    TypeError: if ``alpha`` is no real number and no array, or ``every`` not whole.
    ValueError: if ``alpha`` is negative or not finite, or ``every`` less than 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import LOCAL, reused
    >>> combination = reused(every=5, alpha=0.5)
    >>> g, g_probe = jnp.array([2.0, 0.0]), jnp.array([3.0, 4.0])
    >>> update, state = combination.combine(
    ...     (g, g_probe), combination.init(g), LOCAL)
    >>> print(update, combination.combine((g,), state, LOCAL)[0])
    [3. 4.] [2. 1.]

  References:
    Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_, 2022
  """
  _hyperparameters.check_whole('every', every)
  _hyperparameters.check_number('alpha', alpha)

  def init(params):
    return ReusedState(jnp.zeros([], jnp.int32), _numerics.zeros_like(params))

  def combine(grads, state, space):
    g, *probes = space.mean(grads)
    if probes:
      unit, _ = space.normalize(g)
      along = space.dot(probes[0], unit)
      rest = combinations.add_up((1.0, -along), (probes[0], unit))
      # What is not finite has no length, and zeros are remembered.
      aside, _ = space.normalize(rest)
      update = probes[0]
    else:
      (alpha_now,) = combinations.numbers(alpha=alpha)
      _, length = space.normalize(g)
      aside = state.aside
      update = combinations.add_up((1.0, alpha_now * length), (g, aside))
    aside = jax.tree.map(lambda new, old: new.astype(old.dtype), aside, state.aside)
    _, unsound = _hyperparameters.whole_at(every)
    update = jax.tree.map(lambda u: u + jnp.asarray(unsound, u.dtype), update)
    return update, ReusedState(optax.safe_increment(state.count), aside)

  def due(g, state, space):
    del g, space
    k, _ = _hyperparameters.whole_at(every)
    return state.count % k == 0

  return combinations.Combination(init, combine, due=due)


def when_steep(
  combination: combinations.Combination = combinations.probe_gradient(),
  *,
  threshold: _hyperparameters.Hyperparameter,
  decay: float | jax.Array,
) -> combinations.Combination:
  """AE-SAM's policy: probes where the gradient is long, as compared with the last ones.

  A step has probes if ``‖g‖² ≥ μ + cσ``, for the running mean ``μ`` and the running
  standard deviation ``σ`` of ``‖g‖²`` with the newest one among them:

      μ ← β μ + (1 − β) ‖g‖²,   then   σ² ← β σ² + (1 − β) (‖g‖² − μ)².

  The update of all other steps is the plain gradient. The authors let ``c`` change
  linearly over the training: ``threshold=optax.linear_schedule(...)``. A step whose
  gradient is not finite is not remembered.

  Args:
    combination: what is made of the gradients in a step with probes; it must not
      have a ``due`` itself.
    threshold: ``c``, a real number, an array or an Optax schedule of the step: of
      normal numbers the share above ``c`` standard deviations. Negative for probes in
      most steps.
    decay: ``β``, scalar, 0 <= β <= 1.

  Returns:
    A :class:`Combination` with a :class:`SteepState`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if ``decay`` is not between 0 and 1 or ``threshold`` not finite, or if
      the combination has a ``due``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import LOCAL, when_steep
    >>> combination = when_steep(threshold=0.0, decay=0.9)
    >>> state = combination.init(jnp.zeros(2))
    >>> for g in jnp.array([[3.0, 0.0], [0.0, 0.2], [0.0, 4.0]]):
    ...   print(combination.due(g, state, LOCAL))
    ...   _, state = combination.combine((g,), state, LOCAL)
    True
    False
    True

  References:
    Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
    <https://arxiv.org/abs/2304.14647>`_, 2023
  """
  combinations.check_combination(combination)
  if combination.due is not None:
    raise ValueError(
      '`when_steep` decides which steps have probes, and the combination that it was'
      ' given decides it as well (`due`): give one that has them in every step.'
    )
  _hyperparameters.check_number('decay', decay, largest=1.0)
  _hyperparameters.check_real('threshold', threshold)

  def init(params):
    # Two arrays, not twice one: a donated buffer may be given only once.
    mean, variance = (jnp.zeros([], _numerics.wide_dtype(params)) for _ in range(2))
    count = jnp.zeros([], jnp.int32)
    return SteepState(count, mean, variance, combination.init(params))

  def numbers(state):
    """``c`` and ``β`` in this step."""
    c = threshold
    if _hyperparameters.is_schedule(c):
      c = c(state.count)
    beta = _hyperparameters.value_at('decay', decay, largest=1.0)
    return [jnp.asarray(x, state.mean.dtype) for x in (c, beta)]

  def remember(g, state, space):
    """The squared length of the gradient, and the state that has seen it."""
    _, beta = numbers(state)
    square = space.dot(g, g).astype(beta.dtype)
    mean = beta * state.mean + (1.0 - beta) * square
    variance = beta * state.variance + (1.0 - beta) * jnp.square(square - mean)
    finite = jnp.isfinite(variance)
    return square, state._replace(
      mean=jnp.where(finite, mean, state.mean),
      variance=jnp.where(finite, variance, state.variance),
    )

  def due(g, state, space):
    square, new = remember(space.mean(g), state, space)
    c, _ = numbers(state)
    return square >= new.mean + c * jnp.sqrt(new.variance)

  def combine(grads, state, space):
    g, *probes = grads
    _, new = remember(space.mean(g), state, space)
    if probes:
      update, base = combination.combine(grads, state.base, space)
    else:
      update, base = space.mean(g), state.base
    # A number that is NaN or infinite at run time would compare as false, unseen.
    seen = 1.0 + 0.0 * sum(numbers(state))
    update = combinations.add_up((seen,), (update,))
    return update, new._replace(count=optax.safe_increment(state.count), base=base)

  return combination._replace(init=init, combine=combine, due=due)
