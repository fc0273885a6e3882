"""Flax NNX: what a pass changes about the model is what plain NNX leaves.

The truth is ``nnx.value_and_grad`` on a model of the same seeds. Which variables a pass
changes is seen in its program, so that a loop carries no others.
"""

import chex
from flax import nnx
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import _forwarding
from msam_optax import combinations
from msam_optax import flax_nnx
from tests.test_flax_nnx_containers import MODES
from tests.test_flax_nnx_containers import modes
from tests.test_flax_nnx_containers import passes

pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(1), (8, 3))


# Older versions of Flax assign it.
set_value = getattr(nnx.Variable, 'set_value', lambda w, x: setattr(w, 'value', x))


def normalise(w):
  w[...] = w[...] / jnp.linalg.norm(w[...])


class Normalised(nnx.Module):
  """A weight that every pass divides by its norm, and a bias."""

  def __init__(self, dtype=jnp.float32, transform=lambda f: f):
    self.w = nnx.Param(jnp.array([3.0, -1.0, 2.0], dtype))
    self.b = nnx.Param(jnp.ones((), dtype))
    self.transform = transform

  def __call__(self, x):
    def forward(self, x):
      normalise(self.w)
      return x @ self.w[...] + self.b[...]

    return self.transform(forward)(self, x)


def mean_square(model):
  return jnp.mean((model(X) - 1) ** 2)


def of_two(a, b):
  return mean_square(a) + 2 * mean_square(b)


def widening(model):
  """Leaves the weight in another dtype."""
  w = model.w[...].astype(jnp.float32)
  set_value(model.w, w / jnp.linalg.norm(w))
  return jnp.mean((X @ model.w[...] - 1) ** 2)


GRAPH = nnx.graphdef(Normalised())
only = lambda name: nnx.DiffState(0, nnx.PathContains(name))

# The arguments, the loss, and which arguments are trained.
CASES = {
  'one': (lambda: (Normalised(),), mean_square, 0),
  'in remat': (lambda: (Normalised(transform=nnx.remat),), mean_square, 0),
  'in jit': (lambda: (Normalised(transform=nnx.jit),), mean_square, 0),
  'what changes is trained': (lambda: (Normalised(),), mean_square, only('w')),
  'what changes is frozen': (lambda: (Normalised(),), mean_square, only('b')),
  'both': (lambda: (Normalised(), Normalised()), of_two, (1, 0)),
  'one of two': (lambda: (Normalised(), Normalised()), of_two, 1),
  'a container': (
    lambda: ({'x': Normalised(), 'y': [Normalised()]},),
    lambda held: of_two(held['x'], held['y'][0]),
    0,
  ),
  'shared': (lambda: (2 * (Normalised(),),), lambda pair: of_two(*pair), 0),
  'a state': (
    lambda: (nnx.state(Normalised()),),
    lambda state: (normalise(state['w']), mean_square(nnx.merge(GRAPH, state)))[1],
    0,
  ),
  'another dtype': (lambda: (Normalised(jnp.bfloat16),), widening, 0),
}
if hasattr(nnx, 'SpectralNorm'):
  CASES['spectral'] = (
    lambda: (
      nnx.Sequential(
        nnx.SpectralNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)),
        nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=2)),
        nnx.WeightNorm(nnx.Linear(2, 1, rngs=nnx.Rngs(3)), rngs=nnx.Rngs(4)),
      ),
    ),
    mean_square,
    0,
  )


LAYERS = [name for name in ('SpectralNorm', 'WeightNorm') if hasattr(nnx, name)]


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize('trained', ['all', 'biases'])
@pytest.mark.parametrize('layer', LAYERS)
def test_overwritten_weights_are_refused_in_a_chain(layer, trained, compiled):
  """The update would be silently another than that of the drop-in."""
  wrap = getattr(nnx, layer)
  model = nnx.Sequential(
    wrap(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)),
    nnx.Linear(3, 1, rngs=nnx.Rngs(2)),
  )
  wrt = (
    nnx.All(nnx.Param, nnx.PathContains('bias')) if trained == 'biases' else nnx.Param
  )
  optimizer = nnx.Optimizer(
    model, optax.chain(msam_optax.sam(0.1), optax.sgd(0.1)), wrt=wrt
  )
  argnums = nnx.DiffState(0, wrt)

  def step(model, optimizer):
    f = flax_nnx.grad_fn(mean_square, model, argnums=argnums)
    grads = nnx.grad(mean_square, argnums=argnums)(model)
    optimizer.update(model, grads, grad_fn=f)

  step = nnx.jit(step) if compiled else step
  if trained == 'biases':
    step(model, optimizer)
    return
  with pytest.raises(ValueError, match=rf'\(nnx.{layer}\).*flax_nnx.value_and_grad'):
    step(model, optimizer)


def arrays(held):
  """The arrays of models by their paths, keys as their data."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return {
    (*path, i): np.asarray(jax.random.key_data(x) if is_key(x) else x)
    for path, variable in nnx.to_flat_state(nnx.state(held))
    for i, x in enumerate(jax.tree.leaves(variable))
  }


def check_left_by_nnx(make, loss_fn, argnums=0, *, wrap=lambda f: f):
  """Both forms leave what plain NNX leaves, and have the same gradients."""
  args = make()
  wrap(nnx.value_and_grad(loss_fn, argnums=argnums))(*args)
  want, grads = arrays(args), []
  for once in (False, True):
    args = make()
    value_and_grad_fn = flax_nnx.value_and_grad(
      loss_fn, rho=0.3, argnums=argnums, compile_once=once
    )
    grads.append(wrap(value_and_grad_fn)(*args)[1])
    chex.assert_trees_all_equal_shapes_and_dtypes(arrays(args), want)
    chex.assert_trees_all_close(arrays(args), want, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal_shapes_and_dtypes(*grads)
  chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-5)
  return want


QUICK = {'one', 'in remat', 'both', 'a state'}


@pytest.mark.parametrize(
  'name',
  [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in CASES],
)
def test_the_model_is_what_plain_nnx_leaves(name):
  left = check_left_by_nnx(*CASES[name])
  start = arrays(CASES[name][0]())
  assert any(np.any(x != start[path]) for path, x in left.items())


def test_the_model_is_what_plain_nnx_leaves_under_jit():
  check_left_by_nnx(*CASES['one'], wrap=nnx.jit)


@modes
def test_in_every_mode(mode):
  """In tree mode all variables have gradients, BatchNorm's statistics as well."""
  with MODES[mode]():
    check_left_by_nnx(
      lambda: (nnx.BatchNorm(3, rngs=nnx.Rngs(0)), Normalised()),
      lambda norm, model: jnp.mean((model(norm(X)) - 1) ** 2),
      (0, 1),
    )


@passes
def test_a_probe_in_another_dtype_leaves_the_dtype_of_the_parameters(once):
  """The clean pass of a loop has the probe's dtype, so this is equal to rounding."""
  model, want = Normalised(jnp.bfloat16), Normalised(jnp.bfloat16)
  loss_fn = lambda model: jnp.mean((model(X.astype(model.w.dtype)) - 1) ** 2)
  nnx.value_and_grad(loss_fn)(want)
  _, grads = flax_nnx.value_and_grad(
    loss_fn, rho=0.3, perturbation_dtype='float32', compile_once=once
  )(model)
  chex.assert_trees_all_equal_shapes_and_dtypes(arrays(model), arrays(want))
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, nnx.state(model))
  w = np.array([3.0, -1.0, 2.0])
  got = np.asarray(model.w[...], np.float64)
  np.testing.assert_allclose(got, w / np.linalg.norm(w), rtol=2.0**-7)


@passes
def test_a_counter_in_numpy_counts_once(once):
  """A checkpoint that is read as NumPy's arrays has it; ``+=`` works in place."""
  model, seen = Normalised(), []
  model.count = nnx.Variable(np.zeros((), np.int32))

  def loss_fn(model):
    seen.append(model.count[...] + 0)
    model.count[...] += 1
    return mean_square(model)

  curvature = combinations.curvature()
  flax_nnx.value_and_grad(loss_fn, combination=curvature, compile_once=once)(model)
  assert model.count[...] == 1
  assert once or seen == [0, 0, 0]


@passes
@pytest.mark.parametrize('rows', [np.arange(8) < 4, {'which': np.arange(8) < 4}])
def test_numbers_among_the_arguments_are_known(rows, once):
  """A loss function may choose rows by a mask of NumPy, whose size is to be known."""

  def loss_fn(model, rows):
    rows = rows['which'] if isinstance(rows, dict) else rows
    return jnp.mean((model(X[np.flatnonzero(rows)]) - 1) ** 2)

  got = flax_nnx.value_and_grad(loss_fn, rho=0.3, compile_once=once)(Normalised(), rows)
  same = lambda model: jnp.mean((model(X[:4]) - 1) ** 2)
  chex.assert_trees_all_close(got, flax_nnx.value_and_grad(same, rho=0.3)(Normalised()))


def stack(transform):
  """Three layers in a loop, as a model with arrays of three."""

  class Stack(nnx.Module):
    def __init__(self):
      layer = lambda rngs: nnx.Linear(3, 3, rngs=rngs)
      self.layers = nnx.split_rngs(splits=3)(nnx.vmap(layer))(nnx.Rngs(0))

    def __call__(self, x):
      body = transform(lambda x, layer: jnp.tanh(layer(x)))
      forward = lambda x, layer: body(x, layer)
      return nnx.scan(forward, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        x, self.layers
      )

  return Stack()


class Layer(nnx.Module):
  """A layer that a transformed function applies."""

  def __init__(self, transform):
    self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    self.transform = transform

  def __call__(self, x):
    return self.transform(lambda layer, x: layer(x))(self.layer, x)


UNCHANGED = {
  'plain': lambda: Layer(lambda f: f),
  'remat': lambda: Layer(nnx.remat),
  'jit': lambda: Layer(nnx.jit),
  'remat in jit': lambda: Layer(lambda f: nnx.jit(nnx.remat(f))),
  'loop': lambda: stack(lambda f: f),
  'remat in a loop': lambda: stack(nnx.remat),
}


def loops(f, *args):
  """The shapes that the loops of a program return, of what it needs."""
  program = jax.make_jaxpr(f)(*args)
  needed, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
  return [
    sorted(x.aval.shape for x in e.outvars)
    for e in needed.eqns
    if e.primitive.name == 'scan'
  ]


@pytest.mark.parametrize('name', UNCHANGED)
def test_a_loop_carries_gradients_only_where_nothing_changes(name):
  """A transformed function hands back all that it gets, which is no change."""
  model = UNCHANGED[name]()
  graph, state = nnx.split(model)

  def step(state):
    model = nnx.merge(graph, state)
    loss_fn = lambda model: jnp.mean(model(X) ** 2)
    result = flax_nnx.value_and_grad(loss_fn, compile_once=True)(model)
    return result, nnx.state(model)

  (got,) = loops(step, state)
  assert got == sorted([(2,), *(x.shape for x in jax.tree.leaves(state))])


@pytest.mark.skipif('simple graph' not in MODES, reason='an older Flax')
@passes
def test_a_shared_variable_without_graph_updates_is_named(once):
  with MODES['simple graph']():
    loss_fn = lambda pair: of_two(*pair)
    value_and_grad_fn = flax_nnx.value_and_grad(loss_fn, compile_once=once)
    match = r"variable at \[1\]\['b'\] is at another place.*set_graph_updates\(False"
    with pytest.raises(ValueError, match=match):
      value_and_grad_fn(2 * (Normalised(),))


def swap(x, y):
  """A loop that exchanges two arrays in each of three turns."""
  turn = lambda carry, _: ((carry[1], carry[0]), None)
  return jax.lax.scan(turn, (x, y), length=3)[0]


def pass_through(x, y):
  """A loop that carries one array, reads another row by row, and returns both."""
  turn = lambda carry, row: (carry, (row, jnp.sin(row)))
  carry, (rows, new) = jax.lax.scan(jax.checkpoint(turn), x, y)
  return carry, rows, new


PROGRAMS = {
  'the other way': (lambda x, y: (y, x), [1, 0]),
  'twice': (lambda x, y: (x, x), [0, 0]),
  'a number': (lambda x, y: (1.0, x), [None, 0]),
  'arithmetic': (lambda x, y: (x + 0, y), [None, 1]),
  'jit': (jax.jit(lambda x, y: (y, x * y)), [1, None]),
  'remat in jit': (jax.jit(jax.checkpoint(lambda x, y: (y, jnp.sin(x)))), [1, None]),
  'a loop': (pass_through, [0, 1, None]),
  'an exchange': (swap, [None, None]),
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_outputs_that_are_inputs(name):
  f, want = PROGRAMS[name]
  inputs = jnp.array([0.3, -0.2]), jnp.array([1.5, 0.7])
  got = _forwarding.sources(jax.make_jaxpr(f)(*inputs).jaxpr)
  assert got == want
  for output, i in zip(f(*inputs), got, strict=True):
    assert i is None or np.array_equal(output, inputs[i])
