"""The picture of `benchmarks.alignment`: loss and alignment against the radius."""

from collections.abc import Mapping
import math
from pathlib import Path
from typing import Any

from matplotlib.colors import to_rgba
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.alignment.problem import best
from benchmarks.alignment.problem import choose
from benchmarks.alignment.problem import has_diverged
from benchmarks.alignment.problem import PRETRAINED
from benchmarks.common import style

COLOURS = {'SGD': '#2a9d8f', PRETRAINED: '#343a40', **style.COLOURS}
LINES = {PRETRAINED: ':', 'SGD': '-.', 'Adam': '-'}
TICKS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
TITLES = {
  'half': 'half: pretrained on other concepts',
  'style': 'style: pretrained on other drawings',
}


def draw(results: Mapping[str, Any], path: Path) -> None:
  """Writes, a column a split, alignment, training loss and the diverged cells."""
  style.use()
  settings = results['settings']
  fig, axes = plt.subplots(
    3,
    2,
    figsize=(11.5, 10.5),
    sharex=True,
    sharey='row',
    height_ratios=(1, 1, 0.75),
    layout='constrained',
  )
  for column, (split, title) in zip(axes.T, TITLES.items(), strict=True):
    rate = best(results['rows'], split, 'Monge SAM')['learning_rate']
    for method in style.LOOKS:
      rows = choose(results['rows'], split, method)
      chosen = best(rows, split, method)
      at_best = [best(_at(rows, 'rho', rho), split, method) for rho in settings['rhos']]
      _draw_method(column[0], at_best, method, lambda row: row['test']['knn'])
      at = chosen['rho'], np.mean(chosen['test']['knn'])
      column[0].plot(*at, 'o', color=COLOURS[method], **style.RING)
      _draw_method(
        column[1], _at(rows, 'learning_rate', rate), method, lambda row: row['loss']
      )
    _draw_plain(column[0], results, split)
    for share, label in ((0.85, 'diverged above'), (1.0, 'chance, ln 128')):
      height = share * math.log(settings['batch'])
      column[1].axhline(height, color='#adb5bd', linestyle=':', linewidth=1.2)
      column[1].annotate(
        label, (settings['rhos'][0], height), color='#868e96', fontsize=9, va='bottom'
      )
    _draw_cells(column[2], results, split)
    column[0].set_title(
      f'{title}\n', loc='left', fontsize=12, fontweight='bold', linespacing=1.4
    )
    for ax, text in zip(
      column,
      (
        'at each ρ the learning rate that is best on validation concepts',
        f'learning rate {rate:g}, the one chosen for Monge SAM',
        'filled: share of the seeds that diverged, SAM above Monge SAM',
      ),
      strict=True,
    ):
      ax.set_title(text, loc='right', fontsize=9.5, color='#495057')
    column[1].set_ylim(0, 5.3)
    rhos = settings['rhos']
    ticks = [rho for rho in TICKS if min(rhos) <= rho <= max(rhos)]
    style.draw_rho_axis(column[2], ticks)
  for ax, label in zip(
    axes[:, 0],
    ('alignment, mutual 8-NN on test concepts', 'final training loss', 'learning rate'),
    strict=True,
  ):
    ax.set_ylabel(label)
  keys = {'color': '#343a40', 'linestyle': 'none', 'markerfacecolor': 'white'}
  axes[0, 0].plot([], [], marker='X', markersize=8.5, label='diverged', **keys)
  ring = 'chosen on validation concepts'
  axes[0, 0].plot([], [], marker='o', markersize=12, label=ring, **keys)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  fig.legend(handles, labels, loc='outside lower center', ncols=4)
  fig.savefig(path)
  plt.close(fig)


def _at(rows, name, value):
  return sorted((r for r in rows if r[name] == value), key=lambda row: row['rho'])


def _draw_method(ax, rows, method, values):
  """A line, its band the range of the seeds; crossed out where the cell diverged."""
  runs = np.array([values(row) for row in rows])
  rho, mean = np.array([row['rho'] for row in rows]), runs.mean(axis=1)
  failed, colour = np.array([has_diverged(row) for row in rows]), COLOURS[method]
  line = {'color': colour, **style.LOOKS[method]}
  ax.plot(rho, mean, markevery=np.flatnonzero(~failed).tolist(), **line)
  style.draw_band(ax, rho, runs.min(axis=1), runs.max(axis=1), colour)
  cross = {'markersize': 8.5, 'markeredgecolor': colour, 'markeredgewidth': 1.4}
  ax.plot(rho[failed], mean[failed], 'X', color='white', **cross)


def _draw_plain(ax, results, split):
  """The methods without a radius, at their own best learning rate."""
  for method, line in LINES.items():
    row = best(results['rows'], split, method)
    height = np.mean(row['test']['knn'])
    rate = '' if row['learning_rate'] is None else ', at its best learning rate'
    ax.axhline(
      height,
      color=COLOURS[method],
      linestyle=line,
      linewidth=1.5,
      label=f'{method}{rate}',
      zorder=1,
    )


def _draw_cells(ax, results, split):
  """Table 3: a square a cell, left SAM and right Monge SAM, filled as seeds diverge."""
  rates = results['settings']['sgd_rates']
  for method, shift in (('SAM', 0.13), ('Monge SAM', -0.13)):
    rows = choose(results['rows'], split, method)
    ax.scatter(
      [row['rho'] for row in rows],
      [rates.index(row['learning_rate']) + shift for row in rows],
      s=80,
      marker='s',
      c=[to_rgba(COLOURS[method], np.mean(row['diverged'])) for row in rows],
      edgecolors=COLOURS[method],
      linewidths=1.1,
    )
  ax.set_yticks(range(len(rates)), [f'{rate:g}' for rate in rates])
  ax.set_ylim(-0.5, len(rates) - 0.5)
  ax.grid(False)
