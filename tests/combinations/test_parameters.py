"""What parameters, gradients and the numbers of a combination may be."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from tests.combinations.problem import assert_close
from tests.combinations.problem import flat
from tests.combinations.problem import loss
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.problem import RHO
from tests.combinations.problem import ROWS
from tests.combinations.truth import COMBINATIONS
from tests.combinations.truth import cr_sam
from tests.combinations.truth import gsam
from tests.combinations.truth import METRICS
from tests.combinations.truth import monge_slope
from tests.combinations.truth import strided
from tests.combinations.truth import truth
from tests.combinations.truth import value_and_slope
from tests.combinations.truth import wsam
from tests.combinations.ways import every_combination
from tests.combinations.ways import every_way
from tests.combinations.ways import names
from tests.combinations.ways import passes
from tests.combinations.ways import WAYS


@passes
@names('cr_sam')
def test_parameters_in_several_arguments(name, once):
  value_and_grad_fn = msam_optax.value_and_grad(
    lambda a, data, b: loss({'a': a, 'b': b}, data),
    METRICS['monge'][0],
    RHO,
    COMBINATIONS[name][0],
    argnums=(0, -1),
    shards=2,
    compile_once=once,
  )
  params = make_params()
  _, grads = jax.jit(value_and_grad_fn)(params['a'], make_data(), params['b'])
  assert isinstance(grads, tuple)
  assert_close(grads, truth(name, cuts=strided(2))[1])


@every_way
@names('gsam')
def test_masks_stop_the_probe_and_not_the_gradient(name, way):
  step = WAYS[way](name, mask={'a': True, 'b': False})
  _, grads = jax.jit(step)(make_params(), make_data())
  assert_close(grads, truth(name, moved=np.array([1.0, 1, 1, 0, 0]))[1])


@every_way
@names('gsam')
def test_bfloat16_parameters_with_a_probe_in_float32(name, way):
  """The update is the formula's, rounded to bfloat16 once."""
  params = make_params(jnp.bfloat16)
  step = WAYS[way](name, perturbation_dtype='float32')
  _, grads = jax.jit(step)(params, make_data())
  chex.assert_trees_all_equal_dtypes(grads, params)
  # In a chain the clean gradient comes rounded; drop-ins have it so as well.
  assert_close(grads, truth(name, start=flat(params))[1], rtol=2e-2)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@every_combination
def test_narrow_gradients_are_combined_in_float32(name, dtype):
  """Rounded gradients in, the formula in float32 or wider, one rounding at the end."""
  rng = np.random.default_rng(3)
  combination, formula, scales = COMBINATIONS[name]
  grads = [jnp.asarray(rng.normal(size=64), dtype) for _ in range(1 + len(scales))]
  update, _ = combination.combine(tuple(grads), (), msam_optax.LOCAL)
  want = formula(*(np.asarray(g, np.float64) for g in grads))
  assert update.dtype == dtype
  ulp = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    np.asarray(update, np.float64), want, rtol=0.501 * ulp, atol=1e-6
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'int32', 'uint8'])
@pytest.mark.parametrize('traced', [False, True], ids=['array', 'traced'])
def test_numbers_of_any_dtype(dtype, traced):
  """They are widened before anything is made of them: 1 − a, −α, γ + β."""
  number = jnp.asarray(1 if 'int' in dtype else 0.1, dtype)
  exact = float(number)
  rng = np.random.default_rng(4)
  grads = [rng.normal(size=5).astype(np.float32) for _ in range(3)]
  cases = [
    (msam_optax.weighted, functools.partial(wsam, a=exact), 2),
    (msam_optax.surrogate_gap, functools.partial(gsam, alpha=exact), 2),
    (
      lambda x: msam_optax.curvature(x, x),
      functools.partial(cr_sam, gamma=exact, beta=exact),
      3,
    ),
  ]
  for make, formula, count in cases:
    seen = tuple(jnp.asarray(g) for g in grads[:count])
    f = lambda x: make(x).combine(seen, (), msam_optax.LOCAL)[0]
    got = (jax.jit(f) if traced else f)(number)
    assert got.dtype == jnp.float32
    assert_close(got, formula(*(g.astype(np.float64) for g in grads[:count])))


def odd_params():
  """Floats that move, and what has another gradient, or none."""
  return {
    **make_params(),
    'count': jnp.arange(3),
    'frozen': jnp.ones(2),
    'z': jnp.array([0.3 + 0.4j, -1.0 + 0.5j], jnp.complex64),
    '_overwrite_with_gradient': {'amax': jnp.array([2.0, 3.0])},
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  'jit', [pytest.param(False, marks=pytest.mark.slow), True], ids=['eager', 'jit']
)
@every_combination
def test_leaves_without_gradients_are_not_in_a_combination(name, jit):
  """Integers, FP8 scaling factors and None stay out of inner products.

  A complex leaf is two real ones. It multiplies the loss by ``1 + |z|²``, and JAX has
  as its gradient the conjugate of ``2 z ℓ``.
  """
  params, data = odd_params(), make_data()
  movable = {'a': True, 'b': True, 'frozen': True, 'count': False, 'z': False}
  mask = {**movable, '_overwrite_with_gradient': False}
  tx = msam_optax.sharpness_aware(
    METRICS['monge'][0], RHO, COMBINATIONS[name][0], mask=mask
  )

  def grad_fn(params):
    a, b, z = (params[name] for name in 'abz')
    gradients_of = jax.grad(
      lambda a, b, z: loss({'a': a, 'b': b}, data) * size(z), (0, 1, 2)
    )
    a, b, z = gradients_of(a, b, z)
    return {
      'a': a,
      'b': b,
      'z': z,
      'count': np.zeros(3, jax.dtypes.float0),
      'frozen': None,
      '_overwrite_with_gradient': {'amax': jnp.array([50.0, 60.0])},
    }

  size = lambda z: 1 + jnp.sum(jnp.real(z * jnp.conj(z)))
  grads = grad_fn(params)
  if not jit:
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
  else:
    update = lambda p: tx.update(grad_fn(p), tx.init(p), p, grad_fn=grad_fn)
    updates, state = jax.jit(update)(params)
  assert updates['frozen'] is None
  assert updates['count'].dtype == jax.dtypes.float0
  assert updates['z'].dtype == jnp.complex64
  np.testing.assert_array_equal(optax.tree.get(updates, 'amax'), [50, 60])

  _, formula, scales = COMBINATIONS[name]
  x, y = (np.asarray(v, np.float64) for v in data)
  z = np.asarray(params['z'], np.complex128)

  def slope(w):
    value, g = value_and_slope(w, x, y, np.ones(ROWS))
    of_z = 2 * np.conj(z) * value
    return np.concatenate([g * (1 + np.sum(np.abs(z) ** 2)), of_z.real, of_z.imag])

  w = flat(make_params())
  g = slope(w)
  _, direction = monge_slope(w, g[:5])
  want = formula(g, *(slope(w + s * RHO * direction) for s in scales))
  got = [updates['a'], updates['b'], jnp.real(updates['z']), jnp.imag(updates['z'])]
  assert_close(got, want)
  assert state.finite
