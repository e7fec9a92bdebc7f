"""Images of many sizes: how many canvases they take, what runs on them, and that scores do not
change; ends of evaluations.
"""

import functools
import logging
import math
import shlex
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pseudoseg_jax import build, config as configs
from pseudoseg_jax.builders import evaluation
from pseudoseg_jax.data.classes import Classes
from pseudoseg_jax.evaluation import evaluator, inference
from pseudoseg_jax.evaluation.inference import Protocol
from pseudoseg_jax.evaluation.predictor import Predictor

CLASSES = Classes(("red", "green", "blue"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
RAW = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


class Scenes:
  """Random images and labels of given sizes, made when asked for."""

  channels, dtype, has_labels = 3, np.uint8, True

  def __init__(self, sizes):
    self.sizes, self.ids = sizes, tuple(map(str, range(len(sizes))))

  def __len__(self):
    return len(self.sizes)

  def size(self, row):
    return self.sizes[row]

  def image(self, row):
    return np.random.default_rng(row).integers(0, 256, (*self.sizes[row], 3), dtype=np.uint8)

  def label(self, row):
    return np.random.default_rng(row + 1000).integers(0, 3, self.sizes[row], dtype=np.uint8)


def network(state, images):
  """A small network whose scores depend on all of a window."""
  kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 3, 3)), jnp.float32)
  mixed = jax.lax.conv_general_dilated(
    images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  return jnp.tanh(mixed) + 3 * mixed.mean((1, 2), keepdims=True)


def make(sizes, protocol, predict=network, batch_size=3, **options):
  return evaluator.make_evaluator(
    {"x": predict},
    Scenes(sizes),
    CLASSES,
    protocol=protocol,
    batch_size=batch_size,
    **RAW,
    **options,
  )


def sizes_of(count, least, most, seed=0):
  return [
    tuple(size)
    for size in np.random.default_rng(seed).integers(least, most + 1, (count, 2)).tolist()
  ]


def canvases(sizes, protocol):
  return {inference.canvas_size(size, protocol) for size in sizes}


# Which canvases there are


@pytest.mark.parametrize("style", ["slide", "center_crop"])
@pytest.mark.parametrize(("least", "most"), [(176, 400), (20, 4000), (500, 510), (1, 9)])
@pytest.mark.parametrize("multiple", [1, 14])
def test_many_sizes_share_few_canvases(style, least, most, multiple):
  sizes = sizes_of(500, least, most)
  protocol = Protocol(style, (321, 300), pad_multiple=multiple)
  own = [inference.canvas_size(size, protocol) for size in sizes]
  got, said = inference.bounded(protocol, sizes)
  chosen = [inference.canvas_size(size, got) for size in sizes]
  assert len(set(chosen)) <= 4 and all(
    c[0] >= o[0] and c[1] >= o[1] for c, o in zip(chosen, own, strict=True)
  )
  assert all(side in (321, 300) or side % multiple == 0 for canvas in chosen for side in canvas)
  # All on the largest: 3.5 times, of 20..4000 pixels.
  assert sum(map(math.prod, chosen)) < 2.3 * sum(map(math.prod, own))
  assert bool(said) == (len(set(own)) > 4) and (not said or "scores stay the same" in said)
  assert inference.bounded(got, sizes) == (got, "")
  assert inference.describe(got) == inference.describe(protocol)


def test_a_huge_image_has_a_canvas_of_its_own():
  sizes = [*sizes_of(200, 300, 400), (6000, 8000), *sizes_of(50, 900, 1000)]
  protocol, _ = inference.bounded(Protocol("slide", (321, 321)), sizes)
  huge = [size for size in sizes if math.prod(inference.canvas_size(size, protocol)) > 2e6]
  assert huge == [(6000, 8000)] and inference.canvas_size(huge[0], protocol) == (6000, 8000)


def test_batches_on_huge_canvases_have_few_images():
  score = make([(100, 100)] * 9 + [(9000, 12_000)] * 5, Protocol("slide", (90, 90)), batch_size=4)
  assert score.batch_sizes == {(100, 100): 4, (9000, 12_000): 1}
  assert make([(100, 100)] * 3, Protocol("slide", (90, 90)), batch_size=8).batch_sizes == {
    (100, 100): 3
  }


def test_canvases_of_thousands_of_sizes_are_soon_chosen():
  started = time.process_time()
  protocol, _ = inference.bounded(Protocol("slide", (321, 321)), sizes_of(20_000, 300, 5000))
  assert len(protocol.canvases) <= 4 and time.process_time() - started < 5


def test_sizes_that_come_later_have_a_canvas_too():
  protocol, _ = inference.bounded(Protocol("slide", (50, 50)), sizes_of(40, 60, 100))
  assert inference.canvas_size((300, 20), protocol) == (300, 50)
  assert inference.canvas_size((60, 60), protocol) in protocol.canvases


# What is computed on them


@pytest.mark.parametrize(
  "protocol",
  [
    Protocol("slide", (24, 20)),
    Protocol(
      "slide",
      (24, 20),
      stride_fraction=0.5,
      flip=True,
      summed="probabilities",
      stride_rounding="down",
    ),
    Protocol("center_crop", (24, 20)),
  ],
  ids=["slide", "flip", "center_crop"],
)
def test_scores_are_those_of_every_size_on_its_own(protocol):
  sizes = [(30, 41), (25, 22), (43, 21), (20, 38), (52, 33)]
  score = make(sizes, protocol, batch_size=2)
  assert len(score.batch_sizes) < len(canvases(sizes, protocol))
  rows = range(len(sizes))
  together = score.predictions(None, rows)["x"]
  shown, found = score(None)["x"].matrix, np.zeros((3, 3), np.int64)
  for row in rows:
    alone = Predictor(functools.partial(network, None), CLASSES, protocol=protocol, **RAW)
    ids = alone.predict(score.source.image(row))
    seen = together[row] != 255
    assert seen.all() or protocol.style == "center_crop"
    if protocol.style != "center_crop":  # of which the predictor segments all
      np.testing.assert_array_equal(together[row], ids)
    np.add.at(found, (score.source.label(row)[seen], together[row][seen]), 1)
  np.testing.assert_array_equal(shown, found)


def test_windows_that_no_image_needs_are_not_run():
  ran = []

  def watched(state, images):
    jax.debug.callback(lambda x: ran.append(len(x)), images)
    return network(state, images)

  # On the canvas of the largest image there would be 25 windows for each.
  sizes = (
    [(20, 20)] * 9
    + [(20, 33)] * 3
    + [(33, 33)] * 3
    + [(60, 60)] * 3
    + [(22, 59), (23, 58), (50, 56)]
  )
  protocol = Protocol("slide", (20, 20), stride_fraction=0.5)._replace(canvases=((60, 60),))
  score = make(sizes, protocol, watched)
  score(None)
  jax.effects_barrier()
  needed = sum(inference.windows_needed(size, protocol) for size in sizes)
  assert len(score.batch_sizes) == 1 and needed <= sum(ran) <= 1.2 * needed < 25 * len(sizes) / 2


def test_it_compiles_once_for_images_of_many_sizes():
  traces = []
  count = lambda state, images: (traces.append(images.shape), network(state, images))[1]
  sizes = sizes_of(30, 18, 30)
  score = make(sizes, Protocol("slide", (24, 24)), count)
  score(None)
  score.predictions(None, [3, 0, 7])
  list(score.stream(None, range(30)))
  # To be traced takes two looks at the network, and scores and confidences are two programs.
  assert len(score.batch_sizes) == 1 and len(traces) <= 2 * 2


# What is told


def test_shared_canvases_are_told_at_the_first_scores(caplog):
  score = make(sizes_of(30, 18, 30), Protocol("slide", (24, 24)))
  with caplog.at_level(logging.INFO, "pseudoseg_jax"):
    score(None)
    assert (
      "to compile for 1 size instead of" in caplog.text and "scores stay the same" in caplog.text
    )
    caplog.clear()
    score(None)
    assert not caplog.text
  for protocol in (Protocol("slide", (24, 24)), Protocol()):
    assert not make([(20, 30), (30, 20)], protocol).remarks


@pytest.mark.parametrize(
  "options",
  [
    {"style": "whole"},
    {"style": "whole", "pad_multiple": "3"},
    {"style": "slide", "edges": "cut", "window_pixels": "(24, 24)"},
    {"style": "pad_to_crop", "window_pixels": "(24, 24)"},
    {"preset": "unimatch_voc"},
    {"preset": "unimatch_v2_voc"},
    {"preset": "unimatch_cityscapes"},
  ],
  ids=lambda options: "-".join(options.values()),
)
def test_the_way_to_fewer_sizes_can_be_followed(options):
  sizes = sizes_of(40, 20, 90)
  config = configs.base(configs.method("supervised"))
  configs.override(config, {f"evaluation.{key}": value for key, value in options.items()})

  def made():
    frozen = configs.frozen(config)
    return make(
      sizes,
      build.build_protocol(frozen),
      flags=functools.partial(evaluation._protocol_flags, frozen),
    )

  many = made()
  (remark,) = many.remarks
  said = remark.partition("; ")[2].partition(" makes them ")
  assert remark.startswith(
    f"{len(many.batch_sizes)} image sizes"
  ) and many.protocol == build.build_protocol(configs.frozen(config))
  flags = shlex.split(said[0])
  assert "--config.evaluation.pad_multiple=" in said[0] and "may change" in said[2]
  configs.override(config, dict(flag.removeprefix("--config.").split("=", 1) for flag in flags))
  few = made()
  assert not few.remarks and len(few.batch_sizes) == int(said[2].split(",")[0]) < len(
    many.batch_sizes
  )
  before, after = (
    shown.protocol._replace(pad_multiple=1, window_pixels=None) for shown in (many, few)
  )
  assert (
    before == after and few.protocol.pad_multiple % (32 * few.protocol.multiple_pixels // 2) == 0
  )


# Ends


class Stopped(Exception):
  pass


@pytest.fixture
def alarm():
  """Raises Stopped in the main thread after some seconds, whatever it is at."""

  def ring(*_):
    raise Stopped

  before = signal.signal(signal.SIGALRM, ring)
  yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
  signal.setitimer(signal.ITIMER_REAL, 0)
  signal.signal(signal.SIGALRM, before)


def running():
  return [
    thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")
  ]


@pytest.mark.parametrize("where", ["read", "consumer", "consumer of a stream"])
def test_errors_end_an_evaluation_with_its_threads(where, monkeypatch):
  score, read = make([(20, 20)] * 60, Protocol("slide", (16, 16)), batch_size=2), []
  score.predictions(None, [0])  # compiles
  before, started = running(), time.perf_counter()
  image = score.source.image

  def raises(self, count):
    raise Stopped

  def slow(row):
    time.sleep(0.02)
    read.append(row)
    if where == "read" and len(read) == 9:
      raise KeyboardInterrupt
    return image(row)

  score.source.image = slow
  with pytest.raises((KeyboardInterrupt, Stopped)):
    if where == "read":
      score(None)
    elif where == "consumer":
      monkeypatch.setattr(evaluator.Progress, "more", raises)
      score(None)
    else:
      for number, _ in enumerate(score.stream(None, range(60))):
        if number == 3:
          raise Stopped
  assert running() == before and len(read) < 40 and time.perf_counter() - started < 20


def test_a_signal_ends_an_evaluation_while_the_device_computes(alarm):
  def slow(state, images):
    work = jax.lax.fori_loop(
      0, 300, lambda _, x: jnp.tanh(x @ x), jnp.full((300, 300), 0.01) + images[0, 0, 0, 0]
    )
    return network(state, images) + 0 * work[0, 0]

  score = make([(20, 20)] * 100, Protocol(), slow, batch_size=1)
  score.predictions(None, [0])  # compiles
  started = time.perf_counter()
  score.predictions(None, [0, 1])
  of_two = time.perf_counter() - started
  alarm(of_two)
  started = time.perf_counter()
  with pytest.raises(Stopped):
    score(None)
  assert time.perf_counter() - started < 15 * of_two and not running()


def test_a_signal_ends_an_evaluation_while_files_are_read(alarm):
  score = make([(20, 20)] * 400, Protocol(), batch_size=1)
  score.predictions(None, [0])
  image = score.source.image
  score.source.image = lambda row: (time.sleep(0.3), image(row))[1]
  alarm(0.5)
  started = time.perf_counter()
  with pytest.raises(Stopped):
    score(None)
  assert time.perf_counter() - started < 5 and not running()
