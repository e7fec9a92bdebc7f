import numpy as np
import pytest

from pseudoseg_jax import checks
from pseudoseg_jax.data import synthetic


def test_scene_depends_on_seed_and_row_only():
  few, many = (
    synthetic.SyntheticScenes(3, (32, 48), seed=5),
    synthetic.SyntheticScenes(300, (32, 48), seed=5),
  )
  many.image(7)  # what was drawn before plays no part
  np.testing.assert_array_equal(few.image(2), many.image(2))
  np.testing.assert_array_equal(few.label(2), many.label(2))
  other = synthetic.SyntheticScenes(3, (32, 48), seed=6)
  assert np.any(other.image(2) != few.image(2)) and np.any(few.image(1) != few.image(2))


def test_scenes_have_every_class_in_the_layout_of_a_source():
  scenes = synthetic.SyntheticScenes(60)
  assert len(scenes) == len(scenes.ids) == len(set(scenes.ids)) == 60 and scenes.has_labels
  assert scenes.image(0).shape == (*scenes.size(0), 3) and scenes.label(0).shape == scenes.size(0)
  assert scenes.image(0).dtype == scenes.label(0).dtype == np.uint8
  share = np.bincount(np.stack([scenes.label(row) for row in range(60)]).ravel(), minlength=256) / (
    60 * 64 * 64
  )
  assert share[0] < 0.8 and np.all(share[1:7] > 0.02) and not share[7:].any()


def test_color_does_not_tell_the_class():
  scenes = synthetic.SyntheticScenes(200)
  means = {index: [] for index in range(1, 7)}
  for row in range(200):
    for index in means:
      inside = scenes.label(row) == index
      if inside.sum() > 20:
        means[index].append(scenes.image(row)[inside].mean(0))
  centers = np.stack([np.mean(colors, 0) for colors in means.values()])
  spread = np.mean([np.std(colors, 0) for colors in means.values()])
  # Classes' mean colors lie together; within a class they vary far more.
  assert np.abs(centers - centers.mean(0)).max() < spread


def test_settings_are_checked_together():
  with pytest.raises(checks.InputError) as error:
    synthetic.SyntheticScenes(0, (8, 64), seed=-1)
  assert all(part in str(error.value) for part in ("num_scenes", "size", "seed"))
