"""What errors advise: every option and command they name exists, and the advice, followed to the
letter, works.
"""

import ast
import pathlib
import re

import numpy as np
import pytest
from options import known_options
from PIL import Image

from pseudoseg_jax import build, checks, config as configs, settings

PACKAGE = pathlib.Path(build.__file__).parent
SOURCES = sorted(
  [
    *PACKAGE.rglob("*.py"),
    *(PACKAGE.parent / "launch").glob("*.py"),
    *(PACKAGE.parent / "configs").glob("*.py"),
  ]
)
OPTION = re.compile(r"config\.([a-z_]+(?:\.[a-z_]+)*)(?![\w.{*]|\()")


def texts(path):
  """All string constants of a file, those of f-strings too, with the lines they stand in."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.lineno, node.value


def test_every_option_that_a_text_names_exists():
  known = known_options()
  groups = {
    option.rsplit(".", count)[0] for option in known for count in range(1, option.count(".") + 1)
  }
  unknown = [
    f"{path.name}:{line}: config.{option}"
    for path in SOURCES
    for line, text in texts(path)
    for option in OPTION.findall(text)
    if option not in known | groups
    and option not in ("json", "py")
    and not option.startswith("other_data.")
  ]
  assert not unknown


def test_every_command_that_a_text_names_exists():
  named = {
    name
    for path in SOURCES
    for _, text in texts(path)
    for name in re.findall(r"python -m pseudoseg_jax\.(\w+)", text)
  }
  assert {"main", "predict", "export_labels", "check_data"} <= named
  assert not {name for name in named if not (PACKAGE / f"{name}.py").is_file()}
  scripts = {
    name
    for path in SOURCES
    for _, text in texts(path)
    for name in re.findall(r"python launch/(\w+)\.py", text)
  }
  assert scripts and not {
    name for name in scripts if not (PACKAGE.parent / "launch" / f"{name}.py").is_file()
  }


# --- followed to the letter -----------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
  """A folder that trains: four images, masks of three classes."""
  rng = np.random.default_rng(0)
  for folder in ("images", "masks"):
    (tmp_path / folder).mkdir()
  for index in range(4):
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(
      tmp_path / f"images/s{index}.png"
    )
    Image.fromarray(rng.integers(0, 3, (20, 24), np.uint8)).save(tmp_path / f"masks/s{index}.png")
  (tmp_path / "classes.txt").write_text("background\nred\ngreen\n")
  (tmp_path / "labeled.txt").write_text("s0\ns1\n")
  (tmp_path / "val.txt").write_text("s2\n")
  return tmp_path


def open_data(tree, options, argument="method=supervised,network=tiny,crop=33"):
  """What training does before its first step."""
  config = configs.load(f"{PACKAGE.parent}/configs/folder.py:{argument}")
  configs.override(
    config, {"data.root": str(tree), "data.image_pattern": "images/{id}.png"} | options
  )
  problems = checks.Problems("the config cannot be run")
  config = configs.frozen(config, problems)
  build.check_run(config, problems)
  domains = build.build_domains(config)
  data = domains[0].data
  config, _ = settings.settle_from(config, data)
  method = build.build_method(config, len(data.classes), len(data.unlabeled))
  build.build_pipelines(build.with_config(domains, config), method)
  for source in (data.labeled, data.evaluated):
    for row in range(len(source)):
      source.image(row), source.label(row)
  for row in range(len(data.unlabeled)):
    data.unlabeled.image(row)


def for_each(tree, folder, change):
  for path in sorted((tree / folder).iterdir()):
    change(path)


def masks(tree, function):
  for_each(
    tree, "masks", lambda path: Image.fromarray(function(np.asarray(Image.open(path)))).save(path)
  )


def images(tree, suffix, function):
  for_each(
    tree,
    "images",
    lambda path: np.save(path.with_suffix(suffix), function(np.asarray(Image.open(path)))),
  )
  return {"data.image_pattern": f"images/{{id}}{suffix}"}


def classes(tree, text):
  (tree / "classes.txt").write_text(text)


def tags(tree, *lines):
  (tree / "tags.csv").write_text("\n".join(lines) + "\n")


def turned(tree):
  exif = Image.Exif()
  exif[0x0112] = 6
  for path in sorted((tree / "images").iterdir()):
    image = Image.open(path).convert("RGB")
    image.load()
    image.save(path, exif=exif)


WITH_TAGS = {"method.image_labels": "True", "data.image_labels": "tags.csv"}
PSEUDOSEG = "method=pseudoseg,network=tiny,crop=33"

# What is done to the tree, the options, a word of the error.
FAULTS = {
  "255 for class 1": (
    lambda tree: masks(tree, lambda mask: (mask > 0).astype(np.uint8) * 255),
    {},
    "255",
  ),
  "floats in 0..1": (
    lambda tree: images(tree, ".npy", lambda image: (image / 255).astype(np.float32)),
    {},
    "max_value",
  ),
  "stored pixels' masks": (turned, {}, "exif_orientation"),
  "class 0 in no tag": (
    lambda tree: (
      classes(tree, "stuff\nred\ngreen\n"),
      tags(tree, "id,tags", "s0,red", "s1,red,green", "s2,red", "s3,green"),
    )[:0],
    WITH_TAGS,
    "background",
  ),
  "mean of levels": (None, {"data.mean": "124,117,104"}, "0..1"),
  "std of levels": (None, {"data.std": "58,57,57"}, "up to 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_options_that_an_error_advises_make_it_go(tree, name):
  damage, options, word = FAULTS[name]
  options = options | ((damage(tree) or {}) if damage else {})
  argument = (
    PSEUDOSEG if options.keys() & WITH_TAGS.keys() else "method=supervised,network=tiny,crop=33"
  )
  with pytest.raises(checks.InputError) as error:
    open_data(tree, options, argument)
  text = str(error.value)
  assert word in text
  advised = dict(re.findall(r"config\.([a-z_.]+)=([^\s:;,)]+(?::\d+)?(?:,[\d.]+)*)", text))
  assert advised, text
  open_data(tree, options | advised, argument)


@pytest.mark.parametrize(
  "key", ["optimizer.lr", "lr", "epochs", "data.data_root", "views.image_size"]
)
def test_another_tools_name_of_an_option_finds_ours(key):
  config = configs.base(configs.method("supervised"))
  config.data.update(configs.folder_data())
  with pytest.raises(checks.InputError) as error:
    configs.override(config, {key: "1"})
  advised = re.search(r"did you mean '([\w.]+)'", str(error.value))[1]
  assert advised in configs.all_options(config) and advised != "optimizer.power"


def test_of_one_class_the_error_says_what_to_add(tree):
  classes(tree, "road\n")
  masks(tree, lambda mask: (mask > 0).astype(np.uint8))
  with pytest.raises(checks.InputError) as error:
    open_data(tree, {})
  assert "background" in str(error.value) and "label_map" not in str(error.value)
  classes(tree, "background\nroad\n")
  open_data(tree, {})
