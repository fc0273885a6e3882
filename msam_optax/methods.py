"""The methods, each a metric in the two-pass transformation."""

from typing import Any

import jax
import optax

from msam_optax.hyperparameters import Hyperparameter
from msam_optax.metrics import adaptive
from msam_optax.metrics import diagonal_fisher
from msam_optax.metrics import euclidean
from msam_optax.metrics import Metric
from msam_optax.metrics import monge
from msam_optax.transformation import sharpness_aware

# The keyword arguments of `sharpness_aware` are spelt out, not `**kwargs`, because
# `optax.inject_hyperparams` reads signatures and cannot pass those on.


def msam(
  rho: Hyperparameter = 0.05,
  alpha: Hyperparameter = 1.0,
  *,
  base: Metric = euclidean(),
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Monge SAM: the gradient at the worst point near by, as the loss surface sees it.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at ``w + δ``,

      δ = ρ g / (‖g‖ √(1 + α²‖g‖²)),

  SAM's perturbation, divided by ``√(1 + α²‖g‖²)``: the same where the gradient is
  small, and less the steeper the loss is. ``ρ/α`` is the largest first-order rise of
  the loss that it allows. The ``δ`` depends on the scale of the loss: take the
  mean over the batch, unscale and reduce gradients before, and clip them after.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    alpha: ``α``, likewise. 0 is SAM; the paper has 1.
    base: the metric that Monge is laid over; Euclidean in the paper.
    mask: which leaves are moved and are part of the norm, by default all.
    axis_name: the mapped axis over which the gradient at the probe is averaged.
    sync_ascent: whether to average the gradient for the ascent, too.
    param_specs: the params' ``PartitionSpec``s, if sharded inside ``shard_map``.
    perturbation_dtype: dtype of the probe, by default that of the params.
      The last five are those of :func:`sharpness_aware`, which tells more.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import msam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(msam(rho=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [-0.1024 -0.1366] 0.3536

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025
  """
  return sharpness_aware(
    monge(alpha, base),
    rho,
    mask=mask,
    axis_name=axis_name,
    sync_ascent=sync_ascent,
    param_specs=param_specs,
    perturbation_dtype=perturbation_dtype,
  )


def sam(
  rho: Hyperparameter = 0.05,
  *,
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """SAM: the gradient at the worst point within the Euclidean distance ``ρ``.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at ``w + ρ g/‖g‖``.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    mask: which leaves are moved and are part of the norm, by default all.
    axis_name: the mapped axis over which the gradient at the probe is averaged.
    sync_ascent: whether to average the gradient for the ascent, too.
    param_specs: the params' ``PartitionSpec``s, if sharded inside ``shard_map``.
    perturbation_dtype: dtype of the probe, by default that of the params.
      The last five are those of :func:`sharpness_aware`, which tells more.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import sam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(sam(rho=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [-0.12 -0.16] 0.5000

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  return sharpness_aware(
    euclidean(),
    rho,
    mask=mask,
    axis_name=axis_name,
    sync_ascent=sync_ascent,
    param_specs=param_specs,
    perturbation_dtype=perturbation_dtype,
  )


def asam(
  rho: Hyperparameter = 0.5,
  eta: float | jax.Array = 0.01,
  *,
  weights: Any = None,
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """ASAM: adaptive SAM, whose distances are relative to the size of each weight.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at
  ``w + ρ T²g/‖Tg‖`` with ``T = |w| + η`` on weights and 1 on biases.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    eta: ``η``, scalar >= 0. Lets weights that are zero move.
    weights: which leaves are weights, see :func:`adaptive`; by default the leaves of
      two or more dimensions that are not named as biases and scales are.
    mask: which leaves are moved and are part of the norm, by default all.
    axis_name: the mapped axis over which the gradient at the probe is averaged.
    sync_ascent: whether to average the gradient for the ascent, too.
    param_specs: the params' ``PartitionSpec``s, if sharded inside ``shard_map``.
    perturbation_dtype: dtype of the probe, by default that of the params.
      The last five are those of :func:`sharpness_aware`, which tells more.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import asam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(asam(rho=0.5, eta=0.0), optax.sgd(0.1))
    >>> w = jnp.array([[0.3, 0.4]])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [[-0.0747 -0.1149]] 0.1892

  References:
    Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  return sharpness_aware(
    adaptive(eta, weights=weights),
    rho,
    mask=mask,
    axis_name=axis_name,
    sync_ascent=sync_ascent,
    param_specs=param_specs,
    perturbation_dtype=perturbation_dtype,
  )


def fisher_sam(
  rho: Hyperparameter = 0.1,
  eta: float | jax.Array = 1.0,
  *,
  mask: Any = None,
  axis_name: Any = None,
  sync_ascent: bool = False,
  param_specs: Any = None,
  perturbation_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Fisher SAM: SAM whose distances are those of a diagonal Fisher metric.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at
  ``w + ρ u/√⟨u, g⟩`` with ``u = g/(1 + η g²)``: steep coordinates are held back.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    eta: ``η``, scalar >= 0. 0 is SAM.
    mask: which leaves are moved and are part of the norm, by default all.
    axis_name: the mapped axis over which the gradient at the probe is averaged.
    sync_ascent: whether to average the gradient for the ascent, too.
    param_specs: the params' ``PartitionSpec``s, if sharded inside ``shard_map``.
    perturbation_dtype: dtype of the probe, by default that of the params.
      The last five are those of :func:`sharpness_aware`, which tells more.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import fisher_sam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(fisher_sam(rho=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [-0.1145 -0.1403] 0.4064

  References:
    Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
    <https://arxiv.org/abs/2206.04920>`_, 2022
  """
  return sharpness_aware(
    diagonal_fisher(eta),
    rho,
    mask=mask,
    axis_name=axis_name,
    sync_ascent=sync_ascent,
    param_specs=param_specs,
    perturbation_dtype=perturbation_dtype,
  )
