"""PSPNet against the official codes of CCT and PixelSSL, with weights drawn from the names of their
state dicts.
"""

import numpy as np
import pytest
import recorded_net as recorded

from pseudoseg_jax.ops import resize

NETWORKS = {"pspnet_cct_r50": "pspnet", "pspnet_pixelssl_r50": "pspnet_pixelssl"}
ATOL = {"pspnet": 1e-4, "pspnet_pixelssl": 2e-4}
WATCHED = {
  "stem_conv1": "backbone/stem/unit1/conv",
  "psp_bin1": "backbone/psp/bin1",
  "psp_bin2": "backbone/psp/bin2",
  "psp_bin3": "backbone/psp/bin3",
  "psp_bin6": "backbone/psp/bin6",
  "decoder_conv": "head/classifier",
}


@pytest.mark.golden("pspnet_")
def test_logits_and_activations(golden):
  name, images = NETWORKS[golden.path.stem], recorded.images_of(golden)
  scores, maps, outputs = recorded.forward(
    name, int(golden["num_classes"]), images, WATCHED.values(), backbone="resnet50"
  )
  atol, acts = ATOL[name], {theirs: outputs[path] for theirs, path in WATCHED.items()}
  acts |= dict(zip(("layer1", "layer2", "layer3", "layer4", "psp"), maps, strict=True)) | {
    "decoder_step3": scores
  }
  recorded.check_activations(golden, acts, atol)
  sampled = {"layer4_ch64": maps[-2][:, ::64], "z_ch16": maps[-1][:, ::16]}
  sampled |= {f"bin{bins}_ch32": acts[f"psp_bin{bins}"][:, ::32] for bins in (1, 2, 3, 6)}
  for key, got in sampled.items():
    np.testing.assert_allclose(got, golden[key], rtol=0, atol=atol, err_msg=key)
  network, _, _ = recorded.weights(name, int(golden["num_classes"]), backbone="resnet50")
  logits = recorded.nchw(network.upsample(scores.transpose(0, 2, 3, 1), images.shape[1:3]))
  np.testing.assert_allclose(logits[:, :, ::5, ::5], golden["logits_sub5"], rtol=0, atol=atol)
  np.testing.assert_allclose(
    [logits.mean(), logits.std()], [golden["logits_mean"], golden["logits_std"]], rtol=0, atol=atol
  )
  assert scores.min() == 0
  assert network.upsample is resize.bilinear_align_corners


@pytest.mark.golden("pspnet_")
def test_every_tensor_has_the_recorded_name_and_shape(golden):
  _, state_dict, _ = recorded.weights(
    NETWORKS[golden.path.stem], int(golden["num_classes"]), backbone="resnet50"
  )
  recorded.check_tensors(golden.path.with_name(f"{golden.path.stem}_params.json"), state_dict)
