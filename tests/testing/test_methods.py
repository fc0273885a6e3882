"""Methods keep the contract, and one that is broken in one thing fails."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import testing
from tests.methods import cases
from tests.methods import is_default
from tests.methods import public_methods
from tests.testing.examples import a_metric
from tests.testing.examples import arrays
from tests.testing.examples import every
from tests.testing.examples import is_traced_for
from tests.testing.examples import times

WITH_SCALAR = {'a': np.array(0.7), 'b': np.array([0.2, -0.5, 0.1])}
METHODS = sorted(public_methods())


def loss_fn(params):
  return sum(jnp.sum(x**4 + jnp.sin(x)) for x in jax.tree.leaves(params))


def check_method(tx):
  params = arrays(WITH_SCALAR)
  testing.assert_method(tx, params, loss_fn)
  # What is donated is a copy.
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def make(name):
  if name == 'sharpness_aware':
    return msam_optax.sharpness_aware(
      msam_optax.max_norm(), lambda count: 0.1, every(3)
    )
  return getattr(msam_optax, name)()


@pytest.mark.parametrize('name', cases(METHODS, plain=is_default))
def test_every_method_keeps_the_contract(name):
  check_method(make(name))


def test_a_method_with_everything_keeps_the_contract():
  """A mask, a metric with a count, and a wider dtype at the probe."""
  check_method(
    msam_optax.msam(
      0.1,
      alpha=lambda count: 1.0,
      mask={'a': False, 'b': True},
      perturbation_dtype=jnp.float32,
    )
  )


def changed(tx=None, init=None, update=None):
  """A method, Monge SAM by default, with another `init` or `update`."""
  tx = tx or msam_optax.msam(0.1)

  def changed_update(updates, state, params=None, **extra_args):
    result = tx.update(updates, state, params, **extra_args)
    return update(result, state, extra_args) if update else result

  changed_init = (lambda params: init(tx.init(params), params)) if init else tx.init
  return optax.GradientTransformationExtraArgs(changed_init, changed_update)


def in_float32(result, state, extra_args):
  updates, new_state = result
  return jax.tree.map(lambda u: u.astype(jnp.float32), updates), new_state


def hides(result, state, extra_args):
  return jax.tree.map(jnp.nan_to_num, result[0]), result[1]


def always_finite(result, state, extra_args):
  return result[0], result[1]._replace(finite=jnp.array(True))


def stays(result, state, extra_args):
  return result[0], result[1]._replace(count=state.count)


def becomes_float(result, state, extra_args):
  return result[0], result[1]._replace(count=result[1].count.astype(jnp.float32))


def keeps_nan(result, state, extra_args):
  updates, new_state = result
  slope = new_state.slope + 0 * state.slope
  worst = 0 * sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(updates))
  updates = jax.tree.map(lambda u: u + 0 * state.slope.astype(u.dtype), updates)
  return updates, new_state._replace(slope=slope + worst)


def keeps_nan_unseen(result, state, extra_args):
  updates, new_state = result
  worst = 0 * sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(updates))
  return updates, new_state._replace(rise=0 * state.rise + worst)


def reads_both(result, state, extra_args):
  return result[0], result[1]._replace(rise=state.slope - state.radius)


def refuses(result, state, extra_args):
  if set(extra_args) - {'grad_fn', 'value_and_grad_fn'}:
    raise TypeError('an argument too many')
  return result


def doubled_if(condition):
  """Another update where something holds of the state and the extra arguments."""

  def update(result, state, extra_args):
    return times(2.0 if condition(state, extra_args) else 1.0, result[0]), result[1]

  return changed(update=update)


def first_leaf(state, params):
  """Fails for the stand-in that Optax gives to `init`, a tree without leaves."""
  return state._replace(metric_state=jnp.sum(jax.tree.leaves(params)[0]))


def other_with_value(result, state, extra_args):
  if 'value_and_grad_fn' not in extra_args:
    return result
  return times(2.0, result[0]), result[1]


def wanders():
  calls = []

  def update(result, state, extra_args):
    calls.append(None)
    return times(1.0 + 0.1 * len(calls), result[0]), result[1]

  return changed(update=update)


def clean():
  """Has a count, and the gradient as it came."""
  return optax.GradientTransformationExtraArgs(
    lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)),
    lambda updates, state, params=None, **extra_args: (
      updates,
      optax.ScaleByScheduleState(state.count + 1),
    ),
  )


def on_concrete_numbers(result, state, extra_args):
  if not isinstance(result[1].slope, jax.core.Tracer) and result[1].slope > 0:
    return result
  return times(2.0, result[0]), result[1]


def always_aside():
  """Its direction is not zero where the gradient is."""
  return a_metric(
    lambda g, unit, norm, space: (
      jax.tree.map(lambda u: jnp.ones_like(u), unit),
      jnp.asarray(norm + 1),
    )
  )


BROKEN_METHODS = {
  'float32 everywhere': (
    changed(update=in_float32),
    r'(?s)The updates are like the gradients \(params in bfloat16\).*float32',
  ),
  'updates alone': (
    changed(update=lambda result, state, extra_args: result[0]['a']),
    r'`update` returns `\(updates, state\)`',
  ),
  'a state of another dtype': (
    changed(update=becomes_float),
    r'(?s)The state keeps.*At \.count it is float32\[\], not int32\[\]',
  ),
  'a count that stays': (
    changed(update=stays),
    r'(?s)A count in the state grows.*\[0\] became \[0\]',
  ),
  'not pure': (wanders(), 'A method is pure'),
  'refuses arguments': (
    changed(update=refuses),
    '(?s)Extra arguments that it does not know.*It raised TypeError',
  ),
  'another update with values': (
    changed(update=other_with_value),
    '`grad_fn` and `value_and_grad_fn` give the same update',
  ),
  'another update with an argument of others': (
    doubled_if(lambda state, extra_args: 'argument_of_another' in extra_args),
    'Extra arguments that it does not know are left to others',
  ),
  'another update from host memory': (
    doubled_if(lambda state, extra_args: isinstance(state.count, np.ndarray)),
    'The state is of arrays: a copy in host memory does the same',
  ),
  'another update under vmap': (
    doubled_if(lambda state, extra_args: is_traced_for(state.count, 'Batch')),
    'Under `vmap` a method does what it does for each of the params',
  ),
  'needs params with leaves': (
    changed(init=first_leaf),
    '(?s)`optax.tree.map_params` goes through the state.*It raised IndexError',
  ),
  'another update when traced': (
    changed(update=on_concrete_numbers),
    'Under `scan` a method does what it does in a loop',
  ),
  'an array twice in the state': (
    changed(
      init=lambda state, params: state._replace(radius=state.slope),
      update=reads_both,
    ),
    'Under `jit` with donated arguments',
  ),
  'the params in the state': (
    changed(init=lambda state, params: state._replace(metric_state=params)),
    'Under `jit` with donated arguments',
  ),
  'a function in the state': (
    changed(init=lambda state, params: state._replace(metric_state=loss_fn)),
    '`init` and `update` accept what they are given',
  ),
  'no probe': (clean(), 'The update depends on the gradient at the probe'),
  'moves where the gradient is zero': (
    msam_optax.sharpness_aware(always_aside(), 0.1),
    '(?s)A zero gradient is not perturbed.*a',
  ),
  'hides what is not finite': (
    changed(update=hides),
    r'(?s)an update that is not finite in the same leaf.*With nan in the gradient at'
    r" the params the update at \['a'\]",
  ),
  'a flag that is always true': (
    changed(update=always_finite),
    '(?s)`finite` in the state says whether the update is.*it is True',
  ),
  'a state that NaN spoils': (changed(update=keeps_nan), 'does not stay in the state'),
  'a state that NaN spoils, unseen': (
    changed(update=keeps_nan_unseen),
    'does not stay in the state',
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize(('tx', 'message'), BROKEN_METHODS.values(), ids=BROKEN_METHODS)
def test_a_broken_method_fails(tx, message):
  with pytest.raises(AssertionError, match=message):
    check_method(tx)
