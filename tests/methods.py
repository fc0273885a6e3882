"""The registry of methods: a row for each, and the tests of methods run on every row.

A new method is one row here: what makes it, and its formulas in NumPy. What it does
on devices, in micro-batches, in Flax, inside wrappers and in half precision is compared
with those formulas by ``by_hand``, which uses nothing else of a row.
"""

from collections.abc import Callable
from collections.abc import Iterable
import functools
import inspect
import itertools
import typing
from typing import Any
from typing import NamedTuple

import numpy as np
import optax
import pytest

import msam_optax


class Method(NamedTuple):
  """A method of ``msam_optax``, and the same in NumPy.

  Vectors are float64 and hold all leaves, one after the other. The numbers of the
  method, but for its radius, are keyword arguments of ``delta`` or ``update``, by their
  names in ``make`` and with the values of this row: tests change them in both.

  Attributes:
    make: ``(rho, **options) -> transformation``, a public function or a
      ``functools.partial`` of one: ``optax.inject_hyperparams`` reads its signature.
    metric: that of the drop-in.
    delta: ``(w, g, rho, is_weight) -> δ`` for the vectors of parameters and gradient;
      ``is_weight`` says which entries ASAM takes for weights.
    rho: the radius in the comparisons, large enough to matter.
    update: ``(g, *probe_grads) -> update``, given the gradient and those at the
      probes; each is the mean over the parts of a batch.
    scales: the probes are ``w + scale · δ``.
    combination: that of the drop-in, or None for its default.
    remembers: whether ``delta`` and ``update`` have a keyword argument ``memory``, a
      dict of each for what they remember from step to step, empty before the first.
      Such a method has no drop-in.
  """

  make: Callable[..., optax.GradientTransformationExtraArgs]
  metric: msam_optax.Metric
  delta: Callable[[np.ndarray, np.ndarray, float, np.ndarray], np.ndarray]
  rho: float = 0.3
  update: Callable[..., np.ndarray] = lambda g, probe_grad: probe_grad
  scales: tuple[float, ...] = (1.0,)
  combination: Any = None
  remembers: bool = False


def steepest(
  matrix: Callable[..., np.ndarray], remembers: bool = False
) -> Callable[..., np.ndarray]:
  """``δ = ρ G⁻¹g/√(gᵀG⁻¹g)`` by a dense solve, for ``G = matrix(w, g, is_weight)``."""

  def delta(w, g, rho, is_weight, **numbers):
    if remembers:
      del numbers['memory']
    u = np.linalg.solve(matrix(w, g, is_weight, **numbers), g)
    return rho * u / np.sqrt(g @ u)

  return delta


def _identity(w, g, is_weight):
  return np.eye(len(g))


def _adaptive(w, g, is_weight, eta=0.01):
  return np.diag(np.where(is_weight, np.abs(w) + eta, 1.0) ** -2)


def _fisher(w, g, is_weight, eta=1.0):
  return np.diag(1 + eta * g**2)


def _monge(alpha, base=_identity):
  def matrix(w, g, is_weight, alpha=alpha):
    return base(w, g, is_weight) + alpha**2 * np.outer(g, g)

  return matrix


def _stable(g, g1):
  return np.sqrt((g @ g) / (g1 @ g1)) * g1


def _look(g, g1, memory, every=3, alpha=0.7):
  step = memory['step'] = memory.get('step', -1) + 1
  if step % every == 0:
    memory['v'] = g1 - (g1 @ g) / (g @ g) * g
    return g1
  v = memory['v']
  return g + alpha * np.sqrt((g @ g) / (v @ v)) * v


def _sparse(w, g, rho, is_weight, memory, sparsity=0.5, every=3):
  step = memory['step'] = memory.get('step', -1) + 1
  if step % every == 0:
    count = max(1, int((1 - sparsity) * len(g)))
    memory['chosen'] = np.abs(g) >= np.sort(np.abs(g))[-count]
  return memory['chosen'] * rho * g / np.sqrt(g @ g)


def _friendly(w, g, rho, is_weight, memory, sigma=1.0, decay=0.9):
  m = memory.get('m')
  u = g if m is None else g - sigma * m
  memory['m'] = g if m is None else decay * m + (1 - decay) * g
  return rho * u / (np.sqrt(u @ u) or 1.0)


def _vasso(w, g, rho, is_weight, memory, decay=0.1):
  d = memory['d'] = decay * memory.get('d', g) + (1 - decay) * g
  return rho * d / np.sqrt(d @ d)


def monge_sam(alpha: Any) -> Method:
  """The row of Monge SAM with another ``α``."""
  return Method(
    functools.partial(msam_optax.msam, alpha=alpha),
    msam_optax.monge(alpha),
    steepest(_monge(alpha)),
  )


_MONGE_OVER_ADAPTIVE = msam_optax.monge(0.5, base=msam_optax.adaptive())

METHODS: dict[str, Method] = {
  'msam': monge_sam(1.0),
  'sam': Method(msam_optax.sam, msam_optax.euclidean(), steepest(_identity)),
  'asam': Method(msam_optax.asam, msam_optax.adaptive(), steepest(_adaptive), rho=0.5),
  'fisher_sam': Method(
    msam_optax.fisher_sam,
    msam_optax.diagonal_fisher(),
    steepest(_fisher),
  ),
  'gsam': Method(
    msam_optax.gsam,
    msam_optax.euclidean(),
    steepest(_identity),
    update=lambda g, g1, alpha=0.6: g1 - alpha * (g - (g @ g1) / (g1 @ g1) * g1),
    combination=msam_optax.surrogate_gap(0.6),
  ),
  'wsam': Method(
    functools.partial(msam_optax.wsam, gamma=0.75),
    msam_optax.euclidean(),
    steepest(_identity),
    update=lambda g, g1, gamma=0.75: g + gamma / (1 - gamma) * (g1 - g),
    combination=msam_optax.weighted(3.0),
  ),
  'cr_sam': Method(
    functools.partial(msam_optax.cr_sam, gamma=0.2, beta=0.1),
    msam_optax.euclidean(),
    steepest(_identity),
    update=lambda g, plus, minus, gamma=0.2, beta=0.1: (
      plus + gamma * (plus + minus - 2 * g) + beta * (plus - minus)
    ),
    scales=(1.0, -1.0),
    combination=msam_optax.curvature(0.2, 0.1),
  ),
  'stable_sam': Method(
    msam_optax.stable_sam,
    msam_optax.euclidean(),
    steepest(_identity),
    update=_stable,
    combination=msam_optax.rescaled(),
  ),
  'look_sam': Method(
    functools.partial(msam_optax.look_sam, every=3),
    msam_optax.euclidean(),
    steepest(_identity, remembers=True),
    update=_look,
    combination=msam_optax.reused(3),
    remembers=True,
  ),
  'sparse_sam': Method(
    functools.partial(msam_optax.sparse_sam, every=3),
    msam_optax.sparse(every=3),
    _sparse,
    update=lambda g, g1, memory: g1,
    remembers=True,
  ),
  'friendly_sam': Method(
    msam_optax.friendly_sam,
    msam_optax.residual(),
    _friendly,
    update=lambda g, g1, memory: g1,
    remembers=True,
  ),
  'vasso': Method(
    msam_optax.vasso,
    msam_optax.smoothed(),
    _vasso,
    update=lambda g, g1, memory: g1,
    remembers=True,
  ),
  'sharpness_aware': Method(
    functools.partial(msam_optax.sharpness_aware, _MONGE_OVER_ADAPTIVE),
    _MONGE_OVER_ADAPTIVE,
    steepest(_monge(0.5, base=_adaptive)),
  ),
}


# What is the same code for all methods of a kind is tested on the first of each: those
# with a combination and without, and those with several probes. Formulas are tested on
# every method, and what has a state also where states are saved and restored.
KINDS = ('msam', 'gsam', 'cr_sam')
REMEMBERING = tuple(name for name, row in METHODS.items() if row.remembers)
# What a plain run takes where a test compiles much; all else is slow there.
DEFAULT = ('msam',)
OTHER_KINDS = tuple(name for name in KINDS if name not in DEFAULT)


def public_methods() -> dict[str, Callable[..., Any]]:
  """The library's functions that make a method; none that wraps an optimizer."""
  functions = {
    name: function
    for name in msam_optax.__all__
    if inspect.isfunction(function := getattr(msam_optax, name))
    and typing.get_type_hints(function).get('return')
    is optax.GradientTransformationExtraArgs
  }
  return {
    name: function
    for name, function in functions.items()
    if 'base_optimizer' not in inspect.signature(function).parameters
  }


def find(method: str | Method) -> Method:
  """The row of a name; a row is its own."""
  return METHODS[method] if isinstance(method, str) else method


def transformation(
  method: str | Method, rho: Any = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """The method as a user writes it at the head of a chain.

  Args:
    method: a key of ``METHODS``, or a row.
    rho: the radius, a number or a schedule; by default that of the row.
    **options: of the method.
  """
  row = find(method)
  return row.make(rho=row.rho if rho is None else rho, **options)


def drop_in(
  method: str | Method,
  loss_fn: Callable[..., Any],
  rho: Any = None,
  *,
  value_and_grad: Callable[..., Any] = msam_optax.value_and_grad,
  **options: Any,
) -> Callable[..., Any]:
  """The method as a user writes it in place of ``jax.value_and_grad``.

  Args:
    method: a key of ``METHODS``, or a row.
    loss_fn: what is differentiated.
    rho: the radius; by default that of the row.
    value_and_grad: the library's, or that of ``flax_nnx``.
    **options: of ``value_and_grad``.
  """
  row = find(method)
  if row.remembers:
    pytest.skip('keeps a state, for which a function has no place')
  if row.combination is not None:
    options['combination'] = row.combination
  return value_and_grad(loss_fn, row.metric, row.rho if rho is None else rho, **options)


def is_default(method: str, *_: str) -> bool:
  """Whether a plain run takes a case, whose first name is that of its method."""
  return method in DEFAULT


def cases(
  *axes: Iterable[str], plain: Callable[..., bool] = lambda *names: True
) -> list[Any]:
  """The product of the axes as parameters of a test.

  Args:
    *axes: the names along each axis; joined they are the test's id.
    plain: called with one name of each axis: whether a plain run takes this case.
      The others are slow.

  Returns:
    A list for ``pytest.mark.parametrize``.
  """
  return [
    pytest.param(
      *case, id='-'.join(case), marks=() if plain(*case) else pytest.mark.slow
    )
    for case in itertools.product(*axes)
  ]


# Before a test of formulas, one that also compiles much, and one of what is the same
# code for all methods of a kind.
every_method = pytest.mark.parametrize('method', cases(METHODS))
every_method_slowly = pytest.mark.parametrize(
  'method', cases(METHODS, plain=is_default)
)
every_kind = pytest.mark.parametrize('method', cases(KINDS))
every_kind_slowly = pytest.mark.parametrize('method', cases(KINDS, plain=is_default))
