"""The frontier: what is chosen, how wide a range is, and that a run goes on."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.frontier import __main__ as frontier
from benchmarks.frontier import methods
from benchmarks.frontier import problems
from benchmarks.frontier import report
from benchmarks.frontier import training

pytestmark = pytest.mark.standard_promotion


def rows_of(knobs, means):
  return [
    {'knob': k, 'validation': [m - 0.01, m + 0.01], 'test': [m, m], 'probes': [1, 1]}
    for k, m in zip(knobs, means, strict=True)
  ]


def test_a_range_ends_where_a_point_is_lost():
  """Halfway, on the logarithmic axis, between 90 and 88 per cent."""
  rows = rows_of([0.01, 0.1, 1.0, 10.0], [0.80, 0.90, 0.90, 0.88])
  low, high = report.useful_range(rows)
  np.testing.assert_allclose(low, 10 ** (-1 - 0.1), rtol=1e-6)
  np.testing.assert_allclose(high, 10**0.5, rtol=1e-6)
  assert report.is_closed(rows) == (True, True)
  assert report.best(rows)['knob'] == 0.1


def test_a_range_without_an_end_is_open():
  rows = rows_of([0.1, 1.0, 10.0], [0.895, 0.90, 0.80])
  assert report.useful_range(rows)[0] == 0.0
  assert report.is_closed(rows) == (False, True)
  assert report.summarize(rows)['open'] == [True, False]


def test_a_grid_is_extended_until_its_best_is_inside(monkeypatch, tmp_path):
  """The accuracy is best at 20, and falls a point within a factor of 10."""
  trained = []

  def train(task, entry, knobs, seeds, steps):
    trained.append(tuple(knobs))
    means = [0.9 - 0.02 * abs(math.log10(knob / 20)) for knob in knobs]
    return {key: [[m] for m in means] for key in ('validation', 'test', 'probes')}

  monkeypatch.setattr(training, 'train', train)
  entry = methods.Entry(2, lambda *_: None, grid=(0.1, 0.2, 0.5, 1.0))
  task = problems.TASKS['digits']
  rows = frontier.tune(task, 'any', entry, (0,), 5, tmp_path)
  assert [row['knob'] for row in rows] == [
    *(0.1, 0.2, 0.5, 1.0),
    *(2.0, 5.0, 10.0, 20.0),
    *(50.0, 100.0, 200.0, 500.0),
  ]
  assert report.best(rows)['knob'] == 20.0
  before = len(trained)
  assert frontier.tune(task, 'any', entry, (0,), 5, tmp_path) == rows
  assert len(trained) == before  # All of it was stored.


def test_equal_gradients_are_steps_in_inverse_proportion():
  task = problems.TASKS['digits']._replace(steps=600)
  steps = {
    name: frontier.steps_of(task, methods.METHODS[name], report.EVALUATIONS)
    for name in ('Adam', 'SAM', 'CR-SAM', 'LookSAM')
  }
  assert steps == {'Adam': 1200, 'SAM': 600, 'CR-SAM': 400, 'LookSAM': 1000}


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', [name for name, entry in methods.METHODS.items() if entry.gradients != 2]
)
def test_a_step_costs_as_many_gradients_as_is_said(name):
  """Counted as they are taken, over a run of 40 steps."""
  task = problems.TASKS['digits']._replace(width=4)
  entry, steps, rows_seen = methods.METHODS[name], 40, []
  data = training.make_data(task, 0, steps)
  tx = entry.make(jnp.float32(0.1), 1e-3, steps)
  params = problems.init(jax.random.key(0), 64, 4)
  x, labels = map(jnp.asarray, data.train)

  def gradient(params, rows):
    jax.debug.callback(lambda: rows_seen.append(len(rows)))
    return jax.grad(problems.loss)(params, x[rows], labels[rows])

  @jax.jit
  def step(params, state, rows):
    updates, state = tx.update(
      gradient(params, rows[:: entry.parts]),
      state,
      params,
      grad_fn=lambda params: gradient(params, rows),
    )
    return jax.tree.map(jnp.add, params, updates), state

  state = tx.init(params)
  for rows in data.rows:
    params, state = step(params, state, rows)
  jax.effects_barrier()
  per_step = sum(rows_seen) / (steps * task.batch)
  tolerance = 0.35 if name == 'where steep' else 0.01
  assert abs(per_step - entry.gradients) < tolerance


@pytest.mark.slow
def test_the_command_writes_numbers_and_picture(tmp_path, capsys):
  frontier.main(['--quick', '--out', str(tmp_path)])
  results = json.loads((tmp_path / 'frontier.json').read_text())
  assert set(results['best']) == set(problems.TASKS)
  assert (tmp_path / 'frontier.png').stat().st_size > 10_000
  printed, table = capsys.readouterr().out, (tmp_path / 'frontier.md').read_text()
  for name in ('Adam', 'SAM', 'Monge SAM, rise τ'):
    assert name in printed
    assert f'| {name} |' in table
