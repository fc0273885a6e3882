"""Sharpness: how far the loss rises near by, and how it is curved there.

Everything is jit-able and works on any pytree of parameters. Without a dense matrix
are the trace (Hutchinson's estimator) and extreme eigenvalues (Krylov spaces), both
by matfree, which the extra ``msam-optax[sharpness]`` installs.
"""

from collections.abc import Callable
from typing import Any
from typing import Literal
from typing import NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp

from msam_optax.metrics import Metric
from msam_optax.numerics import widen
from msam_optax.perturbation import ascend
from msam_optax.perturbation import perturb

Which = Literal['largest', 'smallest']

# Krylov spaces of this many dimensions resolve the ends of a spectrum; a problem
# that is not larger is solved densely.
KRYLOV_STEPS = 64


class Rise(NamedTuple):
  """How far the loss rises at the probe.

  Attributes:
    measured: scalar, ``ℓ(w+δ) − ℓ(w)``.
    predicted: scalar, to first order in ρ: ``ρ · slope``.
  """

  measured: jax.Array
  predicted: jax.Array


def rise(
  loss: Callable[[Any], Any],
  params: Any,
  metric: Metric,
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
    mask: which leaves are moved, by default all; see :func:`perturb`.

  Returns:
    A :class:`Rise`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean
    >>> from msam_optax.sharpness import rise
    >>> measured, predicted = rise(
    ...     lambda w: jnp.sum(w**2), jnp.array([0.6, 0.8]), euclidean(), rho=0.5)
    >>> print(f'{measured:.2f} {predicted:.2f}')
    1.25 1.00
  """
  value, grads = jax.value_and_grad(loss)(params)
  ascent, _ = ascend(metric, grads, metric.init(params), params, mask=mask)
  at_probe = loss(perturb(params, ascent, rho, mask=mask))
  return Rise(at_probe - value, widen(rho, like=ascent.slope) * ascent.slope)


def mean_rise(
  loss: Callable[[Any, Any], Any],
  params: Any,
  shards: Any,
  metric: Metric,
  rho: float | jax.Array,
  *,
  mask: Any = None,
) -> Rise:
  """The rise of :func:`rise`, averaged over shards of data: m-sharpness.

  Each shard has a gradient and a perturbation of its own:
  ``mean_b [ℓ_b(w + δ(∇ℓ_b)) − ℓ_b(w)]``. The shards are taken one after the other.

  Args:
    loss: ``(params, shard) -> scalar``.
    params: ``w``, a pytree of real floating-point arrays.
    shards: pytree of arrays ``[m, …]``: ``m`` shards of data, stacked.
    metric: ``G``, e.g. ``monge()``.
    rho: ``ρ``, scalar >= 0.
    mask: which leaves are moved, by default all; see :func:`perturb`.

  Returns:
    A :class:`Rise` of means over the shards.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean
    >>> from msam_optax.sharpness import mean_rise
    >>> loss = lambda w, x: jnp.sum((w - x) ** 2)
    >>> shards = jnp.array([[1.0], [-1.0]])  # their gradients cancel out
    >>> print(mean_rise(loss, jnp.zeros(1), shards, euclidean(), rho=0.5).measured)
    1.25
  """

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
      are taken at once.

  Returns:
    Scalar, float32 or wider.

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

  By Lanczos' method with full orthogonalisation, ``max(64, 4k)`` Hessian-vector
  products; exact where there are no more parameters than that.

  Args:
    loss: ``params -> scalar``.
    params: a pytree of real floating-point arrays, ``n`` numbers in all.
    k: how many, 1 <= k <= n.
    which: ``"largest"`` or ``"smallest"``, by value and not by magnitude.
    key: a random key, for the vector to start from.

  Returns:
    ``[k]``, float32 or wider, the outermost first. In large problems eigenvalues that
    are equal count once, and NaN stands where there are fewer than ``k`` distinct ones.

  Raises:
    ValueError: if ``k`` or ``which`` is out of range.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from msam_optax.sharpness import hessian_eigenvalues
    >>> loss = lambda w: 1.5 * w[0] ** 2 - w[1] ** 2
    >>> print(hessian_eigenvalues(loss, jnp.ones(2), k=2, key=jax.random.key(0)))
    [ 3. -2.]
  """
  w, hvp = _hessian(loss, params)
  _check_selection(k, which, w.size)
  steps = max(KRYLOV_STEPS, 4 * k)
  if w.size <= steps:
    values = jnp.linalg.eigvalsh(_dense(hvp, w))
  else:
    values = _krylov(hvp, w, steps, key, which, symmetric=True)
  return values[:k] if which == 'smallest' else values[::-1][:k]


def stability(
  loss: Callable[[Any], Any],
  params: Any,
  metric: Metric,
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
  ``P = ρ/(‖g‖√(1+α²‖g‖²))`` for Monge SAM. The exact Jacobian has the derivative of
  ``P``, too.

  Args:
    loss: ``params -> scalar``.
    params: ``w``, a pytree of real floating-point arrays, ``n`` numbers in all.
    metric: ``G``, e.g. ``monge()``.
    rho: ``ρ``, scalar >= 0.
    mask: which leaves are moved, by default all; see :func:`perturb`.
    fixed_radius: the paper's form (for metrics that act on each coordinate by
      itself, and Monge over them), or else the exact Jacobian.
    k: how many eigenvalues; all by default, which takes the dense matrix.
    which: with ``k``, the ``"largest"`` or ``"smallest"`` real parts.
    key: with ``k``, a random key for the vector to start from.

  Returns:
    ``[n]`` or ``[k]``, float32 or wider: real parts, ascending.

  Raises:
    ValueError: if ``k`` or ``which`` is out of range, or ``k`` lacks its ``key``.

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
  w, unravel = flatten_util.ravel_pytree(jax.tree.map(widen, params))

  def gradient(w):
    return jax.grad(lambda v: loss(unravel(v)))(w)

  def delta(g, w):
    # The metric sees the tree: which leaves are weights, say, depends on it.
    tree = unravel(w)
    ascent, _ = ascend(metric, unravel(g), metric.init(tree), tree, mask=mask)
    return rho * flatten_util.ravel_pytree(ascent.direction)[0]

  g = gradient(w)
  probe = w + delta(g, w)
  if fixed_radius:
    scale = _coordinate_scale(delta, g, w)
    displaced = lambda v: v + scale * (gradient(v) - g)
  else:
    displaced = lambda v: v + delta(gradient(v), v)

  def matvec(v):
    _, moved = jax.jvp(displaced, (w,), (v,))
    return jax.jvp(gradient, (probe,), (moved,))[1]

  if k is None:
    return jnp.sort(jnp.real(jnp.linalg.eigvals(_dense(matvec, w))))
  _check_selection(k, which, w.size)
  if key is None:
    raise ValueError('`k` eigenvalues are found from a random start: give `key`.')
  steps = max(KRYLOV_STEPS, 4 * k)
  if w.size <= steps:
    values = jnp.sort(jnp.real(jnp.linalg.eigvals(_dense(matvec, w))))
  else:
    values = _krylov(matvec, w, steps, key, which, symmetric=False)
  return values[:k] if which == 'smallest' else values[-k:]


def _hessian(loss, params):
  """The parameters as a vector, and the product of the Hessian with one."""
  w, unravel = flatten_util.ravel_pytree(jax.tree.map(widen, params))
  gradient = jax.grad(lambda v: loss(unravel(v)))
  return w, lambda v: jax.jvp(gradient, (w,), (v,))[1]


def _dense(matvec, w):
  return jax.vmap(matvec, out_axes=1)(jnp.eye(w.size, dtype=w.dtype))


def _check_selection(k, which, size):
  if not 1 <= k <= size:
    raise ValueError(
      f'`k` must be from 1 to {size}, the number of parameters, got {k}.'
    )
  if which not in ('largest', 'smallest'):
    raise ValueError(f'`which` must be "largest" or "smallest", got {which!r}.')


def _coordinate_scale(delta, g, w):
  """``P`` with ``δ = Pg`` coordinate by coordinate, as a vector."""
  largest = jnp.max(jnp.abs(g), initial=0.0)
  # Where a coordinate of g is zero the quotient's limit is needed: go near it.
  finfo = jnp.finfo(g.dtype)
  near = jnp.where(g == 0, jnp.maximum(finfo.eps * largest, finfo.tiny), g)
  return jnp.where(largest > 0, delta(near, w) / jnp.where(largest > 0, near, 1.0), 0.0)


def _krylov(matvec, w, steps, key, which, *, symmetric):
  """Ritz values, sorted; NaN for steps after the Krylov space was exhausted."""
  from matfree import decomp

  if symmetric:
    factorise = decomp.tridiag_sym(steps)
  else:
    factorise = decomp.hessenberg(steps, reortho='full')
  start = jax.random.normal(key, w.shape, w.dtype)
  small = jnp.asarray(factorise(matvec, start).J_small)
  # After an exhausted space (fewer distinct eigenvalues than steps) matfree goes on
  # with rounding errors, whose Ritz values are spurious: put them out of sight.
  bound = 1 + 2 * jnp.max(jnp.nansum(jnp.abs(small), axis=1))
  below = jnp.abs(jnp.diagonal(small, -1))
  going = jnp.cumprod(below > steps * jnp.finfo(w.dtype).eps * bound) > 0
  alive = jnp.concatenate([jnp.array([True]), going])
  beyond = bound if which == 'smallest' else -bound
  small = jnp.where(alive[:, None] & alive[None], small, beyond * jnp.eye(steps))
  if symmetric:
    values = jnp.linalg.eigvalsh(small)
  else:
    values = jnp.sort(jnp.real(jnp.linalg.eigvals(small)))
  return jnp.where(jnp.abs(values) > 0.9 * bound, jnp.nan, values)
