"""Random keys are derived, never stored: a key is a function of (seed, stream name, step)."""

import zlib

import jax


def stream(key: jax.Array, name: str) -> jax.Array:
  """The key of a named stream. crc32, because Python's hash() of a string differs between
  processes.
  """
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def step_key(seed: int, step: jax.Array) -> jax.Array:
  """The key of training step `step` (i32[]) of a run with `seed`."""
  return jax.random.fold_in(stream(jax.random.key(seed), "step"), step)
