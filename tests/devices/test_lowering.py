"""The training step lowers for accelerators that are not there.

``jax.export`` lowers for any platform where there is only a CPU, so what a TPU or a
GPU would refuse while a step is lowered (an operation, a dtype) shows here.
"""

import re

import chex
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from tests.methods import cases
from tests.methods import drop_in
from tests.methods import every_kind_slowly
from tests.methods import is_default
from tests.methods import KINDS
from tests.methods import transformation
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params

pytestmark = pytest.mark.standard_promotion

INTERFACES = ('chain', 'drop_in')
DTYPES = ('float32', 'bfloat16')
ACCELERATORS = ('tpu', 'cuda', 'rocm')
DEVICES = 8

each_case = pytest.mark.parametrize(
  ('method', 'interface', 'dtype'),
  cases(KINDS, INTERFACES, DTYPES, plain=is_default),
)


def make_step(method, interface):
  """The optimizer, and a step of training as a user would write it."""
  tx = optax.adam(optax.cosine_decay_schedule(0.01, 100))
  if interface == 'chain':
    tx = optax.chain(transformation(method, optax.linear_schedule(0.1, 0.0, 100)), tx)

  def step(params, state, data):
    if interface == 'chain':
      value_and_grad_fn = lambda params: jax.value_and_grad(loss)(params, data)
      value, grads = value_and_grad_fn(params)
      updates, state = tx.update(
        grads, state, params, value_and_grad_fn=value_and_grad_fn, value=value
      )
    else:
      value_and_grad_fn = drop_in(method, loss)
      value, grads = value_and_grad_fn(params, data)
      updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  return tx, step


def flat_problem(method, interface, dtype):
  """A step from leaves to leaves, as a list can be serialised, and its arguments.

  Every dimension is a multiple of the devices, so that all of it can be sharded.
  """
  tx, step = make_step(method, interface)
  grow = lambda w: np.resize(np.asarray(w, np.float32), [8] * w.ndim) / 2
  params = jax.tree.map(lambda w: jnp.asarray(grow(w), dtype), mlp_params())
  data = tuple(jnp.asarray(np.resize(a, (16, 8)), dtype) for a in batch(size=16))
  leaves, structure = jax.tree.flatten((params, tx.init(params)))

  def flat_step(leaves, data):
    params, state = jax.tree.unflatten(structure, leaves)
    *carry, value = step(params, state, data)
    return jax.tree.leaves(carry), value

  return flat_step, leaves, data


def through_bytes(exported):
  return export.deserialize(exported.serialize())


def assert_exported(exported, platform, arguments, devices=1):
  """What the module says of itself: platform, devices, avals, and nothing foreign."""
  leaves, data = arguments
  assert exported.platforms == (platform,)
  assert exported.nr_devices == devices
  describe = lambda x: (x.shape, x.dtype)
  in_avals = [describe(x) for x in exported.in_avals]
  out_avals = [describe(x) for x in exported.out_avals]
  assert in_avals == [describe(x) for x in (*leaves, *data)]
  assert out_avals == [*in_avals[: len(leaves)], ((), leaves[0].dtype)]
  text = str(exported.mlir_module())
  assert 'f64' not in text
  # Sharding annotations are all that is called by name, no kernel of some library.
  targets = set(re.findall(r'custom_call @([\w.]+)', text))
  assert targets <= {'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape'}


@each_case
@pytest.mark.parametrize('platform', ACCELERATORS)
def test_lowers_for(platform, method, interface, dtype):
  step, *arguments = flat_problem(method, interface, dtype)
  exported = export.export(jax.jit(step), platforms=[platform])(*arguments)
  assert_exported(through_bytes(exported), platform, arguments)


def conditionals(text):
  """How many depend on data: for platforms JAX writes some with a constant index."""
  constant, found = set(), 0
  for result, index in re.findall(
    r'(%\w+)(?::\d+)? = "stablehlo.case"\((%\w+)\)', text
  ):
    if index.startswith('%c') or index in constant:
      constant.add(result)
    else:
      found += 1
  return found


@pytest.mark.parametrize('interface', INTERFACES)
def test_conditionals_are_for_cpus(interface):
  """A TPU would copy what they read, and a GPU wait for the host."""
  step, *arguments = flat_problem('asam', interface, 'float32')

  def count(platform):
    exported = export.export(jax.jit(step), platforms=[platform])(*arguments)
    return conditionals(str(exported.mlir_module()))

  assert count('cpu') > 0
  assert [count(platform) for platform in ACCELERATORS] == [0, 0, 0]


def test_one_module_for_several_platforms():
  step, *arguments = flat_problem('msam', 'chain', 'float32')
  platforms = ['cpu', *ACCELERATORS]
  exported = export.export(jax.jit(step), platforms=platforms)(*arguments)
  here = through_bytes(exported).call(*arguments)
  chex.assert_trees_all_close(here, jax.jit(step)(*arguments), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('method', 'interface', 'dtype'),
  # Step by step every operation is compiled alone, and that takes seconds.
  cases(
    KINDS,
    INTERFACES,
    ('float32',),
    plain=lambda method, interface, dtype: (
      (method, interface, dtype) == ('msam', 'chain', 'float32')
    ),
  ),
)
def test_exported_step_equals_eager_one(method, interface, dtype):
  step, *arguments = flat_problem(method, interface, dtype)
  exported = export.export(jax.jit(step))(*arguments)
  tolerance = {'float32': 1e-5, 'bfloat16': 2e-2}[dtype]
  chex.assert_trees_all_close(
    through_bytes(exported).call(*arguments),
    step(*arguments),
    rtol=tolerance,
    atol=tolerance,
  )


def place(mesh, x):
  """What has dimensions is sharded along the last, as with fully sharded params."""
  spec = P(*(None,) * (x.ndim - 1), 'i') if x.ndim else P()
  return jax.device_put(x, NamedSharding(mesh, spec))


def sharded_problem(method, interface):
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('i',))
  step, leaves, data = flat_problem(method, interface, 'float32')
  data = tuple(jax.device_put(a, NamedSharding(mesh, P('i'))) for a in data)
  return step, [place(mesh, x) for x in leaves], data


every_interface = pytest.mark.parametrize(
  ('method', 'interface'),
  cases(KINDS, INTERFACES, plain=is_default),
)


@pytest.mark.cpu
@every_interface
@pytest.mark.parametrize('platform', ACCELERATORS)
def test_sharded_step_lowers_for(platform, method, interface):
  step, *arguments = sharded_problem(method, interface)
  exported = export.export(jax.jit(step), platforms=[platform])(*arguments)
  assert_exported(through_bytes(exported), platform, arguments, DEVICES)


@pytest.mark.slow
@pytest.mark.cpu
@every_interface
def test_sharded_exported_step_equals_eager_one_on_one_device(method, interface):
  step, *arguments = sharded_problem(method, interface)
  exported = export.export(jax.jit(step), platforms=['cpu'])(*arguments)
  chex.assert_trees_all_close(
    jax.jit(through_bytes(exported).call)(*arguments),
    step(*jax.device_get(arguments)),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.cpu
@every_kind_slowly
@pytest.mark.parametrize('platform', ACCELERATORS)
def test_mapped_step_lowers_for(platform, method):
  """With ``axis_name`` the devices' gradients are summed, in the module itself."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('i',))
  tx = transformation(method, axis_name='i')
  grad_fn = lambda params, data: jax.grad(loss)(params, data)

  def step(params, data):
    own_grad_fn = lambda params: grad_fn(params, data)
    grads = own_grad_fn(params)
    return tx.update(grads, tx.init(params), params, grad_fn=own_grad_fn)[0]

  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=(P(), P('i')), out_specs=P(), check_vma=False
  )
  exported = export.export(jax.jit(mapped), platforms=[platform])(
    mlp_params(), batch(size=16)
  )
  exported = through_bytes(exported)
  assert exported.nr_devices == DEVICES
  assert exported.platforms == (platform,)
  assert 'stablehlo.all_reduce' in str(exported.mlir_module())
