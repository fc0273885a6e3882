"""Figure 5: where a grid of starts ends, on `(1 − w₁w₂)²`.

Setting of the paper: 10×10 starts on [−3, 3]², 200 steps, learning rate 0.01, ρ = 1,
for SAM, Monge SAM, Fisher SAM (diagonal) and ASAM. Left open: η of Fisher SAM, here 1
(its metric is then the diagonal of Monge's, α = 1), and η of ASAM, here 0.01 (its
authors'), both coordinates weights. `sensitivity` has other values: what Fisher SAM
and ASAM do depends on them. Added: Monge over ASAM's metric, and plain gradient descent
as a control. A run ends at the saddle if it ends within 0.25 of it, and at a flattest
minimum if within 0.25 of ±(1, 1).

Ten starts are on the line w₁ = −w₂. By symmetry no method leaves it, and all runs there
end at the saddle, also those of gradient descent: `off_line` counts the other runs at
the saddle. Likewise the ten on w₁ = w₂ can end at a flattest minimum by symmetry.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from mpl_toolkits.axes_grid1 import make_axes_locatable
import numpy as np

from benchmarks.common import style
from benchmarks.common.tables import Table
from benchmarks.figures.landscapes import distances
from benchmarks.figures.landscapes import draw_valley
from benchmarks.figures.landscapes import mark_points
from benchmarks.figures.landscapes import METHODS
from benchmarks.figures.landscapes import NEAR
from benchmarks.figures.landscapes import trajectories
from benchmarks.figures.landscapes import valley

SETTINGS = {
  'side': 10,
  'extent': 3.0,
  'rho': 1.0,
  'lr': 0.01,
  'steps': 200,
  'near': NEAR,
  'alpha': 1.0,
  'eta': {'Fisher SAM': 1.0, 'ASAM': 0.01, 'Monge over ASAM': 0.01},
}
SENSITIVITY = {
  'Fisher SAM': (0.01, 0.1, 1.0, 10.0),
  'ASAM': (0.0, 0.01, 0.1, 1.0),
  'Monge over ASAM': (0.0, 0.01, 0.1, 1.0),
}
# A little more than the grid of starts.
EXTENT = 3.4
BINS = np.linspace(-EXTENT, EXTENT, 35)
COLUMNS = 3


def starts() -> np.ndarray:
  """``[100, 2]``: the grid."""
  axis = np.linspace(-SETTINGS['extent'], SETTINGS['extent'], SETTINGS['side'])
  return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def measure(*, quick: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """Where each method's runs end, for other η too, and the paths for the picture."""
  rho = SETTINGS['rho']
  paths = {name: _run(method(rho)) for name, method in METHODS.items()}
  rows = [{'method': name, **count(path[:, -1])} for name, path in paths.items()]
  sensitivity = [
    {'method': name, 'eta': eta, **count(_run(METHODS[name](rho, eta=eta))[:, -1])}
    for name, etas in SENSITIVITY.items()
    for eta in (etas[:1] if quick else etas)
  ]
  ends = {name: path[:, -1].tolist() for name, path in paths.items()}
  return {
    'settings': SETTINGS,
    'rows': rows,
    'sensitivity': sensitivity,
    'ends': ends,
  }, paths


def count(ends: np.ndarray) -> dict[str, Any]:
  """How many runs end where, of ``[100, 2]`` ends in the order of the starts."""
  from_saddle, from_flattest = distances(ends)
  at_saddle, at_flattest = from_saddle < NEAR, from_flattest < NEAR
  on_line = np.isclose(starts().sum(axis=-1), 0)
  return {
    'saddle': int(at_saddle.sum()),
    'off_line': int(np.sum(at_saddle & ~on_line)),
    'flattest': int(at_flattest.sum()),
    'elsewhere': int(np.sum(~at_saddle & ~at_flattest)),
    'median_loss': float(np.median(valley(ends.T))),
  }


def table(numbers: dict[str, Any]) -> Table:
  """What is printed."""
  names = ('saddle', 'off_line', 'flattest', 'elsewhere')
  rows = [
    [
      row['method'] if 'eta' not in row else f'{row["method"]}, η = {row["eta"]:g}',
      *(str(row[name]) for name in names),
      f'{row["median_loss"]:.4f}',
    ]
    for row in [*numbers['rows'], *numbers['sensitivity']]
  ]
  columns = ['method', 'at saddle', 'not by symmetry', 'at a flattest minimum']
  return Table('', [*columns, 'elsewhere', 'median loss'], rows)


def _run(method):
  lr, steps = SETTINGS['lr'], SETTINGS['steps']
  return trajectories(valley, method, starts(), lr=lr, steps=steps)


def draw(numbers: dict[str, Any], paths: dict[str, np.ndarray], file: Path) -> None:
  """Writes a panel per method, and bars with the shares."""
  style.use()
  fig = plt.figure(figsize=(16, 8.7), layout='constrained')
  runs = len(numbers['ends']['SAM'])
  fig.suptitle(f'{runs} runs from a grid of starts', fontsize=13, x=0.01, ha='left')
  [[left, right]] = fig.subfigures(1, 2, squeeze=False, width_ratios=(3, 1))
  panels = left.subfigures(-(-len(paths) // COLUMNS), COLUMNS).flat
  for panel, row in zip(panels, numbers['rows'], strict=True):
    _draw_joint(panel, row['method'], paths[row['method']])
  _draw_shares(right.subplots(), numbers['rows'])
  fig.savefig(file)
  plt.close(fig)


def _draw_joint(panel, name, path):
  colour = style.COLOURS[name]
  ax = panel.subplots()
  draw_valley(ax, (-EXTENT, EXTENT), (-EXTENT, EXTENT))
  mark_points(ax, size=9, zorder=3)
  ax.plot(*path.transpose(2, 1, 0), color=colour, linewidth=0.6, alpha=0.55, zorder=2)
  ax.plot(
    *path[:, -1].T,
    'o',
    color=colour,
    markersize=5,
    markeredgecolor='white',
    markeredgewidth=0.6,
    zorder=5,
  )
  divider = make_axes_locatable(ax)
  top = divider.append_axes('top', '17%', pad=0.04, sharex=ax)
  side = divider.append_axes('right', '17%', pad=0.04, sharey=ax)
  w1, w2 = np.clip(path[:, -1].T, -EXTENT, EXTENT)
  top.hist(w1, BINS, color=colour)
  side.hist(w2, BINS, color=colour, orientation='horizontal')
  for marginal in (top, side):
    marginal.set_axis_off()
  top.set_ylim(0, 50)
  side.set_xlim(0, 50)
  top.set_title(name, color=colour, weight='bold', loc='left')


def _draw_shares(ax, rows):
  """Per method three bars on each other: saddle, flattest minima, elsewhere."""
  names = [row['method'] for row in rows]
  colours = [style.COLOURS[name] for name in names]
  start = np.zeros(len(rows))
  for key, label, alpha in (
    ('saddle', 'at the saddle', 1.0),
    ('flattest', 'near a flattest minimum', 0.45),
    ('elsewhere', 'elsewhere', 0.12),
  ):
    share = np.array([row[key] for row in rows])
    bars = ax.barh(names, share, left=start, color=colours, height=0.72)
    for bar, value in zip(bars, share, strict=True):
      bar.set_alpha(alpha)
      if value:
        ax.text(
          bar.get_x() + bar.get_width() / 2,
          bar.get_y() + bar.get_height() / 2,
          str(value),
          ha='center',
          va='center',
          color='white' if alpha == 1 else 'black',
          weight='bold',
        )
    ax.barh(names[:1], 0, color='black', alpha=alpha, label=label)
    start = start + share
  ax.invert_yaxis()
  ax.grid(visible=False)
  ax.spines['bottom'].set_visible(False)
  ax.spines['left'].set_visible(False)
  ax.set_xticks([])
  ax.tick_params(left=False)
  ax.legend(loc='upper center', bbox_to_anchor=(0.4, -0.01))
  ax.set_title(f'where {start[0]:g} runs end', loc='left', fontsize=11.5)
