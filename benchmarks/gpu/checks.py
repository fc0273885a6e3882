"""Ascents and two-pass gradients on the device against float64 in NumPy.

Errors are the largest difference over the largest magnitude of the true values, over
all leaves. The device computes in float32, with float32 (not TF32) multiplications.
"""

from collections.abc import Iterator
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.timing import explain
from benchmarks.gpu import truth as gpu_truth
import msam_optax

ALPHA = 0.7  # not 1, so that α and α² differ
RHO = 0.5
SCALES = (1e-30, 1e-15, 1.0, 1e15, 1e30)
# Rounding to bfloat16 is off by up to 2⁻⁸ = 0.0039. Monge rounds twice, the base's
# direction and its own; a probe that is rounded the other way than in float64 moves
# the gradient there. On a CPU float32 is off by 4e-7 at most, bfloat16 by 0.0045.
ASCENT_TOLERANCE = {'float32': 5e-6, 'bfloat16': 8e-3}
GRADIENT_TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}
MANY = 2**24  # entries of one leaf, whose squares one after the other would not add up


class Check(NamedTuple):
  """One comparison.

  Attributes:
    name: what was compared.
    error: by how much it is off.
    tolerance: how much is allowed.
    message: what was raised, if so.
  """

  name: str
  error: float
  tolerance: float
  message: str = ''

  @property
  def passed(self) -> bool:
    """Whether it is within its tolerance; NaN is not."""
    return bool(self.error <= self.tolerance)


class Case(NamedTuple):
  """A metric of the library and what it is in NumPy: an inverse diagonal, and α."""

  metric: msam_optax.Metric
  inverse: gpu_truth.Inverse
  alpha: float


def cases() -> dict[str, Case]:
  """Every metric, and Monge over each."""
  bases = {
    'euclidean': Case(msam_optax.euclidean(), gpu_truth.euclidean, 0.0),
    'adaptive': Case(
      msam_optax.adaptive(gpu_truth.ETA_ADAPTIVE), gpu_truth.adaptive, 0.0
    ),
    'diagonal_fisher': Case(
      msam_optax.diagonal_fisher(gpu_truth.ETA_FISHER), gpu_truth.diagonal_fisher, 0.0
    ),
  }
  over = {
    f'monge over {name}': Case(msam_optax.monge(ALPHA, metric), inverse, ALPHA)
    for name, (metric, inverse, _) in bases.items()
  }
  return bases | over


def run_checks(many: int = MANY) -> Iterator[Check]:
  """Makes all comparisons; what raises is one that failed."""
  for name, check, *args in suite(many):
    try:
      with jax.default_matmul_precision('highest'):
        found = [*check(*args)]
    except Exception as error:
      found = [Check('raised', np.inf, 0.0, explain(error)['message'])]
    yield from (c._replace(name=f'{name}: {c.name}') for c in found)


def suite(many: int) -> Iterator[tuple[Any, ...]]:
  """What is compared: a name, a function that yields checks, and its arguments."""
  known = cases()
  for name, case in known.items():
    for dtype in ASCENT_TOLERANCE:
      yield f'ascent, {name}, {dtype}', check_ascent, case, dtype
    yield f'no ascent, {name}', check_degenerate, case
    yield f'gradient, {name}, float32', check_gradient, case, 'float32', None
  for name in ('euclidean', 'monge over euclidean'):
    for probe in ('bfloat16', 'float32'):
      called = f'gradient, {name}, bfloat16 params, {probe} probe'
      dtype = None if probe == 'bfloat16' else probe
      yield called, check_gradient, known[name], 'bfloat16', dtype
  for name in ('euclidean', 'monge over diagonal_fisher'):
    yield f'many entries, {name}', check_many, known[name], many
  yield 'gradient, msam and sam', check_methods
  yield 'gradient, zero or not finite', check_settled


def check_ascent(case: Case, dtype: str) -> Iterator[Check]:
  """Direction, slope and probe for gradients of all sizes."""
  w, draw = params(dtype), random_tree(7)

  @jax.jit
  def ascend(g, w):
    ascent, _ = case.metric.ascend(g, case.metric.init(w), w)
    return ascent, msam_optax.perturb(w, ascent, RHO)

  for scale in SCALES:
    g = cast({k: scale * x for k, x in draw.items()}, dtype)
    (direction, slope, _), probe = ascend(g, w)
    true = gpu_truth.ascent(case.inverse, case.alpha, g, w)
    moved = {k: gpu_truth.wide(w)[k] + RHO * true.direction[k] for k in w}
    tolerance = ASCENT_TOLERANCE[dtype]
    yield Check(f'direction at {scale:g}', off(direction, true.direction), tolerance)
    yield Check(f'probe at {scale:g}', off(probe, moved), tolerance)
    yield Check(
      f'slope at {scale:g}',
      off({'': slope}, {'': true.slope}),
      ASCENT_TOLERANCE['float32'],  # of the gradient as it is: nothing is rounded
    )


def check_degenerate(case: Case) -> Iterator[Check]:
  """A gradient that is zero, or not finite, is no direction."""
  w = params('float32')
  ascend = jax.jit(lambda g, w: case.metric.ascend(g, case.metric.init(w), w)[0])
  for what, value in {'zero': 0.0, 'NaN': np.nan, 'infinite': np.inf}.items():
    g = cast({k: 0.0 * x for k, x in random_tree(7).items()}, 'float32')
    g['kernel_1'] = g['kernel_1'].at[0, 0].set(value)
    wrong = sum(int(np.sum(np.asarray(x) != 0)) for x in jax.tree.leaves(ascend(g, w)))
    yield Check(f'{what} gradient, entries that are not 0', wrong, 0)


def check_many(case: Case, many: int) -> Iterator[Check]:
  """The slope of a long gradient: what summing in float32 costs."""
  g = {'': np.random.default_rng(0).standard_normal(many, np.float32) / np.sqrt(many)}
  w = {'': np.ones(many, np.float32)}
  slope = jax.jit(lambda g, w: case.metric.ascend(g, case.metric.init(w), w)[0].slope)
  true = gpu_truth.ascent(case.inverse, case.alpha, g, w)
  error = off({'': slope(g, w)}, {'': true.slope})
  yield Check(f'slope of {many:,}', error, ASCENT_TOLERANCE['float32'])


def check_gradient(case: Case, dtype: str, probe: str | None) -> Iterator[Check]:
  """The gradient of the transformation and of the drop-in, for all loss scales."""
  w, data = params(dtype), batch()
  tx = msam_optax.sharpness_aware(case.metric, RHO, perturbation_dtype=probe)
  yield from compare_gradients(
    case, w, data, {'transformation': tx}, probe, case.metric
  )


def check_methods() -> Iterator[Check]:
  """``sam`` and ``msam`` themselves."""
  w, data = params('float32'), batch()
  for name, method, alpha in (
    ('sam', msam_optax.sam(RHO), 0.0),
    ('msam', msam_optax.msam(RHO, ALPHA), ALPHA),
  ):
    case = Case(msam_optax.euclidean(), gpu_truth.euclidean, alpha)
    yield from compare_gradients(case, w, data, {name: method}, None, None)


def compare_gradients(case, w, data, transformations, probe, metric) -> Iterator[Check]:
  """Gradients at the probe of each way to take them, for all loss scales."""
  dtype = w['kernel_1'].dtype.name
  drop_ins = {}
  if metric is not None:
    make = functools.partial(
      msam_optax.value_and_grad, loss, metric, RHO, perturbation_dtype=probe
    )
    drop_ins = {'drop-in': make(), 'drop-in, compile_once': make(compile_once=True)}

  @jax.jit
  def values_and_grads(w, data, scale):
    value, g = jax.value_and_grad(loss)(w, data, scale)
    grad_fn = lambda w: jax.grad(loss)(w, data, scale)
    found = {
      name: tx.update(g, tx.init(w), w, grad_fn=grad_fn)[0]
      for name, tx in transformations.items()
    }
    for name, drop_in in drop_ins.items():
      value, found[name] = drop_in(w, data, scale)
    return value, found

  for scale in SCALES:
    value, found = values_and_grads(w, data, np.float32(scale))
    exact = float(np.float32(scale))
    true_value, _ = gpu_truth.loss_and_grad(w, data, exact)
    true = gpu_truth.two_pass(
      case.inverse,
      case.alpha,
      RHO,
      w,
      data,
      exact,
      grads_as=w['kernel_1'].dtype,
      probe_as=probe or w['kernel_1'].dtype,
    )
    for name, grads in found.items():
      error = off(grads, true)
      yield Check(f'{name} at loss scale {scale:g}', error, GRADIENT_TOLERANCE[dtype])
    error = off({'': value}, {'': true_value})
    yield Check(f'loss at scale {scale:g}', error, GRADIENT_TOLERANCE['float32'])


def check_settled() -> Iterator[Check]:
  """Zero gradients move nothing; those that are not finite come out not finite."""
  w, data = params('float32'), batch()
  tx = msam_optax.msam(RHO, ALPHA)
  one = np.float32(1)

  @jax.jit
  def update(g, factor):
    grad_fn = lambda w: jax.tree.map(lambda x: factor * x, jax.grad(loss)(w, data, one))
    return tx.update(g, tx.init(w), w, grad_fn=grad_fn)[0]

  plain = gpu_truth.loss_and_grad(w, data, 1.0)[1]
  zero = jax.tree.map(jnp.zeros_like, w)
  tolerance = GRADIENT_TOLERANCE['float32']
  yield Check('zero, the plain gradient', off(update(zero, one), plain), tolerance)
  for what, value in {'NaN': np.nan, 'infinite': np.inf}.items():
    bad = dict(zero, kernel_2=zero['kernel_2'].at[1, 2].set(value))
    found = update(bad, one)
    finite = int(np.sum(np.isfinite(np.asarray(found.pop('kernel_2')))))
    yield Check(f'{what}, entries of the leaf that are finite', finite, 0)
    rest = {k: plain[k] for k in found}
    yield Check(f'{what}, the plain gradient elsewhere', off(found, rest), tolerance)
  found = update(cast(random_tree(7), 'float32'), np.float32(np.nan))
  finite = sum(int(np.sum(np.isfinite(np.asarray(x)))) for x in found.values())
  yield Check('NaN at the probe, entries that are finite', finite, 0)


def loss(w, data, scale):
  """The loss of :func:`benchmarks.gpu.truth.loss_and_grad`, computed in float32."""
  w = cast(w, 'float32')
  x, y = data
  h = jnp.tanh(x @ w['kernel_1'] + w['bias_1'][None])
  return scale * jnp.mean(jnp.square(h @ w['kernel_2'] + w['bias_2'][None] - y))


def random_tree(seed: int) -> gpu_truth.Tree:
  """Normal numbers, float64, of the shapes of a network 48 → 96 → 16."""
  rng = np.random.default_rng(seed)
  shapes = {
    'kernel_1': (48, 96),
    'bias_1': (96,),
    'kernel_2': (96, 16),
    'bias_2': (16,),
  }
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def params(dtype: str) -> Any:
  """Parameters on the device, in which tanh does not saturate."""
  return cast({k: 0.15 * x for k, x in random_tree(3).items()}, dtype)


def batch() -> Any:
  """Inputs ``[64, 48]`` and targets ``[64, 16]``, float32."""
  rng = np.random.default_rng(5)
  return tuple(jnp.asarray(rng.normal(size=(64, n)), jnp.float32) for n in (48, 16))


def cast(tree: Any, dtype: str) -> Any:
  """The tree on the device in a dtype."""
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def off(found: Any, true: gpu_truth.Tree) -> float:
  """The largest difference over the largest true magnitude; NaN if one is NaN."""
  found = gpu_truth.wide(found)
  largest = max(np.max(np.abs(x)) for x in true.values())
  return float(max(np.max(np.abs(found[k] - true[k])) for k in true) / largest)
