"""What a metric and a combination get of the other leaves and devices."""

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import landscape
from msam_optax import spaces


def running_mean(*, averaged):
  """A metric with memory: up the running mean of the gradients, as VaSSO goes."""

  def init(params):
    return jax.tree.map(jnp.zeros_like, params)

  def ascend(grads, state, params, *, space, **extra_args):
    grads = space.mean(grads) if averaged else grads
    state = jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, state, grads)
    unit, norm = space.normalize(state)
    return msam_optax.Ascent(unit, norm), state

  return msam_optax.Metric(init, ascend)


def plain(grads, state, params, *, space, **extra_args):
  """The Euclidean metric, as a user writes it."""
  unit, norm = space.normalize(space.mean(grads))
  return msam_optax.Ascent(unit, norm), state


PLAIN = msam_optax.Metric(lambda params: optax.EmptyState(), plain)


def loss(w, x):
  return jnp.sum((w - x) ** 2)


def mean_loss(w, x):
  return jnp.mean((w[None] - x) ** 2)


X = jnp.array([[0.5, -1.0], [2.0, 0.25]])
W = jnp.array([0.1, 0.2])


def test_a_metric_with_memory_remembers_the_mean_over_replicas():
  tx = msam_optax.sharpness_aware(running_mean(averaged=True), 0.1, axis_name='i')

  def step(x):
    grad_fn = lambda w: jax.grad(loss)(w, x)
    return tx.update(grad_fn(W), tx.init(W), W, grad_fn=grad_fn)

  updates, state = jax.vmap(step, axis_name='i')(X)
  memory = 0.5 * np.mean(2 * (W[None] - X), axis=0)
  np.testing.assert_allclose(state.metric_state, np.tile(memory, (2, 1)), rtol=1e-6)
  delta = 0.1 * memory / np.linalg.norm(memory)
  expected = np.mean(2 * ((W + delta)[None] - X), axis=0)
  np.testing.assert_allclose(np.asarray(updates), np.tile(expected, (2, 1)), rtol=1e-6)


@pytest.mark.parametrize('options', [{'axis_name': 'i'}, {'shards': 2}], ids=str)
def test_a_metric_of_one_micro_batch_has_no_mean(options):
  f = msam_optax.value_and_grad(mean_loss, PLAIN, 0.1, **options)
  with pytest.raises(
    ValueError, match=r'cannot use `space.mean` .* `sync_ascent=True`'
  ):
    jax.vmap(f, axis_name='i', in_axes=(None, 0))(W, jnp.stack([X, X]))


@pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])
@pytest.mark.parametrize('options', [{}, {'shards': 2, 'sync_ascent': True}], ids=str)
def test_the_mean_of_what_is_one_is_itself(options, once):
  f = msam_optax.value_and_grad(mean_loss, PLAIN, 0.1, compile_once=once, **options)
  expected = msam_optax.value_and_grad(mean_loss, msam_optax.euclidean(), 0.1)(W, X)
  chex.assert_trees_all_close(f(W, X), expected, rtol=1e-6)


@pytest.mark.parametrize('bad', [-1e-9, jnp.nan])
def test_a_number_that_goes_wrong_does_not_reach_the_clean_pass(bad):
  """Statistics of a batch that it makes would not be numbers for ever."""
  with_aux = lambda w, x: (loss(w, x), jnp.mean(w))

  @jax.jit
  def step(rho):
    f = msam_optax.value_and_grad(
      with_aux, msam_optax.monge(), rho, has_aux=True, compile_once=True
    )
    return f(W, X[0])

  (value, aux), grads = step(jnp.float32(bad))
  np.testing.assert_allclose(value, loss(W, X[0]), rtol=1e-6)
  np.testing.assert_allclose(aux, 0.15, rtol=1e-6)
  assert np.isnan(grads).all()


def test_a_landscape_along_a_metric_of_ones_own():
  direction = landscape.steepest_direction(lambda w: loss(w, X[0]), W, PLAIN)
  g = 2 * (W - X[0])
  np.testing.assert_allclose(direction, g / np.linalg.norm(g), rtol=1e-6)


def test_parameters_without_leaves_have_nothing_to_perturb():
  tx = msam_optax.msam()
  updates, state = tx.update({}, tx.init({}), {}, grad_fn=lambda params: {})
  assert updates == {}
  assert state.radius == 0


def test_a_normalized_direction_has_the_dtypes_of_the_gradients():
  g = {'a': jnp.ones(2, jnp.bfloat16), 'b': jnp.ones(2, jnp.float32)}
  tx = msam_optax.normalize_by(PLAIN)
  direction, _ = tx.update(g, tx.init(g), g)
  chex.assert_trees_all_equal_shapes_and_dtypes(direction, g)


@pytest.mark.parametrize(
  ('due', 'found'),
  [
    (lambda g, state, space: None, 'None'),
    (lambda g, state, space: 1.0, r'float32\[\]'),
    (lambda g, state, space: g > 0, r'bool\[2\]'),
  ],
  ids=['None', 'a number', 'a vector'],
)
def test_what_due_returns_is_checked(due, found):
  combination = msam_optax.probe_gradient()._replace(due=due)
  tx = msam_optax.sharpness_aware(msam_optax.euclidean(), 0.1, combination)
  with pytest.raises(TypeError, match=rf'must return a bool, one scalar, not {found}'):
    tx.update(W, tx.init(W), W, grad_fn=lambda w: w)


def test_a_combination_that_needs_a_probe_says_when_it_had_none():
  combination = msam_optax.Combination(
    lambda params: optax.EmptyState(),
    lambda grads, state, space: (grads[1], state),
    due=lambda g, state, space: jnp.sum(g) > 0,
  )
  tx = msam_optax.sharpness_aware(msam_optax.euclidean(), 0.1, combination)
  with pytest.raises(IndexError) as error:
    tx.update(W, tx.init(W), W, grad_fn=lambda w: w)
  assert 'called with `(g,)` alone' in error.value.__notes__[0]


@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_the_norm_of_a_constant_of_a_program_is_right(scale):
  """As in a branch of `lax.cond`, whose arrays from outside are constants."""
  g = np.float32([3.0 * scale, 4.0 * scale])
  unit, norm = jax.jit(lambda: msam_optax.LOCAL.normalize(g))()
  np.testing.assert_allclose(norm, 5.0 * scale, rtol=1e-6)
  np.testing.assert_allclose(unit, [0.6, 0.8], rtol=1e-6)


@pytest.fixture(params=['as here', 'as on an accelerator'])
def on_both(request, monkeypatch):
  """Accelerators have no conditionals, and sums one by one; a CPU can run that too."""
  if request.param == 'as here':
    yield
    return
  if jax.__version_info__ < (0, 8):
    pytest.skip('JAX 0.7.0 ends some processes in `clear_caches`')
  jax.clear_caches()
  with monkeypatch.context() as patch:
    choose = lambda *args, default, **on_platforms: default(*args)
    patch.setattr(jax.lax, 'platform_dependent', choose)
    yield
  jax.clear_caches()


@pytest.mark.usefixtures('on_both')
@pytest.mark.parametrize('mapped', [False, True], ids=['one', 'vmap'])
def test_the_norm_is_right_at_every_magnitude(mapped):
  """Also where some squares over- or underflow, and others do not."""
  entries = np.random.default_rng(0).normal(size=64) * 10.0 ** np.linspace(-6, 0, 64)
  scales = 10.0 ** np.arange(-30, 37)
  rows = np.float32(scales[:, None] * entries)
  normalize = jax.jit(msam_optax.LOCAL.normalize)
  one_by_one = lambda rows: jax.tree.map(
    lambda *xs: np.stack(xs), *[normalize(row) for row in rows]
  )
  units, norms = (jax.vmap(normalize) if mapped else one_by_one)(rows)

  exact = np.linalg.norm(np.float64(rows), axis=1)
  np.testing.assert_allclose(norms, exact, rtol=1e-6)
  np.testing.assert_allclose(units, rows / exact[:, None], rtol=1e-6)


@pytest.mark.usefixtures('on_both')
@pytest.mark.parametrize(
  'parts', [(0.0, 1e-30), (1e-30, 1e30), (1.0, 1e30), (0.0, 1.0)]
)
def test_the_norm_of_parts_of_any_magnitudes(parts):
  """One leaf in two parts, and one that is on both devices, of the first magnitude."""
  small, large = parts
  space = spaces.over(None, {'cut': P('i'), 'whole': P()})
  whole = np.array([2 * small], np.float32)
  cut = np.array([[3 * small], [4 * large]], np.float32)

  def normalize(part):
    return space.normalize({'cut': part, 'whole': jnp.asarray(whole)})

  units, norms = jax.jit(jax.vmap(normalize, axis_name='i'))(cut)
  exact = np.linalg.norm(np.float64([*cut.ravel(), *whole.ravel()]))
  np.testing.assert_allclose(norms, [exact] * 2, rtol=1e-6)
  np.testing.assert_allclose(units['cut'], cut / exact, rtol=1e-6, atol=1e-37)
  np.testing.assert_allclose(units['whole'], [whole / exact] * 2, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize('name', ['sam', 'msam', 'asam', 'fisher_sam'])
def test_no_tracer_is_kept(name):
  w = jnp.array([1.0, 2.0])
  tx = getattr(msam_optax, name)(0.1)
  with jax.checking_leaks():
    step = jax.jit(lambda w: tx.update(w, tx.init(w), w, grad_fn=jnp.sin)[0])
    assert jnp.all(jnp.isfinite(step(w)))


@pytest.mark.parametrize('outer', [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize('inner', [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize('n', [1e-30, 1e-17, 1e-15, 1.0, 1e15, 1.5e19, 1e30])
def test_the_second_derivative_of_the_norm(n, inner, outer):
  """``(I − uuᵀ)/n``, on both sides of what a plain sum of squares can hold."""
  u = np.array([0.6, -0.8])
  norm = lambda g: msam_optax.LOCAL.normalize(g)[1]
  hessian = jax.jit(outer(inner(norm)))(jnp.asarray(n * u, jnp.float32))
  np.testing.assert_allclose(n * hessian, np.eye(2) - np.outer(u, u), rtol=1e-5)


@pytest.mark.usefixtures('on_both')
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float16, jnp.complex64])
def test_one_entry_that_is_not_finite_is_found(bad, dtype):
  all_finite = jax.jit(spaces.all_finite)
  largest = float(jnp.finfo(dtype).max) / 2
  tree = {'a': jnp.full(3, largest, dtype), 'b': jnp.zeros((2, 2)), 'c': jnp.arange(2)}
  assert all_finite(tree)
  assert not all_finite({**tree, 'a': tree['a'].at[1].set(bad)})
