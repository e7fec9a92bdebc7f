"""Weak labels of evaluated images: shown to predictors as planes, and as the only classes that
count.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import build, config as configs
from pseudoseg_jax.contract import Method, Needs, Predictor
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.evaluation import evaluator, inference, weak_labels
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.ops import boxes as box_ops

CLASSES = Classes(("background", "green", "blue"), ((0, 0, 0), (0, 255, 0), (0, 0, 255)))
PROTOCOLS = {
  "flip": Protocol(flip=True),
  "scales": Protocol(scales=(0.5, 1.0, 1.75), flip=True),
  "padded": Protocol(pad_multiple=16),
  "slide": Protocol("slide", (10, 12), flip=True),
  "slide in one window": Protocol("slide", (40, 40)),
  "cut": Protocol("slide", (10, 12), edges="cut", summed="probabilities", scales=(1.0, 2.0)),
  "pad_to_crop": Protocol("pad_to_crop", (32, 32)),
  "center_crop": Protocol("center_crop", (8, 10)),
}


class Images:
  """Random images of 17 x 23 pixels; image `row` has the classes of `present[row]`."""

  has_labels, channels, dtype = True, 3, np.uint8
  present = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 1], [1, 0, 1]], np.float32)
  boxes = [
    np.array([[1, 0.2, 0.1, 0.6, 0.5], [2, 0.5, 0.4, 1.0, 0.9], [-1, 0, 0, 1, 1]], np.float32)
  ] * 4

  def __init__(self):
    rng = np.random.default_rng(0)
    self.ids = tuple("abcd")
    self.images = rng.integers(0, 256, (4, 17, 23, 3), np.uint8)
    self.labels = [rng.choice(np.flatnonzero(of), (17, 23)).astype(np.uint8) for of in self.present]
    self.image, self.label = self.images.__getitem__, self.labels.__getitem__

  def __len__(self):
    return 4

  def size(self, row):
    return (17, 23)


def pointwise(state, images):
  return jnp.sin(5 * images) + jnp.asarray([0.2, 0.1, 0.0])


def make(predictors, source, protocol, planes):
  mean, std = (0.0,) * (3 + planes), (1.0,) * (3 + planes)
  options = {"mean": mean, "std": std, "batch_size": 4, "with_labels": source.has_labels}
  return evaluator.make_evaluator(predictors, source, CLASSES, protocol=protocol, **options)


def test_an_absent_class_never_wins_and_an_image_without_any_named_class_keeps_its_logits():
  logits = jnp.asarray([[[[5.0, 1.0, 2.0]]], [[[5.0, 1.0, 2.0]]]])
  planes = jnp.asarray([[[[0.0, 1.0, 1.0]]], [[[0.0, 0.0, 0.0]]]])
  got = weak_labels.mask_logits(logits, planes)
  np.testing.assert_allclose(
    jax.nn.softmax(got[0, 0, 0]), [0, 1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-5
  )
  np.testing.assert_array_equal(got[1], logits[1])
  assert np.isfinite(1000 * got).all()


def test_a_class_that_lies_elsewhere_in_the_image_may_win_anywhere():
  planes = jnp.zeros((1, 2, 2, 2)).at[0, 1, 1, 0].set(1.0)
  assert (
    jnp.argmax(weak_labels.mask_logits(jnp.zeros((1, 2, 2, 2)).at[..., 1].set(9.0), planes), -1)
    == 0
  ).all()


def test_planes_of_boxes_are_those_that_a_network_was_trained_on():
  got = weak_labels.planes_of("boxes", Images.boxes[0], (17, 23), 3)
  expected = box_ops.box_planes(jnp.asarray(Images.boxes[0])[None], (17, 23), 3)[0]
  np.testing.assert_array_equal(got, 255 * expected)
  assert expected.any((0, 1)).tolist() == [False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_answers_are_kept_to_the_classes_in_the_image_whatever_the_protocol(name):
  source, protocol = Images(), PROTOCOLS[name]
  shown_source = weak_labels.WithChannels(source, 3, {"image": source.present.__getitem__})
  predictors = {
    "plain": shown_source.predictor(Predictor(pointwise)),
    "masked": shown_source.predictor(Predictor(pointwise), masked=True),
  }
  for row, results in make(predictors, shown_source, protocol, 3).stream(None, range(4)):
    plain, masked = (results[name][0] for name in ("plain", "masked"))
    known = plain < 255
    assert known.any() and (known == (masked < 255)).all()
    assert source.present[row][masked[known]].all()
    kept = known & source.present[row][np.where(known, plain, 0)].astype(bool)
    # Sums of probabilities over windows weigh each by what it leaves out.
    if protocol.summed == "logits":
      np.testing.assert_array_equal(masked[kept], plain[kept])
    if source.present[row].all():
      np.testing.assert_array_equal(masked, plain)
      np.testing.assert_array_equal(results["masked"][1], results["plain"][1])
    else:
      assert not source.present[row][plain[known]].all()  # there was something to keep out


@pytest.mark.parametrize("name", sorted(set(PROTOCOLS) - {"center_crop"}))
def test_a_predictor_sees_its_planes_where_they_belong(name):
  source = Images()
  shown_source = weak_labels.WithChannels(
    source, 3, {"boxes": source.boxes.__getitem__, "image": source.present.__getitem__}
  )
  protocol = PROTOCOLS[name]._replace(summed="logits")
  canvas = np.zeros((1, *inference.canvas_size((17, 23), protocol), 9), np.uint8)
  canvas[0, :17, :23] = shown_source.image(1)
  for kind, first in {"boxes": 3, "image": 6}.items():
    shows_planes = Predictor(lambda state, images: images[..., 3:], weak_label=kind)
    shown = functools.partial(shown_source.predictor(shows_planes), None)
    normalization = {"mean": (0.5,) * 3 + (0.0,) * 6, "std": (0.2,) * 3 + (1.0,) * 6}
    infer = functools.partial(inference.infer, shown, protocol=protocol, **normalization)
    scores, passes = jax.jit(infer)(canvas, jnp.array([[17, 23]]))
    got, expected = (scores / passes)[0, :17, :23], canvas[0, :17, :23, first : first + 3] / 255
    if protocol.scales == (1.0,) or kind == "image":
      np.testing.assert_allclose(got, expected, atol=1e-6)
    else:
      assert got.min() >= 0 and got.max() <= 1 + 1e-6
      assert np.abs(got - expected).mean() < 0.05  # edges of boxes are smoothed


def test_padding_has_no_planes():
  shown_source = weak_labels.WithChannels(Images(), 3, {"image": lambda row: np.ones(3)})
  shows_planes = Predictor(lambda state, images: images[..., 3:], weak_label="image")
  predictor = functools.partial(shown_source.predictor(shows_planes), None)
  infer = functools.partial(
    inference.infer, predictor, protocol=Protocol(pad_multiple=32), mean=(0.5,) * 3 + (0.0,) * 3
  )
  canvas = np.full((1, 32, 32, 6), 255, np.uint8)
  scores, _ = infer(canvas, jnp.array([[17, 23]]), std=(1.0,) * 6)
  assert scores[0, :17, :23].min() == 1 and scores[0, 17:].max() == scores[0, :, 23:].max() == 0


def test_no_label_is_opened_to_stream_and_none_is_needed():
  source = Images()
  source.has_labels, source.label = False, None
  rows = dict(make({"x": pointwise}, source, Protocol(), 0).stream(None, [3, 1]))
  assert set(rows) == {1, 3}
  logits = pointwise(None, source.images[3] / np.float32(255))
  ids, confidence = rows[3]["x"]
  np.testing.assert_array_equal(ids, logits.argmax(-1))
  np.testing.assert_allclose(confidence, 255 * jax.nn.softmax(logits).max(-1), atol=0.51)


# What a config makes of it


def make_method(num_classes):
  """A predictor that sees images, and one that answers with the boxes it is shown and background
  elsewhere.
  """

  def plain(state, images):
    return jnp.sin(7 * images.mean(-1, keepdims=True) * jnp.arange(1, num_classes + 1))

  def boxed(state, images):
    assert images.shape[-1] == 3 + num_classes
    return images[..., 3:].at[..., 0].set(0.5)

  predictors = {"plain": Predictor(plain), "boxed": Predictor(boxed, weak_label="boxes")}
  return Method(Needs(), init=None, draw=None, update=None, predictors=predictors)


def quickstart(**options):
  sizes = {
    "data.num_scenes": 4,
    "data.num_labeled": 2,
    "data.num_eval_scenes": 5,
    "data.size": "32,40",
  }
  config = configs.frozen(configs.load("configs/quickstart.py:method=supervised", sizes | options))
  (domain,) = build.build_domains(config)
  return config, domain.data


def test_a_config_scores_with_and_without_image_labels_side_by_side():
  config, data = quickstart(**{"evaluation.image_labels": True})
  method = make_method(len(data.classes))
  score = build.build_evaluator(config, data, method, None)
  scores = score(None)
  assert list(scores) == ["plain", "plain+image_labels", "boxed"]
  assert scores["plain+image_labels"].pixel_accuracy > scores["plain"].pixel_accuracy
  assert scores["boxed"].pixel_accuracy > 0.6  # boxes around discs and crosses
  for row, results in score.stream(None, range(5)):
    present = set(np.unique(data.evaluated.label(row)))
    assert set(np.unique(results["plain+image_labels"][0])) <= present
    assert not set(np.unique(results["plain"][0])) <= present


def test_without_weak_labels_the_evaluator_reads_the_images_as_they_are():
  config, data = quickstart()
  method = make_method(len(data.classes))
  plain = method._replace(predictors={"plain": method.predictors["plain"]})
  score = build.build_evaluator(config, data, plain, None)
  assert score.source is data.evaluated and score.names == ("plain",)
