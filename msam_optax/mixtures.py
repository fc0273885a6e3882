"""Methods whose update is made of several gradients: their metric is any."""

from typing import Any
from typing import Unpack

import jax
import jax.core
import optax

from msam_optax import _checks
from msam_optax import _hyperparameters
from msam_optax import _numerics
from msam_optax import _options
from msam_optax import combinations
from msam_optax import metrics
from msam_optax import occasional
from msam_optax import spaces
from msam_optax import transformation

Transformation = optax.GradientTransformationExtraArgs


@_options.method
def gsam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  alpha: float | jax.Array = 0.6,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """GSAM: descends the loss at the probe, and closes its gap to the loss at the params.

  With the gradients ``g`` at the parameters and ``g₁`` at the probe it is

      g₁ − α (g − ⟨g, g₁⟩/⟨g₁, g₁⟩ g₁),

  the part of ``g`` that is perpendicular to ``g₁``, subtracted. The authors let ``ρ``
  follow the learning rate: give it as a schedule.

  Two gradients per step, and no additional memory. Use it where SAM's probe is so
  far away that lowering the loss there leaves that at the params behind.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    alpha: ``α``, scalar >= 0: the weight of the gap. 0 is SAM; the authors have 0.6 for
      ViT-B/32.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import gsam
    >>> loss = lambda w: jnp.sum(w**2 * jnp.array([1.0, 4.0]))
    >>> tx = optax.chain(gsam(rho=0.5, alpha=0.6), optax.sgd(0.1))
    >>> w = jnp.array([0.6, 0.2])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates)
    [-0.1484 -0.4918]

  References:
    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022
  """
  combination = combinations.surrogate_gap(alpha)
  return transformation.sharpness_aware(metric, rho, combination, **options)


@_options.method
def wsam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  gamma: float | jax.Array = 0.9,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """WSAM in its coupled form: sharpness as a term of the loss, with a weight.

  With the gradients ``g`` at the parameters and ``g₁`` at the probe it is

      (1 − a) g + a g₁ = g + a (g₁ − g),     a = γ/(1 − γ).

  ``γ = 0`` is the plain gradient, ``γ = 1/2`` is SAM, and above that the sharpness
  ``ℓ(w + δ) − ℓ(w)`` counts more than in SAM: at 0.9 nine times as much. The authors'
  own default is the decoupled form, in which the optimizer sees ``g`` alone and the
  rest is added to its step.

  Two gradients per step, and no additional memory. Use it where SAM helps, and more
  of the same should help more.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    gamma: ``γ``, scalar, 0 <= γ < 1.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, ``gamma`` is 1 or more, or
      ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import wsam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(wsam(rho=0.5, gamma=0.75), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates)
    [-0.24 -0.32]

  References:
    Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023
  """
  combination = combinations.weighted(_weight(gamma))
  return transformation.sharpness_aware(metric, rho, combination, **options)


@_options.method
def cr_sam(
  rho: _hyperparameters.Hyperparameter = 0.1,
  gamma: float | jax.Array = 0.1,
  beta: float | jax.Array = 0.01,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """CR-SAM: SAM that also lowers the curvature, as seen from both sides of the params.

  With the gradients ``g`` at the parameters ``w``, ``g₊`` at ``w + δ`` and ``g₋`` at
  ``w − δ``, three in a step, it is

      g₊ + γ (g₊ + g₋ − 2g) + β (g₊ − g₋).

  It takes three gradients per step and remembers nothing. Use it where a third gradient
  is affordable and the loss is strongly curved at SAM's radius.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    gamma: ``γ``, scalar >= 0: the weight of the second difference.
    beta: ``β``, scalar >= 0: the weight of the first difference. With both 0 it is SAM.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import cr_sam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = optax.chain(cr_sam(rho=0.5, beta=0.1), optax.sgd(0.1))
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates)
    [-0.132 -0.176]

  References:
    Wu et al., `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
    <https://arxiv.org/abs/2312.13555>`_, 2023
  """
  combination = combinations.curvature(gamma, beta)
  return transformation.sharpness_aware(metric, rho, combination, **options)


@_options.method
def stable_sam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """Stable SAM: SAM's direction at the length of the plain gradient.

  With the gradients ``g`` at the parameters and ``g₁`` at the probe it is

      (‖g‖/‖g₁‖) g₁.

  At the probe gradients are longer, most so where the loss is sharp. Without that, a
  learning rate that is stable for the optimizer alone is stable for it with SAM.

  Two gradients per step, and no additional memory. Use it where training with SAM
  diverges at the learning rate of the optimizer alone.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is negative or not finite, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import stable_sam
    >>> loss = lambda w: jnp.sum(w**2 * jnp.array([1.0, 4.0]))
    >>> tx = optax.chain(stable_sam(rho=0.5), optax.sgd(0.1))
    >>> w = jnp.array([0.6, 0.2])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates)
    [-0.0702 -0.1873]

  References:
    Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
    Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024
  """
  return transformation.sharpness_aware(metric, rho, combinations.rescaled(), **options)


@_options.method
def look_sam(
  rho: _hyperparameters.Hyperparameter = 0.05,
  every: int | jax.Array = 5,
  alpha: float | jax.Array = 0.7,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """LookSAM: a probe in every ``k``-th step, whose result is used until the next.

  A step with a probe gives its gradient ``g₁``, and remembers of it the part
  ``v = g₁ − ⟨g₁, g⟩/⟨g, g⟩ g``. A step without one gives

      g + α (‖g‖/‖v‖) v.

  It costs ``1 + 1/k`` gradients a step, and memory for one more copy of the params.
  What it leaves out is really not computed. The scalars in the state are zero in a step
  without a probe.

  Use it where a second gradient in every step is too expensive.

  Args:
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    every: ``k``, whole number >= 1: 5 to 10 in the paper.
    alpha: ``α``, scalar >= 0: the length of the remembered part as a share of that of
      the gradient; 0.7 in the paper.
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
    >>> from msam_optax import look_sam
    >>> loss = lambda w: jnp.sum(w**2 * jnp.array([1.0, 4.0]))
    >>> tx = optax.chain(look_sam(rho=0.5, every=2), optax.sgd(0.1))
    >>> w = jnp.array([0.6, 0.2])
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...   updates, state = tx.update(
    ...       jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
    ...   print(updates, f"{optax.tree.get(state, 'radius'):.4f}")
    [-0.18 -0.48] 0.5000
    [-0.008 -0.244] 0.0000

  References:
    Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_, 2022
  """
  combination = occasional.reused(every, alpha)
  return transformation.sharpness_aware(metric, rho, combination, **options)


@_options.method
def decoupled_wsam(
  base_optimizer: optax.GradientTransformation,
  learning_rate: Any,
  rho: _hyperparameters.Hyperparameter = 0.05,
  gamma: float | jax.Array = 0.9,
  *,
  metric: metrics.Metric = metrics.euclidean(),
  **options: Unpack[transformation.Options],
) -> Transformation:
  """WSAM as its authors use it: sharpness as weight decay is, beside the optimizer.

  The optimizer sees the plain gradient ``g``, and what the gradient ``g₁`` at the probe
  adds to it goes into the step directly, past momentum and second moments:

      w ← w + base_optimizer(g) − lr · a (g₁ − g),     a = γ/(1 − γ).

  It is an optimizer, and stands where ``base_optimizer`` stood; ``update`` needs
  ``params`` and ``grad_fn``, as :func:`sharpness_aware` does. What clips, scales or
  freezes inside ``base_optimizer`` does not reach the sharpness. Freeze leaves behind::

      optax.chain(decoupled_wsam(optax.adam(lr), lr),
                  optax.masked(optax.set_to_zero(), frozen))

  It takes two gradients per step and keeps no state beside the optimizer's. Use it
  where adaptive moments should not see the sharpness.

  Args:
    base_optimizer: what makes the step of the gradient, its learning rate included.
    learning_rate: ``lr``, of the sharpness: the optimizer's own in the paper; scalar >=
      0: a number, an array or an Optax schedule of the step.
    rho: ``ρ``, scalar >= 0: a number, an array or an Optax schedule of the step.
    gamma: ``γ``, scalar, 0 <= γ < 1.
    metric: how the length of a perturbation is measured; Euclidean in the paper.
    **options: ``mask``, ``axis_name``, ``sync_ascent``, ``param_specs`` and
      ``perturbation_dtype`` of :func:`sharpness_aware`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` whose state is the pair of the
    optimizer's and the method's.

  Raises:
    TypeError: if an argument has the wrong type.
    ValueError: if a number is out of its range, or ``axis_name`` is missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import decoupled_wsam
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = decoupled_wsam(optax.adam(0.1), learning_rate=0.1, rho=0.5, gamma=0.75)
    >>> w = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates)
    [-0.28 -0.34]

  References:
    Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023
  """
  _checks.check_optimizer(base_optimizer, 'decoupled_wsam(optax.adam(1e-3), 1e-3)')
  _hyperparameters.check_hyperparameter('learning_rate', learning_rate)
  sharpness = optax.chain(
    transformation.sharpness_aware(
      metric, rho, combinations.excess(_weight(gamma)), **options
    ),
    optax.scale_by_learning_rate(learning_rate),
  )
  base = optax.with_extra_args_support(base_optimizer)
  axis_name = options.get('axis_name')

  def init(params):
    return base.init(params), sharpness.init(params)

  def update(updates, state, params=None, **extra_args):
    base_state, own_state = state
    excess, own_state = sharpness.update(updates, own_state, params, **extra_args)
    mean = spaces.mean(updates, axis_name)
    step, base_state = base.update(mean, base_state, params, **extra_args)
    return optax.tree.add(step, excess), (base_state, own_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _weight(gamma):
  """``γ/(1 − γ)``, the weight of the sharpness."""
  _hyperparameters.check_number('gamma', gamma)
  if not isinstance(gamma, jax.core.Tracer) and gamma >= 1:
    raise ValueError(f'`gamma` must be less than 1, got {gamma!r}: SAM is 0.5.')
  # In bfloat16 `1 − γ` would round. Out of range at run time, γ gives a weight that is
  # out of range as well, which becomes NaN.
  gamma = gamma if isinstance(gamma, (int, float)) else _numerics.widen(gamma)
  return gamma / (1.0 - gamma)
