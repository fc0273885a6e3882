"""The demo: its data, and that it runs."""

import json

import numpy as np
import pytest

from benchmarks.demo import __main__ as demo
from benchmarks.demo import training

pytestmark = pytest.mark.standard_promotion


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
  assert '| chosen |' in table


def test_digits_are_split_without_overlap_and_mislabelled_as_said():
  parts = {
    wrong: training.split_digits(3, train=500, validation=300, wrong=wrong)
    for wrong in (0.0, 0.2)
  }
  clean, noisy = parts[0.0], parts[0.2]
  assert [len(y) for _, y in noisy] == [500, 300, 997]
  assert sum(clean.train[1] != noisy.train[1]) == 100
  for kind in ('validation', 'test'):
    np.testing.assert_array_equal(getattr(clean, kind)[1], getattr(noisy, kind)[1])
  assert all(x.min() >= 0 and x.max() == 1 for x, _ in noisy)
  images = np.concatenate([x for x, _ in noisy]).reshape(1797, -1)
  pixels = training.load_digits().data / 16
  np.testing.assert_array_equal(np.sort(images, axis=0), np.sort(pixels, axis=0))
