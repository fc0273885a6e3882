"""Names and pictures in the common space, before and after: the paper's Figure 7."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.alignment.problem import PRETRAINED
from benchmarks.common import style

SPLIT = 'style'
METHODS = (PRETRAINED, 'SGD', 'SAM', 'Monge SAM')
TITLES = {PRETRAINED: 'before: pretrained'}
# The order of the groups in the file: faces, people, animals, food, ...
GROUPS = {
  'Smileys': '#e6ab02',
  'People': '#d95f02',
  'Animals': '#66a61e',
  'Food': '#a6491f',
  'Travel': '#1b6ca8',
  'Activities': '#7b4fa3',
  'Objects': '#6c757d',
  'Symbols': '#e7298a',
  'Flags': '#17a2a2',
}


def principal_plane(text: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, float]:
  """Both on their two first common principal components.

  Args:
    text: ``[N, D]``.
    image: ``[M, D]``.

  Returns:
    ``[N + M, 2]``, and the share of the variance that these two have.
  """
  x = np.concatenate([text, image]).astype(np.float64)
  x -= x.mean(axis=0)
  _, size, axes = np.linalg.svd(x, full_matrices=False)
  axes = axes[:2]
  # The sign of an axis is free: its largest entry is made positive.
  largest = np.abs(axes).argmax(axis=1)
  axes = axes * np.sign(axes[np.arange(2), largest])[:, None]
  return x @ axes.T, float((size[:2] ** 2).sum() / (size**2).sum())


def draw(
  panels: Sequence[tuple[str, float, np.ndarray, np.ndarray]],
  groups: np.ndarray,
  path: Path,
) -> None:
  """Writes a panel a method; a line joins a name to its picture.

  Args:
    panels: method, alignment, and embeddings of names and pictures.
    groups: of the concepts, which give the colours.
    path: of the picture.
  """
  style.use()
  colours: Any = np.array(list(GROUPS.values()))[groups]
  fig, axes = plt.subplots(2, 2, figsize=(11, 11.4), layout='constrained')
  for ax, (method, knn, text, image) in zip(axes.flat, panels, strict=True):
    xy, share = principal_plane(text, image)
    text_xy, image_xy = np.split(xy, 2)
    for pair, colour in zip(zip(text_xy, image_xy, strict=True), colours, strict=True):
      ax.plot(*np.array(pair).T, color=colour, alpha=0.14, linewidth=0.7, zorder=1)
    ax.scatter(*text_xy.T, c=colours, s=22, marker='o', linewidths=0, alpha=0.9)
    ax.scatter(*image_xy.T, edgecolors=colours, c='white', s=26, marker='^', zorder=2)
    title = TITLES.get(method, f'tuned with {method}')
    ax.set_title(title, loc='left', fontsize=12, fontweight='bold')
    cosine = (text * image).sum(axis=1).mean()
    ax.set_title(
      f'alignment {knn:.3f}, cosine of pairs {cosine:.2f}', loc='right', fontsize=10
    )
    ax.set_xlabel(f'two principal components, {share:.0%} of the variance', fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.set_aspect('equal', 'datalim')
  for name, colour in GROUPS.items():
    axes.flat[0].plot([], [], 's', color=colour, label=name)
  axes.flat[0].plot([], [], 'o', color='#343a40', label='name')
  axes.flat[0].plot(
    [], [], '^', color='#343a40', markerfacecolor='white', label='picture'
  )
  handles, labels = axes.flat[0].get_legend_handles_labels()
  fig.legend(handles, labels, loc='outside lower center', ncols=6)
  fig.savefig(path)
  plt.close(fig)
