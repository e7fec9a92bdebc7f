"""One mesh axis, `data`, and the shardings over it.

The state is replicated, every batch is split over its leading axis.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices=None) -> Mesh:
  """Makes a one-axis mesh over `devices`.

  The default is all devices of all processes.
  """
  devices = jax.devices() if devices is None else devices
  # Auto axes: with explicit ones, JAX's default, `roll` and `concatenate` over the split axis
  # raise.
  return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec("data"))


def global_batch(mesh: Mesh, local):
  """Makes global arrays from this process's rows of a batch.

  The rows are NumPy arrays; the global arrays are split over the mesh.
  """
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split(mesh), rows), local)
