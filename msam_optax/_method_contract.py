"""What every method must hold: the checks of ``testing.assert_method``."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax import _contracts
from msam_optax import _masks


def check_update_types(tx, params, grads, where, grad_fn):
  def both(params, grads):
    state = tx.init(params)
    return state, tx.update(grads, state, params, grad_fn=grad_fn)

  with _contracts.promise(f'`init` and `update` accept what they are given ({where}).'):
    state, result = jax.eval_shape(both, params, grads)
  with _contracts.promise(f'`update` returns `(updates, state)` ({where}).'):
    is_pair = isinstance(result, tuple) and len(result) == 2
    _contracts.expect(is_pair, f'It returned {result!r}.')
  updates, new_state = result
  with _contracts.promise(f'The updates are like the gradients ({where}).'):
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
  with _contracts.promise(
    f'The state keeps its structure, shapes and dtypes ({where}).'
  ):
    _contracts.assert_same_types(new_state, state)


def check_arguments(update, params, state, loss_fn, rtol):
  with _contracts.promise('A method is pure: the same arguments give the same again.'):
    result = update(params, state)
    chex.assert_trees_all_equal(update(params, state), result)
  with _contracts.promise('A count in the state grows by one in each step.'):
    count_before, count_after = (_values(s, 'count') for s in (state, result[1]))
    steps = [b - a for a, b in zip(count_before, count_after, strict=True)]
    _contracts.expect(
      not steps or (max(steps) == 1 and min(steps) >= 0),
      f'The counts {count_before} became {count_after}.',
    )
  with _contracts.promise('`grad_fn` and `value_and_grad_fn` give the same update.'):
    other = update(params, state, value_and_grad_fn=jax.value_and_grad(loss_fn))
    _contracts.assert_close(other[0], result[0], rtol)
  with _contracts.promise('Extra arguments that it does not know are left to others.'):
    other = update(
      params,
      state,
      grad_fn=jax.grad(loss_fn),
      value=loss_fn(params),
      argument_of_another=None,
    )
    _contracts.assert_close(other[0], result[0], rtol)
  with _contracts.promise(
    'The state is of arrays: a copy in host memory does the same.'
  ):
    other = update(params, jax.device_get(state))
    _contracts.assert_close(other, result, rtol)


def check_transformed(tx, update, params, state, rtol):
  def step(params, state):
    updates, state = update(params, state)
    return jax.tree.map(lambda w, u: w - 0.01 * u, params, updates), state

  looped = [(params, state)]
  for _ in range(2):
    looped.append(step(*looped[-1]))
  with _contracts.promise('Under `scan` a method does what it does in a loop.'):
    body = lambda carry, _: (step(*carry), None)
    _contracts.assert_close(
      jax.lax.scan(body, looped[0], length=2)[0], looped[-1], rtol
    )
  with _contracts.promise(
    'Under `jit` with donated arguments a method does what it does.'
  ):
    # The state that `init` makes is donated as it is, and may hold no array twice.
    w = jax.tree.map(jnp.copy, params)
    donated = jax.jit(step, donate_argnums=(0, 1))(w, tx.init(w))
    _contracts.assert_close(donated, looped[1], rtol)

  rows = [params, _contracts.scaled(0.5, params)]
  with _contracts.promise(
    'Under `vmap` a method does what it does for each of the params.'
  ):
    stacked = _contracts.stack(*rows)
    batched = jax.vmap(step)(stacked, jax.vmap(tx.init)(stacked))
    each = [looped[1], step(rows[1], tx.init(rows[1]))]
    _contracts.assert_close(batched, _contracts.stack(*each), rtol)


def check_chained(tx, params, state, loss_fn):
  with _contracts.promise('`optax.tree.map_params` goes through the state.'):
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(mapped, state)
  # Adam raises a float to its integer count.
  with (
    _contracts.promise('It can stand before Adam in `optax.chain`.'),
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
  with _contracts.promise('A zero gradient is not perturbed.'):
    updates, _ = update(zeros, state, zeros, one)
    chex.assert_trees_all_equal(updates, zeros)

  other = jax.tree.map(lambda g: (2 * g + 1).astype(g.dtype), grads)
  with _contracts.promise('The update depends on the gradient at the probe.'):
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
      marked = _contracts.with_entry(grads, bad, path)
      for where, given in {
        'the gradient at the params': (marked, grads),
        'the gradient at the probe': (grads, marked),
      }.items():
        updates, new_state = update(given[0], state, given[1], none)
        at = f'With {bad} in {where}'
        with _contracts.promise(
          'A gradient that is not finite gives an update that is not finite in the same'
          ' leaf.'
        ):
          leaf = dict(jax.tree_util.tree_leaves_with_path(updates))[path]
          _contracts.expect(
            not _contracts.all_finite(leaf),
            f'{at} the update {_masks.at_path(path)} is {leaf}.',
          )
        with _contracts.promise('`finite` in the state says whether the update is.'):
          flags = _values(new_state, 'finite')
          _contracts.expect(not any(flags), f'{at} {_masks.at_path(path)} it is True.')
        with _contracts.promise(
          'A gradient that is not finite does not stay in the state.'
        ):
          after, new_state = update(grads, new_state, grads, none)
          chex.assert_tree_all_finite((after, new_state))
          _contracts.expect(
            all(_values(new_state, 'finite')), '`finite` is still False.'
          )


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
