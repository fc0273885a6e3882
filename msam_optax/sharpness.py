"""Sharpness: how far the loss rises nearby, and how it is curved there.

Everything is jit-able and works on any pytree of real floating-point arrays. Of a
model that holds other leaves, as most Equinox modules do, give the arrays alone::

    params, static = eqx.partition(model, eqx.is_inexact_array)
    rise(lambda params: loss(eqx.combine(params, static)), params, monge(), rho=0.05)

The trace (Hutchinson's estimator, by matfree, which ``msam-optax[sharpness]``
installs) and the extreme eigenvalues (Krylov spaces) need no dense matrix.
"""

from collections.abc import Callable
from typing import Any
from typing import Literal
from typing import NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp

from msam_optax import _checks
from msam_optax import _krylov
from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import perturbation
from msam_optax import spaces

Which = Literal['largest', 'smallest']


class Rise(NamedTuple):
  """How far the loss rises at the probe.

  Attributes:
    measured: scalar, float32 or wider: ``ℓ(w+δ) − ℓ(w)``.
    predicted: scalar, float32 or wider: to first order in ρ, ``ρ · slope``.
  """

  measured: jax.Array
  predicted: jax.Array


def rise(
  loss: Callable[[Any], Any],
  params: Any,
  metric: metrics.Metric,
  rho: float | jax.Array,
  *,
  mask: Any = None,
) -> Rise:
  """The rise of the loss at the probe of a metric, measured and predicted.

  ``ℓ(w+δ) − ℓ(w)`` for ``δ = ρ G⁻¹g/√(gᵀG⁻¹g)``, beside ``⟨g, δ⟩ = ρ√(gᵀG⁻¹g)``. Under
  Monge's metric the prediction is less than ``ρ/α``.

  Args:
    loss: ``params -> scalar``.
    params: ``w``, a pytree of real floating-point arrays.
    metric: ``G``, e.g. ``monge()``; with a state, its first step.
    rho: ``ρ``, scalar >= 0.
    mask: which leaves are perturbed, by default all; see :func:`perturb`.

  Returns:
    A :class:`Rise`.

  Raises:
    TypeError: if a leaf of ``params`` is no real floating-point array.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean
    >>> from msam_optax.sharpness import rise
    >>> measured, predicted = rise(
    ...     lambda w: jnp.sum(w**2), jnp.array([0.6, 0.8]), euclidean(), rho=0.5)
    >>> print(f'{measured:.2f} {predicted:.2f}')
    1.25 1.00
  """
  _checks.check_real(params)
  mask = _masks.resolve_mask(mask, params)
  value, grads = jax.value_and_grad(loss)(params)
  ascent = _ascent(metric, grads, params, mask, rho, jax.grad(loss))
  at_probe = loss(perturbation.perturb(params, ascent, rho, mask=mask))
  predicted = _numerics.widen(rho, like=ascent.slope) * ascent.slope
  return Rise(_numerics.widen(at_probe) - _numerics.widen(value), predicted)


def mean_rise(
  loss: Callable[[Any, Any], Any],
  params: Any,
  shards: Any,
  metric: metrics.Metric,
  rho: float | jax.Array,
  *,
  mask: Any = None,
) -> Rise:
  """The rise of :func:`rise`, averaged over micro-batches: m-sharpness.

  Each micro-batch has its own gradient and perturbation:
  ``mean_b [ℓ_b(w + δ(∇ℓ_b)) − ℓ_b(w)]``. They are computed one after the other.

  Args:
    loss: ``(params, shard) -> scalar``.
    params: ``w``, a pytree of real floating-point arrays.
    shards: pytree of arrays ``[m, …]``: ``m`` micro-batches, stacked.
    metric: ``G``, e.g. ``monge()``.
    rho: ``ρ``, scalar >= 0.
    mask: which leaves are perturbed, by default all; see :func:`perturb`.

  Returns:
    A :class:`Rise` of means over the micro-batches.

  Raises:
    TypeError: if a leaf of ``params`` is no real floating-point array.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean
    >>> from msam_optax.sharpness import mean_rise
    >>> loss = lambda w, x: jnp.sum((w - x) ** 2)
    >>> shards = jnp.array([[1.0], [-1.0]])  # their gradients cancel out
    >>> print(mean_rise(loss, jnp.zeros(1), shards, euclidean(), rho=0.5).measured)
    1.25
  """

  _checks.check_real(params)
  mask = _masks.resolve_mask(mask, params)

  def of_shard(shard):
    return rise(lambda p: loss(p, shard), params, metric, rho, mask=mask)

  return jax.tree.map(jnp.mean, jax.lax.map(of_shard, shards))


def hessian_trace(
  loss: Callable[[Any], Any], params: Any, *, key: jax.Array, samples: int = 100
) -> jax.Array:
  """An estimate of the trace of the Hessian (Hutchinson's, with random signs).

  The mean of ``zᵀHz`` over vectors ``z`` of independent signs. It is unbiased, with
  variance ``2 Σ_{i≠j} H_ij² / samples``: exact for a diagonal Hessian.

  Args:
    loss: ``params -> scalar``.
    params: a pytree of real floating-point arrays.
    key: a random key.
    samples: how many vectors, >= 1; each costs one Hessian-vector product, and all
      are computed at once.

  Returns:
    Scalar, float32 or wider.

  Raises:
    ValueError: if ``samples`` is less than 1.
    TypeError: if a leaf of ``params`` is no real floating-point array.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from msam_optax.sharpness import hessian_trace
    >>> loss = lambda w: 1.5 * w[0] ** 2 - w[1] ** 2
    >>> print(hessian_trace(loss, jnp.ones(2), key=jax.random.key(0), samples=4))
    1.0

  References:
    Hutchinson, `A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines <https://doi.org/10.1080/03610919008812866>`_, 1990
  """
  from matfree import stochtrace

  if samples < 1:
    raise ValueError(f'`samples` must be 1 or more, got {samples}.')
  w, hvp = _hessian(loss, params)
  sampler = stochtrace.sampler_signs(w, num=samples)
  estimate = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_trace(), sampler)
  return estimate(hvp, key)


def hessian_eigenvalues(
  loss: Callable[[Any], Any],
  params: Any,
  *,
  k: int = 1,
  which: Which = 'largest',
  key: jax.Array,
) -> jax.Array:
  """The ``k`` largest or smallest eigenvalues of the Hessian.

  By Lanczos' method in a space of ``m = max(64, 4k)`` dimensions, which is restarted
  with its best vectors until the values have converged: ``m`` Hessian-vector products
  at first and about ``m/2`` more per restart, at most 100 of them. Where there are no
  more parameters than ``m`` the dense matrix is solved.

  Each value has converged when its residual ``‖Hv − λv‖``, which bounds the error, is
  below ``ε^⅔ |λ|``, which is 2e-5 of the value in float32 and 4e-11 in float64, or as
  small as the rounding of the products allows, at most ``16 ε ‖H‖``. The scale of the
  Hessian does not matter. Eigenvalues that dwarf those looked for, as 1e6 beside 1,
  are split off as soon as they are known, so that they do not set the accuracy.

  Args:
    loss: ``params -> scalar``.
    params: a pytree of real floating-point arrays, ``n`` numbers in all.
    k: how many, 1 <= k <= n.
    which: ``"largest"`` or ``"smallest"``, by value and not by magnitude.
    key: a random key, for the vector to start from.

  Returns:
    ``[k]``, float32 or wider, the outermost first; equal eigenvalues as often as they
    occur. NaN for a value that has not converged after the last restart: in large
    problems those inside a dense part of the spectrum.

  Raises:
    ValueError: if ``k`` or ``which`` is out of range.
    TypeError: if a leaf of ``params`` is no real floating-point array.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from msam_optax.sharpness import hessian_eigenvalues
    >>> loss = lambda w: 1.5 * w[0] ** 2 - w[1] ** 2
    >>> print(hessian_eigenvalues(loss, jnp.ones(2), k=2, key=jax.random.key(0)))
    [ 3. -2.]
  """
  w, hvp = _hessian(loss, params)
  _check_selection(k, which, w.size)
  steps = max(_krylov.STEPS, 4 * k)
  if w.size > steps:
    return _krylov.outermost_eigenvalues(hvp, w, k, steps, key, which, symmetric=True)
  values = _krylov.dense_eigenvalues(hvp, w, symmetric=True)
  return values[:k] if which == 'smallest' else values[::-1][:k]


def stability(
  loss: Callable[[Any], Any],
  params: Any,
  metric: metrics.Metric,
  rho: float | jax.Array,
  *,
  mask: Any = None,
  fixed_radius: bool = True,
  k: int | None = None,
  which: Which = 'smallest',
  key: jax.Array | None = None,
) -> jax.Array:
  """Eigenvalues that say whether a sharpness-aware flow is drawn to a point.

  The flow ``ẇ = −∇ℓ(w + δ(w))`` shrinks a small deviation in every direction where
  all eigenvalues of the matrix

      A = ∇²ℓ(w+δ) (I + ∂δ/∂w)

  have positive real parts. The paper (its eq. 10) holds the radius fixed when it
  differentiates: ``δ = Pg`` with a constant ``P``, so ``∂δ/∂w = P ∇²ℓ(w)``, and
  ``P = ρ/(‖g‖√(1+α²‖g‖²))`` for Monge SAM. The exact Jacobian includes the derivative
  of ``P``.

  ``k`` eigenvalues are found as by :func:`hessian_eigenvalues`, by Arnoldi's method.
  The residual of an eigenvalue bounds its error up to its condition number, since
  ``A`` is not symmetric.

  Args:
    loss: ``params -> scalar``.
    params: ``w``, a pytree of real floating-point arrays, ``n`` numbers in all.
    metric: ``G``, e.g. ``monge()``.
    rho: ``ρ``, scalar >= 0.
    mask: which leaves are perturbed, by default all; see :func:`perturb`.
    fixed_radius: the paper's form (for metrics that act on each coordinate by
      itself, and Monge over them), or else the exact Jacobian.
    k: how many eigenvalues; all by default, which takes the dense matrix.
    which: with ``k``, the ``"largest"`` or ``"smallest"`` real parts.
    key: with ``k``, a random key for the vector to start from.

  Returns:
    The real parts, ascending, ``[n]`` or ``[k]``, float32 or wider. One of ``k`` that
    has not converged is NaN.

  Raises:
    ValueError: if ``k`` or ``which`` is out of range, or ``k`` lacks its ``key``.
    TypeError: if a leaf of ``params`` is no real floating-point array.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean, monge
    >>> from msam_optax.sharpness import stability
    >>> loss, w = lambda w: (1 - w[0] * w[1]) ** 2, jnp.array([0.3, -0.3])
    >>> print(stability(loss, w, euclidean(), rho=0.5))  # the saddle at 0 attracts
    [ 0.5095 10.8281]
    >>> print(stability(loss, w, monge(), rho=0.5))
    [-0.354   7.7885]

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025
  """
  w, unravel = _flat(params)
  mask = _masks.resolve_mask(mask, params)

  def gradient(w):
    return jax.grad(lambda v: loss(unravel(v)))(w)

  def direction(g, w):
    # The metric sees the tree: which leaves are weights, say, depends on it.
    ascent = _ascent(metric, unravel(g), unravel(w), mask, rho, jax.grad(loss))
    return _flat(ascent.direction)[0]

  rho = _numerics.widen(rho, like=w)
  g = gradient(w)
  probe = w + rho * direction(g, w)
  if fixed_radius:
    scale = rho * _coordinate_scale(lambda g: direction(g, w), g)
    displaced = lambda v: v + scale * (gradient(v) - g)
  else:
    displaced = lambda v: v + rho * direction(gradient(v), v)

  def matvec(v):
    _, moved = jax.jvp(displaced, (w,), (v,))
    return jax.jvp(gradient, (probe,), (moved,))[1]

  if k is None:
    return _krylov.dense_eigenvalues(matvec, w, symmetric=False)
  _check_selection(k, which, w.size)
  if key is None:
    raise ValueError('`k` eigenvalues are found from a random start: give `key`.')
  steps = max(_krylov.STEPS, 4 * k)
  if w.size > steps:
    values = _krylov.outermost_eigenvalues(
      matvec, w, k, steps, key, which, symmetric=False
    )
    return values if which == 'smallest' else values[::-1]
  values = _krylov.dense_eigenvalues(matvec, w, symmetric=False)
  return values[:k] if which == 'smallest' else values[-k:]


def _ascent(metric, grads, params, mask, rho, grad_fn):
  """The ascent over the leaves of a mask, with a direction of zero in all others."""
  state = metric.init(_masks.restrict(params, mask))
  extra_args = {'space': spaces.LOCAL, 'rho': rho, 'grad_fn': grad_fn}
  ascent, _ = metrics.ascend_on(mask, metric, grads, state, params, extra_args)
  return ascent._replace(direction=metrics.directions_of_all(ascent, mask, grads))


def _flat(params):
  """The parameters as one vector, float32 or wider, and the way back."""
  _checks.check_real(params)
  dtype = _numerics.wide_dtype(params)
  vector, unravel = flatten_util.ravel_pytree(
    jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  )

  def restore(v):
    return jax.tree.map(lambda x, p: _numerics.widen(x, like=p), unravel(v), params)

  return jnp.asarray(vector, dtype), restore


def _hessian(loss, params):
  """The parameters as a vector, and the product of the Hessian with one."""
  w, unravel = _flat(params)
  gradient = jax.grad(lambda v: loss(unravel(v)))
  return w, lambda v: jax.jvp(gradient, (w,), (v,))[1]


def _check_selection(k, which, size):
  if not 1 <= k <= size:
    raise ValueError(
      f'`k` must be from 1 to {size}, the number of parameters, got {k}.'
    )
  if which not in ('largest', 'smallest'):
    raise ValueError(f'`which` must be "largest" or "smallest", got {which!r}.')


def _coordinate_scale(direction, g):
  """``P`` with ``direction(g) = Pg`` coordinate by coordinate, as a vector.

  Where ``dᵢ = gᵢ Pᵢ(g)`` is zero its derivative is ``Pᵢ``, since those of ``Pᵢ`` are
  multiplied by ``gᵢ``: one derivative gives the limits in all these coordinates.
  """
  d = direction(g)
  unseen = d == 0
  _, limit = jax.jvp(direction, (g,), (unseen.astype(g.dtype),))
  scale = jnp.where(unseen, limit, d / jnp.where(unseen, 1.0, g))
  return jnp.where(jnp.all(unseen), 0.0, scale)
