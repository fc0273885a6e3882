"""The picture of `benchmarks.demo`: accuracy against the radius."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common import style


def draw(results: Mapping[str, Any], path: Path) -> None:
  """Writes the test accuracy of every method against rho, with bands of one sd."""
  style.use()
  fig, ax = plt.subplots(figsize=(8, 4.5))
  (adam,) = (row for row in results['rows'] if row['method'] == 'Adam')
  mean, sd = (100 * adam['test'][name] for name in ('mean', 'sd'))
  style.draw_level(ax, mean, sd, 'Adam', style.COLOURS['Adam'])
  for method in style.LOOKS:
    _draw_method(ax, results, method)
  ring = 'chosen on validation images'
  ax.plot([], [], 'o', color='#343a40', label=ring, **style.RING)
  settings = results['settings']
  style.draw_rho_axis(ax, settings['rhos'])
  ax.set_ylabel('test accuracy, %')
  ax.set_title(
    f'{settings["train"]} handwritten digits, {settings["wrong"]:.0%} mislabelled'
    f' (mean ± sd of {len(settings["seeds"])} seeds)',
    loc='left',
    fontsize=11,
  )
  ax.legend(loc='lower left')
  fig.savefig(path)
  plt.close(fig)


def _draw_method(ax, results, method):
  """A line with its band; of the two methods a ring around the rho chosen."""
  rows = [row for row in results['rows'] if row['method'] == method]
  rho = [row['rho'] for row in rows]
  mean, sd = (np.array([100 * r['test'][k] for r in rows]) for k in ('mean', 'sd'))
  colour = style.COLOURS[method]
  ax.plot(rho, mean, color=colour, **style.LOOKS[method])
  style.draw_band(ax, rho, mean - sd, mean + sd, colour)
  if method != 'SAM, matched':
    best = rho.index(results['best'][method])
    ax.plot(rho[best], mean[best], 'o', color=colour, **style.RING)
