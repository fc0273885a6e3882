"""Straight and geodesic probes: the rises to them, and training with them."""

import json

import numpy as np
import pytest

from benchmarks.geodesic import __main__ as benchmark

pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]


def test_the_geodesic_keeps_the_bound_and_the_straight_probe_does_not(tmp_path, capsys):
  benchmark.main(['--quick', '--out', str(tmp_path)])

  assert 'Rise of (1 − w₁w₂)² from (2, 0.3)' in capsys.readouterr().out
  assert (tmp_path / 'geodesic.png').read_bytes().startswith(b'\x89PNG')
  results = json.loads((tmp_path / 'geodesic.json').read_text())
  scenes = results['scenes']
  rho = np.array(scenes[0]['rho'])
  i = rho.tolist().index(1.0)
  rise = {name: np.array(values) for name, values in scenes[0]['rise'].items()}
  np.testing.assert_allclose(rise['straight'][i], 1.8642, atol=5e-5)
  np.testing.assert_allclose(rise['geodesic'][i], 0.9406, atol=5e-5)
  for scene in scenes:
    rise = {name: np.array(values) for name, values in scene['rise'].items()}
    assert np.all(rise['geodesic'] < rho)
    assert np.all(rise['two steps'] < rho)
    assert rise['straight'][-1] > rho[-1]

  straight, curved = results['rows']
  assert (straight['method'], curved['method']) == ('straight', 'geodesic, one step')
  assert 0 < curved['rise']['mean'] < curved['rho']
  assert curved['rise']['mean'] < straight['rise']['mean']
