"""The picture of `benchmarks.demo`: accuracy against the radius."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter
from matplotlib.ticker import NullLocator
import numpy as np

from benchmarks.common import style

LOOKS = {
  'SAM': {'marker': 'o'},
  'Monge SAM': {'marker': 's'},
  'SAM, matched': {
    'marker': '^',
    'linestyle': '--',
    'linewidth': 1.6,
    'markerfacecolor': 'white',
    'label': 'SAM at Monge SAM’s mean radius',
  },
}
RING = {'markersize': 13, 'markerfacecolor': 'none', 'markeredgewidth': 1.4}


def draw(results: Mapping[str, Any], path: Path) -> None:
  """Writes the test accuracy of every method against rho, with bands of one sd."""
  style.use()
  fig, ax = plt.subplots(figsize=(8, 4.5))
  _draw_adam(ax, results)
  for method in LOOKS:
    _draw_method(ax, results, method)
  for method in ('SAM', 'Monge SAM'):
    _ring(ax, results, method)
  ax.plot([], [], 'o', color='#343a40', label='chosen on validation images', **RING)
  rhos = results['settings']['rhos']
  ax.set_xscale('log')
  ax.set_xticks(rhos)
  ax.xaxis.set_major_formatter(FuncFormatter(lambda rho, _: f'{rho:g}'))
  ax.xaxis.set_minor_locator(NullLocator())
  ax.set_xlabel('radius ρ')
  ax.set_ylabel('test accuracy, %')
  settings = results['settings']
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
  rows = [row for row in results['rows'] if row['method'] == method]
  rho, mean, sd = (
    np.array(column)
    for column in zip(
      *((r['rho'], 100 * r['test']['mean'], 100 * r['test']['sd']) for r in rows),
      strict=True,
    )
  )
  colour = style.COLOURS[method]
  ax.plot(rho, mean, color=colour, **{'label': method, **LOOKS[method]})
  ax.fill_between(rho, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)


def _ring(ax, results, method):
  """A ring round the rho that the validation images have chosen."""
  (row,) = (
    row
    for row in results['rows']
    if row['method'] == method and row['rho'] == results['best'][method]
  )
  ax.plot(
    row['rho'],
    100 * row['test']['mean'],
    'o',
    color=style.COLOURS[method],
    **RING,
  )


def _draw_adam(ax, results):
  (row,) = (row for row in results['rows'] if row['method'] == 'Adam')
  mean, sd = 100 * row['test']['mean'], 100 * row['test']['sd']
  colour = style.COLOURS['Adam']
  ax.axhline(mean, color=colour, linewidth=1.5, label='Adam', zorder=1)
  ax.axhspan(mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0, zorder=0)
