"""The reference itself: by closed forms, where the loss is ``x w⁴/4``."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import by_hand
from tests.methods import METHODS

W, X, RHO = np.array(2.0), np.array([1.0, 3.0]), 0.5
GRADIENTS = [lambda w, x=x: x * w**3 for x in X]


def test_probes_on_both_sides_and_the_clean_gradient():
  """The means over parts are combined, and each is of one gradient."""
  row = METHODS['sam']._replace(
    rho=RHO, scales=(1.0, -1.0), update=lambda g, up, down: 100 * g + 10 * up + down
  )
  got = by_hand.update(row, W, GRADIENTS)
  want = 2 * (100 * 2.0**3 + 10 * 2.5**3 + 1.5**3)
  np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize('synced', [False, True], ids=['own', 'synced'])
@pytest.mark.parametrize('weights', [None, [1, 3]])
def test_parts_have_one_ascent_or_their_own(weights, synced):
  got = by_hand.update('msam', W, GRADIENTS, weights=weights, synced=synced)
  g = 8 * X
  shared = np.average(g, weights=weights)
  n = np.array([shared, shared]) if synced else g
  probes = 2 + METHODS['msam'].rho / np.sqrt(1 + n**2)
  want = np.average(X * probes**3, weights=weights)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_batch_is_cut_into_parts():
  loss = lambda w, x: jnp.mean(x) * w**4 / 4
  radii = (0.1, 0.2)
  w, x = np.float32(2), np.float32([1, 1, 3, 3])
  value, got = by_hand.gradient('sam', loss, w, x, parts=2, radii=radii)
  np.testing.assert_allclose(value, 8.0, rtol=1e-6)
  np.testing.assert_allclose(got, (2.1**3 + 3 * 2.2**3) / 2, rtol=1e-6)


def test_a_zero_gradient_moves_nothing():
  got = by_hand.update('asam', np.zeros((1, 2)), [lambda w: w])
  np.testing.assert_array_equal(got, np.zeros((1, 2)))


def test_weights_are_matrices_or_what_paths_say():
  params = {'a': np.full((1, 1), 2.0), 'b': np.full(1, 2.0)}
  grads = {'a': np.ones((1, 1)), 'b': np.ones(1)}
  named_b = lambda path, _: 'b' in path
  for is_weight, t in [(by_hand.is_matrix, [2.01, 1.0]), (named_b, [1.0, 2.01])]:
    probe = by_hand.probe('asam', params, grads, 1.0, is_weight=is_weight)
    got = [probe['a'].item() - 2, probe['b'].item() - 2]
    np.testing.assert_allclose(got, np.square(t) / np.linalg.norm(t), rtol=1e-12)
