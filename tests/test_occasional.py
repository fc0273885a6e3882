"""Combinations that probe in some steps: by NumPy, and what they cost."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax
from msam_optax import testing

STEPS = 12
A = np.diag([3.0, 1.0, 0.2])


def gradients_at(w, step):
  """Of ``⟨w, A w⟩/2 + Σ w⁴/4``, louder in some steps than in others."""
  return (1.0 + 2.0 * (step % 4 == 1)) * (A @ w + w**3)


def run(tx, steps=STEPS, w=(0.6, -0.8, 1.0)):
  """The updates, and how many gradients were taken at a probe up to each step."""
  calls = []

  @jax.jit
  def step(w, state, number):
    def gradient(w):
      return (1.0 + 2.0 * (number % 4 == 1)) * (jnp.asarray(A, w.dtype) @ w + w**3)

    def grad_fn(w):
      jax.debug.callback(lambda: calls.append(1))
      return gradient(w)

    updates, state = tx.update(gradient(w), state, w, grad_fn=grad_fn)
    return w - 0.05 * updates, updates, state

  w = jnp.asarray(w)
  state, updates, taken = tx.init(w), [], []
  for number in range(steps):
    w, update, state = step(w, state, number)
    jax.effects_barrier()
    updates.append(update)
    taken.append(len(calls))
  return updates, taken, state


@pytest.mark.usefixtures('x64')
@pytest.mark.standard_promotion
@pytest.mark.parametrize('schedule', [False, True], ids=['number', 'schedule'])
def test_probes_where_the_gradient_is_long(schedule):
  c, decay, rho = -0.3, 0.8, 0.2
  threshold = (lambda count: c + 0.05 * count) if schedule else c
  combination = msam_optax.when_steep(threshold=threshold, decay=decay)
  tx = msam_optax.sharpness_aware(msam_optax.euclidean(), rho, combination)
  updates, taken, _ = run(tx)

  w, mean, variance, probes = np.array([0.6, -0.8, 1.0]), 0.0, 0.0, 0
  for step in range(STEPS):
    g = gradients_at(w, step)
    square = g @ g
    mean = decay * mean + (1 - decay) * square
    variance = decay * variance + (1 - decay) * (square - mean) ** 2
    now = c + 0.05 * step * schedule
    steep = square >= mean + now * np.sqrt(variance)
    update = gradients_at(w + rho * g / np.sqrt(square), step) if steep else g
    probes += steep
    np.testing.assert_allclose(updates[step], update, rtol=1e-10)
    assert taken[step] == probes
    w = w - 0.05 * update
  assert 2 < probes < STEPS - 2


@pytest.mark.standard_promotion
def test_a_skipped_gradient_is_not_taken():
  _, taken, _ = run(msam_optax.look_sam(0.1, every=4))
  assert taken == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_what_is_not_finite_is_seen_and_forgotten():
  tx = msam_optax.look_sam(0.1, every=2)
  bad = jnp.array([1.0, jnp.nan])
  w = jnp.array([1.0, 2.0])
  updates, state = tx.update(bad, tx.init(w), w, grad_fn=lambda w: bad)
  assert jnp.isnan(updates).any()
  chex.assert_tree_all_finite(state.combination_state)

  combination = msam_optax.when_steep(threshold=0.0, decay=0.9)
  _, state = combination.combine((w, w), combination.init(w), msam_optax.LOCAL)
  _, after = combination.combine((bad, bad), state, msam_optax.LOCAL)
  chex.assert_trees_all_equal(after._replace(count=state.count), state)


@pytest.mark.parametrize(
  ('make', 'error', 'message'),
  [
    (lambda: msam_optax.reused(every=0), ValueError, '`every` must be a whole .* >= 1'),
    (lambda: msam_optax.reused(every=2.0), TypeError, '`every` must be a whole number'),
    (lambda: msam_optax.reused(alpha=-1.0), ValueError, '`alpha` must be finite'),
    (
      lambda: msam_optax.when_steep(threshold=0.0, decay=1.5),
      ValueError,
      '`decay` must be between 0 and 1',
    ),
    (
      lambda: msam_optax.when_steep(threshold=np.inf, decay=0.9),
      ValueError,
      '`threshold` must be finite',
    ),
    (
      lambda: msam_optax.when_steep(threshold='low', decay=0.9),
      TypeError,
      '`threshold` must be a real number',
    ),
    (
      lambda: msam_optax.when_steep(msam_optax.reused(), threshold=0.0, decay=0.9),
      ValueError,
      'decides it as well',
    ),
  ],
)
def test_what_is_wrong_is_named(make, error, message):
  with pytest.raises(error, match=message):
    make()


@pytest.mark.parametrize('number', ['threshold', 'decay'])
def test_a_number_that_becomes_nan_is_seen(number):
  def update(value):
    numbers = {'threshold': 0.0, 'decay': 0.9, number: value}
    combination = msam_optax.when_steep(**numbers)
    w = jnp.ones(2)
    return combination.combine((w,), combination.init(w), msam_optax.LOCAL)[0]

  assert np.isnan(jax.jit(update)(jnp.nan)).all()
  chex.assert_tree_all_finite(jax.jit(update)(0.5))


@pytest.mark.parametrize('every', [0, -3])
def test_a_number_of_steps_that_becomes_less_than_one_is_seen(every):
  """As in the state of ``inject_hyperparams``; a remainder by zero is no error."""
  w, grad_fn = jnp.array([1.0, 2.0]), jax.grad(lambda w: jnp.sum(w**4))
  for method in (msam_optax.look_sam, msam_optax.sparse_sam):

    @jax.jit
    def update(every, method=method):
      tx = method(0.1, every=every)
      return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

    assert np.isnan(update(every)).all()
    chex.assert_tree_all_finite(update(2))


@pytest.mark.slow
def test_the_policy_keeps_the_contract():
  combination = msam_optax.when_steep(
    msam_optax.surrogate_gap(0.6), threshold=0.1, decay=0.9
  )
  w, g = {'a': jnp.array([1.0, 2.0])}, {'a': jnp.array([0.5, -0.3])}
  testing.assert_combination(combination, (g, {'a': jnp.array([0.7, 0.1])}), w)


@pytest.mark.parametrize(
  'combination',
  [
    msam_optax.reused(every=2),
    msam_optax.when_steep(threshold=0.0, decay=0.9),
    msam_optax.when_steep(msam_optax.surrogate_gap(), threshold=0.0, decay=0.9),
  ],
  ids=['reused', 'when_steep', 'when_steep over GSAM'],
)
def test_keeps_the_contract_of_a_method(combination):
  """Its state may be donated, and stays as it is for weakly typed parameters."""
  tx = msam_optax.sharpness_aware(msam_optax.monge(), 0.1, combination)
  params = {'w': jnp.array([0.6, -0.9]), 'b': jnp.array(1.2)}
  # The gradient turns on the way to the probe: `reused` divides by what is aside of it.
  loss = lambda p: jnp.sum(p['w'] ** 4) + p['b'] * jnp.prod(p['w'])
  testing.assert_method(tx, params, loss)
