"""What every combination must hold: the checks of ``testing.assert_combination``."""

import chex
import jax
import jax.numpy as jnp

from msam_optax import _contracts
from msam_optax import _masks
from msam_optax import spaces


def check_combined(combination, grads, params, where, magnitudes, rtol):
  """All that holds for the gradients of a step, of all passes or the first alone."""

  def combine(grads, state):
    return combination.combine(grads, state, spaces.LOCAL)

  def check(grads, params, where):
    with _contracts.promise(
      f'`init` and `combine` accept what they are given ({where}).'
    ):
      state = combination.init(params)
      result = combine(grads, state)
    with _contracts.promise(f'`combine` returns `(update, state)` ({where}).'):
      is_pair = isinstance(result, tuple) and len(result) == 2
      _contracts.expect(is_pair, f'It returned {result!r}.')
    update, new_state = result
    with _contracts.promise(f'The update is like the gradients ({where}).'):
      chex.assert_trees_all_equal_shapes(update, grads[0])
    with _contracts.promise(
      f'The update has no narrower dtypes than the gradients ({where}).'
    ):
      _contracts.assert_no_narrower(update, grads[0])
    with _contracts.promise(
      f'The state keeps its structure, shapes and dtypes ({where}).'
    ):
      _contracts.assert_same_types(new_state, state)
    with _contracts.promise(f'The update is finite where the gradients are ({where}).'):
      chex.assert_tree_all_finite(update)
    if combination.due is not None:
      with _contracts.promise(f'`due` is a bool, one scalar ({where}).'):
        due = jax.eval_shape(
          lambda g, state: combination.due(g, state, spaces.LOCAL), grads[0], state
        )
        chex.assert_shape(due, ())
        chex.assert_type(due, bool)
    return state, result

  state, result = check(grads, params, where)
  with _contracts.promise(f'A combination is pure: the same again ({where}).'):
    chex.assert_trees_all_equal(combine(grads, state), result)
  for name in _contracts.dtypes():
    check(
      _contracts.cast(grads, name), _contracts.cast(params, name), f'{where}, in {name}'
    )
  check(_contracts.scaled(0.0, grads), params, f'{where}, all zero')
  for size in magnitudes:
    scaled = tuple(_contracts.of_magnitude(size, g) for g in grads)
    check(scaled, params, f'{where}, up to {size:.0e}')
  for path, _ in jax.tree_util.tree_leaves_with_path(params) if _many(params) else ():
    mask = _contracts.all_but(path, params)
    *fewer, w = (_masks.restrict(x, mask) for x in (*grads, params))
    check(tuple(fewer), w, f'{where}, {jax.tree_util.keystr(path)} left out')

  # What is not finite at the params is so at the probes: they are marked.
  for first in range(len(grads)):
    for bad in (jnp.nan, jnp.inf):
      marked = tuple(
        _contracts.with_entry(g, bad) if (i == first or first == 0) else g
        for i, g in enumerate(grads)
      )
      update, marked_state = combine(marked, state)
      with _contracts.promise(
        f'A gradient that is not finite is not hidden ({where}).'
      ):
        _contracts.expect(
          not _contracts.all_finite(update),
          f'With {bad} in gradient {first} all is finite.',
        )
      with _contracts.promise(
        f'What is not finite does not stay in the state ({where}).'
      ):
        chex.assert_tree_all_finite(combine(grads, marked_state))
  _check_replicas(combination, grads, state, result, where, rtol)

  with _contracts.promise(f'Under `jit` it does what it does without ({where}).'):
    _contracts.assert_close(jax.jit(combine)(grads, state), result, rtol)
  twice = jax.tree.map(lambda g: jnp.stack([g, g]), grads)
  with _contracts.promise(f'Under `scan` it does what it does in a loop ({where}).'):
    last, updates = jax.lax.scan(lambda s, g: combine(g, s)[::-1], state, twice)
    second = combine(grads, result[1])
    looped = _contracts.stack(result[0], second[0])
    _contracts.assert_close((last, updates), (second[1], looped), rtol)


def _check_replicas(combination, grads, state, result, where, rtol):
  space = spaces.over(_contracts.AXIS)

  def of_replica(grads):
    outcome = combination.combine(grads, state, space)
    if combination.due is None:
      return outcome, ()
    return outcome, combination.due(grads[0], state, space)

  def on_replicas(*each):
    results = jax.vmap(of_replica, axis_name=_contracts.AXIS)(_contracts.stack(*each))
    return [_row(i, results) for i in range(len(each))]

  # Other directions as well as other lengths.
  turned = jax.tree.map(lambda g: (-3 * jnp.flip(g)).astype(g.dtype), grads)
  far = jax.tree.map(lambda g: (g * g + 0.5).astype(g.dtype), grads)
  with _contracts.promise(
    "All replicas get the same update, state and `due`: means are `space.mean`'s."
  ):
    first, *others = on_replicas(grads, turned, far)
    for other in others:
      chex.assert_trees_all_equal(other, first)
  with _contracts.promise(
    'Replicas with the same gradients get what one device gets: means are'
    " `space.mean`'s."
  ):
    (same, _), *_ = on_replicas(grads, grads)
    _contracts.assert_close(same, result, rtol)
  with _contracts.promise(
    'Replicas get what one device gets of the mean gradients: first `space.mean`, then'
    ' a formula that is not linear.'
  ):
    mean = lambda *xs: jnp.mean(jnp.stack(xs), axis=0)
    means = jax.tree.map(mean, grads, turned, far)
    (update, _), _ = first
    _contracts.assert_close(
      update, combination.combine(means, state, spaces.LOCAL)[0], rtol
    )


def _row(i, tree):
  return jax.tree.map(lambda x: x[i], tree)


def _many(tree):
  return len(jax.tree.leaves(tree)) > 1
