"""The registry of optimizers: every one of Optax that takes ordinary gradients."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import optax
import optax.contrib


class Optimizer(NamedTuple):
  """How an optimizer is made and used in these tests.

  Attributes:
    factory: its name in ``optax`` or ``optax.contrib``.
    kwargs: its arguments.
    after: a transformation that it is chained behind, or None.
    extra_args: ``(loss, value) -> dict``, the extra arguments that it needs, given
      the loss function and its value.
    eval_params: ``(state, params) -> params``, the parameters that shall converge.
    steps: of training until it has converged on every target.
  """

  factory: str
  kwargs: dict[str, Any]
  after: optax.GradientTransformation | None = None
  extra_args: Callable[[Any, Any], dict[str, Any]] = lambda loss, value: {}
  eval_params: Callable[[Any, Any], Any] = lambda state, params: params
  steps: int = 20_000

  def make(self) -> optax.GradientTransformation:
    optimizer = find(self.factory)(**self.kwargs)
    return optimizer if self.after is None else optax.chain(self.after, optimizer)


def find(name: str) -> Callable[..., optax.GradientTransformation] | None:
  """The public function of Optax with this name, or None in a version without."""
  return getattr(optax.contrib, name, getattr(optax, name, None))


def _value(loss, value):
  return {'value': value}


def _obj_fn(loss, value):
  return {'obj_fn': loss}


# Learning rates are such that the optimizer converges on every target, and stays there.
_EVERY = {
  'adabelief': Optimizer('adabelief', {'learning_rate': 1e-2}),
  'adadelta': Optimizer('adadelta', {'learning_rate': 0.05}),
  'adafactor': Optimizer('adafactor', {'learning_rate': 5e-3}),
  'adagrad': Optimizer('adagrad', {'learning_rate': 1.0}),
  'adam': Optimizer('adam', {'learning_rate': 1e-2}),
  'adamax': Optimizer('adamax', {'learning_rate': 1e-2}),
  'adamaxw': Optimizer('adamaxw', {'learning_rate': 1e-2}),
  'adamw': Optimizer('adamw', {'learning_rate': 1e-2}),
  'adan': Optimizer('adan', {'learning_rate': 1e-2}),
  'amsgrad': Optimizer('amsgrad', {'learning_rate': 1e-2}),
  'fromage': Optimizer('fromage', {'learning_rate': 5e-3}),
  'lamb': Optimizer('lamb', {'learning_rate': 1e-3}),
  'lars': Optimizer('lars', {'learning_rate': 1.0}),
  'lion': Optimizer(
    'lion',
    {'learning_rate': optax.cosine_decay_schedule(1e-2, 20_000), 'weight_decay': 1e-4},
  ),
  'nadam': Optimizer('nadam', {'learning_rate': 1e-2}),
  'nadamw': Optimizer('nadamw', {'learning_rate': 1e-2}),
  'noisy_sgd': Optimizer('noisy_sgd', {'learning_rate': 1e-3, 'eta': 1e-4, 'key': 0}),
  'novograd': Optimizer('novograd', {'learning_rate': 1e-3}),
  'optimistic_adam': Optimizer('optimistic_adam', {'learning_rate': 2e-3}),
  'optimistic_adam_v2': Optimizer('optimistic_adam_v2', {'learning_rate': 2e-3}),
  'optimistic_gradient_descent': Optimizer(
    'optimistic_gradient_descent', {'learning_rate': 2e-3, 'alpha': 0.7, 'beta': 0.1}
  ),
  'polyak_sgd': Optimizer('polyak_sgd', {'max_learning_rate': 1.0}, extra_args=_value),
  'radam': Optimizer('radam', {'learning_rate': 5e-3}),
  'rmsprop': Optimizer('rmsprop', {'learning_rate': 5e-3}),
  'rmsprop-momentum': Optimizer('rmsprop', {'learning_rate': 5e-3, 'momentum': 0.9}),
  'rprop': Optimizer('rprop', {'learning_rate': 1e-2, 'min_step_size': 1e-5}),
  'sgd': Optimizer('sgd', {'learning_rate': 1e-3}),
  'sgd-momentum': Optimizer('sgd', {'learning_rate': 1e-3, 'momentum': 0.9}),
  'sign_sgd': Optimizer(
    'sign_sgd',
    {'learning_rate': optax.exponential_decay(1e-1, 1000, 0.5, end_value=1e-5)},
  ),
  'signum': Optimizer(
    'signum', {'learning_rate': optax.linear_schedule(1e-2, 1e-4, 5000)}
  ),
  'sm3': Optimizer('sm3', {'learning_rate': 1.0}),
  'yogi': Optimizer('yogi', {'learning_rate': 1e-2}),
  'acprop': Optimizer('acprop', {'learning_rate': 1e-3}),
  'ademamix': Optimizer('ademamix', {'learning_rate': 1e-3}, steps=40_000),
  'simplified_ademamix': Optimizer('simplified_ademamix', {'learning_rate': 1e-3}),
  'adopt': Optimizer('adopt', {'learning_rate': 1e-2}),
  'cocob': Optimizer('cocob', {}),
  'cocob-decay': Optimizer('cocob', {'weight_decay': 1e-2}, steps=40_000),
  'dadapt_adamw': Optimizer('dadapt_adamw', {'learning_rate': 0.1}),
  'dog': Optimizer('dog', {'learning_rate': 1.0}),
  'dowg': Optimizer('dowg', {'learning_rate': 1.0}),
  'galore': Optimizer('galore', {'learning_rate': 1e-2, 'rank': 8}),
  'madgrad': Optimizer('madgrad', {'learning_rate': 1e-2}),
  'momo': Optimizer('momo', {'learning_rate': 0.1}, extra_args=_value),
  'momo_adam': Optimizer('momo_adam', {'learning_rate': 0.1}, extra_args=_value),
  'muon': Optimizer('muon', {'learning_rate': 1e-2}),
  'prodigy': Optimizer('prodigy', {'learning_rate': 0.1}),
  'sophia': Optimizer('sophia', {'learning_rate': 1e-2}, extra_args=_obj_fn),
  'schedule_free_sgd': Optimizer(
    'schedule_free_sgd',
    {'learning_rate': 1e-2, 'warmup_steps': 5000},
    eval_params=optax.contrib.schedule_free_eval_params,
  ),
  'schedule_free_adamw': Optimizer(
    'schedule_free_adamw',
    {'learning_rate': 1e-2, 'warmup_steps': 5000},
    eval_params=optax.contrib.schedule_free_eval_params,
  ),
  'schedule_free-sgd': Optimizer(
    'schedule_free',
    {'base_optimizer': optax.sgd(1e-2), 'learning_rate': 1e-2},
    eval_params=optax.contrib.schedule_free_eval_params,
  ),
  'mechanize-sgd': Optimizer(
    'mechanize',
    {'base_optimizer': optax.sgd(0.1), 'weight_decay': 0.0},
    steps=40_000,
  ),
  'mechanize-adam': Optimizer(
    'mechanize', {'base_optimizer': optax.adam(1.0), 'weight_decay': 0.0}
  ),
  'reduce_on_plateau-sgd': Optimizer(
    'reduce_on_plateau',
    {'patience': 500, 'min_scale': 0.1},
    after=optax.sgd(1e-3),
    extra_args=_value,
    steps=40_000,
  ),
}

# Those that the installed version of Optax has.
OPTIMIZERS = {
  name: optimizer
  for name, optimizer in _EVERY.items()
  if find(optimizer.factory) is not None
}

# What has the signature of an optimizer, and the reason why it is not tested here.
EXCLUDED = {
  'lbfgs': 'its line search compares values with gradients that are not of them',
  'dpsgd': 'takes gradients of single examples, with a batch axis',
  'lookahead': 'takes no extra arguments, so no `grad_fn`',
  'sam': 'a sharpness-aware method itself, and calls `update` with its own arguments',
  'selective_transform': 'shows the optimizer a part of the parameters',
  'scale_by_learning_rate': 'a part of optimizers',
  'scale_by_madgrad': 'a part of `madgrad`',
  'scale_by_rprop': 'a part of `rprop`',
}
