"""UniMatch's DeepLabv3+ against the official code, with weights drawn from the names of its state
dict.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded_net as recorded

NAME = "deeplabv3plus_unimatch"
WATCHED = {
  "stem_conv": "backbone/stem/unit3/conv",
  "maxpool": "backbone/stem",
  "aspp_b0": "head/aspp/branch0",
  "aspp_b1": "head/aspp/branch1",
  "aspp_b2": "head/aspp/branch2",
  "aspp_b3": "head/aspp/branch3",
  "aspp_project": "head/aspp",
  "low_level_reduce": "head/low",
  "fuse": "head/unit2",
}


def weights_of(golden):
  return recorded.weights(NAME, int(golden["num_classes"]), backbone=str(golden["backbone"]))


def dropped(maps, low, high):
  """Channel dropout at one half of the low-level and the deepest map, as drawn in the recording."""
  first, *between, last = maps
  return (first * (2.0 * low[:, None, None]), *between, last * (2.0 * high[:, None, None]))


@pytest.mark.golden("unimatch_net_r50")
def test_logits_and_activations_clean_and_perturbed(golden):
  images, (network, _, (params, stats)) = recorded.images_of(golden), weights_of(golden)
  options = {"backbone": str(golden["backbone"])}
  scores, maps, outputs = recorded.forward(
    NAME, int(golden["num_classes"]), images, WATCHED.values(), **options
  )
  acts = {name: outputs[path] for name, path in WATCHED.items()}
  acts |= dict(zip(("layer1", "layer2", "layer3", "layer4"), maps, strict=True)) | {
    "classifier": scores
  }
  recorded.check_activations(golden, acts, 1e-4)

  @jax.jit
  def logits_of(maps):
    scores, _ = network.decode(params, stats, maps, train=False)
    return network.upsample(scores, images.shape[1:3])

  maps = tuple(x.transpose(0, 2, 3, 1) for x in maps)
  logits = recorded.nchw(logits_of(maps))
  perturbed = recorded.nchw(logits_of(dropped(maps, golden["fp_mask_low"], golden["fp_mask_high"])))
  sampled = {
    "logits_sub6": logits[:, :, ::6, ::6],
    "logits_sub20": logits[:, :, ::20, ::20],
    "preupsample_sub2": scores[:, :, ::2, ::2],
    "preupsample_sub4": scores[:, :, ::4, ::4],
    "layer4_sub4_ch64": acts["layer4"][:, ::64, ::4, ::4],
    "aspp_sub4_ch16": acts["aspp_project"][:, ::16, ::4, ::4],
    "fp_logits_sub6": perturbed[:, :, ::6, ::6],
    "fp_logits_sub20": perturbed[:, :, ::20, ::20],
    "logits_mean": logits.mean(),
    "logits_std": logits.std(),
    "fp_logits_mean": perturbed.mean(),
    "fp_logits_std": perturbed.std(),
  }
  for name in sampled.keys() & golden.keys():
    np.testing.assert_allclose(sampled[name], golden[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.golden("unimatch_net_r50")
def test_clean_and_perturbed_maps_share_statistics_in_training_mode(golden):
  if "train_logits_sub8" not in golden:
    pytest.skip(f"{golden.path.name} holds no training forward")
  images, (network, _, (params, stats)) = recorded.images_of(golden), weights_of(golden)

  @jax.jit
  def run(params, stats, low, high):
    maps, stats = network.encode(params, stats, images, train=True)
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), maps, dropped(maps, low, high))
    scores, stats = network.decode(params, stats, both, train=True)
    return network.upsample(scores, images.shape[1:3]), stats

  logits, moved = run(params, stats, golden["train_fp_mask_low"], golden["train_fp_mask_high"])
  clean, perturbed = np.split(recorded.nchw(logits)[:, :, ::8, ::8], 2)
  np.testing.assert_allclose(clean, golden["train_logits_sub8"], rtol=0, atol=5e-3)
  np.testing.assert_allclose(perturbed, golden["train_fp_logits_sub8"], rtol=0, atol=5e-3)
  recorded.check_statistics(golden, moved, NAME, 1e-4)


@pytest.mark.golden("unimatch_net_r50")
def test_every_tensor_has_the_recorded_name_and_shape(golden):
  recorded.check_tensors(golden.path.parent / "unimatch_net_r50_params.json", weights_of(golden)[1])
