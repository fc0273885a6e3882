"""Many devices: every set-up that JAX has gives what a loop on one device gives."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import msam_optax
from tests import by_hand
from tests import methods
from tests.methods import cases
from tests.methods import DEFAULT
from tests.methods import is_default
from tests.methods import OTHER_KINDS
from tests.methods import transformation

PARTS = 4

pytestmark = pytest.mark.cpu

both_syncs = pytest.mark.parametrize('sync', [False, True], ids=['own', 'synced'])


def make_params():
  """A network of one hidden layer, 3 → 8 → 4, whose sizes devices can share."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    'hidden': {'kernel': draw(3, 8), 'bias': 0.1 * draw(8)},
    'out': {'kernel': 0.3 * draw(8, 4), 'bias': 0.1 * draw(4)},
  }


def make_data():
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(32, 3), draw(32, 4)


def loss(params, data, add_up=lambda x: x):
  """Mean squared error; ``add_up`` sums what devices have of the hidden layer."""
  x, y = data
  h = jnp.tanh(x @ params['hidden']['kernel'] + params['hidden']['bias'][None])
  out = add_up(h @ params['out']['kernel']) + params['out']['bias'][None]
  return jnp.mean((out - y) ** 2)


@functools.cache
def expected(method, **options):
  return by_hand.gradient(method, loss, make_params(), make_data(), **options)


def assert_close(got, want):
  chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)


def chain(method, loss=loss, **kwargs):
  """``(params, data) -> (value, updates)`` of the transformation."""
  tx = transformation(method, **kwargs)

  def step(params, data):
    value_and_grad_fn = jax.value_and_grad(lambda p: loss(p, data))
    value, grads = value_and_grad_fn(params)
    updates, _ = tx.update(
      grads, tx.init(params), params, value_and_grad_fn=value_and_grad_fn, value=value
    )
    return value, updates

  return step


def drop_in(method, loss=loss, **options):
  return methods.drop_in(method, loss, **options)


INTERFACES = {
  'chain': chain,
  'drop-in': drop_in,
  'compiled once': functools.partial(drop_in, compile_once=True),
}
# Two copies of the gradient are in test_shards, and here in a slow run.
every_interface = pytest.mark.parametrize(
  'interface', cases(INTERFACES, plain=lambda interface: interface != 'drop-in')
)
every_method_and_interface = pytest.mark.parametrize(
  ('method', 'interface'),
  cases(DEFAULT, INTERFACES, plain=lambda method, interface: interface != 'drop-in')
  + cases(OTHER_KINDS, ('chain', 'compiled once'), plain=is_default),
)


def mesh(**axes):
  devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
  return jax.sharding.Mesh(devices.reshape(*axes.values()), tuple(axes))


def on_devices(f, mesh, in_specs, out_specs, **kwargs):
  """``shard_map`` in one program: without ``jit`` each operation would be one."""
  return jax.jit(
    jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **kwargs)
  )


def mapped(step, check_vma, cast=True, out_spec=P()):
  """The gradients of ``step`` on ``PARTS`` devices with replicated parameters."""

  def inner(params, data):
    return step(vary(params) if check_vma and cast else params, data)[1]

  return on_devices(
    inner,
    mesh=mesh(i=PARTS),
    in_specs=(P(), P('i')),
    out_specs=out_spec,
    check_vma=check_vma,
  )(make_params(), make_data())


def vary(params, axis='i'):
  """Replicated parameters as ones that vary over the axis."""
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(params, axis, to='varying')
  return jax.lax.pvary(params, axis)


@both_syncs
@every_method_and_interface
@pytest.mark.parametrize('check_vma', [False, True], ids=['unchecked', 'checked'])
def test_shard_map(check_vma, method, interface, sync):
  step = INTERFACES[interface](method, axis_name='i', sync_ascent=sync)
  assert_close(mapped(step, check_vma), expected(method, parts=PARTS, synced=sync)[1])


@both_syncs
@every_method_and_interface
@pytest.mark.filterwarnings('ignore:.*pmap.*')
def test_pmap(method, interface, sync):
  step = INTERFACES[interface](method, axis_name='i', sync_ascent=sync)
  data = jax.tree.map(lambda x: x.reshape(PARTS, -1, *x.shape[1:]), make_data())
  values, grads = jax.pmap(step, axis_name='i', in_axes=(None, 0))(make_params(), data)
  value, want = expected(method, parts=PARTS, synced=sync)
  for i in range(PARTS):
    assert_close(jax.tree.map(lambda g, i=i: g[i], grads), want)
  np.testing.assert_allclose(np.mean(values), value, rtol=1e-6)


LAYOUTS = {
  'data-parallel': ({'kernel': P(), 'bias': P()}, P('i')),
  'fully-sharded': ({'kernel': P(None, 'i'), 'bias': P('i')}, P('i')),
  'tensor-parallel': ({'kernel': P(None, 'i'), 'bias': P('i')}, P()),
}


def place(layout, axis_types=None):
  """Parameters and data as arrays that lie on ``PARTS`` devices."""
  specs, data_spec = LAYOUTS[layout]
  devices = np.array(jax.devices()[:PARTS])
  kwargs = {} if axis_types is None else {'axis_types': axis_types}
  on = jax.sharding.Mesh(devices, ('i',), **kwargs)
  put = lambda x, spec: jax.device_put(x, NamedSharding(on, spec))
  params = {
    layer: {name: put(x, specs[name]) for name, x in leaves.items()}
    for layer, leaves in make_params().items()
  }
  return params, tuple(put(x, data_spec) for x in make_data()), on


@every_method_and_interface
@pytest.mark.parametrize('layout', LAYOUTS)
def test_jit_with_sharded_arrays(layout, method, interface):
  params, data, _ = place(layout)
  value, grads = jax.jit(INTERFACES[interface](method))(params, data)
  want_value, want = expected(method)
  assert_close(grads, want)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)


has_explicit_sharding = pytest.mark.skipif(
  not hasattr(jax.sharding.AxisType, 'Explicit') or not hasattr(jax, 'set_mesh'),
  reason='this JAX has no explicit sharding',
)


def place_explicitly(layout):
  """Arrays that have their shardings as types, a loss that gathers, and the mesh."""
  params, data, on = place(layout, axis_types=(jax.sharding.AxisType.Explicit,))
  whole = lambda w: jax.sharding.reshard(w, P())
  return params, data, lambda p, data: loss(jax.tree.map(whole, p), data), on


@has_explicit_sharding
@every_interface
def test_jit_with_explicit_sharding(interface):
  """Where shardings are part of the types, the gradient has that of its parameter."""
  params, data, gathered, on = place_explicitly('fully-sharded')
  with jax.set_mesh(on):
    _, grads = jax.jit(INTERFACES[interface]('msam', gathered))(params, data)
  assert_close(grads, expected('msam')[1])
  jax.tree.map(lambda g, w: chex.assert_equal(g.sharding, w.sharding), grads, params)


TENSOR_PARALLEL = {
  'hidden': {'kernel': P(None, 'model'), 'bias': P('model')},
  'out': {'kernel': P('model', None), 'bias': P()},
}


@both_syncs
@every_method_and_interface
def test_shard_map_with_sharded_parameters(method, interface, sync):
  """Data over one axis, the hidden layer over another, one leaf on every device.

  ``shard_map`` is checked: only so are gradients through a sum over devices right.
  """
  add_up = functools.partial(jax.lax.psum, axis_name='model')
  step = INTERFACES[interface](
    method,
    functools.partial(loss, add_up=add_up),
    axis_name='data',
    sync_ascent=sync,
    param_specs=TENSOR_PARALLEL,
  )
  grads = on_devices(
    lambda params, data: step(vary(params, 'data'), data)[1],
    mesh=mesh(data=4, model=2),
    in_specs=(TENSOR_PARALLEL, P('data')),
    out_specs=TENSOR_PARALLEL,
  )(make_params(), make_data())
  assert_close(grads, expected(method, parts=4, synced=sync)[1])


@every_method_and_interface
@pytest.mark.parametrize('check_vma', [False, True], ids=['unchecked', 'checked'])
def test_shard_map_that_gathers_fully_sharded_parameters(check_vma, method, interface):
  """The gradient of a gathered parameter comes back as the sum, scattered."""
  specs = {layer: {'kernel': P(None, 'i'), 'bias': P('i')} for layer in make_params()}

  def gathered(params, data):
    whole = jax.tree.map(
      lambda w: jax.lax.all_gather(w, 'i', axis=w.ndim - 1, tiled=True), params
    )
    return loss(whole, data) / PARTS

  step = INTERFACES[interface](method, gathered, param_specs=specs)
  grads = on_devices(
    lambda params, data: step(params, data)[1],
    mesh=mesh(i=PARTS),
    in_specs=(specs, P('i')),
    out_specs=specs,
    check_vma=check_vma,
  )(make_params(), make_data())
  assert_close(grads, expected(method)[1])


@every_interface
def test_one_ascent_a_pod_with_parameters_sharded_inside_it(interface):
  """Mapped over the pods only: how it lies on their chips is left to the compiler."""
  on = mesh(pod=2, chip=4)
  put = lambda x, spec: jax.device_put(x, NamedSharding(on, spec))
  specs = {
    layer: {'kernel': P(None, 'chip'), 'bias': P('chip')} for layer in make_params()
  }
  params = jax.tree.map(put, make_params(), specs)
  data = tuple(put(x, P(('pod', 'chip'))) for x in make_data())
  step = INTERFACES[interface]('msam', axis_name='pod')
  grads = on_devices(
    lambda params, data: step(vary(params, 'pod'), data)[1],
    mesh=on,
    in_specs=(P(), P('pod')),
    out_specs=P(),
    axis_names={'pod'},
  )(params, data)
  assert_close(grads, expected('msam', parts=2)[1])


def test_one_spec_is_for_every_leaf_and_scalars_are_of_the_whole():
  """Slope and radius are the same on all devices, and are those of one device."""
  w = jnp.arange(1.0, 9.0)
  loss = lambda w: 0.5 * jnp.sum(jnp.square(w))
  tx = msam_optax.msam(rho=0.1, param_specs=P('i'))

  def step(w):
    _, state = tx.update(w, tx.init(w), w, grad_fn=jax.grad(loss))
    return jnp.stack([state.slope, state.radius])[None]

  got = on_devices(
    step, mesh=mesh(i=4), in_specs=P('i'), out_specs=P('i'), check_vma=False
  )(w)
  n = np.linalg.norm(w)
  want = [n / np.sqrt(1 + n**2), 0.1 / np.sqrt(1 + n**2)]
  np.testing.assert_array_equal(got, np.tile(got[0], (4, 1)))
  # The radius is the one that is left after rounding w + δ.
  np.testing.assert_allclose(got[0], want, rtol=5e-5)


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
@pytest.mark.parametrize('explicit', [False, True], ids=['jit', 'shard_map'])
def test_one_bad_entry_on_one_device_is_seen_on_all(explicit, bad):
  """A maximum over devices may lose a NaN; the leaf is NaN everywhere all the same."""
  grads = {'a': jnp.ones(8).at[5].set(bad), 'b': jnp.ones(8)}
  params = jax.tree.map(jnp.ones_like, grads)
  on = mesh(i=4)
  tx = msam_optax.msam(param_specs=P('i') if explicit else None)

  def step(grads, params):
    finite = lambda p: jax.tree.map(jnp.ones_like, p)
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=finite)
    return updates, state.slope

  if explicit:
    step = on_devices(step, mesh=on, in_specs=(P('i'), P('i')), out_specs=(P('i'), P()))
  placed = jax.device_put((grads, params), NamedSharding(on, P('i')))
  updates, slope = jax.jit(step)(*placed)
  assert np.isnan(updates['a']).all()
  np.testing.assert_array_equal(updates['b'], 1.0)
  assert slope == 0


@every_interface
def test_gradients_that_are_summed_already_are_refused(interface):
  step = INTERFACES[interface]('msam', axis_name='i')
  message = r"summed over 'i' already.*(pcast|pvary)\(params, 'i'"
  with pytest.raises(ValueError, match=message):
    mapped(step, check_vma=True, cast=False)


def test_gradients_some_of_which_are_summed_already_are_refused():
  """Half of the parameters are cast, and half are not."""
  step = chain('msam', axis_name='i')

  def cast_half(params, data):
    return step({**params, 'out': vary(params['out'])}, data)

  with pytest.raises(ValueError, match="summed over 'i' already"):
    mapped(cast_half, check_vma=True, cast=False)


@every_interface
def test_a_missing_axis_name_is_seen_by_a_checked_shard_map(interface):
  with pytest.raises(ValueError, match='out_specs'):
    mapped(INTERFACES[interface]('msam'), check_vma=True)


@every_interface
def test_a_missing_axis_name_leaves_devices_different_if_unchecked(interface):
  """The symptom that `docs/scale.md` names; nothing can see it here."""
  grads = mapped(INTERFACES[interface]('msam'), check_vma=False, out_spec=P('i'))
  first, second, *_ = np.split(np.asarray(grads['out']['bias']), PARTS)
  assert np.abs(first - second).max() > 1e-3


def test_an_axis_that_a_leaf_is_not_sharded_over_is_refused():
  step = chain('msam', axis_name='i', param_specs=P('j'))
  with pytest.raises(ValueError, match=r"\['bias'\] is sharded over 'j', but"):
    on_devices(
      lambda params, data: step(vary(params), data)[1],
      mesh=mesh(i=2, j=2),
      in_specs=(P(), P('i')),
      out_specs=P(),
    )(make_params(), make_data())


def tensor_parallel(interface, param_specs, *, metric=None):
  """Tensor parallelism, with specs that may be wrong."""
  add_up = functools.partial(jax.lax.psum, axis_name='model')
  if metric is None:
    step = INTERFACES[interface](
      'msam', functools.partial(loss, add_up=add_up), param_specs=param_specs
    )
  else:
    step = msam_optax.value_and_grad(
      functools.partial(loss, add_up=add_up), metric, param_specs=param_specs
    )
  return on_devices(
    lambda params, data: step(params, data)[1],
    mesh=mesh(model=2),
    in_specs=(TENSOR_PARALLEL, P()),
    out_specs=TENSOR_PARALLEL,
  )(make_params(), make_data())


@every_interface
def test_sharded_parameters_without_specs_are_seen_by_a_leaf_that_is_whole(interface):
  with pytest.raises(
    ValueError, match=r"'model' at \['out'\]\['bias'\].*`param_specs`"
  ):
    tensor_parallel(interface, None)


@every_interface
def test_a_leaf_that_is_missing_in_the_specs_is_named(interface):
  specs = {**TENSOR_PARALLEL, 'hidden': {'kernel': P(None, 'model'), 'bias': P()}}
  with pytest.raises(ValueError, match=r"leaf at \['hidden'\]\['bias'\] is not, but"):
    tensor_parallel(interface, specs)


def test_a_metric_that_knows_no_space_is_told_so():
  base = msam_optax.euclidean()
  metric = msam_optax.Metric(base.init, lambda g, state, params: (None, state))
  with pytest.raises(TypeError, match=r'def ascend\(grads, state, params, \*, space, '):
    tensor_parallel('drop-in', TENSOR_PARALLEL, metric=metric)


@every_interface
@pytest.mark.parametrize('name', ['axis_name', 'param_specs'])
def test_an_axis_that_nothing_is_mapped_over_is_named(name, interface):
  given = {'axis_name': 'i', 'param_specs': P('i')}
  with pytest.raises(ValueError, match=f"`{name}` names the axis 'i', but nothing is"):
    INTERFACES[interface]('msam', **{name: given[name]})(make_params(), make_data())


@every_interface
def test_an_axis_name_that_is_no_name_is_refused(interface):
  with pytest.raises(TypeError, match='or a tuple of names'):
    INTERFACES[interface]('msam', axis_name=['i'])


@pytest.mark.slow
@pytest.mark.parametrize('sync', [False, True], ids=['own', 'synced'])
@pytest.mark.parametrize('once', [False, True], ids=['two copies', 'one loop'])
@pytest.mark.parametrize('shards', [None, 2])
def test_each_device_may_have_a_radius_of_its_own(shards, once, sync):
  """As the mean of what devices with one radius each would have."""

  def step(params, data, rho):
    return msam_optax.value_and_grad(
      loss,
      msam_optax.monge(),
      rho[0],
      axis_name='i',
      sync_ascent=sync,
      compile_once=once,
      shards=shards,
    )(vary(params), data)[1]

  grads = on_devices(
    step, mesh=mesh(i=2), in_specs=(P(), P('i'), P('i')), out_specs=P()
  )(make_params(), make_data(), jnp.array([0.1, 0.3]))
  a_device = shards or 1
  want = expected(
    'msam',
    parts=2,
    shards=a_device,
    synced=sync,
    radii=(0.1,) * a_device + (0.3,) * a_device,
  )
  assert_close(grads, want[1])


def test_a_radius_that_differs_where_parameters_do_not_is_refused():
  """The gradient at the probe would be that of one device, not the sum of all."""
  step = lambda params, rho: msam_optax.value_and_grad(
    lambda p: loss(p, make_data()), rho=rho[0]
  )(params)[1]
  message = r"differ along the axis .i'.*`rho`.*(pcast|pvary)"
  with pytest.raises(ValueError, match=message):
    on_devices(step, mesh=mesh(i=2), in_specs=(P(), P('i')), out_specs=P())(
      make_params(), jnp.array([0.1, 0.3])
    )


def test_a_frozen_leaf_may_lie_as_it_likes():
  """What the mask leaves out is in no norm, and its specs are nobody's business."""
  specs = {'w': P('i'), 'b': P()}
  tx = msam_optax.sam(0.5, mask={'w': True, 'b': False}, param_specs=specs)

  def step(params):
    params = {**params, 'b': vary(params['b'])}
    updates, _ = tx.update(params, tx.init(params), params, grad_fn=lambda p: p)
    return updates['w']

  params = {'w': jnp.arange(1.0, 9.0), 'b': jnp.ones(2)}
  got = on_devices(step, mesh(i=4), in_specs=(specs,), out_specs=P('i'))(params)
  n = np.linalg.norm(params['w'])
  np.testing.assert_allclose(got, params['w'] * (1 + 0.5 / n), rtol=1e-6)


@pytest.mark.slow
@has_explicit_sharding
@every_interface
@both_syncs
def test_one_ascent_a_pod_where_shardings_inside_it_are_types(sync, interface):
  types = (jax.sharding.AxisType.Explicit,) * 2
  devices = np.array(jax.devices()[:4]).reshape(2, 2)
  on = jax.sharding.Mesh(devices, ('pod', 'chip'), axis_types=types)
  specs = {
    layer: {'kernel': P(None, 'chip'), 'bias': P('chip')} for layer in make_params()
  }
  put = lambda x, spec: jax.device_put(x, NamedSharding(on, spec))
  params = jax.tree.map(put, make_params(), specs)
  data = tuple(put(x, P(('pod', 'chip'))) for x in make_data())
  whole = lambda w: jax.sharding.reshard(w, P())
  step = INTERFACES[interface](
    'msam',
    lambda p, data: loss(jax.tree.map(whole, p), data),
    axis_name='pod',
    sync_ascent=sync,
  )
  with jax.set_mesh(on):
    grads = on_devices(
      lambda params, data: step(vary(params, 'pod'), data)[1],
      on,
      in_specs=(P(), P('pod')),
      out_specs=P(),
      axis_names={'pod'},
    )(params, data)
  assert_close(grads, expected('msam', parts=2, synced=sync)[1])


def test_a_normalized_direction_of_sharded_parameters():
  """As an adversary of Optax's own wrapper, with the norm of the whole."""
  w = jnp.arange(1.0, 9.0)
  tx = msam_optax.normalize_by(msam_optax.monge(), param_specs=P('i'))
  direction = on_devices(
    lambda w: tx.update(w, tx.init(w), w)[0],
    mesh=mesh(i=4),
    in_specs=P('i'),
    out_specs=P('i'),
  )(w)
  n = np.linalg.norm(w)
  np.testing.assert_allclose(direction, w / n / np.sqrt(1 + n**2), rtol=1e-6)


@pytest.mark.parametrize(
  ('specs', 'error', 'match'),
  [
    ('i', TypeError, "must hold PartitionSpecs, got 'i'"),
    ({'hidden': P('i')}, ValueError, 'must have the structure of the parameters'),
  ],
)
def test_specs_that_do_not_fit_are_refused(specs, error, match):
  with pytest.raises(error, match=match):
    chain('msam', param_specs=specs)(make_params(), make_data())


@every_interface
@pytest.mark.parametrize('check_vma', [False, True], ids=['unchecked', 'checked'])
def test_an_axis_of_parameters_cannot_be_averaged_over(check_vma, interface):
  step = INTERFACES[interface]('msam', axis_name='i', param_specs=P('i'))
  with pytest.raises(ValueError, match="sharded over 'i' by `param_specs` cannot be"):
    mapped(step, check_vma)


SEVERAL_AXES = {
  'both axes of the mesh on one of the leaf': (P(('i', 'j')), P(('i', 'j'))),
  'one axis each': (P('i', 'j'), P('i', 'j')),
  'other axes for other leaves': (P('i'), P(None, 'j')),
  'one leaf whole': (P('j', 'i'), None),
}


@pytest.mark.parametrize('masked', [False, True], ids=['all', 'masked'])
@pytest.mark.parametrize('name', SEVERAL_AXES)
def test_leaves_sharded_over_several_axes(name, masked):
  """Slope and gradient are those of one device, whatever lies where."""
  specs = dict(zip('ab', SEVERAL_AXES[name], strict=True))
  rng = np.random.default_rng(0)
  params = {key: jnp.asarray(rng.normal(size=(4, 8)), jnp.float32) for key in 'ab'}
  tx = msam_optax.msam(
    0.3, param_specs=specs, mask={'a': True, 'b': False} if masked else None
  )

  def step(params):
    # The gradient of ½‖w‖² is w, part by part.
    updates, state = tx.update(params, tx.init(params), params, grad_fn=lambda p: p)
    return updates, state.slope

  in_specs = jax.tree.map(
    lambda s: s or P(), specs, is_leaf=lambda x: x is None or isinstance(x, P)
  )
  updates, slope = on_devices(
    step, mesh=mesh(i=2, j=2), in_specs=(in_specs,), out_specs=(in_specs, P())
  )(params)
  moved = ['a'] if masked else ['a', 'b']
  n = np.sqrt(sum(np.sum(np.float64(params[key]) ** 2) for key in moved))
  np.testing.assert_allclose(slope, n / np.sqrt(1 + n**2), rtol=1e-6)
  for key in params:
    factor = 1 + 0.3 / (n * np.sqrt(1 + n**2)) if key in moved else 1.0
    np.testing.assert_allclose(updates[key], factor * params[key], rtol=1e-6)


def test_leaves_of_several_dtypes_are_sharded_side_by_side(x64):
  """Under strict promotion, with an integer leaf that the mask leaves out."""
  params = {
    'half': jnp.ones(4, jnp.bfloat16),
    'double': jnp.ones(4, jnp.float64),
    'count': jnp.zeros(4, jnp.int32),
  }
  grads = {**params, 'count': jnp.zeros(4, jnp.float32)}
  mask = {'half': True, 'double': True, 'count': False}
  tx = msam_optax.sam(0.5, mask=mask, param_specs=P('i'))

  def step(grads, params):
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=lambda p: grads)
    return updates, state.slope

  updates, slope = on_devices(
    step, mesh=mesh(i=4), in_specs=(P('i'), P('i')), out_specs=(P('i'), P())
  )(grads, params)
  chex.assert_trees_all_equal(updates, grads)
  np.testing.assert_allclose(slope, np.sqrt(8))
