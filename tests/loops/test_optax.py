"""Plain JAX in the loops of Optax's notebooks, with what stands around a method there.

Averages of parameters, a method on every k-th step only, steps that are rejected when
they are not finite, and hyperparameters in the state.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import msam
from tests import by_hand
from tests.methods import drop_in
from tests.methods import every_kind_slowly
from tests.methods import monge_sam
from tests.methods import transformation
from tests.problems import loss
from tests.problems import normal

pytestmark = pytest.mark.standard_promotion

STEPS, EPS = 4, 1e-3
BATCHES = list(zip(normal(1, STEPS, 8, 3), normal(2, STEPS, 8, 2), strict=True))
PARAMS = {
  'hidden': {'kernel': normal(3, 3, 5), 'bias': 0.1 * normal(4, 5)},
  'out': {'kernel': normal(5, 5, 2), 'bias': 0.1 * normal(6, 2)},
}
GRAD = jax.jit(jax.grad(loss))
INTERFACES = pytest.mark.parametrize('interface', ['chain', 'drop-in'])


def close(tree, expected):
  chex.assert_trees_all_close(tree, expected, rtol=1e-5, atol=2e-6)


def take_step(method, interface, optimizer, loss_fn=loss):
  """The notebooks' ``step``, through either interface."""

  @jax.jit
  def step(params, opt_state, batch):
    extra = {}
    if interface == 'chain':
      value, grads = jax.value_and_grad(loss_fn)(params, batch)
      extra['grad_fn'] = lambda params: jax.grad(loss_fn)(params, batch)
    else:
      value, grads = drop_in(method, loss_fn)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state, value

  return step


def head(method, interface):
  return [transformation(method)] if interface == 'chain' else []


def update_by_hand(method, params, batch, rho=None):
  radii = None if rho is None else [rho]
  return by_hand.update(method, params, [lambda w: GRAD(w, batch)], radii=radii)


def trajectory_by_hand(method, optimizer):
  """Parameters after each step."""
  trajectory = [PARAMS]
  for batch in BATCHES:
    params, _ = by_hand.train(
      method,
      lambda params, _, batch: (GRAD(params, batch), None),
      trajectory[-1],
      None,
      [batch],
      optimizer,
    )
    trajectory.append(params)
  return trajectory[1:]


@INTERFACES
@every_kind_slowly
def test_fit_and_average_parameters(method, interface):
  """``fit`` of Optax's first notebook, with a moving average by either function."""
  optimizer = optax.chain(*head(method, interface), optax.adam(0.01, eps=EPS))
  step = take_step(method, interface, optimizer)
  average = optax.ema(0.9)

  @jax.jit
  def update_averages(params, ema, debiased_state):
    debiased, debiased_state = average.update(params, debiased_state)
    return optax.incremental_update(params, ema, 0.1), debiased, debiased_state

  params, opt_state = PARAMS, optimizer.init(PARAMS)
  ema, debiased, debiased_state = PARAMS, None, average.init(PARAMS)
  for batch in BATCHES:
    params, opt_state, _ = step(params, opt_state, batch)
    ema, debiased, debiased_state = update_averages(params, ema, debiased_state)

  trajectory = trajectory_by_hand(method, by_hand.adam(0.01, eps=EPS))
  close(params, trajectory[-1])
  # Both averages as one weighted sum over the steps.
  decays = 0.1 * 0.9 ** np.arange(STEPS)[::-1]
  total = jax.tree.map(
    lambda *ws: sum(d * w for d, w in zip(decays, ws, strict=True)), *trajectory
  )
  close(ema, jax.tree.map(lambda x, w: np.float32(x + 0.9**STEPS * w), total, PARAMS))
  close(debiased, jax.tree.map(lambda x: np.float32(x / (1 - 0.9**STEPS)), total))


@every_kind_slowly
def test_every_second_step(method):
  """Off its turn the method is no more there than if it had not been chained."""
  optimizer = optax.chain(
    optax.conditionally_transform(transformation(method), lambda step: step % 2 == 0),
    optax.adam(0.01, eps=EPS),
  )
  step = take_step(method, 'chain', optimizer)
  params, opt_state = PARAMS, optimizer.init(PARAMS)
  for batch in BATCHES:
    params, opt_state, _ = step(params, opt_state, batch)

  by_adam, expected = by_hand.adam(0.01, eps=EPS), PARAMS
  for i, batch in enumerate(BATCHES):
    sharpness_aware = lambda params, batch: update_by_hand(method, params, batch)
    grad_fn = sharpness_aware if i % 2 == 0 else GRAD
    expected = by_adam(expected, grad_fn(expected, batch))
  close(params, expected)
  assert optax.tree.get(opt_state, 'count', filtering=is_of_the_method) == STEPS // 2


def is_of_the_method(path, _):
  return 'SharpnessAwareState' in str(path)


def test_off_its_turn_no_second_gradient_is_taken():
  optimizer = optax.chain(
    optax.conditionally_transform(msam(), lambda step: step % 2 == 0), optax.sgd(0.1)
  )
  calls = []

  @jax.jit
  def step(params, opt_state, batch):
    def grad_fn(params):
      jax.debug.callback(lambda: calls.append(1))
      return jax.grad(loss)(params, batch)

    grads = jax.grad(loss)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state

  params, opt_state, seen = PARAMS, optimizer.init(PARAMS), []
  for batch in BATCHES:
    params, opt_state = step(params, opt_state, batch)
    jax.effects_barrier()
    seen.append(len(calls))
  assert seen == [1, 1, 2, 2]


@INTERFACES
@every_kind_slowly
def test_steps_that_are_not_finite_are_rejected(method, interface):
  """The second batch has a probe beyond an edge up to which the loss is defined."""

  def bounded(w, x):
    return jnp.sum(w**2 * jnp.where(x * w < 1, 1.0, jnp.nan))

  w = np.array([0.6, 0.5], np.float32)
  xs = np.array([1.0, 1.6, 1.0, 1.0], np.float32)
  inner = optax.sgd(0.01, momentum=0.9)
  optimizer = optax.chain(
    *head(method, interface), optax.apply_if_finite(inner, max_consecutive_errors=5)
  )
  step = take_step(method, interface, optimizer, bounded)
  assert np.all(np.isfinite(jax.grad(bounded)(w, xs[1])))

  params, opt_state, rejected = w, optimizer.init(w), []
  for x in xs:
    before = params
    params, opt_state, _ = step(params, opt_state, x)
    rejected.append(bool(np.all(params == before)))
  assert rejected == [False, True, False, False]
  assert optax.tree.get(opt_state, 'total_notfinite') == 1

  by_sgd, expected = by_hand.sgd(0.01, 0.9), w
  for x in (xs[0], xs[2], xs[3]):
    grad = lambda w, x=x: jax.grad(bounded)(w, x)
    expected = by_sgd(expected, by_hand.update(method, expected, [grad]))
  close(params, expected)


def test_hyperparameters_in_the_state():
  """A chain made by one function; the loop sets its numbers, compiled once."""

  @optax.inject_hyperparams
  def make(rho, alpha, learning_rate):
    return optax.chain(msam(rho=rho, alpha=alpha), optax.sgd(learning_rate))

  optimizer = make(rho=0.5, alpha=1.0, learning_rate=optax.linear_schedule(0.1, 0.0, 8))
  step = take_step('msam', 'chain', optimizer)
  rhos, alphas = [0.5, 0.25, 0.1, 0.4], [1.0, 1.0, 2.0, 0.0]
  params, expected = jax.tree.map(jnp.asarray, PARAMS), PARAMS
  opt_state = optimizer.init(params)
  for i, batch in enumerate(BATCHES):
    opt_state.hyperparams['rho'] = jnp.asarray(rhos[i])
    opt_state.hyperparams['alpha'] = jnp.asarray(alphas[i])
    params, opt_state, _ = step(params, opt_state, batch)
    update = update_by_hand(monge_sam(alphas[i]), expected, batch, rhos[i])
    expected = by_hand.sgd(0.1 * (1 - i / 8))(expected, update)
    close(params, expected)
    close(opt_state.hyperparams['learning_rate'], np.float32(0.1 * (1 - i / 8)))
  assert step._cache_size() == 1


@every_kind_slowly
def test_hyperparameters_of_the_optimizer_behind(method):
  """The notebooks' way to log a learning rate, here behind the method."""
  optimizer = optax.chain(
    transformation(method),
    optax.inject_hyperparams(optax.sgd)(optax.exponential_decay(0.1, 1, 0.5)),
  )
  step = take_step(method, 'chain', optimizer)
  params, opt_state, expected = PARAMS, optimizer.init(PARAMS), PARAMS
  for i, batch in enumerate(BATCHES):
    params, opt_state, _ = step(params, opt_state, batch)
    update = update_by_hand(method, expected, batch)
    expected = by_hand.sgd(0.1 * 0.5**i)(expected, update)
    close(opt_state[1].hyperparams['learning_rate'], np.float32(0.1 * 0.5**i))
  close(params, expected)


def test_schedule_of_rho_under_inject_hyperparams():
  optimizer = optax.chain(
    optax.inject_hyperparams(msam)(rho=optax.linear_schedule(0.0, 0.4, 4)),
    optax.sgd(0.1),
  )
  step = take_step('msam', 'chain', optimizer)
  params, opt_state, expected = PARAMS, optimizer.init(PARAMS), PARAMS
  for i, batch in enumerate(BATCHES):
    params, opt_state, _ = step(params, opt_state, batch)
    update = update_by_hand('msam', expected, batch, 0.1 * i)
    expected = by_hand.sgd(0.1)(expected, update)
  close(params, expected)
  close(opt_state[0].hyperparams['rho'], np.float32(0.3))
