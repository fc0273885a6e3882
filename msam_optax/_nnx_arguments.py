"""The arguments of a loss of NNX models: as they are at the start, and made anew."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from msam_optax import _nnx_losses


class Start(NamedTuple):
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


def start(
  loss_fn: Callable[..., Any],
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  argnums: Any,
  has_aux: bool,
) -> Start:
  """What is known before the first pass.

  Args:
    loss_fn: the user's.
    args: what it is called with.
    kwargs: what it is called with by keyword.
    argnums: which positions are trained, as the user says it.
    has_aux: whether it returns ``(scalar, aux)``.

  Returns:
    A :class:`Start`.

  Raises:
    TypeError: if ``argnums`` is no position.
    ValueError: if it names no model.
  """
  args, kwargs = _nnx_losses.positional(loss_fn, args, kwargs)
  argnums = _check_argnums(argnums, len(args))
  trained = [_position(argnum) for argnum in _tuple(argnums)]
  inputs = tuple(
    _without_floats(x) if i in trained else x for i, x in enumerate((*args, kwargs))
  )
  graph, state = nnx.split(inputs)
  state = {path: _copy(x) for path, x in nnx.to_flat_state(state)}
  checked = _nnx_losses.checked(loss_fn, has_aux)
  begin = Start(checked, argnums, has_aux, inputs, graph, state, None)
  return begin._replace(params=fill(_like_gradients(begin), state, argnums))


def merge(start: Start, values: Mapping[Any, Any] | None = None) -> tuple[Any, ...]:
  """New arguments as at the start, but for the values at some paths."""
  values = {} if values is None else values
  leaves = []
  for path, x in start.state.items():
    new = jax.tree.leaves(_copy(values.get(path, x)))
    leaves.append((path, jax.tree.unflatten(jax.tree.structure(x), new)))
  return nnx.merge(start.graph, nnx.from_flat_state(leaves))


def by_path(tree: Any, argnums: Any) -> dict[Any, Any]:
  """The leaves of parameters or gradients by their paths in the arguments."""
  flat: list[tuple[Any, Any]] = list(nnx.to_flat_state(nnx.state((tree,))))
  if isinstance(argnums, tuple):
    return {(_position(argnums[path[1]]), *path[2:]): x for path, x in flat}
  return {(_position(argnums), *path[1:]): x for path, x in flat}


def fill(tree: Any, leaves: Mapping[Any, Any], argnums: Any) -> Any:
  """A tree with other leaves, which are given by their paths in the arguments."""
  numbers = [np.asarray(i) for i in range(len(jax.tree.leaves(tree)))]
  structure = jax.tree.structure(tree)
  filled = list(numbers)
  for path, place in by_path(structure.unflatten(numbers), argnums).items():
    new = jax.tree.leaves(leaves[path])
    for i, x in zip(jax.tree.leaves(place), new, strict=True):
      filled[int(i)] = x
  return structure.unflatten(filled)


def is_variable(x: Any) -> bool:
  """Whether it is a variable, alone."""
  return isinstance(x, nnx.Variable)


def is_node(x: Any) -> bool:
  """Whether it is a variable or a model, and no container of them."""
  return is_variable(x) or nnx.graph.is_graph_node(x)


def names(path: tuple[Any, ...]) -> str:
  """A path in the arguments, for messages."""
  return ''.join(f'[{name!r}]' for name in path[1:])


def _like_gradients(start):
  """The structure that NNX gives to gradients, without arrays."""

  def structure():
    zero = nnx.grad(lambda *inputs: jnp.zeros(()), argnums=start.argnums)
    return zero(*merge(start))

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
  _check_unshared(by_path(like, start.argnums), start)
  return like


def _without_floats(tree):
  """Numbers as arrays, which they are to a gradient."""
  return jax.tree.map(
    lambda x: jnp.asarray(x) if isinstance(x, float) else x, tree, is_leaf=is_node
  )


def _copy(leaf):
  """A variable that does not change with the one that it is of.

  ``variable[...] += 1`` changes an array of NumPy, as checkpoints have them, in place.
  """
  if not is_variable(leaf):
    return leaf
  return jax.tree.map(lambda x: np.copy(x) if isinstance(x, np.ndarray) else x, leaf)


def _position(argnum):
  return argnum.argnum if isinstance(argnum, nnx.DiffState) else argnum


def _tuple(argnums):
  return argnums if isinstance(argnums, tuple) else (argnums,)


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
  nodes = jax.tree.leaves(like, is_leaf=is_variable)
  if any(is_variable(x) for x in nodes):
    return
  model = start.inputs[_position(argnum)]
  wrt = argnum.filter if isinstance(argnum, nnx.DiffState) else nnx.Param
  if nnx.to_flat_state(nnx.state((model,), wrt)):
    raise ValueError(
      f'All variables of the type {wrt!r} of the argument number {_position(argnum)} of'
      ' `loss_fn` belong to an earlier one as well, which has their gradients: leave'
      ' the number out of `argnums`.'
    )
  raise ValueError(
    f'The argument number {_position(argnum)} of `loss_fn`, of type'
    f' {type(model).__name__}, has no variables of the type {wrt!r}: give the position'
    ' of the model as `argnums`, or nnx.DiffState(position, filter). Parameters that'
    ' are plain arrays are for `msam_optax.value_and_grad`.'
  )


def _check_unshared(paths, start):
  """Raises if a variable would have gradients at several paths."""
  for path in paths:
    if path not in start.state:
      raise ValueError(
        f'The variable at {names(path)} is at another place as well. Without graph'
        ' updates NNX gives it a gradient at both, and the length of a perturbation'
        ' would count it twice. Leave out `nnx.set_graph_updates(False)`, or split the'
        ' model, `graph, params, rest = nnx.split(model, nnx.Param, ...)`, and let'
        ' `loss_fn` take `params` and the others, and merge them.'
      )
