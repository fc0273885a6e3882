"""Flax Linen: a train state that hands extra arguments to the optimizer."""

import dataclasses
import difflib
import functools
from typing import Any
from typing import Self

from flax.training import train_state
import optax


class TrainState(train_state.TrainState):
  """Flax's ``TrainState`` whose ``apply_gradients`` passes ``grad_fn`` on to ``tx``.

  Everything else is as in :class:`flax.training.train_state.TrainState`; subclass
  it in the same way to carry batch statistics and the like.

  With BatchNorm keep the statistics that the clean pass has made, and with Dropout
  use one key for both passes: let ``grad_fn`` close over the key and drop the
  statistics. ``train_step`` below does both::

    def train_step(state, batch, key):
      def loss_fn(params):
        logits, new = state.apply_fn(
            {'params': params, 'batch_stats': state.batch_stats}, batch['x'],
            train=True, rngs={'dropout': key}, mutable=['batch_stats'])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['y'])
        return loss.mean(), new['batch_stats']

      take = jax.value_and_grad(loss_fn, has_aux=True)
      (loss, batch_stats), grads = take(state.params)
      state = state.apply_gradients(
          grads=grads, grad_fn=lambda params: take(params)[1], batch_stats=batch_stats)
      return state, loss

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import msam
    >>> from msam_optax.flax_linen import TrainState
    >>> loss = lambda params: jnp.sum(params['w'] ** 2)
    >>> state = TrainState.create(
    ...     apply_fn=None, params={'w': jnp.array([0.3, 0.4])},
    ...     tx=optax.chain(msam(rho=0.5), optax.sgd(0.1)))
    >>> state = state.apply_gradients(
    ...     grads=jax.grad(loss)(state.params), grad_fn=jax.grad(loss))
    >>> print(state.params['w'], f"{optax.tree.get(state.opt_state, 'slope'):.4f}")
    [0.1976 0.2634] 0.7071
  """

  def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
    """Takes one step.

    Args:
      grads: gradients, a pytree like ``params``.
      **kwargs: those that name a field of the state (``batch_stats=``, say) replace
        it; all others (``grad_fn=``, ``value=``) go to ``tx.update``.

    Returns:
      The new state, with ``step`` one higher.

    Raises:
      TypeError: if a name is almost that of a field.
    """
    fields = {field.name for field in dataclasses.fields(self)}
    replaced = {name: x for name, x in kwargs.items() if name in fields}
    extra = {name: x for name, x in kwargs.items() if name not in fields}
    for name in extra:
      if similar := difflib.get_close_matches(name, fields, n=1, cutoff=0.8):
        raise TypeError(
          f'`{name}` is no field of {type(self).__name__}; `{similar[0]}` is.'
        )
    # A tx with its extra arguments bound, so that Flax's own step does the rest.
    tx = optax.with_extra_args_support(self.tx)
    bound = tx._replace(update=functools.partial(tx.update, **extra))
    stepped = super(TrainState, self.replace(tx=bound)).apply_gradients(
      grads=grads, **replaced
    )
    return stepped.replace(tx=self.tx)
