"""Temporal ensembling: what is remembered, targets and losses, epoch after epoch, by the method's
own update.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from pseudoseg_jax import optim
from pseudoseg_jax.contract import IGNORE_LABEL, Network, Task
from pseudoseg_jax.methods import temporal_ensembling
from pseudoseg_jax.ops import losses, memory


def as_recorded(num_classes):
  """The network whose logits are its input: the recorded logits are shown to it as images."""

  def apply(params, batch_stats, images, *, train, groups=1, dropout=None):
    return params["scale"] * images, batch_stats

  return Network(lambda key: ({"scale": jnp.ones([])}, {}), apply, in_channels=num_classes)


@pytest.mark.golden("temporal_ensembling")
def test_temporal_ensembling(golden):
  epochs, images, classes, height, width = golden["logits_per_epoch"].shape
  assert golden["weight_during_epoch"][0] == 0
  optimizer = optim.sgd(lambda step: 0.0, momentum=0.0)
  task = Task(
    classes,
    epochs,
    as_recorded(classes),
    optimizer,
    losses.cross_entropy_mean,
    num_unlabeled=images,
  )
  # One step is one epoch of all images, whole and unmirrored, on a grid of their own pixels.
  method = temporal_ensembling.temporal_ensembling(
    task,
    weight=golden["w_max"].item() * golden["labeled_fraction"].item(),
    rampup_fraction=golden["rampup_epochs"].item() / epochs,
    decay=golden["alpha"].item(),
    grid=(height, width),
    strong_views=0,
  )
  start = method.init(jax.random.key(0))
  # The files are exact to 1e-6, half precision is not.
  start = start.replace(
    memory=jax.tree.map(lambda stored: stored.astype(jnp.float32), start.memory)
  )
  ids, flip = jnp.arange(images), jnp.zeros(images, bool)
  window = jnp.tile(jnp.array([0.0, 0, 1, 1]), (images, 1))
  valid = jnp.ones((images, height, width), bool)
  labeled = {
    "image": jnp.zeros((1, height, width, classes)),
    "label": jnp.full((1, height, width), IGNORE_LABEL),
  }
  unlabeled = {"valid": valid, "id": ids, "flip": flip, "window": window}
  batches = [
    {"labeled": labeled, "unlabeled": unlabeled | {"weak": toy.nhwc(logits)}}
    for logits in golden["logits_per_epoch"]
  ]

  for epoch, (state, metrics) in enumerate(toy.run(method, start, batches)):
    kept = state.memory["predictions"].reshape(height, images, width, classes).transpose(1, 3, 0, 2)
    np.testing.assert_allclose(kept, golden["accumulator_after_epoch"][epoch], rtol=0, atol=1e-6)
    cells, seen = memory.unbiased(memory.read(state.memory["predictions"], ids, classes))
    target, known = memory.cells_to_crop(cells, seen, flip, window, (height, width))
    assert jnp.all(known)
    np.testing.assert_allclose(
      np.moveaxis(target, -1, 1), golden["target_after_epoch"][epoch], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
      metrics["loss_consistency"], golden["consistency_loss_during_epoch"][epoch], rtol=0, atol=1e-6
    )
