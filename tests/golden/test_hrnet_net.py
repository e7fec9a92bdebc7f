"""HRNet against the official segmentation code, with weights drawn from the names of its state
dict.
"""

import functools

import jax
import numpy as np
import pytest
import recorded_net as recorded

from pseudoseg_jax.ops import resize

WATCHED = {
  "layer1": "backbone/layer1_3",
  "stage2": "backbone/stage2_0",
  "stage3": "backbone/stage3_3",
  "head_conv0": "head/unit/conv",
}


def options_of(golden):
  return {
    "num_classes": int(golden["num_classes"]),
    "gain": float(golden["weight_gain"]),
    "backbone": f"hrnet_w{golden['width']}",
  }


@pytest.mark.slow
@pytest.mark.golden("hrnet_w18")
def test_scores_and_activations_in_inference_mode(golden):
  images = recorded.images_of(golden)
  scores, maps, outputs = recorded.forward(
    "hrnet", images=images, watched=WATCHED.values(), **options_of(golden)
  )
  got = {name: outputs[path] for name, path in WATCHED.items()}
  branches = {
    f"{stage}_branch{b}": branch
    for stage in ("stage2", "stage3")
    for b, branch in enumerate(got.pop(stage))
  }
  got |= branches | {f"stage4_branch{b}": branch for b, branch in enumerate(maps)}
  recorded.check_activations(
    golden, {name: got[name] for name in golden["act_names"] if name in got}, 1e-4
  )
  np.testing.assert_allclose(scores, golden["logits_align_corners_false"], rtol=0, atol=1e-4)
  np.testing.assert_allclose(
    maps[0][:, ::8, ::2, ::2], golden["stage4_branch0_ch8_sub2"], rtol=0, atol=1e-4
  )
  for b in (1, 2, 3):
    np.testing.assert_allclose(maps[b][:, ::8], golden[f"stage4_branch{b}_ch8"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.golden("hrnet_w18")
def test_scores_with_aligned_corners(golden):
  if "train_logits_sub3" in golden:
    pytest.skip(
      "sides that are no multiples show the convention best, and every pass takes long to compile"
    )
  images = recorded.images_of(golden)
  scores, _, _ = recorded.forward("hrnet", images=images, align_corners=True, **options_of(golden))
  np.testing.assert_allclose(scores, golden["logits_align_corners_true"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.golden("hrnet_w18")
def test_logits_and_running_statistics_in_training_mode(golden):
  if "train_logits_sub3" not in golden:
    pytest.skip(f"{golden.path.name} holds no training forward")
  momentum = 1 - float(golden["bn_momentum_torch"])
  network, _, (params, stats) = recorded.weights(
    "hrnet", bn_momentum=momentum, **options_of(golden)
  )

  @functools.partial(jax.jit, compiler_options=recorded.QUICKLY)
  def run(params, stats, images):
    maps, stats = network.encode(params, stats, images, train=True)
    return network.decode(params, stats, maps, train=True)

  images = recorded.images_of(golden)
  scores, moved = run(params, stats, images)
  np.testing.assert_allclose(
    recorded.nchw(scores)[:, :, ::3, ::3], golden["train_logits_sub3"], rtol=0, atol=1e-3
  )
  recorded.check_statistics(golden, moved, "hrnet", 1e-4)
  size = images.shape[1:3]
  np.testing.assert_array_equal(
    network.upsample(scores, size), resize.bilinear_half_pixel(scores, size)
  )


@pytest.mark.golden("hrnet_w18")
def test_every_tensor_has_the_recorded_name_and_shape(golden):
  if int(golden["num_classes"]) != 19:
    pytest.skip("the record is of 19 classes")
  _, state_dict, _ = recorded.weights("hrnet", **options_of(golden))
  recorded.check_tensors(golden.path.parent / "hrnet_w18_params.json", state_dict)
