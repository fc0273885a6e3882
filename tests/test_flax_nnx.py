"""Flax NNX: a model with BatchNorm and Dropout, the drop-in, and the chain."""

import functools

import chex
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from msam_optax import euclidean
from msam_optax import flax_nnx
from msam_optax import monge
from msam_optax import msam
from tests import by_hand
from tests import test_parallel

pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(1), (16, 3)) * 2 + 1
Y = jax.random.normal(jax.random.key(2), (16, 2))


class Model(nnx.Module):
  """Linear, BatchNorm, Dropout, Linear."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(3, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.out = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def make():
  return Model(nnx.Rngs(params=0, dropout=1))


def loss_fn(model, x, y):
  return jnp.mean((model(x) - y) ** 2)


def arrays(model, *filters):
  """The model's variables as NumPy arrays, keys as their data."""
  leaves = jax.tree.leaves(nnx.state(model, *filters))
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [np.array(jax.random.key_data(x) if is_key(x) else x) for x in leaves]


def papers_step(model, rho, lr):
  """Parameters after one step of SGD with Monge SAM's gradient, functionally."""
  start = nnx.clone(model)
  params = nnx.state(start, nnx.Param)

  def pure(params):
    copy = nnx.clone(start)
    nnx.update(copy, params)
    return loss_fn(copy, X, Y)

  g = jax.grad(pure)(params)
  n = optax.tree.norm(g)
  probe = jax.tree.map(lambda w, g: w + rho * g / (n * jnp.sqrt(1 + n**2)), params, g)
  return jax.tree.leaves(
    jax.tree.map(lambda w, g: w - lr * g, params, jax.grad(pure)(probe))
  )


def drop_in_step(model, optimizer, **kwargs):
  take = flax_nnx.value_and_grad(loss_fn, monge(), rho=0.5, **kwargs)
  loss, grads = take(model, X, Y)
  optimizer.update(model, grads)
  return loss


def chain_step(model, optimizer):
  grad_fn = flax_nnx.grad_fn(loss_fn, model, X, Y)
  loss, grads = nnx.value_and_grad(loss_fn)(model, X, Y)
  optimizer.update(model, grads, grad_fn=grad_fn)
  return loss


once = functools.partial(drop_in_step, compile_once=True)
passes = pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])

STEPS = {
  'drop-in': (drop_in_step, lambda: optax.sgd(0.1)),
  'compiled once': (once, lambda: optax.sgd(0.1)),
  'chain': (chain_step, lambda: optax.chain(msam(rho=0.5), optax.sgd(0.1))),
}


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize('door', STEPS)
def test_one_step(door, jit):
  step, tx = STEPS[door]
  model, clean = make(), make()
  optimizer = nnx.Optimizer(model, tx(), wrt=nnx.Param)
  expected = papers_step(model, rho=0.5, lr=0.1)

  wrap = nnx.jit if jit else lambda f: f
  clean_loss, _ = wrap(lambda m: nnx.value_and_grad(loss_fn)(m, X, Y))(clean)
  loss = wrap(step)(model, optimizer)

  chex.assert_trees_all_close(loss, clean_loss, rtol=1e-6)
  chex.assert_trees_all_close(arrays(model, nnx.Param), expected, rtol=1e-4, atol=1e-6)
  not_params = nnx.Not(nnx.Param)
  if jit or door == 'compiled once':
    # The same arithmetic in another program: fused, so equal to rounding only.
    chex.assert_trees_all_close(
      arrays(model, not_params), arrays(clean, not_params), rtol=1e-6
    )
  else:
    chex.assert_trees_all_equal(arrays(model, not_params), arrays(clean, not_params))
  assert model.dropout.rngs.count[...] == 1


def test_many_steps_lower_the_loss():
  model = make()
  optimizer = nnx.Optimizer(
    model, optax.chain(msam(rho=0.05), optax.adam(0.05)), wrt=nnx.Param
  )
  step = nnx.jit(chain_step)
  losses = [step(model, optimizer) for _ in range(60)]
  assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
  assert 0 < optax.tree.get(optimizer.opt_state, 'slope')[...] < 1


def test_structure_is_that_of_nnx_value_and_grad():
  model = make()
  _, expected = nnx.value_and_grad(loss_fn)(nnx.clone(model), X, Y)
  _, grads = flax_nnx.value_and_grad(loss_fn)(model, X, Y)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, expected)


def test_auxiliary_output_and_keyword_arguments():
  def with_aux(model, x, y):
    out = model(x)
    return jnp.mean((out - y) ** 2), out

  model, clean = make(), make()
  (loss, out), grads = flax_nnx.value_and_grad(with_aux, has_aux=True)(model, X, y=Y)
  clean_loss, clean_out = with_aux(clean, X, y=Y)
  chex.assert_trees_all_close((loss, out), (clean_loss, clean_out), rtol=1e-6)
  _, plain = flax_nnx.value_and_grad(loss_fn)(make(), X, Y)
  chex.assert_trees_all_close(grads, plain, rtol=1e-6)


@passes
def test_other_objects_are_changed_once(once):
  """Metrics that the loss function updates count each batch once."""

  def counting(metric, model, x, y):
    loss = loss_fn(model, x, y)
    metric.update(values=loss)
    return loss

  metric = nnx.metrics.Average()
  take = flax_nnx.value_and_grad(counting, argnums=1, compile_once=once)
  loss, _ = take(metric, make(), X, Y)
  assert metric.count[...] == 1
  chex.assert_trees_all_close(metric.compute(), loss, rtol=1e-6)


CHANGES = {
  'a new variable': lambda m: setattr(m, 'last', nnx.Intermediate(jnp.ones(2))),
  'a new module': lambda m: setattr(m, 'more', nnx.Linear(1, 1, rngs=nnx.Rngs(0))),
  'another mode': lambda m: m.eval(),
  'a number': lambda m: setattr(m, 'calls', 1),
}


@pytest.mark.parametrize('name', CHANGES)
def test_all_that_the_pass_does_is_kept_and_a_loop_that_cannot_keep_it_refuses(name):
  def changing(model, x, y):
    loss = loss_fn(model, x, y)
    CHANGES[name](model)
    return loss

  model, want = make(), make()
  changing(want, X, Y)
  flax_nnx.value_and_grad(changing)(model, X, Y)
  assert nnx.graphdef(model) == nnx.graphdef(want)
  with pytest.raises(ValueError, match='may change the values of variables, and noth'):
    flax_nnx.value_and_grad(changing, compile_once=True)(make(), X, Y)


@passes
def test_a_batch_that_the_loss_function_overwrites_stays_as_it_was(once):
  def preprocessing(model, batch):
    batch['x'] = 0.5 * batch['x']
    return loss_fn(model, batch['x'], batch['y'])

  batch, model = {'x': X, 'y': Y}, nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  take = flax_nnx.value_and_grad(preprocessing, compile_once=once)
  assert take(model, batch)[0] == take(model, batch)[0]
  assert batch['x'] is X


@passes
@pytest.mark.parametrize('transform', [nnx.remat, nnx.jit], ids=['remat', 'jit'])
def test_parameters_that_go_through_a_transform_keep_their_dtype(transform, once):
  """It hands back every variable that it gets, in the dtype of the probe."""

  class Half(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return transform(lambda layer, x: layer(x))(self.layer, x)

  model = Half()
  before = arrays(model)
  _, grads = flax_nnx.value_and_grad(
    loss_fn, perturbation_dtype='float32', compile_once=once
  )(model, X, Y)
  chex.assert_trees_all_equal(arrays(model), before)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, nnx.state(model, nnx.Param))


@passes
def test_an_argument_without_parameters_is_named(once):
  take = flax_nnx.value_and_grad(loss_fn, argnums=1, compile_once=once)
  with pytest.raises(ValueError, match=r'argument number 1.*no variables of the type'):
    take(make(), X, Y)


@pytest.mark.parametrize('wrap', [lambda f: f, nnx.remat], ids=['plain', 'remat'])
def test_a_loop_carries_no_copy_of_what_it_does_not_change(wrap):
  """The base weights under a LoRA, say, would be in memory twice more."""
  model = nnx.LoRALinear(3, 2, lora_rank=5, rngs=nnx.Rngs(0))
  loss_fn = lambda model, x, y: jnp.mean((wrap(lambda m, x: m(x))(model, x) - y) ** 2)
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  take = flax_nnx.value_and_grad(loss_fn, argnums=wrt, compile_once=True)
  graph, state = nnx.split(model)
  program = jax.make_jaxpr(lambda state: take(nnx.merge(graph, state), X, Y))(state)
  (loop,) = (e for e in program.eqns if e.primitive.name == 'scan')
  shapes = sorted(x.aval.shape for x in loop.outvars)
  assert shapes == [(2,), (3, 5), (5, 2)]  # Values of both passes, and gradients.


@passes
@pytest.mark.parametrize('sharded', [False, True], ids=['replicated', 'sharded'])
def test_shard_map(sharded, once):
  """Data over one axis, and the model's last axis over another or not at all."""
  model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  y = jnp.tile(Y, (1, 2))
  spec = lambda w: P(*[None] * (w.ndim - 1), 'model')
  specs = jax.tree.map(spec, state) if sharded else jax.tree.map(lambda _: P(), state)

  def squares(model, x, y):
    error = jnp.mean(jnp.square(model(x) - y))
    return jax.lax.pmean(error, 'model') if sharded else error

  def step(state, x, y):
    model = nnx.merge(graph, test_parallel.vary(state, 'data'))
    take = flax_nnx.value_and_grad(
      squares,
      monge(),
      0.3,
      axis_name='data',
      param_specs=specs if sharded else None,
      compile_once=once,
    )
    return take(model, x, y)[1]

  grads = test_parallel.on_devices(
    step,
    mesh=test_parallel.mesh(data=2, model=2),
    in_specs=(specs, P('data'), P('data', 'model' if sharded else None)),
    out_specs=specs,
  )(state, X, y)
  plain = lambda params, data: loss_fn(nnx.merge(graph, params), *data)
  _, want = by_hand.sharpness_aware_gradient('msam', plain, state, (X, y), parts=2)
  chex.assert_trees_all_close(grads, want, rtol=1e-5, atol=1e-6)


def test_only_chosen_variables_are_trained():
  model = nnx.LoRALinear(3, 2, lora_rank=2, rngs=nnx.Rngs(0))
  model.lora.lora_b[...] = jnp.ones_like(model.lora.lora_b[...])
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  _, grads = flax_nnx.value_and_grad(loss_fn, euclidean(), rho=0.1, argnums=wrt)(
    model, X, Y
  )
  assert len(jax.tree.leaves(grads)) == 2
  tx = optax.chain(msam(rho=0.1, alpha=0.0), optax.sgd(1.0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
  before = arrays(model, nnx.LoRAParam)
  grad_fn = flax_nnx.grad_fn(loss_fn, model, X, Y, argnums=wrt)
  _, clean = nnx.value_and_grad(loss_fn, argnums=wrt)(model, X, Y)
  optimizer.update(model, clean, grad_fn=grad_fn)
  moved = [b - a for b, a in zip(before, arrays(model, nnx.LoRAParam), strict=True)]
  chex.assert_trees_all_close(moved, jax.tree.leaves(grads), rtol=1e-4, atol=1e-6)


def test_rise_is_recorded_with_auxiliary_output():
  def with_aux(model, x, y):
    return loss_fn(model, x, y), 'aux'

  model, rho = make(), 0.5
  optimizer = nnx.Optimizer(model, msam(rho=rho), wrt=nnx.Param)
  start = nnx.clone(model)
  take = flax_nnx.value_and_grad_fn(with_aux, model, X, Y, has_aux=True)
  (loss, _), grads = nnx.value_and_grad(with_aux, has_aux=True)(model, X, Y)
  n = optax.tree.norm(grads)
  moved = nnx.clone(start)
  delta = jax.tree.map(lambda g: rho * g / (n * jnp.sqrt(1 + n**2)), grads)
  nnx.update(moved, jax.tree.map(jnp.add, nnx.state(start, nnx.Param), delta))
  optimizer.update(model, grads, value_and_grad_fn=take, value=loss)
  rise = optax.tree.get(optimizer.opt_state, 'rise')[...]
  np.testing.assert_allclose(rise, loss_fn(moved, X, Y) - loss, rtol=1e-4)


def test_mask_leaves_biases_alone():
  kernels = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  model = make()
  optimizer = nnx.Optimizer(
    model, optax.chain(msam(rho=0.5, mask=kernels), optax.sgd(0.1)), wrt=nnx.Param
  )
  _, grads = flax_nnx.value_and_grad(loss_fn, rho=0.5, mask=kernels)(make(), X, Y)
  before = arrays(model, nnx.Param)
  chain_step(model, optimizer)
  moved = [(b - a) * 10 for b, a in zip(before, arrays(model, nnx.Param), strict=True)]
  chex.assert_trees_all_close(moved, jax.tree.leaves(grads), rtol=1e-3, atol=1e-5)


def test_clean_gradients_of_the_wrong_model_are_refused():
  model = make()
  optimizer = nnx.Optimizer(model, msam(), wrt=nnx.Param)
  with pytest.raises(ValueError, match='`grad_fn = lambda params'):
    optimizer.update(model, nnx.grad(loss_fn)(model, X, Y))
