"""Several data sets with classes of their own in one run: their batches, their scores, and what
goes wrong.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pseudoseg_jax
from pseudoseg_jax import build, checks, config as configs, nets
from pseudoseg_jax.contract import Head, Method, Needs, Panel, Predictor, State
from pseudoseg_jax.data import synthetic
from pseudoseg_jax.methods.table import METHODS

SMALL = {
  "total_steps": 4,
  "log_every_steps": 2,
  "eval_every_steps": 2,
  "checkpoint_every_steps": 2,
  "network.width": 4,
  "views.crop_size": "33,33",
  "evaluation.batch_size": 8,
  "evaluation.pictures": 2,
  "data.num_scenes": 24,
  "data.num_labeled": 8,
  "data.num_eval_scenes": 9,
  "data.size": "40,48",
}
SHAPES = ("ground", "disc", "cross")


def supervised_domains(task):
  """Learns the labeled images of all domains: the network is the first one's, others have a
  classifier of its deepest map.
  """
  channels = nets.map_channels(task.network)[-1]
  numbers = range(1, 1 + len(task.other_classes))

  def head(classes):
    return Head(
      lambda key: ({"kernel": 0.1 * jax.random.normal(key, (channels, classes))}, {}), apply=None
    )

  def init(key):
    heads = {f"classifier_{number}": head(task.other_classes[number - 1]) for number in numbers}
    return State(step=jnp.zeros([], jnp.int32), nets={"student": nets.create(task, key, **heads)})

  def logits(net, maps, number, images):
    return task.network.upsample(
      maps[-1] @ net.params[f"classifier_{number}"]["kernel"], images.shape[1:3]
    )

  def draw(key, batch):
    assert all(batch[f"unlabeled_{number}"]["strong"].shape[1] == 1 for number in numbers)

  def update(state, batch, draws):
    def objective(live):
      (first,), net = nets.forward(task.network, live["student"], batch["labeled"]["image"])
      terms = {"supervised": task.criterion(first, batch["labeled"]["label"])}
      for number in numbers:
        labeled = batch[f"labeled_{number}"]
        (maps,), net = nets.encode(task.network, net, labeled["image"])
        scores = logits(net, maps, number, labeled["image"])
        terms[f"supervised_{number}"] = task.criterion(scores, labeled["label"])
      return nets.Outcome(terms, {"student": net})

    return nets.descend(task.optimizer, state, objective)

  def predictor(number):
    def predict(state, images):
      net = state.nets["student"]
      return logits(net, nets.infer_maps(task.network, net, images), number, images)

    return Predictor(predict, domain=number)

  def show(state, batch, draws):
    predicted = nets.infer(task.network, state.nets["student"], batch["unlabeled"]["weak"])
    panels = [
      Panel("other image", "image", batch["unlabeled_1"]["weak"]),
      Panel("prediction", "classes", jax.nn.softmax(predicted)),
    ]
    return panels, batch["unlabeled"]["valid"]

  predictors = nets.predictors(task.network, "student") | {
    f"student_{number}": predictor(number) for number in numbers
  }
  return Method(Needs(strong_views=1, domains=True), init, draw, update, predictors, show)


@pytest.fixture(autouse=True, scope="module")
def method_of_domains():
  with pytest.MonkeyPatch.context() as patched:
    patched.setitem(METHODS, "supervised_domains", supervised_domains)
    yield


def shape_of(label):
  """Of a class of the synthetic scenes, whose objects are a shape in one of three textures."""
  return np.where(label > 0, 1 + (label - 1) // 3, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
  """A folder of other scenes with three classes: 16 to train on, 9 to evaluate."""
  root = tmp_path_factory.mktemp("shapes")
  scenes = synthetic.SyntheticScenes(25, (44, 36), seed=5)
  for row in range(25):
    part = "train" if row < 16 else "test"
    for folder, pixels in {
      "images": scenes.image(row),
      "masks": shape_of(scenes.label(row)),
    }.items():
      (root / folder / part).mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(root / folder / part / f"{row}.png")
  (root / "classes.txt").write_text("\n".join(SHAPES))
  return root


def load(shapes, method="supervised_domains", **overrides):
  config = configs.load(f"configs/quickstart.py:method={method}", SMALL)
  config.other_data = {
    "shapes": configs.folder_data(
      root=str(shapes),
      classes="classes.txt",
      split="1_2",
      image_pattern="images/train/{id}.png",
      label_pattern="masks/train/{id}.png",
      eval_image_pattern="images/test/{id}.png",
      eval_label_pattern="masks/test/{id}.png",
    )
  }
  configs.override(config, overrides)
  return config


# --- batches --------------------------------------------------------------------------------------


def twins(**names):
  """A config whose further domains are synthetic scenes: name -> seed of the scenes."""
  config = configs.load("configs/quickstart.py:method=supervised_domains", SMALL)
  data = {key: value for key, value in config.data.to_dict().items() if key not in ("mean", "std")}
  config.other_data = {name: data | {"scenes_seed": seed} for name, seed in names.items()}
  return config


def batches(config, start_step=0):
  config = configs.frozen(config)
  domains = build.build_domains(config)
  method = build.build_method(config, 7, other_classes=[7] * (len(domains) - 1))
  return build.batches(*build.build_pipelines(domains, method))(start_step)


def assert_equal(first, second):
  assert first.keys() == second.keys()
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_first_domain_s_batches_are_those_of_a_run_without_others():
  path = "configs/quickstart.py:method=mean_teacher,convention=official"
  alone = configs.frozen(configs.load(path, SMALL))
  data = build.build_data(alone.data)
  spec = build.build_pipeline(alone, data, build.build_method(alone, 7))
  for expected, batch, _ in zip(
    build.batches(spec)(0), batches(twins(b=1)), range(2), strict=False
  ):
    assert set(batch) == {"labeled", "unlabeled", "labeled_1", "unlabeled_1"}
    assert_equal(expected, {name: batch[name] for name in ("labeled", "unlabeled")})
    for name in ("labeled", "unlabeled"):
      assert jax.tree.map(np.shape, batch[f"{name}_1"]) == jax.tree.map(np.shape, batch[name])


def test_domains_draw_apart_and_by_their_names():
  few, more = next(batches(twins(b=0))), next(batches(twins(a=1, b=0)))
  # The very same images, in another order and other crops.
  assert np.any(few["labeled"]["image"] != few["labeled_1"]["image"])
  assert_equal(few["labeled_1"], more["labeled_2"])  # domains are numbered by name: a, b
  assert_equal(few["unlabeled_1"], more["unlabeled_2"])


def test_batches_go_on_at_any_step_and_are_shared_among_processes(monkeypatch):
  stream = batches(twins(b=1))
  next(stream)
  second = next(stream)
  assert_equal(second, next(batches(twins(b=1), start_step=1)))
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  parts = []
  for index in range(2):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    parts.append(next(batches(twins(b=1), start_step=1)))
  assert_equal(second, jax.tree.map(lambda *rows: np.concatenate(rows), *parts))


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  assert pseudoseg_jax.train(load(shapes), workdir)["finished"]
  return workdir


def test_every_domain_is_scored_in_its_own_classes(trained):
  results = json.loads((trained / "results.json").read_text())
  assert list(results["last"]["predictors"]) == ["student"]
  assert set(results["last"]["predictors"]["student"]["iou"]) == set(synthetic.CLASSES.names)
  shapes = results["domains"]["shapes"]
  assert shapes["split"].endswith("8 labeled, 8 unlabeled")
  for series in ("last", "best"):
    assert set(shapes[series]["predictors"]["student_1"]["iou"]) == set(SHAPES)
    assert shapes[series]["step"] == results[series]["step"]
  assert (trained / "scores.csv").read_text().startswith("class,student\n")
  told = {
    name
    for line in (trained / "history.jsonl").read_text().splitlines()
    for name in json.loads(line)
  }
  assert {
    "evaluation/student/miou",
    "evaluation/shapes/student_1/miou",
    "evaluation/shapes/student_1/iou/disc",
  } <= told
  log = (trained / "log.txt").read_text()
  assert "step 4, shapes (" in log and "evaluating 18 images" in log
  assert len((trained / "lists" / "shapes" / "labeled.txt").read_text().split()) == 8
  assert (trained / "pictures" / "panels.png").exists()


@pytest.mark.slow
def test_the_same_command_again_keeps_the_scores_of_all_domains(shapes, trained):
  before = (trained / "results.json").read_text()
  pseudoseg_jax.train(load(shapes), trained)
  assert (trained / "results.json").read_text() == before


def test_evaluate_agrees_with_training_on_all_domains(trained):
  scores = pseudoseg_jax.evaluate(trained, checkpoint="last")
  results = json.loads((trained / "results.json").read_text())
  again = json.loads(next((trained / "evaluations").glob("*/last/results.json")).read_text())
  assert list(scores) == ["student", "student_1"]
  for name, of_domain in (
    ("student", lambda results: results),
    ("student_1", lambda results: results["domains"]["shapes"]),
  ):
    entry = of_domain(results)["last"]
    np.testing.assert_allclose(scores[name].miou, entry["predictors"][name]["miou"], rtol=1e-6)
    assert of_domain(again)["last"]["step"] == 4 and again["domains"]["shapes"]["split"]


def test_a_predictor_segments_in_the_classes_of_its_domain_without_any_data(trained):
  image = np.random.default_rng(0).integers(0, 256, (37, 51, 3), np.uint8)
  first, other = pseudoseg_jax.load(trained), pseudoseg_jax.load(trained, predictor="student_1")
  assert (first.name, first.classes, other.classes.names) == ("student", synthetic.CLASSES, SHAPES)
  assert first.probabilities(image).shape == (37, 51, 7) and other.probabilities(image).shape == (
    37,
    51,
    3,
  )


def test_the_first_domain_s_network_can_be_exported_and_stands_alone(trained, tmp_path):
  pseudoseg_jax.export(trained, tmp_path / "net", checkpoint="last")
  scores = pseudoseg_jax.evaluate(tmp_path / "net")
  expected = json.loads((trained / "results.json").read_text())["last"]["predictors"]["student"]
  np.testing.assert_allclose(scores["student"].miou, expected["miou"], rtol=1e-6)
  with pytest.raises(checks.InputError, match="predictor: got 'student_1'; allowed: student"):
    pseudoseg_jax.export(trained, tmp_path / "other", predictor="student_1")


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("method", "overrides", "said"),
  [
    ("cps", {}, ["method 'cps'", "config.other_data: got shapes", "config of one data set"]),
    (
      "supervised_domains",
      {"other_data.shapes.root": "/nowhere"},
      ["domain 'shapes'", "config.other_data.shapes.root", "/nowhere"],
    ),
    (
      "supervised_domains",
      {"other_data.shapes.split": "lst.txt"},
      ["config.other_data.shapes.split", "'lst.txt'"],
    ),
    (
      "supervised_domains",
      {"other_data.shapes.channels": 1},
      ["config.other_data.shapes.channels: got 1; allowed: 3"],
    ),
  ],
)
def test_a_domain_that_does_not_fit_is_named(shapes, tmp_path, method, overrides, said):
  with pytest.raises(checks.InputError) as error:
    pseudoseg_jax.train(load(shapes, method, **overrides), tmp_path / "w")
  assert all(part in str(error.value) for part in said), error.value
  assert not (tmp_path / "w").exists()


def test_a_method_of_several_domains_wants_them(tmp_path):
  with pytest.raises(checks.InputError, match="at least one further domain.*configs/domains.py"):
    pseudoseg_jax.train("configs/quickstart.py:method=supervised_domains", tmp_path / "w", SMALL)


def test_an_unknown_option_of_a_domain_gets_the_nearest(shapes):
  with pytest.raises(checks.InputError, match="did you mean 'other_data.shapes.root'"):
    load(shapes, **{"other_data.shapes.rot": "x"})


def test_a_network_of_other_classes_is_not_scored(trained, shapes, tmp_path):
  (shapes / "four.txt").write_text("\n".join((*SHAPES, "more")))
  with pytest.raises(
    checks.InputError,
    match="config.other_data.shapes.classes: got 4 classes; allowed: the 3 of the network",
  ):
    pseudoseg_jax.evaluate(trained, overrides={"other_data.shapes.classes": "four.txt"})


# --- configs/domains.py ---------------------------------------------------------------------------


def test_the_config_of_two_domains_is_the_first_s_with_the_second_s_data():
  argument = "first=camvid,first_split=1_16,second=voc,second_split=92,second_recipe=pseudoseg"
  config = configs.load(
    f"configs/domains.py:{argument},method=mean_teacher,convention=official",
    {"data.root": "here", "other_data.voc.root": "there", "other_data.voc.split_seed": "3"},
  )
  first = configs.load(
    "configs/camvid.py:split=1_16,method=mean_teacher,convention=official", {"data.root": "here"}
  )
  different = configs.differences(config, first)
  assert different and all(line.startswith("other_data.voc.") for line in different)
  second = configs.load(
    "configs/voc.py:split=92,recipe=pseudoseg", {"data.root": "there", "data.split_seed": 3}
  ).data.to_dict()
  assert config.other_data.voc.to_dict() == {
    name: value for name, value in second.items() if name not in ("mean", "std")
  }


@pytest.mark.parametrize(
  ("argument", "said"),
  [
    ("second=quikstart", "second: got 'quikstart'.*did you mean 'quickstart'"),
    ("thrd=voc,first=camvid", "'thrd'"),
    ("method=supervised,second_splt=1_8,second=voc", "did you mean 'split'"),
  ],
)
def test_a_wrong_argument_of_the_config_of_two_domains_is_explained(argument, said):
  with pytest.raises(checks.InputError, match=f"(?s){said}"):
    configs.load(f"configs/domains.py:method=supervised,{argument}")
