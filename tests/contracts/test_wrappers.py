"""Inside, around and beside every wrapper of Optax: right, or an error that helps."""

import chex
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests import by_hand
from tests.methods import cases
from tests.methods import DEFAULT
from tests.methods import drop_in
from tests.methods import every_kind_slowly
from tests.methods import is_default
from tests.methods import KINDS
from tests.methods import METHODS
from tests.methods import OTHER_KINDS
from tests.methods import transformation
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


def chain(method='msam'):
  return optax.chain(transformation(method), optax.sgd(0.1))


def step(tx, params=PARAMS, **kwargs):
  """The first update, jitted, as a training step does it."""
  grads = GRAD_FN(params)
  run = jax.jit(lambda g, s, p: tx.update(g, s, p, **kwargs))
  return run(grads, tx.init(params), params)[0]


def expected(method='msam'):
  """``−0.1`` times the gradient by hand."""
  update = by_hand.update(method, PARAMS, [GRAD_FN])
  return jax.tree.map(lambda u: np.float32(-0.1) * u, update)


def always(*_, **__):
  return True


FORWARDING = {
  'chain': lambda tx, descent: optax.chain(optax.identity(), optax.chain(tx, descent)),
  'named_chain': lambda tx, descent: optax.named_chain(
    ('ascent', tx), ('descent', descent)
  ),
  'apply_if_finite': lambda *parts: optax.apply_if_finite(
    optax.chain(*parts), max_consecutive_errors=3
  ),
  'conditionally_transform': lambda *parts: optax.conditionally_transform(
    optax.chain(*parts), always
  ),
  'conditionally_mask': lambda *parts: optax.conditionally_mask(
    optax.chain(*parts), always
  ),
  'masked-all': lambda *parts: optax.masked(
    optax.chain(*parts), jax.tree.map(lambda _: True, PARAMS)
  ),
  'MultiSteps': lambda *parts: optax.MultiSteps(
    optax.chain(*parts), every_k_schedule=1
  ),
}


@pytest.mark.parametrize(
  ('method', 'wrapper'), cases(KINDS, FORWARDING, plain=is_default)
)
def test_inside_a_wrapper_that_forwards(method, wrapper):
  tx = FORWARDING[wrapper](transformation(method), optax.sgd(0.1))
  chex.assert_trees_all_close(
    step(tx, grad_fn=GRAD_FN), expected(method), rtol=1e-5, atol=1e-7
  )


@every_kind_slowly
def test_inside_inject_hyperparams(method):
  """Its radius, given as a number, is an array of the state."""
  row = METHODS[method]
  injected = optax.inject_hyperparams(row.make)(rho=row.rho)
  tx = optax.chain(injected, optax.sgd(0.1))
  chex.assert_trees_all_close(
    step(tx, grad_fn=GRAD_FN), expected(method), rtol=1e-5, atol=1e-7
  )


def test_inside_schedule_free():
  """It sees the gradient at the probe, as if that had come in from outside."""
  wrap = lambda tx: optax.contrib.schedule_free(tx, learning_rate=0.1)
  outside = wrap(optax.sgd(0.1))
  at_probe = jax.tree.map(lambda u: -10 * u, expected())
  from_outside, _ = outside.update(at_probe, outside.init(PARAMS), PARAMS)
  inside = step(wrap(chain()), grad_fn=GRAD_FN)
  chex.assert_trees_all_close(inside, from_outside, rtol=1e-4, atol=1e-6)


def test_inside_mechanize():
  """Its first steps are too small to compare, so a run of it is looked at."""
  tx = optax.contrib.mechanize(chain())

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
    lambda: optax.masked(chain(), HIDDEN),
    lambda: optax.partition({'train': chain(), 'freeze': optax.set_to_zero()}, LABELS),
    lambda: optax.transforms.selective_transform(chain(), freeze_mask=HIDDEN),
  ],
  ids=['masked', 'partition', 'selective_transform'],
)
def test_inside_a_wrapper_that_takes_leaves_away(wrap):
  with pytest.raises(ValueError, match=r'msam\(mask=mask\).*msam_optax.value_and_grad'):
    step(wrap(), grad_fn=GRAD_FN)


def test_inside_flatten():
  with pytest.raises(TypeError, match='string indexing') as error:
    step(optax.flatten(chain()), grad_fn=GRAD_FN)
  assert 'stands inside optax.flatten: put it before' in error.value.__notes__[0]


@pytest.mark.parametrize(
  'wrap',
  [
    lambda: optax.chain(optax.MultiSteps(chain(), 2).gradient_transformation()),
    lambda: optax.contrib.split_real_and_imaginary(chain()),
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
  tx = wrap(chain())
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


# What is behind a method sees a gradient, whatever the method.
every_method_before_some = pytest.mark.parametrize(
  ('method', 'name'),
  cases(DEFAULT, INNER) + cases(OTHER_KINDS, ('MultiSteps',), plain=is_default),
)


@pytest.mark.slow
@every_method_before_some
def test_before_every_wrapper_in_a_chain(method, name):
  """``chain(msam, wrapper(optimizer))`` gives the wrapper the gradient at the probe."""
  wrapped = INNER[name](optax.sgd(0.1))
  at_probe = jax.tree.map(lambda u: -10 * u, expected(method))
  alone, _ = wrapped.update(at_probe, wrapped.init(PARAMS), PARAMS)
  chained = step(optax.chain(transformation(method), wrapped), grad_fn=GRAD_FN)
  chex.assert_trees_all_close(chained, alone, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@every_method_before_some
def test_drop_in_works_with_every_wrapper(method, name):
  value_and_grad_fn = drop_in(method, lambda p: loss(p, DATA))
  value, grads = value_and_grad_fn(PARAMS)
  wrapped = INNER[name](optax.sgd(0.1))
  got, _ = wrapped.update(grads, wrapped.init(PARAMS), PARAMS)
  chained = step(optax.chain(transformation(method), wrapped), grad_fn=GRAD_FN)
  chex.assert_trees_all_close(got, chained, rtol=1e-5, atol=1e-7)
  chex.assert_trees_all_equal(value, loss(PARAMS, DATA))


@every_kind_slowly
def test_before_lookahead(method):
  """Gradients are taken at the fast parameters of its two sets."""
  params = optax.LookaheadParams.init_synced(PARAMS)
  inner = optax.lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5)
  tx = optax.chain(transformation(method), inner)
  updates, _ = tx.update(GRAD_FN(PARAMS), tx.init(params), params, grad_fn=GRAD_FN)
  chex.assert_trees_all_close(updates.fast, expected(method), rtol=1e-5, atol=1e-7)


@every_kind_slowly
def test_drop_in_with_lookahead(method):
  params = optax.LookaheadParams.init_synced(PARAMS)
  tx = optax.lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5)
  _, grads = drop_in(method, lambda p: loss(p, DATA))(params.fast)
  updates, _ = tx.update(grads, tx.init(params), params)
  chex.assert_trees_all_close(updates.fast, expected(method), rtol=1e-5, atol=1e-7)


def test_clipping_before_the_method_changes_its_radius_and_after_it_does_not():
  """Monge SAM's is shorter the longer the gradient, and clipping shortens that."""
  clip = optax.clip_by_global_norm(0.1)
  run = lambda *parts: step(optax.chain(*parts), grad_fn=GRAD_FN)
  g = GRAD_FN(PARAMS)
  n = float(optax.tree.norm(g))
  assert n > 1

  def at_probe(slope):
    factor = METHODS['msam'].rho / (n * np.sqrt(1 + slope**2))
    return GRAD_FN(jax.tree.map(lambda w, g: w + factor * g, PARAMS, g))

  after = jax.tree.map(lambda x: 0.1 * x / optax.tree.norm(at_probe(n)), at_probe(n))
  chex.assert_trees_all_close(run(transformation('msam'), clip), after, rtol=1e-5)
  chex.assert_trees_all_close(
    run(clip, transformation('msam')), at_probe(0.1), rtol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize('how', ['flax', 'orbax'])
@every_kind_slowly
def test_training_that_began_without_the_method_goes_on_with_it(method, how, tmp_path):
  """A checkpoint of Adam: its state takes its place in the chain's."""
  adam = optax.adam(0.1)
  tx = optax.chain(transformation(method), optax.adam(0.1))
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

  ascent = tx.init(params)[0]
  updates, _ = tx.update(GRAD_FN(params), (ascent, restored), params, grad_fn=GRAD_FN)

  at_probe = drop_in(method, lambda p: loss(p, DATA))(params)[1]
  want, _ = adam.update(at_probe, old, params)
  chex.assert_trees_all_close(updates, want, rtol=1e-4)


def accumulated(method, k=3):
  """The mean of the sharpness-aware gradients of k batches, each its own probe."""
  updates = [
    by_hand.update(method, PARAMS, [lambda w, i=i: jax.grad(loss)(w, batch(i))])
    for i in range(k)
  ]
  return jax.tree.map(lambda *us: sum(us) / np.float32(k), *updates)


@every_kind_slowly
def test_accumulation_after_the_method(method):
  """``chain(msam, MultiSteps(optimizer))``: each micro-batch has its own probe."""
  inner = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=3)
  tx = optax.chain(transformation(method), inner.gradient_transformation())

  @jax.jit
  def run(state):
    updates = None
    for i in range(3):
      grad_fn = jax.grad(lambda p: loss(p, batch(i)))
      updates, state = tx.update(grad_fn(PARAMS), state, PARAMS, grad_fn=grad_fn)
    return updates

  updates = run(tx.init(PARAMS))
  chex.assert_trees_all_close(
    updates, jax.tree.map(jnp.negative, accumulated(method)), rtol=1e-4, atol=1e-6
  )


@pytest.mark.slow
@every_kind_slowly
def test_accumulation_of_the_drop_in(method):
  tx = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=3)
  value_and_grad_fn = drop_in(method, loss)

  @jax.jit
  def run(state):
    updates = None
    for i in range(3):
      _, grads = value_and_grad_fn(PARAMS, batch(i))
      updates, state = tx.update(grads, state, PARAMS)
    return updates

  updates = run(tx.init(PARAMS))
  chex.assert_trees_all_close(
    updates, jax.tree.map(jnp.negative, accumulated(method)), rtol=1e-4, atol=1e-6
  )


@pytest.mark.slow
@every_kind_slowly
def test_accumulation_round_the_method_needs_the_whole_batch_in_grad_fn(method):
  """``MultiSteps(chain(msam, optimizer))`` is right if ``grad_fn`` has all batches."""
  tx = optax.MultiSteps(chain(method), every_k_schedule=3)
  mean_loss = lambda p: sum(loss(p, batch(i)) for i in range(3)) / 3

  @jax.jit
  def run(state):
    updates = None
    for i in range(3):
      updates, state = tx.update(
        jax.grad(loss)(PARAMS, batch(i)), state, PARAMS, grad_fn=jax.grad(mean_loss)
      )
    return updates, state

  updates, state = run(tx.init(PARAMS))
  whole = chain(method)
  grads = jax.grad(mean_loss)(PARAMS)
  update = jax.jit(lambda *args: whole.update(*args, grad_fn=jax.grad(mean_loss)))
  exact, _ = update(grads, whole.init(PARAMS), PARAMS)
  chex.assert_trees_all_close(updates, exact, rtol=1e-4, atol=1e-6)
  assert optax.tree.get(state, 'slope') > 0
