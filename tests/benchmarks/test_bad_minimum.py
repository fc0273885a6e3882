"""The benchmark of the bad minimum: radii, data, and going on after a kill."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.bad_minimum import __main__ as bad_minimum
from benchmarks.bad_minimum import figure
from benchmarks.bad_minimum import methods
from benchmarks.bad_minimum import problem
from benchmarks.bad_minimum import report
from benchmarks.bad_minimum import training
from benchmarks.bad_minimum.settings import SMOKE
from benchmarks.common import grid

pytestmark = pytest.mark.standard_promotion

DIRECTION = jnp.array([0.6, -0.8])


def radius(tx, rho, slope):
  """``‖δ‖`` of a method where the gradient has the norm ``slope``."""
  g = slope * DIRECTION
  params = jnp.zeros(2)
  state = tx.init(params)
  state[0].hyperparams['rho'] = jnp.float32(rho)
  _, state = tx.update(g, state, params, grad_fn=lambda probe: g)
  return float(optax.tree.get(state, 'radius'))


@pytest.mark.parametrize('alpha', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('slope', [1e-3, 0.2, 0.9, 1.1, 5.0, 300.0])
def test_radii_are_as_said(slope, alpha):
  rho = 0.3
  sigma = rho / alpha
  txs = methods.optimizers(0.01, alpha, 100)
  bent = (1 / rho**2 + slope**2 / sigma**2) ** -0.5
  expected = {
    grid.SAM: rho,
    grid.MATCHED: rho,
    grid.MONGE: bent,
    methods.LE_SAM: min(sigma / slope, rho),
    methods.ANNEALED: rho,  # In the first step.
  }
  radii = {method: radius(txs[method], rho, slope) for method in expected}
  assert radii == pytest.approx(expected, rel=1e-5)


def test_fashion_is_what_its_licence_note_says():
  with np.load(problem.FILE) as file:
    shapes = {name: (file[name].shape, file[name].dtype.name) for name in file.files}
    counts = np.bincount(file['y']), np.bincount(file['yt'])
  assert shapes == {
    'x': ((6000, 28, 28), 'uint8'),
    'y': ((6000,), 'uint8'),
    'xt': ((2000, 28, 28), 'uint8'),
    'yt': ((2000,), 'uint8'),
  }
  assert [len(count) for count in counts] == [problem.CLASSES] * 2
  assert 565 <= counts[0].min() <= counts[0].max() <= 625
  assert problem.FILE.stat().st_size < 4e6
  notice = problem.FILE.with_name('LICENSE.fashion_mnist').read_text()
  assert 'MIT License' in notice
  assert 'Zalando' in notice


def test_parts_do_not_overlap_and_only_wrong_labels_are_wrong():
  split = lambda seed: problem.split_fashion(seed, train=300, wrong=200)
  parts, other = split(0), split(1)
  assert [len(y) for _, y in parts] == [300, 200, 500, 1500]
  images = np.concatenate([x for x, _ in parts])
  assert images.shape == (2500, 28, 28, 1)
  assert (images.min(), images.max()) == (0, 1)
  assert len({image.tobytes() for image in images}) == 2500
  with np.load(problem.FILE) as file:
    scaled = (file['x'][..., None] / 255).astype(np.float32)
    truth = {x.tobytes(): y for x, y in zip(scaled, file['y'], strict=True)}
  right = lambda part: [truth[x.tobytes()] == y for x, y in zip(*part, strict=True)]
  assert all(right(parts.train))
  assert not any(right(parts.wrong))
  assert set(parts.wrong[1]) == set(range(problem.CLASSES))
  for fixed in ('validation', 'test'):
    np.testing.assert_array_equal(getattr(parts, fixed)[0], getattr(other, fixed)[0])
  assert not np.array_equal(parts.train[0], other.train[0])


def test_too_many_images_are_refused():
  with pytest.raises(ValueError, match=r'There are 6000 images, not 6000 \+ 1\.'):
    problem.split_fashion(0, train=6000, wrong=1)


def test_other_settings_have_another_folder_but_not_another_grid(tmp_path):
  folders = {
    bad_minimum.runs_folder(tmp_path, 'smoke', settings)
    for settings in (SMOKE, SMOKE._replace(alpha=2.0), SMOKE._replace(rhos=(1.0,)))
  }
  assert len(folders) == 2


def test_stored_parameters_come_back(tmp_path):
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  training.save_params(tmp_path / 'start.npz', model)
  other = nnx.Linear(3, 2, rngs=nnx.Rngs(1))
  training.load_params(tmp_path / 'start.npz', other)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


def stored(folder):
  """All runs by name, without how long they took."""
  runs = {path.name: json.loads(path.read_text()) for path in folder.glob('*.json')}
  for run in runs.values():
    for clock in ('seconds', 'cpu_seconds'):
      run.pop(clock, None)
  return runs


@pytest.mark.slow
@pytest.mark.usefixtures('compile_in_a_hurry')
def test_the_experiment_goes_on_after_a_kill_and_writes_everything(tmp_path, capsys):
  begun = []

  def kill_in_the_middle(name):
    begun.append(name)
    if name == 'Monge-SAM-rho0.8-seed1':
      raise KeyboardInterrupt

  folder = bad_minimum.runs_folder(tmp_path / 'runs', 'smoke', SMOKE)
  with pytest.raises(KeyboardInterrupt):
    bad_minimum.experiment(SMOKE, folder, kill_in_the_middle)
  before = stored(folder)
  assert {f'{name}.json' for name in begun[:-1]} == set(before) - {'settings.json'}
  bad_minimum.main(['--smoke', '--out', str(tmp_path), '--runs', str(folder.parent)])
  first = stored(folder)
  assert {name: first[name] for name in before} == before
  for path in folder.glob('SAM-rho*'):
    path.unlink()
  bad_minimum.experiment(SMOKE, folder)
  assert stored(folder) == first

  results = json.loads((tmp_path / 'bad_minimum.json').read_text())
  assert [row['method'] for row in results['rows']] == [
    methods.SGD,
    *[grid.SAM] * 2,
    *[grid.MONGE] * 2,
    *[methods.LE_SAM] * 2,
    *[methods.ANNEALED] * 2,
    *[grid.MATCHED] * 2,
  ]
  for row in results['rows']:
    assert row['factor']['mean'] >= 1
    assert len(row['test']['runs']) == len(SMOKE.seeds)
    given = row['given'] or 0
    shorter = row['method'] in (grid.MONGE, methods.LE_SAM, methods.ANNEALED)
    assert row['radius']['mean'] <= given + 1e-5
    assert shorter or row['radius']['mean'] == pytest.approx(given, rel=1e-4)
  by_cell = {(row['method'], row['rho']): row for row in results['rows']}
  for rho in SMOKE.rhos:
    monge, matched = by_cell[grid.MONGE, rho], by_cell[grid.MATCHED, rho]
    assert matched['radius']['mean'] == pytest.approx(monge['radius']['mean'], rel=1e-4)
  assert (tmp_path / 'bad_minimum.png').read_bytes().startswith(b'\x89PNG')
  printed, table = capsys.readouterr().out, (tmp_path / 'bad_minimum.md').read_text()
  assert grid.MATCHED in printed
  assert '| chosen |' in table


def test_tables_follow_the_numbers():
  def cell(method, rho, test, lowest):
    """Every number of a run has three values around the one that is given."""
    numbers = dict.fromkeys(report.NUMBERS, 1.0)
    numbers |= {'test': test, 'validation': test, 'train': lowest, 'lowest': lowest}
    runs = [
      {name: x + shift for name, x in numbers.items()} | {'curves': {}}
      for shift in (-0.01, 0.0, 0.01)
    ]
    return report.summarize(grid.Cell(method, rho, rho), runs)

  look = {'train': 1.0, 'wrong': 1.0, 'test': 0.4, 'seconds': 60, 'cpu_seconds': 90}
  rows = [cell(methods.SGD, None, 0.5, 1.0)]
  for method, near, far, lowest in [
    (grid.SAM, 0.6, 0.8, 0.9),
    (grid.MONGE, 0.6, 0.7, 1.0),
    (methods.LE_SAM, 0.6, 0.72, 1.0),
    (methods.ANNEALED, 0.6, 0.75, 1.0),
    (grid.MATCHED, 0.6, 0.71, 1.0),
  ]:
    rows += [cell(method, 0.1, near, 1.0), cell(method, 1.0, far, lowest)]
  results = {
    'environment': dict.fromkeys(('cores', 'device', 'machine', 'jax'), 'x'),
    'setting': 'smoke',
    'starts': [look] * 3,
    'fresh': [{**look, 'test': 0.85}] * 3,
    'rows': rows,
    'best': grid.best_rhos(rows),
    'settings': {**SMOKE._asdict(), 'rhos': [0.1, 1.0]},
  }
  results['environment'] |= {'optax': 'x', 'flax': 'x'}
  assert results['best'][grid.MONGE] == 1.0
  assert figure.most_different(results) == 1.0
  _, starts, cells, _, differences, _, took = report.report(results)
  assert starts.rows[1][1:] == ['100.0 ± 0.0', '100.0 ± 0.0', '85.0 ± 0.0']
  assert cells.rows[2][:5] == ['SAM', '* 1', '1.000', '90.0 ± 0.6', '90.0']
  assert differences.rows[1][1:] == [
    '+30.0 ± 0.0 *',
    '+20.0 ± 0.0 *',
    '+10.0 ± 0.0 *',
    '-2.0 ± 0.0 *',
    '-1.0 ± 0.0 *',
    '+5.0 ± 0.0 *',
    '-5.0 ± 0.0 *',
  ]
  assert took.startswith('10 minutes of processor time, 7 by the clock')
