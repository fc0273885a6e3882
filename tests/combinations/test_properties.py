"""Properties of combinations, for any gradients."""

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np

import msam_optax

vectors = st.lists(
  st.floats(-10, 10, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6),
  min_size=4,
  max_size=4,
).map(lambda xs: np.array(xs, np.float32))


quick = hypothesis.settings(max_examples=60, deadline=None)


def combined(combination, *grads):
  grads = tuple(jnp.asarray(g) for g in grads)
  return np.asarray(combination.combine(grads, (), msam_optax.LOCAL)[0])


@quick
@hypothesis.given(vectors, vectors, vectors)
def test_the_limits_of_each_combination(g, g_plus, g_minus):
  weighted, gap = msam_optax.weighted, msam_optax.surrogate_gap
  np.testing.assert_array_equal(combined(weighted(0.0), g, g_plus), g)
  np.testing.assert_array_equal(combined(weighted(1.0), g, g_plus), g_plus)
  np.testing.assert_array_equal(combined(gap(0.0), g, g_plus), g_plus)
  curvature = msam_optax.curvature(0.0, 0.0)
  np.testing.assert_array_equal(combined(curvature, g, g_plus, g_minus), g_plus)


@quick
@hypothesis.given(vectors, vectors, st.floats(0, 3, width=32))
def test_the_surrogate_gap_leaves_the_part_along_the_probes_gradient(g, g_plus, alpha):
  """``⟨update, g₁⟩ = ‖g₁‖²``: the descent at the probe is as fast as SAM's."""
  update = combined(msam_optax.surrogate_gap(alpha), g, g_plus).astype(np.float64)
  exact = g_plus.astype(np.float64)
  length = np.sqrt(exact @ exact)
  bound = 1e-5 * length * (length + alpha * np.linalg.norm(g.astype(np.float64)))
  assert abs(update @ exact - length**2) <= bound


@quick
@hypothesis.given(vectors, vectors, st.floats(0, 1, width=32))
def test_a_weighted_gradient_is_between_both(g, g_plus, a):
  update = combined(msam_optax.weighted(a), g, g_plus)
  slack = 1e-6 * np.maximum(np.abs(g), np.abs(g_plus))
  assert (update >= np.minimum(g, g_plus) - slack).all()
  assert (update <= np.maximum(g, g_plus) + slack).all()


@quick
@hypothesis.given(vectors, vectors)
def test_curvature_sees_nothing_in_a_quadratic(g, step):
  """``g₊ + g₋ = 2g`` there: γ adds nothing, and β is a longer radius."""
  plus, minus = g + step, g - step
  got = combined(msam_optax.curvature(5.0, 0.0), g, plus, minus)
  np.testing.assert_allclose(got, plus, rtol=1e-5, atol=1e-4)
  got = combined(msam_optax.curvature(0.0, 0.5), g, plus, minus)
  np.testing.assert_allclose(got, g + 2 * step, rtol=1e-5, atol=1e-4)
