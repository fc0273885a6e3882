"""The picture of `benchmarks.bad_minimum`: accuracy against rho, and over time."""

from collections.abc import Mapping
from pathlib import Path
import statistics
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.bad_minimum.methods import ANNEALED
from benchmarks.bad_minimum.methods import LE_SAM
from benchmarks.bad_minimum.methods import SGD
from benchmarks.common import style
from benchmarks.common.grid import MATCHED
from benchmarks.common.grid import MONGE
from benchmarks.common.grid import paired
from benchmarks.common.grid import SAM

COLOURS = {SGD: style.COLOURS['Adam'], ANNEALED: '#1b9e77', **style.COLOURS}
LE_LOOK = {'marker': 'D', 'label': 'LE-SAM (hard radius)', **style.CONTROL}
ANNEALED_LOOK = {'marker': 'v', 'label': 'Monge SAM, α from 0'}
LOOKS = {LE_SAM: LE_LOOK, ANNEALED: ANNEALED_LOOK, **style.LOOKS}
ORDER = (SAM, MONGE, ANNEALED, LE_SAM, MATCHED)
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
    handles.values(),
    handles,
    loc='upper center',
    bbox_to_anchor=(0.5, 0.975),
    ncols=5,
    fontsize=10,
  )
  rho = most_different(results)
  curves = below.subgridspec(1, len(PANELS), wspace=0.42)
  for i, (name, title, scale) in enumerate(PANELS):
    ax = fig.add_subplot(curves[i])
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


def most_different(results: Mapping[str, Any]) -> float:
  """The rho where SAM and Monge SAM differ most, none being beyond its best one."""
  rows = {(row['method'], row['rho']): row for row in results['rows']}
  end = min(results['best'][SAM], results['best'][MONGE])
  rhos = [rho for rho in results['settings']['rhos'] if rho <= end]
  runs = lambda method, rho: rows[method, rho]['test']['runs']
  return max(rhos, key=lambda rho: abs(paired(runs(SAM, rho), runs(MONGE, rho)).mean))


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
  style.draw_level(ax, mean, se, SGD, COLOURS[SGD])
  for method in ORDER:
    rows = [row for row in results['rows'] if row['method'] == method]
    mean, se = (np.array([100 * row[part][k] for row in rows]) for k in ('mean', 'se'))
    colour = COLOURS[method]
    ax.plot(rhos, mean, color=colour, zorder=2 + (method == MONGE), **LOOKS[method])
    style.draw_band(ax, rhos, mean - se, mean + se, colour)
    if part == 'test':
      best = rhos.index(results['best'][method])
      ax.plot(rhos[best], mean[best], 'o', color=colour, **style.RING)
  if part == 'test':
    ax.plot(
      [], [], 'o', color='#343a40', label='chosen on validation images', **style.RING
    )
  style.draw_rho_axis(ax, rhos)


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
  style.draw_band(
    ax, epochs, np.maximum(mean - se, mean / 3), mean + se, COLOURS[method]
  )
