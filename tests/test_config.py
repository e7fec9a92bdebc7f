"""Configs cannot rot: each one loads with every method and makes a network."""

import pathlib

import jax
import pytest

from pseudoseg_jax import api, build, checks, config as configs, options, starting
from pseudoseg_jax.data import splits
from pseudoseg_jax.methods import mean_teacher
from pseudoseg_jax.methods.table import METHODS


def without(options, absent):
  """Nested options as an older release saved them."""
  return {
    name: without(value, absent) if isinstance(value, dict) else value
    for name, value in options.items()
    if name not in absent
  }


@pytest.mark.parametrize(
  "path",
  ["quickstart.py:method=gct", "camvid.py:method=cps", "voc.py:method=learn_pseudo,form=tfds"],
)
def test_a_config_of_an_older_release_is_completed_by_defaults(path):
  new = configs.load(f"configs/{path}")
  added = (
    "labeled_every",
    "nets_from",
    "pseudo_labels",
    "classifier_multiplier",
    "labeled_photometry",
    "eval_boxes",
    "dilations",
  )
  old = configs.ConfigDict(without(configs.load(f"configs/{path}").to_dict(), added))
  assert configs.differences(new, old)
  left = configs.differences(new, configs.fill_missing_defaults(old))
  assert all(
    line.startswith(("optimizer.classifier_multiplier: 10", "data.eval_boxes")) for line in left
  ), left


CONFIGS = sorted(
  path.name
  for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
  if path.stem != "pipelines"
)
ARGUMENTS = [f"method={name}" for name in METHODS] + [
  f"method=mean_teacher,convention={name}" for name in mean_teacher.CONVENTIONS
]


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_every_method(name, argument):
  config = configs.load(f"configs/{name}:{argument}")
  frozen = configs.frozen(config)
  sizes = options.BatchSizes(labeled=8, unlabeled=8)
  build.check_run(options.replaced(frozen, {"batch_size_global": sizes}))
  method = build.build_method(frozen, 21)
  state = jax.eval_shape(method.init, jax.random.key(0))
  assert state.nets and method.predictors
  assert not configs.differences(config, configs.from_json(configs.to_json(config)))
  assert configs.to_json(frozen) == configs.to_json(config)


def test_the_published_voc_schedule():
  # 1/16 of 10582 labeled: 32 epochs of 1240 steps. [CPS, schedule of the official scripts]
  config = configs.load("configs/voc.py:method=cps,split=1_16")
  assert (config.total_steps, config.views.crop_size, config.method.weight) == (
    32 * 1240,
    (512, 512),
    1.5,
  )


def test_the_published_pseudoseg_settings():
  # README and flags of googleinterns/wss: 16 GPUs with 4 + 4 images, poly from 0.007 in 30000
  # steps, L2 4e-5, crops of 513.
  config = configs.load("configs/voc.py:method=pseudoseg,split=183")
  assert (config.total_steps, config.batch_size_global.to_dict()) == (
    30_000,
    {"labeled": 64, "unlabeled": 64},
  )
  assert (
    config.optimizer.learning_rate,
    config.optimizer.weight_decay,
    config.views.crop_size,
  ) == (0.007, 4e-5, (513, 513))
  assert (config.network.name, config.views.convention, config.views.jitter_probability) == (
    "deeplabv3plus_tf",
    "tensorflow",
    1.0,
  )
  assert len(splits.read_list(splits.published(config.data.split))) == 183
  assert config.data.label_pattern.split("/")[-2] == "SegmentationClass"
  coco = configs.load("configs/coco.py:split=1_512")
  assert (coco.total_steps, coco.evaluation.window_pixels, coco.method.name) == (
    200_000,
    (641, 641),
    "pseudoseg",
  )
  assert len(splits.read_list(splits.published(coco.data.split))) == 232


@pytest.mark.parametrize("recipe", ["cutmix_seg", "classmix", "ael", "cct", "unimatch"])
def test_a_method_trains_on_cityscapes_as_its_code_does_and_on_request_as_cps(recipe):
  own, cps = (
    configs.load(f"configs/cityscapes.py:method={recipe}{argument}")
    for argument in ("", ",recipe=cps")
  )
  assert own.method.name == cps.method.name == recipe
  assert cps.views.crop_size == (800, 800) and own.views.crop_size != (800, 800)
  # Published code crops to these. [cutmix, classmix, ael, cct, unimatch]
  sides = {
    "cutmix_seg": (256, 512),
    "classmix": (512, 1024),
    "ael": (769, 769),
    "cct": (320, 320),
    "unimatch": (801, 801),
  }
  assert own.views.crop_size == sides[recipe]


def test_frozen_batch_norm_without_weights_is_told(caplog):
  config = configs.load("configs/quickstart.py:method=cutmix_seg")
  starting.starting_weights(configs.frozen(config), 7)
  assert "frozen" not in caplog.text
  configs.override(config, {"method.frozen_batch_norm": "all"})
  starting.starting_weights(configs.frozen(config), 7)
  assert "batch norm is frozen" in caplog.text


def test_pseudoseg_runs_on_the_network_of_cps_and_supervised_on_its_own():
  assert configs.load("configs/voc.py:method=pseudoseg,recipe=cps").network.name == "deeplabv3plus"
  assert (
    configs.load("configs/voc.py:method=supervised,recipe=pseudoseg").network.name
    == "deeplabv3plus_tf"
  )
  config = configs.load("configs/voc.py:method=pseudoseg,network=deeplabv3plus,backbone=resnet101")
  assert (config.network.name, config.network.backbone, config.total_steps) == (
    "deeplabv3plus",
    "resnet101",
    30_000,
  )


@pytest.mark.parametrize(
  "name, count", [("92", 92), ("183", 183), ("366", 366), ("732", 732), ("1464", 1464)]
)
def test_the_published_lists_have_their_lengths(name, count):
  ids = splits.read_list(splits.published(f"voc2012/pseudoseg/{name}"))
  assert len(ids) == count and set(ids) <= set(
    splits.read_list(splits.published("voc2012/pseudoseg/1464"))
  )


def test_heads_pspnets_pyramid_and_the_classifiers_biases_have_rates_of_their_own():
  config = configs.load("configs/voc.py:method=pseudoseg", {"optimizer.head_multiplier": 3.0})
  optimizer = build.build_optimizer(configs.frozen(config))
  rates = {
    "classifier/bias": 6,
    "head/classifier/bias": 6,
    "head/classifier/kernel": 3,
    "head/low/bn/bias": 3,
    "backbone/psp/unit/conv/kernel": 3,
    "backbone/conv1/kernel": 1,
    "backbone/pspace/kernel": 1,
  }
  assert {path: optimizer.multiplier(path) for path in rates} == rates


def test_image_labels_are_refused_where_a_method_cannot_use_them():
  for method in ("mean_teacher", "supervised"):
    with pytest.raises(checks.InputError, match="image_labels"):
      configs.load(f"configs/quickstart.py:method={method},image_labels=1")


def test_overrides_take_the_type_of_what_they_replace():
  config = configs.load(
    "configs/quickstart.py:method=cps",
    {
      "optimizer.learning_rate": "1",
      "views.crop_size": "(48,32)",
      "views.flip": "false",
      "method.on_labeled": False,
      "seed": 7,
    },
  )
  assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
  assert config.views.crop_size == (48, 32)
  assert (config.views.flip, config.method.on_labeled, config.seed) == (False, False, 7)


def test_all_wrong_overrides_are_told_at_once():
  with pytest.raises(checks.InputError) as error:
    configs.load(
      "configs/quickstart.py",
      {"totl_steps": 1, "views.flip": "perhaps", "method": 2, "seed.more": 1},
    )
  for part in (
    "'total_steps'",
    "'perhaps'; allowed: bool",
    "config.method.NAME",
    "config.seed.more",
  ):
    assert part in str(error.value)


def test_a_workdir_s_config_differs_by_named_options():
  ours, theirs = (configs.load("configs/quickstart.py", {"seed": seed}) for seed in (0, 1))
  assert configs.differences(ours, theirs) == ["seed: 0 now, 1 there"]


@pytest.mark.parametrize(
  "name", ["quickstart", "quickstart.py", "configs/quickstart.py", "configs/quickstart"]
)
def test_a_config_that_is_installed_is_found_by_name_and_a_path_wins(monkeypatch, tmp_path, name):
  monkeypatch.chdir(tmp_path)
  assert configs.load(f"{name}:method=cps").method.name == "cps"
  own = tmp_path / pathlib.Path(name)
  own.parent.mkdir(exist_ok=True)
  own.write_text("""
from pseudoseg_jax import config as configs
def get_config(argument):
  return configs.make_config("vat")
""")
  assert configs.load(name).method.name == (
    "vat" if own.suffix else configs.load("configs/quickstart.py").method.name
  )


@pytest.mark.parametrize(
  ("path", "told"),
  [
    ("quickstat", "did you mean 'quickstart'"),
    ("", "camvid, "),
    ("no/such.py", "no/such.py"),
    ("here/quickstat.py", "here/quickstart.py"),
    ("voc.json", "voc.json"),
  ],
)
def test_a_config_that_is_nowhere_is_told_with_those_there_are(monkeypatch, tmp_path, path, told):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "here").mkdir()
  (tmp_path / "here" / "quickstart.py").touch()
  with pytest.raises(checks.InputError, match="no such config") as error:
    configs.load(path)
  assert told in str(error.value)


@pytest.mark.parametrize("value", ["0.5,abc", "nan,1", "True,False", "", ("a",), "inf"])
@pytest.mark.parametrize(
  "key",
  ["views.scales", "views.crop_size", "evaluation.scales", "data.mean", "views.blur_sigma_pixels"],
)
def test_several_values_are_numbers(key, value):
  config = configs.load("configs/quickstart.py")
  with pytest.raises(checks.InputError, match=f"config.{key}"):
    configs.override(config, {key: value})


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("views.crop_size", "32.5,32"),
    ("views.crop_size", "32"),
    ("views.crop_size", "0,32"),
    ("data.size", "40.5,64"),
    ("data.size", "64"),
    ("evaluation.window_pixels", "32"),
    ("evaluation.window_pixels", "1.5,2"),
    ("method.grid", "8.5,8"),
    ("method.grid", "8"),
  ],
)
def test_sizes_are_two_whole_numbers(tmp_path, key, value):
  with pytest.raises(checks.InputError, match=key.rpartition(".")[2]):
    api.train(
      "configs/quickstart.py:method=temporal_ensembling",
      tmp_path / "run",
      {key: value, "total_steps": 1},
    )
