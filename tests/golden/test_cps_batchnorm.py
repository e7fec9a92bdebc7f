import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax.models.layers import BatchNorm


@pytest.mark.golden("cps_batchnorm", case=r"case\d+")
def test_batch_norm_and_its_running_statistics(golden):
  layer = BatchNorm(momentum=1 - float(golden["momentum_torch"]), eps=float(golden["eps"]))
  params = {"scale": golden["gamma"], "bias": golden["beta"]}
  channels = golden["gamma"].size
  stats = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
  step = jax.jit(
    lambda stats, x: layer.apply(
      {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
    )
  )
  steps = len(golden.under("x"))
  assert steps > 0
  for i in range(steps):
    y, moved = step(stats, golden[f"x{i}"].transpose(0, 2, 3, 1))
    stats = moved["batch_stats"]
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), golden[f"y{i}"], atol=1e-6)
    np.testing.assert_allclose(stats["mean"], golden[f"running_mean{i}"], atol=1e-6)
    np.testing.assert_allclose(stats["var"], golden[f"running_var{i}"], atol=1e-6)
