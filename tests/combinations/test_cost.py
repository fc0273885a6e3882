"""What a step costs: products of matrices, memory, and messages between devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from benchmarks.common import hlo
from tests.combinations.maps import cpu
from tests.combinations.maps import mesh
from tests.combinations.problem import PARTS
from tests.combinations.truth import COMBINATIONS
from tests.combinations.ways import both_syncs
from tests.combinations.ways import drop_in
from tests.combinations.ways import every_combination
from tests.combinations.ways import WAYS
from tests.combinations.ways import ways


@pytest.mark.slow
@cpu
@ways('chain', 'compiled once')
@every_combination
def test_matrix_products_are_those_of_the_gradients(name, way):
  """Two gradients a step, or as many as there are probes and one; nothing besides."""

  def network(params, data):
    return jnp.mean((jnp.tanh(data @ params['a']) @ params['b']) ** 2)

  params = {'a': jnp.ones((16, 16)), 'b': jnp.ones((16, 4))}
  data = jnp.ones((8, 16))

  def products(f):
    compiled = jax.jit(f).lower(params, data).compile()
    return hlo.matrix_flops(hlo.read(compiled.as_text()))

  gradients = 1 + len(COMBINATIONS[name][2])
  got = products(WAYS[way](name, 'euclidean', loss=network))
  assert got == gradients * products(jax.value_and_grad(network))


@cpu
@pytest.mark.parametrize('shards', [None, 4], ids=['whole', 'micro-batches'])
def test_one_loop_keeps_no_gradient_that_is_not_asked_for(shards):
  """SAM needs the gradient at one probe alone: CR-SAM's program holds one more."""
  if jax.__version_info__ < (0, 8):
    pytest.skip('the compiler of older versions keeps what nothing uses')
  size = 1 << 16
  quartic = lambda w, x: jnp.sum(jnp.mean(jnp.sin(x * w[None]), 0) ** 2)

  def temporaries(name):
    value_and_grad_fn = drop_in(
      name, 'euclidean', quartic, compile_once=True, shards=shards
    )
    lowered = jax.jit(value_and_grad_fn).lower(jnp.ones(size), jnp.ones((8, size)))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  # One more, but for a few scalars.
  assert temporaries('cr_sam') - temporaries('sam') >= 0.99 * 4 * size


# Gradients that are summed over replicas, and in how many messages.
MESSAGES = {
  ('sam', 'own'): (1, 1),
  ('wsam', 'own'): (1, 1),
  ('gsam', 'own'): (2, 1),
  ('cr_sam', 'own'): (1, 1),
  ('sam', 'synced'): (2, 2),
  ('wsam', 'synced'): (2, 2),
  ('gsam', 'synced'): (2, 2),
  ('cr_sam', 'synced'): (2, 2),
}


def gradients_sent(step, size):
  """Gradients of ``size`` numbers that are summed, and messages that hold one."""
  inner = lambda w, x: step(w, x)[1]
  mapped = jax.shard_map(
    inner,
    mesh=mesh(i=PARTS),
    in_specs=(P(), P('i')),
    out_specs=P(),
    check_vma=False,
  )
  args = jnp.ones(size), jnp.ones((PARTS, size))
  program = hlo.read(jax.jit(mapped).lower(*args).compile().as_text())
  sent = [m for m in hlo.collectives(program) if m.kind == 'all-reduce']
  large = [m for m in sent if m.bytes >= 4 * size]
  assert len(sent) == len(hlo.collectives(program))
  # Beside them a few scalars at most: of slope, radius and the loss.
  assert (
    sum(m.bytes * m.times for m in sent)
    < 4 * size * (sum(m.bytes * m.times for m in large) // (4 * size)) + 4 * 8
  )
  total = sum(m.bytes * m.times for m in large) // (4 * size)
  return total, sum(m.times for m in large)


@cpu
@ways('chain')
@both_syncs
@every_combination
def test_what_replicas_send(name, sync, way):
  """No more than the formula needs, and never a mean twice."""
  quartic = lambda w, x: jnp.sum(jnp.mean(x, 0) * w**4)
  step = WAYS[way](name, loss=quartic, axis_name='i', sync_ascent=sync)
  want = MESSAGES[name, 'synced' if sync else 'own']
  if way == 'compiled once' and sync:
    # Each turn of the loop sends its own, since the first has to.
    turns = 1 + len(COMBINATIONS[name][2])
    want = (turns, turns)
  if want == (2, 1):
    want = gradients_sent(pair_of_means, size=256)  # Older compilers send it in two.
  assert gradients_sent(step, size=256) == want


def pair_of_means(w, x):
  a, b = jax.lax.pmean([w * x[0], w + x[0]], 'i')
  return None, a * b
