"""Inside, around and beside every wrapper of Optax: right, or an error that helps."""

import chex
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import msam_optax
from msam_optax import msam
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params

pytestmark = pytest.mark.standard_promotion

PARAMS, DATA = mlp_params(), batch()
GRAD_FN = jax.grad(lambda p: loss(p, DATA))
KERNELS = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
HIDDEN = {
  'hidden': jax.tree.map(lambda _: True, PARAMS['hidden']),
  'out': jax.tree.map(lambda _: False, PARAMS['out']),
}
LABELS = jax.tree.map(lambda hidden: 'train' if hidden else 'freeze', HIDDEN)


def method():
  return optax.chain(msam(rho=0.2), optax.sgd(0.1))


def step(tx, params=PARAMS, **kwargs):
  """The first update, jitted, as a training step does it."""
  grads = GRAD_FN(params)
  run = jax.jit(lambda g, s, p: tx.update(g, s, p, **kwargs))
  return run(grads, tx.init(params), params)[0]


def expected():
  """``−0.1`` times the gradient at the probe of the paper's formula."""
  g = GRAD_FN(PARAMS)
  n = optax.tree.norm(g)
  factor = 0.2 / (n * jnp.sqrt(1 + n**2))
  probe = jax.tree.map(lambda w, g: w + factor * g, PARAMS, g)
  return jax.tree.map(lambda g: -0.1 * g, GRAD_FN(probe))


def always(*_, **__):
  return True


@pytest.mark.parametrize(
  'wrap',
  [
    lambda: optax.chain(optax.identity(), method()),
    lambda: optax.named_chain(('ascent', msam(rho=0.2)), ('descent', optax.sgd(0.1))),
    lambda: optax.chain(optax.inject_hyperparams(msam)(rho=0.2), optax.sgd(0.1)),
    lambda: optax.apply_if_finite(method(), max_consecutive_errors=3),
    lambda: optax.conditionally_transform(method(), always),
    lambda: optax.conditionally_mask(method(), always),
    lambda: optax.masked(method(), jax.tree.map(lambda _: True, PARAMS)),
    lambda: optax.MultiSteps(method(), every_k_schedule=1),
  ],
  ids=[
    'chain',
    'named_chain',
    'inject_hyperparams',
    'apply_if_finite',
    'conditionally_transform',
    'conditionally_mask',
    'masked-all',
    'MultiSteps',
  ],
)
def test_inside_a_wrapper_that_forwards(wrap):
  chex.assert_trees_all_close(step(wrap(), grad_fn=GRAD_FN), expected(), rtol=1e-5)


def test_inside_schedule_free():
  """It sees the gradient at the probe, as if that had come in from outside."""
  wrap = lambda tx: optax.contrib.schedule_free(tx, learning_rate=0.1)
  outside = wrap(optax.sgd(0.1))
  at_probe = jax.tree.map(lambda u: -10 * u, expected())
  from_outside, _ = outside.update(at_probe, outside.init(PARAMS), PARAMS)
  inside = step(wrap(method()), grad_fn=GRAD_FN)
  chex.assert_trees_all_close(inside, from_outside, rtol=1e-4, atol=1e-6)


def test_inside_mechanize():
  """Its first steps are too small to compare, so a run of it is looked at."""
  tx = optax.contrib.mechanize(method())

  def train_step(carry, _):
    params, state = carry
    updates, state = tx.update(GRAD_FN(params), state, params, grad_fn=GRAD_FN)
    slope = optax.tree.get(state, 'slope')
    return (optax.apply_updates(params, updates), state), slope

  (params, _), slopes = jax.lax.scan(train_step, (PARAMS, tx.init(PARAMS)), length=500)
  n = optax.tree.norm(GRAD_FN(PARAMS))
  chex.assert_trees_all_close(slopes[0], n / jnp.sqrt(1 + n**2), rtol=1e-5)
  assert loss(params, DATA) < 0.5 * loss(PARAMS, DATA)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda: optax.masked(method(), HIDDEN),
    lambda: optax.partition({'train': method(), 'freeze': optax.set_to_zero()}, LABELS),
    lambda: optax.transforms.selective_transform(method(), freeze_mask=HIDDEN),
  ],
  ids=['masked', 'partition', 'selective_transform'],
)
def test_inside_a_wrapper_that_takes_leaves_away(wrap):
  with pytest.raises(ValueError, match=r'msam\(mask=mask\).*msam_optax.value_and_grad'):
    step(wrap(), grad_fn=GRAD_FN)


def test_inside_flatten():
  with pytest.raises(TypeError, match='string indexing') as error:
    step(optax.flatten(method()), grad_fn=GRAD_FN)
  assert 'stands inside optax.flatten: put it before' in error.value.__notes__[0]


@pytest.mark.parametrize(
  'wrap',
  [
    lambda: optax.chain(optax.MultiSteps(method(), 2).gradient_transformation()),
    lambda: optax.contrib.split_real_and_imaginary(method()),
  ],
  ids=['MultiSteps-in-chain', 'split_real_and_imaginary'],
)
def test_inside_a_wrapper_that_drops_extra_arguments(wrap):
  with pytest.raises(ValueError, match='wrapper does not forward it'):
    step(wrap())


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.lookahead(tx, 5, 0.5),
    optax.contrib.split_real_and_imaginary,
  ],
  ids=['lookahead', 'split_real_and_imaginary'],
)
def test_wrappers_that_refuse_extra_arguments_do_so_themselves(wrap):
  tx = wrap(method())
  with pytest.raises(TypeError, match="unexpected keyword argument 'grad_fn'"):
    tx.update(GRAD_FN(PARAMS), None, PARAMS, grad_fn=GRAD_FN)


INNER = {
  'masked': lambda tx: optax.masked(tx, KERNELS),
  'partition': lambda tx: optax.partition(
    {'train': tx, 'freeze': optax.set_to_zero()}, LABELS
  ),
  'selective_transform': lambda tx: optax.transforms.selective_transform(
    tx, freeze_mask=HIDDEN
  ),
  'flatten': optax.flatten,
  'MultiSteps': lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
  'split_real_and_imaginary': optax.contrib.split_real_and_imaginary,
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
  'inject_hyperparams': lambda tx: optax.inject_hyperparams(optax.sgd)(0.1),
}


@pytest.mark.parametrize('name', INNER)
def test_before_every_wrapper_in_a_chain(name):
  """``chain(msam, wrapper(optimizer))`` gives the wrapper the gradient at the probe."""
  wrapped = INNER[name](optax.sgd(0.1))
  at_probe = jax.tree.map(lambda u: -10 * u, expected())
  alone, _ = wrapped.update(at_probe, wrapped.init(PARAMS), PARAMS)
  chained = step(optax.chain(msam(rho=0.2), wrapped), grad_fn=GRAD_FN)
  chex.assert_trees_all_close(chained, alone, rtol=1e-5)


@pytest.mark.parametrize('name', INNER)
def test_drop_in_works_with_every_wrapper(name):
  take = msam_optax.value_and_grad(lambda p: loss(p, DATA), rho=0.2)
  value, grads = take(PARAMS)
  wrapped = INNER[name](optax.sgd(0.1))
  got, _ = wrapped.update(grads, wrapped.init(PARAMS), PARAMS)
  chained = step(optax.chain(msam(rho=0.2), wrapped), grad_fn=GRAD_FN)
  chex.assert_trees_all_close(got, chained, rtol=1e-5)
  chex.assert_trees_all_equal(value, loss(PARAMS, DATA))


def test_before_lookahead():
  """Gradients are taken at the fast parameters of its two sets."""
  params = optax.LookaheadParams.init_synced(PARAMS)
  inner = optax.lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5)
  tx = optax.chain(msam(rho=0.2), inner)
  updates, _ = tx.update(GRAD_FN(PARAMS), tx.init(params), params, grad_fn=GRAD_FN)
  chex.assert_trees_all_close(updates.fast, expected(), rtol=1e-5)


def test_drop_in_with_lookahead():
  params = optax.LookaheadParams.init_synced(PARAMS)
  tx = optax.lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5)
  _, grads = msam_optax.value_and_grad(lambda p: loss(p, DATA), rho=0.2)(params.fast)
  updates, _ = tx.update(grads, tx.init(params), params)
  chex.assert_trees_all_close(updates.fast, expected(), rtol=1e-5)


def test_clipping_before_the_method_changes_its_radius_and_after_it_does_not():
  """Monge SAM's is shorter the longer the gradient, and clipping shortens that."""
  clip = optax.clip_by_global_norm(0.1)
  run = lambda *parts: step(optax.chain(*parts), grad_fn=GRAD_FN)
  g = GRAD_FN(PARAMS)
  n = float(optax.tree.norm(g))
  assert n > 1

  def at_probe(slope):
    factor = 0.2 / (n * np.sqrt(1 + slope**2))
    return GRAD_FN(jax.tree.map(lambda w, g: w + factor * g, PARAMS, g))

  after = jax.tree.map(lambda x: 0.1 * x / optax.tree.norm(at_probe(n)), at_probe(n))
  chex.assert_trees_all_close(run(msam(rho=0.2), clip), after, rtol=1e-5)
  chex.assert_trees_all_close(run(clip, msam(rho=0.2)), at_probe(0.1), rtol=1e-5)


@pytest.mark.parametrize('how', ['flax', 'orbax'])
def test_training_that_began_without_the_method_goes_on_with_it(how, tmp_path):
  """A checkpoint of Adam: its state takes its place in the chain's."""
  adam, tx = optax.adam(0.1), optax.chain(msam(rho=0.2), optax.adam(0.1))
  updates, old = adam.update(GRAD_FN(PARAMS), adam.init(PARAMS), PARAMS)
  params = optax.apply_updates(PARAMS, updates)
  if how == 'flax':
    saved = serialization.to_bytes((params, old))
    params, restored = serialization.from_bytes((PARAMS, adam.init(PARAMS)), saved)
  else:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / 'adam', (params, old))
      checkpointer.wait_until_finished()
      params, restored = checkpointer.restore(tmp_path / 'adam', (params, old))

  ascent, _ = tx.init(params)
  updates, _ = tx.update(GRAD_FN(params), (ascent, restored), params, grad_fn=GRAD_FN)

  at_probe = msam_optax.value_and_grad(lambda p: loss(p, DATA), rho=0.2)(params)[1]
  want, _ = adam.update(at_probe, old, params)
  chex.assert_trees_all_close(updates, want, rtol=1e-4)


def accumulated(k=3):
  """The mean of the sharpness-aware gradients of k batches, each its own probe."""
  gradients = []
  for i in range(k):
    grad = jax.grad(loss)
    g = grad(PARAMS, batch(i))
    n = optax.tree.norm(g)
    factor = 0.2 / (n * jnp.sqrt(1 + n**2))
    probe = jax.tree.map(lambda w, g: w + factor * g, PARAMS, g)
    gradients.append(grad(probe, batch(i)))
  return jax.tree.map(lambda *gs: sum(gs) / k, *gradients)


def test_accumulation_after_the_method():
  """``chain(msam, MultiSteps(optimizer))``: each micro-batch has its own probe."""
  inner = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=3)
  tx = optax.chain(msam(rho=0.2), inner.gradient_transformation())
  state = tx.init(PARAMS)
  for i in range(3):
    grad_fn = jax.grad(lambda p: loss(p, batch(i)))
    updates, state = tx.update(grad_fn(PARAMS), state, PARAMS, grad_fn=grad_fn)
  chex.assert_trees_all_close(
    updates, jax.tree.map(jnp.negative, accumulated()), rtol=1e-4, atol=1e-6
  )


def test_accumulation_of_the_drop_in():
  tx = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=3)
  state = tx.init(PARAMS)
  take = msam_optax.value_and_grad(loss, rho=0.2)
  for i in range(3):
    _, grads = take(PARAMS, batch(i))
    updates, state = tx.update(grads, state, PARAMS)
  chex.assert_trees_all_close(
    updates, jax.tree.map(jnp.negative, accumulated()), rtol=1e-4, atol=1e-6
  )


def test_accumulation_round_the_method_needs_the_whole_batch_in_grad_fn():
  """``MultiSteps(chain(msam, optimizer))`` is right if ``grad_fn`` has all batches."""
  tx = optax.MultiSteps(method(), every_k_schedule=3)
  mean_loss = lambda p: sum(loss(p, batch(i)) for i in range(3)) / 3
  state = tx.init(PARAMS)
  for i in range(3):
    updates, state = tx.update(
      jax.grad(loss)(PARAMS, batch(i)), state, PARAMS, grad_fn=jax.grad(mean_loss)
    )
  whole = method()
  grads = jax.grad(mean_loss)(PARAMS)
  exact, _ = whole.update(
    grads, whole.init(PARAMS), PARAMS, grad_fn=jax.grad(mean_loss)
  )
  chex.assert_trees_all_close(updates, exact, rtol=1e-4, atol=1e-6)
  assert optax.tree.get(state, 'slope') > 0
