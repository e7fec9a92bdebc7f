"""The command that converts published weights, on small stand-ins."""

import json
import time

import jax
import numpy as np
import pytest
import safetensors

import pseudoseg_jax
from pseudoseg_jax import checks, convert_weights
from pseudoseg_jax.evaluation import predictor as predictors
from pseudoseg_jax.models import checkpoint_files, pretrained, table, torch_names

CONFIG = """
from pseudoseg_jax import config as configs

def get_config(argument=""):
  config = configs.base(configs.method("cps"))
  config.network = configs.network("deeplabv3plus", backbone="resnet18")
  config.data.update(configs.folder_data(classes="camvid", root="/a/place/of/this/machine"))
  return config
"""


def published(num_classes, prefix=""):
  """The file of a CPS network on a ResNet-18, its shapes and the values in our layout."""
  network = table.make_network("deeplabv3plus", num_classes=num_classes, backbone="resnet18")
  params, batch_stats = network.init(jax.random.key(0))
  ours = {key: np.asarray(leaf) for key, leaf in pretrained.flat(params, batch_stats).items()}
  names = torch_names.names([key.split("/", 1)[1] for key in ours], "deeplabv3plus")
  layout = lambda value: value.transpose(3, 2, 0, 1) if value.ndim == 4 else value  # PyTorch's
  return (
    {prefix + names[key.split("/", 1)[1]]: layout(value) for key, value in ours.items()},
    ours,
    network,
  )


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
  """A config file of 11 classes, and the file of such a network."""
  folder = tmp_path_factory.mktemp("published")
  (folder / "mine.py").write_text(CONFIG)
  file, ours, network = published(11, "model.branch1.")
  (folder / "cps.safetensors").write_bytes(checkpoint_files.to_safetensors(file, {}))
  return folder, ours, network


def test_the_layout_is_recognised_and_the_summary_says_so(camvid, tmp_path, capsys):
  folder, ours, _ = camvid
  assert convert_weights.main([f"{folder}/cps.safetensors", f"{tmp_path}/out.safetensors"]) == 0
  told = capsys.readouterr().out
  for part in (
    "name=deeplabv3plus",
    "backbone=resnet18",
    "stem=deep",
    "published network",
    "'model.branch1.'",
    "million",
  ):
    assert part in told
  got = checkpoint_files.read(tmp_path / "out.safetensors")
  assert got.keys() == ours.keys() and all(np.array_equal(got[key], ours[key]) for key in ours)
  with safetensors.safe_open(tmp_path / "out.safetensors", framework="np") as file:
    assert json.loads(file.metadata()["network"])["backbone"] == "resnet18"


@pytest.mark.slow
def test_a_published_network_becomes_a_folder_to_use(camvid, tmp_path):
  folder, ours, network = camvid
  assert (
    convert_weights.main(
      [f"{folder}/cps.safetensors", f"{tmp_path}/out", f"--config={folder}/mine.py"]
    )
    == 0
  )
  assert "/a/place" not in (tmp_path / "out" / "config.json").read_text()
  loaded = pseudoseg_jax.load(tmp_path / "out")
  assert loaded.classes.names[0] == "sky" and loaded.name == "converted"
  trees = pretrained.unflat(ours)
  plain = predictors.Predictor(
    lambda images: network.apply(trees["params"], trees["batch_stats"], images, train=False)[0],
    loaded.classes,
    protocol=loaded.protocol,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
  )
  image = np.random.default_rng(0).integers(0, 256, (33, 41, 3), np.uint8)
  np.testing.assert_allclose(loaded.probabilities(image), plain.probabilities(image), atol=1e-5)


def test_a_network_of_other_classes_is_no_folder(camvid, tmp_path, capsys):
  folder, _, _ = camvid
  file, _, _ = published(4)
  (tmp_path / "four.safetensors").write_bytes(checkpoint_files.to_safetensors(file, {}))
  assert (
    convert_weights.main(
      [f"{tmp_path}/four.safetensors", f"{tmp_path}/out", f"--config={folder}/mine.py"]
    )
    == 2
  )
  error = capsys.readouterr().err
  assert "four.safetensors" in error and "class count" in error and not (tmp_path / "out").exists()


def test_files_of_nothing_known_are_told(tmp_path, capsys):
  (tmp_path / "x.safetensors").write_bytes(
    checkpoint_files.to_safetensors({"a.b": np.ones(3, np.float32)}, {})
  )
  assert convert_weights.main([f"{tmp_path}/x.safetensors", f"{tmp_path}/out.safetensors"]) == 2
  error = capsys.readouterr().err
  assert "a.b" in error and "--backbone" in error
  options = ["--network=deeplabv3plus", "--backbone=resnet18"]
  assert (
    convert_weights.main([f"{tmp_path}/x.safetensors", f"{tmp_path}/out.safetensors", *options])
    == 2
  )
  assert "no known layout" in capsys.readouterr().err
  assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ([], "IN, OUT"),
    (["in.pth", "folder"], "needs --config"),
    (
      ["in.pth", "out.safetensors", "--config=c", "--backbone=resnet50"],
      "leave --network, --backbone and --stem out",
    ),
  ],
)
def test_usage_errors(arguments, said, capsys):
  with pytest.raises(SystemExit):
    convert_weights.main(arguments)
  assert said in capsys.readouterr().err


def test_a_damaged_file_is_no_traceback(tmp_path, capsys):
  (tmp_path / "bad.pth").write_bytes(b"nothing")
  assert convert_weights.main([f"{tmp_path}/bad.pth", f"{tmp_path}/out.safetensors"]) == 2
  assert "bad.pth" in capsys.readouterr().err


def odd_files():
  """name -> tensors of files that look like a network's, and are none."""
  third = {f"layer3.{number}.conv1.weight": np.ones(1, np.float32) for number in (0, 1)}
  telling = {"fuse.0.weight": np.ones(1, np.float32), "classifier.weight": np.float32(1)}
  stage4 = {"stage4.0.branches.0.0.conv1.weight": np.float32(1)}
  return {
    "no first stage": third,
    "a classifier of no classes": telling
    | third
    | {"layer1.0.conv1.weight": np.ones(1, np.float32)},
    "an HRNet without channels": stage4,
    "numbers alone": {f"x.{number}": np.float32(1) for number in range(50)},
  }


@pytest.mark.parametrize("name", odd_files())
def test_files_that_are_no_network_are_told(name, tmp_path, capsys):
  (tmp_path / "odd.safetensors").write_bytes(checkpoint_files.to_safetensors(odd_files()[name], {}))
  assert convert_weights.main([f"{tmp_path}/odd.safetensors", f"{tmp_path}/out.safetensors"]) == 2
  assert "error: " in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


def test_names_are_looked_through_in_little_time():
  tensors = {f"layer3.{number}.conv1.weight": np.zeros(1, np.float32) for number in range(20_000)}
  tensors |= {"x." * 100 + str(number): np.zeros(1, np.float32) for number in range(2000)}
  started = time.process_time()
  assert pretrained.guess(tensors)[0] == {"name": "deeplabv3plus"}
  shapes = {"params/backbone/stem/unit1/conv/kernel": (3, 3, 3, 8)}
  with pytest.raises(checks.InputError) as error:
    pretrained.fit(tensors, shapes, "deeplabv3plus")
  assert time.process_time() - started < 5 and len(str(error.value)) < 2000
