"""The formula of each combination over micro-batches, weighted or not."""

import jax
import numpy as np
import pytest

from tests.combinations.problem import assert_close
from tests.combinations.problem import counted_data
from tests.combinations.problem import counted_loss
from tests.combinations.problem import counts_with
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.truth import strided
from tests.combinations.truth import truth
from tests.combinations.ways import both_orders
from tests.combinations.ways import both_syncs
from tests.combinations.ways import drop_in
from tests.combinations.ways import names
from tests.combinations.ways import passes


@pytest.mark.slow
@both_syncs
@both_orders
@passes
@names('gsam')
def test_micro_batches(name, once, vectorize, sync):
  """What is combined are the means over all micro-batches."""
  value_and_grad_fn = drop_in(
    name, shards=4, vectorize_shards=vectorize, sync_ascent=sync, compile_once=once
  )
  value, grads = jax.jit(value_and_grad_fn)(make_params(), make_data())
  want_value, want, *_ = truth(name, cuts=strided(4), synced=sync)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close(grads, want)


@both_syncs
@passes
@names('wsam')
def test_examples_count_by_their_weights(name, once, sync):
  """One of four micro-batches is empty, and the others differ."""
  counts = counts_with(strided(4)[1])
  value_and_grad_fn = drop_in(
    name,
    loss=counted_loss,
    shards=4,
    sync_ascent=sync,
    compile_once=once,
    has_weight=True,
    loss_scale=1024.0,
  )
  value, grads = jax.jit(value_and_grad_fn)(make_params(), counted_data(counts))
  want_value, want, *_ = truth(name, cuts=strided(4), synced=sync, counts=counts)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close(grads, want)
