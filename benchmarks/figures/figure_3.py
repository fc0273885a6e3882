"""Figure 3: how low the methods get on `w²`.

Setting of the paper: ρ = 0.3, learning rates 0.66 and 0.74, 11 steps. Left open: the
start, here w = 2. It does not matter: a method with a constant radius jumps for ever
between ±a, and 11 steps are enough to see it. From `w − 2η(w + δ) = −w` follows
`a + δ(a) = a/η`, so that `a √(1 + 4α²a²) = ρη/(1 − η)` for the learning rate η: that
of SAM with α = 0, of Monge SAM, here and in the paper, with α = 1.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator
import numpy as np

from benchmarks.common import style
from benchmarks.common.tables import Table
from benchmarks.figures.landscapes import METHODS
from benchmarks.figures.landscapes import parabola
from benchmarks.figures.landscapes import trajectories

SETTINGS = {'start': 2.0, 'rho': 0.3, 'alpha': 1.0, 'lrs': (0.66, 0.74), 'steps': 11}
SHOWN = ('SAM', 'Monge SAM')


def amplitude(lr: float, rho: float, alpha: float) -> float:
  """``a > 0`` with ``a √(1 + 4α²a²) = ρη/(1 − η)``: where the jumps between ±a end."""
  reach = rho * lr / (1 - lr)
  if alpha == 0:
    return reach
  return float(np.sqrt((np.hypot(1, 4 * alpha * reach) - 1) / (8 * alpha**2)))


def measure(*, quick: bool = False) -> tuple[dict[str, Any], dict[Any, Any]]:
  """The loss after the last step, and the paths for the picture."""
  del quick  # four runs of 11 steps
  rho, alpha = SETTINGS['rho'], SETTINGS['alpha']
  paths = {
    (name, lr): trajectories(
      parabola,
      METHODS[name](rho),
      np.array([[SETTINGS['start']]]),
      lr=lr,
      steps=SETTINGS['steps'],
    )[0, :, 0]
    for name in SHOWN
    for lr in SETTINGS['lrs']
  }
  ends = [
    {
      'method': name,
      'lr': lr,
      'end': float(path[-1]),
      'loss': float(path[-1] ** 2),
      'loss_of_closed_form': amplitude(lr, rho, alpha * (name != 'SAM')) ** 2,
    }
    for (name, lr), path in paths.items()
  ]
  return {'settings': SETTINGS, 'ends': ends}, paths


def table(numbers: dict[str, Any]) -> Table:
  """What is printed."""
  rows = [
    [
      e['method'],
      f'{e["lr"]:g}',
      f'{e["end"]:.4f}',
      f'{e["loss"]:.4f}',
      f'{e["loss_of_closed_form"]:.4f}',
    ]
    for e in numbers['ends']
  ]
  return Table('', ['method', 'lr', 'end', 'loss', 'loss, closed form'], rows)


def draw(numbers: dict[str, Any], paths: dict[str, Any], file: Path) -> None:
  """Writes the iterates on the parabola and the loss of every step."""
  style.use()
  lrs = SETTINGS['lrs']
  fig, axes = plt.subplots(
    2, len(lrs), figsize=(10, 7.4), layout='constrained', sharey='row'
  )
  for column, lr in zip(axes.T, lrs, strict=True):
    _draw_parabola(column[0], paths, lr)
    _draw_losses(column[1], numbers, paths, lr)
    column[0].set_title(f'learning rate {lr:g}', loc='left', fontsize=11.5)
  axes[0, 0].set_ylabel('loss w²')
  axes[1, 0].set_ylabel('loss w², logarithmic')
  axes[0, 0].legend(loc='upper center')
  fig.savefig(file)
  plt.close(fig)


def _draw_parabola(ax, paths, lr):
  w = np.linspace(-2.15, 2.15, 200)
  ax.plot(w, w**2, color='#adb5bd', linewidth=1.4, zorder=1)
  for name in SHOWN:
    path, colour = paths[name, lr], style.COLOURS[name]
    ax.plot(path, path**2, '-o', color=colour, linewidth=1.1, label=name, alpha=0.75)
    ax.plot(
      path[-1],
      path[-1] ** 2,
      'o',
      color=colour,
      markersize=12,
      markeredgecolor='white',
      zorder=4,
    )
  ax.set_xlabel('w')


def _draw_losses(ax, numbers, paths, lr):
  for name in SHOWN:
    colour = style.COLOURS[name]
    ax.plot(paths[name, lr] ** 2, '-o', color=colour)
    (end,) = (e for e in numbers['ends'] if (e['method'], e['lr']) == (name, lr))
    level = [end['loss_of_closed_form']] * 2
    ax.plot([0, SETTINGS['steps']], level, ':', color=colour, linewidth=1, zorder=1)
    ax.annotate(
      f'{end["loss"]:.3f}',
      (SETTINGS['steps'], end['loss']),
      (8, -4),
      textcoords='offset points',
      color=colour,
      weight='bold',
    )
  ax.set_yscale('log')
  ax.set_yticks([0.2, 0.5, 1, 2, 4], minor=False)
  ax.yaxis.set_major_formatter('{x:g}')
  ax.yaxis.set_minor_locator(NullLocator())
  ax.set_xlim(right=SETTINGS['steps'] + 1.6)
  ax.set_xticks(range(0, SETTINGS['steps'] + 1, 2))
  ax.set_xlabel('step')
