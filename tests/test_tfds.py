import concurrent.futures
import io
import multiprocessing

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from pseudoseg_jax import build, checks, config as configs, prepare
from pseudoseg_jax.contract import Needs
from pseudoseg_jax.data import geometry, official_masks, pipeline, tfds_builders, tfds_source
from pseudoseg_jax.data.sources import FolderSource, Subset
from pseudoseg_jax.data.tfds_source import TfdsSource

IDS = tuple(f"2007_{index:06d}" for index in (5, 3, 9, 1))  # a list's own order stays


def jpeg(seed, size=(14, 20)):
  content = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)).save(
    content, "JPEG"
  )
  return content.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """Images of several sizes, masks of palette and grey PNG, and the same as a TFDS data set."""
  root = tmp_path_factory.mktemp("tree")
  (root / "images").mkdir()
  (root / "masks").mkdir()
  for row, name in enumerate(IDS):
    size = (10 + row, 20)
    (root / f"images/{name}.jpg").write_bytes(jpeg(row, size))
    mask = np.random.default_rng(row).choice(np.array([0, 1, 20, 255], np.uint8), size)
    if row % 2:
      Image.fromarray(mask).save(root / f"masks/{name}.png")
    else:
      (root / f"masks/{name}.png").write_bytes(official_masks.png(mask))
  return root, tfds_builders.write(root / "tfds", "mine", splits_of(root))


def splits_of(root, ids=IDS):
  return {
    "train": tfds_builders.Split(
      ids, lambda name: root / f"images/{name}.jpg", lambda name: root / f"masks/{name}.png"
    )
  }


def folder_source(root, **changes):
  return FolderSource(
    root,
    IDS,
    image_pattern="images/{id}.jpg",
    label_pattern="masks/{id}.png",
    num_classes=21,
    **changes,
  )


def message(call):
  with pytest.raises(checks.InputError) as error:
    call()
  return str(error.value)


def assert_same(source, other):
  assert source.ids == other.ids and len(source) == len(other)
  for row in range(len(other)):
    assert source.size(row) == other.size(row)
    for got, wanted in (
      (source.image(row), other.image(row)),
      (source.label(row), other.label(row)),
    ):
      np.testing.assert_array_equal(got, wanted)
      assert got.dtype == wanted.dtype == np.uint8


def test_folder_and_tfds_forms_give_the_same_examples(tree):
  root, directory = tree
  source = TfdsSource(directory, "train", num_classes=21)
  assert source.has_labels and source.channels == 3 and source.dtype == np.uint8
  assert_same(source, folder_source(root))
  assert_same(
    TfdsSource("mine", "train", data_dir=root / "tfds", num_classes=21), folder_source(root)
  )


def test_images_are_stored_byte_for_byte_and_masks_read_as_indices_by_tfds_itself(tree):
  root, directory = tree
  builder = tfds.builder_from_directory(directory)
  stored = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
  assert [bytes(example["image"]) for example in stored] == [
    (root / f"images/{name}.jpg").read_bytes() for name in IDS
  ]
  for row, example in enumerate(builder.as_data_source("train")):
    np.testing.assert_array_equal(example["label"][..., 0], folder_source(root).label(row))


def test_masks_are_not_touched_without_a_label_key(tree):
  source = TfdsSource(tree[1], "train", label_key=None)
  assert not source.has_labels and source.image(0).shape == (10, 20, 3)
  with pytest.raises(ValueError, match="no masks"):
    source.label(0)


def test_opening_reads_no_example_and_ids_come_from_their_list(tree, monkeypatch):
  from array_record.python import array_record_data_source

  def refuse(*_):
    raise AssertionError("an example was read")

  monkeypatch.setattr(array_record_data_source.ArrayRecordDataSource, "__getitem__", refuse)
  source = TfdsSource(tree[1], "train", num_classes=21)
  assert source.ids == IDS and len(source) == 4


def test_parts_and_sums_of_splits_are_read_as_tfds_names_them(tree):
  source = TfdsSource(tree[1], "train[:50%]", num_classes=21)
  assert source.ids == IDS[:2]
  assert TfdsSource(tree[1], "train[2:3]", num_classes=21, id_key=None).ids == (
    "train[2:3]/000000",
  )


def test_eight_threads_read_what_one_reads(tree):
  source = TfdsSource(tree[1], "train", num_classes=21)
  rows = [row % 4 for row in range(64)]
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    for row, image in zip(rows, threads.map(source.image, rows), strict=True):
      np.testing.assert_array_equal(image, source.image(row))


def test_training_batches_are_those_of_the_folder(tree):
  def batch(source):
    spec = pipeline.PipelineSpec(
      labeled=Subset(source, IDS[:3]),
      unlabeled=None,
      batch_size_labeled_global=4,
      batch_size_unlabeled_global=0,
      geometry=geometry.Geometry(crop_size=(9, 9)),
      needs=Needs(unlabeled=False),
    )
    return next(pipeline.train_batches(spec))["labeled"]

  ours, folders = batch(TfdsSource(tree[1], "train", num_classes=21)), batch(folder_source(tree[0]))
  for name in ("image", "label", "valid"):
    np.testing.assert_array_equal(ours[name], folders[name])


def _sum_of_images(directory):
  source = TfdsSource(directory, "train", num_classes=21)
  return sum(int(source.image(row).sum()) for row in range(len(source)))


@pytest.mark.slow
def test_two_processes_open_the_same_data_set(tree):
  with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
    sums = list(processes.map(_sum_of_images, [str(tree[1])] * 2))
  assert sums == [_sum_of_images(tree[1])] * 2


def test_a_second_writing_leaves_what_is_there_and_a_broken_one_starts_anew(tree, tmp_path):
  before = {path: path.stat().st_mtime_ns for path in tree[1].iterdir()}
  assert tfds_builders.write(tree[0] / "tfds", "mine", splits_of(tree[0])) == tree[1]
  assert {path: path.stat().st_mtime_ns for path in tree[1].iterdir()} == before
  broken = {"train": tfds_builders.Split(("gone",), lambda name: tmp_path / name)}
  with pytest.raises(FileNotFoundError):
    tfds_builders.write(tmp_path, "mine", broken)
  assert not (tmp_path / "mine" / tfds_builders.VERSION).exists()
  (tmp_path / "gone").write_bytes(jpeg(0))
  written = tfds_builders.write(tmp_path, "mine", broken)
  assert TfdsSource(written, "train", label_key=None).ids == ("gone",)


def test_other_ids_are_written_anew(tree, tmp_path):
  for ids in (IDS[:1], IDS[:3]):
    assert (
      TfdsSource(
        tfds_builders.write(tmp_path, "mine", splits_of(tree[0], ids)), "train", num_classes=21
      ).ids
      == ids
    )


def test_what_does_not_fit_is_told_with_what_would(tree, tmp_path):
  assert "train" in message(lambda: TfdsSource(tree[1], "trian", num_classes=21))
  text = message(lambda: TfdsSource(tree[1], "train", label_key="labels"))
  for part in ("'labels'", "did you mean 'label'", "num_classes"):
    assert part in text
  assert str(tree[1]) in message(lambda: TfdsSource(tree[0] / "tfds", "train", num_classes=21))
  text = message(lambda: TfdsSource("oxford_iiit_pets", "train", data_dir=tmp_path, num_classes=2))
  assert "no such data set" in text and "did you mean 'oxford_iiit_pet'" in text


def test_values_that_are_no_class_and_broken_images_name_their_example(tree, tmp_path):
  text = message(lambda: TfdsSource(tree[1], "train", num_classes=2).label(3))
  for part in ("'label' of example 3", "20", "label_map"):
    assert part in text
  assert set(
    np.unique(TfdsSource(tree[1], "train", num_classes=2, label_map={20: 255}).label(3))
  ) <= {0, 1, 255}
  (tmp_path / "a").write_bytes(jpeg(0)[:-40])
  splits = {"train": tfds_builders.Split(("a",), lambda name: tmp_path / name)}
  source = TfdsSource(tfds_builders.write(tmp_path, "cut", splits), "train", label_key=None)
  assert "'image' of example 0" in message(lambda: source.image(0))


class SmallPets(tfds.core.GeneratorBasedBuilder):
  """The features that oxford_iiit_pet has, of trimaps: 1 pet, 2 background, 3 border."""

  VERSION = tfds.core.Version("4.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(names=["Abyssinian", "beagle"]),
      "species": tfds.features.ClassLabel(names=["Cat", "Dog"]),
      "file_name": tfds.features.Text(),
      "segmentation_mask": tfds.features.Image(shape=(None, None, 1), use_colormap=True),
      "head_bbox": tfds.features.BBoxFeature(),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for index, name in enumerate(("Abyssinian_1.jpg", "beagle_1.jpg", "beagle_2.jpg")):
      mask = np.full((14, 20, 1), 2, np.uint8)
      mask[:3], mask[3] = 1, 3
      species = int(index > 0)
      yield (
        name,
        {
          "image": io.BytesIO(jpeg(index)),
          "label": species,
          "species": species,
          "file_name": name,
          "segmentation_mask": mask,
          "head_bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        },
      )


def open_pets(data_dir, **changes):
  options = dict(
    label_key="segmentation_mask", id_key="file_name", label_map={2: 0, 3: 255}, num_classes=2
  )
  return TfdsSource("small_pets", "train", data_dir=data_dir, **{**options, **changes})


def test_pets_of_the_catalogue_are_prepared_once_and_masks_named_by_species(tmp_path, monkeypatch):
  pets = open_pets(tmp_path)  # prepared here
  assert sorted(pets.ids) == ["Abyssinian_1.jpg", "beagle_1.jpg", "beagle_2.jpg"]
  by_id = {name: pets.label(row)[:5, 0].tolist() for row, name in enumerate(pets.ids)}
  assert by_id["Abyssinian_1.jpg"] == by_id["beagle_1.jpg"] == [1, 1, 1, 255, 0]
  cats_and_dogs = open_pets(tmp_path, class_key="species", num_classes=3)
  by_id = {
    name: cats_and_dogs.label(row)[:5, 0].tolist() for row, name in enumerate(cats_and_dogs.ids)
  }
  assert by_id["Abyssinian_1.jpg"] == [1, 1, 1, 255, 0] and by_id["beagle_1.jpg"] == [
    2,
    2,
    2,
    255,
    0,
  ]
  # From now on the list that the first look left is used.
  monkeypatch.setattr(TfdsSource, "_id", None)
  assert open_pets(tmp_path).ids == pets.ids


def test_a_folder_that_must_not_be_written_to_is_read_all_the_same(tmp_path, monkeypatch):
  def refuse(*_):
    raise PermissionError("read-only")

  pets = open_pets(tmp_path)
  monkeypatch.setattr(type(tfds_source.epath.Path("x")), "write_text", refuse)
  assert len(pets.ids) == 3
  assert not list(tmp_path.rglob("file_name.*"))


def test_prepare_writes_the_same_examples_as_tfds(tmp_path, capsys):
  arguments = ["cityscapes", f"--out={tmp_path / 'out'}", "--any_count", "--format=tfds"]
  source = tmp_path / "official"
  for split in ("train", "val"):
    for folder, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
      path = source / f"{folder}/{split}/bonn/bonn_000000_000019_{ending}.png"
      path.parent.mkdir(parents=True)
      Image.fromarray(np.full((4, 6), 7, np.uint8)).convert(
        "RGB" if folder == "leftImg8bit" else "L"
      ).save(path)
  assert prepare.main([*arguments, f"--images={source}", f"--labels={source}"]) == 0
  written = tmp_path / "out/tfds/cityscapes/1.0.0"
  val = TfdsSource(written, "val", num_classes=34)
  assert (
    val.ids == ("bonn/bonn_000000_000019",)
    and np.all(val.label(0) == 7)
    and np.all(val.image(0) == 7)
  )
  assert f"{written}: train 1, val 1" in capsys.readouterr().out
  config = configs.load(
    "configs/cityscapes.py:split=full,form=tfds", {"data.root": str(tmp_path / "out/tfds")}
  )
  data = build.build_data(configs.frozen(config).data)
  # The label id 7 is the road, class 0.
  assert data.labeled.ids == val.ids and np.all(data.labeled.label(0) == 0)
