"""Landscapes: a loss on a line or a plane through its parameters, and its picture.

This plots the loss on a plane, and marks the probes of SAM and Monge SAM::

    u = random_direction(params, key=key)
    v = steepest_direction(loss, params)
    landscape = loss_slice(loss, params, [v, u], [x, y])
    ax = plot(landscape)
    mark(ax, landscape, probes(loss, params, landscape, rho=0.05))

Only the last two need matplotlib (``msam-optax[plot]``). Parameters are any pytree of
real floating-point arrays; of an Equinox module give the arrays alone, as shown in
:mod:`msam_optax.sharpness`.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msam_optax import _checks
from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import spaces
from msam_optax.monge import monge

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


def random_direction(
  params: Any, *, key: jax.Array, weights: Any = None, stacked: Any = 0
) -> Any:
  """A random direction, normalised filter by filter.

  A normal random array, in which each filter (what one output feature is made from:
  all axes but the last) is as long as that of the parameters. So steps mean the same in
  every layer, and landscapes of networks whose layers are scaled against each other
  can be compared. Biases and scales stay fixed.

  Layers that are stacked in one array, as ``nn.scan`` and ``nnx.vmap`` do, have their
  filters layer by layer if ``stacked`` says so::

    random_direction(params, key=key, stacked={'embed': 0, 'blocks': 1, 'head': 0})

  Args:
    params: pytree of real floating-point arrays.
    key: a random key.
    weights: which leaves have filters, the others stay fixed: a tree of bools with the
      structure of the params (or a prefix of it), or a function from params to one,
      such as ``by_name('kernel')``. A weight that has one axis per layer is one filter.
      By default the leaves that have two axes or more per layer and are not named as
      biases and scales are: ``bias``, ``b``, ``scale``, ``offset``, ``beta``,
      ``gamma``.
    stacked: how many leading axes of a leaf count layers, an int or a tree of ints
      with the structure of the params or a prefix of it.

  Returns:
    A pytree like ``params``.

  Raises:
    ValueError: if ``weights`` or ``stacked`` does not fit the params.
    TypeError: if a leaf of ``params`` is no real floating-point array, or one of
      ``weights`` no bool, or one of ``stacked`` no int.

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
  _checks.check_real(params)
  layers = _resolve_stacked(stacked, params)
  if weights is None:
    chosen = jax.tree.map(
      lambda weight, n, w: weight and jnp.ndim(w) - n >= 2,
      _masks.weights_by_default(params),
      layers,
      params,
    )
  else:
    chosen = _masks.resolve_mask(weights, params, name='weights')
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))

  def filtered(w, weight, layers, key):
    if not weight:
      return jnp.zeros_like(w)
    d = jax.random.normal(key, jnp.shape(w), _numerics.widen(w).dtype)
    end = jnp.ndim(w) - 1 if jnp.ndim(w) - layers >= 2 else jnp.ndim(w)
    axes = tuple(range(layers, end))
    return (_unit(d, axes) * _length(_numerics.widen(w), axes)).astype(
      jnp.result_type(w)
    )

  return structure.unflatten(
    map(filtered, leaves, jax.tree.leaves(chosen), jax.tree.leaves(layers), keys)
  )


def steepest_direction(
  loss: Callable[[Any], Any],
  params: Any,
  metric: metrics.Metric = metrics.euclidean(),
) -> Any:
  """The direction of steepest ascent under a metric, ``G⁻¹g/√(gᵀG⁻¹g)``.

  Args:
    loss: ``params -> scalar``.
    params: pytree of real floating-point arrays.
    metric: ``G``, Euclidean by default: the direction is ``g/‖g‖``.

  Returns:
    A pytree like ``params``.

  Raises:
    TypeError: if a leaf of ``params`` is no real floating-point array.

  Examples:
    >>> import jax.numpy as jnp
    >>> from msam_optax.landscape import steepest_direction
    >>> print(steepest_direction(lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])))
    [0.6 0.8]
  """
  _checks.check_real(params)
  ascent, _ = metric.ascend(
    jax.grad(loss)(params),
    metric.init(params),
    params,
    space=spaces.LOCAL,
    rho=jnp.zeros([], _numerics.wide_dtype(params)),
    grad_fn=jax.grad(loss),
  )
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
    coordinates: for each direction the steps ``x`` and ``y``, ``[a]`` and ``[b]``, in
      any order.
    chunk: how many points are evaluated at once, >= 1: memory against speed.

  Returns:
    A :class:`Slice`.

  Raises:
    ValueError: if there are not one or two directions, each with its steps, or a
      direction is not like ``params``, or ``chunk`` is less than 1.
    TypeError: if a leaf of ``params`` is no real floating-point array.

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
  _checks.check_real(params)
  for i, direction in enumerate(directions):
    what = f'`directions[{i}]` must be like `params`'
    _checks.check_like(direction, params, what=what, dtypes=False)
  steps = tuple(jnp.asarray(x, jnp.result_type(float)) for x in coordinates)
  for i, x in enumerate(steps):
    if x.ndim != 1 or not x.size:
      raise ValueError(
        f'`coordinates[{i}]` must be a list of steps, at least one, got an array of'
        f' shape {x.shape}.'
      )
  if chunk < 1:
    raise ValueError(f'`chunk` must be 1 or more, got {chunk}.')
  grid = jnp.stack(jnp.meshgrid(*steps, indexing='ij'), axis=-1)

  def value(point):
    def move(w, *ds):
      w_wide = _numerics.widen(w)
      for x, d in zip(point, ds, strict=True):
        w_wide += x.astype(w_wide.dtype) * _numerics.widen(d, like=w)
      return w_wide.astype(jnp.result_type(w))

    return _numerics.widen(loss(jax.tree.map(move, params, *directions)))

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

  The perturbations are projected onto the slice. They are in it if
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
  # Of length one, so that a short direction is not taken for a dependent one.
  lengths = np.linalg.norm(basis, axis=0)
  lengths = np.where(lengths > 0, lengths, 1.0)
  found = {}
  for name, metric in {'SAM': metrics.euclidean(), 'Monge SAM': monge(alpha)}.items():
    delta = float(rho) * _flat(steepest_direction(loss, params, metric))
    found[name] = np.linalg.lstsq(basis / lengths, delta, rcond=None)[0] / lengths
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
  coordinates, values = _ascending(landscape)
  if len(coordinates) == 1:
    ax.plot(*coordinates, values, color='#343a40')
    ax.set(xlabel='step along the direction', ylabel='loss')
    return ax
  x, y = coordinates
  filled = ax.contourf(x, y, values.T, levels=levels, cmap='Greys')
  ax.contour(x, y, values.T, levels=filled.levels, colors='w', linewidths=0.4)
  ax.figure.colorbar(filled, ax=ax, label='loss')
  ax.set(xlabel='first direction', ylabel='second direction')
  return ax


def mark(ax: Any, landscape: Slice, points: Mapping[str, Any]) -> Any:
  """Marks the parameters, and points such as :func:`probes` gives, with a legend.

  On a line a marker is as high as the curve, linearly interpolated; the parameters are
  left out if the line does not reach them.

  Args:
    ax: the axes that :func:`plot` has drawn on.
    landscape: the slice.
    points: from names to coordinates, ``[1]`` or ``[2]``.

  Returns:
    The axes.

  Raises:
    ValueError: if a point has not as many coordinates as the slice has directions, or
      is beyond the ends of a line, where its height is not known.

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
  coordinates, values = _ascending(landscape)
  places = {'parameters': np.zeros(len(coordinates)), **points}
  for name, at in places.items():
    at = np.asarray(at, np.float64)
    if at.shape != (len(coordinates),):
      raise ValueError(
        f'The point {name!r} must have one coordinate per direction of the slice,'
        f' {len(coordinates)} in all, got an array of shape {at.shape}.'
      )
    if len(coordinates) == 1:
      height = _height(at[0], coordinates[0], values)
      if height is None and name not in points:
        continue
      if height is None:
        low, high = coordinates[0][[0, -1]]
        raise ValueError(
          f'The point {name!r}, at the step {at[0]:.4g}, is outside the slice, whose'
          f' steps go from {low:.4g} to {high:.4g}: how high the loss is there is not'
          ' known. Give `loss_slice` coordinates that reach it.'
        )
      at = (at[0], height)
    colour = COLOURS.get(name, '#111111')
    ax.plot(*at, 'o', color=colour, markeredgecolor='w', markersize=8, label=name)
  ax.legend()
  return ax


def _ascending(landscape):
  """The coordinates, ascending, and the values in their order, in float64."""
  values = np.asarray(landscape.values, np.float64)
  coordinates = []
  for axis, x in enumerate(landscape.coordinates):
    x = np.asarray(x, np.float64)
    order = np.argsort(x, kind='stable')
    coordinates.append(x[order])
    values = np.take(values, order, axis)
  return coordinates, values


def _height(at, x, values):
  """The value at a step, or None where it is beyond the ends of ascending ones."""
  # A step that was computed in single precision reaches its own end.
  slack = 4 * np.finfo(np.float32).eps * np.max(np.abs(x))
  if not x[0] - slack <= at <= x[-1] + slack:
    return None
  return np.interp(at, x, values)


def _length(x, axes):
  """``‖x‖`` along some axes, which are kept, without under- or overflow."""
  largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0)
  scale = jnp.where(largest > 0, largest, 1.0)
  return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale), axes, keepdims=True))


def _unit(x, axes):
  """``x/‖x‖`` along some axes."""
  length = _length(x, axes)
  return x / jnp.where(length > 0, length, 1.0)


def _resolve_stacked(stacked, params):
  """How many leading axes of each leaf count layers, a tree of ints like ``params``."""

  def count(path, n):
    where = _masks.at_path(path)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
      raise TypeError(
        f'`stacked` must hold an int per leaf, the number of leading axes that count'
        f' layers, got {n!r} {where}.'
      )
    return int(n)

  counts = jax.tree_util.tree_map_with_path(count, stacked)
  try:
    counts = jax.tree.map(
      lambda n, subtree: jax.tree.map(lambda _: n, subtree), counts, params
    )
  except ValueError as error:
    raise ValueError(
      '`stacked` must be an int or have the structure of the parameters, or a prefix'
      f' of it. It has {jax.tree.structure(stacked)}, they have'
      f' {jax.tree.structure(params)}.'
    ) from error
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for (path, w), n in zip(leaves, jax.tree.leaves(counts), strict=True):
    where = _masks.at_path(path)
    if not 0 <= n <= jnp.ndim(w):
      raise ValueError(
        f'`stacked` says that {n} leading axes count layers {where}, where the'
        f' shape is {jnp.shape(w)}. Give a tree of ints if layers are stacked in some'
        " leaves only: `stacked={'blocks': 1, 'head': 0}`."
      )
  return counts


def _flat(tree):
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )
