"""What cannot be tested with."""

import jax.numpy as jnp
import pytest

import msam_optax
from msam_optax import testing


@pytest.mark.parametrize(
  'grads',
  [
    jnp.zeros(2),
    jnp.array([1.0, jnp.nan]),
    jnp.ones(3),
    [jnp.ones(2)],
    jnp.ones(2, int),
  ],
)
def test_examples_that_say_nothing_are_refused(grads):
  with pytest.raises(ValueError, match='real, finite, like the params, and not all'):
    testing.assert_metric(msam_optax.euclidean(), grads, jnp.ones(2))


def test_magnitudes_that_a_dtype_has_not():
  w = jnp.ones(2, jnp.float16)
  with pytest.raises(ValueError, match='in float16 cannot be as large or small'):
    testing.assert_metric(msam_optax.euclidean(), w, w)
  testing.assert_metric(msam_optax.euclidean(), w, w, magnitudes=(1e-3, 1e3))
  with pytest.raises(ValueError, match='give others as `magnitudes`'):
    testing.assert_combination(msam_optax.probe_gradient(), (w, w), w)


def test_as_many_gradients_as_the_combination_has_passes():
  with pytest.raises(ValueError, match=r'scales \(1.0, -1.0\): give 3 gradients'):
    testing.assert_combination(
      msam_optax.curvature(), (jnp.ones(2), jnp.ones(2)), jnp.ones(2)
    )


def test_a_loss_without_a_gradient_is_refused():
  with pytest.raises(ValueError, match='They are zero'):
    testing.assert_method(msam_optax.sam(), jnp.ones(2), lambda w: 0 * jnp.sum(w))
