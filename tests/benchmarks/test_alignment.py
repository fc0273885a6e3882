"""The cross-modal alignment benchmark: its measure, its rules, and that it runs."""

import json
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.alignment import __main__ as alignment
from benchmarks.alignment import data as alignment_data
from benchmarks.alignment import embeddings as alignment_embeddings
from benchmarks.alignment import problem as alignment_problem
from benchmarks.alignment import report as alignment_report
from benchmarks.alignment import training as alignment_training
from benchmarks.alignment.training import mutual_knn
from benchmarks.alignment.training import unit
from benchmarks.common.grid import MATCHED

pytestmark = pytest.mark.standard_promotion


def by_hand(x, y, k):
  """Sets of neighbours, point by point."""

  def neighbours(z, i):
    cosine = {
      j: z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j])
      for j in range(len(z))
      if j != i
    }
    return set(sorted(cosine, key=cosine.__getitem__)[-k:])

  return np.mean([len(neighbours(x, i) & neighbours(y, i)) / k for i in range(len(x))])


@pytest.mark.parametrize('k', [1, 3, 8, 29])
def test_mutual_knn_equals_sets_of_neighbours(k):
  rng = np.random.default_rng(k)
  x = rng.normal(size=(30, 5)).astype(np.float32)
  y = (x @ rng.normal(size=(5, 7)) + rng.normal(size=(30, 7))).astype(np.float32)
  got = mutual_knn(jnp.asarray(x), jnp.asarray(y), k)
  np.testing.assert_allclose(got, by_hand(x, y, k), rtol=1e-6)


@pytest.mark.slow
def test_mutual_knn_is_one_for_the_same_directions():
  x = jax.random.normal(jax.random.key(0), (40, 6))
  rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (6, 6)))
  lengths = jnp.exp(jax.random.normal(jax.random.key(2), (40, 1)))
  assert mutual_knn(x, lengths * x @ rotation) == 1


def test_mutual_knn_of_all_neighbours_is_one():
  x, y = jax.random.normal(jax.random.key(0), (2, 9, 4))
  assert mutual_knn(x, y, k=8) == 1


@pytest.mark.slow
def test_mutual_knn_of_unrelated_spaces_is_chance():
  x, y = jax.random.normal(jax.random.key(0), (2, 400, 10))
  assert abs(mutual_knn(x, y) - 8 / 399) < 0.01


def test_mutual_knn_leaves_the_point_itself_out():
  # Points 0 and 1 are neighbours in one space, 0 and 2 in the other.
  x = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
  y = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]])
  assert mutual_knn(x, x, 1) == 1
  assert mutual_knn(x, y, 1) == 0


def test_mutual_knn_says_what_is_wrong():
  x = jnp.ones((5, 2))
  with pytest.raises(ValueError, match=r'same points .* got 5 and 4'):
    mutual_knn(x, x[:4])
  with pytest.raises(ValueError, match=r'`k` must be in \[1, 4\], got 5'):
    mutual_knn(x, x, 5)


def test_zero_embedding_has_a_finite_gradient():
  gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 3)))
  assert jnp.isfinite(gradient).all()
  np.testing.assert_allclose(unit(jnp.array([[3.0, 4.0]])), [[0.6, 0.8]], rtol=1e-6)


def test_diverged_is_above_85_percent_of_chance():
  edge = 0.85 * math.log(128)
  assert not alignment_training.diverged(edge, 128)
  assert alignment_training.diverged(edge + 1e-6, 128)
  assert alignment_training.diverged(float('nan'), 128)
  assert alignment_training.diverged(float('inf'), 128)


def test_loss_of_a_collapsed_model_is_chance():
  loss = alignment_training.contrastive(jnp.full((128, 128), 3.0))
  np.testing.assert_allclose(loss, math.log(128), rtol=1e-6)


def test_names_belong_to_the_pictures():
  """Misaligned by one row, the styles disagree on the group, and no name fits its."""
  emoji = alignment_data.load()
  assert emoji.text.shape == (1857, 128)
  assert emoji.images.shape == (2, 1857, 256)
  names = list(emoji.names)
  flags = np.array([name.startswith('flag: ') for name in names])
  assert (emoji.group[flags] == 8).all()
  assert flags[emoji.group == 8].mean() > 0.95
  assert set(emoji.group[[names.index(n) for n in ('grapes', 'melon')]]) == {3}
  np.testing.assert_allclose([emoji.text.std(), emoji.images.std()], [1, 1], atol=0.02)


@pytest.mark.parametrize(
  ('one', 'other'),
  [
    ('judge', 'woman judge'),
    ('man running', 'person running: facing right'),
    ('woman: red hair', 'man: red hair'),
    ('men holding hands', 'woman and man holding hands'),
    ('family: man, boy', 'family: woman, woman, girl'),
    ('twelve o’clock', 'six-thirty'),
    ('keycap: 7', 'keycap: *'),
  ],
)
def test_near_duplicates_have_one_base(one, other):
  assert alignment_data.base(one) == alignment_data.base(other)


@pytest.mark.parametrize('name', ['flag: Peru', 'kissing cat', 'mango', 'ear: x'])
def test_other_names_are_their_own_base(name):
  assert alignment_data.base(name) == name


def test_divide_keeps_kin_together_at_random():
  kin = [*'aaaaabbbcc', *map(str, range(30))]
  sizes, places = (20, 12, 8), set()
  for seed in range(20):
    parts = alignment_data.divide(kin, sizes, np.random.default_rng(seed))
    assert tuple(map(len, parts)) == sizes
    assert sorted(np.concatenate(parts)) == list(range(40))
    of = [{kin[row] for row in part} for part in parts]
    assert not of[0] & of[1] | of[0] & of[2] | of[1] & of[2]
    places.add(next(i for i in range(3) if 'a' in of[i]))
  assert places == {0, 1, 2}


@pytest.fixture(scope='module')
def names():
  return alignment_data.load().names


@pytest.mark.parametrize('kind', alignment_data.SPLITS)
def test_splits_do_not_overlap(kind, names):
  """Nor has a concept on one side a near duplicate on the other."""
  split = alignment_data.split(kind, names, seed=3)
  held_out = {*split.validation} | {*split.test}
  assert len(held_out) == len(split.validation) + len(split.test) == 557
  trained = {*split.pretrain} | {*split.tune}
  assert not trained & held_out
  assert len(trained | held_out) == 1857

  def bases(part):
    return {alignment_data.base(names[row]) for row in part}

  assert not bases(trained) & bases(held_out)
  assert not bases(split.validation) & bases(split.test)
  if kind == 'half':
    assert not bases(split.pretrain) & bases(split.tune)
  else:
    assert not {*split.pretrain_styles} & {*split.tune_styles}


def test_splits_share_what_is_measured_on(names):
  half, style = (alignment_data.split(k, names, 0) for k in alignment_data.SPLITS)
  np.testing.assert_array_equal(half.test, style.test)
  np.testing.assert_array_equal(half.validation, style.validation)
  assert {*half.test} != {*alignment_data.split('half', names, 1).test}


def test_a_batch_has_no_concept_twice():
  part = np.arange(100, 400)
  concepts, styles = alignment_data.batches(part, (1,), batch=128, steps=5, seed=0)
  assert concepts.shape == styles.shape == (5, 128)
  assert all(len(set(batch)) == 128 for batch in concepts)
  assert set(concepts.ravel()) <= set(part)
  assert len(set(concepts[:2].ravel())) == 256
  assert (styles == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize('method', alignment_training.METHODS)
def test_radius_and_rate_are_traced(method):
  """At radius zero both are SGD, and a change of radius or rate compiles nothing."""
  data = alignment_training.Data(
    jax.random.normal(jax.random.key(0), (20, 128)),
    jax.random.normal(jax.random.key(1), (2, 20, 256)),
  )
  settings = alignment_training.Settings(hidden=4, width=3)
  keys = jax.random.split(jax.random.key(2), 1)
  params = jax.vmap(lambda key: alignment_training.init(key, data, settings))(keys)
  rng = np.random.default_rng(0)
  concepts = np.stack([rng.permutation(20)[:8] for _ in range(25)])[None]
  batches = concepts, np.zeros_like(concepts)

  def run(rate, rho, method=method):
    return alignment_training.train(method, data, params, batches, rate, rho)

  before = run(0.1, 0.0)
  compiled = alignment_training.train._cache_size()
  after = run(0.2, 0.5)
  assert alignment_training.train._cache_size() == compiled
  assert (before.loss != after.loss).all()
  assert (before.factor >= 1).all()
  if method != 'Adam':
    np.testing.assert_allclose(before.loss, run(0.1, 0.0, 'SGD').loss, rtol=1e-5)


def row(method, rate, rho, knn, loss=(1.0, 1.0, 1.0), shrink=0.5):
  return {
    'split': 'half',
    'method': method,
    'learning_rate': rate,
    'rho': rho,
    'radius': rho,
    'loss': list(loss),
    'factor': [2.0] * 3,
    'shrink': [shrink] * 3,
    'diverged': [alignment_training.diverged(x, 128) for x in loss],
    'validation': {'knn': [knn] * 3},
    'test': {'knn': [1 - knn, 1 - knn, 1 - knn + 0.003]},
  }


def test_hyperparameters_are_chosen_on_validation_concepts():
  rows = [row('SAM', 0.1, 0.1, 0.3), row('SAM', 0.1, 0.2, 0.4)]
  rows += [row('Monge SAM', 0.1, 0.1, 0.9), row('SAM', 0.3, 0.1, float('nan'))]
  assert alignment_problem.best(rows, 'half', 'SAM') is rows[1]


def test_a_cell_that_diverged_is_not_chosen():
  """Its embeddings may be aligned by chance when nothing is left of the model."""
  failed = (4.8, 4.8, 1.0)
  rows = [row('SAM', 0.1, 0.1, 0.3), row('SAM', 0.1, 0.2, 0.4, failed)]
  assert alignment_problem.best(rows, 'half', 'SAM') is rows[0]
  assert alignment_problem.best(rows[1:], 'half', 'SAM') is rows[1]


def test_the_matched_radius_is_that_of_monge_sam():
  cell = alignment.matched(row('Monge SAM', 0.3, 0.8, 0.2, shrink=0.25))
  assert cell == alignment_problem.Cell('half', MATCHED, 0.3, 0.8, 0.2)


def test_tables_follow_the_numbers():
  failed = (4.8, 4.8, 1.0)
  rows = [
    row('SAM', 0.1, 0.1, 0.3),
    row('SAM', 0.1, 0.2, 0.2, failed),
    row('Monge SAM', 0.1, 0.1, 0.2),
    row('Monge SAM', 0.1, 0.2, 0.2),
    row('SGD', 0.1, None, 0.2),
  ]
  # Where SGD diverges as well nothing is counted.
  rows += [row('SGD', 3.0, None, 0.2, failed)]
  rows += [row('SAM', 3.0, 0.1, 0.2, failed), row('Monge SAM', 3.0, 0.1, 0.2, failed)]
  rows += [r | {'method': MATCHED} for r in rows if r['method'] == 'Monge SAM']
  assert alignment_problem.table_2_rho(rows, 'half', (0.1, 0.2)) == 0.2
  settings = {'rhos': (0.1, 0.2), 'sgd_rates': (0.1,)}
  lines = lambda table: [list(line) for line in table.rows]
  assert lines(alignment_report._table_2(rows, 'half', settings)) == [
    ['SAM', '3.53†'],
    ['Monge SAM', '1.00'],
    [MATCHED, '1.00'],
  ]
  caption = alignment_report._table_3(rows, 'half', settings).title
  assert caption.endswith('SAM 1 of 2, Monge SAM 0 of 2, SAM, matched 0 of 2')
  assert lines(alignment_report._reach(rows, 'half', settings)) == [
    ['SAM', '0.1'],
    ['Monge SAM', '0.2'],
    ['ratio', '2.0'],
  ]
  assert lines(alignment_report._cell_by_cell(rows, 'half')) == [
    ['SAM', '1 of 2', '0.050'],
    [MATCHED, '0 of 2', '0.000'],
  ]


def test_principal_plane_keeps_a_plane():
  flat = np.random.default_rng(0).normal(size=(30, 2)) @ np.eye(2, 5)
  xy, share = alignment_embeddings.principal_plane(flat[:10], flat[10:])
  np.testing.assert_allclose(share, 1.0)
  distances = np.linalg.norm(flat[0] - flat, axis=1)
  np.testing.assert_allclose(np.linalg.norm(xy[0] - xy, axis=1), distances)


@pytest.mark.slow
def test_alignment_writes_numbers_and_pictures(tmp_path, capsys):
  alignment.main(['--quick', '--out', str(tmp_path)])
  results = json.loads((tmp_path / 'alignment.json').read_text())
  assert results['environment']['jax'] == jax.__version__
  # Per split the pretrained model, 2 + 1 rates, 2 × 4 cells, and 4 matched.
  assert len(results['rows']) == 2 * (1 + 3 + 8 + 4)
  for cell in results['rows']:
    assert all(0 <= x <= 1 for x in cell['test']['knn'] + cell['test']['recall'])
    if cell['method'] != alignment_problem.PRETRAINED:
      assert len(cell['diverged']) == len(results['settings']['seeds'])
      assert min(cell['factor']) >= 1
  for name in ('alignment.png', 'alignment_embeddings.png'):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
  text, printed = (tmp_path / 'alignment.md').read_text(), capsys.readouterr().out
  for table in ('Table 1', 'Table 2', 'Table 3', 'Control'):
    assert text.count(f'**{table}') == (6 if table == 'Control' else 2)
    assert table in printed


@pytest.mark.slow
def test_an_interrupted_run_is_taken_up(tmp_path, monkeypatch):
  class Problem:
    ran: ClassVar = []

    def __init__(self, kind, settings, seeds):
      pass

    def run(self, cell):
      self.ran.append(cell)
      if len(self.ran) == 4:
        raise KeyboardInterrupt
      return None, {**cell._asdict(), 'shrink': [0.5]}

  monkeypatch.setattr(alignment, 'Problem', Problem)
  settings = alignment_training.Settings()
  grid = alignment.Grid((0.5,), (0.1,), (1e-3,), (0,))
  with pytest.raises(KeyboardInterrupt):
    alignment._train(settings, grid, tmp_path)
  results = alignment._train(settings, grid, tmp_path)
  assert len(results['rows']) == len(Problem.ran) - 1 == 12
  radii = [r['radius'] for r in results['rows'] if r['method'] == 'SAM, matched']
  assert radii == [0.25, 0.25]
  # Other settings begin afresh.
  alignment._train(settings._replace(steps=1), grid, tmp_path)
  assert len(Problem.ran) == 13 + 12
