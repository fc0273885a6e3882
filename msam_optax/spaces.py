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
      norm is zero or not finite. ``normalize(sources, make)`` is that of the tree
      ``make(sources)``, for a function of nothing else: it may be computed twice, and
      then need not be kept.
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
  normalize: Callable[..., tuple[Any, jax.Array]]
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


def normalize(
  tree: Any, make: Callable[[Any], Any] = lambda tree: tree, *, param_specs: Any = None
) -> tuple[Any, jax.Array]:
  """The tree divided by its Euclidean norm, and the norm.

  Args:
    tree: pytree of real floating-point arrays.
    make: what makes such a tree of the one given.
    param_specs: how its leaves are sharded inside ``shard_map``, see
      :func:`sharpness_aware`; the norm is that of the whole tree.

  Returns:
    The tree of length one, and the norm, a scalar, in float32 or wider; zeros, both,
    where the norm is zero or not finite.
  """
  made = make(tree)
  scale, root, length = _length(tree, make, param_specs)
  usable = (root > 0) & jnp.isfinite(length)
  # Products, since XLA turns two divisions into one by what may be too large. And each
  # factor ends with a division, since XLA copies all that is cheaper into each leaf.
  first = 1.0 / scale
  second = jnp.where(usable, 1.0, 0.0) / jnp.where(usable, root, 1.0)
  unit = jax.tree.map(lambda x: _product(x, first, second), made)
  return unit, jnp.where(usable, length, 0.0)


@jax.jit
def _product(x, first, second):
  x = _numerics.widen(x, like=first)
  return jnp.where(second > 0, x * first * second, 0.0)


def norm(tree: Any, param_specs: Any = None) -> jax.Array:
  """The Euclidean norm of a tree; not finite where an entry is not.

  Args:
    tree: pytree of real floating-point arrays.
    param_specs: see :func:`normalize`.

  Returns:
    A scalar, float32 or wider, whose derivative is 0, not NaN, where the norm is.
  """
  _, _, length = _length(tree, lambda tree: tree, param_specs)
  return length


def all_finite(tree: Any, param_specs: Any = None) -> jax.Array:
  """Whether a tree is finite, all shards of all leaves.

  Args:
    tree: pytree of arrays; leaves that are not floating point or complex count as
      finite.
    param_specs: see :func:`normalize`.

  Returns:
    bool scalar.
  """
  axes = _devices.leaf_axes(param_specs, tree)
  bad = _devices.maxima([has_non_finite(x) for x in jax.tree.leaves(tree)], axes)
  return functools.reduce(jnp.maximum, bad, jnp.zeros([])) == 0


@jax.jit
def has_non_finite(x: jax.Array) -> jax.Array:
  """1 if an array has an entry that is not finite, or 0: for a maximum over devices."""
  if not _numerics.is_inexact(x):
    return jnp.zeros([])
  # A sum that is finite has no part that is not, and this one is never too large. It is
  # two sums in one, since XLA on a CPU would store what goes into a single one.
  x = jax.lax.stop_gradient(x) * 2.0**-64
  parts = (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x, x)
  sums = _sums(parts)
  return jnp.where(jnp.isfinite(sums[0]) & jnp.isfinite(sums[1]), 0.0, 1.0)


def _sums(arrays):
  """The sum of each of some arrays of one shape, in one pass over all."""
  first = arrays[0]
  add = lambda a, b: tuple(map(jnp.add, a, b))
  zeros = (jnp.zeros([], first.dtype),) * len(arrays)
  return jax.lax.platform_dependent(
    tuple(arrays),
    cpu=lambda arrays: tuple(jax.lax.reduce(arrays, zeros, add, range(first.ndim))),
    # Elsewhere XLA makes one pass of several sums by itself, and a TPU's compiler keeps
    # in memory what goes into a single reduction of several arrays.
    default=lambda arrays: tuple(map(jnp.sum, arrays)),
  )


def _length(tree, make, param_specs):
  """Two factors of the Euclidean norm, of which one is a power of two, and the norm."""
  made = jax.eval_shape(make, tree)
  # No array: JAX keeps this function, and so would a tracer be kept.
  dtype = _numerics.wide_dtype(made)
  axes = tuple(_devices.leaf_axes(param_specs, made))

  def leaves(tree):
    return [jnp.asarray(x, dtype) for x in jax.tree.leaves(make(tree))]

  return _differentiable(leaves, axes, tree)


def _differentiable(make, axes, tree):
  scale, root, length = _length_of(make, axes, tree)
  # The derivative of its reciprocal would be zero times infinity.
  return jax.lax.stop_gradient(scale), root, length


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _length_of(make, axes, tree):
  """In one pass: a sum of squares, of numbers that are scaled in three ways.

  A CPU begins with the plain sum, and takes those only if it is too large or has lost
  too much.
  """
  leaves = make(tree)
  zero = jnp.zeros([], _numerics.wide_dtype(leaves))

  shares = lambda sums, zero: _devices.subtotals(sums, axes, zero)
  finfo = jnp.finfo(zero.dtype)
  reach = 2.0 ** (3 * finfo.maxexp // 4)
  scales = 1 / reach, 1.0, reach

  def scaled(tree):
    # Made again, because XLA would store what both branches need.
    sums = [_sums_of_squares(x, scales) for x in make(tree)]
    zero = jnp.zeros([], finfo.dtype)  # Not the one outside, see `unless`.
    return [
      x
      for i in range(len(scales))
      for x in shares([of_leaf[i] for of_leaf in sums], zero)
    ]

  plain = shares([sum_of_squares(x) for x in leaves], zero)
  square = _devices.across(plain, axes)
  size = sum(x.size * _devices.count(a) for x, a in zip(leaves, axes, strict=True))
  # All squares that are too small for a number are together less than its rounding.
  smallest = max(size, 1) * float(finfo.tiny) / float(finfo.eps)
  # The derivative of the reciprocal root has the reciprocal square in it.
  largest = float(finfo.max) / 4
  # The same on all devices that have a part of the same leaf.
  usual = (square >= smallest) & (square <= largest)
  parts = _devices.unless(usual, plain * len(scales), scaled, tree)
  count = len(plain)
  small, square, large = (
    _devices.across(parts[i * count : (i + 1) * count], axes)
    for i in range(len(scales))
  )
  # Once more, since what a compiler makes of a plain square may be further from it.
  chosen = jnp.where(square <= largest, jnp.where(square < smallest, 0, 1), 2)
  pick = functools.partial(jax.lax.select_n, chosen)
  number = lambda *values: pick(*(jnp.full_like(square, x) for x in values))
  # It ends with a division, and the other with a root: otherwise XLA would compute them
  # once more for each leaf, in a program that grows with their number.
  scale = number(1.0, 1.0, reach) / number(reach, 1.0, 1.0)
  root = jnp.sqrt(pick(small, square, large))
  return scale, root, scale * root


@_length_of.defjvp
def _(make, axes, primals, tangents):
  """By way of the unit vector, which neither over- nor underflows; 0 where it has none.

  The scale has no derivative, since the norm does not depend on it. That of the norm
  is not by way of the root's, which under- or overflows where it does not.
  """
  scale, root, length = _differentiable(make, axes, *primals)
  leaves, changes = jax.jvp(make, primals, tangents)
  inverse = jnp.where(root > 0, 1.0 / jnp.where(root > 0, root, 1.0), 0.0)
  along = [
    jnp.sum(x * (1.0 / scale) * inverse * dx)
    for x, dx in zip(leaves, changes, strict=True)
  ]
  change = _devices.total(along, axes, jnp.zeros_like(root))
  changes = jnp.zeros_like(scale), change * (1.0 / scale), change
  return (scale, root, length), changes


@jax.jit
def sum_of_squares(x):
  return jnp.sum(jnp.square(_numerics.widen(x)))


@functools.partial(jax.jit, static_argnums=1)
def _sums_of_squares(x, scales):
  """The sum of squares of an array divided by each of some scales, in one pass."""

  def square(scale):
    y = x * (1.0 / scale)
    # Without the question XLA makes a product of squares of the square of a product,
    # and they overflow.
    return jnp.square(jnp.where(y == 0, 0.0, y))

  return _sums([square(scale) for scale in scales])


# Each device has all of every leaf, and there are no replicas.
LOCAL = over()
