"""Rare classes: weights, criteria, images met more often, and gradients that are clipped; numbers
against other definitions of them.
"""

import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pseudoseg_jax
from pseudoseg_jax import build, checks, config as configs, scoring
from pseudoseg_jax.builders.method import check_criterion
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.data import frequencies
from pseudoseg_jax.ops import losses

K = 4


def draw(seed, shape=(2, 5, 6)):
  rng = np.random.default_rng(seed)
  label = rng.integers(0, K - seed % 2, shape)  # an odd seed lacks the last class
  label[rng.random(shape) < 0.3] = IGNORE_LABEL
  return (
    (3 * rng.normal(size=(*shape, K))).astype(np.float32),
    label.astype(np.int32),
    rng.uniform(0.1, 3, K),
  )


def softmax(logits):
  powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def pixels_of(logits, label):
  """(probability of the true class, class) of each labeled pixel."""
  return [
    (softmax(logits)[index][label[index]], label[index])
    for index in np.ndindex(label.shape)
    if label[index] != IGNORE_LABEL
  ]


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_weighted_means_over_labeled_pixels(seed):
  logits, label, weights = draw(seed)
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5)
  pairs, total = (
    pixels_of(logits, label),
    sum(weights[kind] for _, kind in pixels_of(logits, label)),
  )
  by_class = tuple(weights)
  close(
    losses.cross_entropy_mean(logits, label, class_weights=by_class),
    sum(-weights[k] * np.log(p) for p, k in pairs) / total,
  )
  of_all = sum(-weights[k] * np.log(p) for p, k in pairs) / label.size
  close(losses.cross_entropy_mean(logits, label, class_weights=by_class, denominator="all"), of_all)
  focal = sum(-weights[k] * (1 - p) ** 1.5 * np.log(p) for p, k in pairs) / total
  close(losses.focal_mean(logits, label, gamma=1.5, class_weights=by_class), focal)
  close(losses.focal_mean(logits, label, gamma=0.0), losses.cross_entropy_mean(logits, label))
  alike = (2.0,) * K
  mined = functools.partial(
    losses.ohem_cross_entropy, logits, label, min_confidence=0.4, min_kept=3, scope="batch"
  )
  close(mined(class_weights=alike), mined())
  kept = [(p, k) for p, k in pairs if p <= 0.4]
  expected = sum(-weights[k] * np.log(p) for p, k in kept) / sum(weights[k] for _, k in kept)
  close(mined(class_weights=by_class), expected)


@pytest.mark.parametrize("seed", range(4))
def test_weighted_cross_entropy_and_its_gradient_are_those_of_pytorch(seed):
  torch = pytest.importorskip("torch")
  logits, label, weights = draw(seed)
  loss, gradient = jax.value_and_grad(
    functools.partial(losses.cross_entropy_mean, class_weights=tuple(weights))
  )(logits, label)
  theirs = torch.tensor(logits.reshape(-1, K), requires_grad=True)
  flat = torch.tensor(label.reshape(-1), dtype=torch.long)
  their_loss = torch.nn.functional.cross_entropy(
    theirs, flat, torch.tensor(weights, dtype=torch.float32), ignore_index=IGNORE_LABEL
  )
  their_loss.backward()
  np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
  np.testing.assert_allclose(
    np.reshape(gradient, (-1, K)), theirs.grad.numpy(), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("seed", range(4))
def test_dice_is_that_of_the_sets_where_probabilities_are_0_or_1(seed):
  logits, label, _ = draw(seed)
  certain = np.where(logits == logits.max(-1, keepdims=True), 80.0, -80.0).astype(np.float32)
  said, known = logits.argmax(-1), label != IGNORE_LABEL
  scores = []
  for kind in np.unique(label[known]):
    said_so, is_so = known & (said == kind), label == kind
    scores.append(2 * np.sum(said_so & is_so) / (np.sum(said_so) + np.sum(is_so)))
  np.testing.assert_allclose(losses.dice_loss(certain, label), 1 - np.mean(scores), rtol=1e-5)


@pytest.mark.parametrize(
  "criterion", [losses.cross_entropy_mean, losses.focal_mean, losses.dice_loss]
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_gradients_are_finite_and_none_where_no_pixel_has_a_label(criterion, scale):
  logits, label, weights = draw(0)
  options = {} if criterion is losses.dice_loss else {"class_weights": tuple(weights)}
  gradient = jax.jit(jax.value_and_grad(functools.partial(criterion, **options)))
  assert all(np.all(np.isfinite(value)) for value in gradient(scale * logits, label))
  for value in gradient(scale * logits, np.full_like(label, IGNORE_LABEL)):
    assert not np.any(value)
  _, by_pixel = gradient(logits, label)
  assert not np.any(np.asarray(by_pixel)[label == IGNORE_LABEL]) and np.any(by_pixel)


class Masks:
  """A source of masks alone."""

  def __init__(self, labels):
    self.labels, self.ids = labels, tuple(f"{row}" for row in range(len(labels)))

  def __len__(self):
    return len(self.labels)

  def label(self, row):
    return self.labels[row]


def make_masks(seed):
  rng = np.random.default_rng(seed)
  common = [0.7, 0.2, 0.1, 0.0]
  labels = [rng.choice(K, size=(4, 5), p=common).astype(np.uint8) for _ in range(6)]
  for label in labels[1:]:
    label[label == 2] = 0  # in one image alone
  labels[0][:] = np.resize([0, 2, IGNORE_LABEL], (4, 5))
  return Masks(labels)


@pytest.mark.parametrize("error", [checks.InputError, OSError])
def test_masks_that_cannot_be_read_count_nothing_where_they_are_skipped(error):
  source = make_masks(0)
  expected = frequencies.count_pixels(source, K)
  expected[2] = 0
  readable = source.label

  def label(row):
    if row == 2:
      raise error("truncated")
    return readable(row)

  source.label = label
  np.testing.assert_array_equal(frequencies.count_pixels(source, K, skip_unreadable=True), expected)
  with pytest.raises(error):
    frequencies.count_pixels(source, K)
  for by in frequencies.WEIGHTS:
    assert np.all(np.isfinite(frequencies.class_weights(expected, by))) and np.all(
      frequencies.class_weights(0 * expected, by) == 1
    )


@pytest.mark.parametrize("by", frequencies.WEIGHTS)
@pytest.mark.parametrize("seed", range(3))
def test_weights_have_a_mean_of_1_and_favor_the_rare(by, seed):
  source = make_masks(seed)
  pixels = frequencies.count_pixels(source, K)
  weights = frequencies.class_weights(pixels, by)
  met = np.concatenate([label.ravel() for label in source.labels])
  met = met[met != IGNORE_LABEL]
  np.testing.assert_allclose(np.mean(weights[met]), 1)
  assert weights[2] > weights[1] >= weights[0] > 0 and weights[3] == 1
  if by == "inverse":
    np.testing.assert_allclose(weights[2] / weights[0], np.sum(met == 0) / np.sum(met == 2))
  else:  # 1 of 6 images against all: 1 / sum over i < 6 of (5 / 6)^i
    np.testing.assert_allclose(weights[2] / weights[0], sum((5 / 6) ** power for power in range(6)))


def test_images_with_rare_classes_are_met_more_often():
  pixels = frequencies.count_pixels(make_masks(0), K)
  factors = frequencies.repeat_factors(pixels, 0.5)
  np.testing.assert_allclose(factors, [np.sqrt(0.5 * 6), 1, 1, 1, 1, 1])
  assert np.all(frequencies.repeat_factors(pixels, 0.1) == 1)
  rows = [frequencies.repeated_rows(factors, seed) for seed in range(400)]
  assert np.array_equal(rows[7], frequencies.repeated_rows(factors, 7))
  counts = np.mean([np.bincount(row, minlength=6) for row in rows], axis=0)
  np.testing.assert_allclose(counts, factors, atol=0.1)


def make_config(**overrides):
  return configs.frozen(
    configs.make_config(
      "supervised",
      network="tiny",
      overrides={key.replace("__", "."): value for key, value in overrides.items()},
    )
  )


@pytest.mark.parametrize("way", frequencies.WEIGHTS)
def test_weights_become_numbers_of_the_config_once(way):
  source = make_masks(0)
  classes = type(
    "Classes", (), {"names": ("ground", "wall", "door", "roof"), "__len__": lambda self: K}
  )()
  data = types.SimpleNamespace(labeled=source, classes=classes, skipped=None)
  config = make_config(criterion__class_weights=way)
  config = build.weigh_classes(config, data)
  text = config.criterion.class_weights
  expected = frequencies.class_weights(frequencies.count_pixels(source, K), way)
  np.testing.assert_allclose([float(part) for part in text.split(",")], expected, rtol=1e-5)
  assert build.weigh_classes(config, data) == config
  logits, label, _ = draw(0)
  weights = tuple(float(part) for part in text.split(","))
  assert build.build_criterion(config, K)(logits, label) == losses.cross_entropy_mean(
    logits, label, class_weights=weights
  )


def test_sums_of_criteria():
  logits, label, _ = draw(1)
  said = build.build_criterion(make_config(criterion__name="focal+dice"), K)(logits, label)
  np.testing.assert_allclose(
    said, losses.focal_mean(logits, label) + losses.dice_loss(logits, label), rtol=1e-6
  )


@pytest.mark.parametrize(
  "overrides, told",
  [
    ({"criterion__class_weights": "1,2"}, r"class_weights: got '1,2'; allowed: .*4 numbers"),
    ({"criterion__class_weights": "1,2,3,-1"}, "class_weights.*4 numbers of 0 or more"),
    ({"criterion__class_weights": "0,0,0,0"}, "class_weights"),
    ({"criterion__class_weights": "inverted"}, "'inverse', 'effective'"),
    ({"criterion__class_weights": "1,1,1,2", "criterion__name": "dice"}, "cross_entropy\\+dice"),
    ({"criterion__name": "cross_entropy+lovasz"}, "config.criterion.name: got 'lovasz'"),
    ({"criterion__focal_gamma": -1.0}, "focal_gamma"),
  ],
)
def test_what_cannot_be_meant_is_told(overrides, told):
  with pytest.raises(checks.InputError, match=told):
    build.build_criterion(make_config(**overrides), K)


@pytest.mark.parametrize(
  "method, option", [("learn_pseudo", None), ("cct", "method.bootstrapped"), ("cps", None)]
)
def test_a_criterion_that_a_method_would_not_use_is_told(method, option):
  config = configs.make_config(
    method, network="tiny", steps=10, overrides={option: True} if option else {}
  )
  config.criterion.update({"name": "cross_entropy+dice", "class_weights": "1,2,3,4"})
  frozen = configs.frozen(config)
  domain = types.SimpleNamespace(config=frozen, name="")
  if method == "cps":
    check_criterion(frozen, build.build_method(frozen, K))
    return
  with pytest.raises(checks.InputError) as told:
    build.build_pipelines([domain], build.build_method(frozen, K))
  options = dict(re.findall(r"--config\.([\w.]+)=(\w*)", str(told.value)))
  assert set(options) == {"criterion.name", "criterion.class_weights"}
  configs.override(config, options)
  frozen = configs.frozen(config)
  check_criterion(frozen, build.build_method(frozen, K))


def test_numbers_out_of_range_are_told_together():
  with pytest.raises(checks.InputError, match="oversampling_threshold(.|\n)*clip_norm"):
    make_config(optimizer__clip_norm=-1.0, oversampling_threshold=2.0)


@pytest.mark.parametrize("freeze", ["none", "encoder"])
def test_gradients_are_clipped_by_their_norm(freeze):
  clipped = build.build_optimizer(
    make_config(optimizer__clip_norm=0.5, optimizer__weight_decay=0.0, network__freeze=freeze)
  )
  params = {
    "backbone": {"conv": {"kernel": jnp.zeros(3)}},
    "head": {"conv": {"kernel": jnp.zeros(2)}},
  }
  of_backbone = jnp.zeros(3) if freeze == "encoder" else jnp.full(3, 2.0)
  gradient = {
    "backbone": {"conv": {"kernel": of_backbone}},
    "head": {"conv": {"kernel": jnp.full(2, 2.0)}},
  }
  for factor in (0.01, 1.0):
    scaled = jax.tree.map(lambda value: factor * value, gradient)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(scaled)))
    way, _ = clipped.transform.update(scaled, clipped.transform.init(params), params)
    expected = jax.tree.map(lambda value: value * min(1, 0.5 / norm), scaled)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), way, expected)
  without = build.build_optimizer(make_config(optimizer__weight_decay=0.0, network__freeze=freeze))
  states = [optimizer.transform.init(params) for optimizer in (clipped, without)]
  # or a run could not be resumed with another norm.
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.slow
def test_a_run_with_all_of_it_resumes_with_the_same_weights_and_ends_early(tmp_path, monkeypatch):
  options = {
    "criterion.name": "cross_entropy+dice",
    "criterion.class_weights": "effective",
    "oversampling_threshold": 0.9,
    "optimizer.clip_norm": 1.0,
    "optimizer.power": 0.0,
    "checkpoint_every_steps": 2,
    "eval_every_steps": 2,
    "evaluation.pictures": 0,
    "views.crop_size": (16, 16),
    "network.width": 4,
    "data.num_scenes": 12,
    "data.num_eval_scenes": 2,
    "batch_size_global.labeled": 8,
  }

  def train(name, steps, **changed):
    config = "configs/quickstart.py:method=supervised,labels=6"
    return pseudoseg_jax.train(config, tmp_path / name, options | {"total_steps": steps} | changed)

  evaluate = scoring.Scoring.__call__
  # Never better.
  monkeypatch.setattr(
    scoring.Scoring, "__call__", lambda self, state: evaluate(self, state)._replace(score=0.5)
  )

  # One run that is extended, rather than a second one to compare it with: that those agree is every
  # run's, see test_engine.
  train("run", 1, **{"optimizer.clip_norm": 0.0})
  results = train("run", 6, early_stopping_patience=1)
  saved = json.loads((tmp_path / "run" / "config.json").read_text())
  assert len([float(part) for part in saved["criterion"]["class_weights"].split(",")]) == 7
  log = (tmp_path / "run" / "log.txt").read_text()
  assert (
    log.count("class weights: background")
    == log.count("one pass over the 6 labeled images meets")
    == 2
  )
  for change in (
    "total_steps: 6 now",
    "early_stopping_patience: 1 now",
    "optimizer.clip_norm: 1.0 now",
  ):
    assert f"resumed with a change: {change}" in log
  assert "class_weights" not in log
  assert results["finished"] and results["last"]["step"] == 4 and results["best"]["step"] == 1
  assert (
    json.loads((tmp_path / "run" / "results.json").read_text())["ended_early"] and "Done: " in log
  )
  assert "ended at step 4 of 6: nothing better than step 1" in log and "ended before step 6" in log
