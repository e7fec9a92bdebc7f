"""CCT's pyramid pooling in both modes."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from pseudoseg_jax.models import torch_names
from pseudoseg_jax.models.pspnet import PyramidPooling


@pytest.mark.golden("cct_psp", case=r"c\d+")
def test_pyramid_pooling(golden):
  x, module = golden["x"].transpose(0, 2, 3, 1), PyramidPooling()
  variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
  leaves = {
    path: f"backbone/psp/{path[1:] and '/'.join(path[1:])}"
    for path in traverse_util.flatten_dict(variables)
  }
  theirs = torch_names.names(leaves.values(), "pspnet")
  names = {path: theirs[ours].removeprefix("encoder.psp.") for path, ours in leaves.items()}
  variables = traverse_util.unflatten_dict(
    {path: torch_names.to_ours(golden[f"p_{name}"], leaves[path]) for path, name in names.items()}
  )
  y = module.apply(variables, x, train=False)
  np.testing.assert_allclose(y.transpose(0, 3, 1, 2), golden["y_eval"], rtol=0, atol=1e-4)
  y, moved = module.apply(variables, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(y.transpose(0, 3, 1, 2), golden["y_train"], rtol=0, atol=1e-4)
  after = {names[path]: value for path, value in traverse_util.flatten_dict(moved).items()}
  assert after.keys() == golden.under("after_").keys()
  for name, value in golden.under("after_").items():
    np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-4, err_msg=name)
