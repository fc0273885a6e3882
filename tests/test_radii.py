"""Radii that follow the learning rate."""

import numpy as np
import optax
import pytest

from msam_optax import rho_following


def test_is_the_line_between_the_bounds_and_constant_outside():
  lr = optax.warmup_cosine_decay_schedule(0.0, 0.3, 5, 20, end_value=0.05)
  rho = rho_following(lr, lr_max=0.25, lr_min=0.1, rho_max=0.6, rho_min=0.04)
  for step in range(25):
    expected = np.interp(float(lr(step)), [0.1, 0.25], [0.04, 0.6])
    np.testing.assert_allclose(rho(step), expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('lr', 'bounds', 'error', 'message'),
  [
    (0.1, {}, TypeError, '`learning_rate` must be a schedule'),
    (lambda step: 0.1, {'lr_min': 0.3}, ValueError, '`lr_max` must be above `lr_min`'),
    (lambda step: 0.1, {'rho_min': -0.1}, ValueError, '`rho_min` must be finite'),
    (lambda step: 0.1, {'rho_max': 'large'}, TypeError, '`rho_max` must be a real'),
  ],
)
def test_what_is_wrong_is_named(lr, bounds, error, message):
  with pytest.raises(error, match=message):
    rho_following(lr, **{'lr_max': 0.3, 'rho_max': 0.1} | bounds)
