"""Combinations: the update that a step makes of its gradients.

A step computes the gradient ``g`` at the parameters ``w`` and one gradient at each
probe ``w + scale · δ``. SAM's update is the one at its only probe. Others mix it with
``g``, or have probes on both sides of ``w``; what they do with the gradients is in this
file.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import _checks
from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import spaces


class Combination(NamedTuple):
  """How one update is made of the gradients of a step.

  The gradients are pytrees of real arrays with the structure of the params, also of
  leaves that ``mask`` leaves out, since these are trained as well; without leaves that
  have no gradient (integers, FP8 scaling factors: in their place is an
  ``optax.MaskedNode``), and with a pair of real arrays for a complex leaf.

  Attributes:
    init: ``params -> state``. A combination without state returns a tree without
      leaves.
    combine: ``(grads, state, space) -> (update, state)`` with ``grads = (g, g₁, …)``,
      after ``g`` one gradient for each of the ``scales``, or ``(g,)`` in a step that is
      not ``due``. Each replica has its own gradients; ``space.mean`` is their mean, and
      the update must be the same on all. It is cast to the dtypes of the gradients.
      What is not finite must stay so in the update, and must not stay in the state.
      (``space.normalize`` returns zeros for it; what is not finite in ``g`` is so in
      every probe's gradient already.) A formula that is not linear is one of the means:
      first ``space.mean(grads)``.
    scales: one number for each probe, which is at ``w + scale · δ`` and costs one more
      gradient.
    due: ``(g, state, space) -> bool``, scalar: whether this step has probes. It must be
      the same on all replicas, as a function of a counter or of ``space.mean(g)`` is.
      None, the default, is every step.

  Examples:
    The gradient at the probe as long as the one at the params is, which is Stable SAM:

    >>> import jax, jax.numpy as jnp, optax
    >>> import msam_optax
    >>> def combine(grads, state, space):
    ...   g, g_probe = space.mean(grads)
    ...   (_, length), (_, size) = space.normalize(g), space.normalize(g_probe)
    ...   ratio = length / jnp.where(size > 0, size, 1.0)
    ...   return jax.tree.map(lambda x: ratio * x, g_probe), state
    >>> stable = msam_optax.Combination(lambda params: optax.EmptyState(), combine)
    >>> tx = msam_optax.sharpness_aware(msam_optax.euclidean(), 0.5, stable)
    >>> w, grad_fn = jnp.array([0.3, 0.4]), jax.grad(lambda w: jnp.sum(w**2))
    >>> print(tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0])
    [0.6 0.8]
  """

  init: Callable[[Any], Any]
  combine: Callable[[tuple[Any, ...], Any, spaces.Space], tuple[Any, Any]]
  scales: Sequence[float] = (1.0,)
  due: Callable[[Any, Any, spaces.Space], Any] | None = None


def probe_gradient() -> Combination:
  """The gradient at the probe, ``g₁``: that of SAM, ASAM, Monge SAM and others.

  Returns:
    A :class:`Combination` without state.

  Examples:
    >>> from msam_optax import LOCAL, probe_gradient
    >>> probe_gradient().combine((1.0, 3.0), (), LOCAL)[0]
    3.0
  """
  return _stateless(lambda grads, space: space.mean(grads[-1]))


def weighted(a: float | jax.Array) -> Combination:
  """A weighted sum of both gradients, ``(1 − a) g + a g₁``.

  With ``0 ≤ a ≤ 1`` it is the penalty on the norm of the gradient (GNP), with
  ``a = γ/(1 − γ)`` the coupled form of WSAM, in which ``a`` may be larger than 1. The
  update is the gradient of ``(1 − a) ℓ(w) + a ℓ(w + δ)`` with ``δ`` held fixed.

  Args:
    a: scalar >= 0. 0 is the plain gradient, 1 the one at the probe.

  Returns:
    A :class:`Combination` without state.

  Raises:
    TypeError: if ``a`` is no real number and no array.
    ValueError: if ``a`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import LOCAL, weighted
    >>> update, _ = weighted(0.75).combine((jnp.array(1.0), jnp.array(3.0)), (), LOCAL)
    >>> print(update)
    2.5

  References:
    Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization in
    Deep Learning <https://arxiv.org/abs/2202.03599>`_, 2022

    Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023
  """
  _hyperparameters.check_number('a', a)

  def combine(grads, space):
    g, *probes = grads
    if not probes:
      return space.mean(g)
    (a_now,) = numbers(a=a)
    return space.mean(add_up((1.0 - a_now, a_now), (g, *probes)))

  return _stateless(combine)


def excess(a: float | jax.Array) -> Combination:
  """What the probe adds to the plain gradient, ``a (g₁ − g)``.

  Args:
    a: scalar >= 0.

  Returns:
    A :class:`Combination` without state.

  Raises:
    TypeError: if ``a`` is no real number and no array.
    ValueError: if ``a`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import LOCAL, combinations
    >>> grads = jnp.array(1.0), jnp.array(3.0)
    >>> print(combinations.excess(0.5).combine(grads, (), LOCAL)[0])
    1.0
  """
  _hyperparameters.check_number('a', a)

  def combine(grads, space):
    (a_now,) = numbers(a=a)
    return space.mean(add_up((-a_now, a_now), grads))

  return _stateless(combine)


def rescaled() -> Combination:
  """Stable SAM's update: the gradient at the probe, as long as the one at the params.

  With ``g`` at the params and ``g₁`` at the probe it is ``(‖g‖/‖g₁‖) g₁``: the probe
  turns the step, and does not lengthen it, so that a learning rate that is stable
  without a probe is so with it. With replicas both gradients are means before.

  Returns:
    A :class:`Combination` without state.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import LOCAL, rescaled
    >>> grads = jnp.array([0.0, 1.0]), jnp.array([3.0, 4.0])
    >>> print(rescaled().combine(grads, (), LOCAL)[0])
    [0.6 0.8]

  References:
    Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
    Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024
  """

  def combine(grads, space):
    g, *probes = space.mean(grads)
    if not probes:
      return g
    _, length = space.normalize(g)
    unit, size = space.normalize(probes[0])
    # What is zero or not finite has no direction, and stays what it is.
    return jax.tree.map(
      lambda u, x: jnp.where(size > 0, length * u, x.astype(u.dtype)).astype(x.dtype),
      unit,
      probes[0],
    )

  return _stateless(combine)


def surrogate_gap(alpha: float | jax.Array = 0.6) -> Combination:
  """GSAM's update: lowers the loss at the probe and its gap to the loss at the params.

  Only the component of ``g`` that is perpendicular to ``g₁`` is used, so that the gap
  is closed without slowing the descent at the probe:

      g₁ − α (g − ⟨g, g₁⟩/⟨g₁, g₁⟩ g₁).

  With replicas both gradients are their means before the formula. The inner products
  are over all leaves that have a gradient, perturbed or not: frozen ones should have
  none (None, or another argument of the loss), which ``mask`` alone does not achieve.

  Args:
    alpha: ``α``, scalar >= 0. 0 is the gradient at the probe; the authors have 0.6 for
      ViT-B/32.

  Returns:
    A :class:`Combination` without state.

  Raises:
    TypeError: if ``alpha`` is no real number and no array.
    ValueError: if ``alpha`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import LOCAL, surrogate_gap
    >>> grads = jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0])
    >>> print(surrogate_gap(0.5).combine(grads, (), LOCAL)[0])
    [ 3. -1.]

  References:
    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022
  """
  _hyperparameters.check_number('alpha', alpha)

  def combine(grads, space):
    grads = space.mean(grads)
    g, *probes = grads
    if not probes:
      return g
    (alpha_now,) = numbers(alpha=alpha)
    # By way of the unit vector: ⟨g₁, g₁⟩ would underflow where g₁ does not.
    unit, _ = space.normalize(probes[0])
    slope = space.dot(g, unit)
    along = _numerics.widen(alpha_now, like=slope) * slope
    return add_up((-alpha_now, 1.0, along), (g, *probes, unit), dtypes=g)

  return _stateless(combine)


def curvature(
  gamma: float | jax.Array = 0.1, beta: float | jax.Array = 0.01
) -> Combination:
  """CR-SAM's update: penalizes curvature, from gradients on both sides of the params.

  With gradients ``g₊`` at ``w + δ`` and ``g₋`` at ``w − δ``, three in a step:

      g₊ + γ (g₊ + g₋ − 2g) + β (g₊ − g₋).

  Args:
    gamma: ``γ``, scalar >= 0: the weight of the second difference, a third derivative
      of the loss.
    beta: ``β``, scalar >= 0: the weight of the first difference, a second derivative.

  Returns:
    A :class:`Combination` without state.

  Raises:
    TypeError: if a weight is no real number and no array.
    ValueError: if a weight is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import curvature, LOCAL
    >>> g, plus, minus = jnp.array(1.0), jnp.array(3.0), jnp.array(0.0)
    >>> print(curvature(0.25, 0.5).combine((g, plus, minus), (), LOCAL)[0])
    4.75

  References:
    Wu et al., `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
    <https://arxiv.org/abs/2312.13555>`_, 2023
  """
  _hyperparameters.check_number('gamma', gamma)
  _hyperparameters.check_number('beta', beta)

  def combine(grads, space):
    g, *probes = grads
    if not probes:
      return space.mean(g)
    second, first = numbers(gamma=gamma, beta=beta)
    weights = (-2.0 * second, 1.0 + second + first, second - first)
    return space.mean(add_up(weights, (g, *probes)))

  return _stateless(combine)._replace(scales=(1.0, -1.0))


def check_combination(combination: Any) -> None:
  """Raises unless ``combination`` is a :class:`Combination` with a probe."""
  if not isinstance(combination, Combination):
    raise TypeError(
      '`combination` must be a Combination, such as `probe_gradient()` or'
      f' `weighted(0.8)`, got {combination!r}.'
    )
  due = combination.due
  if not callable(combination.init) or not callable(combination.combine):
    raise TypeError(
      'The `init` and `combine` of a Combination must be functions, got'
      f' {combination.init!r} and {combination.combine!r}.'
    )
  if due is not None and not callable(due):
    raise TypeError(
      f'The `due` of a Combination must be a function or None, got {due!r}.'
    )
  scales = combination.scales
  if not isinstance(scales, Sequence) or isinstance(scales, str) or not len(scales):
    raise ValueError(
      'The `scales` of a Combination are those of its probes, one at least, as in'
      f' `(1.0,)`, got {scales!r}.'
    )
  for scale in scales:
    dtype = _checks.dtype_of(scale)
    real = any(
      dtype is not None and jnp.issubdtype(dtype, kind)
      for kind in (jnp.floating, jnp.integer)
    )
    if not real or np.shape(scale):
      raise TypeError(
        f'The `scales` of a Combination must be real numbers, got {scales!r}.'
      )
    if not isinstance(scale, jax.core.Tracer) and not np.isfinite(scale):
      raise ValueError(f'The `scales` of a Combination must be finite, got {scales!r}.')


def check_due(due: Any) -> None:
  """Raises unless what ``due`` returns is a bool, one scalar."""
  dtype = _checks.dtype_of(due)
  if dtype is None or dtype != jnp.dtype(bool) or jnp.shape(due):
    kind = repr(due) if dtype is None else f'{dtype}{list(jnp.shape(due))}'
    raise TypeError(
      f'The `due` of a Combination must return a bool, one scalar, not {kind}: compare,'
      ' as in `state.count % 5 == 0`.'
    )


def numbers(**values: Any) -> list[jax.Array]:
  """The numbers now, in one dtype, float32 or wider: 1 − a would round in bfloat16."""
  now = [_hyperparameters.value_at(name, x) for name, x in values.items()]
  return [_numerics.widen(x, like=now) for x in now]


def add_up(weights: Any, trees: Any, dtypes: Any = None) -> Any:
  """``Σ weight · tree``, in float32 or wider, rounded to the first one's dtypes."""

  def of_leaf(like, *xs):
    widen = functools.partial(_numerics.widen, like=xs)
    terms = [widen(c) * widen(x) for c, x in zip(weights, xs, strict=True)]
    return sum(terms[1:], terms[0]).astype(jnp.result_type(like))

  return jax.tree.map(of_leaf, trees[0] if dtypes is None else dtypes, *trees)


def _stateless(combine: Callable[[Any, spaces.Space], Any]) -> Combination:
  return Combination(
    init=lambda params: optax.EmptyState(),
    combine=lambda grads, state, space: (combine(grads, space), state),
  )
