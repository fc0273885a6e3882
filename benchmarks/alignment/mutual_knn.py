"""How alike two representations of the same things are, by their neighbours."""

import jax
import jax.numpy as jnp


def mutual_knn(
  text_features: jax.Array, image_features: jax.Array, k: int = 8
) -> jax.Array:
  """Mean share of the k nearest neighbours that two spaces have in common.

  Row ``i`` of both arrays is the same thing, say a name and its picture. Near is what
  has a large cosine similarity, and a point is not its own neighbour. Of points at the
  same distance the one with the lower index counts as nearer. Unrelated spaces have
  about ``k/(N − 1)``, the same neighbours everywhere are 1.

  Args:
    text_features: ``[N, D]``.
    image_features: ``[N, E]``; ``E`` need not be ``D``.
    k: number of neighbours, 1 <= k < N.

  Returns:
    A scalar between 0 and 1.

  Raises:
    ValueError: if the arrays are not of as many points, or ``k`` is out of range.

  References:
    Huh et al., `The Platonic Representation Hypothesis
    <https://arxiv.org/abs/2405.07987>`_, 2024
  """
  points = len(text_features)
  if len(image_features) != points:
    raise ValueError(
      'The same points are needed in both spaces, got'
      f' {points} and {len(image_features)}.'
    )
  if not 1 <= k < points:
    raise ValueError(f'`k` must be in [1, {points - 1}], got {k}.')
  common = _neighbours(text_features, k) & _neighbours(image_features, k)
  return jnp.sum(common) / (points * k)


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """Rows of length one; a zero row stays zero and has a finite gradient."""
  return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + eps)


def _neighbours(x, k):
  """``[N, N]`` bools: whether column j is among the k nearest of row i."""
  x = unit(x)
  similarity = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, x @ x.T)
  _, nearest = jax.lax.top_k(similarity, k)
  rows = jnp.arange(len(x))[:, None]
  return jnp.zeros(similarity.shape, bool).at[rows, nearest].set(True)
