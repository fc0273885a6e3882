"""Combinations in Flax NNX and Linen."""

from flax import linen as nn
from flax import nnx
import jax
import numpy as np
import optax
import pytest

from msam_optax import flax_linen
from msam_optax import flax_nnx
from tests.combinations.problem import assert_close
from tests.combinations.problem import flat
from tests.combinations.problem import loss
from tests.combinations.problem import make_data
from tests.combinations.problem import make_params
from tests.combinations.problem import Model
from tests.combinations.problem import model_loss
from tests.combinations.problem import RHO
from tests.combinations.truth import COMBINATIONS
from tests.combinations.truth import METRICS
from tests.combinations.truth import truth
from tests.combinations.ways import chain_of
from tests.combinations.ways import METHODS
from tests.combinations.ways import names
from tests.combinations.ways import passes


@pytest.mark.standard_promotion
@passes
@names('gsam', 'cr_sam')
def test_nnx_drop_in(name, once):
  model, data = Model(), make_data()
  value_and_grad_fn = flax_nnx.value_and_grad(
    model_loss, METRICS['monge'][0], RHO, COMBINATIONS[name][0], compile_once=once
  )
  value, grads = nnx.jit(value_and_grad_fn)(model, data)
  want_value, want, *_ = truth(name)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert_close([grads['a'][...], grads['b'][...]], want)
  assert model.calls[...] == 1


@pytest.mark.standard_promotion
@names('gsam', 'cr_sam')
def test_nnx_optimizer(name):
  model, data = Model(), make_data()
  tx = optax.chain(METHODS[name](RHO, METRICS['monge'][0]), optax.sgd(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, data):
    grad_fn = flax_nnx.grad_fn(model_loss, model, data)
    _, grads = nnx.value_and_grad(model_loss)(model, data)
    optimizer.update(model, grads, grad_fn=grad_fn)

  step(model, optimizer, data)
  want = flat(make_params()) - 0.1 * truth(name)[1]
  assert_close([model.a[...], model.b[...]], want)
  assert model.calls[...] == 1


class Linen(nn.Module):
  """The same loss as a Linen module."""

  @nn.compact
  def __call__(self, data):
    params = {
      name: self.param(name, lambda _, n=name: make_params()[n]) for name in 'ab'
    }
    return loss(params, data)


@pytest.mark.standard_promotion
@names('gsam', 'cr_sam')
def test_linen_train_state(name):
  module, data = Linen(), make_data()
  tx = optax.chain(chain_of(name), optax.sgd(0.1))
  variables = module.init(jax.random.key(0), data)
  state = flax_linen.TrainState.create(
    apply_fn=module.apply, params=variables['params'], tx=tx
  )

  @jax.jit
  def step(state, data):
    grad_fn = jax.grad(lambda params: state.apply_fn({'params': params}, data))
    return state.apply_gradients(grads=grad_fn(state.params), grad_fn=grad_fn)

  state = step(state, data)
  assert_close(state.params, flat(make_params()) - 0.1 * truth(name)[1])
