"""The benchmarks run, and what a step may cost."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.common import networks as cost_models
from benchmarks.common import steps as cost_steps
from benchmarks.cost import __main__ as cost
from benchmarks.demo import __main__ as demo
from benchmarks.demo import data as demo_data
from benchmarks.demo import report as demo_report

pytestmark = pytest.mark.standard_promotion

NAMES = (cost.HAND, cost.OPAQUE, *cost.OURS)
SMALL = {
  'transformer': lambda: cost_models.transformer(width=64, layers=1),
  'conv net': lambda: cost_models.conv_net(layers=2),
}


def assert_bars_hold(problem, names):
  """XLA's own figures, so there is nothing to be disturbed."""
  bars = cost.check_bars(cost.weigh(problem, names))
  assert {bar['step'] for bar in bars} == {*names} & {*cost.OURS}
  exceeded = [bar for bar in bars if not bar['holds']]
  assert not exceeded


@pytest.mark.cpu
@pytest.mark.parametrize(
  'name', [pytest.param('conv net', marks=pytest.mark.slow), 'transformer']
)
def test_a_step_costs_what_two_gradients_cost(name):
  assert_bars_hold(SMALL[name](), (cost.HAND, cost.OPAQUE, cost.CHAIN))


@pytest.mark.slow
@pytest.mark.parametrize('name', cost.PROBLEMS)
def test_a_step_of_the_benchmark_costs_what_two_gradients_cost(name):
  assert_bars_hold(cost.PROBLEMS[name](), NAMES)


def test_a_bar_notices_what_exceeds_it():
  figures = {
    name: dict.fromkeys(('flops', 'temporaries', 'bytes'), 1) for name in NAMES
  }
  for figure in figures.values():
    figure['state_beyond_adam'] = 0
  assert all(bar['holds'] for bar in cost.check_bars(figures))
  figures[cost.DROP_IN]['flops'] = 1.02
  figures[cost.CHAIN]['state_beyond_adam'] = 1001
  exceeded = [bar for bar in cost.check_bars(figures) if not bar['holds']]
  assert [(bar['step'], bar['figure']) for bar in exceeded] == [
    (cost.DROP_IN, 'flops'),
    (cost.CHAIN, 'state_beyond_adam'),
  ]


@pytest.mark.parametrize('name', cost.OURS)
def test_steps_that_are_compared_take_the_same_step(name):
  def loss(params, batch):
    return jnp.mean(jnp.tanh(batch @ params['w'] + params['b']) ** 2)

  problem = cost_models.Problem(
    loss,
    {'w': jnp.linspace(-1.0, 2.0, 12).reshape(4, 3), 'b': jnp.arange(3.0)},
    jnp.linspace(-2.0, 1.0, 20).reshape(5, 4),
  )

  def first_step(key):
    step = cost_steps.STEPS[key](problem.loss)
    carry = (problem.params, step.tx.init(problem.params))
    (params, opt_state), value = jax.jit(step.run)(carry, problem.batch)
    return params, optax.tree.get(opt_state, 'mu'), value

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    first_step(name),
    first_step(cost.HAND),
  )


@pytest.mark.slow
def test_cost_writes_its_figures(tmp_path, capsys):
  assert cost.main(['--quick', '--out', str(tmp_path)]) == 0
  results = json.loads((tmp_path / 'cost.json').read_text())
  assert results['environment']['jax'] == jax.__version__
  for problem in results['problems'].values():
    assert set(problem['figures']) == set(cost_steps.STEPS)
    for figures in problem['figures'].values():
      assert figures['flops'] > 0
      assert figures['step_ms'] > 0
  printed, table = capsys.readouterr().out, (tmp_path / 'cost.md').read_text()
  for name in cost_steps.STEPS:
    assert name in printed
    assert f'| {name} |' in table


@pytest.mark.slow
def test_demo_writes_numbers_and_picture(tmp_path, capsys):
  demo.main(['--quick', '--out', str(tmp_path)])
  results = json.loads((tmp_path / 'demo.json').read_text())
  methods = [row['method'] for row in results['rows']]
  assert methods == ['Adam', *['SAM'] * 2, *['Monge SAM'] * 2, *[demo.MATCHED] * 2]
  for row in results['rows']:
    assert 0 <= row['test']['mean'] <= 1
    assert row['factor']['mean'] >= 1
    assert len(row['test']['runs']) == len(results['settings']['seeds'])
    if row['method'] != 'Adam':
      assert row['rise']['mean'] > 0
  assert set(results['best']) == set(methods)
  assert (tmp_path / 'demo.png').read_bytes().startswith(b'\x89PNG')
  printed, table = capsys.readouterr().out, (tmp_path / 'demo.md').read_text()
  assert 'Monge SAM' in printed
  assert all(sentence in table for sentence in results['findings'])


def test_demo_matches_the_radius_of_monge_sam():
  summary = {'mean': 0.4, 'sd': 0.0, 'runs': [0.4]}
  rows = [{'method': 'Monge SAM', 'rho': 0.5, 'shrink': summary}]
  assert list(demo._matched(rows)) == [demo.Cell(demo.MATCHED, 0.5, 0.2)]


def test_demo_findings_follow_the_numbers():
  def row(method, rho, *runs):
    test = {'mean': float(np.mean(runs)), 'sd': 0.01, 'runs': list(runs)}
    return {'method': method, 'rho': rho, 'test': test}

  rows = [row('Adam', None, 0.80, 0.80, 0.80)]
  for method, near, far in [
    ('SAM', 0.85, 0.70),
    ('Monge SAM', 0.95, 0.90),
    (demo.MATCHED, 0.95, 0.60),
  ]:
    rows += [row(method, 0.1, near, near, near + 0.01), row(method, 1.0, far, far, far)]
  compared, fell_off, control = demo_report.findings(
    {
      'rows': rows,
      'best': {'Adam': None, 'SAM': 0.1, 'Monge SAM': 0.1, demo.MATCHED: 0.1},
      'settings': {'rhos': [0.1, 1.0]},
    }
  )
  assert 'Monge SAM minus SAM is +10.0 points, more than' in compared
  assert '0.1 for SAM and 1 for Monge SAM' in fell_off
  assert '15.0 points (median 15.0) from that of SAM at the same rho' in control
  assert 'farthest, 30.0 points, at rho 1.' in control


def test_digits_are_split_without_overlap_and_mislabelled_as_said():
  parts = {
    wrong: demo_data.split_digits(3, train=500, validation=300, wrong=wrong)
    for wrong in (0.0, 0.2)
  }
  clean, noisy = parts[0.0], parts[0.2]
  assert [len(y) for _, y in noisy] == [500, 300, 997]
  assert sum(clean.train[1] != noisy.train[1]) == 100
  for kind in ('validation', 'test'):
    np.testing.assert_array_equal(getattr(clean, kind)[1], getattr(noisy, kind)[1])
  assert all(x.min() >= 0 and x.max() == 1 for x, _ in noisy)
  images = np.concatenate([x for x, _ in noisy]).reshape(1797, -1)
  pixels = demo_data.load_digits().data / 16
  np.testing.assert_array_equal(np.sort(images, axis=0), np.sort(pixels, axis=0))
