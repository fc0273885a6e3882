"""Flax NNX: gradients of models, at the probe, that leave the model as it is."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax

from msam_optax import gradients
from msam_optax.gradients import without_state
from msam_optax.metrics import Metric
from msam_optax.metrics import monge


def value_and_grad(
  loss_fn: Callable[..., Any],
  metric: Metric = monge(),
  rho: float | jax.Array = 0.05,
  *,
  argnums: int | nnx.DiffState = 0,
  has_aux: bool = False,
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
  compile_once: bool = False,
) -> Callable[..., tuple[Any, Any]]:
  """Takes the place of ``nnx.value_and_grad``: the gradient is sharpness-aware.

  The value, the auxiliary output and whatever the pass does to the model and the
  other arguments (BatchNorm statistics, random counters, metrics) are those of the
  clean pass, once. The gradient is the one at the probe, which a copy takes from the
  same start: with the same dropout masks, and without a trace in the model. (For
  micro-batches split the model, and use :func:`msam_optax.value_and_grad`.)

  Args:
    loss_fn: ``loss_fn(model, *args)``, returns a scalar, or ``(scalar, aux)``.
    metric: what uphill means; one without state, e.g. ``monge(alpha=1.0)``.
    rho: ``ρ``, the radius, scalar >= 0, a number or an array.
    argnums: the position of the model, or ``nnx.DiffState(position, filter)`` where
      only some variables are trained, e.g. ``nnx.DiffState(0, nnx.LoRAParam)``.
    has_aux: whether ``loss_fn`` returns ``(scalar, aux)``.
    mask: which leaves of the model's state are moved, see :func:`sharpness_aware`.
    axis_name: the mapped axis over which the gradient at the probe is averaged.
    sync_ascent: whether to average the gradient for the ascent, too.
    param_specs: how the model's state is sharded inside ``shard_map``, see
      :func:`sharpness_aware`.
    perturbation_dtype: floating dtype of the probe, by default that of the params.
    compile_once: whether to run both passes as two iterations of one loop, see
      :func:`msam_optax.value_and_grad`. The auxiliary output then holds arrays only,
      and the pass may change the values of variables, but not of those that are
      trained (as ``nnx.SpectralNorm`` does), and nothing else about the model.

  Returns:
    A function with the arguments of ``loss_fn`` that returns ``(value, grads)``, or
    ``((value, aux), grads)``, as ``nnx.value_and_grad`` does.

  Raises:
    TypeError: if ``metric`` is no metric, or a parameter not real floating point.
    ValueError: if ``rho`` is a schedule, negative or not finite, if the metric has a
      state, the mask does not fit, or, with ``compile_once``, the pass changes more
      about the model than values.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax
    >>> from msam_optax import flax_nnx, monge
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    >>> def loss_fn(model, x, y):
    ...   return jnp.mean((model(x) - y) ** 2)
    >>> @nnx.jit
    ... def train_step(model, optimizer, x, y):
    ...   loss, grads = flax_nnx.value_and_grad(loss_fn, monge(), rho=0.05)(model, x, y)
    ...   optimizer.update(model, grads)
    ...   return loss
    >>> loss = train_step(model, optimizer, jnp.ones((4, 2)), jnp.ones((4, 1)))

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  options = {
    'mask': mask,
    'axis_name': axis_name,
    'sync_ascent': sync_ascent,
    'param_specs': param_specs,
    'perturbation_dtype': perturbation_dtype,
  }
  make = _in_one_loop if compile_once else _in_two_copies
  return functools.wraps(loss_fn)(
    make(loss_fn, metric, rho, argnums=argnums, has_aux=has_aux, **options)
  )


def grad_fn(
  loss_fn: Callable[..., Any],
  *args: Any,
  argnums: int | nnx.DiffState = 0,
  has_aux: bool = False,
  **kwargs: Any,
) -> Callable[[Any], Any]:
  """The ``grad_fn`` of an NNX model, for a sharpness-aware transformation.

  Make it *before* the clean pass: it takes a copy of the model as it is, random
  counters and all, so that both passes drop out the same units, and leaves the
  model untouched.

  Args:
    loss_fn: ``loss_fn(model, *args)``, returns a scalar, or ``(scalar, aux)``.
    *args: the model, and what else ``loss_fn`` takes.
    argnums: the position of the model, or ``nnx.DiffState(position, filter)``.
    has_aux: whether ``loss_fn`` returns ``(scalar, aux)``.
    **kwargs: keyword arguments of ``loss_fn``.

  Returns:
    A function from the model's parameters (a state, as ``nnx.state`` gives and an
    ``nnx.Optimizer`` has) to gradients of the same structure.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax
    >>> from msam_optax import flax_nnx, msam
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> tx = optax.chain(msam(rho=0.05), optax.adam(1e-3))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> def loss_fn(model, x, y):
    ...   return jnp.mean((model(x) - y) ** 2)
    >>> @nnx.jit
    ... def train_step(model, optimizer, x, y):
    ...   grad_fn = flax_nnx.grad_fn(loss_fn, model, x, y)
    ...   loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    ...   optimizer.update(model, grads, grad_fn=grad_fn)
    ...   return loss
    >>> loss = train_step(model, optimizer, jnp.ones((4, 2)), jnp.ones((4, 1)))
  """
  take = value_and_grad_fn(loss_fn, *args, argnums=argnums, has_aux=has_aux, **kwargs)
  return lambda params: take(params)[1]


def value_and_grad_fn(
  loss_fn: Callable[..., Any],
  *args: Any,
  argnums: int | nnx.DiffState = 0,
  has_aux: bool = False,
  **kwargs: Any,
) -> Callable[[Any], tuple[jax.Array, Any]]:
  """Like :func:`grad_fn`, with the loss, so that it is recorded at the probe.

  Args:
    loss_fn: ``loss_fn(model, *args)``, returns a scalar, or ``(scalar, aux)``.
    *args: the model, and what else ``loss_fn`` takes.
    argnums: the position of the model, or ``nnx.DiffState(position, filter)``.
    has_aux: whether ``loss_fn`` returns ``(scalar, aux)``; aux is dropped.
    **kwargs: keyword arguments of ``loss_fn``.

  Returns:
    A function from the model's parameters to the loss and its gradients.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax
    >>> from msam_optax import flax_nnx, sam
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, sam(rho=0.05), wrt=nnx.Param)
    >>> loss_fn = lambda model: jnp.sum(model.kernel[...])
    >>> take = flax_nnx.value_and_grad_fn(loss_fn, model)
    >>> loss, grads = nnx.value_and_grad(loss_fn)(model)
    >>> _ = optimizer.update(model, grads, value_and_grad_fn=take, value=loss)
    >>> print(f"{optax.tree.get(optimizer.opt_state, 'rise')[...]:.4f}")  # 0.05·√2
    0.0707
  """
  take = nnx.value_and_grad(loss_fn, argnums=argnums, has_aux=has_aux)
  position = _position(argnums, args)
  start = nnx.clone((args, kwargs))

  def take_at(params):
    new_args, new_kwargs = nnx.clone(start)
    nnx.update(new_args[position], params)
    value, grads = take(*new_args, **new_kwargs)
    if nnx.to_flat_state(nnx.state(grads)).paths != nnx.to_flat_state(params).paths:
      raise ValueError(
        'The gradients that `loss_fn` has are of other variables than those that are'
        ' trained. Where only some are trained, give the same'
        ' `argnums=nnx.DiffState(position, filter)` here and to nnx.value_and_grad,'
        ' and the same filter as `wrt` of nnx.Optimizer.'
      )
    grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))
    return value[0] if has_aux else value, grads

  return take_at


def _in_two_copies(loss_fn, metric, rho, *, argnums, has_aux, **options):
  at_probe = without_state(metric, rho, **options)
  clean = nnx.value_and_grad(loss_fn, argnums=argnums, has_aux=has_aux)

  def value_and_grad_at_probe(*args, **kwargs):
    # Copies, made before the clean pass changes variables (statistics, counters).
    take = grad_fn(loss_fn, *args, argnums=argnums, has_aux=has_aux, **kwargs)
    params = jax.tree.map(lambda x: x, _trained(args, argnums))
    value, grads = clean(*args, **kwargs)
    return value, at_probe(grads, params, take)

  return value_and_grad_at_probe


def _in_one_loop(loss_fn, metric, rho, *, argnums, has_aux, **options):
  def pure(params, graph, state):
    """The loss, and what the pass has changed, as functions of arrays."""
    # New variables: those of the caller may not be changed while this is traced.
    args, kwargs = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    nnx.update(args[_position(argnums, args)], params)
    before = nnx.graphdef((args, kwargs)), _arrays((args, kwargs))
    output = loss_fn(*args, **kwargs)
    value, aux = output if has_aux else (output, None)
    trained = [
      (0, _position(argnums, args) % len(args), *path)
      for path, _ in nnx.to_flat_state(params)
    ]
    return value, (aux, _changed((args, kwargs), before, trained))

  take = gradients.value_and_grad(
    pure, metric, rho, has_aux=True, compile_once=True, **options
  )

  def value_and_grad_at_probe(*args, **kwargs):
    params = _trained(args, argnums)
    (value, (aux, changed)), grads = take(params, *nnx.split((args, kwargs)))
    nnx.update((args, kwargs), changed)
    return (value, aux) if has_aux else value, grads

  return value_and_grad_at_probe


def _trained(args, argnums):
  """The state of the variables that gradients are taken of."""
  wrt = argnums.filter if isinstance(argnums, nnx.DiffState) else nnx.Param
  model = args[_position(argnums, args)]
  # NNX has no state of what is an array itself.
  params = {} if hasattr(model, 'shape') else nnx.state(model, wrt)
  if not jax.tree.leaves(params):
    raise ValueError(
      f'The argument number {_position(argnums, args)} of `loss_fn`, a'
      f' {type(model).__name__}, has no variables of the type {wrt!r}: give the'
      ' position of the model as `argnums`, or nnx.DiffState(position, filter).'
    )
  return params


def _arrays(node):
  """The arrays in each variable, by its path."""
  return {
    path: jax.tree.leaves(x)
    for path, x in nnx.to_flat_state(nnx.state(node))
    if isinstance(x, nnx.Variable)
  }


def _changed(node, before, trained):
  """The variables that hold other arrays than before, but for the trained ones."""
  graph, arrays = before
  if nnx.graphdef(node) != graph:
    raise ValueError(
      'With `compile_once=True` the loss function may change the values of variables,'
      ' and nothing else about its arguments: no new variables (`sow`, `nnx.pop`), no'
      ' other attributes (`model.eval()`, counters that are plain numbers). Do that'
      ' outside of it, or leave `compile_once` out.'
    )
  ids = lambda leaves: [id(x) for x in leaves]
  after = _arrays(node)
  return nnx.from_flat_state(
    [
      (path, x)
      for path, x in nnx.to_flat_state(nnx.state(node))
      if path in after and path not in trained and ids(after[path]) != ids(arrays[path])
    ]
  )


def _position(argnums, args):
  position = argnums.argnum if isinstance(argnums, nnx.DiffState) else argnums
  if not isinstance(position, int):
    raise TypeError(
      '`argnums` must be the position of one model, or nnx.DiffState(position,'
      f' filter), got {argnums!r}.'
    )
  if position >= len(args):
    raise ValueError(
      f'The model must be a positional argument, number {position}, of `loss_fn`;'
      f' there are {len(args)}.'
    )
  return position
