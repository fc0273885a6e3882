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
from collections.abc import Mapping
import functools
import inspect
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import _checks
from msam_optax import _hyperparameters
from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import spaces


class Ascent(NamedTuple):
  """The steepest ascent under a metric ``G``.

  Attributes:
    direction: pytree like the gradients, in their dtypes or wider:
      ``G⁻¹g/√(gᵀG⁻¹g)``, of length one under ``G``; zero where the gradient is zero or
      not finite, or its length is too large or too small for a normal floating-point
      number.
    slope: scalar, float32 or wider: ``√(gᵀG⁻¹g) = ⟨g, direction⟩``, the rise in
      the loss per unit of radius; zero where the direction is.
    length: scalar, ``‖direction‖₂``, float32 or wider, if the metric knows it without
      reading the direction again. If it is None, the default, a method measures how far
      it has moved.
  """

  direction: Any
  slope: jax.Array
  length: jax.Array | None = None


class Metric(NamedTuple):
  """A pair of pure functions, as an Optax transformation is.

  Attributes:
    init: ``params -> state``. A metric without state returns a tree without
      leaves.
    ascend: ``(grads, state, params, *, space, **extra_args) -> (Ascent, state)``; the
      direction is zero, not NaN, where the whole gradient is, and a gradient that is
      not finite must not stay in the state. Sums over all leaves are
      those of ``space``, a :class:`Space`, so that they are right on several devices.
      The extra arguments are those of ``update`` (whatever the user gives) and two
      more: ``rho``, the radius of this step, and ``grad_fn``, which returns gradients
      at other params.

  Both functions see the leaves that are perturbed, and no others: an
  ``optax.MaskedNode`` replaces what ``mask`` leaves out. So ``δᵀGδ = ρ²`` for the
  leaves that move, and a state has nothing of frozen ones. (Mask out what has no
  gradient: ``init`` cannot know which gradients will be None.) What ``grad_fn`` takes
  and returns has the same structure.

  Examples:
    A metric of your own: a matrix for a vector of parameters, and Monge over it.

    >>> import jax.numpy as jnp, optax
    >>> import msam_optax
    >>> def quadratic(B):
    ...   def ascend(grads, state, params, *, space=msam_optax.LOCAL, **extra_args):
    ...     unit, norm = space.normalize(grads)
    ...     u = jnp.linalg.solve(B, unit)
    ...     root = jnp.sqrt(space.dot(unit, u))
    ...     direction = jnp.where(norm > 0, u / root, 0.0).astype(grads.dtype)
    ...     return msam_optax.Ascent(direction, norm * root), state
    ...   return msam_optax.Metric(lambda params: optax.EmptyState(), ascend)
    >>> metric = msam_optax.monge(0.5, base=quadratic(jnp.diag(jnp.array([1.0, 4.0]))))
    >>> g = jnp.array([1.0, 2.0])
    >>> ascent, _ = metric.ascend(g, metric.init(g), g)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [0.5774 0.2887] 1.155
  """

  init: Callable[[Any], Any]
  ascend: Callable[..., tuple[Ascent, Any]]


def _diagonal(scale: Callable[[Any, Any, Any], Any], eta: Any) -> Metric:
  """The metric ``G = T⁻²`` for ``T = scale(eta, grads, params)``, without state."""

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    del extra_args
    dtype = _numerics.wide_dtype(grads)
    eta_now = jnp.asarray(_hyperparameters.value_at('eta', eta), dtype)

    def widths(sources):
      T = scale(*sources)
      return jax.tree.map(lambda t: jnp.asarray(t, dtype), T)

    def scaled(sources):
      _, grads, _ = sources
      widen = lambda t, g: t * jnp.asarray(g, dtype)
      return jax.tree.map(widen, widths(sources), grads)

    sources = eta_now, grads, params
    unit, norm = space.normalize(sources, scaled)
    T = widths(sources)
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

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    del params, extra_args
    unit, norm = space.normalize(grads)
    direction = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), unit, grads)
    return Ascent(
      direction, norm, jnp.where(norm > 0, 1.0, 0.0).astype(norm.dtype)
    ), state

  return Metric(lambda params: optax.EmptyState(), ascend)


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
  _hyperparameters.check_number('eta', eta)
  if weights is None:
    weights = _masks.weights_by_default

  def scale(eta, grads, params):
    del grads
    if params is None:
      raise ValueError(
        'adaptive() measures lengths relative to the parameters: pass them, as'
        ' in `tx.update(grads, state, params)`.'
      )
    return jax.tree.map(
      lambda is_weight, w: (
        jnp.abs(_numerics.widen(w)) + _numerics.widen(eta, like=w) if is_weight else 1.0
      ),
      _masks.resolve_mask(weights, params, name='weights'),
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
  _hyperparameters.check_number('eta', eta)

  def of_leaf(eta, g):
    eta, g = _numerics.widen(eta, like=g), _numerics.widen(g)
    # The square does not go by way of √η, which has no derivative at 0.
    root = jnp.sqrt(jax.lax.stop_gradient(eta))
    return _numerics.inverse_hypot(root * g, eta * g * g)

  def scale(eta, grads, params):
    del params
    return jax.tree.map(functools.partial(of_leaf, eta), grads)

  return _diagonal(scale, eta)


def ascend_on(
  mask: Any,
  metric: Metric,
  grads: Any,
  state: Any,
  params: Any,
  extra_args: Mapping[str, Any],
) -> tuple[Ascent, Any]:
  """The metric's ascent over some of the leaves, as if there were no others.

  Args:
    mask: which leaves, a tree of bools like ``grads``.
    metric: the metric.
    grads: pytree of arrays.
    state: the metric's state, made for these leaves.
    params: pytree like ``grads``, or None.
    extra_args: what else the metric gets, ``space`` among it. A ``grad_fn`` is one of
      all leaves here, and the metric gets one of these.

  Returns:
    The ascent, whose direction has an ``optax.MaskedNode`` for all other leaves, and
    the metric's next state.

  Raises:
    TypeError: if the metric does not return an Ascent and a state.
    ValueError: if the direction is not like the gradients, or the slope no scalar.
  """
  extra_args = dict(extra_args)
  if (grad_fn := extra_args.get('grad_fn')) is not None:
    extra_args['grad_fn'] = lambda part: _masks.restrict(
      grad_fn(_masks.extend(part, mask, params)), mask
    )
  some_grads = _masks.restrict(grads, mask)
  some_params = None if params is None else _masks.restrict(params, mask)
  result = metric.ascend(some_grads, state, some_params, **extra_args)
  _check_result(result, some_grads)
  return result


def directions_of_all(ascent: Ascent, mask: Any, grads: Any) -> Any:
  """The direction in the gradients' dtypes, zero for the leaves that it lacks."""
  return jax.tree.map(
    lambda has, d, g: d.astype(g.dtype) if has else jnp.zeros_like(g),
    mask,
    ascent.direction,
    grads,
  )


def check_metric(name: str, metric: Any) -> None:
  """Raises unless ``metric`` is a :class:`Metric` that can be called as one."""
  if not isinstance(metric, Metric):
    hint = ''
    if isinstance(metric, optax.GradientTransformation):
      hint = ' That is a transformation: it belongs in a chain, before an optimizer.'
    elif callable(metric):
      hint = ' Call the function that makes it.'
    raise TypeError(
      f'`{name}` must be a Metric, such as `monge()` or `euclidean()`, got'
      f' {metric!r}.{hint}'
    )
  try:
    inspect.signature(metric.ascend).bind(
      None, None, None, space=None, rho=None, grad_fn=None, any_other=None
    )
  except TypeError as error:
    raise TypeError(
      f'The `ascend` of the Metric given as `{name}` cannot be called as one ({error}).'
      ' Write it as `def ascend(grads, state, params, *, space, **extra_args)`, and'
      ' sum over leaves by `space.dot` and `space.normalize`.'
    ) from None
  except ValueError:  # Some functions have no signature.
    pass


def _check_result(result, grads):
  is_pair = isinstance(result, tuple) and len(result) == 2
  if not is_pair or not isinstance(result[0], Ascent):
    raise TypeError(
      'The `ascend` of a Metric must return `(Ascent(direction, slope), state)`, but'
      f' it returns a {type(result).__name__}. One without a state returns the state'
      ' that it gets.'
    )
  direction, slope, length = result[0]
  if jnp.shape(slope):
    raise ValueError(
      'The slope that a metric returns must be a scalar, but its shape is'
      f' {jnp.shape(slope)}.'
    )
  if length is not None and jnp.shape(length):
    raise ValueError(
      'The length of the direction that a metric returns must be a scalar or None, but'
      f' its shape is {jnp.shape(length)}.'
    )
  what = 'The direction that a metric returns must be like the gradients that it gets'
  _checks.check_like(direction, grads, what=what, dtypes=False)
