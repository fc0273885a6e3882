"""Metrics: which way is uphill, and how steep it is there.

A metric assigns to the parameters ``w`` a positive definite matrix ``G``. In
the ball ``δᵀGδ ≤ ρ²`` the first-order rise of the loss, ``⟨g, δ⟩`` for its
gradient ``g``, is largest at

    δ = ρ G⁻¹g / √(gᵀG⁻¹g),     and is     ρ √(gᵀG⁻¹g)     there.

The first factor without ``ρ`` is the ascent *direction*, the second the *slope*.
They, and not ``G⁻¹g`` and a squared norm, are what a metric computes, because
they neither overflow nor underflow.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax.hyperparameters import check_hyperparameter
from msam_optax.hyperparameters import check_number
from msam_optax.hyperparameters import Hyperparameter
from msam_optax.hyperparameters import is_schedule
from msam_optax.hyperparameters import value_at
from msam_optax.masks import resolve_mask
from msam_optax.masks import weights_by_default
from msam_optax.numerics import is_infinite
from msam_optax.numerics import normalize
from msam_optax.numerics import wide_dtype
from msam_optax.numerics import widen


class Ascent(NamedTuple):
  """The steepest ascent under a metric ``G``.

  Attributes:
    direction: pytree like the gradients, in their dtypes: ``G⁻¹g/√(gᵀG⁻¹g)``, of
      length one under ``G``; zero where the gradient is zero or not finite, or its
      length is too large or too small for a normal floating-point number.
    slope: scalar, float32 or wider: ``√(gᵀG⁻¹g) = ⟨g, direction⟩``, the rise in
      the loss per unit of radius; zero where the direction is.
  """

  direction: Any
  slope: jax.Array


class Metric(NamedTuple):
  """A pair of pure functions, as an Optax transformation is.

  Attributes:
    init: ``params -> state``. A metric without state returns a tree without
      leaves.
    ascend: ``(grads, state, params) -> (Ascent, state)``; the direction is zero, not
      NaN, where the gradient is. If it is to work on
      parameters that are sharded inside ``shard_map``, it also takes ``param_specs=``,
      their ``PartitionSpec``s, and sums over the axes that they name.
  """

  init: Callable[[Any], Any]
  ascend: Callable[..., tuple[Ascent, Any]]


class MongeState(NamedTuple):
  """State of :func:`monge` where ``alpha`` is a schedule.

  Attributes:
    count: int32 scalar, the steps so far.
    base: the base metric's state.
  """

  count: Any
  base: Any


def _diagonal(scale: Callable[[Any, Any, Any], Any], eta: Any = 0.0) -> Metric:
  """The metric ``G = T⁻²`` for ``T = scale(eta, grads, params)``, without state."""

  def ascend(grads, state, params, *, param_specs=None):
    dtype = wide_dtype(grads)
    eta_now = jnp.asarray(value_at('eta', eta), dtype)
    T = scale(eta_now, grads, params)
    T = jax.tree.map(lambda t: jnp.asarray(t, dtype), T)
    h = jax.tree.map(lambda t, g: t * jnp.asarray(g, dtype), T, grads)
    unit, norm = normalize(h, param_specs)
    # A NaN for eta is seen, where the norm of what is not finite would be zero.
    zero = jnp.where(jnp.isnan(eta_now), eta_now, 0.0)
    direction = jax.tree.map(
      lambda t, u, g: jnp.where(norm > 0, t * u, zero).astype(jnp.result_type(g)),
      T,
      unit,
      grads,
    )
    return Ascent(direction, norm + zero), state

  return Metric(lambda params: optax.EmptyState(), ascend)


def euclidean() -> Metric:
  """The metric of SAM, ``G = I``: the direction is ``g/‖g‖``, the slope ``‖g‖``.

  The norm is taken over the whole tree, in float32 or wider, and scaled by the
  largest magnitude, so that gradients of 1e-30 and 1e+30 keep their direction.

  Returns:
    A :class:`Metric` without state.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean
    >>> metric = euclidean()
    >>> ascent, _ = metric.ascend(jnp.array([3e30, 4e30]), metric.init(None), None)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [0.6 0.8] 5e+30

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  return _diagonal(lambda eta, grads, params: jax.tree.map(lambda _: 1.0, grads))


def adaptive(eta: float | jax.Array = 0.01, *, weights: Any = None) -> Metric:
  """The metric of ASAM, ``G = T⁻²`` with ``T = |w| + η``: steps relative to ``w``.

  The direction is ``T²g/‖Tg‖``, the slope ``‖Tg‖``. As in the authors' code ``T``
  is ``|w| + η`` on weights and 1 on biases. With ``η = 0`` and every leaf a weight
  the metric does not depend on the scale of each coordinate.

  Args:
    eta: ``η``, scalar >= 0. Lets weights that are zero move.
    weights: which leaves are weights: a tree of bools with the structure of the
      params (or a prefix of it), or a function from params to one, such as
      ``by_name('kernel', 'embedding')``. By default the leaves of two or more
      dimensions whose own name is none of ``bias``, ``b``, ``scale``, ``offset``,
      ``beta`` and ``gamma``. That is right for Flax and Haiku, whether or not layers
      are stacked (``nn.scan``, ``nnx.vmap``). It is wrong for stacked leaves without
      such a name, as a vmapped ``eqx.nn.LayerNorm`` has (with one stacked axis
      everywhere, say ``lambda params: jax.tree.map(lambda w: w.ndim > 2, params)``),
      and for a matrix that is called ``b``.

  Returns:
    A :class:`Metric` without state; ``ascend`` needs the params.

  Raises:
    ValueError: if ``eta`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import adaptive
    >>> metric = adaptive(eta=0.0)
    >>> w, g = jnp.array([[3.0, 0.5]]), jnp.array([[1.0, 8.0]])
    >>> ascent, _ = metric.ascend(g, metric.init(w), w)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [[1.8 0.4]] 5

  References:
    Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  check_number('eta', eta)
  if weights is None:
    weights = weights_by_default

  def scale(eta, grads, params):
    del grads
    if params is None:
      raise ValueError(
        'adaptive() measures lengths relative to the parameters: pass them, as'
        ' in `tx.update(grads, state, params)`.'
      )
    return jax.tree.map(
      lambda is_weight, w: jnp.abs(widen(w)) + widen(eta, like=w) if is_weight else 1.0,
      resolve_mask(weights, params, name='weights'),
      params,
    )

  return _diagonal(scale, eta)


def diagonal_fisher(eta: float | jax.Array = 1.0) -> Metric:
  """The metric of Fisher SAM, ``G = I + η diag(g²)``.

  ``g²``, the squares of the batch gradient, is the usual estimate of the diagonal
  of the Fisher matrix. It is also the diagonal of the Monge metric with ``α² = η``.
  The direction is ``u/√⟨g, u⟩`` and the slope ``√⟨g, u⟩`` with ``u = g/(1 + η g²)``.

  Args:
    eta: ``η``, scalar >= 0: how much a steep coordinate is held back.

  Returns:
    A :class:`Metric` without state.

  Raises:
    ValueError: if ``eta`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import diagonal_fisher
    >>> metric = diagonal_fisher(eta=1.0)
    >>> ascent, _ = metric.ascend(jnp.array([1.0, 0.0]), metric.init(None), None)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [0.7071 0.    ] 0.7071

  References:
    Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
    <https://arxiv.org/abs/2206.04920>`_, 2022
  """
  check_number('eta', eta)

  def of_leaf(eta, g):
    eta, g = widen(eta, like=g), widen(g)
    # The square does not go by way of √η, which has no derivative at 0.
    root = jnp.sqrt(jax.lax.stop_gradient(eta))
    return _inverse_hypot(root * g, eta * g * g)

  def scale(eta, grads, params):
    del params
    return jax.tree.map(functools.partial(of_leaf, eta), grads)

  return _diagonal(scale, eta)


def monge(alpha: Hyperparameter = 1.0, base: Metric = euclidean()) -> Metric:
  """The Monge metric ``G = B + α² g gᵀ`` over any metric ``B``.

  It is the metric that the graph of the loss, ``{(w, αℓ(w))}``, has as a surface:
  moving uphill is long, moving along a level set is as long as under ``B``. By
  Sherman–Morrison its direction and slope are those of the base divided by
  ``√(1 + α²s²)``, where ``s`` is the base's slope. So over the Euclidean metric

      δ = ρ g / (‖g‖ √(1 + α²‖g‖²)),

  SAM's perturbation where the gradient is small, and ever less where it is large.
  The slope is less than ``1/α``: **``ρ/α`` is the largest first-order rise of the
  loss that Monge SAM allows.** ``α = 0`` is the base, and the paper has ``α = 1``.

  Unlike SAM's, this perturbation depends on the scale of the loss: a loss ``c``
  times as large acts as ``c`` times the ``α``. Average, unscale and reduce
  gradients before they come here.

  Args:
    alpha: ``α``, scalar >= 0: a number, an array or an Optax schedule. A schedule
      is counted in calls and makes the metric one with state.
    base: the metric ``B``.

  Returns:
    A :class:`Metric` with the base's state; in a :class:`MongeState` if ``alpha`` is
    a schedule.

  Raises:
    ValueError: if ``alpha`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import monge
    >>> metric = monge(alpha=1.0)
    >>> ascent, _ = metric.ascend(jnp.array([0.0, 0.75]), metric.init(None), None)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [0.  0.8] 0.6

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025

    Hartmann et al., `Lagrangian Manifold Monte Carlo on Monge Patches
    <https://arxiv.org/abs/2202.00755>`_, 2022
  """
  check_hyperparameter('alpha', alpha)
  check_metric('base', base)

  def init(params):
    base_state = base.init(params)
    if is_schedule(alpha):
      return MongeState(jnp.zeros([], jnp.int32), base_state)
    return base_state

  def ascend(grads, state, params, **kwargs):
    if not is_schedule(alpha):
      ascent, state = base.ascend(grads, state, params, **kwargs)
      return _add_gradient_outer_product(ascent, value_at('alpha', alpha)), state
    ascent, base_state = base.ascend(grads, state.base, params, **kwargs)
    ascent = _add_gradient_outer_product(ascent, value_at('alpha', alpha, state.count))
    return ascent, MongeState(optax.safe_increment(state.count), base_state)

  return Metric(init, ascend)


def check_metric(name: str, metric: Any) -> None:
  """Raises unless ``metric`` is a :class:`Metric`."""
  if not isinstance(metric, Metric):
    raise TypeError(
      f'`{name}` must be a Metric, such as `monge()` or `euclidean()`, got {metric!r}.'
    )


def _inverse_hypot(x, square=None):
  """``1/√(1 + x²)``, also where ``x²`` overflows; ``square`` may say what ``x²`` is."""
  largest = 1.0 / jnp.finfo(x.dtype).eps
  huge = jnp.abs(x) > largest
  square = jnp.square(jnp.where(huge, 0.0, x)) if square is None else square
  small = 1.0 / jnp.sqrt(1.0 + jnp.where(huge, 0.0, square))
  return jnp.where(huge, 1.0 / jnp.where(huge, jnp.abs(x), 1.0), small)


def _add_gradient_outer_product(ascent: Ascent, alpha: Any) -> Ascent:
  s = ascent.slope
  alpha = widen(alpha, like=s)
  factor = _inverse_hypot(alpha * s)
  direction = jax.tree.map(
    lambda d: (widen(d) * factor.astype(wide_dtype(d))).astype(d.dtype),
    ascent.direction,
  )
  # Where the product is too large for a number, the slope has its limit, 1/α.
  beyond = is_infinite(alpha * s)
  limit = 1.0 / jnp.where(beyond, alpha, 1.0)
  return Ascent(direction, jnp.where(beyond, limit, s * factor))
