"""What is refused, and what the message says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax
from msam_optax import flax_nnx
from tests.combinations.problem import loss
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.problem import model_loss
from tests.combinations.problem import RHO
from tests.combinations.truth import COMBINATIONS
from tests.combinations.ways import every_way
from tests.combinations.ways import WAYS

MAKERS = {
  'sharpness_aware': lambda c: msam_optax.sharpness_aware(msam_optax.monge(), RHO, c),
  'value_and_grad': lambda c: msam_optax.value_and_grad(
    loss, msam_optax.monge(), RHO, c
  ),
  'nnx': lambda c: flax_nnx.value_and_grad(model_loss, msam_optax.monge(), RHO, c),
}


every_maker = pytest.mark.parametrize('maker', MAKERS)


@every_maker
@pytest.mark.parametrize(
  'other', [msam_optax.probe_gradient, msam_optax.monge(), 0.9, None, 'gsam']
)
def test_what_is_no_combination_is_refused(maker, other):
  with pytest.raises(TypeError, match='`combination` must be a Combination, such as'):
    MAKERS[maker](other)


@every_maker
@pytest.mark.parametrize('scales', [(), [], 1.0, {1.0}, np.array([1.0])], ids=repr)
def test_scales_are_a_sequence_that_is_not_empty(maker, scales):
  with pytest.raises(ValueError, match='those of its probes, one at least'):
    MAKERS[maker](msam_optax.probe_gradient()._replace(scales=scales))


@every_maker
@pytest.mark.parametrize('scale', [np.nan, -np.inf, np.float32('inf')])
def test_scales_are_finite(maker, scale):
  with pytest.raises(ValueError, match='must be finite, got'):
    MAKERS[maker](msam_optax.probe_gradient()._replace(scales=(1.0, scale)))


@every_maker
@pytest.mark.parametrize('scale', ['1', True, 1j, None, np.ones(2)], ids=repr)
def test_scales_are_real_numbers(maker, scale):
  with pytest.raises(TypeError, match='must be real numbers, got'):
    MAKERS[maker](msam_optax.probe_gradient()._replace(scales=(1.0, scale)))


@every_maker
@pytest.mark.parametrize('part', ['init', 'combine', 'due'])
def test_parts_of_a_combination_are_functions(maker, part):
  with pytest.raises(
    TypeError, match=f'`{part}`.* of a Combination must be .*function'
  ):
    MAKERS[maker](msam_optax.probe_gradient()._replace(**{part: ()}))


@pytest.mark.parametrize(
  ('make', 'number'),
  [
    (msam_optax.weighted, 'a'),
    (msam_optax.surrogate_gap, 'alpha'),
    (lambda x: msam_optax.curvature(gamma=x), 'gamma'),
    (lambda x: msam_optax.curvature(beta=x), 'beta'),
    (lambda x: msam_optax.gsam(alpha=x), 'alpha'),
    (lambda x: msam_optax.wsam(gamma=x), 'gamma'),
    (lambda x: msam_optax.cr_sam(gamma=x), 'gamma'),
    (lambda x: msam_optax.cr_sam(beta=x), 'beta'),
  ],
  ids=['weighted', 'surrogate_gap', 'curvature', 'beta', 'gsam', 'wsam', 'cr', 'cr-b'],
)
def test_numbers_that_make_no_sense_are_refused(make, number):
  for bad in (-0.1, np.nan, np.inf, jnp.array(-1.0), np.float32('nan')):
    with pytest.raises(ValueError, match=f'`{number}` must be finite and >= 0'):
      make(bad)
  with pytest.raises(ValueError, match=rf'`{number}` must be a scalar, got shape \(2,'):
    make(jnp.ones(2))
  for bad in ('1', None, 1j, True, lambda step: 0.1):
    with pytest.raises(TypeError, match=f'`{number}` must be a real number'):
      make(bad)


@pytest.mark.parametrize('gamma', [1, 1.0, 2.5, np.float32(1), jnp.array(1.0)])
def test_a_gamma_that_leaves_nothing_of_the_loss_is_refused(gamma):
  with pytest.raises(ValueError, match='`gamma` must be less than 1, got'):
    msam_optax.wsam(gamma=gamma)


@pytest.mark.parametrize('gamma', [1.0, 1.5, -0.5, np.nan])
def test_a_gamma_that_turns_bad_at_run_time_is_seen(gamma):
  w = jnp.array([0.3, 0.4])

  def step(gamma):
    tx = msam_optax.wsam(0.1, gamma)
    return tx.update(2 * w, tx.init(w), w, grad_fn=lambda w: 2 * w)

  updates, state = jax.jit(step)(jnp.float32(gamma))
  assert np.isnan(updates).all()
  assert not state.finite


BAD_COMBINES = {
  'another structure': lambda grads, state, space: ({'a': grads[0]['a']}, state),
  'another shape': lambda grads, state, space: (
    jax.tree.map(lambda x: x[:1], grads[0]),
    state,
  ),
  'all gradients': lambda grads, state, space: (grads, state),
}


@every_way
@pytest.mark.parametrize('what', BAD_COMBINES)
def test_a_combination_that_returns_something_else_is_named(what, way):
  combination = msam_optax.Combination(lambda params: (), BAD_COMBINES[what])
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(COMBINATIONS, 'bad', (combination, None, (1,)))
    message = '`combine` of a Combination returns must be like the gradients, but'
    with pytest.raises(ValueError, match=message):
      WAYS[way]('bad')(make_params(), make_data())


@every_way
@pytest.mark.parametrize(
  ('what', 'kind'),
  [
    (lambda grads, state, space: grads[-1], 'a dict'),
    (lambda grads, state, space: None, 'a NoneType'),
    (lambda grads, state, space: (*grads, state), 'a tuple of 3'),
  ],
  ids=['update', 'None', 'three'],
)
def test_a_combination_that_returns_no_pair_is_named(what, kind, way):
  """As one does that forgets the state; a vector of two numbers is no pair either."""
  combination = msam_optax.Combination(lambda params: (), what)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(COMBINATIONS, 'bad', (combination, None, (1,)))
    with pytest.raises(
      TypeError, match=rf'must return `\(update, state\)`, not {kind}'
    ):
      WAYS[way]('bad')(make_params(), make_data())
  if kind == 'a dict':
    tx = msam_optax.sharpness_aware(msam_optax.monge(), RHO, combination)
    w = jnp.ones(2)
    with pytest.raises(TypeError, match=r'must return `\(update, state\)`, not a'):
      tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
