"""Ramps and learning-rate schedules as functions of the step.

They take Python numbers, NumPy or traced arrays.
"""

from __future__ import annotations

import jax.numpy as jnp


def sigmoid_rampup(step, length_steps):
  """Computes exp(-5 (1 - t)^2) with t = step / length clipped to [0, 1].

  It is 1 for length 0. [Laine & Aila 2017; Mean Teacher ramps.py]
  """
  t = jnp.clip(jnp.asarray(step, float) / max(length_steps, 1e-12), 0, 1)
  return jnp.exp(-5 * jnp.square(1 - t)) if length_steps else jnp.ones_like(t)


def sigmoid_rampdown(step, length_steps, total_steps):
  """Computes 1, then exp(-12.5 t^2) over the last `length_steps`.

  There t goes from 0 to 1. [Mean Teacher tensorflow model.py]
  """
  t = jnp.clip(1 - (total_steps - jnp.asarray(step, float)) / length_steps, 0, 1)
  return jnp.exp(-12.5 * jnp.square(t))


def linear_rampup(step, length_steps):
  """Computes step / length clipped to [0, 1]; 1 for length 0.

  [Mean Teacher ramps.py]
  """
  t = jnp.clip(jnp.asarray(step, float) / max(length_steps, 1e-12), 0, 1)
  return t if length_steps else jnp.ones_like(t)


def cosine_rampup(step, length_steps):
  """Computes (1 - cos(pi t)) / 2 with t = step / length clipped to [0, 1].

  It is 1 for length 0. [CCT ramps.py, likewise the next two]
  """
  return (1 - jnp.cos(jnp.pi * linear_rampup(step, length_steps))) / 2


def log_rampup(step, length_steps):
  """Computes 1 - exp(-5 t), from 0 to 0.9933; 1 for length 0."""
  return (
    1 - jnp.exp(-5 * linear_rampup(step, length_steps))
    if length_steps
    else linear_rampup(step, length_steps)
  )


def exp_rampup(step, length_steps):
  """Computes exp(5 (t - 1)), from 0.0067 to 1."""
  return jnp.exp(5 * (linear_rampup(step, length_steps) - 1))


RAMPUPS = {
  "sigmoid": sigmoid_rampup,
  "linear": linear_rampup,
  "cosine": cosine_rampup,
  "log": log_rampup,
  "exp": exp_rampup,
}


def rampup(step, *, shape, start_steps, length_steps):
  """Computes 0 before step `start_steps`, then the ramp of a shape.

  The shape is one of RAMPUPS. [CCT, official consistency_weight]
  """
  return jnp.where(
    jnp.asarray(step) < start_steps,
    0.0,
    RAMPUPS[shape](jnp.asarray(step) - start_steps, length_steps),
  )


def annealed_threshold(step, *, start, end, length_steps):
  """Moves a threshold from `start` towards `end` by `log_rampup`.

  It stops short of `end` by e^-5 of the way. [CCT, ab-CE]
  """
  return start + (end - start) * log_rampup(step, length_steps)


def cosine_rampdown(step, length_steps):
  """Computes (cos(pi step / length) + 1) / 2, from 1 to 0.

  [Mean Teacher ramps.py]
  """
  return 0.5 * (jnp.cos(jnp.pi * jnp.asarray(step, float) / length_steps) + 1)


def poly(step, *, base, total_steps, power=0.9, warmup_steps=0, shift_steps=0):
  """Computes base * (1 - step / total)^power, after a linear warm-up from 0.

  [TorchSemiSeg furnace/engine/lr_policy.py]

  Args:
    shift_steps: the schedule is read at step + shift, from 0 to total: official loops that set the
      rate after the step lag by one (UniMatch, -1), others lead by one (PixelSSL, +1).
  """
  step = jnp.clip(jnp.asarray(step) + shift_steps, 0, total_steps)
  # (total - step) is exact in integers; 1 - step/total in float32 would not be near the end.
  rate = base * (jnp.asarray(total_steps - step, float) / total_steps) ** power
  return jnp.where(
    step < warmup_steps, base * jnp.asarray(step, float) / max(warmup_steps, 1), rate
  )


def poly_after_slow_start(
  step, *, base, total_steps, power=0.9, slow_steps=0, slow_rate=1e-4, end_rate=0.0
):
  """Computes `slow_rate` for `slow_steps`, then a polynomial decay.

  It decays from base to end_rate as (1 - t)^power over the steps that are left, and is end_rate
  after.

  [TensorFlow DeepLab train_utils.py, get_model_learning_rate with the "poly" policy]
  """
  left = poly(
    jnp.maximum(jnp.asarray(step) - slow_steps, 0),
    base=1.0,
    total_steps=total_steps - slow_steps,
    power=power,
  )
  return jnp.where(jnp.asarray(step) < slow_steps, slow_rate, end_rate + (base - end_rate) * left)


def ema_decay(step, decay, warmup):
  """Computes a teacher's decay at a step, with the published warm-ups.

  Steps count from 0.

  Args:
    warmup: "none": constant; "from_half": min(1 - 1/(step + 2), decay) = 1/2, 2/3, ... (Mean
      Teacher's code, its counter is already incremented); "from_copy": min(1 - 1/(step + 1), decay)
      = 0, 1/2, 2/3, ... (PixelSSL, ClassMix, AEL): the first average is a copy.
  """
  offset = {"none": None, "from_half": 2, "from_copy": 1}[warmup]
  return decay if offset is None else jnp.minimum(1 - 1 / (step + offset), decay)


def exp_decay(step, *, start, end, rate, total_steps):
  """Computes start * exp(-rate t) with t = step / total, but not below `end`.

  [self-correcting networks, alpha]
  """
  return jnp.maximum(end, start * jnp.exp(-rate * jnp.asarray(step, float) / total_steps))
