"""The drop-in for ``jax.value_and_grad``."""

import dataclasses
import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax
from tests import by_hand
from tests.methods import drop_in
from tests.methods import every_method_slowly
from tests.methods import transformation
from tests.problems import batch
from tests.problems import loss
from tests.problems import mlp_params


@every_method_slowly
def test_equals_the_transformation(method):
  params, data = mlp_params(), batch()
  value, grads = drop_in(method, loss)(params, data)
  clean_value, clean = jax.value_and_grad(loss)(params, data)
  tx = transformation(method)
  expected, _ = tx.update(
    clean, tx.init(params), params, grad_fn=lambda p: jax.grad(loss)(p, data)
  )
  chex.assert_trees_all_equal(value, clean_value)
  chex.assert_trees_all_close(grads, expected, rtol=1e-6)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('compile_once', [False, True], ids=['two copies', 'one loop'])
@every_method_slowly
def test_equals_the_gradient_by_hand(method, compile_once):
  params, data = mlp_params(jnp.float64), batch(dtype=jnp.float64)
  value_and_grad_fn = jax.jit(drop_in(method, loss, compile_once=compile_once))
  chex.assert_trees_all_close(
    value_and_grad_fn(params, data),
    by_hand.gradient(method, loss, params, data),
    rtol=1e-10,
    atol=1e-14,
  )


def test_closed_form():
  # ℓ = w², w = 1: g = 2, δ = ρ·2/(2·√5), gradient 2(1 + ρ/√5).
  _, grad = msam_optax.value_and_grad(jnp.square, rho=0.5)(jnp.float32(1.0))
  np.testing.assert_allclose(grad, 2 * (1 + 0.5 / np.sqrt(5)), rtol=1e-6)


def test_auxiliary_output_is_of_the_clean_pass():
  def with_aux(params, data):
    return loss(params, data), params

  params = mlp_params()
  (value, aux), _ = msam_optax.value_and_grad(with_aux, has_aux=True)(params, batch())
  chex.assert_trees_all_equal(aux, params)
  chex.assert_trees_all_equal(value, loss(params, batch()))


def test_several_arguments_are_one_tree():
  """The norm is that of both together, as if they were one tuple."""
  params = mlp_params()

  def split(data, hidden, out, *, scale):
    return scale * loss({'hidden': hidden, 'out': out}, data)

  value, grads = msam_optax.value_and_grad(split, rho=0.2, argnums=(1, 2))(
    batch(), params['hidden'], params['out'], scale=3.0
  )
  whole_value, whole = msam_optax.value_and_grad(
    lambda p: 3.0 * loss(p, batch()), rho=0.2
  )(params)
  chex.assert_trees_all_close(value, whole_value, rtol=1e-6)
  chex.assert_trees_all_close(grads, (whole['hidden'], whole['out']), rtol=1e-5)


def test_mask_and_other_argument():
  params = mlp_params()
  mask = {'hidden': True, 'out': False}
  value_and_grad_fn = msam_optax.value_and_grad(
    lambda data, params: loss(params, data), rho=0.2, argnums=1, mask=mask
  )
  _, grads = value_and_grad_fn(batch(), params)
  tx = msam_optax.msam(rho=0.2, mask=mask)
  grad_fn = jax.grad(lambda p: loss(p, batch()))
  expected, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
  chex.assert_trees_all_close(grads, expected, rtol=1e-6)


def test_both_passes_see_the_same_key():
  def noisy(w, key):
    return jnp.sum(w * jax.random.normal(key, w.shape))  # linear: g = g′

  w, key = jnp.ones(5), jax.random.key(3)
  _, grads = msam_optax.value_and_grad(noisy, rho=1.0)(w, key)
  chex.assert_trees_all_equal(grads, jax.random.normal(key, w.shape))


def test_traced_radius_and_keyword_arguments_under_jit():
  params, data = mlp_params(), batch()

  @jax.jit
  def value_and_grad_at(params, rho):
    return msam_optax.value_and_grad(loss, rho=rho)(params, data=data)

  for rho in (0.1, 0.4):
    chex.assert_trees_all_close(
      value_and_grad_at(params, rho),
      msam_optax.value_and_grad(loss, rho=rho)(params, data),
      rtol=1e-5,
    )


def test_float32_probe_of_bfloat16_parameters():
  dtypes = []

  def recording(w):
    dtypes.append(w.dtype)
    return jnp.sum(w.astype(jnp.float32) ** 2)

  _, grads = msam_optax.value_and_grad(
    recording, rho=1e-3, perturbation_dtype=jnp.float32
  )(jnp.ones(4, jnp.bfloat16))
  assert dtypes == [jnp.bfloat16, jnp.float32]
  assert grads.dtype == jnp.bfloat16


def test_keeps_name_and_documentation():
  value_and_grad_fn = msam_optax.value_and_grad(loss)
  assert value_and_grad_fn.__name__ == 'loss'
  assert value_and_grad_fn.__doc__ == loss.__doc__


def test_as_decorator():
  @functools.partial(msam_optax.value_and_grad, rho=0.0)
  def square(w):
    return w**2

  chex.assert_trees_all_equal(
    square(jnp.float32(3.0)), (jnp.float32(9), jnp.float32(6))
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scale:
  """Parameters that are a function."""

  weight: jax.Array

  def __call__(self, x):
    return self.weight * x


CALLABLE = {
  'equinox': eqx.nn.Linear(2, 2, key=jax.random.key(0)),
  'partial': jax.tree_util.Partial(jnp.multiply, jnp.array([0.5, -2.0])),
  'dataclass': Scale(jnp.array([0.5, -2.0])),
}
MODES = [
  {},
  {'compile_once': True},
  {'perturbation_dtype': 'float32', 'compile_once': True},
  {'shards': 2},
  {'shards': 2, 'sync_ascent': True, 'vectorize_shards': True},
  {'loss_scale': 4.0, 'compile_once': True},
]


@pytest.mark.parametrize('options', MODES, ids=str)
@pytest.mark.parametrize('name', CALLABLE)
def test_parameters_may_be_a_function(name, options):
  """ℓ = Σ f(x)² with equal parts: by the formula, with the leaves as plain arrays."""
  model, x = CALLABLE[name], jnp.array([[1.0, 3.0]] * 2)
  loss_fn = lambda m, x: jnp.sum(jnp.mean(jax.vmap(m)(x), axis=0) ** 2)
  _, grads = msam_optax.value_and_grad(loss_fn, rho=0.3, **options)(model, x)
  clean = jax.grad(loss_fn)(model, x)
  n = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(clean)))
  step = np.float32(0.3 / (n * np.sqrt(1 + n**2)))
  probe = jax.tree.map(lambda w, g: w + step * g, model, clean)
  chex.assert_trees_all_close(grads, jax.grad(loss_fn)(probe, x), rtol=1e-5)


@pytest.mark.parametrize('options', MODES, ids=str)
def test_data_may_be_a_function(options):
  """A frozen model beside the parameters, whole or in parts."""
  frozen = Scale(jnp.array([1.0, 1.0, 3.0, 3.0]))
  loss_fn = lambda w, f: jnp.mean(f(w) ** 2)
  _, grad = msam_optax.value_and_grad(loss_fn, rho=0.3, **options)(
    jnp.float32(0.5), frozen
  )
  # ℓ = 5w² in the whole as in each part: g = 5, δ = ρ/√26.
  np.testing.assert_allclose(grad, 10 * (0.5 + 0.3 / np.sqrt(26)), rtol=1e-6)


@pytest.mark.parametrize('options', MODES, ids=str)
@pytest.mark.parametrize('what', ['rho', 'alpha'])
def test_a_sweep_is_one_program(what, options):
  """``vmap`` over a hyperparameter, each as it is alone: ℓ = w²/2 at 2."""

  def gradient_at(value):
    rho, alpha = (value, 2.0) if what == 'rho' else (0.5, value)
    metric = msam_optax.monge(alpha)
    loss_fn = lambda w, x: jnp.mean(x) * w**2 / 2
    return msam_optax.value_and_grad(loss_fn, metric, rho, **options)(
      jnp.float32(2.0), jnp.ones(2)
    )[1]

  values = np.array([0.0, 0.1, 1.0], np.float32)
  rho, alpha = (values, 2.0) if what == 'rho' else (0.5, values)
  want = 2 + rho / np.sqrt(1 + 4 * alpha**2)
  np.testing.assert_allclose(jax.jit(jax.vmap(gradient_at))(values), want, rtol=1e-6)


def test_one_loop_keeps_the_direction_that_bfloat16_would_round():
  """The probe, as the loss sees it, is w + ρ g/‖g‖ with g in float32."""
  seen = []
  x = jnp.array([1.0, 1.003, -0.4567])

  def watched(w):
    jax.debug.callback(seen.append, w)
    return jnp.sum(w.astype(jnp.float32) * x)

  w = jnp.array([0.5, 0.25, 2.0], jnp.bfloat16)
  value_and_grad_fn = msam_optax.value_and_grad(
    watched,
    msam_optax.euclidean(),
    rho=0.5,
    perturbation_dtype='float32',
    compile_once=True,
  )
  jax.block_until_ready(value_and_grad_fn(w))
  jax.effects_barrier()
  g = np.float64(x)
  deltas = [np.float64(probe) - np.float64(w) for probe in seen]
  delta = max(deltas, key=np.linalg.norm)
  np.testing.assert_allclose(delta, 0.5 * g / np.linalg.norm(g), rtol=1e-5)
