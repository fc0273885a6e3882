"""The picture of `benchmarks.bad_minimum`: accuracy against rho, and over time."""

from collections.abc import Mapping
from pathlib import Path
import statistics
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter
from matplotlib.ticker import NullLocator
import numpy as np

from benchmarks.bad_minimum.findings import most_different
from benchmarks.bad_minimum.methods import LE_SAM
from benchmarks.bad_minimum.methods import MATCHED
from benchmarks.bad_minimum.methods import MONGE
from benchmarks.bad_minimum.methods import SAM
from benchmarks.bad_minimum.methods import SGD
from benchmarks.common import style

COLOURS = {SGD: '#6c757d', LE_SAM: '#7b3294', **style.COLOURS}
CONTROL = {'linestyle': '--', 'linewidth': 1.5, 'markerfacecolor': 'white'}
LOOKS = {
  LE_SAM: {'marker': 'D', **CONTROL, 'label': 'LE-SAM (hard radius)'},
  MATCHED: {'marker': '^', **CONTROL, 'label': 'SAM at Monge SAM’s mean radius'},
  SAM: {'marker': 'o'},
  MONGE: {'marker': 's'},
}
ORDER = (SAM, MONGE, LE_SAM, MATCHED)
RING = {'markersize': 13, 'markerfacecolor': 'none', 'markeredgewidth': 1.4}
PANELS = (
  ('test', 'test accuracy, %', 100),
  ('train', 'training accuracy, %', 100),
  ('train_loss', 'training loss', 1),
  ('slope', 'slope n = ‖g‖', 1),
  ('radius', 'radius ‖δ‖', 1),
)


def draw(results: Mapping[str, Any], path: Path) -> None:
  """Writes test and training accuracy against rho, and below them curves over time."""
  style.use()
  fig = plt.figure(figsize=(13, 8.2))
  above, below = fig.add_gridspec(2, 1, height_ratios=(1.35, 1), hspace=0.46, top=0.86)
  panels = above.subgridspec(1, 2, wspace=0.16)
  axes = [fig.add_subplot(panel) for panel in panels]
  for ax, part in zip(axes, ('test', 'train'), strict=True):
    _draw_rhos(ax, results, part)
  axes[0].set_title('Test accuracy, %', loc='left', fontsize=11)
  axes[1].set_title(
    'Training accuracy, %: who stays in the valley', loc='left', fontsize=11
  )
  handles = {
    label: handle
    for ax in axes
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
  }
  fig.legend(
    handles.values(), handles, loc='upper center', bbox_to_anchor=(0.5, 0.975), ncols=4
  )
  rho = most_different(results)
  curves = below.subgridspec(1, len(PANELS), wspace=0.42)
  for panel, (name, title, scale) in zip(curves, PANELS, strict=True):
    ax = fig.add_subplot(panel)
    for method in (SGD, *LOOKS):
      _draw_curve(ax, results, method, rho, name, scale)
    if name in ('train_loss', 'slope'):
      ax.set_yscale('log')
    ax.set_title(title, loc='left', fontsize=10.5)
    ax.set_xlabel('epoch')
  settings = results['settings']
  seeds = len(settings['seeds'])
  fig.suptitle(
    f'Out of a bad minimum, Fashion-MNIST (mean ± standard error of {seeds} seeds)',
    y=1.0,
  )
  fig.text(
    0.5,
    0.412,
    f'Fine-tuning over time at ρ = {rho:g}, where SAM and Monge SAM differ most before'
    ' either is beyond its best radius',
    ha='center',
    fontsize=11,
  )
  fig.savefig(path)
  plt.close(fig)


def _draw_rhos(ax, results, part):
  """All methods against rho; SGD and the two starts as level lines."""
  rhos = results['settings']['rhos']
  looks = {'bad start': 'starts'}
  if part == 'test':
    looks['trained without wrong labels'] = 'fresh'
  for (label, key), dashes in zip(looks.items(), (':', '-.'), strict=False):
    level = 100 * statistics.mean(look[part] for look in results[key])
    ax.axhline(level, color='#212529', linestyle=dashes, linewidth=1.2, label=label)
  (sgd,) = (row for row in results['rows'] if row['method'] == SGD)
  mean, se = 100 * sgd[part]['mean'], 100 * sgd[part]['se']
  ax.axhline(mean, color=COLOURS[SGD], linewidth=2.0, label=SGD, zorder=1)
  ax.axhspan(mean - se, mean + se, color=COLOURS[SGD], alpha=0.15, linewidth=0)
  for method in ORDER:
    rows = [row for row in results['rows'] if row['method'] == method]
    mean, se = (np.array([100 * row[part][k] for row in rows]) for k in ('mean', 'se'))
    colour = COLOURS[method]
    look = {'label': method, **LOOKS[method]}
    ax.plot(rhos, mean, color=colour, zorder=2 + (method == MONGE), **look)
    ax.fill_between(rhos, mean - se, mean + se, color=colour, alpha=0.15, linewidth=0)
    if part == 'test':
      best = rhos.index(results['best'][method])
      ax.plot(rhos[best], mean[best], 'o', color=colour, **RING)
  if part == 'test':
    ax.plot([], [], 'o', color='#343a40', label='chosen on validation images', **RING)
  ax.set_xscale('log')
  ax.set_xticks(rhos)
  ax.xaxis.set_major_formatter(FuncFormatter(lambda rho, _: f'{rho:g}'))
  ax.xaxis.set_minor_locator(NullLocator())
  ax.set_xlabel('radius ρ')


def _draw_curve(ax, results, method, rho, name, scale):
  """One quantity over time: mean and standard error over the seeds."""
  if method == SGD and name == 'radius':
    return
  (row,) = (
    row
    for row in results['rows']
    if row['method'] == method and row['rho'] in (rho, None)
  )
  values = scale * np.array([curves[name] for curves in row['curves']])
  epochs = np.array(row['curves'][0]['epoch'])
  if len(values[0]) == epochs[-1]:
    # Means over the steps of an epoch, not looks at its end.
    epochs = np.arange(epochs[-1]) + 0.5
  mean, se = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
  style_of = {k: v for k, v in LOOKS.get(method, {}).items() if k.startswith('line')}
  ax.plot(epochs, mean, color=COLOURS[method], **{'linewidth': 1.8, **style_of})
  low = np.maximum(mean - se, mean / 3)
  ax.fill_between(
    epochs, low, mean + se, color=COLOURS[method], alpha=0.13, linewidth=0
  )
