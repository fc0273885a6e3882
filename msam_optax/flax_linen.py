"""Flax Linen: a train state that forwards extra arguments, loss scaling, BatchNorm."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import difflib
import functools
import inspect
import types
from typing import Any
from typing import Self

from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale
import jax
import jax.core
import jax.numpy as jnp

from msam_optax import _evaluation
from msam_optax import _masks
from msam_optax import _numerics

# Flax looks for names in the gradients, and None has none.
_NO_GRADIENTS: dict[str, Any] = {}


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

      value_and_grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
      (loss, batch_stats), grads = value_and_grad_fn(state.params)
      state = state.apply_gradients(
          grads=grads, grad_fn=lambda params: value_and_grad_fn(params)[1],
          batch_stats=batch_stats)
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

  def apply_gradients(self, *, grads: Any = None, **kwargs: Any) -> Self:
    """Makes one step.

    Without ``grads`` the method takes both gradients itself, compiled once::

      state = state.apply_gradients(value_and_grad_fn=jax.value_and_grad(loss_fn))
      loss = optax.tree.get(state.opt_state, 'loss')

    With FP8, ``grads`` and ``params`` have a collection ``_overwrite_with_gradient``
    beside ``params``, and ``grad_fn`` is, as always, a function of all that is in the
    state's ``params``.

    Args:
      grads: gradients, a pytree like ``params``; None if ``tx`` is to take them, from
        ``grad_fn`` or ``value_and_grad_fn``.
      **kwargs: those that name a field of the state (``batch_stats=``, say) replace
        it; all others (``grad_fn=``, ``value=``) go to ``tx.update``.

    Returns:
      The new state, with ``step`` one higher.

    Raises:
      TypeError: if a name is almost that of a field.
      ValueError: if there is no gradient, and FP8 scaling factors in the params.
    """
    fields = {field.name for field in dataclasses.fields(self)}
    replaced = {name: x for name, x in kwargs.items() if name in fields}
    extra = {name: x for name, x in kwargs.items() if name not in fields}
    for name in set(extra) - _evaluation.EXTRA_ARGS:
      if similar := difflib.get_close_matches(name, fields, n=1, cutoff=0.8):
        raise TypeError(
          f'`{name}` is no field of {type(self).__name__}; `{similar[0]}` is.'
        )
    if isinstance(grads, Mapping) and _masks.OVERWRITTEN in grads:
      extra = _of_parameters(extra, self.params)
    params = self.params
    if grads is None and isinstance(params, Mapping) and _masks.OVERWRITTEN in params:
      raise ValueError(
        f'The params hold {_masks.OVERWRITTEN!r}, which the clean pass overwrites: give'
        ' its result as `grads`, and `grad_fn` as well.'
      )
    # A tx with its extra arguments bound, so that Flax's own step does the rest.
    bound = types.SimpleNamespace(update=functools.partial(_update, self.tx, extra))
    stepped = super(TrainState, self.replace(tx=bound)).apply_gradients(
      grads=_NO_GRADIENTS if grads is None else grads, **replaced
    )
    return stepped.replace(tx=self.tx)


def scale_by_both_passes(
  dynamic_scale: DynamicScale, finite: jax.Array
) -> DynamicScale:
  """The loss scale after a step: it backs off unless *both* passes were finite.

  The gradient at the probe overflows before the clean one does, and Flax's
  ``DynamicScale.value_and_grad`` sees the clean one only. So select by the flag of the
  transformation, which is of both, and let the scale follow it::

    def train_step(state, dynamic_scale, batch):
      scaled = dynamic_scale.value_and_grad(lambda params: loss_fn(params, batch))
      _, finite, loss, grads = scaled(state.params)
      new = state.apply_gradients(grads=grads, grad_fn=lambda params: scaled(params)[3])
      finite &= optax.tree.get(new.opt_state, 'finite')
      state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
      return state, scale_by_both_passes(dynamic_scale, finite), loss

  With the drop-in, the loss is scaled by ``loss_scale``, and nothing else changes: the
  radius, ``ρ`` and ``α`` are those of the unscaled loss::

    value_and_grad_fn = msam_optax.value_and_grad(
        loss_fn, monge(alpha=1.0), rho=0.05, loss_scale=dynamic_scale.scale)
    loss, grads = value_and_grad_fn(state.params, batch)
    finite = jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]).all()

  Args:
    dynamic_scale: the scale that the step was made with.
    finite: bool scalar, whether both gradients were.

  Returns:
    The scale for the next step, by Flax's own rules for growing and backing off.

  Examples:
    >>> import jax.numpy as jnp
    >>> from flax.training.dynamic_scale import DynamicScale
    >>> from msam_optax.flax_linen import scale_by_both_passes
    >>> print(scale_by_both_passes(DynamicScale(scale=1024.0), jnp.array(False)).scale)
    512.0
  """
  # Flax updates the scale from a gradient: here one that is finite if `finite` is.
  gradient_of = lambda x: x + x * _numerics.zero_if(finite, jnp.float32)
  return dynamic_scale.value_and_grad(gradient_of)(jnp.float32(0.0)).dynamic_scale


def reestimate_batch_stats(
  forward: Callable[[Any, Any], Any], batch_stats: Any, batches: Iterable[Any]
) -> Any:
  """The statistics of BatchNorm at other parameters: their means over some batches.

  With :func:`lagged` and :func:`momentum_sam` the running statistics are those at the
  probes of past steps. For an evaluation at the clean parameters let the model see an
  epoch, or a part of one, there::

      clean = msam_optax.eval_params(state.opt_state, state.params)

      @jax.jit
      def forward(batch_stats, x):
        variables = {'params': clean, 'batch_stats': batch_stats}
        return state.apply_fn(variables, x, train=True, mutable=['batch_stats'])[1][
            'batch_stats']

      batch_stats = reestimate_batch_stats(forward, state.batch_stats, batches)

  Every batch has the same weight, whatever the layer's momentum: a pass from statistics
  of zero leaves ``(1 − momentum)`` times those of the batch, and one more pass, from
  other statistics, tells the momentum. So it is one forward pass for each batch, and
  one more. The variance is the mean of the batches' own, as in training.

  Args:
    forward: ``(batch_stats, batch) -> new batch_stats``, a pass in training mode.
    batch_stats: the collection as it is. Leaves called ``mean`` or ``var`` are those of
      BatchNorm; others, as those of ``nn.SpectralNorm``, stay what they are.
    batches: what ``forward`` takes, at least one.

  Returns:
    The new collection, like ``batch_stats``.

  Raises:
    ValueError: if there is no batch, no statistic, or if ``forward`` leaves the
      statistics as they are, or returns something else.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from msam_optax.flax_linen import reestimate_batch_stats
    >>> norm = nn.BatchNorm(use_running_average=False)
    >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [5.0]])]
    >>> variables = norm.init(jax.random.key(0), batches[0])
    >>> def forward(batch_stats, x):
    ...   variables_now = {**variables, 'batch_stats': batch_stats}
    ...   return norm.apply(variables_now, x, mutable=['batch_stats'])[1]['batch_stats']
    >>> stats = reestimate_batch_stats(forward, variables['batch_stats'], batches)
    >>> print(stats['mean'], stats['var'])
    [2.] [2.5]
  """
  chosen = jax.tree_util.tree_map_with_path(
    lambda path, _: bool({'mean', 'var'} & {*_masks.path_names(path)[-1:]}), batch_stats
  )
  if not any(jax.tree.leaves(chosen)):
    raise ValueError(
      '`batch_stats` has no leaf called "mean" or "var". Give the collection itself,'
      " as in `variables['batch_stats']`."
    )
  choose = functools.partial(
    jax.tree.map, lambda is_chosen, new, old: new if is_chosen else old, chosen
  )
  zeros = choose(jax.tree.map(jnp.zeros_like, batch_stats), batch_stats)
  total, count, batch, last = zeros, 0, None, zeros
  for batch in batches:
    last = forward(zeros, batch)
    if jax.tree.structure(last) != jax.tree.structure(batch_stats):
      raise ValueError(
        '`forward` must return the new statistics, a collection like `batch_stats`, as'
        " in `model.apply(variables, x, mutable=['batch_stats'])[1]['batch_stats']`. It"
        f' returns {jax.tree.structure(last)}.'
      )
    total, count = jax.tree.map(jnp.add, total, last), count + 1
  if not count:
    raise ValueError('`batches` is empty: give at least one.')
  start = jax.tree.map(lambda x: 1.0 + jnp.abs(x), last)
  again = forward(choose(start, batch_stats), batch)

  def mean(path, is_chosen, old, total, start, last, again):
    if not is_chosen:
      return old
    share = 1.0 - jnp.mean((again - last) / start)  # One minus the momentum.
    if not isinstance(share, jax.core.Tracer) and share < 1e-6:
      raise ValueError(
        f'`forward` leaves the statistics {_masks.at_path(path)} as they are: call the'
        ' model in training mode (`train=True`, `use_running_average=False`).'
      )
    return (total / (count * share)).astype(old.dtype)

  return jax.tree_util.tree_map_with_path(
    mean, chosen, batch_stats, total, start, last, again
  )


def _update(tx, extra_args, grads, state, params):
  """``tx.update`` with extra arguments, if it takes any."""
  # A MultiSteps object, and the transformation made of one, take them without being of
  # the type that says so.
  parameters = inspect.signature(tx.update).parameters.values()
  if not any(p.kind is p.VAR_KEYWORD for p in parameters):
    extra_args = {}
  return tx.update(
    None if grads is _NO_GRADIENTS else grads, state, params, **extra_args
  )


def _of_parameters(extra_args, params):
  """Gradient functions of all of ``params`` as ones of what the optimizer moves."""

  def whole(trained):
    return {**params, 'params': trained}

  def value_and_grad_fn(trained):
    value, grads = extra_args['value_and_grad_fn'](whole(trained))
    return value, grads['params']

  wrapped = {
    'grad_fn': lambda trained: extra_args['grad_fn'](whole(trained))['params'],
    'value_and_grad_fn': value_and_grad_fn,
  }
  return {name: wrapped.get(name, x) for name, x in extra_args.items()}
