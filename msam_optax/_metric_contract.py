"""What every metric must hold: the checks of ``testing.assert_metric``."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from msam_optax import _contracts
from msam_optax import _masks
from msam_optax import metrics
from msam_optax import spaces


def ascend(metric, grads, state, params, *, extra_args, space=spaces.LOCAL):
  """The metric, with all that it must accept; the loss is linear."""
  return metric.ascend(
    grads,
    state,
    params,
    **{
      'rho': jnp.asarray(0.1, jnp.float32),
      'grad_fn': lambda params: grads,
      'value': jnp.asarray(1.0, jnp.float32),
      'argument_of_another': None,
      **extra_args,
      'space': space,
    },
  )


def check_ascent(metric, grads, params, where, *, matrix, rtol, extra_args, kept=None):
  """All that holds for one gradient; returns the first state and the ascent."""
  with _contracts.promise(f'`init` and `ascend` accept what they are given ({where}).'):
    state = metric.init(params)
    result = ascend(metric, grads, state, params, extra_args=extra_args)
  with _contracts.promise(f'`ascend` returns `(Ascent, state)` ({where}).'):
    is_pair = isinstance(result, tuple) and len(result) == 2
    _contracts.expect(
      is_pair and isinstance(result[0], metrics.Ascent), f'It returned {result!r}.'
    )
  ascent, new_state = result
  with _contracts.promise(f'The direction is like the gradients ({where}).'):
    chex.assert_trees_all_equal_shapes(ascent.direction, grads)
  with _contracts.promise(
    f'The direction has no narrower dtypes than the gradients ({where}).'
  ):
    _contracts.assert_no_narrower(ascent.direction, grads)
  with _contracts.promise(f'The slope is a scalar, float32 or wider ({where}).'):
    chex.assert_shape(ascent.slope, ())
    chex.assert_type(ascent.slope, _wide(grads))
  with _contracts.promise(f'Direction and slope are finite ({where}).'):
    chex.assert_tree_all_finite(ascent)

  g, d, slope = (
    _contracts.flat(grads),
    _contracts.flat(ascent.direction),
    float(ascent.slope),
  )
  rtol = max([rtol, *(_contracts.precision(x) for x in jax.tree.leaves(grads))])
  with _contracts.promise(
    f'The slope is positive where the gradient is not zero ({where}).'
  ):
    _contracts.expect(slope > 0, f'The slope is {slope:.6g}.')
  with _contracts.promise(f'The slope of a metric is ⟨g, direction⟩ ({where}).'):
    _contracts.expect(
      abs(slope - g @ d) <= rtol * (np.abs(g) @ np.abs(d)),
      f'The slope is {slope:.6g}, and ⟨g, direction⟩ is {g @ d:.6g}.',
    )
  if ascent.length is not None:
    with _contracts.promise(
      f'The length, if there is one, is ‖direction‖₂, a scalar ({where}).'
    ):
      chex.assert_shape(ascent.length, ())
      chex.assert_type(ascent.length, _wide(grads))
      length, size = float(ascent.length), np.linalg.norm(d)
      _contracts.expect(
        abs(length - size) <= rtol * size,
        f'The length is {length:.6g}, and ‖direction‖₂ is {size:.6g}.',
      )
  if matrix is not None:
    G = _matrix(matrix, g, params, kept)
    with _contracts.promise(
      f'The direction is of length one under the metric ({where}).'
    ):
      square, size = d @ G @ d, np.abs(d) @ np.abs(G) @ np.abs(d)
      _contracts.expect(
        abs(square - 1.0) <= 2 * rtol * max(size, 1.0),
        f'direction · G direction is {square:.6g}, and must be 1.',
      )
    # Beyond that the solve is not exact enough to compare with.
    if np.linalg.cond(G) < 1e8:
      with _contracts.promise(f'The direction is G⁻¹g/√(gᵀG⁻¹g) ({where}).'):
        unit = g / np.max(np.abs(g))
        u = np.linalg.solve(G, unit)
        _contracts.assert_close(
          ascent.direction, _like(u / np.sqrt(unit @ u), grads), rtol
        )
  with _contracts.promise(
    f'The state keeps its structure, shapes and dtypes ({where}).'
  ):
    _contracts.assert_same_types(new_state, state)
  return state, ascent


def _matrix(matrix, g, params, kept):
  """The metric's matrix, for the coordinates that are kept."""
  if kept is None:
    w = _contracts.flat(params)
    return _contracts.float64(matrix(g, w) if callable(matrix) else matrix)
  full = np.zeros(kept.coordinates.shape)
  full[kept.coordinates] = g
  G = _contracts.float64(matrix(full, kept.params) if callable(matrix) else matrix)
  return G[np.ix_(kept.coordinates, kept.coordinates)]


class _Kept(NamedTuple):
  """What a mask keeps of the flat params: one bool per coordinate, and all of them."""

  coordinates: np.ndarray
  params: np.ndarray


def check_masked(check, call, metric, grads, params, path, rtol):
  mask = _contracts.all_but(path, grads)
  where = f'{jax.tree_util.keystr(path)} masked out'
  coordinates = jax.tree.map(lambda keep, x: np.full(np.shape(x), keep), mask, grads)
  kept = _Kept(_contracts.flat(coordinates).astype(bool), _contracts.flat(params))
  g, w = (_masks.restrict(tree, mask) for tree in (grads, params))
  if not np.any(_contracts.flat(g)):
    return
  state, ascent = check(g, w, where, kept=kept)

  g, w = (_without(tree, mask) for tree in (grads, params))
  try:
    alone = metric.init(w)
    expected, _ = call(g, alone, w)
  except Exception:  # A metric may go by names and masks that this tree does not fit.
    return
  with _contracts.promise(
    f'Where leaves are masked out, the sub-tree is what counts ({where}).'
  ):
    _contracts.assert_close(jax.tree.leaves(ascent), jax.tree.leaves(expected), rtol)
  with _contracts.promise(
    f'The state keeps nothing of leaves that are masked out ({where}).'
  ):
    shapes = lambda tree: [jnp.shape(x) for x in jax.tree.leaves(tree)]
    _contracts.expect(
      shapes(state) == shapes(alone),
      f'Its arrays have the shapes {shapes(state)}, and those of the sub-tree alone'
      f' {shapes(alone)}.',
    )


def check_sharded(metric, grads, params, ascent, rtol, extra_args):
  """Compares with leaves cut into parts along a mapped axis."""
  count = next(
    (
      next(i for i in range(2, n + 1) if n % i == 0)
      for x in jax.tree.leaves(grads)
      for n in jnp.shape(x)
      if n > 1
    ),
    None,
  )
  if count is None:  # Scalars have no parts.
    return

  def axis_of(x):
    return next((i for i, n in enumerate(jnp.shape(x)) if n and n % count == 0), None)

  def cut(x):
    axis = axis_of(x)
    parts = [x] * count if axis is None else jnp.split(x, count, axis)
    return jnp.stack(parts)

  def spec(x):
    axis = axis_of(x)
    return PartitionSpec(*() if axis is None else (*[None] * axis, _contracts.AXIS))

  space = spaces.over(None, jax.tree.map(spec, grads))

  def of_part(g, w):
    state = metric.init(w)
    return ascend(metric, g, state, w, extra_args=extra_args, space=space)[0]

  with _contracts.promise(
    'Sums over leaves are those of `space`, so that they are right for sharded leaves'
    ' (`sharded=False` if the metric needs whole ones).'
  ):
    parts = jax.vmap(of_part, axis_name=_contracts.AXIS)(
      *(jax.tree.map(cut, tree) for tree in (grads, params))
    )
    direction = jax.tree.map(cut, ascent.direction)
    _, *numbers = jax.tree.map(lambda x: jnp.stack([x] * count), ascent)
    _contracts.assert_close(tuple(parts), (direction, *numbers), rtol)


def check_compiled(call, grads, params, state, rtol):
  with _contracts.promise('Under `jit` a metric does what it does without.'):
    compiled = jax.jit(call)(grads, state, params)
    _contracts.assert_close(compiled, call(grads, state, params), rtol)

  rows = [_contracts.scaled(factor, grads) for factor in (1.0, 0.0, -0.5)]
  stacked = _contracts.stack(*rows)
  with _contracts.promise('Under `vmap` a metric does what it does for each gradient.'):
    batched = jax.vmap(call, in_axes=(0, None, None))(stacked, state, params)
    looped = [call(g, state, params) for g in rows]
    _contracts.assert_close(batched, _contracts.stack(*looped), rtol)

  def body(state, g):
    ascent, state = call(g, state, params)
    return state, ascent

  with _contracts.promise('Under `scan` a metric does what it does in a loop.'):
    scanned = jax.lax.scan(body, state, stacked)
    ascents = []
    for g in rows:
      state, ascent = body(state, g)
      ascents.append(ascent)
    looped = state, _contracts.stack(*ascents)
    _contracts.assert_close(scanned, looped, rtol)


def _wide(tree):
  dtypes = {jnp.result_type(x).name for x in jax.tree.leaves(tree)}
  return jnp.float64 if 'float64' in dtypes else jnp.float32


def _like(vector, tree):
  """The inverse of :func:`_flat`, in float64."""
  leaves, structure = jax.tree.flatten(tree)
  ends = np.cumsum([np.size(x) for x in leaves])[:-1]
  parts = np.split(vector, ends)
  return structure.unflatten(
    [p.reshape(np.shape(x)) for p, x in zip(parts, leaves, strict=True)]
  )


def _without(tree, mask):
  """The sub-tree that a mask keeps, with the others gone from dicts and lists."""
  if isinstance(tree, dict):
    kept = {k: _without(v, mask[k]) for k, v in tree.items()}
    return type(tree)({k: v for k, v in kept.items() if jax.tree.leaves(v)})
  if type(tree) in (list, tuple):
    kept = [_without(v, m) for v, m in zip(tree, mask, strict=True)]
    return type(tree)(v for v in kept if jax.tree.leaves(v))
  return jax.tree.map(lambda keep, x: x if keep else None, mask, tree)
