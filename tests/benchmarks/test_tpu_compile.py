"""What the TPU compiler makes of a step, on chips that need not be there.

Its own figures, so there is nothing to be disturbed. The model is small, a single
layer, so that it is compiled in seconds; `benchmarks.tpu_compile` has a large one.
"""

import functools
import importlib.util

import jax
import pytest

from benchmarks.common.steps import DROP_IN
from benchmarks.common.tables import markdown
from benchmarks.tpu_compile import report as tpu_report
from benchmarks.tpu_compile.model import Sizes

# There is a libtpu for Linux on x86-64 only.
if importlib.util.find_spec('libtpu') is None:
  pytest.skip('libtpu is not installed', allow_module_level=True)

from benchmarks.tpu_compile import __main__ as tpu_compile
from benchmarks.tpu_compile.__main__ import Cell
from benchmarks.tpu_compile.steps import CHIP_SHARDS
from benchmarks.tpu_compile.steps import DATA_PARALLEL
from benchmarks.tpu_compile.steps import FULLY_SHARDED
from benchmarks.tpu_compile.steps import GROUPED
from benchmarks.tpu_compile.steps import MICROBATCHES
from benchmarks.tpu_compile.steps import ONCE
from benchmarks.tpu_compile.steps import ONE_GRADIENT
from benchmarks.tpu_compile.steps import OWN
from benchmarks.tpu_compile.steps import OWN_ONCE
from benchmarks.tpu_compile.steps import OWN_SHARDS
from benchmarks.tpu_compile.steps import SHARDS
from benchmarks.tpu_compile.steps import SHARED_SHARDS
from benchmarks.tpu_compile.steps import SHARED_SHARDS_ONCE

pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]


@pytest.fixture(autouse=True)
def without_flags_of_the_cpu(monkeypatch, compile_as_users_do):
  """On them libtpu ends the process."""
  monkeypatch.delenv('XLA_FLAGS', raising=False)


SMALL = Sizes(layers=1, width=512, vocabulary=8192, length=512)
# Messages are the same few whatever the size.
TINY = Sizes(layers=1, width=256, vocabulary=4096, length=256)


@functools.cache
def weigh(topology, layout, method, sizes=SMALL):
  return tpu_compile.weigh(Cell(topology, layout, method), sizes)


def sent(program, *kinds):
  """Bytes of a kind of message in a step."""
  found = program['messages']
  return sum(found.get(kind, {'bytes': 0})['bytes'] for kind in kinds)


def test_fully_sharded_and_compiled_once_is_twice_a_plain_step():
  """Twice the products and messages, in the memory and the code of one gradient."""
  adam, once = (weigh('v5e:4x4', FULLY_SHARDED, m) for m in ('adam', ONCE))
  assert once['temporaries'] <= 1.25 * adam['temporaries']
  # Of a single layer the ascent is a larger part than of many.
  assert once['code'] <= 1.2 * adam['code']
  assert once['flops'] == pytest.approx(2 * adam['flops'], rel=1e-3)
  for kinds in (
    ('all-gather', 'all-to-all', 'collective-permute'),
    ('all-reduce', 'reduce-scatter'),
  ):
    assert sent(once, *kinds) <= 2.001 * sent(adam, *kinds)
  extra = (
    once['messages']['scalar']['count']
    - 2 * adam['messages'].get('scalar', {'count': 0})['count']
  )
  assert 0 < extra <= 10


@pytest.mark.parametrize('method', ONE_GRADIENT)
def test_fully_sharded_with_one_gradient_is_a_plain_step(method):
  """As many products and sums, and but for some scalars no message more."""
  adam, ours = (weigh('v5e:4x4', FULLY_SHARDED, m) for m in ('adam', method))
  assert ours['temporaries'] <= 1.1 * adam['temporaries']
  assert ours['flops'] == adam['flops']
  for kinds in (
    ('all-gather', 'all-to-all', 'collective-permute'),
    ('all-reduce', 'reduce-scatter'),
  ):
    # A scalar may be sent along with an array.
    assert abs(sent(ours, *kinds) - sent(adam, *kinds)) <= 16
  extra = ours['messages']['scalar']['count'] - adam['messages']['scalar']['count']
  assert 0 < extra <= 5


def test_data_parallel_gradients_are_summed_once_or_twice():
  """On its own each chip goes uphill without a word; together they sum twice."""
  adam, own, synced = (
    sent(weigh('v5e:4x4', DATA_PARALLEL, m, TINY), 'all-reduce', 'reduce-scatter')
    for m in ('adam', OWN, ONCE)
  )
  assert own == pytest.approx(adam, rel=1e-3)
  assert synced == pytest.approx(2 * adam, rel=1e-3)
  messages = weigh('v5e:4x4', DATA_PARALLEL, OWN, TINY)['messages']
  assert set(messages) <= {'all-reduce', 'reduce-scatter', 'scalar'}


def test_micro_batches_are_added_up_on_each_chip_before_the_sum_over_chips():
  """One sum for each pass, and one more for each ascent that all chips share.

  But for the gradients of positions: all sequences have the same, so that XLA sums the
  rows before it makes the gradient, in each micro-batch.
  """
  kinds = ('all-reduce', 'reduce-scatter')
  programs = {
    m: weigh('v5e:4x4', DATA_PARALLEL, m, TINY) for m in ('adam', *MICROBATCHES)
  }
  adam = sent(programs['adam'], *kinds)
  positions = 4 * TINY.length * TINY.width
  for method, sums, of_positions in (
    (SHARED_SHARDS, 2, 2 * SHARDS),
    (SHARED_SHARDS_ONCE, 2, 2 * SHARDS),
    (OWN_SHARDS, SHARDS + 1, 2 * SHARDS),
    (CHIP_SHARDS, 1, 1),
  ):
    expected = sums * adam + (of_positions - sums) * positions
    assert sent(programs[method], *kinds) == pytest.approx(expected, rel=1e-3), method
    assert programs[method]['flops'] == pytest.approx(
      2 * programs['adam']['flops'], rel=1e-3
    )


@pytest.mark.skipif(
  jax.__version_info__ < (0, 8),
  reason='jaxlib 0.7.0 cannot read the groups of chips in programs of a newer libtpu',
)
def test_groups_that_go_uphill_alone_send_each_other_no_more_than_plain_training():
  """Only the gradient at the probe crosses, each chip's part of it."""
  adam, own = (weigh('v5e:4x4', GROUPED, m, TINY) for m in ('adam', OWN_ONCE))
  assert 0 < sent(own, 'between groups') <= sent(adam, 'between groups')
  assert own['flops'] == pytest.approx(2 * adam['flops'], rel=1e-3)


def test_256_chips_need_no_more_memory_each_than_16():
  few, many = (
    weigh(topology, FULLY_SHARDED, ONCE)['temporaries']
    for topology in ('v5e:4x4', 'v5e:16x16')
  )
  assert many <= few


def test_what_is_compiled_is_stored_and_not_compiled_again(tmp_path, monkeypatch):
  methods = ('adam', DROP_IN, OWN)
  cells = [Cell('v5e:4x4', FULLY_SHARDED, method) for method in methods]
  calls = []

  def fake(cell, sizes):
    calls.append(cell)
    if cell.method == OWN:
      return {'needs_gb': 41.25}
    gathered = {'all-gather': {'count': 3, 'bytes': 2_000_000}}
    figures = ('flops', 'bytes', 'temporaries', 'arguments', 'code', 'compile_s')
    return {**dict.fromkeys((*figures, 'compile_cpu_s'), 1e9), 'messages': gathered}

  monkeypatch.setattr(tpu_compile, 'weigh', fake)
  tpu_compile.run(cells[:1], SMALL, tmp_path)
  results = tpu_compile.run(cells, SMALL, tmp_path)
  assert calls == cells
  table = markdown(tpu_report.report(results))
  assert f'| {DROP_IN} | 0.001 (×1.00) | 1.0 (×1.00) | 1,000 (×1.00)' in table
  assert '| adam | 2 in 3 |  |  | 0 |' in table
  assert f'| {OWN} |  |  | does not fit: 41.2 GB |  |  |' in table
  tpu_compile.run(cells[:1], SMALL._replace(layers=2), tmp_path)
  assert calls == [*cells, cells[0]]
