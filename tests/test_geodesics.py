"""The geodesic probe, against SciPy's integrator and the bound on the rise."""

import chex
from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from scipy import integrate

from msam_optax import by_name
from msam_optax import euclidean
from msam_optax import flax_nnx
from msam_optax import geodesic
from msam_optax import LOCAL
from msam_optax import monge
from msam_optax import normalize_by
from msam_optax import perturb
from msam_optax import sharpness_aware
from msam_optax import value_and_grad
from tests import problems


def product(w):
  return (1 - w[0] * w[1]) ** 2


def waves(A, a, c, w):
  """``Σ aᵢ sin(aᵢᵀw + cᵢ)``: smooth, with a Hessian of at most ``‖Aᵀ|a|A‖``."""
  return jnp.sum(a * jnp.sin(A @ w + c))


def random_waves(seed, dimensions=4, terms=6):
  rng = np.random.default_rng(seed)
  A, a, c = rng.normal(size=(terms, dimensions)), *rng.normal(size=(2, terms))
  curvature = np.linalg.norm(A.T * np.abs(a) @ A, 2)
  return jax.tree_util.Partial(waves, A, a, c), rng.normal(size=dimensions), curvature


TOYS = {
  'product': (product, np.array([2.0, 0.3])),
  'product, less steep': (product, np.array([1.0, 0.5])),
  'waves': random_waves(0)[:2],
}
every_toy = pytest.mark.parametrize(('loss', 'w'), TOYS.values(), ids=TOYS)


def ascend(metric, loss, w, rho):
  w, grad_fn = jnp.asarray(w), jax.grad(loss)
  ascent, _ = metric.ascend(
    grad_fn(w), metric.init(w), w, space=LOCAL, rho=rho, grad_fn=grad_fn
  )
  return ascent


def probe(metric, loss, w, rho):
  return np.asarray(perturb(jnp.asarray(w), ascend(metric, loss, w, rho), rho))


def end(loss, w, rho, alpha):
  """The end of the geodesic, and its length on the surface, by SciPy."""
  grad, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))

  def slopes(time, y):
    x, v, _ = np.split(y, (w.size, 2 * w.size))
    g, H = (np.asarray(f(x)) for f in (grad, hessian))
    pull = -(alpha**2) * (v @ H @ v) * g / (1 + alpha**2 * g @ g)
    return np.concatenate([v, pull, [np.sqrt(v @ v + alpha**2 * (g @ v) ** 2)]])

  g = np.asarray(grad(w))
  norm = np.linalg.norm(g)
  start = rho * g / (norm * np.sqrt(1 + alpha**2 * norm**2))
  solution = integrate.solve_ivp(
    slopes, (0, 1), np.concatenate([w, start, [0.0]]), rtol=1e-9, atol=1e-10
  )
  return solution.y[: w.size, -1], solution.y[-1, -1]


@every_toy
def test_end_point_against_scipy(loss, w, x64):
  for rho, alpha in (0.2, 1.0), (1.0, 1.0), (1.0, 0.3):
    expected, length = end(loss, w, rho, alpha)
    np.testing.assert_allclose(length, rho, rtol=1e-6)
    errors = [
      np.linalg.norm(probe(geodesic(steps, alpha), loss, w, rho) - expected)
      for steps in (2, 16, 32)
    ]
    assert errors[0] < 0.04 * rho
    assert errors[2] < 3e-4 * rho
    assert 3.5 < errors[1] / errors[2] < 4.5  # Of second order.
    straight = np.linalg.norm(probe(monge(alpha), loss, w, rho) - expected)
    assert errors[0] < straight


def test_rise_of_the_product(x64):
  """The numbers of the exact geodesic, to four digits."""
  rise = lambda metric, w: product(probe(metric, product, w, 1.0)) - product(w)

  for w, straight, curved in ([2.0, 0.3], 1.8642, 0.9406), ([1.0, 0.5], 0.8897, 0.8005):
    np.testing.assert_allclose(rise(monge(), np.array(w)), straight, atol=5e-5)
    np.testing.assert_allclose(rise(geodesic(100), np.array(w)), curved, atol=7e-5)


@pytest.mark.slow
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  rho=st.floats(0.01, 20.0),
  alpha=st.floats(0.1, 10.0),
  steps=st.sampled_from([1, 2, 64]),
)
def test_rise_is_bounded(seed, rho, alpha, steps):
  """By ``ρ/α``, and ``Lρ²/(4 steps)`` for what the gradients do not see of the loss."""
  loss, w, curvature = jax.tree.map(np.float32, random_waves(seed))
  at_probe = probe(geodesic(steps, alpha), loss, w, rho)
  bound = rho / alpha + curvature * rho**2 / (4 * steps)
  assert loss(at_probe) - loss(w) <= bound + 1e-5
  assert np.linalg.norm(at_probe - w) <= rho * (1 + 1e-5)


def test_straight_probe_breaks_the_bound_and_the_geodesic_keeps_it(x64):
  loss = lambda w: 50 * w[0] ** 2 + w[1] ** 2
  w = np.array([0.02, 1.0])
  for rho in 1.0, 10.0:
    straight, curved = (
      loss(probe(metric, loss, w, rho)) - loss(w) for metric in (monge(), geodesic(8))
    )
    assert straight > 3 * rho
    assert 0.8 * rho < curved < rho


@pytest.mark.parametrize('rho', [0.0, 0.5])
def test_without_curvature_it_is_monge(rho):
  """Also at radius 0, and as close as sums in float32 are."""
  loss = product if rho == 0 else lambda w: 3 * w[0] - 4 * w[1]
  w = np.array([2.0, 0.3], np.float32)
  got, expected = (ascend(metric, loss, w, rho) for metric in (geodesic(3), monge()))
  np.testing.assert_allclose(got.direction, expected.direction, rtol=3e-7)
  assert got.slope == expected.slope


def test_without_alpha_it_is_sam():
  w = np.array([2.0, 0.3], np.float32)
  got, expected = (
    ascend(metric, product, w, 0.5) for metric in (geodesic(3, 0.0), euclidean())
  )
  np.testing.assert_allclose(got.direction, expected.direction, rtol=2e-7)


@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_scale_of_the_loss_is_that_of_alpha(scale):
  """To gradients of any size."""
  w = np.array([2.0, 0.3], np.float32)
  expected = ascend(geodesic(3, 1.0), product, w, 1.0)
  got = ascend(geodesic(3, 1 / scale), lambda w: scale * product(w), w, 1.0)
  np.testing.assert_allclose(got.direction, expected.direction, rtol=1e-5)
  np.testing.assert_allclose(got.slope, scale * expected.slope, rtol=1e-5)


def test_steep_surface_is_not_climbed():
  """Where ``α‖g‖`` is too large for a number, the direction is as short as it is."""
  w = np.array([2.0, 0.3], np.float32)
  got = ascend(geodesic(2, 1e30), lambda w: 1e30 * product(w), w, 1.0)
  np.testing.assert_array_equal(got.direction, [0.0, 0.0])
  np.testing.assert_allclose(got.slope, 1e-30, rtol=1e-6)


# In training.

PARAMS, BATCH = problems.mlp_params(), problems.batch()
GRAD = jax.jit(jax.grad(problems.loss))
METRIC, RHO = geodesic(3, 2.0), 1.0


def by_chain(metric=METRIC, rho=RHO, data=BATCH, **options):
  tx = sharpness_aware(metric, rho, **options)
  grad_fn = lambda params: GRAD(params, data)
  return tx.update(grad_fn(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=grad_fn)


@pytest.mark.slow
def test_a_gradient_per_step_and_one_at_the_probe():
  calls = []

  def grad_fn(params):
    calls.append(params)
    return GRAD(params, BATCH)

  tx = sharpness_aware(METRIC, RHO)
  state = tx.init(PARAMS)
  updates, state = tx.update(GRAD(PARAMS, BATCH), state, PARAMS, grad_fn=grad_fn)
  assert len(calls) == 3 + 1
  chex.assert_trees_all_equal(updates, GRAD(calls[-1], BATCH))
  assert 0.05 < state.radius < RHO
  np.testing.assert_allclose(state.slope, by_chain(monge(2.0))[1].slope, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, {'sync_ascent': True, 'compile_once': True}])
def test_drop_in_on_micro_batches(options):
  f = value_and_grad(problems.loss, METRIC, RHO, shards=2, **options)
  _, grads = jax.jit(f)(PARAMS, BATCH)

  if options:
    expected = by_chain()[0]
  else:
    parts = [jax.tree.map(lambda x: x[i::2], BATCH) for i in range(2)]
    each = [by_chain(data=part)[0] for part in parts]
    expected = jax.tree.map(lambda x, y: (x + y) / 2, *each)
  chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_masked_leaves_stay_where_they_are():
  mask = by_name('kernel')
  fixed = {name: layer['bias'] for name, layer in PARAMS.items()}
  kernels = {name: layer['kernel'] for name, layer in PARAMS.items()}
  merge = lambda kernels: {
    name: {'kernel': kernels[name], 'bias': fixed[name]} for name in kernels
  }
  alone = ascend_tree(lambda kernels: problems.loss(merge(kernels), BATCH), kernels)

  updates, _ = by_chain(mask=mask)

  at_probe = merge(perturb(kernels, alone, RHO))
  expected = GRAD(at_probe, BATCH)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


def ascend_tree(loss, params):
  grad_fn = jax.grad(loss)
  return METRIC.ascend(
    grad_fn(params), METRIC.init(params), params, rho=RHO, grad_fn=grad_fn
  )[0]


@pytest.mark.cpu
@pytest.mark.parametrize('check_vma', [True, False])
def test_sharded_in_shard_map(check_vma):
  """Parameters in two parts on two devices, of a loss that sees both."""
  target, w = problems.normal(0, 2, 6)
  mesh = jax.make_mesh((2,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  tx = sharpness_aware(geodesic(2, 2.0), 0.7, param_specs=P('model'))

  def grad_of(total):
    """By hand, since an unchecked ``shard_map`` does not differentiate sums."""
    return lambda w, t: 4 * total((w - t) ** 2) * (w - t)

  def step(w, t):
    grad = grad_of(lambda x: jax.lax.psum(jnp.sum(x), 'model'))
    grad_fn = lambda w: grad(w, t)
    return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

  mapped = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=P('model'),
    out_specs=P('model'),
    check_vma=check_vma,
  )
  loss = lambda w: jnp.sum((w - target) ** 2) ** 2
  expected = jax.grad(loss)(jnp.asarray(probe(geodesic(2, 2.0), loss, w, 0.7)))
  np.testing.assert_allclose(jax.jit(mapped)(w, target), expected, rtol=1e-5)


def test_alpha_as_a_schedule_and_injected():
  schedule = optax.linear_schedule(2.0, 0.0, 4)
  tx = sharpness_aware(geodesic(2, schedule), RHO)
  grad_fn = lambda params: GRAD(params, BATCH)

  @optax.inject_hyperparams
  def make(alpha):
    return sharpness_aware(geodesic(2, alpha), RHO)

  state, injected = tx.init(PARAMS), make(2.0)
  injected_state = injected.init(PARAMS)
  for alpha in 2.0, 1.5:
    injected_state.hyperparams['alpha'] = jnp.asarray(alpha)
    expected = by_chain(geodesic(2, alpha))[0]
    updates, state = tx.update(grad_fn(PARAMS), state, PARAMS, grad_fn=grad_fn)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
    updates, injected_state = injected.update(
      grad_fn(PARAMS), injected_state, PARAMS, grad_fn=grad_fn
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_on_the_way_is_seen():
  def grad_fn(params):
    on_the_way = (params[0] > 1.2) & (params[0] < 1.5)
    return params * jnp.where(on_the_way, jnp.inf, 1.0)

  w = jnp.ones(2)
  tx = sharpness_aware(geodesic(1, 0.1), 1.0)
  updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
  assert not state.finite
  assert jnp.all(jnp.isnan(updates))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_nnx_with_statistics_and_dropout():
  class Model(nnx.Module):
    def __init__(self):
      rngs = nnx.Rngs(0)
      self.hidden = nnx.Linear(3, 5, rngs=rngs)
      self.norm = nnx.BatchNorm(5, rngs=rngs)
      self.dropout = nnx.Dropout(0.3, rngs=rngs)
      self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
      return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))

  loss_fn = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
  plain, twice, once = Model(), Model(), Model()
  loss, _ = nnx.value_and_grad(loss_fn)(plain, *BATCH)
  results = [
    flax_nnx.value_and_grad(loss_fn, METRIC, RHO, compile_once=compile_once)(
      model, *BATCH
    )
    for model, compile_once in ((twice, False), (once, True))
  ]
  np.testing.assert_allclose([value for value, _ in results], [loss] * 2, rtol=1e-6)
  chex.assert_trees_all_close(*[grads for _, grads in results], rtol=1e-4, atol=1e-6)
  for model in twice, once:  # The statistics and counters of one pass.
    for kind in nnx.BatchStat, nnx.RngCount:
      chex.assert_trees_all_close(
        nnx.state(model, kind), nnx.state(plain, kind), rtol=1e-6
      )


# Errors.


@pytest.mark.parametrize('steps', [0, -1, 1.5, True, None])
def test_steps_are_checked(steps):
  with pytest.raises((TypeError, ValueError), match='`steps` must be a whole'):
    geodesic(steps)


def test_alpha_is_checked():
  with pytest.raises(ValueError, match='`alpha` must be finite and >= 0'):
    geodesic(2, -1.0)


def test_what_it_needs_is_named():
  g = jnp.ones(2)
  tx = normalize_by(geodesic())
  with pytest.raises(ValueError, match=r'no `rho`.*normalize_by.*monge'):
    tx.update(g, tx.init(g), g)
  with pytest.raises(ValueError, match='no `params`'):
    tx.update(g, tx.init(g))
