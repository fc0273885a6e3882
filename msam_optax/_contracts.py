"""What the contracts share: sentences that hold or fail, and trees to compare."""

from collections.abc import Iterator
import contextlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from msam_optax import _masks

# The result of each dtype is compared to this relative precision.
_PRECISION = {'float64': 1e-9, 'float32': 1e-5, 'bfloat16': 2e-2}
AXIS = 'of msam_optax.testing'


@contextlib.contextmanager
def promise(sentence: str) -> Iterator[None]:
  """What fails inside is an ``AssertionError`` that begins with the sentence."""
  try:
    yield
  except Exception as error:
    detail = str(error)
    if not isinstance(error, AssertionError):
      detail = f'It raised {type(error).__name__}: {detail}'
    raise AssertionError(f'{sentence}\n{detail}') from error


def expect(condition: Any, message: str) -> None:
  if not condition:
    raise AssertionError(message)


def check_example(grads, params):
  """Raises unless gradients can be an example: usage, and no contract."""
  try:
    chex.assert_trees_all_equal_shapes(grads, params)
    chex.assert_tree_all_finite(grads)
    expect(np.any(flat(grads)), 'They are zero.')
    for x in jax.tree.leaves((grads, params)):
      expect(jnp.issubdtype(jnp.result_type(x), jnp.floating), f'{x!r} is not real.')
  except AssertionError as error:
    raise ValueError(
      'The gradients to test with must be real, finite, like the params, and not all'
      f' zero. {error}'
    ) from error


def assert_close(got, expected, rtol):
  """Close, relative to the largest entry of each leaf, at the dtype's precision."""
  chex.assert_trees_all_equal_shapes(got, expected)
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, want), x in zip(leaves, jax.tree.leaves(got), strict=True):
    if not jnp.issubdtype(jnp.result_type(want), jnp.floating):
      expect(np.array_equal(x, want), f'{at(path)} {x} is not {want}.')
      continue
    x, want, limit = float64(x), float64(want), max(rtol, precision(x, want))
    np.testing.assert_allclose(
      x,
      want,
      rtol=0,
      atol=limit * np.max(np.abs(want), initial=0.0),
      err_msg=f'{at(path)} it is another (relative tolerance {limit:.0e}).',
    )


def assert_same_types(got, expected):
  """The same structure, shapes, dtypes and weak types."""
  got, expected = (jax.eval_shape(lambda tree: tree, x) for x in (got, expected))
  chex.assert_trees_all_equal_structs(got, expected)
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, want), x in zip(leaves, jax.tree.leaves(got), strict=True):
    kinds = [(y.shape, y.dtype.name, y.weak_type) for y in (x, want)]
    names = [f'{d}{list(s)}{" (weak)" if w else ""}' for s, d, w in kinds]
    expect(kinds[0] == kinds[1], f'{at(path)} it is {names[0]}, not {names[1]}.')


def assert_no_narrower(update, grads):
  leaves = jax.tree_util.tree_leaves_with_path(update)
  for (path, u), g in zip(leaves, jax.tree.leaves(grads), strict=True):
    got, want = jnp.result_type(u), jnp.result_type(g)
    floating = jnp.issubdtype(got, jnp.floating)
    expect(
      floating and jnp.finfo(got).eps <= jnp.finfo(want).eps,
      f'{at(path)} it is {got}, and the gradient {want}.',
    )


def at(path):
  where = _masks.at_path(path)
  return where[0].upper() + where[1:]


def dtypes():
  wide = ('float64',) if jax.config.jax_enable_x64 else ()  # pyright: ignore
  return ('float32', 'bfloat16', *wide)


def cast(tree, dtype):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def precision(*xs):
  return max(_PRECISION.get(jnp.result_type(x).name, 1e-2) for x in xs)


def float64(x):
  return np.asarray(x).astype(np.float64)


def flat(tree):
  return np.concatenate([float64(x).ravel() for x in jax.tree.leaves(tree)])


def with_entry(tree, bad, path=None):
  """The tree with one entry of a leaf, by default of the first, replaced."""
  if path is None:
    path = jax.tree_util.tree_leaves_with_path(tree)[0][0]

  def of_leaf(p, x):
    if p != path:
      return x
    entries = np.array(x)
    entries.flat[0] = bad
    return jnp.asarray(entries)

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def all_but(path, tree):
  """A mask of all leaves but one."""
  return jax.tree_util.tree_map_with_path(lambda p, _: p != path, tree)


def scaled(factor, tree):
  return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def of_magnitude(size, tree):
  """The tree with ``size`` as its largest magnitude."""
  result = scaled(size / float(np.max(np.abs(flat(tree)))), tree)
  if not all_finite(result) or not np.any(flat(result)):
    names = sorted({jnp.result_type(x).name for x in jax.tree.leaves(tree)})
    raise ValueError(
      f'Gradients in {", ".join(names)} cannot be as large or small as {size:.0e}:'
      ' give others as `magnitudes`, as in `magnitudes=(1e-3, 1e3)`.'
    )
  return result


def stack(*trees):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def all_finite(tree):
  return all(np.all(np.isfinite(float64(x))) for x in jax.tree.leaves(tree))
