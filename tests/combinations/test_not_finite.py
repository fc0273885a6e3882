"""Numbers that are not finite, and very large or small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax
from tests.combinations.maps import assert_on_all
from tests.combinations.maps import cpu
from tests.combinations.problem import assert_close
from tests.combinations.problem import flat
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.problem import PARTS
from tests.combinations.truth import COMBINATIONS
from tests.combinations.truth import gsam
from tests.combinations.ways import both_syncs
from tests.combinations.ways import chain_of
from tests.combinations.ways import every_combination
from tests.combinations.ways import every_way
from tests.combinations.ways import names
from tests.combinations.ways import WAYS
from tests.combinations.ways import ways


def spoilt_loss(w, data):
  """A loss whose slopes at the params, uphill and downhill are data.

  Where ``w[0]`` has moved from 1 says which of the three it is.
  """
  moved = jax.lax.stop_gradient(w[0]) - 1.0
  slopes = jnp.where(
    moved == 0, data[0, 0], jnp.where(moved > 0, data[0, 1], data[0, 2])
  )
  return jnp.sum(jax.lax.stop_gradient(slopes) * w)


PASSES = {'clean': 0, 'uphill': 1, 'downhill': 2}


@cpu
@both_syncs
@ways('chain')
@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize(
  ('name', 'where'),
  [(name, where) for name in COMBINATIONS for where in ('clean', 'uphill')]
  + [('cr_sam', 'downhill')],
)
def test_one_bad_number_is_seen_on_all_replicas(name, where, bad, way, sync):
  """In one pass of one replica; no replica may be left with a finite update."""
  rng = np.random.default_rng(5)
  slopes = rng.uniform(0.5, 1.5, size=(PARTS, 1, 3, 4)).astype(np.float32)
  slopes[2, 0, PASSES[where], 1] = bad
  step = spoilt_step(name, way, sync)
  finite, updates = step(jnp.ones(4), jnp.asarray(slopes))
  np.testing.assert_array_equal(updates, np.broadcast_to(updates[:1], updates.shape))
  assert not np.isfinite(updates[0, 1])
  assert not finite.any()


@functools.cache
def spoilt_step(name, way, sync):
  """``(params, slopes) -> (finite, updates)``, compiled once for all bad numbers."""
  kwargs = {'axis_name': 'i', 'sync_ascent': sync}
  if way != 'chain':
    value_and_grad_fn = WAYS[way](name, loss=spoilt_loss, **kwargs)
    step = lambda w, data: (jnp.array(False), value_and_grad_fn(w, data)[1])
  else:
    tx = chain_of(name, **kwargs)

    def step(w, data):
      grad_fn = jax.grad(lambda w: spoilt_loss(w, data))
      updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      return state.finite, updates

  return jax.jit(jax.vmap(step, axis_name='i', in_axes=(None, 0)))


@cpu
@both_syncs
@every_combination
def test_a_bad_clean_gradient_is_seen_where_the_probes_are_good(name, sync):
  """As after an overflow in one pass alone: what one replica has lost is lost."""
  tx = chain_of(name, axis_name='i', sync_ascent=sync)
  w = jnp.ones(4)

  def update(g):
    updates, state = tx.update(g, tx.init(w), w, grad_fn=lambda probe: 2 * probe)
    return state.finite, updates

  grads = jnp.ones((PARTS, 4)).at[2, 1].set(jnp.nan)
  finite, updates = jax.jit(jax.vmap(update, axis_name='i'))(grads)
  np.testing.assert_array_equal(updates, np.broadcast_to(updates[:1], updates.shape))
  assert not np.isfinite(updates[0, 1])
  assert not finite.any()


@every_way
@names('gsam')
def test_bad_slopes_that_are_not_bad_are_combined(name, way):
  """The loss of the test before, with numbers that are finite: by the formula."""
  rng = np.random.default_rng(5)
  slopes = rng.uniform(0.5, 1.5, size=(PARTS, 1, 3, 4)).astype(np.float32)
  finite, updates = spoilt_step(name, way, False)(jnp.ones(4), jnp.asarray(slopes))
  assert finite.all() == (way == 'chain')
  means = slopes.astype(np.float64).mean((0, 1))
  _, formula, scales = COMBINATIONS[name]
  assert_on_all(updates, formula(*means[: 1 + len(scales)]))


@pytest.mark.parametrize('size', [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize('other', [1e-3, 1.0, 1e3])
def test_the_surrogate_gap_of_very_large_and_small_gradients(size, other):
  """Squares over- and underflow in float32; the update keeps its direction."""
  rng = np.random.default_rng(6)
  g = (size * other * rng.normal(size=7)).astype(np.float32)
  g_probe = (size * rng.normal(size=7)).astype(np.float32)
  got, _ = msam_optax.surrogate_gap(0.6).combine(
    (jnp.asarray(g), jnp.asarray(g_probe)), (), msam_optax.LOCAL
  )
  want = gsam(*(x.astype(np.float64) / size for x in (g, g_probe)))
  assert_close(np.asarray(got, np.float64) / size, want)


@every_way
@names('gsam')
def test_a_zero_gradient_is_a_zero_update(name, way):
  flat_loss = lambda params, data: (
    0.0 * jnp.sum(params['a']) + 0.0 * jnp.sum(params['b'])
  )
  _, updates = WAYS[way](name, loss=flat_loss)(make_params(), make_data())
  np.testing.assert_array_equal(flat(updates), np.zeros(5))
