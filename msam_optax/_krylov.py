"""Eigenvalues of a matrix that is known by its products with vectors.

All of them by a dense solver, or the outermost by a Krylov space that is restarted
until they have converged. Nothing here depends on the scale of the matrix.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msam_optax import _numerics

# The dimensions of a Krylov space, and how often it is restarted at most; a problem
# that has no more dimensions is solved densely.
STEPS = 64
RESTARTS = 100


def dense_eigenvalues(
  matvec: Callable[[Any], Any], like: jax.Array, *, symmetric: bool
) -> jax.Array:
  """All eigenvalues of a matrix.

  Args:
    matvec: ``[n] -> [n]``, its product with a vector.
    like: ``[n]``, any vector of its dtype.
    symmetric: whether it is.

  Returns:
    ``[n]``, ascending, the real parts; NaN, all of them, if an entry is not finite.
  """
  matrix = jax.vmap(matvec, out_axes=1)(jnp.eye(like.size, dtype=like.dtype))
  # Some solvers answer with numbers where there are none.
  finite = jnp.all(jnp.isfinite(matrix))
  matrix = jnp.where(finite, matrix, 0.0)
  scale = _scale(matrix)
  if symmetric:
    values = jnp.linalg.eigvalsh(matrix / scale)
  else:
    values = jnp.sort(jnp.real(jnp.linalg.eigvals(matrix / scale)))
  return scale * values + _numerics.zero_if(finite, values.dtype)


class _Space(NamedTuple):
  """A Krylov space between restarts: ``A basisᵀ = basisᵀ small`` on what is kept.

  Attributes:
    basis: ``[m+1, n]``, orthonormal rows, zero from ``kept + 1`` on.
    small: ``[m+1, m]``, the matrix in this basis, column by column.
    kept: how many columns of ``small`` are known.
    locked: ``[slots, n]``, eigenvectors that the space is orthogonal to, or zeros.
    locked_values: ``[slots]``, their eigenvalues.
    locked_count: how many there are.
    found: ``[k]``, the smallest values so far.
    good: ``[k]``, which of them have converged.
    converged: whether all have, so that the space goes on from a random vector.
    done: whether they are still the smallest after that.
    residual: the largest residual among them, the least of all cycles.
    stalled: for how many cycles it has been small and not become less.
    cycle: how many times the space has been filled.
  """

  basis: jax.Array
  small: jax.Array
  kept: jax.Array
  locked: jax.Array
  locked_values: jax.Array
  locked_count: jax.Array
  found: jax.Array
  good: jax.Array
  converged: jax.Array
  done: jax.Array
  residual: jax.Array
  stalled: jax.Array
  cycle: jax.Array


class _Ritz(NamedTuple):
  """The eigenvalues of the matrix in a Krylov space, by their real parts, ascending.

  Attributes:
    values: ``[m]``, the real parts.
    sizes: ``[m]``, the magnitudes.
    residuals: ``[m]``, ``‖Av − λv‖``.
    vectors: ``[m, m]``, orthonormal columns; the first ones span the eigenvectors of
      the first values, unless they cut a conjugate pair in two.
    second: ``[m]``, whether a value is the second of a conjugate pair.
  """

  values: jax.Array
  sizes: jax.Array
  residuals: jax.Array
  vectors: jax.Array
  second: jax.Array


def outermost_eigenvalues(
  matvec: Callable[[Any], Any],
  like: jax.Array,
  k: int,
  steps: int,
  key: jax.Array,
  which: str,
  *,
  symmetric: bool,
) -> jax.Array:
  """The ``k`` outermost eigenvalues by a thick-restarted Krylov space.

  Args:
    matvec: ``[n] -> [n]``, the product of the matrix with a vector.
    like: ``[n]``, any vector of its dtype.
    k: how many, fewer than ``steps / 2``.
    steps: the dimensions of the space, fewer than ``n``.
    key: a random key, for the vectors to start from.
    which: ``"largest"`` or ``"smallest"``, by real part.
    symmetric: whether the matrix is.

  Returns:
    ``[k]``, the real parts, the outermost first; NaN for those that have not converged.
  """
  sign = 1 if which == 'smallest' else -1
  start = _random_unit(key, like, [])
  scale = _scale(matvec(start))
  product = lambda v: sign * matvec(v) / scale
  slots = steps // 4 if symmetric else 0
  zeros = lambda *shape: jnp.zeros(shape, like.dtype)
  space = _Space(
    basis=zeros(steps + 1, like.size).at[0].set(start),
    small=zeros(steps + 1, steps),
    kept=jnp.zeros([], int),
    locked=zeros(slots, like.size),
    locked_values=zeros(slots),
    locked_count=jnp.zeros([], int),
    found=zeros(k),
    good=jnp.zeros(k, bool),
    converged=jnp.array(False),
    done=jnp.array(False),
    residual=jnp.asarray(jnp.finfo(like.dtype).max),
    stalled=jnp.zeros([], int),
    cycle=jnp.zeros([], int),
  )

  def unfinished(space):
    finite = jnp.isfinite(space.residual)
    return ~space.done & finite & (space.cycle <= RESTARTS)

  def cycle(space):
    keys = jax.random.split(jax.random.fold_in(key, space.cycle))
    space = _fill(product, space, keys[0])
    return _restart(space, keys[1], symmetric)

  space = jax.lax.while_loop(unfinished, cycle, space)
  return sign * scale * (space.found + _numerics.zero_if(space.good, like.dtype))


def _scale(x):
  """The largest magnitude, so that no square of a quotient over- or underflows."""
  largest = jnp.max(jnp.abs(x), initial=0.0)
  return jnp.where(largest > 0, largest, 1.0)


def _fill(product, space, key):
  """Arnoldi's method, up to the last dimension."""
  eps = jnp.finfo(space.basis.dtype).eps

  def step(j, carry):
    basis, small = carry
    image = product(basis[j])
    v, first = _orthogonalise(image, space.locked, basis)
    v, second = _orthogonalise(v, space.locked, basis)
    length = jnp.linalg.norm(v)
    # What is left of an exhausted space is rounding: any direction may follow it.
    going = length > 10 * eps * jnp.linalg.norm(image)
    length = jnp.where(going, length, 0.0)
    v = jax.lax.cond(
      going,
      lambda: v / jnp.where(going, length, 1.0),
      lambda: _random_unit(jax.random.fold_in(key, j), v, [space.locked, basis]),
    )
    column = (first + second).at[j + 1].set(length)
    return basis.at[j + 1].set(v), small.at[:, j].set(column)

  steps = space.small.shape[1]
  basis, small = jax.lax.fori_loop(space.kept, steps, step, (space.basis, space.small))
  return space._replace(basis=basis, small=small)


def _restart(space, key, symmetric):
  """What has converged, and a smaller space to go on with."""
  k, slots = space.found.size, space.locked_values.size
  steps, dtype = space.small.shape[1], space.small.dtype
  eps, most = jnp.finfo(dtype).eps, jnp.finfo(dtype).max
  square, last, rows = space.small[:-1], space.small[-1], space.basis[:-1]
  if symmetric:
    # The columns are complete, while rows of what was kept may have been dropped.
    square = jnp.triu(square) + jnp.triu(square, 1).T
  # Some solvers answer with numbers where there are none.
  finite = jnp.all(jnp.isfinite(space.small))
  ritz = _ritz(jnp.where(finite, square, 0.0), last, symmetric)
  ritz = ritz._replace(residuals=ritz.residuals + _numerics.zero_if(finite, dtype))

  # The smallest of all, the locked ones included, whose residuals are rounding errors.
  unused = jnp.arange(slots) >= space.locked_count
  locked_values = jnp.where(unused, most, space.locked_values)
  negated, smallest = jax.lax.top_k(-jnp.concatenate([locked_values, ritz.values]), k)
  found = -negated
  padded = lambda x: jnp.concatenate([jnp.zeros(slots, dtype), x])[smallest]
  residuals, sizes = padded(ritz.residuals), padded(ritz.sizes)

  # Small residuals that no longer become less are rounding errors of the products.
  locked_sizes = jnp.abs(space.locked_values)
  largest = jnp.maximum(jnp.max(ritz.sizes), jnp.max(locked_sizes, initial=0.0))
  rounding, residual = 16 * eps * largest, jnp.max(residuals)
  moving = (residual < 0.9 * space.residual) | (residual > rounding)
  stalled = jnp.where(moving & (space.stalled < 3), 0, space.stalled + 1)
  ending = (stalled >= 3) | (space.cycle == RESTARTS)
  tolerances = eps ** (2 / 3) * sizes + jnp.where(ending, rounding, 0.0)
  good = residuals <= tolerances

  # Eigenvalues that dwarf those looked for drown them in rounding errors of the small
  # matrix. Split off, they matter to the second order of their residuals only.
  dwarf = ritz.sizes > 32 * jnp.min(jnp.abs(found))
  dwarf &= ritz.residuals <= 10 * eps * ritz.sizes
  _, ranked = jax.lax.top_k(jnp.where(dwarf, ritz.sizes, -1.0), slots)
  place = space.locked_count + jnp.arange(slots)
  place = jnp.where(dwarf[ranked] & (place < slots), place, slots)
  locked = space.locked.at[place].set(
    _dot(ritz.vectors[:, ranked].T, rows), mode='drop'
  )
  locked_values = space.locked_values.at[place].set(ritz.values[ranked], mode='drop')
  locking = jnp.any(place < slots)
  leaving = jnp.where(place < slots, ranked, steps)
  staying = ritz.vectors.at[:, leaving].set(0.0, mode='drop')

  converged = jnp.all(good) & ~locking
  same = jnp.all(jnp.abs(found - space.found) <= 2 * tolerances)
  # One of several equal eigenvalues may be hidden from a start, not from the next.
  done = converged & ((k == 1) | (space.converged & same))

  # Kept are the smallest half, or what has converged; nothing where the small matrix
  # was inaccurate, but the sum of the half.
  kept = jnp.where(converged, jnp.sum(smallest >= slots), steps // 2)
  kept = jnp.where(ritz.second[kept], kept + 1, kept)
  kept = jnp.where(locking, 0, kept)
  chosen = jnp.where(jnp.arange(steps) < kept, ritz.vectors, 0.0)
  basis = jnp.zeros_like(space.basis).at[:-1].set(_dot(chosen.T, rows))
  follower = jax.lax.switch(
    jnp.where(locking, 2, jnp.where(converged, 1, 0)),
    [
      lambda: space.basis[-1],
      lambda: _random_unit(key, space.basis[-1], [locked, basis]),
      lambda: _unit(_dot(jnp.sum(staying[:, : steps // 2], axis=1), rows), [locked]),
    ],
  )
  coupling = jnp.where(converged, 0.0, _dot(last, chosen))
  small = jnp.zeros_like(space.small).at[:-1].set(_dot(chosen.T, _dot(square, chosen)))
  return _Space(
    basis=basis.at[kept].set(follower),
    small=small.at[kept].set(coupling),
    kept=jnp.asarray(kept, int),
    locked=locked,
    locked_values=locked_values,
    locked_count=space.locked_count + jnp.sum(place < slots),
    found=found,
    good=good,
    converged=converged,
    done=done,
    residual=jnp.where(locking, most, jnp.minimum(space.residual, residual)),
    stalled=jnp.where(locking, 0, stalled),
    cycle=space.cycle + 1,
  )


def _ritz(square, last, symmetric):
  if symmetric:
    values, vectors = jnp.linalg.eigh(square)
    second = jnp.zeros(values.shape, bool)
    return _Ritz(values, jnp.abs(values), jnp.abs(_dot(last, vectors)), vectors, second)
  values, vectors = jnp.linalg.eig(square)
  order = jnp.lexsort((-values.imag, jnp.abs(values.imag), values.real))
  values, vectors = values[order], vectors[:, order]
  second = values.imag < 0
  residuals = jnp.abs(_dot(last.astype(vectors.dtype), vectors))
  # A conjugate pair has the real and the imaginary part of its vector.
  real, _ = jnp.linalg.qr(jnp.where(second, vectors.imag, vectors.real))
  return _Ritz(values.real, jnp.abs(values), residuals, real, second)


def _dot(a, b):
  """The product, in full precision on accelerators as well."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _orthogonalise(v, *spaces):
  """What is left of a vector, and its parts in the last of some spaces."""
  parts = jnp.zeros([], v.dtype)
  for rows in spaces:
    parts = _dot(rows, v)
    v = v - _dot(parts, rows)
  return v, parts


def _unit(v, spaces):
  """A vector of length one, orthogonal to some spaces."""
  for _ in range(2):
    v, _ = _orthogonalise(v / jnp.linalg.norm(v), *spaces)
  return v / jnp.linalg.norm(v)


def _random_unit(key, like, spaces):
  return _unit(jax.random.normal(key, like.shape, like.dtype), spaces)
