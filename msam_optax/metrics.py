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
import inspect
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import _devices
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
  """

  direction: Any
  slope: jax.Array


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

  Both functions see the leaves that are perturbed, and no others: in the place of what
  ``mask`` leaves out is an ``optax.MaskedNode``. So ``δᵀGδ = ρ²`` for the leaves that
  move, and a state has nothing of frozen ones. (Mask out what has no gradient: ``init``
  cannot know which gradients will be None.) What ``grad_fn`` takes and returns has
  the same structure.

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


def _diagonal(scale: Callable[[Any, Any, Any], Any], eta: Any = 0.0) -> Metric:
  """The metric ``G = T⁻²`` for ``T = scale(eta, grads, params)``, without state."""

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    del extra_args
    dtype = _numerics.wide_dtype(grads)
    eta_now = jnp.asarray(_hyperparameters.value_at('eta', eta), dtype)
    T = scale(eta_now, grads, params)
    T = jax.tree.map(lambda t: jnp.asarray(t, dtype), T)
    h = jax.tree.map(lambda t, g: t * jnp.asarray(g, dtype), T, grads)
    unit, norm = space.normalize(h)
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


def max_norm() -> Metric:
  """The norm ``max|δᵢ|``: the direction is ``sign(g)``, the slope ``‖g‖₁``.

  No matrix ``G`` belongs to it; it is a norm, with the direction of unit length along
  which the loss rises most. Every coordinate moves by the radius, except where its
  gradient is zero. So ``δ`` is ``√d`` times as long as ``ρ`` says, for ``d``
  parameters: divide a radius that is right for SAM by ``√d``.

  Returns:
    A :class:`Metric` without state.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import max_norm
    >>> metric = max_norm()
    >>> ascent, _ = metric.ascend(jnp.array([3.0, 0.0, -4.0]), metric.init(None), None)
    >>> print(ascent.direction, f'{ascent.slope:.4g}')
    [ 1.  0. -1.] 7

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021 (equation 2 with p = ∞)
  """

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    del params, extra_args
    signs = jax.tree.map(jnp.sign, grads)
    slope = space.dot(signs, grads)
    usable = (slope > 0) & jnp.isfinite(slope)
    return _only_where(usable, Ascent(signs, slope)), state

  return Metric(lambda params: optax.EmptyState(), ascend)


def spectral(other: Metric = euclidean(), *, matrices: Any = None) -> Metric:
  """The spectral norm of each matrix: the geometry of Muon.

  Of a matrix with the gradient ``g = UΣVᵀ`` the direction is ``UVᵀ`` and the slope
  ``tr Σ``, the nuclear norm. The leaves that are no matrices have together the
  direction and slope of ``other``. The norm of the whole is the largest of these
  norms, so that each moves by the full radius, and the slope is the sum of theirs.

  A radius is a spectral norm here: the Frobenius norm of a ``δ`` of rank ``r`` is
  ``√r`` times as large. A radius that is right for SAM is to be divided by about the
  root of the sum of all ranks.

  ``UVᵀ`` is computed by the Newton–Schulz steps of ``optax.contrib.muon``: five with
  Muon's coefficients, which leave singular values between 0.7 and 1.2, and three that
  converge to 1. A singular value of ``g`` above 0.001 of the Frobenius norm becomes 1
  to four digits. A smaller one, ``σ‖g‖``, becomes less than 1, about ``3200 σ``, and
  one that is zero stays so to rounding: a gradient of low rank has a direction of low
  rank. The largest is 1 always, so the direction has unit length, and the slope is
  ``⟨g, direction⟩`` always; it is below the nuclear norm by at most the sum of the
  small singular values.

  Args:
    other: the metric of all leaves that are no matrices, together.
    matrices: which leaves are matrices, in Optax's convention for masks, such as
      ``by_name('kernel')``; each must have two axes. By default the leaves of two
      dimensions that :func:`adaptive` counts as weights.

  Returns:
    A :class:`Metric` with the state of ``other``.

  Raises:
    TypeError: if ``other`` is no metric.
    ValueError: when called, if ``matrices`` does not fit, or selects a leaf that has
      not two axes or is sharded by ``param_specs``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import spectral
    >>> metric = spectral()
    >>> g = {'kernel': jnp.array([[0.0, 5.0], [0.5, 0.0]]), 'bias': jnp.array([3.0])}
    >>> ascent, _ = metric.ascend(g, metric.init(g), g)
    >>> print(ascent.direction['kernel'], ascent.direction['bias'])
    [[0. 1.]
     [1. 0.]] [1.]
    >>> print(f'{ascent.slope:.4g}')
    8.5

  References:
    Jordan et al., `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_, 2024

    Bernstein & Newhouse, `Old Optimizer, New Norm: An Anthology
    <https://arxiv.org/abs/2409.20325>`_, 2024
  """
  check_metric('other', other)

  def init(params):
    return other.init(_masks.restrict(params, _others(matrices, params)))

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    others = _others(matrices, grads if params is None else params)
    chosen = jax.tree.map(lambda is_other: not is_other, others)
    _check_whole(grads, chosen, space.param_specs)
    of_matrices = jax.tree.map(_matrix_ascent, _masks.restrict(grads, chosen))
    is_ascent = lambda x: isinstance(x, Ascent)
    ascents = jax.tree.leaves(of_matrices, is_leaf=is_ascent)
    directions = jax.tree.map(lambda a: a.direction, of_matrices, is_leaf=is_ascent)
    if any(jax.tree.leaves(others)):
      rest, state = _ascend_part(
        other, grads, state, params, others, space=space, **extra_args
      )
      directions = _masks.extend(rest.direction, others, directions)
      ascents.append(rest)
    zero = jnp.zeros([], _numerics.wide_dtype(grads))
    slope = sum((_numerics.widen(a.slope, like=zero) for a in ascents), zero)
    # All or nothing, where a part alone is not finite or too large. A NaN of another
    # origin, such as a hyperparameter of `other`, is seen.
    _, norm = space.normalize(grads)
    usable = (norm > 0) & ~_numerics.is_infinite(slope)
    return _only_where(usable, Ascent(directions, slope)), state

  return Metric(init, ascend)


def check_metric(name: str, metric: Any) -> None:
  """Raises unless ``metric`` is a :class:`Metric` that can be called as one."""
  if not isinstance(metric, Metric):
    raise TypeError(
      f'`{name}` must be a Metric, such as `monge()` or `euclidean()`, got {metric!r}.'
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


# Muon's steps, which enlarge what is small the fastest, and leave all between 0.7 and
# 1.2; then those of 5th degree that converge to 1 from there, and never pass it from
# below.
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5 + ((1.875, -1.25, 0.375),) * 3


def _others(matrices, tree):
  """The leaves that are no matrices, a tree of bools."""
  # optax.tree.map_params calls with a stand-in without leaves.
  if not jax.tree.leaves(tree):
    return jax.tree.map(lambda x: True, tree)
  if matrices is None:
    chosen = jax.tree.map(
      lambda is_weight, x: is_weight and jnp.ndim(x) == 2,
      _masks.weights_by_default(tree),
      tree,
    )
  else:
    chosen = _masks.resolve_mask(matrices, tree, name='matrices')
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  for (path, x), is_matrix in zip(leaves, jax.tree.leaves(chosen), strict=True):
    if is_matrix and jnp.ndim(x) != 2:
      raise ValueError(
        f'`matrices` of spectral() selects the leaf {_masks.at_path(path)}, whose shape'
        f' is {jnp.shape(x)}: a matrix has two axes. Leave it to `other`, as in'
        ' `matrices=lambda params: jax.tree.map(lambda p: p.ndim == 2, params)`.'
      )
  return jax.tree.map(lambda is_matrix: not is_matrix, chosen)


def _check_whole(grads, matrices, param_specs):
  """Raises if a matrix is sharded, of which no device can see the singular values."""
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  axes = _devices.leaf_axes(param_specs, grads)
  chosen = jax.tree.leaves(matrices)
  for (path, _), names, is_matrix in zip(leaves, axes, chosen, strict=True):
    if is_matrix and names:
      raise ValueError(
        f'spectral() needs whole matrices, but `param_specs` says that the leaf'
        f' {_masks.at_path(path)} is sharded over {names}. Leave it to `other` by'
        ' `matrices`, or use jit with sharded arrays instead of shard_map.'
      )


def _ascend_part(metric, grads, state, params, mask, *, grad_fn=None, **extra_args):
  """A metric's ascent over some of the leaves, as if there were no others."""
  if grad_fn is not None:
    extra_args['grad_fn'] = lambda part: _masks.restrict(
      grad_fn(_masks.extend(part, mask, params)), mask
    )
  return metric.ascend(
    _masks.restrict(grads, mask),
    state,
    None if params is None else _masks.restrict(params, mask),
    **extra_args,
  )


def _matrix_ascent(g: jax.Array) -> Ascent:
  """The ascent of one matrix under the spectral norm, zero where ``g`` is."""
  unit, norm = spaces.LOCAL.normalize(g)
  if not g.size:
    return Ascent(g, norm)
  direction = jnp.where(norm > 0, _orthogonalize(unit), 0.0)
  return Ascent(direction.astype(g.dtype), norm * spaces.LOCAL.dot(unit, direction))


def _orthogonalize(x):
  """The same as :func:`_newton_schulz`, also where shardings are a part of types."""
  sharding = _devices.explicit_sharding(x)
  if sharding is None:
    return _newton_schulz(x)
  # A sharded matrix has no product with its own transpose there.
  whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.sharding.reshard(_newton_schulz(jax.sharding.reshard(x, whole)), sharding)


def _newton_schulz(x: jax.Array) -> jax.Array:
  """``UVᵀ`` of a matrix ``UΣVᵀ`` of unit Frobenius norm, by Optax's Muon."""
  tx = optax.contrib.scale_by_muon(
    _NEWTON_SCHULZ, len(_NEWTON_SCHULZ), beta=0.0, nesterov=False
  )
  # Optax up to 0.2.5 multiplies the result by more than 1 for what is wider than high.
  wide = x.shape[0] < x.shape[1]
  tall = x.T if wide else x
  # Optax relies on implicit promotion; accelerators multiply with 8 to 10 bits.
  with (
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
    jax.default_matmul_precision('highest'),
  ):
    polar = jnp.asarray(tx.update(tall, tx.init(tall))[0])
  return polar.T if wide else polar


def _only_where(usable: jax.Array, ascent: Ascent) -> Ascent:
  """An ascent, or zero."""
  return jax.tree.map(lambda x: jnp.where(usable, x, 0.0).astype(x.dtype), ascent)
