"""The formula of each combination on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from tests.combinations.problem import assert_close
from tests.combinations.problem import flat
from tests.combinations.problem import loss
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.problem import RHO
from tests.combinations.problem import ROWS
from tests.combinations.truth import COMBINATIONS
from tests.combinations.truth import METRICS
from tests.combinations.truth import truth
from tests.combinations.truth import value_and_slope
from tests.combinations.ways import drop_in
from tests.combinations.ways import every_combination
from tests.combinations.ways import every_metric
from tests.combinations.ways import every_way
from tests.combinations.ways import METHODS
from tests.combinations.ways import names
from tests.combinations.ways import passes
from tests.combinations.ways import WAYS


@pytest.mark.slow
@every_metric
@every_combination
def test_methods_in_a_chain(name, metric):
  """Update, value and scalars of each method over each metric."""
  tx = METHODS[name](RHO, METRICS[metric][0])

  @jax.jit
  def step(params, data):
    value_and_grad_fn = jax.value_and_grad(lambda p: loss(p, data))
    value, grads = value_and_grad_fn(params)
    state = tx.init(params)
    return tx.update(
      grads, state, params, value_and_grad_fn=value_and_grad_fn, value=value
    )

  params = make_params()
  updates, state = step(params, make_data())
  value, want, slope, radius = truth(name, metric)
  assert_close(updates, want)
  np.testing.assert_allclose(state.slope, slope, rtol=1e-6)
  np.testing.assert_allclose(state.radius, radius, rtol=1e-5)
  # The recorded probe is the first, uphill one.
  x, y = (np.asarray(z, np.float64) for z in make_data())
  at = lambda w: value_and_slope(w, x, y, np.ones(ROWS))
  _, direction = METRICS[metric][1](flat(params), at(flat(params))[1])
  at_probe, _ = at(flat(params) + RHO * direction)
  np.testing.assert_allclose(state.probe_value, at_probe, rtol=1e-6)
  np.testing.assert_allclose(state.rise, at_probe - value, rtol=1e-5)
  assert state.finite
  assert state.count == 1


@pytest.mark.slow
@passes
@every_combination
def test_the_drop_in(name, once):
  value, grads = jax.jit(drop_in(name, compile_once=once))(make_params(), make_data())
  want_value, want, *_ = truth(name)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close(grads, want)


@passes
@pytest.mark.parametrize('metric', ['euclidean', 'adaptive'])
@names('gsam')
def test_the_drop_in_over_other_metrics(name, metric, once):
  _, grads = jax.jit(drop_in(name, metric, compile_once=once))(
    make_params(), make_data()
  )
  assert_close(grads, truth(name, metric)[1])


@pytest.mark.usefixtures('x64')
@every_way
@names('gsam', 'cr_sam')
def test_double_precision_is_kept(name, way):
  params = make_params(jnp.float64)
  data = tuple(x.astype(jnp.float64) for x in make_data())

  def wide(params, data):
    x, y = data
    return jnp.mean((jnp.sin(x @ params['a']) + x[:, :2] @ params['b'] - y) ** 2)

  _, grads = jax.jit(WAYS[way](name, loss=wide))(params, data)
  assert_close(grads, truth(name, start=flat(params))[1], rtol=1e-13)


@every_way
def test_probes_anywhere_and_as_many_as_wanted(way):
  """Three probes, one of them twice as far and one downhill, told apart by weights."""

  def combine(grads, state, space):
    weights = (1.0, 10.0, 100.0, 1000.0)
    terms = zip(weights, space.mean(grads), strict=True)
    return jax.tree.map(lambda *xs: sum(xs), *(scaled(c, g) for c, g in terms)), state

  scaled = lambda c, tree: jax.tree.map(lambda x: c * x, tree)
  combination = msam_optax.Combination(lambda params: (), combine, (0.5, -1, 2.0))
  formula = lambda g, *gs: g + 10 * gs[0] + 100 * gs[1] + 1000 * gs[2]
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(COMBINATIONS, 'three', (combination, formula, (0.5, -1, 2)))
    _, grads = jax.jit(WAYS[way]('three'))(make_params(), make_data())
    assert_close(grads, truth('three')[1])


@pytest.mark.standard_promotion
@names('gsam')
def test_injected_numbers_may_change(name):
  """Under ``optax.inject_hyperparams``, with a schedule for each number."""
  make = {
    'sam': (msam_optax.sam, {}),
    'wsam': (msam_optax.wsam, {'gamma': 1.7 / 2.7}),
    'gsam': (msam_optax.gsam, {'alpha': 0.6}),
    'cr_sam': (msam_optax.cr_sam, {'gamma': 0.3, 'beta': 0.2}),
  }
  method, numbers = make[name]
  constant = lambda x: lambda count: x
  schedules = {key: constant(x) for key, x in {'rho': RHO, **numbers}.items()}
  tx = optax.inject_hyperparams(method)(**schedules)
  params, data = make_params(), make_data()

  @jax.jit
  def step(params, state):
    grad_fn = jax.grad(lambda p: loss(p, data))
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

  updates, _ = step(params, tx.init(params))
  assert_close(updates, truth(name, 'euclidean')[1])
