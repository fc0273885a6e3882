"""Bad input: each message says what was wrong, where, and what to write instead."""

from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import flax_linen
from msam_optax import flax_nnx
from msam_optax import msam

PARAMS = {'a': jnp.ones((2, 3)), 'b': {'c': jnp.ones(3)}}


def quadratic(params):
  return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


GRADS = jax.grad(quadratic)(PARAMS)


def update(tx, grads=GRADS, params=PARAMS, **kwargs):
  return tx.update(grads, tx.init(PARAMS), params, **kwargs)


@pytest.mark.parametrize('value', [-0.1, float('nan'), float('inf')])
@pytest.mark.parametrize(
  ('name', 'make'),
  [
    ('rho', lambda x: msam(rho=x)),
    ('rho', lambda x: msam(rho=jnp.asarray(x))),
    ('rho', lambda x: msam_optax.value_and_grad(quadratic, rho=x)),
    ('alpha', lambda x: msam(alpha=x)),
    ('eta', lambda x: msam_optax.asam(eta=x)),
    ('eta', lambda x: msam_optax.fisher_sam(eta=np.float32(x))),
  ],
  ids=['rho', 'rho-array', 'rho-drop-in', 'alpha', 'eta-asam', 'eta-fisher'],
)
def test_hyperparameter_out_of_bounds(name, make, value):
  with pytest.raises(ValueError, match=rf'`{name}` must be finite and >= 0, got'):
    make(value)


def test_hyperparameter_of_wrong_kind():
  with pytest.raises(
    TypeError, match='`rho` must be a real number, an array or an Optax'
  ):
    msam(rho='large')
  for value in ('1.0', None, 1j, jnp.array(1j)):
    with pytest.raises(TypeError, match='`alpha` must be a real number, an array'):
      msam(alpha=value)
  for make in (msam_optax.asam, msam_optax.fisher_sam):
    with pytest.raises(TypeError, match='`eta` must be a real number or an array, got'):
      make(eta=optax.constant_schedule(1.0))
  with pytest.raises(ValueError, match=r'`alpha` must be a scalar, got shape \(2,\)'):
    msam(alpha=jnp.ones(2))


def test_metric_without_parentheses():
  with pytest.raises(TypeError, match='`metric` must be a Metric, such as `monge'):
    msam_optax.sharpness_aware(msam_optax.monge, rho=0.1)
  with pytest.raises(TypeError, match='Call the function that makes it'):
    msam_optax.value_and_grad(quadratic, msam_optax.monge, rho=0.1)
  with pytest.raises(TypeError, match='transformation: it belongs in a chain'):
    msam_optax.value_and_grad(quadratic, msam(), rho=0.1)
  with pytest.raises(TypeError, match='`base` must be a Metric'):
    msam(base=msam_optax.adaptive)


@pytest.mark.parametrize('params', [PARAMS, PARAMS['a']], ids=['tree', 'array'])
def test_a_loss_for_a_gradient(params):
  grads = jax.grad(quadratic)(params)
  tx = msam()
  with pytest.raises(ValueError, match=r'This seems to be the loss.*jax\.grad'):
    tx.update(grads, tx.init(params), params, grad_fn=quadratic)
  with pytest.raises(ValueError, match=r'This seems to be the loss.*jax\.grad'):
    tx.update(quadratic(params), tx.init(params), params, grad_fn=jax.grad(quadratic))


def test_a_name_for_a_mask():
  with pytest.raises(TypeError, match=r"got 'a' at the root. Or give `by_name\('a'\)`"):
    msam(mask='a').init(PARAMS)


def test_sync_ascent_without_axis():
  with pytest.raises(ValueError, match='name it, as in `axis_name="batch"`'):
    msam(sync_ascent=True)


def test_perturbation_dtype_not_floating():
  with pytest.raises(TypeError, match='`perturbation_dtype` must be a floating'):
    msam(perturbation_dtype=jnp.int32)


@pytest.mark.parametrize(
  'chained', [msam(), optax.chain(msam(), optax.sgd(0.1))], ids=['alone', 'in-chain']
)
def test_grad_fn_missing(chained):
  with pytest.raises(ValueError, match=r'grad_fn=grad_fn\)`, where `grad_fn = lambda'):
    update(chained)


def test_grad_fn_misspelt():
  with pytest.raises(ValueError, match=r"given \['gradfn'\]: a misspelling\?"):
    update(msam(), gradfn=jax.grad(quadratic))


def test_both_functions_given():
  value_and_grad_fn = jax.value_and_grad(quadratic)
  with pytest.raises(ValueError, match='give only the latter'):
    update(msam(), grad_fn=jax.grad(quadratic), value_and_grad_fn=value_and_grad_fn)


def test_params_missing():
  with pytest.raises(ValueError, match='perturbs the parameters and needs them'):
    update(msam(), params=None, grad_fn=jax.grad(quadratic))


def test_grad_fn_returns_value_too():
  with pytest.raises(
    ValueError, match=r'seems to be `\(value, grads\)`.* as `value_and_grad_fn`'
  ):
    update(msam(), grad_fn=jax.value_and_grad(quadratic))


def test_grad_fn_returns_aux_too():
  grad_fn = jax.grad(lambda p: (quadratic(p), 'aux'), has_aux=True)
  with pytest.raises(
    ValueError, match=r'seems to be `\(grads, aux\)`.*grad_fn\(params\)\[0\]'
  ):
    update(msam(), grad_fn=grad_fn)


def test_value_and_grad_fn_returns_aux_too():
  value_and_grad_fn = jax.value_and_grad(
    lambda p: (quadratic(p), jnp.ones(3)), has_aux=True
  )
  with pytest.raises(ValueError, match='With `has_aux=True` drop the auxiliary'):
    update(msam(), value_and_grad_fn=value_and_grad_fn)


def test_value_and_grad_fn_returns_grads_only():
  with pytest.raises(ValueError, match=r'must return `\(value, grads\)`.*not a dict'):
    update(msam(), value_and_grad_fn=jax.grad(quadratic))


def test_value_not_scalar():
  value_and_grad_fn = jax.value_and_grad(quadratic)
  with pytest.raises(ValueError, match=r'`value`, the loss .* got shape \(2,\)'):
    update(msam(), value_and_grad_fn=value_and_grad_fn, value=jnp.ones(2))


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    (lambda g: {**g, 'd': g['a']}, ValueError, r"an extra leaf at \['d'\]"),
    (lambda g: {'a': g['a']}, ValueError, r"is no leaf at \['b'\]\['c'\]"),
    (lambda g: {**g, 'a': g['a'].T}, ValueError, r"at \['a'\] its shape is \(3, 2\)"),
    (
      lambda g: {**g, 'b': {'c': g['b']['c'].astype(jnp.bfloat16)}},
      TypeError,
      r"at \['b'\]\['c'\] its dtype is bfloat16, not float32",
    ),
    (lambda g: [g['a'], g['b']], ValueError, r'an extra leaf at \[0\]'),
  ],
  ids=['leaf-more', 'leaf-less', 'shape', 'dtype', 'structure'],
)
def test_grad_fn_returns_other_tree(change, error, message):
  with pytest.raises(error, match='What `grad_fn` returns must be like.*' + message):
    update(msam(), grad_fn=lambda p: change(jax.grad(quadratic)(p)))


def test_containers_differ():
  grads = {'a': GRADS['a'], 'b': optax.EmptyState()}
  params = {'a': PARAMS['a'], 'b': ()}
  tx = msam()
  with pytest.raises(ValueError, match='but it is a PyTreeDef'):
    tx.update(grads, tx.init(params), params, grad_fn=lambda p: p)


def test_gradients_unlike_params():
  with pytest.raises(ValueError, match=r"to `update` must be like .* at \['a'\] its"):
    update(msam(), grads={**GRADS, 'a': jnp.ones(3)}, grad_fn=jax.grad(quadratic))


@pytest.mark.parametrize(
  ('dtype', 'advice'),
  [('int32', '`mask=lambda params'), ('complex64', 'as two real leaves')],
)
def test_leaf_not_real_floating(dtype, advice):
  params = {'w': jnp.ones(2), 'n': {'k': jnp.ones(2, dtype)}}
  for act in (
    lambda: msam().init(params),
    lambda: msam_optax.perturb(params, msam_optax.Ascent(params, jnp.ones([])), 0.1),
  ):
    with pytest.raises(TypeError, match=r"\['n'\]\['k'\] has dtype " + dtype) as error:
      act()
    assert advice in str(error.value)


@pytest.mark.parametrize(
  ('mask', 'error', 'message'),
  [
    ({'a': True}, ValueError, '`mask` must have the structure of the parameters'),
    ({'a': True, 'b': {'c': 1.0}}, TypeError, r"got 1.0 at \['b'\]\['c'\]"),
    (lambda p: {'z': True}, ValueError, 'or a prefix of it'),
  ],
  ids=['structure', 'not-bool', 'function'],
)
def test_mask_does_not_fit(mask, error, message):
  with pytest.raises(error, match=message):
    msam(mask=mask).init(PARAMS)


@pytest.mark.parametrize(
  'drop_in', [msam_optax.value_and_grad, flax_nnx.value_and_grad]
)
def test_schedule_in_drop_in(drop_in):
  with pytest.raises(ValueError, match=r'rho=schedule\(step\)'):
    drop_in(quadratic, rho=optax.constant_schedule(0.1))


@pytest.mark.standard_promotion
def test_metric_with_state_in_drop_in():
  metric = msam_optax.monge(alpha=optax.constant_schedule(1.0))
  model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  for value_and_grad_fn, params in (
    (msam_optax.value_and_grad(quadratic, metric), PARAMS),
    (flax_nnx.value_and_grad(lambda m: jnp.sum(m.kernel[...]), metric), model),
  ):
    with pytest.raises(ValueError, match='use the transformation `sharpness_aware'):
      value_and_grad_fn(params)


@pytest.mark.parametrize(
  'make', [lambda x: msam(rho=x), lambda x: msam(alpha=x)], ids=['rho', 'alpha']
)
def test_hyperparameter_with_dimensions_that_is_not_known_at_first(make):
  match = r'must be a scalar, got shape \(2,\)'
  with pytest.raises(ValueError, match=match):
    jax.jit(lambda x: make(x).init(PARAMS))(jnp.ones(2))
  with pytest.raises(ValueError, match=match):
    update(make(lambda count: jnp.ones(2)), grad_fn=jax.grad(quadratic))


def test_value_given_with_gradients():
  tx = msam()
  with pytest.raises(ValueError, match=r'seems to be `\(value, grads\)`'):
    tx.update((1.0, GRADS), tx.init(PARAMS), PARAMS, grad_fn=jax.grad(quadratic))


def call_notes(**functions):
  """What is added to an error from within the user's own function."""
  with pytest.raises(Exception) as error:  # noqa: PT011
    update(msam(), **functions)
  return ' '.join(error.value.__notes__)


def test_gradient_function_of_other_arguments():
  """That of `optax.contrib.sam`, and one whose batch is not bound."""
  for grad_fn in (lambda params, i: params, jax.grad(lambda params, batch: 0.0)):
    note = call_notes(grad_fn=grad_fn)
    assert 'the `grad_fn` given to `update`, which is called with' in note
    assert 'It takes other arguments. Bind them: `grad_fn=lambda params:' in note
    assert 'one for optax.contrib.sam' in note
    assert '`lambda params: grad_fn(params, 0)`' in note


def test_gradient_function_whose_loss_has_an_auxiliary_output():
  note = call_notes(grad_fn=jax.grad(lambda params: (quadratic(params), 'aux')))
  assert 'jax.grad(loss, has_aux=True)(params)[0]' in note


@pytest.mark.standard_promotion
@pytest.mark.parametrize('name', ['grad_fn', 'value_and_grad_fn'])
def test_gradient_function_of_an_nnx_model(name):
  """NNX's own, which wants the model and gets the state of its parameters."""
  model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, msam(), wrt=nnx.Param)
  loss_fn = lambda model: jnp.sum(model(jnp.ones((1, 2))))
  transform = {'grad_fn': nnx.grad, 'value_and_grad_fn': nnx.value_and_grad}[name]
  with pytest.raises(TypeError) as error:
    optimizer.update(model, nnx.grad(loss_fn)(model), **{name: transform(loss_fn)})
  assert f'`{name}=flax_nnx.{name}(loss, model, batch)`' in ' '.join(
    error.value.__notes__
  )


def test_gradients_in_place_of_a_function():
  with pytest.raises(TypeError, match='`grad_fn` must be a function of the parameters'):
    update(msam(), grad_fn=GRADS)
  with pytest.raises(TypeError, match='`value_and_grad_fn` must be a function of the'):
    update(msam(), value_and_grad_fn=(1.0, GRADS))


def test_flax_own_train_state():
  state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=msam())
  with pytest.raises(ValueError, match=r'use `msam_optax\.flax_linen\.TrainState`'):
    state.apply_gradients(grads=GRADS, grad_fn=jax.grad(quadratic))


@pytest.mark.parametrize(
  'before',
  [optax.sgd(0.1), optax.adam(0.1), optax.clip(0.5), optax.add_decayed_weights(0.1)],
  ids=['sgd', 'adam', 'clip', 'add_decayed_weights'],
)
@pytest.mark.standard_promotion
def test_behind_another_transformation(before):
  """Where the gradient is given a second time, it is seen that another one came in."""
  run = lambda tx: jax.jit(
    lambda grads: update(tx, grads, grad_fn=jax.grad(quadratic), grad=grads)
  )(GRADS)
  run(optax.chain(msam(), before))
  with pytest.raises(ValueError, match=r"at \['a'\] is not the `grad`.* put it first"):
    run(optax.chain(before, msam()))


@pytest.mark.standard_promotion
def test_inside_accumulation_with_the_gradient_of_one_batch():
  tx = optax.MultiSteps(optax.chain(msam(), optax.sgd(0.1)), every_k_schedule=2)
  with pytest.raises(ValueError, match=r'accumulates it \(optax\.MultiSteps\)'):
    update(tx, grad_fn=jax.grad(quadratic), grad=GRADS)


def test_others_extra_arguments_are_no_misspellings():
  with pytest.raises(ValueError, match='needs a function for it') as error:
    update(msam(), value_fn=quadratic, grad=GRADS, value=1.0)
  assert 'misspelling' not in str(error.value)


def test_functions_under_inject_hyperparams_without_static_args():
  make = optax.inject_hyperparams(msam)
  with pytest.raises(ValueError, match=r"static_args=\('mask',\)"):
    make(mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)).init(PARAMS)
  with pytest.raises(TypeError, match='in `static_args`, or write it as a string'):
    make(perturbation_dtype=jnp.float32).init(PARAMS)
  with pytest.raises(ValueError, match='selects no leaf'):
    msam(mask={'a': False, 'b': False}).init(PARAMS)


def test_linen_field_misspelt():
  state = flax_linen.TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(1.0))
  with pytest.raises(TypeError, match='`param` is no field of TrainState; `params` is'):
    state.apply_gradients(grads=GRADS, param=PARAMS)


@pytest.mark.standard_promotion
def test_nnx_model_not_where_it_should_be():
  model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  loss_fn = lambda model: jnp.sum(model(jnp.ones((1, 2))))
  with pytest.raises(ValueError, match='number 1 of `loss_fn`, but there are 1'):
    flax_nnx.grad_fn(loss_fn, model, argnums=(0, 1))


@pytest.mark.standard_promotion
def test_nnx_other_variables_than_those_trained():
  model = nnx.LoRALinear(2, 3, lora_rank=1, rngs=nnx.Rngs(0))
  loss_fn = lambda model: jnp.sum(model(jnp.ones((1, 2))))
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  grad_fn = flax_nnx.grad_fn(loss_fn, model, argnums=wrt)
  with pytest.raises(ValueError, match=r'the same `argnums=nnx\.DiffState'):
    grad_fn(nnx.state(model, nnx.Param))
