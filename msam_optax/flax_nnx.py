"""Flax NNX: gradients of models at the probe, and models at the clean parameters."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from msam_optax import _nnx_arguments
from msam_optax import _nnx_losses
from msam_optax import _nnx_passes
from msam_optax import combinations
from msam_optax import gradients
from msam_optax import metrics
from msam_optax import single_pass
from msam_optax.monge import monge


def value_and_grad(
  loss_fn: Callable[..., Any],
  metric: metrics.Metric = monge(),
  rho: float | jax.Array = 0.05,
  combination: combinations.Combination = combinations.probe_gradient(),
  *,
  argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
  has_aux: bool = False,
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
  compile_once: bool = False,
) -> Callable[..., tuple[Any, Any]]:
  """A drop-in replacement for ``nnx.value_and_grad``, with a sharpness-aware gradient.

  The value, the auxiliary output and whatever the pass does to the model and the
  other arguments (BatchNorm statistics, random counters, metrics) are those of the
  clean pass, once. The gradient is the one at the probe, which a copy takes from the
  same start: with the same dropout masks, and without a trace in the model. (For
  micro-batches split the model, and use :func:`msam_optax.value_and_grad`.)

  Args:
    loss_fn: ``loss_fn(model, *args)``, returns a scalar, or ``(scalar, aux)``.
    metric: how the length of a perturbation is measured; one without state, e.g.
      ``monge(alpha=1.0)``.
    rho: ``ρ``, the radius, scalar >= 0, a number or an array.
    combination: what is made of the gradients, see :func:`sharpness_aware`; one without
      state, e.g. ``surrogate_gap(0.6)``.
    argnums: the position of the model, or ``nnx.DiffState(position, filter)`` where
      only some variables are trained, e.g. ``nnx.DiffState(0, nnx.LoRAParam)``; or
      several of these, which move together. An argument may also be a tuple, list or
      dict of models, or a state that was split off a model.
    has_aux: whether ``loss_fn`` returns ``(scalar, aux)``.
    mask: which leaves are perturbed, in the structure of the gradients, see
      :func:`sharpness_aware`.
    axis_name: the mapped axis over which the gradient at the probe is averaged.
    sync_ascent: whether to average the gradient for the ascent as well.
    param_specs: how the parameters are sharded inside ``shard_map``, in the structure
      of the gradients, see :func:`sharpness_aware`.
    perturbation_dtype: floating dtype of the probe, by default that of the params.
    compile_once: whether to run both passes as two iterations of one loop, see
      :func:`msam_optax.value_and_grad`. The auxiliary output then holds arrays only,
      and the pass may change the values of variables, trained ones as well
      (``nnx.SpectralNorm`` does), and nothing else about the model. What it changes is
      seen by tracing ``loss_fn`` once more.

  Returns:
    A function with the arguments of ``loss_fn`` that returns ``(value, grads)``, or
    ``((value, aux), grads)``; ``grads`` has the structure that ``nnx.value_and_grad``
    gives. (In NNX's tree mode that is the model itself, with gradients of all its
    variables. Its ``nnx.Param`` are perturbed, and the others stay where they are.)

  Raises:
    TypeError: if ``metric`` is no metric, a parameter not real floating point, or what
      ``loss_fn`` returns not what ``has_aux`` says.
    ValueError: if ``rho`` is a schedule, negative or not finite, if the metric has a
      state, the mask does not fit, ``argnums`` names no model, or, with
      ``compile_once``, the pass changes more about the model than values.

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
  _nnx_losses.check_unbound(loss_fn)
  # Raises early what it raises.
  gradients.without_state(metric, rho, combination, **options)
  passes = _nnx_passes.in_one_loop if compile_once else _nnx_passes.in_two_copies

  def value_and_grad_at_probe(*args, **kwargs):
    start = _nnx_arguments.start(loss_fn, args, kwargs, argnums, has_aux)
    return passes(start, metric, rho, combination, **options)

  # A loss function may be a module, whose attributes are not to be copied.
  return functools.update_wrapper(value_and_grad_at_probe, loss_fn, updated=())


def grad_fn(
  loss_fn: Callable[..., Any],
  *args: Any,
  argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
  has_aux: bool = False,
  **kwargs: Any,
) -> Callable[[Any], Any]:
  """The ``grad_fn`` of an NNX model, for a sharpness-aware transformation.

  Make it *before* the clean pass: it takes a copy of the model as it is, random
  counters and all, so that both passes drop out the same units, and leaves the
  model untouched. Where the forward pass overwrites trained weights, as
  ``nnx.SpectralNorm`` and ``nnx.WeightNorm`` do, use :func:`value_and_grad` instead:
  ``nnx.Optimizer`` would perturb the weights that the clean pass has left. For these
  two layers it raises; a layer of your own that does this is not noticed.

  Args:
    loss_fn: ``loss_fn(model, *args)``, returns a scalar, or ``(scalar, aux)``.
    *args: the model, and what else ``loss_fn`` takes.
    argnums: the position of the model, ``nnx.DiffState(position, filter)``, or several
      of these.
    has_aux: whether ``loss_fn`` returns ``(scalar, aux)``.
    **kwargs: keyword arguments of ``loss_fn``.

  Returns:
    A function from the model's parameters (a state, as ``nnx.state`` gives and an
    ``nnx.Optimizer`` has, or part of it) to gradients of the same structure.

  Raises:
    TypeError: if ``argnums`` is no position, or, when the function is called, what
      ``loss_fn`` returns is not what ``has_aux`` says.
    ValueError: if ``argnums`` names no model, or, when the function is called, the
      gradients are not of the variables that it gets, or the clean pass of
      ``nnx.SpectralNorm`` or ``nnx.WeightNorm`` has overwritten weights.

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
  both = value_and_grad_fn(loss_fn, *args, argnums=argnums, has_aux=has_aux, **kwargs)
  return lambda params: both(params)[1]


def value_and_grad_fn(
  loss_fn: Callable[..., Any],
  *args: Any,
  argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
  has_aux: bool = False,
  **kwargs: Any,
) -> Callable[[Any], tuple[jax.Array, Any]]:
  """Like :func:`grad_fn`, with the loss, so that it is recorded at the probe.

  Args:
    loss_fn: ``loss_fn(model, *args)``, returns a scalar, or ``(scalar, aux)``.
    *args: the model, and what else ``loss_fn`` takes.
    argnums: the position of the model, ``nnx.DiffState(position, filter)``, or several
      of these.
    has_aux: whether ``loss_fn`` returns ``(scalar, aux)``; aux is dropped.
    **kwargs: keyword arguments of ``loss_fn``.

  Returns:
    A function from the model's parameters to the loss and its gradients.

  Raises:
    TypeError: see :func:`grad_fn`.
    ValueError: see :func:`grad_fn`.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax
    >>> from msam_optax import flax_nnx, sam
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, sam(rho=0.05), wrt=nnx.Param)
    >>> loss_fn = lambda model: jnp.sum(model.kernel[...])
    >>> f = flax_nnx.value_and_grad_fn(loss_fn, model)
    >>> loss, grads = nnx.value_and_grad(loss_fn)(model)
    >>> _ = optimizer.update(model, grads, value_and_grad_fn=f, value=loss)
    >>> print(f"{optax.tree.get(optimizer.opt_state, 'rise')[...]:.4f}")  # 0.05·√2
    0.0707
  """
  _nnx_losses.check_unbound(loss_fn)
  start = _nnx_arguments.start(loss_fn, args, kwargs, argnums, has_aux)
  return _nnx_passes.of_params(start)


def eval_model(
  optimizer: nnx.Optimizer, model: Any, *, momentum: str | None = None
) -> Any:
  """A copy of the model at the clean parameters, for evaluation.

  For an ``nnx.Optimizer`` of :func:`lagged` or :func:`momentum_sam`, with which the
  model that is trained is the probe, see :func:`msam_optax.eval_params`::

      evaluated = flax_nnx.eval_model(optimizer, model)
      flax_nnx.reestimate_batch_stats(evaluated, batches)    # if it has BatchNorm
      evaluated.eval()

  Args:
    optimizer: the optimizer of the model.
    model: the model that is trained. It stays as it is.
    momentum: what :func:`momentum_sam` was given, if anything.

  Returns:
    A new model; all other variables are copies of the model's.

  Raises:
    ValueError: if the optimizer is none of :func:`lagged` or :func:`momentum_sam`.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax
    >>> from msam_optax import flax_nnx, momentum_sam
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> model.kernel[...] = jnp.array([[1.0], [1.0]])
    >>> tx = momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> x = jnp.array([[3.0, 4.0]])
    >>> grads = nnx.grad(lambda model: model(x).mean())(model)
    >>> _ = optimizer.update(model, grads)
    >>> print(model.kernel[...].T, flax_nnx.eval_model(optimizer, model).kernel[...].T)
    [[0.4 0.2]] [[0.7 0.6]]
  """
  graph, trained, rest = nnx.split(model, optimizer.wrt, ...)
  clean = single_pass.eval_params(
    _pure(optimizer.opt_state), _pure(trained), momentum=momentum
  )
  evaluated = nnx.merge(graph, *jax.tree.map(jnp.copy, (trained, rest)))
  nnx.update(evaluated, clean)
  return evaluated


def reestimate_batch_stats(
  model: Any,
  batches: Iterable[Any],
  forward: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
) -> None:
  """Sets the statistics of BatchNorm to their means over some batches.

  With :func:`lagged` and :func:`momentum_sam` the running statistics are those at the
  probes of past steps. For an evaluation at the clean parameters let the model of
  :func:`eval_model` see an epoch, or a part of one: one forward pass for each batch.
  All batches have the same weight, whatever the layers' momentum; the variance is the
  mean of the batches' own, as in training.

  Args:
    model: the model, whose BatchNorm layers get new statistics; nothing else changes.
    batches: what ``forward`` takes, at least one.
    forward: ``(model, batch) -> anything``; it is called, compiled, with a copy of the
      model in training mode.

  Returns:
    None.

  Raises:
    ValueError: if there is no batch or no ``nnx.BatchNorm``.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from msam_optax import flax_nnx
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [5.0]])]
    >>> flax_nnx.reestimate_batch_stats(model, batches)
    >>> print(model.mean[...], model.var[...])
    [2.] [2.5]
  """
  graph, state = nnx.split(model)
  copy = nnx.merge(graph, jax.tree.map(jnp.copy, state))
  copy.train()
  layers = _batch_norms(copy)
  if not layers:
    raise ValueError('The model has no nnx.BatchNorm: there is nothing to re-estimate.')
  for layer in layers:
    layer.momentum = 0.0  # The statistics are then those of the batch alone.
  see = nnx.jit(lambda copy, batch: (forward(copy, batch), None)[1])
  total, count = None, 0
  for batch in batches:
    see(copy, batch)
    new = [(layer.mean[...], layer.var[...]) for layer in layers]
    total = new if total is None else jax.tree.map(jnp.add, total, new)
    count += 1
  if total is None:
    raise ValueError('`batches` is empty: give at least one.')
  for layer, (mean, var) in zip(_batch_norms(model), total, strict=True):
    layer.mean[...], layer.var[...] = mean / count, var / count


def _batch_norms(model):
  return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)]


def _pure(tree):
  """A tree with an array instead of each variable."""
  is_variable = _nnx_arguments.is_variable
  return jax.tree.map(
    lambda x: x[...] if is_variable(x) else x, tree, is_leaf=is_variable
  )
