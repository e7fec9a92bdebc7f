import numpy as np
import pytest

from pseudoseg_jax.ops import confusion


@pytest.mark.golden("cps_miou", case=r"case\d+")
def test_confusion_and_scores_equal_torchsemiseg(golden):
  num_classes = int(golden["num_classes"])
  matrices = []
  for number in range(len(golden.under("gt"))):
    matrix = confusion.confusion_matrix(golden[f"gt{number}"], golden[f"pred{number}"], num_classes)
    np.testing.assert_array_equal(matrix, golden[f"hist{number}"])
    matrices.append(np.asarray(matrix, np.int64))
  got = confusion.scores(sum(matrices))
  np.testing.assert_array_equal(got.matrix, golden["hist"])
  assert got.matrix.sum() == golden["labeled"] and np.trace(got.matrix) == golden["correct"]
  np.testing.assert_allclose(got.iou, golden["iou"], rtol=0, atol=1e-12, equal_nan=True)
  np.testing.assert_allclose(got.miou, golden["miou"], rtol=0, atol=1e-12)
  np.testing.assert_allclose(
    np.nanmean(got.iou[1:]), golden["miou_no_background"], rtol=0, atol=1e-12
  )
  np.testing.assert_allclose(got.pixel_accuracy, golden["pixel_acc"], rtol=0, atol=1e-12)
