"""Any pytree of parameters: callable ones, missing gradients, stacked layers, FP8."""

import dataclasses
import functools

import chex
import equinox as eqx
from flax import linen as nn
from flax.linen import fp8_ops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import by_name
from msam_optax import flax_linen
from msam_optax import msam
from msam_optax import sam
from msam_optax import sharpness
from msam_optax._devices import as_varying
from msam_optax._masks import weights_by_default
from tests import by_hand


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('kernel', 'bias'),
  meta_fields=(),
)
@dataclasses.dataclass
class Affine:
  """A model that is a pytree and a function, as those of several libraries are."""

  kernel: jax.Array
  bias: jax.Array

  def __call__(self, x):
    return self.kernel @ x + self.bias


KERNEL, BIAS = jnp.array([[0.5, -1.0], [2.0, 0.25]]), jnp.array([0.1, -0.3])
CALLABLES = {
  'dataclass': Affine(KERNEL, BIAS),
  'Partial': jax.tree_util.Partial(lambda k, b, x: k @ x + b, KERNEL, BIAS),
  'equinox': eqx.tree_at(
    lambda m: (m.weight, m.bias),
    eqx.nn.Linear(2, 2, key=jax.random.key(0)),
    (KERNEL, BIAS),
  ),
}
every_callable = pytest.mark.parametrize('model', CALLABLES.values(), ids=CALLABLES)


def squared(model):
  return jnp.sum(jnp.square(model(jnp.array([1.0, 2.0]))))


def expected(masked=False):
  """The gradient at SAM's probe, kernel and bias, by the formula."""
  k, b, x = np.float64(KERNEL), np.float64(BIAS), np.array([1.0, 2.0])
  g_k, g_b = np.outer(2 * (k @ x + b), x), 2 * (k @ x + b)
  if masked:
    g_b = np.zeros(2)
  norm = np.sqrt(np.sum(g_k**2) + np.sum(g_b**2))
  residual = (k + 0.3 * g_k / norm) @ x + b + 0.3 * g_b / norm
  return [np.outer(2 * residual, x), 2 * residual]


@pytest.mark.parametrize('masked', [False, True], ids=['all', 'masked'])
@every_callable
def test_a_callable_pytree_is_a_pytree(model, masked):
  """In the chain, in the drop-in, and as a mask."""
  leaves, structure = jax.tree.flatten(model)
  mask = structure.unflatten([True, not masked]) if masked else None
  grads = jax.grad(squared)(model)
  tx = sam(0.3, mask=mask)
  updates, state = tx.update(grads, tx.init(model), model, grad_fn=jax.grad(squared))
  value_and_grad_fn = msam_optax.value_and_grad(
    squared, msam_optax.euclidean(), 0.3, mask=mask
  )
  for got in (updates, value_and_grad_fn(model)[1]):
    assert jax.tree.structure(got) == structure
    for g, want in zip(jax.tree.leaves(got), expected(masked), strict=True):
      np.testing.assert_allclose(g, want, rtol=1e-5)
  np.testing.assert_allclose(state.radius, 0.3, rtol=1e-6)
  ascent = msam_optax.Ascent(structure.unflatten([leaves[0], leaves[1]]), 1.0)
  moved = msam_optax.perturb(model, ascent, 1.0, mask=mask)
  chex.assert_trees_all_close(
    jax.tree.leaves(moved), [2 * KERNEL, BIAS if masked else 2 * BIAS], rtol=1e-6
  )


@every_callable
def test_which_leaves_are_weights_may_be_said_by_a_callable_pytree(model):
  weights = jax.tree.structure(model).unflatten([True, False])
  slopes = []
  for given in (weights, lambda m: weights, None):
    metric = msam_optax.adaptive(weights=given)
    ascent, _ = metric.ascend(jax.grad(squared)(model), metric.init(model), model)
    slopes.append(float(ascent.slope))
  k, b, x = np.float64(KERNEL), np.float64(BIAS), np.array([1.0, 2.0])
  g = 2 * (k @ x + b)
  want = np.sqrt(
    np.sum(((np.abs(k) + 0.01) * np.outer(g, x)) ** 2) + np.sum(np.square(g))
  )
  np.testing.assert_allclose(slopes, want, rtol=1e-6)


def test_a_schedule_may_be_a_callable_pytree():
  """A hyperparameter is a schedule if it is callable, and no array."""
  rising = jax.tree_util.Partial(
    lambda slope, count: 0.1 + slope * count.astype(float), 0.2
  )
  tx = sam(rho=rising)
  state = tx.init(KERNEL)
  for radius in (0.1, 0.3):
    _, state = tx.update(KERNEL, state, KERNEL, grad_fn=lambda w: w)
    np.testing.assert_allclose(state.radius, radius, rtol=1e-6)


@pytest.mark.parametrize('act', ['init', 'update'])
def test_a_leaf_that_is_no_array_is_named(act):
  model = eqx.nn.MLP(2, 1, 3, depth=1, key=jax.random.key(0))
  arrays, tx = eqx.filter(model, eqx.is_inexact_array), msam()
  acts = {
    'init': lambda: tx.init(model),
    'update': lambda: tx.update(arrays, tx.init(arrays), model, grad_fn=lambda m: m),
  }
  with pytest.raises(TypeError, match=r'leaf at \.activation is .*eqx\.filter\(model'):
    acts[act]()


def test_a_leaf_without_a_gradient_is_not_moved():
  """As where a filter has left it out: it is in no norm, and no update is made."""
  params = {'trained': jnp.array([3.0, 4.0]), 'rest': {'frozen': jnp.array([7.0])}}
  seen = []

  def grad_fn(params):
    seen.append(params)
    return {'trained': params['trained'], 'rest': {'frozen': None}}

  tx = sam(rho=0.5)
  updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
  np.testing.assert_allclose(np.asarray(updates['trained']), [3.3, 4.4], rtol=1e-6)
  assert updates['rest'] == {'frozen': None}
  np.testing.assert_allclose(seen[-1]['rest']['frozen'], [7.0])
  np.testing.assert_allclose([state.slope, state.radius], [5.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
  ('clean', 'at_probe', 'message'),
  [
    ('ab', 'a', r"What `grad_fn` returns .* is no leaf at \['b'\]"),
    ('a', 'ab', r"What `grad_fn` returns .* an extra leaf at \['b'\]"),
    ('', '', 'no leaf has a gradient'),
  ],
)
def test_gradients_are_missing_in_both_passes_or_in_none(clean, at_probe, message):
  params = {'a': jnp.ones(2), 'b': jnp.ones(3)}
  only = lambda names: {k: w if k in names else None for k, w in params.items()}
  tx = msam()
  with pytest.raises(ValueError, match=message):
    tx.update(only(clean), tx.init(params), params, grad_fn=lambda p: only(at_probe))


def test_leaves_that_are_no_numbers_may_be_masked_out():
  """Keys, integers, and the gradients that JAX has for them, over a mapped axis."""
  rest = {'count': jnp.arange(3), 'key': jax.random.key(0), 'size': 3}
  no_number = np.zeros((), jax.dtypes.float0)
  rest_grads = {'count': np.zeros(3, jax.dtypes.float0), 'key': no_number, 'size': 0}
  mask = lambda params: {name: name == 'w' for name in params}
  tx = sam(rho=0.5, mask=mask, axis_name='i')

  def step(w):
    params, grads = {'w': w, **rest}, {'w': w, **rest_grads}
    grad_fn = lambda params: {'w': params['w'], **rest_grads}
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    assert updates['count'].dtype == jax.dtypes.float0
    return jnp.asarray(updates['w']), state.radius

  updates, radius = jax.vmap(step, axis_name='i')(jnp.array([[3.0, 4.0], [6.0, 8.0]]))
  np.testing.assert_allclose(updates, [[4.8, 6.4]] * 2, rtol=1e-6)
  np.testing.assert_allclose(radius, 0.5, rtol=1e-6)


def test_a_bad_complex_leaf_that_is_masked_out_is_seen():
  params = {'w': jnp.ones(2), 'z': jnp.ones(2, jnp.complex64)}
  bad = {**params, 'z': params['z'].at[0].set(jnp.nan)}
  tx = sam(mask={'w': True, 'z': False})
  updates, state = tx.update(bad, tx.init(params), params, grad_fn=lambda p: p)
  assert jnp.isnan(updates['z']).all()
  assert not state.finite


def test_minus_zero_stays():
  """A coordinate whose gradient is zero is not touched, not even in its sign."""
  w = jnp.array([-0.0, 1.0])
  signs = []
  f = lambda w: (signs.append(w), jnp.sum(w * jnp.array([0.0, 2.0])))[1]
  moved = msam_optax.perturb(w, msam_optax.Ascent(jnp.array([0.0, 1.0]), 1.0), 0.5)
  assert jnp.signbit(moved)[0]
  at = lambda w: jnp.sum(jnp.where(jnp.signbit(w), 5.0, 1.0) * w) + jnp.sum(f(w))
  value, _ = msam_optax.value_and_grad(at, compile_once=True)(w)
  _, grads = msam_optax.value_and_grad(at, rho=0.0, compile_once=True)(w)
  np.testing.assert_array_equal(grads, [5.0, 3.0])
  assert value == 3.0


@pytest.mark.parametrize('named', [('scale', 'bias'), ('gamma', 'beta'), ('b', 'b2')])
def test_stacked_biases_are_no_weights(named):
  """Three layers in one leaf have the slope of three layers in three."""
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)
  names = [name for name in named if name != 'b2']
  stacked = {'kernel': make(4, 2), **{name: make(2) for name in names}}
  grads = jax.tree.map(lambda w: make(*w.shape[1:]), stacked)
  layers = lambda tree: [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(3)]
  metric = msam_optax.adaptive()
  whole, _ = metric.ascend(grads, metric.init(stacked), stacked)
  parts, _ = metric.ascend(layers(grads), metric.init(None), layers(stacked))
  square = lambda x: np.sum(np.square(np.asarray(x, np.float64)))
  want = square((np.abs(stacked['kernel']) + 0.01) * np.asarray(grads['kernel']))
  want += sum(square(grads[name]) for name in names)
  np.testing.assert_allclose([whole.slope, parts.slope], np.sqrt(want), rtol=1e-6)


class Block(nn.Module):
  """A layer as ``nn.scan`` stacks it: a carry, and nothing to collect."""

  @nn.compact
  def __call__(self, x, _):
    return nn.LayerNorm()(jnp.tanh(nn.Dense(3)(x))), None


@pytest.mark.slow
def test_layers_of_nn_scan():
  """ASAM's gradient of a scanned model is that of the layers one by one."""
  scanned = nn.scan(
    Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
  )()
  x = jax.random.normal(jax.random.key(0), (4, 3))
  params = scanned.init(jax.random.key(1), x, None)['params']
  params = jax.tree.map(lambda w: w + 0.1, params)

  def loss(params):
    return jnp.mean(jnp.square(scanned.apply({'params': params}, x, None)[0] - 1.0))

  def loss_of_layers(layers):
    h = x
    for layer in layers:
      h, _ = Block().apply({'params': layer}, h, None)
    return jnp.mean(jnp.square(h - 1.0))

  value_and_grad_fn = msam_optax.value_and_grad(loss, msam_optax.adaptive(), 0.5)
  layers = [jax.tree.map(lambda w, i=i: w[i], params) for i in range(2)]
  probe = by_hand.probe('asam', layers, jax.grad(loss_of_layers)(layers), 0.5)
  want = jax.tree.map(lambda *gs: jnp.stack(gs), *jax.grad(loss_of_layers)(probe))
  chex.assert_trees_all_close(value_and_grad_fn(params)[1], want, rtol=1e-4, atol=1e-6)


def test_names_make_masks():
  params = {'body': [{'kernel': 1.0}, {'kernel': 1.0}], 'head': {'bias': 1.0}}
  assert by_name('head')(params) == {
    'body': [{'kernel': False}, {'kernel': False}],
    'head': {'bias': True},
  }
  assert all(jax.tree.leaves(by_name('kernel', 'bias')(params)))
  model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
  assert by_name('weight')(model).weight is True
  assert by_name('weight')(model).bias is False
  with pytest.raises(ValueError, match=r"called \['kernal'\].* are \['bias', 'body'"):
    msam(mask=by_name('kernal')).init(params)


def test_names_that_are_those_of_arrays():
  """An attention has a leaf called ``value``, and a scale may be normalised by name."""
  params = {'query': jnp.ones((2, 2)), 'value': jnp.ones((2, 2))}
  assert by_name('value')(params) == {'query': False, 'value': True}
  matrix = jnp.ones((2, 2))
  named = {'Dense_0/kernel/scale': matrix, 'scale': {'value': matrix}}
  assert weights_by_default(named) == {
    'Dense_0/kernel/scale': False,
    'scale': {'value': True},
  }
  with pytest.raises(TypeError, match=r"by_name takes names, .* got \['a'\]"):
    by_name(['a'])


@pytest.fixture
def fp8():
  """A dense layer in FP8: its loss, and variables with their scaling factors."""
  dense = nn.Dense(4, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)
  x = jax.random.normal(jax.random.key(0), (16, 8))
  variables = dense.init(jax.random.key(1), x)
  return lambda v: jnp.mean(jnp.square(dense.apply(v, x))), variables


def fp8_by_hand(loss, variables, rho):
  """The clean gradients, and those at SAM's probe of the parameters alone."""
  clean = jax.grad(loss)(variables)
  squares = [np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(clean['params'])]
  scale = np.float32(rho / np.sqrt(sum(squares)))
  moved = jax.tree.map(lambda w, g: w + scale * g, variables['params'], clean['params'])
  return clean, jax.grad(loss)({**variables, 'params': moved}), np.sqrt(sum(squares))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_fp8_scaling_factors_are_not_parameters(fp8):
  """They are in no norm, are not moved, and get the new values of the clean pass."""
  loss, variables = fp8
  clean, at_probe, slope = fp8_by_hand(loss, variables, 0.5)
  tx = sam(0.5)
  updates, state = tx.update(
    clean, tx.init(variables), variables, grad_fn=jax.grad(loss)
  )
  np.testing.assert_allclose([state.slope, state.radius], [slope, 0.5], rtol=1e-6)
  chex.assert_trees_all_close(updates['params'], at_probe['params'], rtol=1e-6)
  name = '_overwrite_with_gradient'
  chex.assert_trees_all_equal(updates[name], clean[name])
  # The probe has its own, so the choice is one.
  differ = jax.tree.map(lambda a, b: np.any(a != b), clean[name], at_probe[name])
  assert any(jax.tree.leaves(differ))


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize('both', [False, True], ids=['grad_fn', 'value_and_grad_fn'])
def test_fp8_in_a_train_state(fp8, both):
  loss, variables = fp8
  clean, at_probe, slope = fp8_by_hand(loss, variables, 0.5)
  state = flax_linen.TrainState.create(
    apply_fn=None, params=variables, tx=optax.chain(sam(0.5), optax.sgd(0.1))
  )
  functions = {'value_and_grad_fn': jax.value_and_grad(loss)}
  if not both:
    functions = {'grad_fn': jax.grad(loss)}
  new = jax.jit(lambda s, g: s.apply_gradients(grads=g, **functions))(state, clean)
  want = jax.tree.map(lambda w, g: w - 0.1 * g, variables['params'], at_probe['params'])
  chex.assert_trees_all_close(new.params['params'], want, rtol=1e-5)
  name = '_overwrite_with_gradient'
  chex.assert_trees_all_close(new.params[name], clean[name], rtol=1e-5)
  np.testing.assert_allclose(optax.tree.get(new.opt_state, 'slope'), slope, rtol=1e-5)


@pytest.mark.standard_promotion
def test_fp8_scaling_factors_have_no_mean_over_replicas(fp8):
  loss, variables = fp8
  tx = sam(axis_name='i')
  with pytest.raises(ValueError, match=r'overwritten with its "gradient".* under jit'):
    jax.vmap(
      lambda _: tx.update(variables, tx.init(variables), variables, grad_fn=loss),
      axis_name='i',
    )(jnp.ones(2))


def test_fp8_scaling_factors_have_no_direction():
  """Not in a direction alone; and what differentiates everything refuses them."""
  grads = {
    'params': jnp.array([3.0, 4.0]),
    '_overwrite_with_gradient': {'amax': jnp.array([7.0])},
  }
  tx = msam_optax.normalize_by(msam_optax.euclidean())
  direction, _ = tx.update(grads, tx.init(grads), grads)
  np.testing.assert_allclose(np.asarray(direction['params']), [0.6, 0.8], rtol=1e-6)
  assert direction['_overwrite_with_gradient'] == {'amax': 0}
  with pytest.raises(ValueError, match=r"variables\['params'\]` alone"):
    sharpness.hessian_eigenvalues(
      lambda v: jnp.sum(v['params'] ** 2), grads, key=jax.random.key(0)
    )


@pytest.mark.cpu
def test_missing_gradients_in_a_checked_shard_map():
  """What is filled in for them varies over devices as the parameters do."""
  params = {'a': jnp.array([3.0, 4.0]), 'f': jnp.ones(3)}
  tx = sam(0.5, axis_name='i')

  def step(params, scale):
    params = jax.tree.map(lambda w: as_varying(w, frozenset('i')), params)
    grad_fn = lambda p: {'a': p['a'] * scale[0], 'f': None}
    return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]['a']

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('i',))
  run = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(jax.P(), jax.P('i')),
    out_specs=jax.P(),
  )
  got = jax.jit(run)(params, jnp.array([1.0, 3.0]))
  np.testing.assert_allclose(got, [2 * 3.3, 2 * 4.4], rtol=1e-6)
