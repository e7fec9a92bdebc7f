"""The choice of images whose labels stayed the same."""

import json

import numpy as np
import pytest
from PIL import Image

from pseudoseg_jax import reliable
from pseudoseg_jax.checks import InputError

LABELS = {  # of 2 x 2 pixels and the classes 0, 1, 2
  "first": {"x/a": [0, 0, 0, 0], "b": [0, 1, 1, 1], "c": [2, 2, 2, 2], "d": [0, 0, 1, 1]},
  "second": {"x/a": [0, 0, 1, 1], "b": [0, 0, 1, 1], "c": [0, 0, 0, 0], "d": [0, 0, 1, 1]},
  "last": {"x/a": [0, 0, 1, 1], "b": [0, 0, 1, 1], "c": [1, 1, 1, 1], "d": [0, 0, 1, 1]},
}


@pytest.fixture
def folders(tmp_path):
  for folder, of_images in LABELS.items():
    for name, pixels in of_images.items():
      path = tmp_path / folder / "labels" / f"{name}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.array(pixels, np.uint8).reshape(2, 2)).save(path)
    about = {"finished": True, "list_sha256": "same", "classes": {"a": {}, "b": {}, "c": {}}}
    (tmp_path / folder / "manifest.json").write_text(json.dumps(about))
    (tmp_path / folder / "list.txt").write_text("x/a\nb\nc\nd\n")
  return [tmp_path / folder for folder in ("last", "first", "second")]


def test_stability_by_hand_over_the_classes_that_either_has(folders):
  last, *earlier = folders
  expected = {
    # Class 0: 2 of 4 pixels, class 1: none of 2; class 2 is in neither.
    "x/a": ((2 / 4 + 0) / 2 + 1) / 2,
    "b": ((1 / 2 + 2 / 3) / 2 + 1) / 2,
    "c": 0.0,
    "d": 1.0,
  }
  got = reliable.stability(last, earlier)
  assert list(got) == list(expected)
  np.testing.assert_allclose(list(got.values()), list(expected.values()))


def test_the_stablest_share_comes_first_and_is_rounded_down(folders, tmp_path, capsys):
  last, *earlier = map(str, folders)
  out = tmp_path / "lists" / "reliable.txt"
  for share, chosen in {
    0.5: ["d", "b"],
    0.74: ["d", "b"],
    0.75: ["d", "b", "x/a"],
    0.01: ["d"],
  }.items():
    assert (
      reliable.main([f"--labels={last}", "--earlier", *earlier, f"--share={share}", f"--out={out}"])
      == 0
    )
    assert out.read_text().split() == chosen
  assert json.loads((tmp_path / "lists" / "reliable.txt.json").read_text())["scores"]["d"] == 1.0
  assert "1 of 4 images" in capsys.readouterr().out


def test_equally_stable_images_keep_their_order():
  assert reliable.most_stable({"b": 0.5, "a": 0.5, "c": 0.6}, 1.0) == ["c", "b", "a"]


def test_labels_of_other_images_or_unfinished_ones_are_refused(folders):
  last, first, second = folders
  (first / "manifest.json").unlink()
  with pytest.raises(InputError, match="a folder that export_labels has finished"):
    reliable.stability(last, [first, second])
  about = json.loads((second / "manifest.json").read_text())
  (second / "manifest.json").write_text(json.dumps(about | {"list_sha256": "other"}))
  with pytest.raises(InputError, match="the same images as in"):
    reliable.stability(last, [second])
  with pytest.raises(InputError, match="above 0"):
    reliable.most_stable({"a": 1.0}, 0.0)
