"""Measures how many images a second the input pipeline of a config delivers, and where its time
goes.

  python launch/input_rate.py --config=configs/voc.py:method=pseudoseg --config.data.root=DIR --seconds=10

Training waits for its input where this rate is below images of a step / seconds of a step
(launch/step_time.py). The table has each stage alone: the median milliseconds of one time, how many
times an unlabeled image meets it on average (the config's strong views and probabilities), and the
share of the sum. "decode" reads an image file, "crop" scales and crops, "jitter", "blur" and
"normalize" are of one view, "batch" copies one view.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time

import tensorflow as tf

# Before TensorFlow, whose options the package sets.
from pseudoseg_jax import build, config as configs, settings
from pseudoseg_jax.command_line import parse_with_overrides, run
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import geometry, photometry, pipeline, views

_REPEATS = 30


def _parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--config", required=True, help="config file with its argument")
  parser.add_argument(
    "--strong_views",
    type=int,
    help="strong views of an unlabeled image (default: what the method wants)",
  )
  parser.add_argument(
    "--seconds", type=float, default=10.0, help="how long to measure (default: 10)"
  )
  return parse_with_overrides(parser, arguments)


def _rate(spec: pipeline.PipelineSpec, seconds: float) -> float:
  """Images a second, of all streams together."""
  batches = pipeline.train_batches(spec)
  images = sum(len(stream["valid"]) for stream in next(batches).values())
  for _ in range(3):  # batches made while the first was compiled
    next(batches)
  begun, steps = time.perf_counter(), 0
  while time.perf_counter() - begun < seconds:
    next(batches)
    steps += 1
  return images * steps / (time.perf_counter() - begun)


def _milliseconds(make) -> float:
  """Median of `make(number)`, the first two calls aside."""
  taken = []
  for number in range(_REPEATS + 2):
    before = time.perf_counter()
    make(number)
    taken.append(1000 * (time.perf_counter() - before))
  return statistics.median(taken[2:])


def _stages(spec: pipeline.PipelineSpec) -> list[tuple[str, float, float]]:
  """(stage, milliseconds of one time, how many times an unlabeled image meets it)."""
  source = spec.unlabeled if spec.needs.unlabeled else spec.labeled
  images = [tf.constant(source.image(row)) for row in range(min(len(source), 8))]
  crop_size, look = spec.geometry.crop_size, spec.photometry
  signature = tf.TensorSpec((None, None, images[0].shape[-1]), images[0].dtype)

  @tf.function(input_signature=[signature, tf.TensorSpec((), tf.int64)], autograph=False)
  def crop(image, number):
    draws = geometry.draw(spec.geometry, tf.shape(image)[:2], tf.stack([number, number]))
    return geometry.crop(image, None, draws, crop_size, spec.geometry.convention)[:3:2]

  view, valid = crop(images[0], tf.constant(0, tf.int64))
  draws = photometry.draw(look, 1, tf.constant([0, 0], tf.int64))[0]
  jitter = tf.function(
    lambda rgb: photometry.color_jitter(rgb, draws, look.convention, valid), autograph=False
  )
  blur = tf.function(
    lambda rgb: photometry.gaussian_blur(rgb, draws.sigma, look.blur_sigma_pixels[1]),
    autograph=False,
  )
  batch = [view] * spec.batch_size_labeled_global
  strong = spec.needs.strong_views
  return [
    ("decode", _milliseconds(lambda number: source.image(number % len(source))), 1),
    (
      "crop",
      _milliseconds(
        lambda number: crop(images[number % len(images)], tf.constant(number, tf.int64))
      ),
      1,
    ),
    ("jitter", _milliseconds(lambda number: jitter(view)), strong * look.jitter_probability),
    ("blur", _milliseconds(lambda number: blur(view)), strong * look.blur_probability),
    (
      "normalize",
      _milliseconds(lambda number: views.normalized(view, valid, spec.mean, spec.std)),
      1 + strong,
    ),
    ("batch", _milliseconds(lambda number: tf.stack(batch)) / len(batch), 1 + strong),
  ]


def main(arguments=None) -> int:
  known, overrides = _parse(arguments)
  return run(lambda: _print_rates(known, overrides))


def _print_rates(known: argparse.Namespace, overrides: dict[str, str]) -> None:
  config = configs.frozen(configs.load(known.config, overrides))
  data = build.build_data(config.data)
  config, _ = settings.settle_from(config, data)
  spec = build.build_pipeline(
    config, data, build.build_method(config, len(data.classes), len(data.unlabeled))
  )
  if known.strong_views is not None:
    spec = dataclasses.replace(
      spec, unlabeled=data.unlabeled, needs=Needs(strong_views=known.strong_views)
    )
  cores = len(os.sched_getaffinity(0))
  height, width = spec.geometry.crop_size
  rate = _rate(spec, known.seconds)
  print(
    f"crop {height} x {width}, {spec.needs.strong_views} strong views, batches of {spec.batch_size_labeled_global} labeled"
    f" and {spec.batch_size_unlabeled_global if spec.needs.unlabeled else 0} unlabeled images"
  )
  print(f"{rate:.1f} images/s on {cores} cores, {rate / cores:.1f} images/s a core\n")
  stages = [(name, once, times, once * times) for name, once, times in _stages(spec)]
  total = sum(stage[-1] for stage in stages)
  print("| stage | ms once | times an image | ms an image | share |\n|---|---|---|---|---|")
  for name, once, times, together in stages:
    print(f"| {name} | {once:.2f} | {times:g} | {together:.2f} | {together / total:.0%} |")


if __name__ == "__main__":
  sys.exit(main())
