"""One gradient per step: against the rules in NumPy, in wrappers and on devices."""

import functools

import chex
import equinox as eqx
from flax import linen as nn
from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from benchmarks.common import networks
from benchmarks.common import steps as cost_steps
from msam_optax import adaptive
from msam_optax import by_name
from msam_optax import euclidean
from msam_optax import eval_params
from msam_optax import flax_linen
from msam_optax import flax_nnx
from msam_optax import lagged
from msam_optax import LaggedState
from msam_optax import momentum_sam
from msam_optax import MomentumSAMState
from msam_optax import monge
from tests import problems

promotes = pytest.mark.standard_promotion
METHODS = {
  'lagged': lambda base, alpha=0.0, **options: lagged(base, monge(alpha), **options),
  'momentum_sam': lambda base, alpha=0.0, **options: momentum_sam(
    base, alpha=alpha, **options
  ),
}
both = pytest.mark.parametrize('method', METHODS)
RATE, DECAY, WEIGHT_DECAY = 0.05, 0.9, 0.1


def sgd(weight_decay):
  """In NumPy: ``(w, g, t) -> (new w, momentum)``, and its weight decay is of w."""
  v = 0.0

  def step(w, g, t):
    nonlocal v
    v = DECAY * v + g + weight_decay * w
    return w - RATE * v, v

  return step


def adamw(weight_decay):
  m, nu = 0.0, 0.0

  def step(w, g, t):
    nonlocal m, nu
    m, nu = 0.9 * m + 0.1 * g, 0.999 * nu + 0.001 * g**2
    root = np.sqrt(nu / (1 - 0.999 ** (t + 1))) + 1e-3
    return w - RATE * (m / (1 - 0.9 ** (t + 1)) / root + weight_decay * w), m

  return step


OPTIMIZERS = {
  'sgd': (
    sgd,
    optax.chain(
      optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(RATE, momentum=DECAY)
    ),
  ),
  'adamw': (adamw, optax.adamw(RATE, eps=1e-3, weight_decay=WEIGHT_DECAY)),
}


def schedule(count):
  """A radius that changes a lot from one step to the next."""
  return 0.3 * (1.0 + (count % 3))


def by_rule(
  method, optimizer, grad_fn, w, steps, *, rho=schedule, alpha=0.0, on=1.0, metric=None
):
  """The clean parameters and the probe, by the papers' rules, in float64.

  Args:
    method: a key of ``METHODS``.
    optimizer: ``(w, g, t) -> (new w, momentum)``.
    grad_fn: ``(w, t) -> g``.
    w: vector.
    steps: how many.
    rho: ``t -> ρ``.
    alpha: of Monge's length.
    on: vector of 0 and 1, which entries are perturbed.
    metric: ``w -> T``, the scales of an adaptive metric.

  Returns:
    Two vectors.
  """
  delta = np.zeros_like(w)
  for t in range(steps):
    g = grad_fn(w + delta, t)
    w, v = optimizer(w, g, t)
    d = on * (g if method == 'lagged' else -v)
    T = 1.0 if metric is None else metric(w)
    n = np.linalg.norm(T * d)
    delta = rho(t) * T**2 * d / (n * np.sqrt(1 + alpha**2 * n**2))
  return w, w + delta


def run(tx, params, grad_fn, steps):
  """The loop of a user: the params at the end, and the state."""

  @jax.jit
  def step(params, state, t):
    updates, state = tx.update(grad_fn(params, t), state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for t in range(steps):
    params, state = step(params, state, t)
  return params, state


def vector(tree):
  return np.concatenate(
    [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
  )


# A quadratic, with a gradient that is not the same at every step.
H = np.random.default_rng(0).normal(size=(7, 7))
H = H @ H.T / 7
W = {'a': np.arange(1.0, 5.0).reshape(2, 2) / 3, 'b': np.array([0.5, -1.0, 2.0])}


def quadratic(w, t):
  """The gradient for a vector, of NumPy or JAX."""
  return H @ w + 0.1 * (t % 2)


def quadratic_of_tree(params, t):
  flat, unflatten = ravel_pytree(params)
  return unflatten(
    jnp.asarray(H, flat.dtype) @ flat + 0.1 * jnp.asarray(t % 2, flat.dtype)
  )


def net_problem():
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), problems.mlp_params())
  data = jax.tree.map(lambda x: np.asarray(x, np.float64), problems.batch())
  grad_fn = lambda params, t: jax.grad(problems.loss)(
    params, (data[0] * (1 + t % 2), data[1])
  )
  _, unflatten = ravel_pytree(params)
  compiled = jax.jit(grad_fn)
  return params, grad_fn, lambda w, t: vector(compiled(unflatten(w), t))


@promotes
@both
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_is_the_rule_of_the_paper(x64, method, optimizer):
  """Eight steps with a schedule of ρ; the decay is that of the clean weights."""
  in_numpy, base = OPTIMIZERS[optimizer]
  net, net_grad_fn, vector_grad_fn = net_problem()
  for params, grad_fn, by_vector, alpha in (
    (W, quadratic_of_tree, quadratic, 0.0),
    (net, net_grad_fn, vector_grad_fn, 0.7),
  ):
    tx = METHODS[method](base, alpha, rho=schedule)
    probe, state = run(tx, params, grad_fn, 8)
    clean, moved = by_rule(
      method, in_numpy(WEIGHT_DECAY), by_vector, vector(params), 8, alpha=alpha
    )
    np.testing.assert_allclose(vector(eval_params(state, probe)), clean, rtol=1e-9)
    np.testing.assert_allclose(vector(probe), moved, rtol=1e-9)
    assert np.linalg.norm(clean - moved) > 0.1


@both
def test_masked_leaves_neither_move_nor_count(x64, method):
  tx = METHODS[method](optax.sgd(RATE, momentum=DECAY), rho=0.5, mask=by_name('b'))
  probe, state = run(tx, W, quadratic_of_tree, 5)
  clean, moved = by_rule(
    method,
    sgd(0.0),
    quadratic,
    vector(W),
    5,
    rho=lambda t: 0.5,
    on=np.array([0.0] * 4 + [1.0] * 3),
  )
  np.testing.assert_allclose(vector(eval_params(state, probe)), clean, rtol=1e-9)
  np.testing.assert_allclose(vector(probe), moved, rtol=1e-9)
  if method == 'lagged':
    assert [x.shape for x in jax.tree.leaves(state.perturbation)] == [(3,)]


def test_a_state_is_strongly_typed_also_for_weakly_typed_parameters():
  params = {'w': jnp.array([0.3, 0.4]), 'b': jnp.array(1.2)}
  for make in (momentum_sam, lagged):
    tx = make(optax.sgd(0.1, momentum=0.9), rho=0.1)
    state = tx.init(params)
    _, new = tx.update(jax.tree.map(jnp.asarray, params), state, params)
    ours = lambda s: jax.tree.leaves(s._replace(base_state=None))
    assert [jax.typeof(x) for x in ours(new)] == [jax.typeof(x) for x in ours(state)]


def test_lagged_metric_sees_the_new_clean_parameters(x64):
  tx = lagged(optax.sgd(RATE, momentum=DECAY), adaptive(0.01, weights=True), 0.5)
  probe, state = run(tx, W, quadratic_of_tree, 5)
  clean, moved = by_rule(
    'lagged',
    sgd(0.0),
    quadratic,
    vector(W),
    5,
    rho=lambda t: 0.5,
    metric=lambda w: np.abs(w) + 0.01,
  )
  np.testing.assert_allclose(vector(eval_params(state, probe)), clean, rtol=1e-9)
  np.testing.assert_allclose(vector(probe), moved, rtol=1e-9)


@both
def test_first_step_and_zero_gradient_are_not_perturbed(method):
  params = {'w': jnp.array([1.0, -2.0])}
  tx = METHODS[method](optax.sgd(0.1, momentum=0.9), rho=3.0)
  state = tx.init(params)
  chex.assert_trees_all_equal(eval_params(state, params), params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = tx.update(zeros, state, params)
  chex.assert_trees_all_equal(updates, zeros)
  chex.assert_trees_all_equal(eval_params(state, params), params)


@jax.jit
def first_perturbation(g, rho, alpha):
  """The first update along a gradient, of an optimizer that makes no step."""
  tx = momentum_sam(optax.sgd(0.0, momentum=0.9), rho, alpha)
  return tx.update(g, tx.init(g), g)[0]


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
  exponent=st.floats(-30, 30),
  alpha=st.sampled_from([0.0, 1e-3, 1.0]),
  rho=st.floats(0.01, 10.0),
)
def test_momentum_of_any_size_keeps_its_direction(exponent, alpha, rho):
  g = np.float32(10.0**exponent) * np.array([2.0, -1.0, 2.0], np.float32)
  n = np.linalg.norm(g.astype(np.float64))
  expected = -rho * g / n / np.sqrt(1 + (alpha * n) ** 2)
  got = first_perturbation(g, np.float32(rho), np.float32(alpha))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-15)


STEPS = 100_000
# Two coordinates in which the loss is flat, so that nothing pulls an error back.
CURVATURE = np.array([0.0, 1.0, 0.1, 0.0])
START = np.array([1.0, 2.0, -3.0, 0.75])


@functools.cache
def long_noise():
  noise = np.random.default_rng(0).normal(size=(STEPS, 4))
  return np.asarray(jnp.asarray(noise, jnp.bfloat16).astype(jnp.float32))


def long_radius(count):
  return 0.5 + 0.5 * ((count % 100) / 100)


def long_run(tx, dtype):
  noise = jnp.asarray(long_noise(), dtype)
  params = jnp.asarray(START, dtype)

  @jax.jit
  def train(params, state):
    def step(carry, n):
      params, state = carry
      grads = jnp.asarray(CURVATURE, dtype) * params + n
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), noise)[0]

  return train(params, tx.init(params))


@pytest.mark.slow
@promotes
@both
@pytest.mark.parametrize('clean_dtype', [None, 'float32'])
def test_nothing_drifts_in_many_steps(method, clean_dtype):
  """One rounding a step, as in plain training: √N of them, not N."""
  tx = METHODS[method](
    optax.sgd(1e-3, momentum=0.9), rho=long_radius, clean_dtype=clean_dtype
  )
  params, state = long_run(tx, jnp.float32)
  noise = long_noise().astype(np.float64)

  def optimizer(w, g, t, v=np.zeros(4)):
    v[:] = 0.9 * v + g
    return w - 1e-3 * v, v

  clean, _ = by_rule(
    method,
    optimizer,
    lambda w, t: CURVATURE * w + noise[t],
    START,
    STEPS,
    rho=long_radius,
  )
  error = np.abs(vector(eval_params(state, params)) - clean)
  bound = np.sqrt(STEPS) * np.finfo(np.float32).eps / 2 * np.abs(clean).max()
  assert error.max() <= bound

  if clean_dtype:  # The same gradients in the flat directions, in bfloat16.
    params, state = long_run(tx, jnp.bfloat16)
    assert params.dtype == jnp.bfloat16
    error = np.abs(vector(optax.tree.get(state, 'clean')) - clean)
    assert error[[0, 3]].max() <= bound
    chex.assert_trees_all_equal(
      eval_params(state, params), optax.tree.get(state, 'clean').astype(jnp.bfloat16)
    )


@promotes
@both
def test_scanned_and_resumed_training_goes_on_bit_for_bit(method):
  """From a copy in host memory; and the state is one that `scan` carries."""
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), W)
  tx = METHODS[method](optax.sgd(RATE, momentum=DECAY), 0.7, rho=schedule)

  @functools.partial(jax.jit, donate_argnums=0)
  def three(carry):
    def step(carry, t):
      params, state = carry
      updates, state = tx.update(quadratic_of_tree(params, t), state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, jnp.arange(3))[0]

  start = lambda: (jax.tree.map(jnp.copy, params), tx.init(params))
  whole = three(three(start()))
  saved = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, three(start())))
  chex.assert_trees_all_equal(three(jax.tree.map(jnp.asarray, saved)), whole)


def test_a_change_of_the_params_from_outside_is_one_of_the_clean_ones():
  params = {'w': jnp.array([1.0, -2.0])}
  tx = momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
  updates, state = tx.update(params, tx.init(params), params)
  probe = optax.apply_updates(params, updates)
  shifted = jax.tree.map(lambda x: x + 1.0, probe)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x - 1.0, eval_params(state, shifted)),
    eval_params(state, probe),
    atol=1e-6,
  )


@promotes
@both
def test_state_is_found_in_wrappers(method):
  """In accumulation, with a radius that is set from outside, and one for each group."""
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), W)
  make, base = METHODS[method], optax.sgd(RATE, momentum=DECAY)
  grad_fn = lambda params, t: quadratic_of_tree(params, 0)
  plain = run(make(base, rho=0.5), params, grad_fn, 3)
  clean = eval_params(plain[1], plain[0])

  accumulated = optax.MultiSteps(make(base, rho=0.5), 2)
  got, state = run(accumulated, params, grad_fn, 6)
  chex.assert_trees_all_close(got, plain[0], rtol=1e-6)
  chex.assert_trees_all_close(eval_params(state, got), clean, rtol=1e-6)

  factory = lambda base_optimizer, rho: make(base_optimizer, rho=rho)
  injected = optax.inject_hyperparams(factory)(base, rho=0.5)
  got, state = run(injected, params, grad_fn, 3)
  chex.assert_trees_all_close(got, plain[0], rtol=1e-6)
  chex.assert_trees_all_close(eval_params(state, got), clean, rtol=1e-6)

  groups = {'x': make(base, rho=0.5), 'y': optax.sgd(RATE, momentum=DECAY)}
  parted = optax.partition(groups, {'a': 'x', 'b': 'y'})
  got, state = run(parted, params, grad_fn, 3)
  masked, masked_state = run(
    make(base, rho=0.5, mask={'a': True, 'b': False}), params, grad_fn, 3
  )
  chex.assert_trees_all_close(got, masked, rtol=1e-6)
  chex.assert_trees_all_close(
    eval_params(state, got), eval_params(masked_state, masked), rtol=1e-6
  )


@promotes
def test_every_leaf_moves_along_the_momentum_that_it_has():
  """In parts: Adam for one leaf, nothing for the frozen one."""
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), W)
  base = optax.partition(
    {'adam': optax.adam(RATE), 'frozen': optax.set_to_zero()},
    {'a': 'adam', 'b': 'frozen'},
  )
  updates, state = momentum_sam(base, rho=0.5).update(
    params, momentum_sam(base).init(params), params
  )
  probe = optax.apply_updates(params, updates)
  delta = jax.tree.map(jnp.subtract, probe, eval_params(state, probe))
  chex.assert_trees_all_equal(delta['b'], jnp.zeros(3))
  chex.assert_trees_all_close(
    delta['a'], -0.5 * params['a'] / jnp.linalg.norm(params['a']), rtol=1e-5
  )


@pytest.mark.slow
@promotes
def test_muon_has_a_momentum_for_matrices_and_one_for_the_rest():
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), W)
  tx = momentum_sam(optax.contrib.muon(RATE), rho=0.5)
  probe, state = run(tx, params, quadratic_of_tree, 2)
  delta = jax.tree.map(jnp.subtract, probe, eval_params(state, probe))
  np.testing.assert_allclose(optax.tree.norm(delta), 0.5, rtol=1e-5)


@promotes
def test_momentum_of_another_name_is_named():
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), W)
  base = optax.contrib.ademamix(RATE)
  tx = momentum_sam(base, rho=0.5, momentum='m1')
  probe, state = run(tx, params, quadratic_of_tree, 2)
  clean = eval_params(state, probe, momentum='m1')
  delta = jax.tree.map(jnp.subtract, probe, clean)
  np.testing.assert_allclose(optax.tree.norm(delta), 0.5, rtol=1e-5)
  with pytest.raises(ValueError, match="no 'trace' or 'mu'"):
    eval_params(state, probe)


@promotes
def test_a_parameter_may_be_called_as_a_momentum_is():
  params = {'mu': jnp.ones(2), 'trace': jnp.ones(2)}
  tx = momentum_sam(optax.adam(0.1), rho=0.5)
  updates, state = tx.update(params, tx.init(params), params)
  probe = optax.apply_updates(params, updates)
  delta = jax.tree.map(jnp.subtract, probe, eval_params(state, probe))
  np.testing.assert_allclose(delta['mu'], -0.25, rtol=1e-5)


@promotes
@pytest.mark.parametrize(
  ('base', 'message'),
  [
    (optax.sgd(0.1), "no 'trace' or 'mu' like the parameters"),
    (optax.rmsprop(0.1, momentum=0.9), 'is one of steps'),
    (
      optax.lars(optax.warmup_constant_schedule(0.0, 0.1, 5)),
      'before `optax.scale_by_learning_rate`',
    ),
    (
      optax.chain(optax.trace(0.9), optax.adam(0.1)),
      r"2 momenta of the parameter at \['a'\]: \[0\]TraceState.trace",
    ),
    (optax.flatten(optax.adam(0.1)), "no 'trace' or 'mu' like the parameters"),
  ],
  ids=['none', 'of steps', 'of steps, warmed up', 'several', 'flattened'],
)
def test_momentum_that_cannot_be_used_is_refused(base, message):
  with pytest.raises(ValueError, match=message):
    momentum_sam(base).init(W)


@both
def test_wrong_arguments_are_named(method):
  make, base = METHODS[method], optax.sgd(0.1, momentum=0.9)
  with pytest.raises(ValueError, match='`rho` must be finite and >= 0'):
    make(base, rho=-1.0)
  with pytest.raises(TypeError, match=f'first argument of {method} is the optimizer'):
    make(euclidean())
  with pytest.raises(TypeError, match='`clean_dtype` must be a floating dtype'):
    make(base, clean_dtype='int32')
  with pytest.raises(TypeError, match='`clean_dtype` must be a floating'):
    make(base, clean_dtype='flot32')
  with pytest.raises(ValueError, match='selects no leaf'):
    make(base, mask=False).init(W)
  with pytest.raises(TypeError, match='dtype int32'):
    make(base).init({'w': jnp.arange(3)})
  tx = make(base)
  state = tx.init(W)
  with pytest.raises(ValueError, match=f'{method} needs the parameters'):
    tx.update(W, state)
  with pytest.raises(ValueError, match=r'must be like the params.*no leaf at'):
    tx.update({'a': W['a']}, state, W)
  with pytest.raises(ValueError, match='found no state of `lagged` or `momentum_sam`'):
    eval_params(base.init(W), W)
  with pytest.raises(ValueError, match='eval_params needs'):
    eval_params(state, {'a': W['a']})


def test_wrong_arguments_of_each_are_named():
  base = optax.sgd(0.1, momentum=0.9)
  with pytest.raises(TypeError, match='`metric` must be a Metric'):
    lagged(base, 0.05)
  with pytest.raises(TypeError, match='`momentum` is the name of a field'):
    momentum_sam(base, momentum=0.9)
  with pytest.raises(ValueError, match='`alpha` must be finite'):
    momentum_sam(base, 1.0, np.nan)
  # The scales of several models would be broadcast along axes of the parameters.
  square = jnp.stack([jnp.eye(2), jnp.ones((2, 2))])
  states = jax.vmap(momentum_sam(base).init)(square)
  with pytest.raises(ValueError, match=r'`jax.vmap\(eval_params\)'):
    eval_params(states, square)


@both
def test_a_gradient_that_is_not_finite_is_seen_and_may_be_skipped(method):
  """Seen by what is outside; rolled back there; or survived by the base optimizer."""
  params = {'w': jnp.array([1.0, -2.0])}
  bad = {'w': jnp.array([jnp.nan, 1.0])}
  make, base = METHODS[method], optax.sgd(0.1, momentum=0.9)

  def train(tx, grads):
    p, state = params, tx.init(params)
    for g in grads:
      updates, state = tx.update(g, state, p)
      p = optax.apply_updates(p, updates)
    return p, state

  p, _ = train(make(base, rho=0.5), [params, bad])
  assert not jnp.isfinite(p['w'][0])
  outside = optax.apply_if_finite(make(base, rho=0.5), 3)
  chex.assert_trees_all_equal(
    train(outside, [params, bad, params])[0], train(outside, [params, params])[0]
  )
  inside = make(optax.apply_if_finite(base, 3), rho=0.5)
  p, state = train(inside, [params, bad])
  chex.assert_tree_all_finite((p, eval_params(state, p)))
  chex.assert_trees_all_close(
    eval_params(state, p), eval_params(*reversed(train(inside, [params]))), rtol=1e-6
  )
  hidden = make(optax.chain(base, optax.zero_nans()), rho=0.5)
  chex.assert_tree_all_finite(train(hidden, [params, bad, params])[0])
  p, _ = train(make(base, rho=lambda count: -1.0), [params])
  assert jnp.isnan(p['w']).all()


@both
@pytest.mark.parametrize('clean_dtype', [None, 'float32'])
def test_bfloat16_params_keep_their_dtype(method, clean_dtype):
  params = {'w': jnp.ones(3, jnp.bfloat16)}
  tx = METHODS[method](optax.sgd(1e-4, momentum=0.9), rho=0.5, clean_dtype=clean_dtype)
  grads = {'w': jnp.array([1.0, 2.0, -2.0], jnp.bfloat16)}
  p, state = params, tx.init(params)
  for _ in range(4):
    updates, state = tx.update(grads, state, p)
    assert updates['w'].dtype == jnp.bfloat16
    p = optax.apply_updates(p, updates)
  sign = 1 if method == 'lagged' else -1
  moved = sign * 0.5 * np.array([1, 2, -2]) / 3
  np.testing.assert_allclose(p['w'].astype(np.float32), 1 + moved, atol=0.01)
  assert eval_params(state, p)['w'].dtype == jnp.bfloat16
  if clean_dtype:
    # Steps of 1e-4 that bfloat16 would lose: (1 + 1.9 + 2.71 + 3.439) of them.
    expected = 1 - 1e-4 * 9.049 * np.array([1, 2, -2])
    np.testing.assert_allclose(optax.tree.get(state, 'clean')['w'], expected, rtol=1e-6)


PARAM_SPECS = {'a': P('i'), 'b': P()}
SHARDED = {
  'a': np.linspace(-1.0, 2.0, 12, dtype=np.float32).reshape(4, 3),
  'b': np.array([0.5, -1.0], np.float32),
}


def elementwise(params, t):
  """A gradient that each shard can take of itself."""
  return jax.tree.map(lambda w: jnp.sin(w) * (1.0 + jnp.asarray(t, w.dtype)), params)


@pytest.mark.cpu
@both
def test_sharded_params_are_moved_as_whole_ones(method):
  """Under ``jit`` with sharded arrays, and inside ``shard_map``."""
  base = optax.sgd(RATE, momentum=DECAY)
  make = functools.partial(METHODS[method], base, 0.7, rho=0.5)
  whole, state = run(make(), jax.tree.map(jnp.asarray, SHARDED), elementwise, 3)
  clean = eval_params(state, whole)

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('i',))
  place = lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec))
  params = jax.tree.map(place, PARAM_SPECS, SHARDED, is_leaf=lambda x: isinstance(x, P))
  state = make().init(params)
  chex.assert_trees_all_equal(  # The state lies as the params do.
    {x.sharding for x in jax.tree.leaves(state) if x.shape == (4, 3)},
    {params['a'].sharding},
  )
  got, state = run(make(), params, elementwise, 3)
  chex.assert_trees_all_close(got, whole, rtol=1e-5)
  assert got['a'].sharding.is_equivalent_to(params['a'].sharding, 2)

  tx = make(param_specs=PARAM_SPECS)
  specs = jax.tree.map(
    lambda x: P('i') if np.shape(x) == (4, 3) else P(), tx.init(SHARDED)
  )

  def step(params, state, t):
    updates, state = tx.update(elementwise(params, t), state, params)
    return optax.apply_updates(params, updates), state

  mapped = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(PARAM_SPECS, specs, P()),
      out_specs=(PARAM_SPECS, specs),
    )
  )
  got, state = jax.tree.map(jnp.asarray, SHARDED), tx.init(SHARDED)
  for t in range(3):
    got, state = mapped(got, state, t)
  chex.assert_trees_all_close(got, whole, rtol=1e-5)
  chex.assert_trees_all_close(eval_params(state, got), clean, rtol=1e-5)


@pytest.mark.cpu
@both
def test_replicas_with_averaged_gradients_take_the_step_of_one(method):
  """In ``pmap``, as with any optimizer: the mean of the gradients, then the update."""
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), W)
  tx = METHODS[method](optax.sgd(RATE, momentum=DECAY), rho=0.5)
  grad_fn = lambda params, t: quadratic_of_tree(params, 0)
  expected, _ = run(tx, params, grad_fn, 2)

  @functools.partial(jax.pmap, axis_name='i', in_axes=(None, None, 0), out_axes=None)
  def step(params, state, weight):
    grads = jax.tree.map(lambda g: weight * g, grad_fn(params, 0))
    grads = jax.lax.pmean(grads, 'i')
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  got, state = params, tx.init(params)
  for _ in range(2):
    got, state = step(got, state, jnp.array([0.5, 1.5]))
  chex.assert_trees_all_close(got, expected, rtol=1e-5)


def perceptron():
  """A network of two hidden layers of 256 units, on 4,096 examples."""
  shapes = {'a': (64, 256), 'b': (256, 256), 'c': (256, 10)}

  def loss(params, batch):
    x, y = batch
    x = jnp.tanh(jnp.tanh(x @ params['a']) @ params['b']) @ params['c']
    return optax.losses.softmax_cross_entropy_with_integer_labels(x, y).mean()

  params = {name: jnp.ones(shape) for name, shape in shapes.items()}
  return networks.Problem(loss, params, (jnp.ones((4096, 64)), jnp.zeros(4096, int)))


@pytest.mark.slow
@pytest.mark.cpu
@promotes
@pytest.mark.parametrize(
  'problem',
  [
    perceptron,
    pytest.param(networks.transformer, marks=pytest.mark.slow),
    pytest.param(networks.conv_net, marks=pytest.mark.slow),
  ],
  ids=lambda problem: problem.__name__,
)
def test_a_step_costs_what_one_gradient_costs(problem):
  """XLA's own figures of the compiled step, with donated arguments, beside Adam's."""
  problem = problem()
  size = sum(x.nbytes for x in jax.tree.leaves(problem.params))

  def weigh(tx):
    step = cost_steps.one_gradient(problem.loss, tx)
    carry = problem.params, step.tx.init(problem.params)
    compiled = jax.jit(step.run, donate_argnums=0).lower(carry, problem.batch).compile()
    state = sum(x.nbytes for x in jax.tree.leaves(carry[1]))
    flops = compiled.cost_analysis()['flops']
    return flops, compiled.memory_analysis().temp_size_in_bytes, state

  flops, temporaries, state = weigh(optax.adam(1e-3))
  for tx, copies in (
    (momentum_sam(optax.adam(1e-3), alpha=1.0), 0),
    (lagged(optax.adam(1e-3)), 1),
  ):
    ours = weigh(tx)
    assert ours[0] <= 1.03 * flops
    assert ours[1] <= 1.05 * temporaries
    assert ours[2] - state - copies * size <= 8


X = problems.normal(1, 8, 3)
Y = problems.normal(2, 8, 2)
KERNEL = problems.normal(3, 3, 2)


def squared_error(out):
  return jnp.mean((out - Y) ** 2)


def nnx_loop(tx):
  model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
  model.kernel[...] = jnp.asarray(KERNEL)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda model: squared_error(model(X)))(model))

  for _ in range(3):
    step(model, optimizer)
  return model.kernel[...], flax_nnx.eval_model(optimizer, model).kernel[...]


def linen_loop(tx):
  state = flax_linen.TrainState.create(
    apply_fn=nn.Dense(2, use_bias=False).apply, params={'kernel': KERNEL}, tx=tx
  )

  @jax.jit
  def step(state):
    loss = lambda params: squared_error(state.apply_fn({'params': params}, X))
    return state.apply_gradients(grads=jax.grad(loss)(state.params))

  for _ in range(3):
    state = step(state)
  return state.params['kernel'], eval_params(state.opt_state, state.params)['kernel']


def equinox_loop(tx):
  model = eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(0))
  model = eqx.tree_at(lambda m: m.weight, model, jnp.asarray(KERNEL.T))
  state = tx.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit
  def step(model, state):
    loss = lambda model: squared_error(jax.vmap(model)(X))
    grads, params = (
      eqx.filter_grad(loss)(model),
      eqx.filter(model, eqx.is_inexact_array),
    )
    updates, state = tx.update(grads, state, params)
    return eqx.apply_updates(model, updates), state

  for _ in range(3):
    model, state = step(model, state)
  clean = eval_params(state, eqx.filter(model, eqx.is_inexact_array))
  return model.weight.T, clean.weight.T


@promotes
@both
@pytest.mark.parametrize('loop', [nnx_loop, linen_loop, equinox_loop])
def test_loops_take_the_steps_of_the_rule(method, loop):
  """With a mask, which a state must not forget: it says what is clean."""
  every = lambda params: jax.tree.map(lambda _: True, params)
  probe, clean = loop(
    METHODS[method](optax.sgd(RATE, momentum=DECAY), 0.7, rho=0.5, mask=every)
  )
  grad_fn = lambda w, t: np.ravel(2 * X.T @ (X @ w.reshape(3, 2) - Y) / Y.size)
  expected, moved = by_rule(
    method, sgd(0.0), grad_fn, vector(KERNEL), 3, rho=lambda t: 0.5, alpha=0.7
  )
  np.testing.assert_allclose(vector(clean), expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(vector(probe), moved, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@promotes
@both
def test_state_can_be_mapped_over_and_made_for_several_models(method):
  """By ``optax.tree.map_params``, also under a mask, and by ``vmap``."""
  tx = METHODS[method](optax.adam(RATE), rho=0.5, mask={'a': True, 'b': False})
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), W)
  state = tx.init(params)
  marked = optax.tree.map_params(tx, lambda x: 0 * x + 7, state)
  assert jax.tree.structure(marked) == jax.tree.structure(state)
  assert jnp.all(optax.tree.get(marked, 'mu')['b'] == 7)

  several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  updates, _ = jax.vmap(tx.update)(several, jax.vmap(tx.init)(several), several)
  first, _ = tx.update(params, state, params)
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], updates), first, rtol=1e-6)


@both
def test_a_number_of_python_is_a_parameter(method):
  tx = METHODS[method](
    optax.trace(0.9) if method == 'momentum_sam' else optax.scale(2.0)
  )
  state = tx.init({'w': 0.5})
  for grads in {'w': 1.0}, {'w': np.float32(1.0)}:
    updates, state = tx.update(grads, state, {'w': 0.5})
    assert np.isfinite(np.asarray(updates['w']))


def test_state_says_what_it_is():
  tx = momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
  state = tx.init(W)
  assert isinstance(state, MomentumSAMState)
  assert isinstance(lagged(optax.sgd(0.1)).init(W), LaggedState)
  _, state = tx.update(W, state, W)
  # ‖δ‖ = scale · ‖v‖.
  np.testing.assert_allclose(state.scale * np.linalg.norm(vector(W)), 0.5, rtol=1e-6)
