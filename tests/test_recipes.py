"""Every recipe of the docs runs, and its steps are those by hand.

The loss of a recipe is differentiated as it is; the perturbation, the update and the
optimizer are those of ``by_hand``. Each comparison is also made with a radius of zero,
from which the recipe must differ: else it would show nothing.
"""

import functools
import importlib.util
import os
import pathlib
import re
import runpy
from unittest import mock

import chex
import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import asam
from tests import by_hand

# Layers and optimizers of others promote dtypes and ranks.
# What they teach is tested in a plain run as well, in `loops`, `contracts`, `devices`.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]

RECIPES = pathlib.Path(__file__).parent.parent / 'docs' / 'recipes'
NAMES = sorted(path.stem for path in RECIPES.glob('*.py'))
SLOW = pytest.mark.slow
ON_DEVICES = pytest.mark.skipif(
  not hasattr(jax.lax, 'pcast'), reason='this JAX has no `jax.lax.pcast`'
)


@functools.cache
def load(name):
  """The module of a recipe; what it sets in the environment does not stay."""
  path = RECIPES / f'{name}.py'
  spec = importlib.util.spec_from_file_location(f'recipe_{name}', path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  with mock.patch.dict(os.environ):
    spec.loader.exec_module(module)
  return module


def check(got, by_hand_with, rho):
  """Compares with training by hand, which a plain one must be distinguished from."""
  expected, plain = by_hand_with(rho), by_hand_with(0.0)
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=2e-5)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(got, plain, rtol=1e-3, atol=2e-4)


def assert_falls(losses):
  """The mean of the last three is well below that of the first three."""
  assert np.all(np.isfinite(losses))
  assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def train(method, grad_fn, params, batches, optimizer, rho, state=None):
  """``by_hand.train`` at a radius; the last params, or these and the last state."""
  params, new_state = by_hand.train(
    method, grad_fn, params, state, batches, optimizer, radii=[rho]
  )
  return params if state is None else (params, new_state)


def train_in_parts(method, grad, params, batches, optimizer, rho, cut):
  """Training where each part of a batch has its own perturbation."""
  for batch in batches:
    gradients = [lambda w, part=part: grad(w, part) for part in cut(batch)]
    radii = [rho] * len(gradients)
    params = optimizer(params, by_hand.update(method, params, gradients, radii=radii))
  return params


def consecutive(batch, parts):
  """The parts of a batch, consecutive rows each, as they are on devices."""
  cuts = [np.split(rows, parts) for rows in batch]
  return list(zip(*cuts, strict=True))


def plain_gradient(loss_fn):
  """``grad_fn`` of :func:`by_hand.train` for ``loss_fn(params, batch)``."""
  grad = jax.jit(jax.grad(loss_fn))
  return lambda params, _, batch: (grad(params, batch), None)


def test_equinox_batch_norm():
  recipe = load('equinox_batch_norm')
  model, state, losses = recipe.train()
  grad = eqx.filter_jit(eqx.filter_grad(recipe.loss_fn, has_aux=True))

  def by_hand_with(rho):
    model, state = recipe.init()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    grad_fn = lambda w, state, batch: grad(eqx.combine(w, static), state, *batch)
    optimizer = by_hand.sgd(0.1, 0.9)
    params, state = train(
      'msam', grad_fn, params, recipe.batches(20), optimizer, rho, state
    )
    return jax.tree.leaves((params, state))

  params = eqx.filter(model, eqx.is_inexact_array)
  check(jax.tree.leaves((params, state)), by_hand_with, recipe.RHO)
  assert_falls(losses)


def test_equinox_frozen():
  recipe = load('equinox_frozen')
  model, losses = recipe.train()
  grad = eqx.filter_jit(eqx.filter_grad(recipe.loss_fn))
  initial = recipe.init()
  trained = recipe.is_trained(initial)

  def by_hand_with(rho):
    params, static = eqx.partition(initial, trained)
    grad_fn = lambda w, _, batch: (grad(w, static, *batch), None)
    return train('msam', grad_fn, params, recipe.batches(20), by_hand.sgd(0.1), rho)

  check(eqx.filter(model, trained), by_hand_with, recipe.RHO)
  arrays = lambda tree: jax.tree.leaves(
    eqx.filter(eqx.filter(tree, trained, inverse=True), eqx.is_array)
  )
  chex.assert_trees_all_equal(arrays(model), arrays(initial))
  assert len(arrays(model)) == 4
  assert_falls(losses)


def test_haiku_batch_norm():
  recipe = load('haiku_batch_norm')
  *trained, losses = recipe.train()
  grad = jax.jit(jax.grad(recipe.loss_fn, has_aux=True))

  def by_hand_with(rho):
    params, state = recipe.init()
    grad_fn = lambda params, state, batch: grad(params, state, *batch)
    optimizer = by_hand.sgd(0.1, 0.9)
    return train('msam', grad_fn, params, recipe.batches(20), optimizer, rho, state)

  check(tuple(trained), by_hand_with, recipe.RHO)
  assert_falls(losses)


def test_keras_train_step():
  recipe = load('keras_train_step')
  model, losses = recipe.train()
  fresh = recipe.init()
  values = lambda variables: [np.asarray(v.value) for v in variables]

  def evaluate(trainable, non_trainable, x, y):
    out, new = fresh.stateless_call(trainable, non_trainable, x, training=True)
    return jnp.mean((out - y) ** 2), new

  grad = jax.jit(jax.grad(evaluate, has_aux=True))
  x, y = recipe.data()
  batches = list(zip(np.split(x, 4), np.split(y, 4), strict=True)) * 5

  def by_hand_with(rho):
    grad_fn = lambda params, state, batch: grad(params, state, *batch)
    params, state = (
      values(fresh.trainable_variables),
      values(fresh.non_trainable_variables),
    )
    return train('msam', grad_fn, params, batches, by_hand.sgd(0.1, 0.9), rho, state)

  trained = values(model.trainable_variables), values(model.non_trainable_variables)
  check(trained, by_hand_with, recipe.RHO)
  assert_falls(losses)


def test_ppo_minibatches():
  recipe = load('ppo_minibatches')
  params, losses = recipe.train()
  rollout = recipe.play(recipe.init())
  minibatches = [
    jax.tree.map(lambda x: x[i], rows)
    for rows in (
      recipe.shuffled(rollout, key)
      for key in jax.random.split(jax.random.key(2), recipe.EPOCHS)
    )
    for i in range(recipe.MINIBATCHES)
  ]

  def by_hand_with(rho):
    optimizer = by_hand.adam(1e-2, eps=1e-5, clip=recipe.MAX_GRAD_NORM)
    grad_fn = plain_gradient(recipe.loss_fn)
    return train('msam', grad_fn, recipe.init(), minibatches, optimizer, rho)

  check(params, by_hand_with, recipe.RHO)
  assert losses[-1] < 0.5 * losses[0]


def test_sweep():
  recipe = load('sweep')
  params, losses = recipe.train()
  assert recipe.sweep._cache_size() == 1
  grad_fn = plain_gradient(recipe.loss_fn)
  for i, seed in enumerate(recipe.SEEDS[:2]):
    for j, rho in enumerate(recipe.RHOS):
      cell = jax.tree.map(lambda x: np.asarray(x)[i, j], params)
      batches = zip(*recipe.batches(20), strict=True)
      expected = train(
        'msam', grad_fn, recipe.init(seed), batches, by_hand.sgd(0.1), float(rho)
      )
      chex.assert_trees_all_close(cell, expected, rtol=1e-4, atol=2e-5)
  for run in np.asarray(losses).reshape(-1, losses.shape[-1]):
    assert_falls(run)
  # The radii make different runs.
  assert np.all(np.abs(np.diff(params['w1'], axis=1)).max(axis=(2, 3)) > 2e-4)


def test_lora():
  recipe = load('lora')
  model, losses = recipe.train()
  graph, factors, base = nnx.split(recipe.init(), nnx.LoRAParam, ...)
  loss_fn = lambda factors, batch: recipe.loss_fn(
    nnx.merge(graph, factors, base), *batch
  )
  by_hand_with = lambda rho: train(
    'msam',
    plain_gradient(loss_fn),
    factors,
    recipe.batches(20),
    by_hand.sgd(0.02, 0.9),
    rho,
  )
  check(nnx.state(model, nnx.LoRAParam), by_hand_with, recipe.RHO)
  kernels = lambda model: (model.hidden.kernel[...], model.out.kernel[...])
  chex.assert_trees_all_equal(kernels(model), kernels(recipe.init()))
  assert_falls(losses)


def test_dynamic_scale():
  recipe = load('dynamic_scale')
  state, dynamic_scale, losses = recipe.train()

  @jax.jit
  def grad(params, scale, batch):
    grads = jax.grad(lambda w: scale * recipe.loss_fn(w, *batch))(params)
    return jax.tree.map(lambda g: g / scale, grads)

  finite = lambda tree: all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))
  seen = []

  def by_hand_with(rho):
    params, scale, steps = recipe.init()[0].params, np.float32(2.0**22), 0
    optimizer = by_hand.sgd(0.1)
    for batch in recipe.batches(20):
      grad_fn = functools.partial(grad, scale=scale, batch=batch)
      clean = finite(grad_fn(params))
      update = by_hand.update('msam', params, [grad_fn], radii=[rho]) if clean else None
      if clean and finite(update):
        params, steps = optimizer(params, update), steps + 1
      else:
        scale /= 2
    seen.append((scale, steps))
    return params

  check(state.params, by_hand_with, recipe.RHO)
  assert (float(dynamic_scale.scale), int(state.step)) == seen[0]
  assert 0 < int(state.step) < 20
  assert_falls(losses)


@pytest.mark.parametrize('name', ['train_on_stream', 'train_on_batches'])
def test_accumulation(name):
  recipe = load('accumulation')
  params, losses = getattr(recipe, name)()

  grad = jax.jit(jax.grad(recipe.loss_fn))
  k = recipe.MICROBATCHES
  by_hand_with = lambda rho: train_in_parts(
    'msam',
    grad,
    recipe.init(),
    recipe.batches(20),
    by_hand.sgd(0.02, 0.9),
    rho,
    cut=lambda batch: [tuple(rows[i::k] for rows in batch) for i in range(k)],
  )

  check(params, by_hand_with, recipe.RHO)
  assert_falls(losses)


def test_ema():
  recipe = load('ema')
  params, average, losses = recipe.train()
  grad_fn = plain_gradient(recipe.loss_fn)

  def by_hand_with(rho):
    params = average = recipe.init()
    optimizer = by_hand.sgd(0.02, 0.9)
    for batch in recipe.batches(20):
      params = train('msam', grad_fn, params, [batch], optimizer, rho)
      average = jax.tree.map(
        lambda a, w: np.float32(recipe.DECAY * a + (1 - recipe.DECAY) * w),
        average,
        params,
      )
    return params, average

  check((params, average), by_hand_with, recipe.RHO)
  assert_falls(losses)


# Some steps only, and what the docstring of that recipe says of the others.


@pytest.mark.parametrize('name', ['late', 'early', 'every 4th'])
def test_some_steps(name):
  recipe = load('some_steps')
  when = recipe.WHEN[name]
  params, losses, records = recipe.train(when)
  grad_fn = plain_gradient(recipe.loss_fn)

  def by_hand_with(rho):
    params, optimizer = recipe.init(), by_hand.sgd(0.02, 0.9)
    for step, batch in enumerate(recipe.batches(recipe.STEPS)):
      radius = rho if when(step) else 0.0
      params = train('msam', grad_fn, params, [batch], optimizer, radius)
    return params

  check(params, by_hand_with, recipe.RHO)
  assert_falls(losses)
  due = [bool(when(step)) for step in range(recipe.STEPS)]
  assert [int(record.count) for record in records] == list(np.cumsum(due))
  for step in range(recipe.STEPS):
    before = records[step - 1].slope if step else 0.0
    assert (records[step].slope == before) == (not due[step])
    assert (records[step].slope == 0.0) == (sum(due[: step + 1]) == 0)


@pytest.mark.parametrize('name', ['late', 'every 4th'])
def test_a_schedule_of_the_radius_counts_the_steps_with_a_probe(name):
  recipe = load('some_steps')
  when = recipe.WHEN[name]
  _, _, records = recipe.train(when, rho=lambda count: 0.01 * (count + 1))
  used = [record for step, record in enumerate(records) if when(step)]
  # At α = 1 the slope is s = ‖g‖/√(1+‖g‖²) and the radius ρ/√(1+‖g‖²) = ρ √(1−s²).
  rhos = [record.radius / np.sqrt(1 - record.slope**2) for record in used]
  np.testing.assert_allclose(rhos, 0.01 * np.arange(1, len(used) + 1), rtol=1e-3)


def test_a_skipped_step_says_nothing_of_its_gradient():
  """``finite`` stays True, and ``apply_if_finite`` behind it rejects the step."""
  recipe = load('some_steps')
  tx = optax.chain(
    optax.conditionally_transform(recipe.msam(), lambda step, **_: step == 0),
    optax.apply_if_finite(optax.sgd(0.1), 5),
  )
  step = recipe.make_train_step(tx, lambda w, x: jnp.sum(w**2 * x))
  w, opt_state = jnp.ones(2), tx.init(jnp.ones(2))
  w, opt_state, _ = step(w, opt_state, jnp.array(1.0))
  after, opt_state, _ = step(w, opt_state, jnp.array(np.nan))
  assert opt_state[0].inner_state.finite
  chex.assert_trees_all_equal(after, w)
  assert optax.tree.get(opt_state, 'total_notfinite') == 1


@pytest.mark.parametrize('where', ['jit', 'state made inside', 'state mapped'])
def test_when_a_skipped_step_costs_a_second_gradient(where):
  recipe = load('some_steps')
  calls = []
  tx = recipe.make_optimizer(recipe.WHEN['every 4th'])

  def grad_fn(w):
    jax.debug.callback(lambda _: calls.append(1), w[0])
    return w

  def step(carry, _):
    w, opt_state = carry
    updates, opt_state = tx.update(w, opt_state, w, grad_fn=grad_fn)
    return (optax.apply_updates(w, updates), opt_state), None

  def run(w, opt_state=None):
    opt_state = tx.init(w) if opt_state is None else opt_state
    return jax.lax.scan(step, (w, opt_state), length=8)[0]

  ws = jnp.ones((3, 2))
  if where == 'jit':
    jax.block_until_ready(jax.jit(run)(ws[0]))
  elif where == 'state made inside':
    jax.block_until_ready(jax.jit(jax.vmap(run))(ws))
  else:
    jax.block_until_ready(jax.jit(jax.vmap(run))(ws, jax.vmap(tx.init)(ws)))
  jax.effects_barrier()
  expected = {'jit': 2, 'state made inside': 2 * 3, 'state mapped': 8 * 3}
  assert len(calls) == expected[where]


# Porting.


@pytest.mark.parametrize('name', ['opaque', 'transparent', 'ours'])
def test_from_optax_sam(name):
  recipe = load('from_optax_sam')
  step = recipe.our_step if name == 'ours' else getattr(recipe, f'{name}_step')
  tx, calls = getattr(recipe, name), 2 if name == 'transparent' else 1
  params, losses = recipe.train(tx, step, calls=calls)
  by_hand_with = lambda rho: train(
    'sam',
    plain_gradient(recipe.loss_fn),
    recipe.init(),
    recipe.batches(20),
    by_hand.sgd(0.02, 0.9),
    rho,
  )
  check(params, by_hand_with, recipe.RHO)
  assert_falls(losses)


def test_a_zero_gradient_is_nan_before_and_no_perturbation_after():
  recipe = load('from_optax_sam')
  w = jnp.zeros(2)
  for tx, grad_fn, expected in (
    (recipe.opaque, lambda w, _: w, np.nan),
    (recipe.ours, lambda w: w, 0.0),
  ):
    updates, _ = tx.update(w, tx.init(w), w, grad_fn=grad_fn)
    np.testing.assert_array_equal(updates, np.full(2, expected))


@ON_DEVICES
@pytest.mark.cpu
def test_from_google_sam():
  recipe = load('from_google_sam')
  params, batch_stats, losses = recipe.train()
  grad = jax.jit(jax.grad(recipe.forward_and_loss, has_aux=True))
  devices = 8

  def by_hand_with(rho):
    params, stats = recipe.init()
    optimizer = nesterov_behind_clip(0.02, 0.9, 5.0)
    for batch in recipe.batches(20):
      parts = consecutive(batch, devices)
      gradients = [lambda w, part=part: grad(w, stats, *part)[0] for part in parts]
      new_stats = [grad(params, stats, *part)[1] for part in parts]
      radii = [rho] * devices
      params = optimizer(params, by_hand.update('sam', params, gradients, radii=radii))
      stats = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *new_stats)
    return params, stats

  check((params, batch_stats), by_hand_with, recipe.SAM_RHO)
  assert_falls(losses)


def nesterov_behind_clip(learning_rate, momentum, clip):
  """Nesterov's momentum as in Optax and PyTorch, behind a clip of the global norm."""
  velocity = None

  def step(params, grads):
    nonlocal velocity
    n = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * min(1.0, clip / n), grads)
    if velocity is None:
      velocity = jax.tree.map(np.zeros_like, grads)
    velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
    return jax.tree.map(
      lambda w, v, g: np.float32(w - learning_rate * (momentum * v + g)),
      params,
      velocity,
      grads,
    )

  return step


@ON_DEVICES
@pytest.mark.cpu
@pytest.mark.parametrize(
  'groups', [2, pytest.param(1, marks=SLOW), pytest.param(8, marks=SLOW)]
)
@pytest.mark.parametrize('step', ['drop_in_step', 'chain_step'])
def test_device_groups(groups, step):
  recipe = load('device_groups')
  params, losses = recipe.train(groups, getattr(recipe, step))

  grad = jax.jit(jax.grad(recipe.loss_fn))
  by_hand_with = lambda rho, groups=groups: train_in_parts(
    'msam',
    grad,
    recipe.init(),
    recipe.batches(20),
    by_hand.sgd(0.02, 0.9),
    rho,
    cut=lambda batch: consecutive(batch, groups),
  )

  check(params, by_hand_with, recipe.RHO)
  assert_falls(losses)
  # The number of groups matters.
  with pytest.raises(AssertionError):
    check(params, functools.partial(by_hand_with, groups=4), recipe.RHO)


def test_from_torch():
  recipe = load('from_torch')
  model, losses = recipe.train()
  graph, initial, rest = nnx.split(recipe.init(), nnx.Param, ...)

  @jax.jit
  def grad_fn(params, rest, batch):
    def loss_fn(params):
      # A copy of the other variables, which the pass may change in this trace.
      model = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
      loss = recipe.loss_fn(model, *batch)
      return loss, nnx.state(model, nnx.Not(nnx.Param))

    return jax.grad(loss_fn, has_aux=True)(params)

  def by_hand_with(rho):
    velocity = by_hand.sgd(recipe.LEARNING_RATE, recipe.MOMENTUM)
    decay = np.float32(recipe.WEIGHT_DECAY)
    optimizer = lambda params, grads: velocity(
      params, jax.tree.map(lambda g, w: g + decay * w, grads, params)
    )
    return train('sam', grad_fn, initial, recipe.batches(20), optimizer, rho, rest)

  got = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
  check(got, by_hand_with, recipe.RHO)
  assert_falls(losses)


def test_adaptive_sam_of_torch():
  """Its perturbation is ``ρ w² g/‖|w| g‖`` on all parameters, biases included."""
  w = {
    'kernel': np.array([[0.5, -2.0]], np.float32),
    'bias': np.array([0.1], np.float32),
  }
  g = {
    'kernel': np.array([[1.0, 0.25]], np.float32),
    'bias': np.array([-3.0], np.float32),
  }
  tx = asam(0.5, eta=0.0, weights=True)
  probe, _ = tx.update(g, tx.init(w), w, grad_fn=lambda probe: probe)
  n = np.sqrt(sum(np.sum((w[k] * g[k]) ** 2) for k in w))
  expected = {k: np.float32(w[k] + 0.5 * w[k] ** 2 * g[k] / n) for k in w}
  chex.assert_trees_all_close(probe, expected, rtol=1e-6)


# The list.


def test_every_recipe_is_listed_and_tested():
  listed = re.findall(r'\]\((\w+)\.py\)', (RECIPES / 'index.md').read_text())
  assert sorted(listed) == NAMES
  assert len(set(listed)) == len(listed)
  tested = {name.removeprefix('test_') for name in globals()}
  assert set(NAMES) <= tested


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_says_when_to_use_it(name):
  text = (RECIPES / f'{name}.py').read_text()
  doc = text.split('"""')[1]
  assert 'When to use it: ' in doc
  assert 'What to watch out for' in doc


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.standard_promotion
@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_runs_by_itself(name, capsys):
  if name in ('device_groups', 'from_google_sam') and not hasattr(jax.lax, 'pcast'):
    pytest.skip('this JAX has no `jax.lax.pcast`')
  runpy.run_path(str(RECIPES / f'{name}.py'), run_name='__main__')
  assert re.search(r'\d\.\d{3}', capsys.readouterr().out)
