"""Sparse SAM's metric, against a sort in NumPy."""

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import msam_optax


def tree_of(rng, scale=1.0):
  draw = lambda *shape: (scale * rng.normal(size=shape)).astype(np.float32)
  return {'kernel': draw(8, 3), 'bias': draw(4), 'temperature': draw()}


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def by_sort(g, information, sparsity):
  """``g/‖g‖`` at the entries with the largest information."""
  count = max(1, int(np.floor((1 - sparsity) * g.size)))
  chosen = information >= np.sort(information)[-count]
  wide = g.astype(np.float64)
  return np.where(chosen, wide / np.sqrt(wide @ wide), 0.0)


@jax.jit
def ascent_of(grads, sparsity):
  metric = msam_optax.sparse(sparsity=sparsity)
  return metric.ascend(grads, metric.init(grads), grads)[0]


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 100),
  sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999]),
  scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_the_largest_of_the_whole_tree_move(seed, sparsity, scale):
  grads = tree_of(np.random.default_rng(seed), np.float32(scale))
  ascent = ascent_of(grads, sparsity)
  expected = by_sort(flat(grads), np.abs(flat(grads)), sparsity)
  np.testing.assert_allclose(flat(ascent.direction), expected, rtol=1e-5, atol=1e-7)
  wide = flat(grads).astype(np.float64)
  np.testing.assert_allclose(ascent.slope, wide @ expected, rtol=1e-5)


def test_the_fisher_information_is_that_of_examples():
  rng = np.random.default_rng(0)
  examples = jax.tree.map(lambda *x: jnp.stack(x), *(tree_of(rng) for _ in range(5)))
  grads = jax.tree.map(lambda x: x.mean(0), examples)
  metric = msam_optax.sparse(sparsity=0.7)
  ascent, _ = metric.ascend(grads, metric.init(grads), grads, gradients=examples)
  squares = jax.tree.map(lambda x: np.square(x, dtype=np.float64).mean(0), examples)
  expected = by_sort(flat(grads), flat(squares), 0.7)
  np.testing.assert_allclose(flat(ascent.direction), expected, rtol=1e-5, atol=1e-7)
  assert np.any(expected != by_sort(flat(grads), np.abs(flat(grads)), 0.7))


def test_gradients_of_examples_are_those_of_all_leaves():
  """Under a mask the metric sees a part of them; without their axis they are none."""
  rng = np.random.default_rng(0)
  examples = jax.tree.map(lambda *x: jnp.stack(x), *(tree_of(rng) for _ in range(5)))
  grads = jax.tree.map(lambda x: x.mean(0), examples)
  mask = {'kernel': True, 'bias': False, 'temperature': True}
  tx = msam_optax.sparse_sam(0.3, 0.6, mask=mask)

  def update(tx, grads, examples):
    state = tx.init(grads)
    return tx.update(grads, state, grads, grad_fn=lambda w: w, gradients=examples)[0]

  got = update(tx, grads, examples)
  kept = lambda tree: {name: tree[name] for name in ('kernel', 'temperature')}
  expected = update(msam_optax.sparse_sam(0.3, 0.6), kept(grads), kept(examples))
  chex.assert_trees_all_close(kept(got), expected, rtol=1e-6)
  with pytest.raises(ValueError, match=r"at \['bias'\] the gradient has the shape"):
    update(msam_optax.sparse_sam(), grads, grads)


@pytest.mark.parametrize('sparsity', [-0.5, 1.0, np.nan])
def test_a_sparsity_out_of_range_at_run_time_is_seen(sparsity):
  grads = tree_of(np.random.default_rng(0))
  assert np.isnan(flat(ascent_of(grads, jnp.float32(sparsity)).direction)).all()


def test_the_choice_is_kept_between_two():
  metric = msam_optax.sparse(sparsity=0.5, every=3)
  ascend = jax.jit(metric.ascend)
  first, other = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([4.0, 3.0, 2.0, 1.0])
  state, moved = metric.init(first), []
  for grads in (first, other, other, other):
    ascent, state = ascend(grads, state, first)
    moved.append((np.asarray(ascent.direction) > 0).tolist())
  assert moved == 3 * [[False, False, True, True]] + [[True, True, False, False]]


def test_no_choice_is_made_of_what_is_not_finite():
  metric = msam_optax.sparse(sparsity=0.5, every=1)
  w = jnp.array([1.0, 2.0])
  _, state = metric.ascend(w, metric.init(w), w)
  for bad in (jnp.array([jnp.inf, 1.0]), jnp.zeros(2)):
    ascent, after = metric.ascend(bad, state, w)
    chex.assert_trees_all_equal(after.chosen, state.chosen)
    np.testing.assert_array_equal(ascent.direction, np.zeros(2))


@pytest.mark.cpu
@pytest.mark.slow
def test_shards_choose_as_the_whole_does():
  rng = np.random.default_rng(1)
  grads = tree_of(rng)
  specs = {'kernel': P('i'), 'bias': P('i'), 'temperature': P()}
  tx = msam_optax.sparse_sam(0.3, 0.6, param_specs=specs)
  alone = msam_optax.sparse_sam(0.3, 0.6)

  def update(tx):
    grad_fn = lambda w: jax.tree.map(lambda w: w + 0.5 * w**3, w)
    return lambda w: tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('i',))
  sharded = jax.shard_map(update(tx), mesh=mesh, in_specs=(specs,), out_specs=specs)
  got, expected = jax.jit(sharded)(grads), update(alone)(grads)
  chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.cpu
def test_replicas_choose_on_their_own():
  """In a `shard_map` that checks what differs from device to device."""
  rows = jnp.array([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 1.0, 2.0]])
  tx = msam_optax.sparse_sam(0.3, 0.5, axis_name='i')

  def update(w, rows):
    grad_fn = lambda w: w + rows[0]
    return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('i',))
  mapped = jax.shard_map(update, mesh=mesh, in_specs=(P(), P('i')), out_specs=P())
  got = jax.jit(mapped)(jnp.zeros(4), rows)
  wide = np.asarray(rows, np.float64)
  moved = [0.3 * by_sort(g, np.abs(g), 0.5) for g in wide]
  np.testing.assert_allclose(got, np.mean(wide + moved, axis=0), rtol=1e-6)


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    ({'sparsity': 1.0}, ValueError, '`sparsity` must be less than 1'),
    ({'sparsity': -0.5}, ValueError, '`sparsity` must be finite and >= 0'),
    ({'every': 0}, ValueError, '`every` must be a whole number >= 1'),
    ({'base': None}, TypeError, '`base` must be a Metric'),
  ],
)
def test_what_is_wrong_is_named(arguments, error, message):
  with pytest.raises(error, match=message):
    msam_optax.sparse(**arguments)
