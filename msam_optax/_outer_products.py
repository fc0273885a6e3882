"""The ascent under a metric that is a matrix and outer products of gradients.

The sum acts along directions ``v₁, v₂, …``, orthonormal under ``B``, by factors
``λ₁, λ₂, …``; both come from the ``r × r`` inner products of the gradients. Under ``B``
the gradient has the direction ``d`` and the slope ``s``. With ``κₖ``, the component of
``d`` along ``vₖ``, and ``p``, the rest of it,

    G⁻¹g = s (p + Σ κₖ/(1 + λₖ) vₖ)     and     gᵀG⁻¹g = s² (‖p‖² + Σ κₖ²/(1 + λₖ)).

The other form, ``B⁻¹g − Σ yᵢ B⁻¹gᵢ``, is a difference, and where ``λ`` is large it
leaves nothing but rounding.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import spaces


def ascend(
  grads: Any,
  gradients: Any,
  params: Any,
  *,
  alpha: Any,
  base: metrics.Metric,
  number: Any,
  space: spaces.Space,
  extra_args: Mapping[str, Any],
) -> metrics.Ascent:
  """The ascent under ``B + (α²/r) Σ gᵢgᵢᵀ``.

  Args:
    grads: ``g``, pytree of arrays.
    gradients: ``gᵢ``, a pytree like it with one more axis, the first.
    params: pytree like ``grads``, or None.
    alpha: ``α``, scalar.
    base: the matrix ``B``, a metric without state.
    number: ``r``, scalar; gradients that are zero need not be counted.
    space: how they are spread over devices.
    extra_args: what else the base gets.

  Returns:
    An ascent, the direction in the dtypes of ``grads``; NaN where the ``gᵢ`` are not
    finite or the base is no matrix.
  """
  rows = jax.tree.map(_numerics.widen, gradients)

  def under_base(g):
    ascent, _ = base.ascend(g, optax.EmptyState(), params, space=space, **extra_args)
    return ascent.direction, ascent.slope

  d, s = under_base(jax.tree.map(_numerics.widen, grads))
  d_rows, s_rows = jax.vmap(under_base)(rows)
  # Gradients of length one are dual to directions of length one; none if not finite.
  g_dual = jax.tree.map(
    lambda g: jnp.where(s > 0, _numerics.widen(g) * _inverse(s, like=g), 0.0), grads
  )
  to_dual, steepest = _inverse(s_rows), jnp.max(s_rows)

  def along(x):
    return to_dual * jax.vmap(lambda row: space.dot(row, x))(rows)

  def subtract(kappa, p, p_dual):
    y = _product(basis, kappa)
    return _minus(p, y, d_rows), _minus(p_dual, y * to_dual, rows)

  basis, size = _orthonormal(jax.vmap(along)(d_rows), s_rows * _inverse(steepest))
  components = along(d)
  kappa = _product(basis.T, components)
  p, p_dual = subtract(kappa, d, g_dual)
  # Once more for what rounding has left along the vₖ: it counts where λ is large.
  more = _product(basis.T, along(p))
  p, p_dual = subtract(more, p, p_dual)
  square = space.dot(p, p_dual)
  is_left = square > (8.0 * jnp.finfo(s.dtype).eps) ** 2  # And no rounding.
  rest = jnp.where(is_left, jnp.sqrt(jnp.where(is_left, square, 1.0)), 0.0)

  alpha, number = _numerics.widen(alpha, like=s), jnp.asarray(number, s.dtype)
  f = _numerics.inverse_hypot(alpha * steepest * size / jnp.sqrt(number))  # 1/√(1+λ)
  unit, length = spaces.LOCAL.normalize(jnp.append((kappa + more) * f, rest))
  straight = jnp.where(is_left, _inverse(length), 0.0)
  bent = _product(basis, unit[:-1] * f)

  # A matrix is symmetric, and what depends on the gradient is not.
  others = jax.vmap(lambda row: space.dot(row, g_dual))(d_rows)
  is_matrix = jnp.max(jnp.abs(components - others)) < 0.01
  zero = _numerics.zero_if(is_matrix & jnp.isfinite(alpha), s.dtype)

  def direction(p, rows, g):
    x = straight.astype(p.dtype) * p + _product(bent.astype(p.dtype), rows)
    return (x + zero.astype(p.dtype)).astype(jnp.result_type(g))

  return metrics.Ascent(jax.tree.map(direction, p, d_rows, grads), s * length + zero)


def _orthonormal(inner: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The directions in which ``Σ sizeᵢ² d̂ᵢd̂ᵢᵀ`` acts, and the roots of its factors.

  Args:
    inner: ``⟨ĝᵢ, dⱼ⟩``, the inner products of unit vectors.
    sizes: their weights, at most 1.

  Returns:
    A matrix of which column ``k`` has the coefficients of ``vₖ`` in the ``dᵢ``, and the
    roots of ``λₖ``; zero for what cannot be told from rounding.
  """
  weighted = sizes[:, None] * inner * sizes[None]
  factors, vectors = _eigh(0.5 * (weighted + weighted.T))
  seen = _seen(factors)
  root = jnp.sqrt(jnp.where(seen, factors, 1.0))
  basis = sizes[:, None] * vectors * jnp.where(seen, 1.0 / root, 0.0)[None]
  return basis, jnp.where(seen, root, 0.0)


@jax.custom_jvp
def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues and eigenvectors, also of a matrix whose rank is less than its size.

  JAX's derivative of eigenvectors divides by the difference of the eigenvalues, and
  those of what is not seen are all zero. Nothing depends on which vectors these are.
  """
  factors, vectors = jnp.linalg.eigh(x)
  return factors, vectors


@_eigh.defjvp
def _eigh_jvp(primals, tangents):
  factors, vectors = _eigh(*primals)
  seen = _seen(factors)
  counts = (seen[:, None] | seen[None]) & ~jnp.eye(len(factors), dtype=bool)
  gap = jnp.where(counts, factors[None] - factors[:, None], 1.0)
  change = _product(vectors.T, _product(tangents[0], vectors))
  turn = jnp.where(counts, change / gap, 0.0)
  return (factors, vectors), (jnp.diag(change), _product(vectors, turn))


def _seen(factors):
  """Which eigenvalues are more than rounding."""
  return factors > 100.0 * jnp.finfo(factors.dtype).eps * jnp.max(factors)


def _minus(x, y, rows):
  """``x − Σ yᵢ rowᵢ``."""
  return jax.tree.map(lambda x, row: x - _product(y.astype(x.dtype), row), x, rows)


def _product(a, b):
  """Of matrices and vectors, as exact as they are: accelerators would use 8 bits."""
  return jnp.tensordot(a, b, axes=1, precision='highest')


def _inverse(x, like=None):
  """``1/x`` in the wide dtype of ``like``, and zero where ``x`` is."""
  inverse = jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)
  return inverse if like is None else inverse.astype(_numerics.wide_dtype(like))


def check_fixed(base: metrics.Metric, params: Any, name: str) -> None:
  """Raises if a base has a state, and so is no matrix that is the same at each call."""
  if jax.tree.leaves(base.init(params)):
    raise ValueError(
      f'The `base` of {name}() must be a matrix that is the same for every gradient,'
      ' such as `euclidean()` or `adaptive()`, but this metric has a state.'
    )


def like_grads(grads, gradients):
  """The leaves of ``gradients`` that ``grads`` has; raises if they are not like it."""
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  try:
    # The metric sees a part of the leaves, and the user gives all.
    gradients = jax.tree.map(
      lambda g, rows: g if is_masked(g) else rows, grads, gradients, is_leaf=is_masked
    )
    pairs = zip(
      jax.tree_util.tree_leaves_with_path(grads),
      jax.tree.structure(grads).flatten_up_to(gradients),
      strict=True,
    )
  except ValueError as error:
    raise ValueError(
      '`gradients` must have the structure of the gradient, each leaf with one more'
      f' axis, the first. {error}'
    ) from error
  number = None
  for (path, g), rows in pairs:
    shape = jnp.shape(rows)
    number = shape[0] if number is None and shape else number
    if not shape or shape != (number, *jnp.shape(g)) or not number:
      raise ValueError(
        '`gradients` must be one or more gradients, as many in each leaf, along a first'
        f' axis: {_masks.at_path(path)} the gradient has the shape {jnp.shape(g)}, and'
        f' they have {shape}.'
      )
  return gradients
