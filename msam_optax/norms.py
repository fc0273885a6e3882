"""Norms as metrics: the maximum, the singular values, and one radius for each leaf.

A metric need not be a matrix ``G``. For any norm the *direction* is the vector of unit
length along which the loss rises most, and the *slope* that rise, the dual norm of the
gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax import _devices
from msam_optax import _hyperparameters
from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import spaces


def max_norm() -> metrics.Metric:
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
    return _only_where(usable, metrics.Ascent(signs, slope)), state

  return metrics.Metric(lambda params: optax.EmptyState(), ascend)


def spectral(
  other: metrics.Metric = metrics.euclidean(), *, matrices: Any = None
) -> metrics.Metric:
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
  metrics.check_metric('other', other)

  def init(params):
    return other.init(_masks.restrict(params, _others(matrices, params)))

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    others = _others(matrices, grads if params is None else params)
    chosen = jax.tree.map(lambda is_other: not is_other, others)
    _check_whole(grads, chosen, space.param_specs)
    of_matrices = jax.tree.map(_matrix_ascent, _masks.restrict(grads, chosen))
    is_ascent = lambda x: isinstance(x, metrics.Ascent)
    ascents = jax.tree.leaves(of_matrices, is_leaf=is_ascent)
    directions = jax.tree.map(lambda a: a.direction, of_matrices, is_leaf=is_ascent)
    if any(jax.tree.leaves(others)):
      rest, state = metrics.ascend_on(
        others, other, grads, state, params, {**extra_args, 'space': space}
      )
      directions = _masks.extend(rest.direction, others, directions)
      ascents.append(rest)
    zero = jnp.zeros([], _numerics.wide_dtype(grads))
    slope = sum((_numerics.widen(a.slope, like=zero) for a in ascents), zero)
    # All or nothing, where a part alone is not finite or too large. A NaN of another
    # origin, such as a hyperparameter of `other`, is seen.
    _, norm = space.normalize(grads)
    usable = (norm > 0) & ~_numerics.is_infinite(slope)
    return _only_where(usable, metrics.Ascent(directions, slope)), state

  return metrics.Metric(init, ascend)


def per_leaf(
  base: metrics.Metric = metrics.euclidean(), radii: Any = 1.0
) -> metrics.Metric:
  """A radius for each leaf: every leaf moves by its own, whatever the others do.

  The norm is the largest of the leaves' own, each under ``base`` and divided by its
  radius ``r``. So the direction of a leaf is ``r`` times what the base makes of its
  gradient alone, and the slope is the sum of theirs, each times ``r``. Then ``ρ``
  multiplies all radii::

    sharpness_aware(per_leaf(euclidean(), {'body': 0.02, 'head': 0.1}), rho=1.0)

  ``per_leaf(monge())`` is Monge's metric of each leaf, which shortens a leaf by its own
  slope, and ``monge(base=per_leaf())`` shortens all by the slope of the whole.

  Args:
    base: the metric of each leaf.
    radii: ``r``, scalars >= 0: a number or an array for all leaves, or a tree of them
      with the structure of the params or a prefix of it. 0 holds a leaf fixed.

  Returns:
    A :class:`Metric` whose state is the tuple of the leaves' own; without a state if
    the base has none.

  Raises:
    TypeError: if ``base`` is no metric, or a radius no real number.
    ValueError: if a radius is negative or not finite, or, when called, if ``radii`` is
      no prefix of the params.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import euclidean, per_leaf
    >>> metric = per_leaf(euclidean(), {'body': 0.5, 'head': 2.0})
    >>> g = {'body': jnp.array([3.0, 4.0]), 'head': jnp.array([0.0, 0.1])}
    >>> ascent, _ = metric.ascend(g, metric.init(g), g)
    >>> print(ascent.direction['body'], ascent.direction['head'], ascent.slope)
    [0.3 0.4] [0. 2.] 2.7
  """
  metrics.check_metric('base', base)
  for path, r in jax.tree_util.tree_leaves_with_path(radii):
    _hyperparameters.check_number(f'radii{jax.tree_util.keystr(path)}', r)

  def of_each(params):
    return tuple(base.init(_masks.restrict(params, one)) for one in _one_by_one(params))

  def init(params):
    states = of_each(params)
    return states if jax.tree.leaves(states) else optax.EmptyState()

  def ascend(grads, state, params, **kwargs):
    structure = jax.tree.structure(grads)
    each = of_each(grads) if isinstance(state, optax.EmptyState) else state
    directions, slope, states = [], jnp.zeros([], _numerics.wide_dtype(grads)), []
    for one, own, r in zip(
      _one_by_one(grads), each, _broadcast(radii, grads), strict=True
    ):
      ascent, own = metrics.ascend_on(one, base, grads, own, params, kwargs)
      r = _numerics.widen(_hyperparameters.value_at('radii', r), like=slope)
      (direction,) = jax.tree.leaves(ascent.direction)
      directions.append((r * _numerics.widen(direction)).astype(direction.dtype))
      slope += r * ascent.slope
      states.append(own)
    # All or nothing, where the gradient of one leaf alone is not finite.
    _, norm = kwargs.get('space', spaces.LOCAL).normalize(grads)
    usable = (norm > 0) & ~_numerics.is_infinite(slope)
    ascent = metrics.Ascent(structure.unflatten(directions), slope)
    return _only_where(usable, ascent), state if each is not state else tuple(states)

  return metrics.Metric(init, ascend)


def _one_by_one(tree):
  """For each leaf, the mask of it alone."""
  leaves, structure = jax.tree.flatten(tree)
  for i in range(len(leaves)):
    yield structure.unflatten([j == i for j in range(len(leaves))])


def _broadcast(radii, tree):
  """The radius of each leaf, in order."""
  found = []
  try:
    jax.tree.map(
      lambda r, part: found.extend([r] * len(jax.tree.leaves(part))), radii, tree
    )
  except ValueError as error:
    raise ValueError(
      '`radii` of per_leaf() must have the structure of the parameters, or a prefix of'
      f' it. It has {jax.tree.structure(radii)}, they have {jax.tree.structure(tree)}.'
    ) from error
  return found


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


def _matrix_ascent(g: jax.Array) -> metrics.Ascent:
  """The ascent of one matrix under the spectral norm, zero where ``g`` is."""
  unit, norm = spaces.LOCAL.normalize(g)
  if not g.size:
    return metrics.Ascent(g, norm)
  direction = jnp.where(norm > 0, _orthogonalize(unit), 0.0)
  return metrics.Ascent(
    direction.astype(g.dtype), norm * spaces.LOCAL.dot(unit, direction)
  )


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


def _only_where(usable: jax.Array, ascent: metrics.Ascent) -> metrics.Ascent:
  """An ascent, or zero."""
  return jax.tree.map(lambda x: jnp.where(usable, x, 0.0).astype(x.dtype), ascent)
