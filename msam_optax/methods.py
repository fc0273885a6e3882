"""Methods whose update is the gradient at the probe: they differ in their metric."""

from typing import Any
from typing import Unpack

import jax
import jax.core
import optax

from msam_optax import _hyperparameters
from msam_optax import _options
from msam_optax import averages
from msam_optax import metrics
from msam_optax import sparsity as sparsity_
from msam_optax import transformation
from msam_optax.monge import monge
from msam_optax.monge import unit_rise

Transformation = optax.GradientTransformationExtraArgs


@_options.method
def msam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  alpha: _hyperparameters.Hyperparameter = 1.0,
  *,
  max_rise: _hyperparameters.Hyperparameter | None = None,
  base: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """Monge SAM: the gradient at the worst point nearby, as the loss surface sees it.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at ``w + δ``,

      δ = ρ g / (‖g‖ √(1 + α²‖g‖²)),

  which is SAM's perturbation divided by ``√(1 + α²‖g‖²)``: the same where the gradient
  is small, and shorter where it is large. To first order it raises the loss by at most
  ``ρ/α``. ``δ`` depends on the scale of the loss: take the mean over the batch, unscale
  and reduce gradients before this transformation, and clip them after it.

  With ``max_rise=τ`` you choose the allowed rise instead of ``α``, which is then
  ``ρ/τ``. ``ρ`` may be infinite: then ``δ = τ g/‖g‖²``, which to first order raises the
  loss by ``τ`` everywhere::

      msam(rho=0.05, alpha=2.0)               # at most 0.025 higher
      msam(rho=0.05, max_rise=0.025)          # the same
      msam(rho=math.inf, max_rise=0.025)      # always 0.025 higher

  Choose ``τ`` first, in units of the loss, and a large ``ρ``. It limits ``δ`` only
  where the gradient is small, where ``δ`` would otherwise grow without bound. If you
  know a radius that is right for SAM, choose ``ρ`` and ``α`` instead. With ``max_rise``
  the metric is :func:`unit_rise`: the slope in the state is between 0 and 1, and the
  predicted rise is ``τ · slope``.

  Two gradients per step, and no additional memory. Use it where gradients differ by
  orders of magnitude, over training or between tasks, so that no radius of SAM suits
  all of them.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step. With
      ``max_rise`` it is the largest radius, and may be infinite.
    alpha: ``α``, likewise. 0 is SAM; the paper has 1. Not used with ``max_rise``.
    max_rise: ``τ``, likewise: the rise of the loss that is allowed, to first order;
      by default ``ρ/α``.
    base: the metric that Monge extends; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, ``axis_name`` is missing, or
      both ``alpha`` and ``max_rise`` are given.

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

    A rise of 0.1, whatever the gradient:

    >>> tx = msam(rho=jnp.inf, max_rise=0.1)
    >>> _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(f"{state.radius:.4f} {0.1 * state.slope:.4f}")
    0.1000 0.1000

  References:
    Jacobsen & Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
    Sharpness-Aware Minimization Based on Loss Geometry
    <https://arxiv.org/abs/2502.08448>`_, 2025
  """
  if max_rise is None:
    return transformation.sharpness_aware(monge(alpha, base), rho, **options)
  # Under optax.inject_hyperparams the default is an array, in jit without a value.
  if not isinstance(alpha, jax.core.Tracer) and (
    _hyperparameters.is_schedule(alpha) or alpha != 1.0
  ):
    raise ValueError(
      '`msam` was given both `alpha` and `max_rise`, the allowed rise ρ/α: give'
      ' `msam(rho, alpha)` or `msam(rho, max_rise=rise)`.'
    )
  _hyperparameters.check_hyperparameter('rho', rho, finite=False)
  _hyperparameters.check_hyperparameter('max_rise', max_rise)
  return transformation.sharpness_aware(unit_rise(base, rho), max_rise, **options)


@_options.method
def sam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  **options: Unpack[transformation.Options],
) -> Transformation:
  """SAM: the gradient at the worst point within the Euclidean distance ``ρ``.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at ``w + ρ g/‖g‖``.

  It takes two gradients per step and remembers nothing. All other methods are compared
  with it; its authors use 0.05.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

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
  return transformation.sharpness_aware(metrics.euclidean(), rho, **options)


@_options.method
def asam(
  rho: _hyperparameters.Hyperparameter = 0.5,
  eta: float | jax.Array = 0.01,
  *,
  weights: Any = None,
  **options: Unpack[transformation.Options],
) -> Transformation:
  """ASAM: adaptive SAM, whose distances are relative to the size of each weight.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at
  ``w + ρ T²g/‖Tg‖`` with ``T = |w| + η`` on weights and 1 on biases.

  Two gradients per step, and no additional memory. Use it where weights of very
  different sizes are perturbed together. Its radius is about ten times SAM's: the
  authors have 0.5 for CIFAR-10, 1.0 for CIFAR-100 and 0.01 for ``η``.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    eta: ``η``, scalar >= 0. Lets weights that are zero move.
    weights: which leaves are weights, see :func:`adaptive`; by default the leaves of
      two or more dimensions that are not named as biases and scales are.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

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
  return transformation.sharpness_aware(
    metrics.adaptive(eta, weights=weights), rho, **options
  )


@_options.method
def fisher_sam(
  rho: _hyperparameters.Hyperparameter = 0.1,
  eta: float | jax.Array = 1.0,
  **options: Unpack[transformation.Options],
) -> Transformation:
  """Fisher SAM: SAM whose distances are those of a diagonal Fisher metric.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at
  ``w + ρ u/√⟨u, g⟩`` with ``u = g/(1 + η g²)``: steep coordinates are held back.

  Two gradients per step, and no additional memory. Use it where a few coordinates
  have most of the gradient.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    eta: ``η``, scalar >= 0. 0 is SAM.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

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
  return transformation.sharpness_aware(metrics.diagonal_fisher(eta), rho, **options)


@_options.method
def friendly_sam(
  rho: _hyperparameters.Hyperparameter = 0.1,
  sigma: float | jax.Array = 1.0,
  decay: float | jax.Array = 0.9,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """Friendly SAM: climbs the noise of the batch, and not the gradient of all data.

  For the gradient ``g`` and the running mean ``m`` of those before, it is the gradient
  at

      w + ρ (g − σm)/‖g − σm‖,      then   m ← λm + (1 − λ)g.

  The first step is SAM's. It needs memory for one more copy of the params, in float32.

  Two gradients per step. Use it where batches are small, and their gradients mostly
  noise.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step. The
      authors have 0.05 to 0.2.
    sigma: ``σ``, scalar >= 0; 1 in the paper. 0 is SAM.
    decay: ``λ``, scalar, 0 <= λ <= 1. The authors have 0.6 to 0.95.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is out of its range, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import friendly_sam
    >>> loss = lambda w, x: jnp.sum((w - x)**2)
    >>> tx = optax.chain(friendly_sam(rho=0.5), optax.sgd(0.1))
    >>> w, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    >>> for x in jnp.array([[1.0, 0.0], [1.0, 1.0]]):
    ...   grad_fn = lambda w, x=x: jax.grad(loss)(w, x)
    ...   updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    ...   print(updates)
    [ 0.3 -0. ]
    [0.2 0.3]

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """
  climbed = averages.residual(metric, sigma, decay)
  return transformation.sharpness_aware(climbed, rho, **options)


@_options.method
def vasso(
  rho: _hyperparameters.Hyperparameter = 0.1,
  decay: float | jax.Array = 0.1,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """VaSSO: climbs the running mean of gradients, which varies less than each of them.

  With the running mean ``d`` of the gradients, this one included, it is the gradient at
  ``w + ρ d/‖d‖``. It needs memory for one more copy of the params, in float32.

  Two gradients per step. Use it where batches are small, and their gradients do not
  agree on a direction.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    decay: how much of ``d`` is kept from one step to the next, scalar, 0 <= decay <= 1;
      0.1 by default in the authors' code, where it is ``1 − θ``. 0 is SAM.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is out of its range, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import vasso
    >>> loss = lambda w, x: jnp.sum((w - x)**2)
    >>> tx = optax.chain(vasso(rho=0.5, decay=0.5), optax.sgd(0.1))
    >>> w, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    >>> for x in jnp.array([[-3.0, 0.0], [0.0, -4.0]]):
    ...   grad_fn = lambda w, x=x: jax.grad(loss)(w, x)
    ...   updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    ...   print(updates)
    [-0.7 -0. ]
    [-0.06 -0.88]

  References:
    Li & Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
    <https://arxiv.org/abs/2309.15639>`_, 2023
  """
  climbed = averages.smoothed(metric, decay)
  return transformation.sharpness_aware(climbed, rho, **options)


@_options.method
def sparse_sam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  sparsity: float | jax.Array = 0.5,
  every: int | jax.Array = 100,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """Sparse SAM: only the coordinates with the largest gradients are perturbed.

  For the gradient ``g`` at the parameters ``w`` it is the gradient at
  ``w + m ⊙ ρ g/‖g‖``, where ``m`` is 1 for a share ``1 − sparsity`` of the coordinates,
  those with the largest empirical Fisher information, and else 0. It is chosen anew in
  every ``k``-th step, from the gradients of examples that ``update`` is given as
  ``gradients=``, or from the gradient itself. No step is cheaper than one of SAM.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    sparsity: the share of the coordinates that are not perturbed, scalar, 0 <= s < 1.
      0 is SAM.
    every: ``k``, the steps between two choices, whole number >= 1. The authors choose
      every five epochs.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is out of its range, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import sparse_sam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(sparse_sam(rho=0.5, sparsity=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [-0.06 -0.16] 0.4000

  References:
    Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
    Approach <https://arxiv.org/abs/2210.05177>`_, 2022
  """
  return transformation.sharpness_aware(
    sparsity_.sparse(metric, sparsity, every), rho, **options
  )
