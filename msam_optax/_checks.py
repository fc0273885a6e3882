"""Checks of trees: what is wrong, where, and what to write instead."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax import _masks


def check_arrays(params: Any) -> None:
  """Raises if a leaf is no array and no number, as a function in a model is none."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    where = _masks.at_path(path)
    if dtype_of(leaf) is None:
      raise TypeError(
        f'The parameters must be arrays, but the leaf {where} is {leaf!r}. In'
        ' an Equinox model the arrays alone are parameters: `tx.init(eqx.filter(model,'
        ' eqx.is_inexact_array))`, and the same for the params given to `update`. Of'
        ' variables that hold arrays, as those of Keras, give the arrays: `[v.value for'
        ' v in model.trainable_variables]`.'
      )


def check_optimizer(optimizer: Any, example: str) -> None:
  """Raises unless it is an optimizer; ``example`` is the call that was meant."""
  if not (hasattr(optimizer, 'init') and hasattr(optimizer, 'update')):
    name, _, _ = example.partition('(')
    raise TypeError(
      f'The first argument of {name} is the optimizer that it wraps, as in'
      f' `{example}`, got {optimizer!r}.'
    )


def check_differentiable(params: Any) -> None:
  """Raises unless the loss can be differentiated in all parameters.

  Args:
    params: what a loss is differentiated with respect to.

  Raises:
    TypeError: if a leaf is no array, or not floating point; names its path.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    where = _masks.at_path(path)
    dtype = dtype_of(leaf)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
      kind = f'is {leaf!r}' if dtype is None else f'has dtype {dtype}'
      raise TypeError(
        f'The leaf {where} of the parameters {kind}, and gradients are taken of'
        ' floating-point arrays only. Give what is not trained in another argument, or'
        ' in a closure. In Equinox: `params, static = eqx.partition(model,'
        ' eqx.is_inexact_array)`, and `eqx.combine(params, static)` inside the loss. Of'
        ' variables that hold arrays, as those of Keras, give the arrays: `[v.value for'
        ' v in model.trainable_variables]`.'
      )


def check_real(params: Any) -> None:
  """Raises unless all leaves are real floating-point arrays, and parameters.

  Raises:
    TypeError: if a leaf is no array, or not real floating point; names its path.
    ValueError: if it is an FP8 scaling factor, which has no gradient.
  """
  check_differentiable(params)
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    where = _masks.at_path(path)
    if _masks.OVERWRITTEN in _masks.path_names(path):
      raise ValueError(
        f'The leaf {where} is overwritten with its "gradient": an FP8 scaling'
        " factor is no parameter. Give `variables['params']` alone, and the rest to the"
        ' loss by a closure.'
      )
  check_params(params, jax.tree.map(lambda _: True, params))


def dtype_of(leaf: Any) -> Any:
  """The dtype of an array or a number; None for what is neither."""
  try:
    return jax.typeof(leaf).dtype
  except (TypeError, ValueError):  # The latter for what only stands for an array.
    return None


def kind_of(x: Any) -> str:
  """What a value is, in the words of an error."""
  if x is None:
    return 'None'
  if isinstance(x, (tuple, list)):
    return f'a {type(x).__name__} of {len(x)}'
  try:
    return f'an array, {jax.typeof(x).str_short()}'
  except (TypeError, AttributeError):
    return f'a {type(x).__name__}'


def is_scalar(x: Any) -> bool:
  """Whether it is one number, or an array of no dimensions."""
  is_leaf = jax.tree.structure(x) == jax.tree.structure(0)
  return is_leaf and dtype_of(x) is not None and not jnp.shape(x)


def check_dtype(name: str, dtype: Any) -> None:
  """Raises unless an argument is a floating dtype, its name, or None."""
  if isinstance(dtype, jax.Array):
    raise TypeError(
      f'`{name}` was given as an array. Under optax.inject_hyperparams name it in'
      " `static_args`, or write it as a string, 'float32'."
    )
  try:
    is_floating = dtype is None or jnp.issubdtype(dtype, jnp.floating)
  except TypeError:  # NumPy has no such dtype.
    is_floating = False
  if not is_floating:
    raise TypeError(
      f"`{name}` must be a floating dtype, such as 'float32', got {dtype!r}."
    )


def check_params(params: Any, mask: Any) -> None:
  """Raises unless the leaves to be perturbed are real floating-point arrays.

  Args:
    params: the parameters.
    mask: the leaves to be perturbed, a tree of bools like ``params``.

  Raises:
    ValueError: if leaves are missing, hidden by ``optax.masked`` or the like.
    TypeError: if a leaf is integer, boolean or complex.
  """
  selected = jax.tree.leaves(mask)
  for (path, leaf), move in zip(
    jax.tree_util.tree_leaves_with_path(params), selected, strict=True
  ):
    where = _masks.at_path(path)
    dtype = jnp.result_type(leaf)
    if not move or jnp.issubdtype(dtype, jnp.floating):
      continue
    if jnp.issubdtype(dtype, jnp.complexfloating):
      advice = (
        'Keep the real and the imaginary part as two real leaves: with complex'
        ' ones it would hang on a convention (JAX gradients are conjugates)'
        ' whether the probe goes uphill.'
      )
    else:
      advice = (
        'Leave it out: `mask=lambda params: jax.tree.map(lambda p:'
        ' jnp.issubdtype(p.dtype, jnp.floating), params)`, or, in Equinox, give'
        ' `eqx.filter(model, eqx.is_inexact_array)` as params.'
      )
    raise TypeError(
      'Only real floating-point parameters can be perturbed, but the leaf'
      f' {where} has dtype {dtype}. {advice}'
    )


def check_unmasked(params: Any) -> None:
  """Raises if ``optax.masked`` or ``optax.partition`` has taken leaves away."""
  nodes = jax.tree_util.tree_leaves_with_path(
    params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
  )
  for path, node in nodes:
    where = _masks.at_path(path)
    if isinstance(node, optax.MaskedNode):
      raise ValueError(
        'A two-pass method needs all parameters, since it evaluates the loss'
        f' at perturbed ones, but the leaf {where} is masked out: the'
        ' method stands inside optax.masked, optax.partition or the like. Put'
        ' it before them in the chain, with its own mask, as in'
        ' `optax.chain(msam(mask=mask), optax.masked(optax.adam(1e-3), mask))`,'
        ' or take gradients with `msam_optax.value_and_grad`, which works'
        ' under every wrapper.'
      )


def check_like(tree: Any, reference: Any, *, what: str, dtypes: bool) -> None:
  """Raises unless a tree has a reference's structure, shapes and (if asked) dtypes.

  Args:
    tree: the tree to check.
    reference: the tree that it must be like.
    what: a sentence's beginning, ``"<name of tree> must ... <of reference>"``.
    dtypes: whether dtypes must agree as well.

  Raises:
    ValueError: if structure or shapes differ; names the first path that does.
    TypeError: if dtypes do.
  """
  got = dict(jax.tree_util.tree_leaves_with_path(tree))
  want = dict(jax.tree_util.tree_leaves_with_path(reference))
  for path, leaf in got.items():
    where = _masks.at_path(path)
    if path not in want:
      raise ValueError(f'{what}, but there is an extra leaf {where}.')
    if jnp.shape(leaf) != jnp.shape(want[path]):
      raise ValueError(
        f'{what}, but {where} its shape is {jnp.shape(leaf)}, not'
        f' {jnp.shape(want[path])}.'
      )
    dtype, expected = jnp.result_type(leaf), jnp.result_type(want[path])
    if dtypes and dtype != expected:
      raise TypeError(f'{what}, but {where} its dtype is {dtype}, not {expected}.')
  for path in want:
    where = _masks.at_path(path)
    if path not in got:
      raise ValueError(f'{what}, but there is no leaf {where}.')
  if jax.tree.structure(tree) != jax.tree.structure(reference):
    raise ValueError(
      f'{what}, but it is a {jax.tree.structure(tree)}, not a'
      f' {jax.tree.structure(reference)}.'
    )


def check_first(grads: Any, grad: Any) -> None:
  """Raises if what came in is not the gradient that was given as ``grad=``.

  Inside a chain both are the same arrays, unless something before has changed one.

  Args:
    grads: the updates as they reach the transformation.
    grad: what the user gave as ``grad``, if anything.

  Raises:
    ValueError: if an array of one is not that of the other.
  """
  if grad is None or jax.tree.structure(grad) != jax.tree.structure(grads):
    return
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  for (path, got), given in zip(leaves, jax.tree.leaves(grad), strict=True):
    where = _masks.at_path(path)
    if got is not given:
      raise ValueError(
        f'What reached the sharpness-aware transformation {where} is not the'
        ' `grad` that was given: something before it in the chain changes the gradient'
        ' (an optimizer, clipping, weight decay), or a wrapper accumulates it'
        ' (optax.MultiSteps). It perturbs the parameters along what it gets, so put it'
        ' first: `optax.chain(msam(), optax.clip_by_global_norm(1.0),'
        ' optax.adam(1e-3))`. (Or `grads` and `grad` are two arguments of a function'
        ' under jit, where one array is two: write `grad=grads` inside of it.)'
      )


def gradient_hint(tree: Any, reference: Any) -> str:
  """What was given instead of gradients, if it seems to be a loss, or a pair."""
  structure = jax.tree.structure
  if is_scalar(tree) and not is_scalar(reference):
    return (
      'This seems to be the loss, and its gradient is needed: `lambda params:'
      ' jax.grad(loss)(params, batch)`. '
    )
  if structure(tree) == structure(reference):
    return ''
  if isinstance(tree, tuple) and len(tree) == 2:
    second, first = (structure(tree[i]) == structure(reference) for i in (1, 0))
    if first and second:
      return (
        'This seems to be `(value, grads)` or `(grads, aux)`: give a function that'
        ' returns the former as `value_and_grad_fn`, and of the latter the first,'
        ' `lambda params: grad_fn(params)[0]`. '
      )
    if second:
      return (
        'This seems to be `(value, grads)`: a function that returns both is to be given'
        ' as `value_and_grad_fn`. '
      )
    if first:
      return (
        'This seems to be `(grads, aux)`: give the first of both, as in `lambda params:'
        ' grad_fn(params)[0]`. '
      )
  return ''


def check_any(mask: Any) -> None:
  """Raises if a mask, a tree of bools, selects no leaf."""
  leaves = jax.tree.leaves(mask)
  if leaves and not any(leaves):
    raise ValueError(
      '`mask` selects no leaf, or no leaf has a gradient: nothing would be perturbed.'
      ' A function as `mask` under optax.inject_hyperparams is called with the step'
      " count, unless it is named: `inject_hyperparams(msam, static_args=('mask',))`."
    )


def check_averaged(params: Any, axis_name: Any) -> None:
  """Raises if FP8 scaling factors would be averaged, or not, over replicas."""
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    where = _masks.at_path(path)
    if axis_name is not None and _masks.OVERWRITTEN in _masks.path_names(path):
      raise ValueError(
        f'The leaf {where} is overwritten with its "gradient", the FP8 scaling'
        ' of one replica, which has no mean over `axis_name`. Use FP8 under jit with'
        ' sharded arrays, without an `axis_name`.'
      )
