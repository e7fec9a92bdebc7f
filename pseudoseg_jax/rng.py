"""Random keys, which are derived and never stored.

A key is a function of (seed, stream name, step).
"""

import zlib

import jax


def stream(key: jax.Array, name: str) -> jax.Array:
  """Derives the key of a named stream.

  The name enters by crc32, because Python's hash() of a string differs between processes.
  """
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def step_key(seed: int, step: jax.Array) -> jax.Array:
  """Derives the key of training step `step` (i32[]) of a run with `seed`."""
  return jax.random.fold_in(stream(jax.random.key(seed), "step"), step)
