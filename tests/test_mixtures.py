"""WSAM beside an optimizer, in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax

A = np.array([[2.0, 0.3], [0.3, 1.0]])


def gradient(w):
  return A @ w + w**3


@pytest.mark.usefixtures('x64')
@pytest.mark.standard_promotion
@pytest.mark.parametrize('metric', ['euclidean', 'monge'])
def test_decoupled_wsam_is_the_rule_of_its_authors(metric):
  """Momentum and weight decay see the plain gradient, and not the sharpness."""
  lr = optax.linear_schedule(0.1, 0.02, 8)
  rho, gamma, mu, decay = 0.3, 0.8, 0.9, 0.01
  base = optax.chain(optax.add_decayed_weights(decay), optax.sgd(lr, momentum=mu))
  tx = msam_optax.decoupled_wsam(
    base, lr, rho, gamma, metric=getattr(msam_optax, metric)()
  )
  grad_fn = lambda w: jnp.asarray(A) @ w + w**3

  @jax.jit
  def step(w, state):
    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    return optax.apply_updates(w, updates), state

  w = got = np.array([0.6, -0.8])
  state, velocity = tx.init(jnp.asarray(got)), 0.0
  for i in range(9):
    got, state = step(jnp.asarray(got), state)
    g = gradient(w)
    n = np.sqrt(g @ g)
    delta = rho * g / (n * (np.sqrt(1 + n**2) if metric == 'monge' else 1))
    sharpness = gamma / (1 - gamma) * (gradient(w + delta) - g)
    velocity = mu * velocity + g + decay * w
    w = w - float(lr(i)) * (velocity + sharpness)
    # The schedule is in float32.
    np.testing.assert_allclose(got, w, rtol=1e-6, atol=1e-7)
  assert optax.tree.get(state, 'radius') > 0


def test_without_an_optimizer_it_is_the_coupled_form():
  decoupled = msam_optax.decoupled_wsam(optax.scale(-0.1), 0.1, 0.3, 0.75)
  coupled = optax.chain(msam_optax.wsam(0.3, 0.75), optax.sgd(0.1))
  w, grad_fn = jnp.array([0.3, 0.4]), jax.grad(lambda w: jnp.sum(w**4))
  got, expected = (
    tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]
    for tx in (decoupled, coupled)
  )
  chex.assert_trees_all_close(got, expected, rtol=1e-6)


def test_what_is_frozen_behind_decoupled_wsam_stays():
  frozen = {'body': True, 'head': False}
  wsam = msam_optax.decoupled_wsam(optax.sgd(0.1), 0.1, 0.3, 0.75)
  tx = optax.chain(wsam, optax.masked(optax.set_to_zero(), frozen))
  w = {'body': jnp.array([0.3]), 'head': jnp.array([0.4])}
  grad_fn = jax.grad(lambda w: jnp.sum(w['body'] ** 2 * w['head'] ** 2))
  state, grads = tx.init(w), grad_fn(w)
  got, _ = tx.update(grads, state, w, grad_fn=grad_fn)
  expected, _ = wsam.update(grads, wsam.init(w), w, grad_fn=grad_fn)
  np.testing.assert_array_equal(got['body'], [0.0])
  np.testing.assert_array_equal(got['head'], expected['head'])


def test_what_is_wrong_in_decoupled_wsam_is_named():
  with pytest.raises(TypeError, match='first argument of decoupled_wsam is the optim'):
    msam_optax.decoupled_wsam(0.1, optax.sgd(0.1))
  with pytest.raises(TypeError, match='`learning_rate` must be a real number'):
    msam_optax.decoupled_wsam(optax.sgd(0.1), optax.sgd(0.1))
  with pytest.raises(ValueError, match='`learning_rate` must be finite and >= 0'):
    msam_optax.decoupled_wsam(optax.sgd(0.1), -0.1)


def test_gamma_of_decoupled_wsam_is_less_than_one():
  with pytest.raises(ValueError, match='`gamma` must be less than 1'):
    msam_optax.decoupled_wsam(optax.sgd(0.1), 0.1, gamma=1.0)
