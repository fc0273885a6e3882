"""Metrics pulled back through a chart: lengths where the parameters arrive.

The parameters ``ψ`` are coordinates, and a differentiable function ``θ = φ(ψ)``, the
chart, says of what: of weights that have a scale and a direction, of a matrix that is a
product of factors, of the outputs of a network. A step has length one in ``θ`` if

    ‖J dψ‖ = 1,     J the Jacobian of φ at ψ,

so the Euclidean metric there is ``JᵀJ`` here, whatever the coordinates. ``J`` is never
formed: its products and those of ``Jᵀ`` are all that conjugate gradients need.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax import _checks
from msam_optax import _devices
from msam_optax import _hyperparameters
from msam_optax import _masks
from msam_optax import _numerics
from msam_optax import metrics
from msam_optax import spaces
from msam_optax.monge import monge


def pullback(
  chart: Callable[..., Any],
  alpha: _hyperparameters.Hyperparameter = 1.0,
  ridge: float | jax.Array = 0.0,
  *,
  arguments: Sequence[str] = (),
  tolerance: float = 1e-5,
  max_steps: int = 100,
) -> metrics.Metric:
  """The Monge metric in other coordinates: ``G = JᵀJ + ridge I + α² g gᵀ``.

  ``J`` is the Jacobian of a chart ``θ = φ(ψ)`` at the parameters ``ψ``. With ``ridge =
  0`` the perturbation of ``θ`` is, to first order in the radius, the one of
  :func:`monge` in ``θ``, **whatever the parametrization**: exponentials, weight
  normalization, a product of factors. With the outputs of a network on a batch as chart
  it is a metric on functions. Over ``u = (JᵀJ + ridge I)⁻¹g`` and ``s = √⟨g, u⟩`` the
  direction is ``u/(s√(1 + α²s²))`` and the slope ``s/√(1 + α²s²)``.

  ``u`` is found by conjugate gradients. Each of their steps costs one product with
  ``J`` and one with ``Jᵀ``, about as much as a gradient through the chart, and no
  memory beyond that of a gradient and four copies of the parameters. Stopped after
  ``max_steps`` they have found the steepest ascent among the directions that they have
  tried: it has length one under the metric as well, and its slope is right, but
  smaller than the steepest.

  Where the chart does not depend on a part of ``ψ`` and the loss does, ``JᵀJ`` has no
  inverse, and without a ``ridge`` direction and slope are NaN. A gradient that comes
  through the chart, of a loss of ``φ(ψ)`` alone, is no such case, though ``J`` may be
  of low rank, as that of a product of factors is.

  Args:
    chart: ``φ``, a differentiable function of the parameters that returns an array, or
      a pytree of arrays, real floating point. It is called with the perturbed leaves,
      in float32 or wider; those that ``mask`` leaves out are ``optax.MaskedNode``. If
      it sums over a mapped axis, all devices along it must climb the same gradient
      (``sync_ascent=True``), or they wait for each other for ever.
    alpha: ``α``, scalar >= 0: a number, an array or an Optax schedule. A schedule
      is counted in calls and makes the metric one with state.
    ridge: scalar >= 0, a number or an array, in units of ``JᵀJ``.
    arguments: names of extra arguments of ``update`` that the chart gets by keyword,
      the batch for example: ``arguments=('x',)`` for ``chart(params, x=x)``.
    tolerance: when to stop: the residual ``‖(JᵀJ + ridge I)u − g‖/‖g‖``, >= 0.
    max_steps: when to stop at the latest, int >= 1.

  Returns:
    A :class:`Metric` without state; with a :class:`MongeState` if ``alpha`` is a
    schedule. Its ``ascend`` needs the params.

  Raises:
    TypeError: if ``chart`` is no function, or returns what is not real floating point,
      or ``max_steps`` is no integer.
    ValueError: if a number is negative or not finite, or ``max_steps`` less than 1;
      when called, without params or one of the ``arguments``.

  Examples:
    Scales ``exp(ψ)``: the step of the scales is Monge SAM's, not that of ``ψ``.

    >>> import jax, jax.numpy as jnp
    >>> from msam_optax import LOCAL, monge, pullback
    >>> loss = lambda theta: 3 * theta[0] + 4 * theta[1]
    >>> theta = jnp.array([0.01, 1.0])
    >>> metric, psi = pullback(jnp.exp), jnp.log(theta)
    >>> g = jax.grad(lambda psi: loss(jnp.exp(psi)))(psi)
    >>> ascent, _ = metric.ascend(g, metric.init(psi), psi, space=LOCAL)
    >>> print(theta * ascent.direction, f'{ascent.slope:.4g}')
    [0.1177 0.1569] 0.9806
    >>> g = jax.grad(loss)(theta)
    >>> print(monge().ascend(g, (), theta)[0].direction)
    [0.1177 0.1569]

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025 (the metric ``α² g gᵀ``, which needs no
    chart)
  """
  if not callable(chart):
    raise TypeError(
      f'The `chart` of pullback() must be a function of the params, got {chart!r}.'
    )
  if isinstance(arguments, str):
    raise TypeError(f'`arguments` must be a sequence of names: `({arguments!r},)`.')
  _hyperparameters.check_number('ridge', ridge)
  _hyperparameters.check_number('tolerance', tolerance)
  _hyperparameters.check_whole('max_steps', max_steps)

  solve = functools.partial(
    _conjugate_gradients, tolerance=tolerance, max_steps=max_steps
  )
  return monge(alpha, base=_pulled_back(chart, ridge, arguments, solve))


def _pulled_back(chart, ridge, arguments, solve):
  """The metric ``JᵀJ + ridge I``."""

  def ascend(grads, state, params, *, space=spaces.LOCAL, **extra_args):
    _check_params(params)
    unit, norm = space.normalize(grads)
    unit, w = _in_one_type(unit, params)
    product = _gram(
      functools.partial(chart, **_chosen(arguments, extra_args)),
      w,
      _numerics.widen(_hyperparameters.value_at('ridge', ridge), like=norm),
    )
    solver = functools.partial(solve, dot=space.dot)
    if len({_devices.varying_axes(x) for x in jax.tree.leaves(unit)}) > 1:
      # As JAX has it, all results of `custom_linear_solve` would vary as one does. A
      # solution without it has derivatives in forward mode alone.
      u = solver(product, unit)
    else:
      u = jax.lax.custom_linear_solve(product, unit, solver, symmetric=True)
    root = jnp.sqrt(jnp.where(norm > 0, space.dot(unit, u), 1.0))
    direction = jax.tree.map(
      lambda x, g: jnp.where(norm > 0, x / root, 0.0).astype(jnp.result_type(g)),
      u,
      grads,
    )
    return metrics.Ascent(direction, norm * root), state

  return metrics.Metric(lambda params: optax.EmptyState(), ascend)


def _gram(chart, params, ridge):
  """``v -> JᵀJv + ridge v`` for the Jacobian of the chart at the params."""
  theta, pushforward = jax.linearize(chart, params)
  _check_image(theta)
  transpose = jax.linear_transpose(pushforward, params)

  def product(v):
    (pulled,) = transpose(pushforward(v))
    return jax.tree.map(lambda x, y: x + ridge * y, pulled, v)

  return product


class _Search(NamedTuple):
  """Conjugate gradients so far.

  Attributes:
    solution: pytree.
    residual: pytree, ``b − A solution``.
    direction: pytree, where to go next.
    square: scalar, ``‖residual‖²``.
    steepest: scalar, the largest ``pᵀAp/‖p‖²`` of all directions ``p``.
    definite: bool, whether that was positive in each of them.
    count: int32, how many there were.
  """

  solution: Any
  residual: Any
  direction: Any
  square: jax.Array
  steepest: jax.Array
  definite: jax.Array
  count: jax.Array


def _conjugate_gradients(product, b, *, dot, tolerance, max_steps):
  """Solves ``Ax = b`` for a positive definite ``A`` and a ``b`` of length one.

  JAX's and other solvers take the inner product of one device. That of a
  :class:`Space` is also right for sharded leaves.

  Args:
    product: ``v -> Av``.
    b: pytree of arrays, all of the same dtype.
    dot: the inner product of two such pytrees.
    tolerance: of the residual.
    max_steps: at most so many products.

  Returns:
    ``x``, a pytree like ``b``. NaN if ``A`` is singular and ``b`` not in its range.
  """

  def goes_on(s):
    far = s.square > jnp.square(jnp.asarray(tolerance, s.square.dtype))
    return far & s.definite & (s.count < max_steps)

  def step(s):
    Ap = product(s.direction)
    height, width = dot(s.direction, Ap), dot(s.direction, s.direction)
    steepest = jnp.maximum(s.steepest, height / width)
    # What is less than this is rounding.
    definite = height / width > steepest * jnp.finfo(height.dtype).eps ** 1.5
    length = s.square / jnp.where(definite, height, 1.0)
    residual = _add(s.residual, -length, Ap)
    square = dot(residual, residual)
    return _Search(
      solution=_add(s.solution, length, s.direction),
      residual=residual,
      direction=_add(residual, square / s.square, s.direction),
      square=square,
      steepest=steepest,
      definite=definite,
      count=s.count + 1,
    )

  square = dot(b, b)
  first = _Search(
    solution=jax.tree.map(jnp.zeros_like, b),
    residual=b,
    direction=b,
    square=square,
    steepest=jnp.zeros_like(square),
    definite=square >= 0,
    count=jnp.zeros([], jnp.int32),
  )
  last = jax.lax.while_loop(goes_on, step, first)
  nothing = _numerics.zero_if(last.definite, square.dtype)
  return jax.tree.map(lambda x: x + nothing, last.solution)


def _add(x, factor, y):
  """``x + factor · y``."""
  return jax.tree.map(lambda a, b: a + factor * b, x, y)


def _in_one_type(unit, params):
  """Both in one dtype, and where devices differ in one of them in both."""

  def of_leaf(x, w):
    w = jnp.asarray(w, x.dtype)
    axes = _devices.varying_axes(x) | _devices.varying_axes(w)
    return tuple(
      _devices.as_varying(a, axes - _devices.varying_axes(a)) for a in (x, w)
    )

  pairs = jax.tree.map(of_leaf, unit, params)
  return jax.tree.transpose(jax.tree.structure(unit), jax.tree.structure((0, 0)), pairs)


def _chosen(names, extra_args):
  for name in names:
    if name not in extra_args:
      raise ValueError(
        f'The chart of pullback() takes the argument {name!r}, and `update` was given'
        f' none: `tx.update(grads, state, params, grad_fn=grad_fn, {name}={name})`. In'
        ' `value_and_grad` use a chart that has it already:'
        f' `pullback(lambda params: chart(params, {name}={name}))`.'
      )
  return {name: extra_args[name] for name in names}


def _check_params(params):
  if params is None:
    raise ValueError(
      'pullback() needs the Jacobian at the parameters: pass them, as in'
      ' `tx.update(grads, state, params)`.'
    )


def _check_image(theta):
  leaves = jax.tree_util.tree_leaves_with_path(theta)
  for path, x in leaves:
    dtype = _checks.dtype_of(x)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        'The chart of pullback() must return real floating-point arrays, but'
        f' {_masks.at_path(path)} there is {dtype or type(x).__name__}.'
      )
  if not leaves:
    raise ValueError('The chart of pullback() returns a pytree without arrays.')
