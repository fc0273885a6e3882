"""Spaces: sums over whole gradients, wherever their arrays are.

A metric and a combination are written for one device. What they need of the others is
in the :class:`Space` that they are given: the mean over replicas, and lengths and
inner products over all leaves and over all devices that a leaf is sharded over.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msam_optax import _devices
from msam_optax import _numerics


class Space(NamedTuple):
  """A vector space of pytrees whose arrays may be spread over devices.

  Attributes:
    mean: ``tree -> tree``, the mean over the replicas that ``axis_name`` names, each
      with its part of the batch; the tree itself where there are none. A tuple of
      trees is one message, two calls are two.
    dot: ``(tree, tree) -> scalar``, the inner product over all leaves and all their
      shards, float32 or wider. It is a plain sum of products: of gradients as small as
      1e-25 it underflows in float32, so divide by the norm first.
    normalize: ``tree -> (tree, scalar)``, the tree divided by its Euclidean norm, and
      the norm, float32 or wider; right from 1e-38 to 1e+38, and zero, both, where the
      norm is zero or not finite.
    param_specs: how the leaves are sharded inside ``shard_map``, see
      :func:`sharpness_aware`; None where each device has all of every leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax import LOCAL
    >>> unit, norm = LOCAL.normalize({'w': jnp.array([3e30, 4e30])})
    >>> print(unit['w'], f'{norm:.4g} {LOCAL.dot(unit, unit):.4g}')
    [0.6 0.8] 5e+30 1
  """

  mean: Callable[[Any], Any]
  dot: Callable[[Any, Any], jax.Array]
  normalize: Callable[[Any], tuple[Any, jax.Array]]
  param_specs: Any = None


def over(
  axis_name: Any = None,
  param_specs: Any = None,
  *,
  weight: jax.Array | None = None,
  averaged: Any = (),
) -> Space:
  """The space of gradients on the devices of a mesh.

  Args:
    axis_name: the mapped axis or axes of the replicas, or None.
    param_specs: how the leaves are sharded inside ``shard_map``, or None.
    weight: scalar, the weight of this replica in a mean; None if all have the same.
    averaged: pytree of arrays that are means already, and stay what they are.

  Returns:
    A :class:`Space`.
  """
  return Space(
    mean=functools.partial(
      mean, axis_name=axis_name, weight=weight, averaged=jax.tree.leaves(averaged)
    ),
    dot=functools.partial(dot, param_specs=param_specs),
    normalize=functools.partial(normalize, param_specs=param_specs),
    param_specs=param_specs,
  )


def without_mean(param_specs: Any = None) -> Space:
  """The space of a metric whose gradient is that of one micro-batch or replica."""

  def no_mean(tree):
    raise ValueError(
      'A metric in `value_and_grad` cannot use `space.mean` where the batch is divided'
      ' by `axis_name` or `shards`: give `sync_ascent=True`, and its gradient is the'
      ' mean.'
    )

  return over(None, param_specs)._replace(mean=no_mean)


def mean(
  tree: Any,
  axis_name: Any,
  weight: jax.Array | None = None,
  averaged: Sequence[jax.Array] = (),
) -> Any:
  """The mean over a mapped axis of the leaves that have one.

  Args:
    tree: pytree of arrays. Leaves that are not floating point or complex (gradients of
      integers have no numbers at all) stay those of each replica.
    axis_name: the mapped axis or axes, or None.
    weight: scalar, the weight of this replica; None if all have the same.
    averaged: arrays that are not averaged again.

  Returns:
    A pytree like ``tree``.
  """
  if axis_name is None:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  known = {id(x) for x in averaged}
  rows = [
    i for i, x in enumerate(leaves) if _numerics.is_inexact(x) and id(x) not in known
  ]
  if not rows:
    return tree
  # All in one call, and so in as few messages as the compiler can make of it.
  own = [leaves[i] for i in rows]
  if weight is None:
    means = jax.lax.pmean(own, axis_name)
  else:
    sums = jax.lax.psum(_numerics.multiply(_numerics.divisor(weight), own), axis_name)
    total = _numerics.divisor(jax.lax.psum(weight, axis_name))
    means = _numerics.divide(sums, total)
  for i, x in zip(rows, means, strict=True):
    leaves[i] = x
  return structure.unflatten(leaves)


def dot(a: Any, b: Any, param_specs: Any = None) -> jax.Array:
  """The inner product of two trees of real arrays, in float32 or wider."""
  axes = _devices.leaf_axes(param_specs, a)
  zero = jnp.zeros([], _numerics.wide_dtype((a, b)))
  widen = functools.partial(_numerics.widen, like=zero)
  products = jax.tree.map(lambda x, y: jnp.sum(widen(x) * widen(y)), a, b)
  return _devices.total(jax.tree.leaves(products), axes, zero)


def normalize(tree: Any, param_specs: Any = None) -> tuple[Any, jax.Array]:
  """The tree divided by its Euclidean norm, and the norm.

  Args:
    tree: pytree of real floating-point arrays.
    param_specs: how its leaves are sharded inside ``shard_map``, see
      :func:`sharpness_aware`; the norm is that of the whole tree.

  Returns:
    The tree of length one, and the norm, a scalar, in float32 or wider; zeros, both,
    where the norm is zero or not finite.
  """
  axes = _devices.leaf_axes(param_specs, tree)
  zero = jnp.zeros([], _numerics.wide_dtype(tree))
  tree = jax.tree.map(functools.partial(_numerics.widen, like=zero), tree)
  leaves = jax.tree.leaves(tree)
  magnitudes = _devices.maxima([_numerics.largest_magnitude(x) for x in leaves], axes)
  largest = functools.reduce(jnp.maximum, magnitudes, zero)
  usable = (largest > 0) & jnp.isfinite(largest)
  scale = _scale(largest)
  squares = _devices.total([_sum_of_squares(x, scale) for x in leaves], axes, zero)
  root = jnp.sqrt(jnp.where(usable, squares, 1.0))
  # Where numbers below the smallest normal one count as zero, so may the root.
  usable &= (root > 0) & jnp.isfinite(scale * root)
  # Products, since XLA turns two divisions into one by what may be too large.
  inverse = 1.0 / jnp.where(usable, root, 1.0)
  unit = jax.tree.map(
    lambda x: jnp.where(usable, x * (1.0 / scale) * inverse, 0.0), tree
  )
  return unit, jnp.where(usable, scale * root, 0.0)


def norm(tree: Any, size: jax.Array, param_specs: Any = None) -> jax.Array:
  """The Euclidean norm of a tree, in one pass; not finite where an entry is not.

  Args:
    tree: pytree of real floating-point arrays, all of the same dtype.
    size: scalar, roughly the largest magnitude: to 15 decades in float32.
    param_specs: see :func:`normalize`.

  Returns:
    A scalar, whose derivative is 0, not NaN, where the norm is.
  """
  leaves, axes = jax.tree.leaves(tree), _devices.leaf_axes(param_specs, tree)
  zero = jnp.zeros([], _numerics.wide_dtype(tree))
  scale = _scale(jnp.asarray(size, zero.dtype))
  square = _devices.total([_sum_of_squares(x, scale) for x in leaves], axes, zero)
  # Both branches finite, so that the derivative where nothing moved is 0, not NaN.
  root = jnp.sqrt(jnp.where(square == 0, 1.0, square))
  return jnp.where(square == 0, 0.0, scale * root)


def all_finite(tree: Any, param_specs: Any = None) -> jax.Array:
  """Whether a tree is finite, all shards of all leaves.

  Args:
    tree: pytree of arrays; leaves that are not floating point or complex count as
      finite.
    param_specs: see :func:`normalize`.

  Returns:
    bool scalar.
  """
  finite = [
    jnp.all(jnp.isfinite(x)) if _numerics.is_inexact(x) else jnp.array(True)
    for x in jax.tree.leaves(tree)
  ]
  axes = _devices.leaf_axes(param_specs, tree)
  bad = _devices.maxima([jnp.where(ok, 0.0, 1.0) for ok in finite], axes)
  return functools.reduce(jnp.maximum, bad, jnp.zeros([])) == 0


def _scale(size):
  """About ``size``, to scale by so that no square over- or underflows.

  Its reciprocal is a normal number as well. The results do not depend on it, so their
  derivatives need not know it. (A power of two would round nothing; on the CPU it took
  as long to compile as all the rest.)
  """
  reach = 2.0 ** (jnp.finfo(size.dtype).maxexp - 28)
  usable = (size > 0) & jnp.isfinite(size)
  scale = jnp.where(usable, jnp.clip(size, 1 / reach, reach), 1.0)
  return jax.lax.stop_gradient(scale)


def _sum_of_squares(x, scale):
  # The scale is positive always. Without the question XLA makes x² · scale⁻² of a
  # gradient that is a constant, as in a branch of `cond`, and that overflows.
  return jnp.sum(jnp.square(jnp.where(scale > 0, x * (1.0 / scale), 0.0)))


# Each device has all of every leaf, and there are no replicas.
LOCAL = over()
