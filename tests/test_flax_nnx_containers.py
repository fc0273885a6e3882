"""Flax NNX: what holds the models, which arguments, and in which of NNX's modes.

The model is two linear layers; the truth is the same function of a dict of arrays,
without NNX and without the library.
"""

import collections
import contextlib

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import euclidean
from msam_optax import flax_nnx
from msam_optax import msam
from msam_optax import value_and_grad
from tests import by_hand
from tests.methods import METHODS

pytestmark = pytest.mark.standard_promotion

RHO = METHODS['msam'].rho
X = jax.random.normal(jax.random.key(1), (8, 3))
Y = jax.random.normal(jax.random.key(2), (8, 2))

Pair = collections.namedtuple('Pair', 'a b')


class Both(nnx.Module):
  """Two layers as attributes."""

  def __init__(self, a, b):
    self.a, self.b = a, b


# How two layers are held, and how they are found again in the models or gradients.
CONTAINERS = {
  'module': (Both, lambda m: (at(m, 'a'), at(m, 'b'))),
  'tuple': (lambda a, b: (a, b), lambda m: m),
  'list': (lambda a, b: [a, b], lambda m: m),
  'dict': (lambda a, b: {'y': b, 'x': a}, lambda m: (m['x'], m['y'])),
  'ordered dict': (
    lambda a, b: collections.OrderedDict(y=b, x=a),
    lambda m: (m['x'], m['y']),
  ),
  'named tuple': (Pair, lambda m: (m.a, m.b)),
  'nested': (lambda a, b: {'x': (a, [b, None])}, lambda m: (m['x'][0], m['x'][1][0])),
  'state': (lambda a, b: nnx.state((a, b)), lambda m: (m[0], m[1])),
  'variables': (
    lambda a, b: (a.kernel, a.bias, b.kernel, b.bias),
    lambda m: ({'kernel': m[0], 'bias': m[1]}, {'kernel': m[2], 'bias': m[3]}),
  ),
}
if hasattr(nnx, 'List'):
  CONTAINERS['nnx.List'] = (lambda a, b: nnx.List([a, b]), lambda m: (m[0], m[1]))
  CONTAINERS['nnx.Dict'] = (lambda a, b: nnx.Dict(y=b, x=a), CONTAINERS['dict'][1])

# Newer versions of Flax can treat a model as a plain tree, or its graph as unchanging.
MODES = {'graph': contextlib.nullcontext}
if hasattr(nnx, 'set_graph_mode'):
  MODES['tree'] = lambda: nnx.set_graph_mode(False)
  MODES['simple graph'] = lambda: nnx.set_graph_updates(False)

containers = pytest.mark.parametrize('container', CONTAINERS)
modes = pytest.mark.parametrize('mode', MODES)
passes = pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])


def at(node, name):
  """A model's attribute, or what its gradient has in the place of it."""
  return getattr(node, name) if isinstance(node, nnx.Module) else node[name]


def layers():
  return (
    nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
    nnx.Linear(4, 2, rngs=nnx.Rngs(1)),
  )


def arrays(pair):
  """The kernels and biases of two layers as NumPy arrays."""
  return {
    name: {k: np.array(at(layer, k)[...]) for k in ('kernel', 'bias')}
    for name, layer in zip('ab', pair, strict=True)
  }


def error(params):
  """The loss as a function of a dict of arrays."""
  a, b = params['a'], params['b']
  hidden = jnp.tanh(X @ a['kernel'] + a['bias'])
  return jnp.mean((hidden @ b['kernel'] + b['bias'] - Y) ** 2)


def of(pair):
  """The loss as a function of two layers, as they are or in parts."""
  read = lambda layer: {k: at(layer, k)[...] for k in ('kernel', 'bias')}
  return error({'a': read(pair[0]), 'b': read(pair[1])})


def gradient_at_probe(params, loss=error, trained=lambda tree: tree):
  """Monge SAM's gradient by the formula."""
  probe = by_hand.probe('msam', params, trained(jax.grad(loss)(params)), RHO)
  return jax.grad(loss)(probe)


def close(got, want):
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@passes
@containers
def test_the_gradient_has_the_structure_that_nnx_gives(container, once):
  pack, unpack = CONTAINERS[container]
  pair = layers()
  want = gradient_at_probe(arrays(pair))
  loss_fn = lambda held: of(unpack(held))
  value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, rho=RHO, compile_once=once)
  plain = nnx.value_and_grad(loss_fn)(pack(*pair))
  value, grads = value_and_grad_fn(pack(*pair))
  np.testing.assert_allclose(value, plain[0], rtol=1e-6)
  assert jax.tree.structure(grads) == jax.tree.structure(plain[1])
  close(arrays(unpack(grads)), want)


@pytest.mark.parametrize(
  ('container', 'mode'),
  [(name, 'graph') for name in CONTAINERS] + [('tuple', mode) for mode in MODES],
)
def test_a_step_of_the_chain(container, mode):
  pack, unpack = CONTAINERS[container]
  with MODES[mode]():
    pair = layers()
    start = arrays(pair)
    held = pack(*pair)
    tx = optax.chain(msam(rho=RHO), optax.sgd(0.1))
    optimizer = nnx.Optimizer(held, tx, wrt=nnx.Param)
    loss_fn = lambda held: of(unpack(held))
    value_and_grad_fn = flax_nnx.value_and_grad_fn(loss_fn, held)
    value, grads = nnx.value_and_grad(loss_fn)(held)
    optimizer.update(held, grads, value_and_grad_fn=value_and_grad_fn, value=value)
    moved = arrays(unpack(held))
  close(moved, jax.tree.map(lambda w, g: w - 0.1 * g, start, gradient_at_probe(start)))
  assert optax.tree.get(optimizer.opt_state, 'rise')[...] > 0


@pytest.mark.slow
@passes
@modes
@pytest.mark.parametrize('container', ['module', 'tuple', 'state'])
def test_modes_of_nnx(container, mode, once):
  pack, unpack = CONTAINERS[container]
  with MODES[mode]():
    pair = layers()
    loss_fn = lambda held: of(unpack(held))
    plain = nnx.grad(loss_fn)(pack(*pair))
    value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, rho=RHO, compile_once=once)
    _, grads = nnx.jit(value_and_grad_fn)(pack(*pair))
  assert type(grads) is type(plain)
  assert jax.tree.structure(grads) == jax.tree.structure(plain)
  close(arrays(unpack(grads)), gradient_at_probe(arrays(pair)))


@passes
@modes
def test_statistics_are_no_parameters_in_any_mode(mode, once):
  """In tree mode they have gradients, and the loss depends on them."""

  def plain(params, mean):
    return jnp.mean(((X - mean) * params['scale'] + params['bias']) ** 4)

  with MODES[mode]():
    norm = nnx.BatchNorm(3, use_running_average=True, epsilon=0.0, rngs=nnx.Rngs(0))
    mean = jnp.array([0.3, -0.2, 0.5])
    norm.mean[...] = mean
    loss_fn = lambda norm: jnp.mean(norm(X) ** 4)
    expected = nnx.grad(loss_fn)(norm)
    value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, rho=RHO, compile_once=once)
    _, grads = value_and_grad_fn(norm)
  assert jax.tree.structure(grads) == jax.tree.structure(expected)
  params = {'scale': jnp.ones(3), 'bias': jnp.zeros(3)}
  want = gradient_at_probe(params, lambda params: plain(params, mean))
  close({name: at(grads, name)[...] for name in params}, want)


@passes
def test_tree_modes_refuse_what_nnx_refuses(once):
  loss_fn = lambda model: jnp.mean(model(X) ** 2)
  model = nnx.Sequential(*layers(), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  for mode in MODES.keys() - {'graph'}:
    with MODES[mode]():
      value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, compile_once=once)
      with pytest.raises(TypeError, match='real- or complex-valued') as caught:
        value_and_grad_fn(model)
      assert 'nnx.split(model, nnx.Param' in ''.join(caught.value.__notes__)
      value_and_grad_fn = flax_nnx.value_and_grad(
        loss_fn, argnums=wrt, compile_once=once
      )
      with pytest.raises(ValueError, match='cannot contain `DiffState`'):
        value_and_grad_fn(model)


@passes
@modes
def test_a_split_model_as_tree_mode_wants_it(mode, once):
  """Counters of random keys and statistics go with the arguments that are not moved."""
  with MODES[mode]():
    model = nnx.Sequential(
      nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
      nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
      nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=3)),
    )
    graph, *clean = nnx.split(nnx.clone(model), nnx.Param, ...)
    _, *state = nnx.split(model, nnx.Param, ...)
    loss_fn = lambda *state: jnp.mean((nnx.merge(graph, *state)(X) - 1) ** 2)
    want, plain = nnx.value_and_grad(loss_fn)(*clean)
    value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, rho=RHO, compile_once=once)
    value, grads = value_and_grad_fn(*state)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert jax.tree.structure(grads) == jax.tree.structure(plain)
  numbers = lambda tree: [
    x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  ]
  chex.assert_trees_all_close(numbers(state), numbers(clean), rtol=1e-5)


@passes
def test_a_layer_that_two_models_share(once):
  """It is trained once, with the gradients of both places, as NNX has it."""
  a, b = layers()
  c = nnx.Linear(4, 2, rngs=nnx.Rngs(2))
  models = (Both(a, b), Both(a, c))
  loss_fn = lambda models: (
    of((models[0].a, models[0].b)) + of((models[1].a, models[1].b))
  )

  def plain(params):
    both = lambda b: error({'a': params['a'], 'b': params[b]})
    return both('b') + both('c')

  params = arrays((a, b)) | {'c': arrays((a, c))['b']}
  want = gradient_at_probe(params, plain)
  _, grads = flax_nnx.value_and_grad(loss_fn, rho=RHO, compile_once=once)(models)
  expected = nnx.grad(loss_fn)(models)
  assert jax.tree.structure(grads) == jax.tree.structure(expected)
  close(
    arrays((grads[0]['a'], grads[0]['b'])) | {'c': arrays((c, grads[1]['b']))['b']},
    want,
  )


@passes
def test_arrays_and_numbers_beside_a_model_are_trained_as_nnx_does(once):
  a, b = layers()
  loss_fn = lambda held: of((held[0], held[1])) + held[2] ** 2 + jnp.sum(held[3] ** 3)

  def plain(params):
    return error(params) + params['t'] ** 2 + jnp.sum(params['v'] ** 3)

  held = (a, b, 0.7, jnp.array([0.2, -0.4]))
  params = arrays((a, b)) | {'t': jnp.float32(0.7), 'v': held[3]}
  want = gradient_at_probe(params, plain)
  _, grads = flax_nnx.value_and_grad(loss_fn, rho=RHO, compile_once=once)(held)
  assert jax.tree.structure(grads) == jax.tree.structure(nnx.grad(loss_fn)(held))
  close(arrays(grads[:2]) | {'t': grads[2], 'v': grads[3]}, want)


@passes
def test_one_variable_alone(once):
  value_and_grad_fn = flax_nnx.value_and_grad(
    lambda w: jnp.sum(w[...] ** 2), euclidean(), 0.5, compile_once=once
  )
  value, grads = value_and_grad_fn(nnx.Param(jnp.array([0.6, 0.8])))
  assert isinstance(grads, nnx.Param)
  np.testing.assert_allclose(value, 1.0, rtol=1e-6)
  np.testing.assert_allclose(grads[...], [1.8, 2.4], rtol=1e-6)


KERNEL = nnx.PathContains('kernel')
ARGNUMS = {
  'both': ((0, 1), 'ab', ''),
  'a list': ([0, 1], 'ab', ''),
  'the other way': ((1, 0), 'ba', ''),
  'from behind': ((-2, -1), 'ab', ''),
  'with filters': ((nnx.DiffState(0, KERNEL), nnx.DiffState(-1, nnx.Param)), 'ab', 'a'),
  'a tuple of one': ((1,), 'b', ''),
  'one from behind': (-1, 'b', ''),
  'a filter from behind': (nnx.DiffState(-1, KERNEL), 'b', 'b'),
}


def select(params, names, kernels):
  """Zeros where nothing is trained: in other layers, and in biases of some."""
  keep = lambda n, k: n in names and not (n in kernels and k == 'bias')
  return {
    n: {k: x if keep(n, k) else jnp.zeros_like(x) for k, x in layer.items()}
    for n, layer in params.items()
  }


@pytest.mark.slow
@passes
@pytest.mark.parametrize('name', ARGNUMS)
def test_which_arguments(name, once):
  argnums, names, kernels = ARGNUMS[name]
  a, b = layers()
  value_and_grad_fn = flax_nnx.value_and_grad(
    lambda a, b: of((a, b)), rho=RHO, argnums=argnums, compile_once=once
  )
  _, grads = value_and_grad_fn(a, b)
  several = isinstance(argnums, (tuple, list))
  assert type(grads) is (tuple if several else nnx.State)
  full = gradient_at_probe(
    arrays((a, b)), trained=lambda tree: select(tree, names, kernels)
  )
  for n, state in zip(names, grads if several else (grads,), strict=True):
    want = {k: x for k, x in full[n].items() if not (n in kernels and k == 'bias')}
    assert set(state) == set(want)
    close({k: state[k][...] for k in want}, want)


def test_two_models_with_one_optimizer():
  """The optimizer has the tuple of what ``argnums`` names."""
  a, b = layers()
  start = arrays((a, b))
  optimizer = nnx.Optimizer(
    (a, b), optax.chain(msam(rho=RHO), optax.sgd(0.1)), wrt=nnx.Param
  )
  loss_fn = lambda x, a, b: of((a, b)) + 0 * x
  grad_fn = flax_nnx.grad_fn(loss_fn, 1.0, a, b, argnums=(1, 2))
  grads = nnx.grad(loss_fn, argnums=(1, 2))(1.0, a, b)
  optimizer.update((a, b), grads, grad_fn=grad_fn)
  want = gradient_at_probe(start)
  close(arrays((a, b)), jax.tree.map(lambda w, g: w - 0.1 * g, start, want))


@passes
def test_a_mask_for_one_of_two_models(once):
  a, b = layers()
  value_and_grad_fn = flax_nnx.value_and_grad(
    lambda pair: of(pair), rho=RHO, mask=(True, False), compile_once=once
  )
  want = gradient_at_probe(arrays((a, b)), trained=lambda tree: select(tree, 'a', ''))
  close(arrays(value_and_grad_fn((a, b))[1]), want)


@passes
def test_arguments_by_keyword(once):
  """The model as NNX takes it, and keyword-only arguments, which NNX does not."""
  pair = layers()
  metric = nnx.metrics.Average()

  def loss_fn(scale, pair, *, offset=0.0, metric):
    loss = scale * of(pair) + offset
    metric.update(values=loss)
    return loss

  value_and_grad_fn = flax_nnx.value_and_grad(
    loss_fn, rho=RHO, argnums=1, compile_once=once
  )
  value, grads = value_and_grad_fn(2.0, pair=pair, offset=1.0, metric=metric)
  want = gradient_at_probe(arrays(pair), lambda params: 2 * error(params))
  close(arrays(grads), want)
  np.testing.assert_allclose(metric.compute(), value, rtol=1e-6)
  assert metric.count[...] == 1


@passes
@pytest.mark.parametrize('argnums', [2, -3, -9, (0, 5), nnx.DiffState(-9, nnx.Param)])
def test_a_position_that_is_none(argnums, once):
  value_and_grad_fn = flax_nnx.value_and_grad(
    lambda a, b: of((a, b)), argnums=argnums, compile_once=once
  )
  for call in (
    value_and_grad_fn,
    lambda *pair: flax_nnx.grad_fn(of, *pair, argnums=argnums),
  ):
    with pytest.raises(ValueError, match=r'number (2|-3|-9|5) of `loss_fn`, but there'):
      call(*layers())


@pytest.mark.parametrize('argnums', [None, 'model', 0.0, True, ((0, 1),)])
def test_what_is_no_position(argnums):
  with pytest.raises(TypeError, match='`argnums` must be the position of a model'):
    flax_nnx.value_and_grad(lambda a, b: of((a, b)), argnums=argnums)(*layers())
  with pytest.raises(TypeError, match='`argnums` must be the position of a model'):
    flax_nnx.grad_fn(lambda a, b: of((a, b)), *layers(), argnums=argnums)


def test_positions_that_are_empty_or_twice_the_same():
  loss_fn = lambda a, b: of((a, b))
  with pytest.raises(ValueError, match='`argnums` is empty'):
    flax_nnx.value_and_grad(loss_fn, argnums=())(*layers())
  with pytest.raises(ValueError, match='repeated'):
    flax_nnx.value_and_grad(loss_fn, argnums=(0, -2))(*layers())


@passes
def test_the_same_model_at_two_positions_has_one_gradient(once):
  both = flax_nnx.value_and_grad(
    lambda a, b: of((a, b)), argnums=(0, 1), compile_once=once
  )
  model, _ = layers()
  with pytest.raises(ValueError, match=r'number 1 of `loss_fn` belong to an earlier'):
    both(model, model)


@passes
@pytest.mark.parametrize('held', [X, {'x': X}, 2.0, nnx.Dropout(0.5)], ids=type)
def test_nothing_to_train(held, once):
  with pytest.raises(ValueError, match=r'argument number 0.*no variables of the type'):
    flax_nnx.value_and_grad(lambda held: 0.0, compile_once=once)(held)
  with pytest.raises(ValueError, match=r'argument number 0.*no variables of the type'):
    flax_nnx.grad_fn(lambda held: 0.0, held)


def test_arrays_are_for_the_function_without_nnx():
  """What the message says: it is the same method, on what holds no variables."""
  pair = layers()
  _, grads = value_and_grad(error, rho=RHO)(arrays(pair))
  _, of_models = flax_nnx.value_and_grad(of, rho=RHO)(pair)
  close(arrays(of_models), grads)
