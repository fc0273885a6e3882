"""Flax NNX: a model with BatchNorm and Dropout, the drop-in, and the chain."""

import functools

import chex
from flax import nnx
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from msam_optax import adaptive
from msam_optax import asam
from msam_optax import euclidean
from msam_optax import flax_nnx
from msam_optax import momentum_sam
from msam_optax import msam
from tests import by_hand
from tests import methods
from tests.devices import test_parallel
from tests.methods import every_kind_slowly
from tests.methods import transformation

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


def step_by_hand(method, model, learning_rate):
  """Parameters after one step of SGD, functionally."""
  start = nnx.clone(model)
  params = nnx.state(start, nnx.Param)

  def pure(params):
    copy = nnx.clone(start)
    nnx.update(copy, params)
    return loss_fn(copy, X, Y)

  update = by_hand.update(method, params, [jax.grad(pure)])
  return jax.tree.leaves(by_hand.sgd(learning_rate)(params, update))


def drop_in(method, loss_fn, **options):
  return methods.drop_in(
    method, loss_fn, value_and_grad=flax_nnx.value_and_grad, **options
  )


def drop_in_step(method, **options):
  def step(model, optimizer):
    loss, grads = drop_in(method, loss_fn, **options)(model, X, Y)
    optimizer.update(model, grads)
    return loss

  return step


def chain_step(model, optimizer):
  grad_fn = flax_nnx.grad_fn(loss_fn, model, X, Y)
  loss, grads = nnx.value_and_grad(loss_fn)(model, X, Y)
  optimizer.update(model, grads, grad_fn=grad_fn)
  return loss


passes = pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])


def make_step(method, interface):
  """The optimizer, and a step of training with it."""
  descent = optax.sgd(0.1)
  if interface == 'chain':
    return optax.chain(transformation(method), descent), chain_step
  return descent, drop_in_step(method, compile_once=interface == 'compiled once')


INTERFACES = ('drop-in', 'compiled once', 'chain')


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize('interface', INTERFACES)
@every_kind_slowly
def test_one_step(method, interface, jit):
  tx, step = make_step(method, interface)
  model, clean = make(), make()
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  expected = step_by_hand(method, model, 0.1)

  wrap = nnx.jit if jit else lambda f: f
  clean_loss, _ = wrap(lambda m: nnx.value_and_grad(loss_fn)(m, X, Y))(clean)
  loss = wrap(step)(model, optimizer)

  chex.assert_trees_all_close(loss, clean_loss, rtol=1e-6)
  chex.assert_trees_all_close(arrays(model, nnx.Param), expected, rtol=1e-4, atol=1e-6)
  not_params = nnx.Not(nnx.Param)
  if jit or interface == 'compiled once':
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
  value_and_grad_fn = flax_nnx.value_and_grad(counting, argnums=1, compile_once=once)
  loss, _ = value_and_grad_fn(metric, make(), X, Y)
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
  value_and_grad_fn = flax_nnx.value_and_grad(preprocessing, compile_once=once)
  assert value_and_grad_fn(model, batch)[0] == value_and_grad_fn(model, batch)[0]
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
  value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, argnums=1, compile_once=once)
  with pytest.raises(ValueError, match=r'argument number 1.*no variables of the type'):
    value_and_grad_fn(make(), X, Y)


@pytest.mark.parametrize('wrap', [lambda f: f, nnx.remat], ids=['plain', 'remat'])
def test_a_loop_carries_no_copy_of_what_it_does_not_change(wrap):
  """The base weights under a LoRA, say, would be in memory twice more."""
  model = nnx.LoRALinear(3, 2, lora_rank=5, rngs=nnx.Rngs(0))
  loss_fn = lambda model, x, y: jnp.mean((wrap(lambda m, x: m(x))(model, x) - y) ** 2)
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, argnums=wrt, compile_once=True)
  graph, state = nnx.split(model)
  program = jax.make_jaxpr(
    lambda state: value_and_grad_fn(nnx.merge(graph, state), X, Y)
  )(state)
  # The loop also returns the clean gradient, which only some combinations need. What
  # is not needed is left out before a program is compiled.
  used = [True] * len(program.jaxpr.outvars)
  needed, _ = partial_eval.dce_jaxpr(program.jaxpr, used)
  (loop,) = (e for e in needed.eqns if e.primitive.name == 'scan')
  shapes = sorted(x.aval.shape for x in loop.outvars)
  assert shapes == [(2,), (3, 5), (5, 2)]  # Values of both passes, and gradients.


@pytest.mark.cpu
@passes
@every_kind_slowly
@pytest.mark.parametrize('sharded', [False, True], ids=['replicated', 'sharded'])
def test_shard_map(sharded, method, once):
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
    value_and_grad_fn = drop_in(
      method,
      squares,
      axis_name='data',
      param_specs=specs if sharded else None,
      compile_once=once,
    )
    return value_and_grad_fn(model, x, y)[1]

  grads = test_parallel.on_devices(
    step,
    mesh=test_parallel.mesh(data=2, model=2),
    in_specs=(specs, P('data'), P('data', 'model' if sharded else None)),
    out_specs=specs,
  )(state, X, y)
  plain = lambda params, data: loss_fn(nnx.merge(graph, params), *data)
  _, want = by_hand.gradient(method, plain, state, (X, y), parts=2)
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
  value_and_grad_fn = flax_nnx.value_and_grad_fn(with_aux, model, X, Y, has_aux=True)
  (loss, _), grads = nnx.value_and_grad(with_aux, has_aux=True)(model, X, Y)
  n = optax.tree.norm(grads)
  moved = nnx.clone(start)
  delta = jax.tree.map(lambda g: rho * g / (n * jnp.sqrt(1 + n**2)), grads)
  nnx.update(moved, jax.tree.map(jnp.add, nnx.state(start, nnx.Param), delta))
  optimizer.update(model, grads, value_and_grad_fn=value_and_grad_fn, value=loss)
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


def test_one_grad_fn_is_the_same_function_whenever_it_is_called():
  """Each call starts from the same statistics and random counters."""
  model = make()
  grad_fn = flax_nnx.grad_fn(loss_fn, model, X, Y)
  params = nnx.state(nnx.clone(model), nnx.Param)
  first = grad_fn(params)
  loss_fn(model, X, Y)
  nnx.update(model, jax.tree.map(jnp.zeros_like, params))
  chex.assert_trees_all_equal(grad_fn(params), first)
  loss_fn(start := make(), X, Y)
  assert model.dropout.rngs.count[...] == start.dropout.rngs.count[...] == 1


class Normalised(nnx.Module):
  """A weight that every pass divides by its norm, as spectral normalisation does."""

  def __init__(self):
    self.w = nnx.Param(jnp.array([3.0, -1.0, 2.0]))

  def __call__(self, x):
    self.w[...] = self.w[...] / jnp.linalg.norm(self.w[...])
    return x @ self.w[...]


@pytest.mark.parametrize('interface', INTERFACES)
def test_a_pass_that_changes_what_is_trained(interface):
  """The probe starts where the clean pass did, and what that pass did stays."""
  x, start = X[:, :3], np.array([3.0, -1.0, 2.0], np.float32)
  plain = lambda w: jnp.mean((x @ (w / jnp.linalg.norm(w)) - 1) ** 2)
  unit = start / np.linalg.norm(start)
  loss_fn = lambda model: jnp.mean((model(x) - 1) ** 2)
  model = Normalised()
  if interface != 'chain':
    want = jax.grad(plain)(by_hand.probe('msam', start, jax.grad(plain)(start), 0.3))
    once = interface == 'compiled once'
    _, grads = flax_nnx.value_and_grad(loss_fn, rho=0.3, compile_once=once)(model)
    np.testing.assert_allclose(model.w[...], unit, rtol=1e-6)
  else:
    # The optimizer has the parameters as the pass has left them.
    want = jax.grad(plain)(by_hand.probe('msam', unit, jax.grad(plain)(start), 0.3))
    optimizer = nnx.Optimizer(model, msam(rho=0.3), wrt=nnx.Param)
    grad_fn = flax_nnx.grad_fn(loss_fn, model)
    optimizer.update(model, nnx.grad(loss_fn)(model), grad_fn=grad_fn)
    grads = {'w': model.w[...] - unit}
  np.testing.assert_allclose(grads['w'][...], want, rtol=1e-4, atol=1e-6)


@passes
def test_arrays_that_are_attributes_are_changed_once(once):
  """As NNX has it: an array in a module is part of it, one in a container is not."""

  class Counting(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      self.calls = nnx.data(jnp.zeros(()))

    def __call__(self, x):
      self.calls = self.calls + 1
      return self.layer(x)

  model, batch = Counting(), {'x': X}

  def counting(model, batch):
    batch['x'] = batch['x'] * 2
    return loss_fn(model, batch['x'], Y)

  flax_nnx.value_and_grad(counting, compile_once=once)(model, batch)
  assert model.calls == 1
  assert batch['x'] is X


@passes
def test_a_model_with_a_shape(once):
  """The attribute is the user's: it makes no array of the model."""
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  model.shape, model.dtype, model.ndim = (3, 2), 'float32', 2
  _, grads = flax_nnx.value_and_grad(loss_fn, compile_once=once)(model, X, Y)
  _, want = flax_nnx.value_and_grad(loss_fn)(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X, Y)
  chex.assert_trees_all_close(grads, want, rtol=1e-5)


LOSSES = {
  'a module': lambda: Weighted(),
  'jitted': lambda: nnx.jit(loss_fn),
  'a jitted module': lambda: nnx.jit(lambda model, x, y: Weighted()(model, x, y)),
  'partial': lambda: functools.partial(lambda f, *args: f(*args), loss_fn),
}


class Weighted(nnx.Module):
  """A loss function that is a module itself."""

  def __init__(self):
    self.weight = nnx.Variable(jnp.ones(()))

  def __call__(self, model, x, y):
    return self.weight[...] * loss_fn(model, x, y)

  def other(self, model, x, y):
    return self(model, x, y)


@passes
@pytest.mark.parametrize('name', LOSSES)
def test_what_a_loss_function_may_be(name, once):
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  value_and_grad_fn = flax_nnx.value_and_grad(
    LOSSES[name](), rho=0.3, compile_once=once
  )
  _, want = flax_nnx.value_and_grad(loss_fn, rho=0.3)(model, X, Y)
  chex.assert_trees_all_close(
    value_and_grad_fn(model, X, Y)[1], want, rtol=1e-5, atol=1e-7
  )


@passes
def test_methods_are_refused_by_name(once):
  match = 'Give `Weighted.other`, and the Weighted as first argument'
  with pytest.raises(ValueError, match=match):
    flax_nnx.value_and_grad(Weighted().other, compile_once=once)
  with pytest.raises(ValueError, match=match):
    flax_nnx.grad_fn(Weighted().other, make(), X, Y)


WRONG = {
  'forgotten has_aux': (lambda loss: (loss, 'aux'), False, 'give `has_aux=True`'),
  'no aux': (lambda loss: loss, True, r'must return `\(loss, aux\)`'),
  'three': (lambda loss: (loss, 1, 2), True, r'must return `\(loss, aux\)`'),
  'an array': (
    lambda loss: loss[None],
    False,
    r'must be a scalar, not an array, float32\[1\]',
  ),
  'an array and aux': (lambda loss: (loss[None], 1), True, 'must be a scalar'),
  'a dict': (lambda loss: {'loss': loss}, False, 'must be a scalar'),
}


@passes
@pytest.mark.parametrize('name', WRONG)
def test_what_a_loss_function_returns(name, once):
  change, has_aux, match = WRONG[name]
  wrong = lambda model, x, y: change(loss_fn(model, x, y))
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  value_and_grad_fn = flax_nnx.value_and_grad(wrong, has_aux=has_aux, compile_once=once)
  with pytest.raises(TypeError, match='`loss_fn`') as caught:
    value_and_grad_fn(model, X, Y)
  assert caught.match(match)
  for make_function in (flax_nnx.grad_fn, flax_nnx.value_and_grad_fn):
    value_and_grad_fn = make_function(wrong, model, X, Y, has_aux=has_aux)
    with pytest.raises(TypeError, match=match):
      value_and_grad_fn(nnx.state(model, nnx.Param))


def test_one_loop_refuses_auxiliary_output_that_is_no_array():
  with_aux = lambda model, x, y: (loss_fn(model, x, y), {'name': 'aux', 'x': x})
  value_and_grad_fn = flax_nnx.value_and_grad(with_aux, has_aux=True, compile_once=True)
  with pytest.raises(TypeError, match=r"arrays only, but at \['name'\] there is a str"):
    value_and_grad_fn(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X, Y)


@passes
def test_errors_come_before_anything_is_changed(once):
  model = make()
  before = arrays(model)
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, argnums=wrt, compile_once=once)
  with pytest.raises(ValueError, match='no variables of the type'):
    value_and_grad_fn(model, X, Y)
  chex.assert_trees_all_equal(arrays(model), before)


class Blocks(nnx.Module):
  """Three blocks of a linear layer and a normalisation, stacked."""

  def __init__(self):
    def block(rngs):
      return nnx.Sequential(
        nnx.Linear(3, 3, bias_init=nnx.initializers.normal(0.3), rngs=rngs),
        nnx.LayerNorm(3, scale_init=nnx.initializers.normal(1.0), rngs=rngs),
      )

    self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(block))(nnx.Rngs(0))

  def __call__(self, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, block):
      return x + jnp.tanh(block(x))

    return forward(x, self.blocks)


def unstacked(state):
  """The leaves of each of three blocks, by the layer's number and the leaf's name."""
  flat = nnx.to_flat_state(nnx.state(state))
  return [{path[-2:]: np.array(x[...])[i] for path, x in flat} for i in range(3)]


def by_layers(params, y):
  """The same network as a loop over blocks that have arrays of their own."""
  x = X
  for block in params:
    h = x @ block[0, 'kernel'] + block[0, 'bias']
    h = (h - h.mean(1, keepdims=True)) * jax.lax.rsqrt(h.var(1, keepdims=True) + 1e-6)
    x = x + jnp.tanh(h * block[1, 'scale'] + block[1, 'bias'])
  return jnp.mean((x[:, :2] - y) ** 2)


@pytest.mark.slow
def test_stacked_layers_have_the_adaptive_metric_of_the_layers():
  """Stacked, biases and scales have two dimensions, and are no weights for that."""
  model, rho = Blocks(), 0.5
  stacked_loss = lambda model, x, y: jnp.mean((model(x)[:, :2] - y) ** 2)
  params = unstacked(nnx.state(model, nnx.Param))
  assert params[0][1, 'scale'].shape == (3,)
  g = jax.grad(by_layers)(params, Y)
  want = jax.grad(by_layers)(by_hand.probe('asam', params, g, rho), Y)

  @nnx.jit
  def both_interfaces(model, optimizer):
    grad_fn = flax_nnx.grad_fn(stacked_loss, model, X, Y)
    value_and_grad_fn = flax_nnx.value_and_grad(stacked_loss, adaptive(), rho)
    _, grads = value_and_grad_fn(model, X, Y)
    optimizer.update(model, nnx.grad(stacked_loss)(model, X, Y), grad_fn=grad_fn)
    return grads

  optimizer = nnx.Optimizer(model, asam(rho=rho), wrt=nnx.Param)
  grads = both_interfaces(model, optimizer)
  chex.assert_trees_all_close(unstacked(grads), want, rtol=1e-4, atol=1e-6)
  moved = jax.tree.map(jnp.subtract, unstacked(nnx.state(model)), params)
  chex.assert_trees_all_close(moved, want, rtol=1e-4, atol=1e-5)
  scaled = jax.tree.map(
    lambda w, g: (np.abs(w) + 0.01 if w.ndim > 1 else 1.0) * np.asarray(g, np.float64),
    params,
    g,
  )
  slope = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(scaled)))
  np.testing.assert_allclose(
    optax.tree.get(optimizer.opt_state, 'slope')[...], slope, rtol=1e-5
  )


def lora():
  """A layer with frozen weights, and an adapter that is not zero."""
  model = nnx.LoRALinear(3, 2, lora_rank=2, rngs=nnx.Rngs(0))
  model.lora.lora_b[...] = jax.random.normal(jax.random.key(5), (2, 2))
  return model


@pytest.mark.parametrize('argnums', [0, nnx.DiffState(0, nnx.LoRAParam)], ids=type)
@pytest.mark.parametrize('interface', ['drop-in', 'one loop', 'chain'])
def test_lora(interface, argnums):
  """Three steps of SGD, by hand on two matrices; the base stays bit for bit."""
  model, rho, lr = lora(), 0.3, 0.1
  kernel, bias = np.array(model.kernel[...]), np.array(model.bias[...])
  plain = lambda p: jnp.mean((X @ kernel + bias + X @ p['a'] @ p['b'] - Y) ** 2)
  params = {
    'a': np.array(model.lora.lora_a[...]),
    'b': np.array(model.lora.lora_b[...]),
  }
  for _ in range(3):
    probe = by_hand.probe('msam', params, jax.grad(plain)(params), rho)
    params = jax.tree.map(lambda w, g: w - lr * g, params, jax.grad(plain)(probe))

  chain = optax.chain(msam(rho=rho), optax.sgd(lr))
  optimizer = nnx.Optimizer(
    model, chain if interface == 'chain' else optax.sgd(lr), wrt=nnx.LoRAParam
  )
  # What is not trained may have gradients, which the chain does not look at. The
  # drop-in moves all that it takes gradients of, so it has to be told.
  wrt = argnums if interface == 'chain' else nnx.DiffState(0, nnx.LoRAParam)
  for _ in range(3):
    if interface == 'chain':
      grad_fn = flax_nnx.grad_fn(loss_fn, model, X, Y, argnums=wrt)
      grads = nnx.grad(loss_fn, argnums=wrt)(model, X, Y)
      optimizer.update(model, nnx.state(grads, nnx.LoRAParam), grad_fn=grad_fn)
    else:
      value_and_grad_fn = flax_nnx.value_and_grad(
        loss_fn, rho=rho, argnums=wrt, compile_once=interface == 'one loop'
      )
      optimizer.update(model, value_and_grad_fn(model, X, Y)[1])
  got = {'a': model.lora.lora_a[...], 'b': model.lora.lora_b[...]}
  chex.assert_trees_all_close(got, params, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(model.kernel[...], kernel)
  np.testing.assert_array_equal(model.bias[...], bias)


class Mlp(nnx.Module):
  """Two layers."""

  def __init__(self):
    self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    self.out = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.out(jnp.tanh(self.hidden(x)))


def as_dict(state):
  return {path: np.array(x[...]) for path, x in nnx.to_flat_state(nnx.state(state))}


def mlp_loss(params, x=X, y=Y):
  hidden = jnp.tanh(x @ params['hidden', 'kernel'] + params['hidden', 'bias'])
  return jnp.mean((hidden @ params['out', 'kernel'] + params['out', 'bias'] - y) ** 2)


FILTERS = {
  'one layer': (nnx.PathContains('out'), lambda path: path[0] == 'out'),
  'all of two': (
    nnx.All(nnx.Param, nnx.PathContains('kernel')),
    lambda path: path[1] == 'kernel',
  ),
  'any of two': (
    nnx.Any(nnx.PathContains('hidden'), nnx.PathContains('bias')),
    lambda path: path != ('out', 'kernel'),
  ),
  'a function': (lambda path, _: path[-1] == 'bias', lambda path: path[1] == 'bias'),
  'not': (
    nnx.All(nnx.Param, nnx.Not(nnx.PathContains('out'))),
    lambda path: path[0] == 'hidden',
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('interface', ['drop-in', 'one loop', 'chain', 'chain, all'])
@pytest.mark.parametrize('name', FILTERS)
def test_filters_of_the_optimizer(name, interface):
  wrt, trained = FILTERS[name]
  model = Mlp()
  start = as_dict(nnx.state(model))
  g = jax.grad(mlp_loss)(start)
  only = lambda tree: {k: x if trained(k) else 0 * x for k, x in tree.items()}
  at_probe = only(jax.grad(mlp_loss)(by_hand.probe('msam', start, only(g), 0.3)))
  want = jax.tree.map(lambda w, g: w - 0.1 * g, start, at_probe)

  argnums = nnx.DiffState(0, wrt)
  if interface.startswith('chain'):
    tx = optax.chain(msam(rho=0.3), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    grads = nnx.grad(loss_fn, argnums=argnums)(model, X, Y)
    # Gradients of more than is trained do no harm at the probe.
    argnums = 0 if interface == 'chain, all' else argnums
    grad_fn = flax_nnx.grad_fn(loss_fn, model, X, Y, argnums=argnums)
    optimizer.update(model, grads, grad_fn=grad_fn)
  else:
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=wrt)
    once = interface == 'one loop'
    value_and_grad_fn = flax_nnx.value_and_grad(
      loss_fn, rho=0.3, argnums=argnums, compile_once=once
    )
    optimizer.update(model, value_and_grad_fn(model, X, Y)[1])
  got = as_dict(nnx.state(model))
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
  frozen = [path for path in start if not trained(path)]
  chex.assert_trees_all_equal(*({p: tree[p] for p in frozen} for tree in (got, start)))


def test_an_optimizer_of_more_than_has_gradients_is_told_which():
  model = Mlp()
  wrt = nnx.DiffState(0, nnx.PathContains('out'))
  grad_fn = flax_nnx.grad_fn(loss_fn, model, X, Y, argnums=wrt)
  match = r"none at \['hidden'\]\['bias'\].*the same `argnums=nnx.DiffState"
  with pytest.raises(ValueError, match=match):
    grad_fn(nnx.state(model, nnx.Param))


HALVES = [(X[:8], Y[:8]), (X[8:], Y[8:])]


@pytest.mark.slow
@pytest.mark.parametrize('outer', [False, True], ids=['inside', 'outside'])
def test_accumulation(outer):
  """Inside the chain every half has its probe; around it the whole batch has one."""
  model = Mlp()
  start = as_dict(nnx.state(model))
  if outer:
    tx = optax.MultiSteps(optax.chain(transformation('msam'), optax.sgd(0.1)), 2)
    parts = [(X, Y)]
  else:
    accumulated = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax.chain(transformation('msam'), accumulated)
    parts = HALVES
  updates = [
    by_hand.update('msam', start, [lambda w, part=part: jax.grad(mlp_loss)(w, *part)])
    for part in parts
  ]
  mean = jax.tree.map(lambda *us: np.mean(us, axis=0), *updates)
  want = by_hand.sgd(0.1)(start, mean)

  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  for half in HALVES:
    chex.assert_trees_all_equal(as_dict(nnx.state(model)), start)
    grad_fn = flax_nnx.grad_fn(loss_fn, model, *((X, Y) if outer else half))
    grads = nnx.grad(loss_fn)(model, *half)
    optimizer.update(model, grads, grad_fn=grad_fn)
  got = as_dict(nnx.state(model))
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_model_and_optimizer():
  """Flax's older class, which has the model inside."""
  model, other = Mlp(), Mlp()
  tx = optax.chain(msam(rho=0.3), optax.adam(0.1))
  together = nnx.ModelAndOptimizer(model, tx)
  grad_fn = flax_nnx.grad_fn(loss_fn, together.model, X, Y)
  grads = nnx.grad(loss_fn)(together.model, X, Y)
  together.update(grads, grad_fn=grad_fn)
  optimizer = nnx.Optimizer(other, tx, wrt=nnx.Param)
  chain_step(other, optimizer)
  chex.assert_trees_all_equal(as_dict(nnx.state(model)), as_dict(nnx.state(other)))


@pytest.mark.slow
@pytest.mark.parametrize('jit', [False, True], ids=['without jit', 'with'])
@pytest.mark.parametrize('interface', INTERFACES)
def test_a_healthy_step_holds_no_nan_and_no_infinity(interface, jit):
  tx, step = make_step('msam', interface)
  model = make()
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  expected = step_by_hand('msam', model, 0.1)
  with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit(not jit):
    step(model, optimizer)
  chex.assert_trees_all_close(arrays(model, nnx.Param), expected, rtol=1e-4, atol=1e-6)


def test_reestimated_statistics_are_means_over_batches():
  """Of the layer's inputs at the clean parameters; the model that is trained stays."""
  model = make()
  optimizer = nnx.Optimizer(
    model, momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5), wrt=nnx.Param
  )
  optimizer.update(model, nnx.grad(loss_fn)(model, X, Y))
  before = arrays(model)
  evaluated = flax_nnx.eval_model(optimizer, model)
  batches = [X[:6], X[6:11] - 3.0, X[11:]]
  other = arrays(evaluated, nnx.Not(nnx.BatchStat))
  flax_nnx.reestimate_batch_stats(evaluated, batches)
  chex.assert_trees_all_equal(arrays(model), before)
  chex.assert_trees_all_equal(arrays(evaluated, nnx.Not(nnx.BatchStat)), other)

  distance = nnx.state(model, nnx.Param), nnx.state(evaluated, nnx.Param)
  distance = jax.tree.map(jnp.subtract, *distance)
  np.testing.assert_allclose(optax.tree.norm(distance), 0.5, rtol=1e-5)
  layer = evaluated.hidden
  inputs = [np.asarray(x @ layer.kernel[...] + layer.bias[...]) for x in batches]
  expected = (
    np.mean([h.mean(0) for h in inputs], 0),
    np.mean([h.var(0) for h in inputs], 0),
  )
  got = evaluated.norm.mean[...], evaluated.norm.var[...]
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_models_that_cannot_be_evaluated_are_refused():
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r'no nnx\.BatchNorm'):
    flax_nnx.reestimate_batch_stats(model, [X])
  with pytest.raises(ValueError, match='`batches` is empty'):
    flax_nnx.reestimate_batch_stats(make(), [])
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  with pytest.raises(ValueError, match='no state of `lagged`'):
    flax_nnx.eval_model(optimizer, model)


def test_an_optimizer_without_gradients_points_to_the_drop_in():
  model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, msam(), wrt=nnx.Param)
  f = flax_nnx.value_and_grad_fn(lambda model: model(jnp.ones(2)).sum(), model)
  with pytest.raises(ValueError, match=r'flax_nnx\.value_and_grad\(\.\.\., compile_'):
    optimizer.update(model, None, value_and_grad_fn=f)
