"""Landscapes: a loss on a line or a plane through its parameters, and its picture.

    u = random_direction(params, key=key)
    v = steepest_direction(loss, params)
    landscape = loss_slice(loss, params, [v, u], [x, y])
    ax = plot(landscape)
    mark(ax, landscape, probes(loss, params, landscape, rho=0.05))

Only the last two need matplotlib (``msam-optax[plot]``).
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np

from msam_optax.metrics import euclidean
from msam_optax.metrics import Metric
from msam_optax.metrics import monge
from msam_optax.numerics import widen

COLOURS = {'SAM': '#d95f02', 'Monge SAM': '#1b6ca8'}


class Slice(NamedTuple):
  """A loss on a line or a plane.

  Attributes:
    directions: the one or two directions, trees like the parameters.
    coordinates: for each direction the steps along it, ``[a]`` and ``[b]``.
    values: the loss there, ``[a]`` or ``[a, b]``, float32 or wider.
  """

  directions: tuple[Any, ...]
  coordinates: tuple[jax.Array, ...]
  values: jax.Array


def random_direction(params: Any, *, key: jax.Array) -> Any:
  """A random direction, normalised filter by filter.

  A normal random array, in which each filter (what one output feature is made from:
  the last axis apart) is as long as that of the parameters. So steps mean the same in
  every layer, and landscapes of networks whose layers are scaled against each other
  can be compared. Leaves of less than two dimensions (biases, scales) stay fixed.

  Args:
    params: pytree of real floating-point arrays.
    key: a random key.

  Returns:
    A pytree like ``params``.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from msam_optax.landscape import random_direction
    >>> params = {'kernel': jnp.array([[3.0, 0.0], [4.0, 2.0]]), 'bias': jnp.ones(2)}
    >>> d = random_direction(params, key=jax.random.key(0))
    >>> print(jnp.linalg.norm(d['kernel'], axis=0), d['bias'])
    [5. 2.] [0. 0.]

  References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018
  """
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))

  def filtered(w, key):
    if jnp.ndim(w) < 2:
      return jnp.zeros_like(w)
    d = jax.random.normal(key, w.shape, widen(w).dtype)
    axes = tuple(range(jnp.ndim(w) - 1))
    length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))
    return (d * length(widen(w)) / length(d)).astype(w.dtype)

  return structure.unflatten(map(filtered, leaves, keys))


def steepest_direction(
  loss: Callable[[Any], Any], params: Any, metric: Metric = euclidean()
) -> Any:
  """The direction of steepest ascent under a metric, ``G⁻¹g/√(gᵀG⁻¹g)``.

  Args:
    loss: ``params -> scalar``.
    params: pytree of real floating-point arrays.
    metric: ``G``, Euclidean by default: the direction is ``g/‖g‖``.

  Returns:
    A pytree like ``params``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax.landscape import steepest_direction
    >>> print(steepest_direction(lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])))
    [0.6 0.8]
  """
  ascent, _ = metric.ascend(jax.grad(loss)(params), metric.init(params), params)
  return ascent.direction


def loss_slice(
  loss: Callable[[Any], Any],
  params: Any,
  directions: Sequence[Any],
  coordinates: Sequence[Any],
  *,
  chunk: int = 16,
) -> Slice:
  """The loss at ``w + x u`` or ``w + x u + y v``, on a grid of steps.

  Args:
    loss: ``params -> scalar``.
    params: ``w``, a pytree of real floating-point arrays.
    directions: one or two trees like ``params``, ``u`` and ``v``.
    coordinates: for each direction the steps ``x`` and ``y``, ``[a]`` and ``[b]``.
    chunk: how many points are evaluated at once, >= 1: memory against speed.

  Returns:
    A :class:`Slice`.

  Raises:
    ValueError: if there are not one or two directions, each with its steps.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax.landscape import loss_slice
    >>> w, u = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> print(loss_slice(lambda w: jnp.sum(w**2), w, [u], [[-2.0, 0.0, 1.0]]).values)
    [5. 1. 2.]
  """
  if len(directions) not in (1, 2) or len(coordinates) != len(directions):
    raise ValueError(
      'A slice has one or two directions, each with its steps, got'
      f' {len(directions)} directions and {len(coordinates)} arrays of steps.'
    )
  steps = tuple(jnp.asarray(x, jnp.result_type(float)) for x in coordinates)
  grid = jnp.stack(jnp.meshgrid(*steps, indexing='ij'), axis=-1)

  def value(point):
    def move(w, *ds):
      w_wide = widen(w)
      for x, d in zip(point, ds, strict=True):
        w_wide += x.astype(w_wide.dtype) * widen(d, like=w)
      return w_wide.astype(jnp.result_type(w))

    return loss(jax.tree.map(move, params, *directions))

  points = grid.reshape(-1, len(directions))
  values = jax.jit(lambda p: jax.lax.map(value, p, batch_size=chunk))(points)
  return Slice(tuple(directions), steps, values.reshape(grid.shape[:-1]))


def probes(
  loss: Callable[[Any], Any],
  params: Any,
  landscape: Slice,
  rho: float | jax.Array,
  alpha: float | jax.Array = 1.0,
) -> dict[str, np.ndarray]:
  """Where SAM and Monge SAM probe, in the coordinates of a slice.

  The perturbations are projected onto the slice; they lie in it if
  :func:`steepest_direction` is one of its directions.

  Args:
    loss: ``params -> scalar``.
    params: the parameters that the slice goes through.
    landscape: the slice.
    rho: ``ρ``, scalar >= 0.
    alpha: ``α``, scalar >= 0, of Monge SAM.

  Returns:
    A dict from ``'SAM'`` and ``'Monge SAM'`` to coordinates, ``[1]`` or ``[2]``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax.landscape import loss_slice, probes, steepest_direction
    >>> loss, w = lambda w: jnp.sum(w**2), jnp.array([0.3, 0.4])
    >>> line = loss_slice(loss, w, [steepest_direction(loss, w)], [[0.0, 1.0]])
    >>> for name, at in probes(loss, w, line, rho=0.5).items():
    ...   print(f'{name}: {at[0]:.4f}')
    SAM: 0.5000
    Monge SAM: 0.3536
  """
  basis = np.stack([_flat(d) for d in landscape.directions], axis=1)
  found = {}
  for name, metric in {'SAM': euclidean(), 'Monge SAM': monge(alpha)}.items():
    delta = rho * _flat(steepest_direction(loss, params, metric))
    found[name] = np.linalg.lstsq(basis, delta, rcond=None)[0]
  return found


def plot(landscape: Slice, *, ax: Any = None, levels: int = 20) -> Any:
  """Draws a slice: a curve, or filled contours with a scale.

  Args:
    landscape: the slice.
    ax: matplotlib axes to draw on, by default those of a new figure.
    levels: about how many contours a plane has.

  Returns:
    The axes.

  Examples:
    >>> import jax.numpy as jnp, matplotlib
    >>> matplotlib.use('Agg')
    >>> from msam_optax.landscape import loss_slice, plot
    >>> u = jnp.array([1.0, 0.0])
    >>> line = loss_slice(lambda w: jnp.sum(w**2), u, [u], [jnp.linspace(-1, 1, 5)])
    >>> print(plot(line).get_ylabel())
    loss
  """
  import matplotlib.pyplot as plt

  if ax is None:
    _, ax = plt.subplots()
  if len(landscape.directions) == 1:
    ax.plot(landscape.coordinates[0], landscape.values, color='#343a40')
    ax.set(xlabel='step along the direction', ylabel='loss')
    return ax
  x, y = landscape.coordinates
  filled = ax.contourf(x, y, landscape.values.T, levels=levels, cmap='Greys')
  ax.contour(x, y, landscape.values.T, levels=filled.levels, colors='w', linewidths=0.4)
  ax.figure.colorbar(filled, ax=ax, label='loss')
  ax.set(xlabel='first direction', ylabel='second direction')
  return ax


def mark(ax: Any, landscape: Slice, points: Mapping[str, Any]) -> Any:
  """Marks the parameters, and points such as :func:`probes` gives, with a legend.

  Args:
    ax: the axes that :func:`plot` has drawn on.
    landscape: the slice.
    points: from names to coordinates, ``[1]`` or ``[2]``.

  Returns:
    The axes.

  Examples:
    >>> import jax.numpy as jnp, matplotlib
    >>> matplotlib.use('Agg')
    >>> from msam_optax.landscape import loss_slice, mark, plot
    >>> u = jnp.array([1.0, 0.0])
    >>> line = loss_slice(lambda w: jnp.sum(w**2), u, [u], [jnp.linspace(-1, 1, 5)])
    >>> ax = mark(plot(line), line, {'SAM': [0.5]})
    >>> print([text.get_text() for text in ax.get_legend().get_texts()])
    ['parameters', 'SAM']
  """
  here = np.zeros(len(landscape.directions))
  for name, at in {'parameters': here, **points}.items():
    at = np.asarray(at)
    if len(at) == 1:
      value = np.interp(at[0], landscape.coordinates[0], landscape.values)
      at = (at[0], value)
    colour = COLOURS.get(name, '#111111')
    ax.plot(*at, 'o', color=colour, markeredgecolor='w', markersize=8, label=name)
  ax.legend()
  return ax


def _flat(tree):
  return np.asarray(flatten_util.ravel_pytree(tree)[0], np.float64)
