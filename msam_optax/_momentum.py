"""The momentum of an optimizer, found in its state."""

import contextlib

import jax
import jax.numpy as jnp
import optax

from msam_optax import _masks
from msam_optax import _numerics

# The fields in which Optax's optimizers keep a mean of gradients.
_NAMES = ('trace', 'mu')


def find(base_state, params, name):
  """The base optimizer's momentum, like ``params``, masked where there is none.

  Raises:
    ValueError: if there is none at all, or a leaf has several.
  """
  found = _fields(base_state, params, name)
  if not found:
    names = _NAMES if name is None else (name,)
    raise ValueError(
      'momentum_sam moves the parameters along the momentum of the optimizer that it'
      f' wraps, but the state of this one has no {" or ".join(map(repr, names))} like'
      ' the parameters. Give one that keeps a momentum, such as `optax.sgd(0.1,'
      ' momentum=0.9)` or `optax.adamw(1e-3)`; or the name of the field in its state,'
      " as in `momentum='m1'` (and to eval_params as well); or use `lagged`, which"
      ' needs none. (eval_params needs the parameters that belong to the state.)'
    )

  def only(path, _, *leaves):
    present = [
      (where, x) for where, x in zip(found, leaves, strict=True) if not is_masked(x)
    ]
    if len(present) > 1:
      raise ValueError(
        f'The optimizer in momentum_sam keeps {len(present)} momenta of the parameter'
        f' {_masks.at_path(path)}: {", ".join(where for where, _ in present)} in its'
        " state. Give the name of the one to move along, as in `momentum='mu'` (and"
        ' to eval_params as well).'
      )
    return present[0][1] if present else optax.MaskedNode()

  return jax.tree_util.tree_map_with_path(only, params, *found.values())


def _fields(base_state, params, name):
  """All fields of a name that are like the params, by where they are in the state."""
  found = {}
  for key in _NAMES if name is None else (name,):
    for path, tree in optax.tree.get_all_with_path(base_state, key):
      # A parameter may have the name as well: it is not like all parameters.
      with contextlib.suppress(ValueError):
        found[jax.tree_util.keystr(path)] = aligned(tree, params)
  return found


def check_is_of_gradients(base, params, name):
  """Raises if the momentum is one of steps: the direction would be the opposite.

  Of a gradient of ones a mean of gradients is positive, and one of steps negative. Two
  steps, since the first may have a learning rate of zero; what cannot be tried, as
  with a traced learning rate or shapes of its own, is not.
  """
  total = 0.0
  with contextlib.suppress(Exception), jax.ensure_compile_time_eval():
    ones = jax.tree.map(
      lambda w: jnp.ones((1,) * jnp.ndim(w), jnp.result_type(w)), params
    )
    state = base.init(ones)
    for _ in range(2):
      _, state = base.update(ones, state, ones)
    v = jax.tree.leaves(find(state, ones, name))
    total = float(sum(jnp.sum(_numerics.widen(jnp.real(x))) for x in v))
  if total < 0:
    raise ValueError(
      'The momentum of the optimizer in momentum_sam is one of steps, behind the'
      ' learning rate in its chain, and not of gradients: the parameters would be moved'
      ' uphill. So it is in `optax.rmsprop(momentum=…)` and `optax.lars`. Build the'
      ' chain with `optax.trace` before `optax.scale_by_learning_rate`.'
    )


def aligned(tree, params):
  """A tree with one leaf, or one ``optax.MaskedNode``, for each leaf of the params.

  Raises:
    ValueError: if it is not like them.
  """

  def of_leaf(x, subtree):
    if is_masked(x):
      return jax.tree.map(lambda _: optax.MaskedNode(), subtree)
    if not jax.tree_util.all_leaves([subtree]) or jnp.shape(x) != jnp.shape(subtree):
      raise ValueError(
        f'A leaf of the state has the shape {jnp.shape(x)}, and the parameters have'
        f' {jax.tree.map(jnp.shape, subtree)} there.'
      )
    return x

  try:
    return jax.tree.map(of_leaf, tree, params, is_leaf=is_masked)
  except ValueError as error:
    raise ValueError(
      'The state is not one of these parameters: eval_params needs those of the'
      f' training loop that belong to it. {error}'
    ) from error


def is_masked(x):
  return isinstance(x, optax.MaskedNode)


def check_name(momentum):
  if momentum is not None and not isinstance(momentum, str):
    raise TypeError(
      '`momentum` is the name of a field in the state of the optimizer, such as'
      f" 'trace' or 'mu', got {momentum!r}."
    )
