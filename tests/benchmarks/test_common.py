"""What all benchmarks share: tables, results on disk, times, and the grid."""

import json
import math
import statistics

import pytest

from benchmarks.common import grid
from benchmarks.common import storage
from benchmarks.common import terminal
from benchmarks.common import timing
from benchmarks.common.tables import markdown
from benchmarks.common.tables import Table

# Tables.

DOCUMENT = ('Words.', Table('Title', ['name', 'a\nb'], [['x', '1'], ['y', '2']]))


def test_a_document_is_markdown():
  assert markdown(DOCUMENT) == (
    'Words.\n\n**Title**\n\n| name | a b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n'
  )


def test_a_wide_table_is_printed_whole(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '40')
  head = [f'column {i}' for i in range(20)]
  terminal.show([*DOCUMENT, Table('', head, [[name.upper() for name in head]])])
  printed = capsys.readouterr().out
  assert all(name.upper() in printed for name in head)
  assert 'Title' in printed


# Results on disk.


def test_what_is_stored_is_not_computed_again(tmp_path):
  path = tmp_path / 'run.json'
  first = storage.run_once(path, lambda: {'test': 0.5})
  assert first['test'] == 0.5
  assert set(first) == {'test', *storage.CLOCKS}
  assert storage.run_once(path, lambda: 1 / 0) == first


def test_a_run_that_is_killed_leaves_no_result(tmp_path):
  def killed():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    storage.run_once(tmp_path / 'run.json', killed)
  assert not list(tmp_path.iterdir())


def test_other_settings_have_another_folder_hidden_from_git(tmp_path):
  one, same, other = (
    storage.folder_for(tmp_path, 'smoke', {'alpha': alpha}) for alpha in (1, 1, 2)
  )
  assert one == same != other
  assert (tmp_path / '.gitignore').read_text() == '*\n'


def test_json_has_a_line_for_what_fits_into_one(tmp_path):
  value = {'n': 3, 'rows': [{'x': [1.5] * 99, 'y': None}, {'x': [], 'y': 'z' * 600}]}
  storage.write_json(tmp_path / 'value.json', value)
  text = (tmp_path / 'value.json').read_text()
  assert json.loads(text) == value
  assert len(text.splitlines()) == 7


# Times.


def test_times_are_medians_per_step():
  taken = []
  times = timing.milliseconds({'a': lambda: taken.append(1)}, rounds=3, steps=2)
  assert len(taken) == timing.WARM_UP + 3
  assert 0 < times['a'] < 1000


def test_a_loop_that_raises_is_not_left_out():
  with pytest.raises(RuntimeError, match='ZeroDivisionError'):
    timing.milliseconds({'a': lambda: 1 / 0}, rounds=1)


# The grid.


def test_sam_gets_the_mean_radius_of_monge_sam():
  rows = [
    {'method': grid.SAM, 'rho': 0.5, 'shrink': {'runs': [1.0, 1.0]}},
    {'method': grid.MONGE, 'rho': 0.5, 'shrink': {'runs': [0.2, 0.6]}},
    {'method': grid.MONGE, 'rho': 2.0, 'shrink': {'runs': [0.1, 0.1]}},
  ]
  cells = grid.matched(rows)
  assert [cell[:2] for cell in cells] == [(grid.MATCHED, 0.5), (grid.MATCHED, 2.0)]
  assert [cell.given for cell in cells] == pytest.approx([0.5 * 0.4, 2.0 * 0.1])


def test_a_summary_has_the_spread_of_the_runs_and_of_their_mean():
  number = grid.summary([0.5, 0.6, 0.7])
  assert number['sd'] == pytest.approx(statistics.stdev([0.5, 0.6, 0.7]))
  assert number['se'] == pytest.approx(number['sd'] / math.sqrt(3))
  assert grid.percent(number) == '60.0 ± 10.0'
  assert grid.percent(number, 'se') == '60.0 ± 5.8'
  assert grid.summary([0.5])['sd'] == 0


def row(method, rho, *runs):
  number = grid.summary(runs)
  return {'method': method, 'rho': rho, 'validation': number, 'test': number}


def test_differences_are_paired_by_seed_and_at_the_best_radii():
  rows = [
    row('Adam', None, 0.1, 0.5, 0.9),
    *(row(grid.SAM, rho, 0.25, 0.6, 1.0 - rho) for rho in (0.1, 1.0)),
    *(row(grid.MONGE, rho, 0.1, 0.5, 0.7 + rho) for rho in (0.1, 0.2)),
  ]
  rows.append(row(grid.MONGE, 1.0, 0.0, 0.0, 0.0))
  best = grid.best_rhos(rows)
  assert best == {'Adam': None, grid.SAM: 0.1, grid.MONGE: 0.2}
  results = {'rows': rows, 'best': best, 'settings': {'rhos': (0.1, 1.0)}}
  pairs = ((grid.SAM, 'Adam'), (grid.MONGE, grid.SAM))
  table, _ = grid.differences(results, pairs)
  assert table.head == ['rho', 'SAM\n− Adam', 'Monge SAM\n− SAM']
  assert table.rows == [
    ['0.1', '+8.3 ± 4.4', '-11.7 ± 1.7 *'],
    ['1', '-21.7 ± 34.2', '-28.3 ± 17.4'],
    ['chosen', '+8.3 ± 4.4', '-8.3 ± 4.4'],
  ]
  stars = [grid.star_rho(results, row) for row in rows]
  assert stars == ['', '* 0.1', '1', '0.1', '* 0.2', '1']
