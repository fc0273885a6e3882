"""What the assertions of ``testing`` are made of: one check for each sentence."""

from collections.abc import Iterator
import contextlib
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from msam_optax import _masks
from msam_optax import metrics
from msam_optax import spaces

# The result of each dtype is compared to this relative precision.
_PRECISION = {'float64': 1e-9, 'float32': 1e-5, 'bfloat16': 2e-2}
_AXIS = 'of msam_optax.testing'


# Metrics.


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
  with promise(f'`init` and `ascend` accept what they are given ({where}).'):
    state = metric.init(params)
    result = ascend(metric, grads, state, params, extra_args=extra_args)
  with promise(f'`ascend` returns `(Ascent, state)` ({where}).'):
    is_pair = isinstance(result, tuple) and len(result) == 2
    _expect(
      is_pair and isinstance(result[0], metrics.Ascent), f'It returned {result!r}.'
    )
  ascent, new_state = result
  with promise(f'The direction is like the gradients ({where}).'):
    chex.assert_trees_all_equal_shapes(ascent.direction, grads)
  with promise(f'The direction has no narrower dtypes than the gradients ({where}).'):
    _assert_no_narrower(ascent.direction, grads)
  with promise(f'The slope is a scalar, float32 or wider ({where}).'):
    chex.assert_shape(ascent.slope, ())
    chex.assert_type(ascent.slope, _wide(grads))
  with promise(f'Direction and slope are finite ({where}).'):
    chex.assert_tree_all_finite(ascent)

  g, d, slope = _flat(grads), _flat(ascent.direction), float(ascent.slope)
  rtol = max([rtol, *(precision(x) for x in jax.tree.leaves(grads))])
  with promise(f'The slope is positive where the gradient is not zero ({where}).'):
    _expect(slope > 0, f'The slope is {slope:.6g}.')
  with promise(f'The slope of a metric is ⟨g, direction⟩ ({where}).'):
    _expect(
      abs(slope - g @ d) <= rtol * (np.abs(g) @ np.abs(d)),
      f'The slope is {slope:.6g}, and ⟨g, direction⟩ is {g @ d:.6g}.',
    )
  if ascent.length is not None:
    with promise(f'The length, if there is one, is ‖direction‖₂, a scalar ({where}).'):
      chex.assert_shape(ascent.length, ())
      chex.assert_type(ascent.length, _wide(grads))
      length, size = float(ascent.length), np.linalg.norm(d)
      _expect(
        abs(length - size) <= rtol * size,
        f'The length is {length:.6g}, and ‖direction‖₂ is {size:.6g}.',
      )
  if matrix is not None:
    G = _matrix(matrix, g, params, kept)
    with promise(f'The direction is of length one under the metric ({where}).'):
      square, size = d @ G @ d, np.abs(d) @ np.abs(G) @ np.abs(d)
      _expect(
        abs(square - 1.0) <= 2 * rtol * max(size, 1.0),
        f'direction · G direction is {square:.6g}, and must be 1.',
      )
    # Beyond that the solve is not exact enough to compare with.
    if np.linalg.cond(G) < 1e8:
      with promise(f'The direction is G⁻¹g/√(gᵀG⁻¹g) ({where}).'):
        unit = g / np.max(np.abs(g))
        u = np.linalg.solve(G, unit)
        assert_close(ascent.direction, _like(u / np.sqrt(unit @ u), grads), rtol)
  with promise(f'The state keeps its structure, shapes and dtypes ({where}).'):
    _assert_same_types(new_state, state)
  return state, ascent


def _matrix(matrix, g, params, kept):
  """The metric's matrix, for the coordinates that are kept."""
  if kept is None:
    w = _flat(params)
    return _float64(matrix(g, w) if callable(matrix) else matrix)
  full = np.zeros(kept.coordinates.shape)
  full[kept.coordinates] = g
  G = _float64(matrix(full, kept.params) if callable(matrix) else matrix)
  return G[np.ix_(kept.coordinates, kept.coordinates)]


class _Kept(NamedTuple):
  """What a mask keeps of the flat params: one bool per coordinate, and all of them."""

  coordinates: np.ndarray
  params: np.ndarray


def check_masked(check, call, metric, grads, params, path, rtol):
  mask = _all_but(path, grads)
  where = f'{jax.tree_util.keystr(path)} masked out'
  coordinates = jax.tree.map(lambda keep, x: np.full(np.shape(x), keep), mask, grads)
  kept = _Kept(_flat(coordinates).astype(bool), _flat(params))
  g, w = (_masks.restrict(tree, mask) for tree in (grads, params))
  if not np.any(_flat(g)):
    return
  state, ascent = check(g, w, where, kept=kept)

  g, w = (_without(tree, mask) for tree in (grads, params))
  try:
    alone = metric.init(w)
    expected, _ = call(g, alone, w)
  except Exception:  # A metric may go by names and masks that this tree does not fit.
    return
  with promise(f'Where leaves are masked out, the sub-tree is what counts ({where}).'):
    assert_close(jax.tree.leaves(ascent), jax.tree.leaves(expected), rtol)
  with promise(f'The state keeps nothing of leaves that are masked out ({where}).'):
    shapes = lambda tree: [jnp.shape(x) for x in jax.tree.leaves(tree)]
    _expect(
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
    return PartitionSpec(*() if axis is None else (*[None] * axis, _AXIS))

  space = spaces.over(None, jax.tree.map(spec, grads))

  def of_part(g, w):
    state = metric.init(w)
    return ascend(metric, g, state, w, extra_args=extra_args, space=space)[0]

  with promise(
    'Sums over leaves are those of `space`, so that they are right for sharded leaves'
    ' (`sharded=False` if the metric needs whole ones).'
  ):
    parts = jax.vmap(of_part, axis_name=_AXIS)(
      *(jax.tree.map(cut, tree) for tree in (grads, params))
    )
    direction = jax.tree.map(cut, ascent.direction)
    _, *numbers = jax.tree.map(lambda x: jnp.stack([x] * count), ascent)
    assert_close(tuple(parts), (direction, *numbers), rtol)


def check_compiled(call, grads, params, state, rtol):
  with promise('Under `jit` a metric does what it does without.'):
    compiled = jax.jit(call)(grads, state, params)
    assert_close(compiled, call(grads, state, params), rtol)

  rows = [_scaled(factor, grads) for factor in (1.0, 0.0, -0.5)]
  stacked = _stack(*rows)
  with promise('Under `vmap` a metric does what it does for each gradient.'):
    batched = jax.vmap(call, in_axes=(0, None, None))(stacked, state, params)
    looped = [call(g, state, params) for g in rows]
    assert_close(batched, _stack(*looped), rtol)

  def body(state, g):
    ascent, state = call(g, state, params)
    return state, ascent

  with promise('Under `scan` a metric does what it does in a loop.'):
    scanned = jax.lax.scan(body, state, stacked)
    ascents = []
    for g in rows:
      state, ascent = body(state, g)
      ascents.append(ascent)
    looped = state, _stack(*ascents)
    assert_close(scanned, looped, rtol)


# Combinations.


def check_combined(combination, grads, params, where, magnitudes, rtol):
  """All that holds for the gradients of a step, of all passes or the first alone."""

  def combine(grads, state):
    return combination.combine(grads, state, spaces.LOCAL)

  def check(grads, params, where):
    with promise(f'`init` and `combine` accept what they are given ({where}).'):
      state = combination.init(params)
      result = combine(grads, state)
    with promise(f'`combine` returns `(update, state)` ({where}).'):
      is_pair = isinstance(result, tuple) and len(result) == 2
      _expect(is_pair, f'It returned {result!r}.')
    update, new_state = result
    with promise(f'The update is like the gradients ({where}).'):
      chex.assert_trees_all_equal_shapes(update, grads[0])
    with promise(f'The update has no narrower dtypes than the gradients ({where}).'):
      _assert_no_narrower(update, grads[0])
    with promise(f'The state keeps its structure, shapes and dtypes ({where}).'):
      _assert_same_types(new_state, state)
    with promise(f'The update is finite where the gradients are ({where}).'):
      chex.assert_tree_all_finite(update)
    if combination.due is not None:
      with promise(f'`due` is a bool, one scalar ({where}).'):
        due = jax.eval_shape(
          lambda g, state: combination.due(g, state, spaces.LOCAL), grads[0], state
        )
        chex.assert_shape(due, ())
        chex.assert_type(due, bool)
    return state, result

  state, result = check(grads, params, where)
  with promise(f'A combination is pure: the same again ({where}).'):
    chex.assert_trees_all_equal(combine(grads, state), result)
  for name in dtypes():
    check(cast(grads, name), cast(params, name), f'{where}, in {name}')
  check(_scaled(0.0, grads), params, f'{where}, all zero')
  for size in magnitudes:
    scaled = tuple(of_magnitude(size, g) for g in grads)
    check(scaled, params, f'{where}, up to {size:.0e}')
  for path, _ in jax.tree_util.tree_leaves_with_path(params) if _many(params) else ():
    mask = _all_but(path, params)
    *fewer, w = (_masks.restrict(x, mask) for x in (*grads, params))
    check(tuple(fewer), w, f'{where}, {jax.tree_util.keystr(path)} left out')

  # What is not finite at the params is so at the probes: they are marked.
  for first in range(len(grads)):
    for bad in (jnp.nan, jnp.inf):
      marked = tuple(
        with_entry(g, bad) if (i == first or first == 0) else g
        for i, g in enumerate(grads)
      )
      update, marked_state = combine(marked, state)
      with promise(f'A gradient that is not finite is not hidden ({where}).'):
        _expect(
          not _all_finite(update), f'With {bad} in gradient {first} all is finite.'
        )
      with promise(f'What is not finite does not stay in the state ({where}).'):
        chex.assert_tree_all_finite(combine(grads, marked_state)[0])
  _check_replicas(combination, grads, state, result, where, rtol)

  with promise(f'Under `jit` it does what it does without ({where}).'):
    assert_close(jax.jit(combine)(grads, state), result, rtol)
  twice = jax.tree.map(lambda g: jnp.stack([g, g]), grads)
  with promise(f'Under `scan` it does what it does in a loop ({where}).'):
    last, updates = jax.lax.scan(lambda s, g: combine(g, s)[::-1], state, twice)
    second = combine(grads, result[1])
    looped = _stack(result[0], second[0])
    assert_close((last, updates), (second[1], looped), rtol)


def _check_replicas(combination, grads, state, result, where, rtol):
  space = spaces.over(_AXIS)

  def of_replica(grads):
    outcome = combination.combine(grads, state, space)
    if combination.due is None:
      return outcome, ()
    return outcome, combination.due(grads[0], state, space)

  def on_replicas(*each):
    results = jax.vmap(of_replica, axis_name=_AXIS)(_stack(*each))
    return [_row(i, results) for i in range(len(each))]

  # Other directions as well as other lengths.
  turned = jax.tree.map(lambda g: (-3 * jnp.flip(g)).astype(g.dtype), grads)
  far = jax.tree.map(lambda g: (g * g + 0.5).astype(g.dtype), grads)
  with promise(
    "All replicas get the same update, state and `due`: means are `space.mean`'s."
  ):
    first, *others = on_replicas(grads, turned, far)
    for other in others:
      chex.assert_trees_all_equal(other, first)
  with promise(
    'Replicas with the same gradients get what one device gets: means are'
    " `space.mean`'s."
  ):
    (same, _), *_ = on_replicas(grads, grads)
    assert_close(same, result, rtol)
  with promise(
    'Replicas get what one device gets of the mean gradients: first `space.mean`, then'
    ' a formula that is not linear.'
  ):
    mean = lambda *xs: jnp.mean(jnp.stack(xs), axis=0)
    means = jax.tree.map(mean, grads, turned, far)
    (update, _), _ = first
    assert_close(update, combination.combine(means, state, spaces.LOCAL)[0], rtol)


def _assert_no_narrower(update, grads):
  leaves = jax.tree_util.tree_leaves_with_path(update)
  for (path, u), g in zip(leaves, jax.tree.leaves(grads), strict=True):
    got, want = jnp.result_type(u), jnp.result_type(g)
    floating = jnp.issubdtype(got, jnp.floating)
    _expect(
      floating and jnp.finfo(got).eps <= jnp.finfo(want).eps,
      f'{_at(path)} it is {got}, and the gradient {want}.',
    )


# Methods.


def check_update_types(tx, params, grads, where, grad_fn):
  def both(params, grads):
    state = tx.init(params)
    return state, tx.update(grads, state, params, grad_fn=grad_fn)

  with promise(f'`init` and `update` accept what they are given ({where}).'):
    state, result = jax.eval_shape(both, params, grads)
  with promise(f'`update` returns `(updates, state)` ({where}).'):
    is_pair = isinstance(result, tuple) and len(result) == 2
    _expect(is_pair, f'It returned {result!r}.')
  updates, new_state = result
  with promise(f'The updates are like the gradients ({where}).'):
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
  with promise(f'The state keeps its structure, shapes and dtypes ({where}).'):
    _assert_same_types(new_state, state)


def check_arguments(update, params, state, loss_fn, rtol):
  with promise('A method is pure: the same arguments give the same again.'):
    result = update(params, state)
    chex.assert_trees_all_equal(update(params, state), result)
  with promise('A count in the state grows by one in each step.'):
    count_before, count_after = (_values(s, 'count') for s in (state, result[1]))
    steps = [b - a for a, b in zip(count_before, count_after, strict=True)]
    _expect(
      not steps or (max(steps) == 1 and min(steps) >= 0),
      f'The counts {count_before} became {count_after}.',
    )
  with promise('`grad_fn` and `value_and_grad_fn` give the same update.'):
    other = update(params, state, value_and_grad_fn=jax.value_and_grad(loss_fn))
    assert_close(other[0], result[0], rtol)
  with promise('Extra arguments that it does not know are left to others.'):
    other = update(
      params,
      state,
      grad_fn=jax.grad(loss_fn),
      value=loss_fn(params),
      argument_of_another=None,
    )
    assert_close(other[0], result[0], rtol)
  with promise('The state is of arrays: a copy in host memory does the same.'):
    other = update(params, jax.device_get(state))
    assert_close(other, result, rtol)


def check_transformed(tx, update, params, state, rtol):
  def step(params, state):
    updates, state = update(params, state)
    return jax.tree.map(lambda w, u: w - 0.01 * u, params, updates), state

  looped = [(params, state)]
  for _ in range(2):
    looped.append(step(*looped[-1]))
  with promise('Under `scan` a method does what it does in a loop.'):
    body = lambda carry, _: (step(*carry), None)
    assert_close(jax.lax.scan(body, looped[0], length=2)[0], looped[-1], rtol)
  with promise('Under `jit` with donated arguments a method does what it does.'):
    # The state that `init` makes is donated as it is, and may hold no array twice.
    w = jax.tree.map(jnp.copy, params)
    donated = jax.jit(step, donate_argnums=(0, 1))(w, tx.init(w))
    assert_close(donated, looped[1], rtol)

  rows = [params, _scaled(0.5, params)]
  with promise('Under `vmap` a method does what it does for each of the params.'):
    stacked = _stack(*rows)
    batched = jax.vmap(step)(stacked, jax.vmap(tx.init)(stacked))
    each = [looped[1], step(rows[1], tx.init(rows[1]))]
    assert_close(batched, _stack(*each), rtol)


def check_chained(tx, params, state, loss_fn):
  with promise('`optax.tree.map_params` goes through the state.'):
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(mapped, state)
  # Adam raises a float to its integer count.
  with (
    promise('It can stand before Adam in `optax.chain`.'),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    chain = optax.chain(tx, optax.adam(1e-3))
    chained = chain.init(params)
    grads = jax.grad(loss_fn)(params)
    updates, new = chain.update(grads, chained, params, grad_fn=jax.grad(loss_fn))
    chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_structs(new, chained)


def check_probe_gradient(tx, params, grads, state):
  """Zero gradients, and gradients that are not finite, in either pass."""

  @jax.jit
  def update(grads, state, at_params, slope):
    """The gradient at the probe is ``at_params + slope · δ``."""

    def grad_fn(probe):
      def of_leaf(g, p, w):
        return g.astype(p.dtype) + slope.astype(p.dtype) * (p - w.astype(p.dtype))

      return jax.tree.map(of_leaf, at_params, probe, params)

    return tx.update(grads, state, params, grad_fn=grad_fn)

  none, one = jnp.zeros([], jnp.float32), jnp.ones([], jnp.float32)
  zeros = jax.tree.map(jnp.zeros_like, grads)
  with promise('A zero gradient is not perturbed.'):
    updates, _ = update(zeros, state, zeros, one)
    chex.assert_trees_all_equal(updates, zeros)

  other = jax.tree.map(lambda g: (2 * g + 1).astype(g.dtype), grads)
  with promise('The update depends on the gradient at the probe.'):
    # A method need not have a probe in every step.
    for _ in range(32):
      updates, new_state = update(grads, state, grads, none)
      if not _identical(updates, update(grads, state, other, none)[0]):
        break
      state = new_state
    else:
      raise AssertionError('In 32 steps it was the same for two of them.')

  for path, _ in jax.tree_util.tree_leaves_with_path(grads):
    for bad in (jnp.nan, jnp.inf):
      marked = with_entry(grads, bad, path)
      for where, given in {
        'the gradient at the params': (marked, grads),
        'the gradient at the probe': (grads, marked),
      }.items():
        updates, new_state = update(given[0], state, given[1], none)
        at = f'With {bad} in {where}'
        with promise(
          'A gradient that is not finite gives an update that is not finite in the same'
          ' leaf.'
        ):
          leaf = dict(jax.tree_util.tree_leaves_with_path(updates))[path]
          _expect(
            not _all_finite(leaf), f'{at} the update {_masks.at_path(path)} is {leaf}.'
          )
        with promise('`finite` in the state says whether the update is.'):
          flags = _values(new_state, 'finite')
          _expect(not any(flags), f'{at} {_masks.at_path(path)} it is True.')
        with promise('A gradient that is not finite does not stay in the state.'):
          after, new_state = update(grads, new_state, grads, none)
          chex.assert_tree_all_finite(after)
          _expect(all(_values(new_state, 'finite')), '`finite` is still False.')


# Both.


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


def _expect(condition: Any, message: str) -> None:
  if not condition:
    raise AssertionError(message)


def check_example(grads, params):
  """Raises unless gradients can be an example: usage, and no contract."""
  try:
    chex.assert_trees_all_equal_shapes(grads, params)
    chex.assert_tree_all_finite(grads)
    _expect(np.any(_flat(grads)), 'They are zero.')
    for x in jax.tree.leaves((grads, params)):
      _expect(jnp.issubdtype(jnp.result_type(x), jnp.floating), f'{x!r} is not real.')
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
      _expect(np.array_equal(x, want), f'{_at(path)} {x} is not {want}.')
      continue
    x, want, limit = _float64(x), _float64(want), max(rtol, precision(x, want))
    np.testing.assert_allclose(
      x,
      want,
      rtol=0,
      atol=limit * np.max(np.abs(want), initial=0.0),
      err_msg=f'{_at(path)} it is another (relative tolerance {limit:.0e}).',
    )


def _assert_same_types(got, expected):
  """The same structure, shapes, dtypes and weak types."""
  got, expected = (jax.eval_shape(lambda tree: tree, x) for x in (got, expected))
  chex.assert_trees_all_equal_structs(got, expected)
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, want), x in zip(leaves, jax.tree.leaves(got), strict=True):
    kinds = [(y.shape, y.dtype.name, y.weak_type) for y in (x, want)]
    names = [f'{d}{list(s)}{" (weak)" if w else ""}' for s, d, w in kinds]
    _expect(kinds[0] == kinds[1], f'{_at(path)} it is {names[0]}, not {names[1]}.')


def _at(path):
  where = _masks.at_path(path)
  return where[0].upper() + where[1:]


def dtypes():
  wide = ('float64',) if jax.config.jax_enable_x64 else ()  # pyright: ignore
  return ('float32', 'bfloat16', *wide)


def cast(tree, dtype):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def precision(*xs):
  return max(_PRECISION.get(jnp.result_type(x).name, 1e-2) for x in xs)


def _wide(tree):
  dtypes = {jnp.result_type(x).name for x in jax.tree.leaves(tree)}
  return jnp.float64 if 'float64' in dtypes else jnp.float32


def _float64(x):
  return np.asarray(x).astype(np.float64)


def _flat(tree):
  return np.concatenate([_float64(x).ravel() for x in jax.tree.leaves(tree)])


def _like(vector, tree):
  """The inverse of :func:`_flat`, in float64."""
  leaves, structure = jax.tree.flatten(tree)
  ends = np.cumsum([np.size(x) for x in leaves])[:-1]
  parts = np.split(vector, ends)
  return structure.unflatten(
    [p.reshape(np.shape(x)) for p, x in zip(parts, leaves, strict=True)]
  )


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


def _without(tree, mask):
  """The sub-tree that a mask keeps, with the others gone from dicts and lists."""
  if isinstance(tree, dict):
    kept = {k: _without(v, mask[k]) for k, v in tree.items()}
    return type(tree)({k: v for k, v in kept.items() if jax.tree.leaves(v)})
  if type(tree) in (list, tuple):
    kept = [_without(v, m) for v, m in zip(tree, mask, strict=True)]
    return type(tree)(v for v in kept if jax.tree.leaves(v))
  return jax.tree.map(lambda keep, x: x if keep else None, mask, tree)


def _all_but(path, tree):
  """A mask of all leaves but one."""
  return jax.tree_util.tree_map_with_path(lambda p, _: p != path, tree)


def _scaled(factor, tree):
  return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def of_magnitude(size, tree):
  """The tree with ``size`` as its largest magnitude."""
  scaled = _scaled(size / float(np.max(np.abs(_flat(tree)))), tree)
  if not _all_finite(scaled) or not np.any(_flat(scaled)):
    dtypes = sorted({jnp.result_type(x).name for x in jax.tree.leaves(tree)})
    raise ValueError(
      f'Gradients in {", ".join(dtypes)} cannot be as large or small as {size:.0e}:'
      ' give others as `magnitudes`, as in `magnitudes=(1e-3, 1e3)`.'
    )
  return scaled


def _stack(*trees):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _row(i, tree):
  return jax.tree.map(lambda x: x[i], tree)


def _many(tree):
  return len(jax.tree.leaves(tree)) > 1


def _all_finite(tree):
  return all(np.all(np.isfinite(_float64(x))) for x in jax.tree.leaves(tree))


def _identical(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in pairs)


def _values(state, name):
  """The scalars in a state that have a name, in order."""
  return [
    np.asarray(x).item()
    for _, x in optax.tree.get_all_with_path(state, name)
    if np.ndim(x) == 0
  ]
