"""Checks of trees: what is wrong, where, and what to write instead."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax.compat import how_to_vary
from msam_optax.compat import varying_axes
from msam_optax.masks import at_path
from msam_optax.masks import OVERWRITTEN
from msam_optax.masks import path_names
from msam_optax.reductions import is_inexact
from msam_optax.reductions import leaf_axes


def check_arrays(params: Any) -> None:
  """Raises if a leaf is no array and no number, as a function in a model is none."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if dtype_of(leaf) is None:
      raise TypeError(
        f'The parameters must be arrays, but the leaf {at_path(path)} is {leaf!r}. In'
        ' an Equinox model the arrays alone are parameters: `tx.init(eqx.filter(model,'
        ' eqx.is_inexact_array))`, and the same for the params given to `update`. Of'
        ' variables that hold arrays, as those of Keras, give the arrays: `[v.value for'
        ' v in model.trainable_variables]`.'
      )


def check_differentiable(params: Any) -> None:
  """Raises unless gradients can be taken of all parameters.

  Args:
    params: what a loss is differentiated with respect to.

  Raises:
    TypeError: if a leaf is no array, or not floating point; names its path.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    dtype = dtype_of(leaf)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
      kind = f'is {leaf!r}' if dtype is None else f'has dtype {dtype}'
      raise TypeError(
        f'The leaf {at_path(path)} of the parameters {kind}, and gradients are taken of'
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
    if OVERWRITTEN in path_names(path):
      raise ValueError(
        f'The leaf {at_path(path)} is overwritten with its "gradient": an FP8 scaling'
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


def check_params(params: Any, mask: Any) -> None:
  """Raises unless the leaves to be moved are real floating-point arrays.

  Args:
    params: the parameters.
    mask: the leaves to be moved, a tree of bools like ``params``.

  Raises:
    ValueError: if leaves are missing, hidden by ``optax.masked`` or the like.
    TypeError: if a leaf is integer, boolean or complex.
  """
  moved = jax.tree.leaves(mask)
  for (path, leaf), move in zip(
    jax.tree_util.tree_leaves_with_path(params), moved, strict=True
  ):
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
      f' {at_path(path)} has dtype {dtype}. {advice}'
    )


def check_unmasked(params: Any) -> None:
  """Raises if ``optax.masked`` or ``optax.partition`` has taken leaves away."""
  nodes = jax.tree_util.tree_leaves_with_path(
    params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
  )
  for path, node in nodes:
    if isinstance(node, optax.MaskedNode):
      raise ValueError(
        'A two-pass method needs all parameters, since it evaluates the loss'
        f' at perturbed ones, but the leaf {at_path(path)} is masked out: the'
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
    dtypes: whether dtypes must agree, too.

  Raises:
    ValueError: if structure or shapes differ; names the first path that does.
    TypeError: if dtypes do.
  """
  got = dict(jax.tree_util.tree_leaves_with_path(tree))
  want = dict(jax.tree_util.tree_leaves_with_path(reference))
  for path, leaf in got.items():
    if path not in want:
      raise ValueError(f'{what}, but has one leaf too many {at_path(path)}.')
    if jnp.shape(leaf) != jnp.shape(want[path]):
      raise ValueError(
        f'{what}, but {at_path(path)} its shape is {jnp.shape(leaf)}, not'
        f' {jnp.shape(want[path])}.'
      )
    dtype, expected = jnp.result_type(leaf), jnp.result_type(want[path])
    if dtypes and dtype != expected:
      raise TypeError(
        f'{what}, but {at_path(path)} its dtype is {dtype}, not {expected}.'
      )
  for path in want:
    if path not in got:
      raise ValueError(f'{what}, but has no leaf {at_path(path)}.')
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
    if got is not given:
      raise ValueError(
        f'What reached the sharpness-aware transformation {at_path(path)} is not the'
        ' `grad` that was given: something before it in the chain changes the gradient'
        ' (an optimizer, clipping, weight decay), or a wrapper accumulates it'
        ' (optax.MultiSteps). It perturbs the parameters along what it gets, so put it'
        ' first: `optax.chain(msam(), optax.clip_by_global_norm(1.0),'
        ' optax.adam(1e-3))`. (Or `grads` and `grad` are two arguments of a function'
        ' under jit, where one array is two: write `grad=grads` inside of it.)'
      )


def check_averaged(params: Any, axis_name: Any) -> None:
  """Raises if FP8 scaling factors would be averaged, or not, over replicas."""
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    if axis_name is not None and OVERWRITTEN in path_names(path):
      raise ValueError(
        f'The leaf {at_path(path)} is overwritten with its "gradient", the FP8 scaling'
        ' of one replica, which has no mean over `axis_name`. Use FP8 under jit with'
        ' sharded arrays, without an `axis_name`.'
      )


def pair_hint(tree: Any, reference: Any) -> str:
  """What a pair in the place of gradients seems to be, and how to pass it."""
  structure = jax.tree.structure
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


def check_admits(mask: Any) -> None:
  """Raises if a mask, a tree of bools, admits no leaf."""
  leaves = jax.tree.leaves(mask)
  if leaves and not any(leaves):
    raise ValueError(
      '`mask` admits no leaf, or no leaf has a gradient, so nothing would be perturbed.'
      ' A function as `mask` under optax.inject_hyperparams is called with the step'
      " count, unless it is named: `inject_hyperparams(msam, static_args=('mask',))`."
    )


def check_varying(grads: Any, axis_name: Any) -> None:
  """Raises if gradients in ``shard_map`` are already summed over the axis.

  With ``check_vma=True`` the gradient of replicated parameters is the same on all
  devices, their sum; the mean of that would be as many times too large.

  Args:
    grads: the gradients.
    axis_name: the mapped axis or axes, or None.

  Raises:
    ValueError: if the replicas differ along an axis, and the gradients do not.
  """
  if axis_name is None:
    return
  leaves = [g for g in jax.tree.leaves(grads) if is_inexact(g)]
  for axis in axis_name if isinstance(axis_name, tuple) else (axis_name,):
    if axis in varying_axes(axis_index(axis, 'axis_name')) and not all(
      axis in varying_axes(g) for g in leaves
    ):
      raise ValueError(
        f'These gradients are summed over {axis!r} already, as shard_map does with'
        ' those of replicated parameters. Cast the parameters before the gradient is'
        f' taken, {how_to_vary(axis)}, or use shard_map(..., check_vma=False).'
        ' (A gradient that you make yourself: `jnp.zeros_like(param)`.)'
      )


def check_axes(params: Any, param_specs: Any, axis_name: Any) -> None:
  """Raises if parameters are sharded over an axis that gradients are averaged over.

  The devices of that axis hold different parameters, whose mean means nothing.

  Args:
    params: the parameters.
    param_specs: how they are sharded inside ``shard_map``.
    axis_name: the mapped axis or axes of the average, or None.

  Raises:
    ValueError: if an axis is named in both.
  """
  names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
  for axes in leaf_axes(param_specs, params):
    for axis in set(axes) & set(names):
      raise ValueError(
        f'Parameters that are sharded over {axis!r} by `param_specs` cannot be averaged'
        ' over it by `axis_name`: its devices hold different ones. If the loss gathers'
        ' them, their gradients are sums over that axis already: leave it out of'
        ' `axis_name`, and divide the loss by the size of the axis.'
      )


def check_sharded(grads: Any, param_specs: Any, admitted: Any) -> None:
  """Raises if ``param_specs`` and the gradients differ in what is sharded.

  A leaf that every device has whole would be counted once a device, and of one whose
  axis is not named only a part. Only a checked ``shard_map`` can tell.

  Args:
    grads: the gradients.
    param_specs: how the parameters are said to be sharded, see :func:`leaf_axes`.
    admitted: which leaves are in the norm, a tree of bools like ``grads``.

  Raises:
    ValueError: if a leaf is not sharded as it is said to be, or there is no such axis.
  """
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  named = leaf_axes(param_specs, grads)
  tracked = [
    axis
    for axis in sorted({axis for axes in named for axis in axes})
    if axis in varying_axes(axis_index(axis, 'param_specs'))
  ]
  advice = ' Give the specs that shard_map has as `in_specs` for the parameters.'
  moved = jax.tree.leaves(admitted)
  for (path, g), axes, move in zip(leaves, named, moved, strict=True):
    for axis in tracked if move else ():
      if axis in axes and axis not in varying_axes(g):
        raise ValueError(
          f'`param_specs` says that the leaf {at_path(path)} is sharded over {axis!r},'
          f' but its gradient is the same all along that axis.{advice}'
        )
      if axis not in axes and axis in varying_axes(g):
        raise ValueError(
          f'`param_specs` says that other leaves are sharded over {axis!r}, and the'
          f' leaf {at_path(path)} is not, but by its type its gradient may differ along'
          f' that axis.{advice} If it is averaged in a way that JAX cannot see, as by a'
          ' gather, add a `jax.lax.pmean`.'
        )


def check_probe(probe: Any, params: Any, grads: Any) -> None:
  """Raises if the gradient at the probe would be another kind than the clean one.

  In a checked ``shard_map`` the gradient of what is the same on all devices is their
  sum. A probe that differs between them would get the gradient of one device.

  Args:
    probe: the parameters, moved uphill.
    params: the parameters.
    grads: the clean gradients.

  Raises:
    ValueError: if a leaf of the probe varies along an axis along which neither the
      parameter nor its gradient does.
  """
  leaves = jax.tree_util.tree_leaves_with_path(probe)
  for (path, p), w, g in zip(
    leaves, jax.tree.leaves(params), jax.tree.leaves(grads), strict=True
  ):
    for axis in sorted(varying_axes(p) - varying_axes(w) - varying_axes(g)):
      raise ValueError(
        f'The probe may differ along the axis {axis!r} {at_path(path)}, where neither'
        ' the parameter nor its gradient does: the gradient at the probe would be that'
        ' of one device, and the clean one is the sum or mean of all. If other leaves'
        ' are sharded over the axis, say so with `param_specs`, so that their norm is'
        ' summed over it. If gradients or a hyperparameter (`rho`, `alpha`) differ'
        ' along it, cast the parameters that you give,'
        f' {how_to_vary(axis)}, and name the axis in `axis_name`. If the leaf is not to'
        ' be moved, leave it out with `mask`.'
      )


def check_axis_name(axis_name: Any) -> None:
  """Raises unless ``axis_name`` is a name, a tuple of names, or None."""
  try:
    hash(axis_name)
  except TypeError as error:
    raise TypeError(
      f'`axis_name` must be the name of a mapped axis, or a tuple of names, got'
      f' {axis_name!r}.'
    ) from error


def axis_index(axis: Any, argument: str) -> jax.Array:
  """This device's place along a mapped axis that an argument names.

  Raises:
    ValueError: if nothing is mapped over such an axis here.
  """
  try:
    return jax.lax.axis_index(axis)
  except NameError as error:
    raise ValueError(
      f'`{argument}` names the axis {axis!r}, but nothing is mapped over an axis of'
      ' this name here: it is for the inside of pmap, vmap and shard_map. Under jit'
      ' with sharded arrays leave it out.'
    ) from error
