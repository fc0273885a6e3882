"""A method before an optimizer is what JAX's transformations expect."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from tests.contracts.optimizers import OPTIMIZERS
from tests.contracts.targets import TARGETS
from tests.contracts.training import make_step
from tests.contracts.training import SOME_OPTIMIZERS
from tests.methods import cases
from tests.methods import DEFAULT
from tests.methods import is_default
from tests.methods import KINDS
from tests.methods import OTHER_KINDS
from tests.methods import transformation

pytestmark = [
  pytest.mark.standard_promotion,
  pytest.mark.filterwarnings('ignore:.*use `optimistic_adam_:DeprecationWarning'),
  # In `map_params` of Optax before 0.2.8.
  pytest.mark.filterwarnings('ignore:Implicit conversion of an array to a dtype'),
]

# Leaves of one and of two dimensions, for tests that only trace or initialise, and
# one leaf for those that compile.
MIXED, MATRIX = TARGETS['mixed'], TARGETS['matrix']

# What takes time here is compiling, not running.
COMPILE_FAST = {'xla_backend_optimization_level': 0}

some_pairs = pytest.mark.parametrize(
  ('method', 'optimizer'), cases(KINDS, SOME_OPTIMIZERS, plain=is_default)
)
every_pair = pytest.mark.parametrize(
  ('method', 'optimizer'),
  cases(DEFAULT, OPTIMIZERS) + cases(OTHER_KINDS, SOME_OPTIMIZERS, plain=is_default),
)


def make_transformations(method, optimizer):
  """The method and the optimizer, by their names."""
  schedule = optax.linear_schedule(0.05, 0.0, 100)
  return transformation(method, schedule), OPTIMIZERS[optimizer].make()


def make_chain(method, optimizer, target):
  """The method and the optimizer in a chain, and the step that trains with it."""
  tx = optax.chain(*make_transformations(method, optimizer))
  return tx, make_step(tx, OPTIMIZERS[optimizer], target)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@every_pair
def test_keeps_structure_shapes_and_dtypes(method, optimizer, dtype):
  tx, step = make_chain(method, optimizer, MIXED)
  params = MIXED.params(dtype)
  state = jax.eval_shape(tx.init, params)
  _, new_state, updates = jax.eval_shape(step, params, state)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  # Of the optimizer's state it is the optimizer's business.
  is_weak = functools.partial(jax.tree.map, lambda x: x.weak_type)
  chex.assert_trees_all_equal(is_weak(updates), is_weak(params))
  chex.assert_trees_all_equal(is_weak(new_state[0]), is_weak(state[0]))


@pytest.mark.slow
@some_pairs
def test_donated_batch_equals_loop(method, optimizer):
  """Under ``vmap`` and ``jit`` with donated arguments it does what it does alone."""
  method_tx, optimizer_tx = make_transformations(method, optimizer)
  tx, step = make_chain(method, optimizer, MATRIX)
  starts = [MATRIX.params() + offset for offset in (0.0, 0.5, -2.0)]

  looped = []
  for params in starts:
    state = tx.init(params)
    for _ in range(2):
      params, state, _ = step(params, state)
    looped.append((params, state[0]))

  first = params = jnp.stack(starts)
  # Some of Optax's optimizers keep an array twice, or the very params that they are
  # initialised with, and cannot be donated as they are.
  state = (
    jax.vmap(method_tx.init)(params),
    jax.tree.map(jnp.copy, jax.vmap(optimizer_tx.init)(params)),
  )
  batched_step = jax.jit(
    jax.vmap(step), donate_argnums=(0, 1), compiler_options=COMPILE_FAST
  )
  for _ in range(2):
    params, state, _ = batched_step(params, state)
  assert first.is_deleted()
  chex.assert_trees_all_close(
    (params, state[0]),
    jax.tree.map(lambda *xs: jnp.stack(xs), *looped),
    rtol=1e-5,
    atol=1e-6,
  )


@every_pair
def test_map_params_is_identity(method, optimizer):
  tx, _ = make_chain(method, optimizer, MIXED)
  state = tx.init(MIXED.params())
  mapped = optax.tree.map_params(tx, lambda v: v, state)
  chex.assert_trees_all_equal_structs(mapped, state)
  chex.assert_trees_all_equal(mapped, state)
