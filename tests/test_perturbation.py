"""The probe: where it lies, what rounding leaves of it, and what is not moved."""

import chex
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msam_optax import Ascent
from msam_optax import euclidean
from msam_optax import monge
from msam_optax import perturb
from msam_optax import sharpness_aware

RHO = 2.0**-4  # of few bits, so that the step is exact in float32


def flat(tree):
  return np.asarray(ravel_pytree(tree)[0])


def random_tree(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {'layers': [{'kernel': draw(5, 4), 'bias': draw(4)}, ()], 'scale': draw()}


def ascent_along(direction):
  return Ascent(direction, jnp.float32(1.0))


# Where the probe lies.


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_probe_is_the_exact_sum_rounded_once(dtype):
  params, direction = random_tree(0, dtype), random_tree(1, dtype)

  probe = perturb(params, ascent_along(direction), RHO)

  chex.assert_trees_all_equal_shapes_and_dtypes(probe, params)

  def rounded_once(w, d):
    exact = np.asarray(w, np.float64) + RHO * np.asarray(d, np.float64)
    return exact.astype(w.dtype)

  chex.assert_trees_all_equal(probe, jax.tree.map(rounded_once, params, direction))


def test_step_is_not_rounded_before_it_is_added():
  """With a radius of many bits ``ρd`` itself has more bits than bfloat16."""
  rng = np.random.default_rng(2)
  w = jnp.asarray(rng.normal(size=1000), jnp.bfloat16)
  d = jnp.asarray(rng.normal(size=1000), jnp.bfloat16)
  rho = 0.7

  probe = perturb(w, ascent_along(d), rho)

  exact = np.asarray(w, np.float64) + rho * np.asarray(d, np.float64)
  expected = exact.astype(w.dtype)
  rounded_twice = np.asarray(w + (rho * d).astype(jnp.bfloat16))
  np.testing.assert_array_equal(probe, expected)
  assert np.any(rounded_twice != expected)


def test_probe_in_float64(x64):
  params, direction = random_tree(3, jnp.float64), random_tree(4, jnp.float64)

  probe = perturb(params, ascent_along(direction), 0.05)

  chex.assert_trees_all_equal_dtypes(probe, params)
  np.testing.assert_allclose(
    flat(probe), flat(params) + 0.05 * flat(direction), rtol=1e-15
  )


def test_direction_may_be_wider_than_the_params():
  """A float32 ascent at bfloat16 parameters: they keep their dtype."""
  params, direction = random_tree(5, jnp.bfloat16), random_tree(6, jnp.float32)

  probe = perturb(params, ascent_along(direction), RHO)

  chex.assert_trees_all_equal_shapes_and_dtypes(probe, params)
  exact = np.asarray(params['scale'], np.float64) + RHO * np.float64(direction['scale'])
  assert probe['scale'] == exact.astype(jnp.bfloat16)


def test_small_perturbation_of_bfloat16_is_lost():
  """The neighbours of 1 in bfloat16 are 2⁻⁸ and 2⁻⁷ away."""
  w = jnp.ones([4], jnp.bfloat16)
  direction = jnp.asarray([1.0, -1.0, 1.0, -1.0], jnp.bfloat16)

  np.testing.assert_array_equal(perturb(w, ascent_along(direction), 1e-3), w)
  kept = perturb(w.astype(jnp.float32), ascent_along(direction), 1e-3)
  np.testing.assert_allclose(kept - 1.0, [1e-3, -1e-3, 1e-3, -1e-3], rtol=1e-4)


@pytest.mark.parametrize(
  'make', [float, np.float32, jnp.float32, jnp.bfloat16], ids=lambda make: make.__name__
)
def test_radius_may_be_any_scalar(make):
  probe = perturb(
    jnp.array([1.0, 2.0]), ascent_along(jnp.array([0.6, -0.8])), make(0.5)
  )

  np.testing.assert_allclose(probe, [1.3, 1.6], rtol=1e-6)


def test_zero_direction_or_radius_is_no_perturbation():
  params, direction = random_tree(7), random_tree(8)

  chex.assert_trees_all_equal(perturb(params, ascent_along(direction), 0.0), params)
  zero = jax.tree.map(jnp.zeros_like, direction)
  chex.assert_trees_all_equal(perturb(params, ascent_along(zero), 0.5), params)


def test_radius_may_be_traced_and_mapped():
  w, d = jnp.array([1.0, 2.0]), jnp.array([0.6, -0.8])

  probes = jax.jit(jax.vmap(lambda rho: perturb(w, ascent_along(d), rho)))(
    jnp.array([0.0, 0.5, 1.0])
  )

  np.testing.assert_allclose(probes, [[1.0, 2.0], [1.3, 1.6], [1.6, 1.2]], rtol=1e-6)


@pytest.mark.parametrize(
  ('metric', 'alpha'),
  [(euclidean(), 0.0), (monge(2.0), 2.0)],
  ids=['euclidean', 'monge'],
)
def test_probe_under_a_metric(metric, alpha):
  params, grads = random_tree(9), random_tree(10)
  ascent, _ = metric.ascend(grads, metric.init(params), params)

  probe = perturb(params, ascent, 0.05)

  g = flat(grads).astype(np.float64)
  n = np.linalg.norm(g)
  expected = flat(params) + 0.05 * g / (n * np.sqrt(1 + alpha**2 * n**2))
  np.testing.assert_allclose(flat(probe), expected, atol=2e-7)


# Masks.

PARAMS = {
  'body': {'kernel': (3, 2), 'bias': (2,)},
  'head': {'kernel': (2, 2), 'bias': ()},
}


def ones():
  return jax.tree.map(jnp.ones, PARAMS, is_leaf=lambda x: isinstance(x, tuple))


MASKS = {
  'tree': {
    'body': {'kernel': True, 'bias': False},
    'head': {'kernel': True, 'bias': False},
  },
  'tree of NumPy bools': {
    'body': {'kernel': np.True_, 'bias': np.False_},
    'head': {'kernel': np.bool_(1), 'bias': np.bool_(0)},
  },
  'function': lambda params: jax.tree.map(lambda w: w.ndim > 1, params),
  'function to a prefix': lambda params: {
    'body': {'kernel': True, 'bias': False},
    'head': False,
  },
  'prefix': {'body': True, 'head': False},
  'one bool': True,
  'one False': False,
  'None': None,
}
MOVED = {
  'tree': {'body.kernel', 'head.kernel'},
  'tree of NumPy bools': {'body.kernel', 'head.kernel'},
  'function': {'body.kernel', 'head.kernel'},
  'function to a prefix': {'body.kernel'},
  'prefix': {'body.kernel', 'body.bias'},
  'one bool': {'body.kernel', 'body.bias', 'head.kernel', 'head.bias'},
  'one False': set(),
  'None': {'body.kernel', 'body.bias', 'head.kernel', 'head.bias'},
}


@pytest.mark.parametrize('kind', MASKS)
def test_mask_says_which_leaves_are_moved(kind):
  params = ones()

  probe = perturb(params, ascent_along(ones()), 0.5, mask=MASKS[kind])

  for module, leaves in params.items():
    for name, w in leaves.items():
      moved = f'{module}.{name}' in MOVED[kind]
      if moved:
        np.testing.assert_array_equal(probe[module][name], np.full(w.shape, 1.5))
      else:
        assert probe[module][name] is w


# That a transformation would move nothing is an error, see `tests/test_errors.py`.
@pytest.mark.parametrize('kind', [kind for kind in MASKS if MOVED[kind]])
def test_leaves_that_are_not_moved_are_not_in_the_norm(kind):
  """Seen through the transformation, which hands its mask to the ascent as well."""
  params, sizes = (
    ones(),
    {'body.kernel': 6, 'body.bias': 2, 'head.kernel': 4, 'head.bias': 1},
  )
  tx = sharpness_aware(euclidean(), rho=0.5, mask=MASKS[kind])

  _, state = tx.update(ones(), tx.init(params), params, grad_fn=lambda probe: probe)

  norm = np.sqrt(sum(sizes[name] for name in MOVED[kind]))
  np.testing.assert_allclose(optax.tree.get(state, 'slope'), norm, rtol=1e-6)
  np.testing.assert_allclose(
    optax.tree.get(state, 'radius'), 0.5 if MOVED[kind] else 0.0, rtol=1e-6
  )


def odd_leaves():
  return {
    'key': jax.random.key(0),
    'steps': jnp.arange(3),
    'flags': jnp.array([True, False]),
    'phases': jnp.array([1j, 2.0], jnp.complex64),
    'bytes': jnp.zeros([2], jnp.uint8),
  }


@pytest.mark.parametrize('under_jit', [False, True], ids=['eager', 'jit'])
def test_leaves_of_any_kind_may_be_masked_out(under_jit):
  """Keys, integers, bools and complex numbers come back as they are."""
  params = odd_leaves() | {'w': jnp.array([1.0, 2.0])}
  # Whatever stands in the direction for them is not looked at.
  direction = {name: jnp.float32(jnp.nan) for name in params} | {'w': jnp.ones(2)}
  mask = {name: name == 'w' for name in params}

  run = lambda params: perturb(params, ascent_along(direction), 0.5, mask=mask)
  probe = (jax.jit(run) if under_jit else run)(params)

  np.testing.assert_array_equal(probe['w'], [1.5, 2.5])
  chex.assert_trees_all_equal_structs(probe, params)
  assert np.array_equal(
    jax.random.key_data(probe['key']), jax.random.key_data(params['key'])
  )
  for name in odd_leaves():
    assert probe[name].dtype == params[name].dtype
    if not under_jit:
      assert probe[name] is params[name]
    elif name != 'key':
      np.testing.assert_array_equal(probe[name], params[name])


def test_masked_leaf_keeps_values_that_arithmetic_would_not():
  params = {'w': jnp.ones(2), 'odd': jnp.float32([np.nan, np.inf, -0.0])}
  direction = {'w': jnp.ones(2), 'odd': jnp.zeros(3)}

  probe = perturb(params, ascent_along(direction), 0.5, mask={'w': True, 'odd': False})

  bits = lambda x: np.asarray(x).view(np.uint32)
  np.testing.assert_array_equal(bits(probe['odd']), bits(params['odd']))


# What is refused, and how.


@pytest.mark.parametrize('name', odd_leaves())
def test_leaf_that_is_not_real_floating_point_is_refused_with_its_path(name):
  params = {'w': jnp.ones(2), 'odd': [odd_leaves()[name]]}
  direction = {'w': jnp.ones(2), 'odd': [jnp.ones(odd_leaves()[name].shape)]}

  for mask in (None, True, {'w': False, 'odd': True}):
    with pytest.raises(
      TypeError, match=r"real floating-point.*\['odd'\]\[0\] has dtype"
    ) as e:
      perturb(params, ascent_along(direction), 0.1, mask=mask)
    assert str(params['odd'][0].dtype) in str(e.value)


@pytest.mark.parametrize(
  'mask',
  [
    {'body': True},
    {'body': True, 'head': True, 'tail': True},
    {'body': {'kernel': True}, 'head': True},
    [True, False],
    {'body': {'kernel': {'deeper': True}, 'bias': True}, 'head': True},
    lambda params: {'trunk': True},
  ],
  ids=['too few', 'too many', 'too few below', 'list', 'too deep', 'function'],
)
def test_mask_that_does_not_fit_is_refused(mask):
  with pytest.raises(ValueError, match='`mask` must have the structure of the param'):
    perturb(ones(), ascent_along(ones()), 0.1, mask=mask)


@pytest.mark.parametrize(
  ('leaf', 'shown'),
  [
    (1, 'got 1 '),
    (0.0, 'got 0.0 '),
    ('yes', "got 'yes' "),
    (np.array(True), r'got array\(True\) '),
    (np.array([True, False]), r'got array\(\[ True, False\]\) '),
    (jnp.float32, 'got <class'),
  ],
  ids=['int', 'float', 'str', 'array', 'array of two', 'type'],
)
def test_mask_of_anything_but_bools_is_refused(leaf, shown):
  mask = {'body': True, 'head': {'kernel': leaf, 'bias': True}}
  with pytest.raises(
    TypeError, match=rf"`mask` must hold.*{shown}.*\['head'\]\['kernel'\]"
  ):
    perturb(ones(), ascent_along(ones()), 0.1, mask=mask)


def test_mask_of_traced_bools_is_refused():
  """Which leaves are moved decides what is compiled."""
  run = jax.jit(
    lambda mask: perturb(jnp.ones(2), ascent_along(jnp.ones(2)), 0.1, mask=mask)
  )
  with pytest.raises(TypeError, match='`mask` must hold one bool per leaf'):
    run(True)


# Compiled or not, on whatever device.


class VariantsTest(chex.TestCase):
  """One result in every way that chex knows to call a function."""

  @chex.all_variants
  def test_probe(self):
    mask = lambda params: jax.tree.map(lambda w: jnp.ndim(w) > 0, params)

    @self.variant
    def run(params, direction):
      return perturb(params, ascent_along(direction), RHO, mask=mask)

    params, direction = random_tree(11), random_tree(12)
    probe = run(params, direction)

    moved = jax.tree.map(
      lambda w, d: np.asarray(w) + np.float32(RHO) * np.asarray(d), params, direction
    )
    chex.assert_trees_all_equal(probe, moved | {'scale': params['scale']})


@pytest.mark.slow
def test_derivatives_where_a_step_is_zero():
  """At ρ = 0, and in a coordinate without gradient, where -0.0 is kept as well."""
  w, g = jnp.array([0.6, 0.8]), jnp.array([1.2, 1.6])
  ascent = Ascent(g / 2, jnp.array(2.0))
  loss_at = lambda rho: jnp.sum(perturb(w, ascent, rho) ** 2)
  # ‖w + ρ w‖² = (1 + ρ)², as w is of length one.
  np.testing.assert_allclose(jax.grad(loss_at)(0.0), 2.0, rtol=1e-6)
  np.testing.assert_allclose(jax.hessian(loss_at)(0.0), 2.0, rtol=1e-6)
  scales, centre = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])
  gradient = lambda w: 2 * scales * (w - centre)
  tx = sharpness_aware(euclidean(), rho=0.5)
  w = jnp.array([0.0, 2.0])

  def update(w):
    return tx.update(gradient(w), tx.init(w), w, grad_fn=gradient)[0]

  # H (I + ρ/‖g‖ (I − uuᵀ) H) with H = diag(2, 4), g = (0, 4) and u = (0, 1).
  want = [[2 * (1 + 0.5 / 4 * 2), 0.0], [0.0, 4.0]]
  np.testing.assert_allclose(jax.jacobian(update)(w), want, rtol=1e-6)
  np.testing.assert_allclose(jax.jacfwd(update)(w), want, rtol=1e-6)
