"""Flax NNX: gradients of models at the probe, and models at the clean parameters."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import functools
import inspect
import operator
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from msam_optax import _masks
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
      and the pass may change the values of variables, and nothing else about the
      model. What it does to those that are trained, as ``nnx.SpectralNorm`` does, is
      lost without an error.

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
    'axis_name': axis_name,
    'sync_ascent': sync_ascent,
    'param_specs': param_specs,
    'perturbation_dtype': perturbation_dtype,
  }
  _check_unbound(loss_fn)
  # Raises early what it raises.
  gradients.without_state(metric, rho, combination, mask=mask, **options)
  passes = _in_one_loop if compile_once else _in_two_copies

  def value_and_grad_at_probe(*args, **kwargs):
    start = _start(loss_fn, args, kwargs, argnums, has_aux)
    return passes(
      start, metric, rho, combination, mask=_trained(mask, start), **options
    )

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
  model untouched.

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
      gradients are not of the variables that it gets.

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
  _check_unbound(loss_fn)
  start = _start(loss_fn, args, kwargs, argnums, has_aux)

  def at(params):
    probe = _by_path(params, start.argnums)
    value, grads = _differentiated(start)(*_merge(start, probe))
    grads = _by_path(grads, start.argnums)
    if missing := [path for path in probe if path not in grads]:
      raise ValueError(
        'The gradients that `loss_fn` has are of other variables than those that are'
        f' trained: they have none at {_names(missing[0])}. Where only some are'
        ' trained, give the same `argnums=nnx.DiffState(position, filter)` here and to'
        ' nnx.value_and_grad, and the same filter as `wrt` of nnx.Optimizer.'
      )
    return value[0] if has_aux else value, _fill(params, grads, start.argnums)

  return at


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
  return jax.tree.map(
    lambda x: x[...] if _is_variable(x) else x, tree, is_leaf=_is_variable
  )


class _Start(NamedTuple):
  """What a loss function is called with, as it is before the first pass.

  Attributes:
    loss_fn: the loss as a function of positional arguments, whose result is checked.
    argnums: which of these are trained, as NNX takes it; none is negative.
    has_aux: whether the loss function returns ``(scalar, aux)``.
    inputs: the arguments themselves.
    graph: what they are without their arrays.
    state: copies of all variables (and arrays), by their paths in ``inputs``.
    params: those that are trained, in the structure that NNX gives to gradients.
  """

  loss_fn: Callable[..., Any]
  argnums: Any
  has_aux: bool
  inputs: tuple[Any, ...]
  graph: Any
  state: dict[Any, Any]
  params: Any


def _start(loss_fn, args, kwargs, argnums, has_aux):
  args, kwargs = _positional(loss_fn, args, kwargs)

  def checked(*inputs):
    return _check_output(loss_fn(*inputs[:-1], **inputs[-1]), has_aux)

  argnums = _check_argnums(argnums, len(args))
  trained = [_position(argnum) for argnum in _tuple(argnums)]
  inputs = tuple(
    _without_floats(x) if i in trained else x for i, x in enumerate((*args, kwargs))
  )
  graph, state = nnx.split(inputs)
  state = {path: _copy(x) for path, x in nnx.to_flat_state(state)}
  start = _Start(checked, argnums, has_aux, inputs, graph, state, None)
  return start._replace(params=_fill(_like_gradients(start), state, argnums))


def _in_two_copies(start, metric, rho, combination, **options):
  update = gradients.without_state(metric, rho, combination, **options)
  differentiate = _differentiated(start)
  value, grads = differentiate(*start.inputs)

  def grad_fn(probe):
    return differentiate(*_merge(start, _by_path(probe, start.argnums)))[1]

  return value, update(grads, start.params, grad_fn)


def _in_one_loop(start, metric, rho, combination, **options):
  def pure(params):
    """The loss, and what the pass has changed, as functions of arrays."""
    trained = _by_path(params, start.argnums)
    inputs = _merge(start, trained)
    before = nnx.graphdef(inputs), _arrays(inputs)
    output = start.loss_fn(*inputs)
    value, aux = output if start.has_aux else (output, None)
    _check_arrays(aux)
    return value, (aux, _changed(inputs, before, trained))

  value_and_grad_of = gradients.value_and_grad(
    pure, metric, rho, combination, has_aux=True, compile_once=True, **options
  )
  (value, (aux, changed)), grads = value_and_grad_of(start.params)
  nnx.update(start.inputs, changed)
  return (value, aux) if start.has_aux else value, grads


def _differentiated(start):
  return nnx.value_and_grad(start.loss_fn, argnums=start.argnums, has_aux=start.has_aux)


def _positional(loss_fn, args, kwargs):
  """As many arguments by position as can be, as NNX does."""
  if not kwargs:
    return args, kwargs
  try:
    bound = inspect.signature(loss_fn).bind(*args, **kwargs)
  except (TypeError, ValueError):  # The call says better what is wrong.
    return args, kwargs
  return bound.args, bound.kwargs


def _like_gradients(start):
  """The structure that NNX gives to gradients, without arrays."""

  def structure():
    zero = nnx.grad(lambda *inputs: jnp.zeros(()), argnums=start.argnums)
    return zero(*_merge(start))

  try:
    like = jax.eval_shape(structure)
  except TypeError as error:
    error.add_note(
      'These are gradients of all variables, as NNX takes them in tree mode. Split the'
      ' model, `graph, params, rest = nnx.split(model, nnx.Param, ...)`, and let'
      ' `loss_fn` take `params` and the others, and merge them.'
    )
    raise
  several = isinstance(start.argnums, tuple)
  for argnum, part in zip(
    _tuple(start.argnums), like if several else (like,), strict=True
  ):
    _check_variables(argnum, part, start)
  return like


def _trained(mask, start):
  """A mask that leaves out what has gradients in tree mode and is no parameter."""

  def trained(node):
    if _is_variable(node) or not _is_node(node):
      return True
    return jax.tree.map(
      lambda x: jax.tree.map(lambda _: isinstance(x, nnx.Param), x),
      node,
      is_leaf=_is_variable,
    )

  has_param = _masks.resolve_mask(
    jax.tree.map(trained, start.params, is_leaf=_is_node), start.params
  )
  if all(jax.tree.leaves(has_param)):
    return mask
  return jax.tree.map(operator.and_, _masks.resolve_mask(mask, start.params), has_param)


def _is_variable(x):
  return isinstance(x, nnx.Variable)


def _is_node(x):
  return _is_variable(x) or nnx.graph.is_graph_node(x)


def _without_floats(tree):
  """Numbers as arrays, which they are to a gradient."""
  return jax.tree.map(
    lambda x: jnp.asarray(x) if isinstance(x, float) else x, tree, is_leaf=_is_node
  )


def _copy(leaf):
  """A variable that does not change with the one that it is of."""
  return jax.tree.map(lambda x: x, leaf)


def _merge(start, params=()):
  """New arguments as at the start, but for some parameters, by their paths."""
  params = dict(params)
  leaves = []
  for path, x in start.state.items():
    new = jax.tree.leaves(params.get(path, x))
    leaves.append((path, jax.tree.unflatten(jax.tree.structure(x), new)))
  return nnx.merge(start.graph, nnx.from_flat_state(leaves))


def _by_path(tree, argnums):
  """The leaves of parameters or gradients by their paths in the arguments."""
  flat: list[tuple[Any, Any]] = list(nnx.to_flat_state(nnx.state((tree,))))
  if isinstance(argnums, tuple):
    return {(_position(argnums[path[1]]), *path[2:]): x for path, x in flat}
  return {(_position(argnums), *path[1:]): x for path, x in flat}


def _fill(tree, leaves, argnums):
  """A tree with other leaves, which are given by their paths in the arguments."""
  numbers = [np.asarray(i) for i in range(len(jax.tree.leaves(tree)))]
  structure = jax.tree.structure(tree)
  filled = list(numbers)
  for path, place in _by_path(structure.unflatten(numbers), argnums).items():
    new = jax.tree.leaves(leaves[path])
    for i, x in zip(jax.tree.leaves(place), new, strict=True):
      filled[int(i)] = x
  return structure.unflatten(filled)


def _arrays(node):
  """The arrays in each variable and attribute, by its path.

  Those in containers are left out: what a function does to its copy of a tuple or dict
  is not seen by its caller.
  """
  bare = jax.tree.map(lambda x: None if _is_node(x) else x, node, is_leaf=_is_node)
  containers = dict(nnx.to_flat_state(nnx.state(bare)))
  return {
    path: jax.tree.leaves(x)
    for path, x in nnx.to_flat_state(nnx.state(node))
    if path not in containers
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


def _tuple(argnums):
  return argnums if isinstance(argnums, tuple) else (argnums,)


def _position(argnum):
  return argnum.argnum if isinstance(argnum, nnx.DiffState) else argnum


def _names(path):
  """A path in the arguments, for messages."""
  return ''.join(f'[{name!r}]' for name in path[1:])


def _check_unbound(loss_fn):
  owner = getattr(loss_fn, '__self__', None)
  if isinstance(owner, nnx.Module):
    kind, name = type(owner).__name__, loss_fn.__name__
    raise ValueError(
      f'`loss_fn` is a method of a {kind}, which would not be an argument of it, and'
      f' both passes would change it. Give `{kind}.{name}`, and the {kind} as first'
      ' argument.'
    )


def _check_argnums(argnums, count):
  """``argnums`` as NNX takes it, with positions from the front."""

  def check(argnum):
    position = _position(argnum)
    if isinstance(position, bool) or not isinstance(position, (int, np.integer)):
      raise TypeError(
        '`argnums` must be the position of a model, nnx.DiffState(position, filter), or'
        f' a sequence of these, got {argnums!r}.'
      )
    if not -count <= position < count:
      raise ValueError(
        f'`argnums` says that the model is the positional argument number {position} of'
        f' `loss_fn`, but there are {count}.'
      )
    position = int(position) % count
    return (
      nnx.DiffState(position, argnum.filter)
      if isinstance(argnum, nnx.DiffState)
      else position
    )

  if not isinstance(argnums, (tuple, list)):
    return check(argnums)
  if not argnums:
    raise ValueError('`argnums` is empty: give the position of the model.')
  return tuple(check(argnum) for argnum in argnums)


def _check_variables(argnum, like, start):
  """Raises unless there are parameters at a position."""
  nodes = jax.tree.leaves(like, is_leaf=_is_variable)
  if any(_is_variable(x) for x in nodes):
    return
  model = start.inputs[_position(argnum)]
  wrt = argnum.filter if isinstance(argnum, nnx.DiffState) else nnx.Param
  raise ValueError(
    f'The argument number {_position(argnum)} of `loss_fn`, of type'
    f' {type(model).__name__}, has no variables of the type {wrt!r}: give the position'
    ' of the model as `argnums`, or nnx.DiffState(position, filter). Parameters that'
    ' are plain arrays are for `msam_optax.value_and_grad`.'
  )


def _check_output(output, has_aux):
  if has_aux and not (isinstance(output, tuple) and len(output) == 2):
    raise TypeError(
      'With `has_aux=True` `loss_fn` must return `(loss, aux)`, but it returns a'
      f' {type(output).__name__}.'
    )
  if not has_aux and isinstance(output, tuple):
    raise TypeError(
      '`loss_fn` must return the loss, a scalar, but it returns a tuple. If that is'
      ' `(loss, aux)`, give `has_aux=True`.'
    )
  value: Any = output[0] if has_aux else output
  if jax.tree.structure(value) != jax.tree.structure(0) or jnp.shape(value):
    raise TypeError(
      'The loss that `loss_fn` returns must be a scalar, but it is a'
      f' {jax.tree.map(jnp.shape, value)}.'
    )
  return output


def _check_arrays(aux):
  for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
      raise TypeError(
        'With `compile_once=True` the auxiliary output that `loss_fn` returns must hold'
        f' arrays only, but {_masks.at_path(path)} there is a {type(leaf).__name__}.'
      )
