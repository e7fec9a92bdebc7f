"""Pipelines: runs of several stages, each learning from what earlier ones left. For
launch/pipeline.py, not for training at once.

  --config=configs/pipelines.py:learn_pseudo,split=92
  --config=configs/pipelines.py:self_correcting,correction=convolutional,split=1464
  --config=configs/pipelines.py:self_training,data=camvid,split=1_8
  --config=configs/pipelines.py:self_training,teacher=pseudoseg,split=92,rounds=1,select=0    once more, from PseudoSeg's labels

The first word names the pipeline. data: voc (default), camvid or quickstart; split, network,
backbone, labels and the like are arguments of that data set's config.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pseudoseg_jax import checks, config as configs, recipes


class Stage(NamedTuple):
  """One stage. In `options` and `flags`, {name} stands for the folder of the stage of that name.

  kind: "train" (pseudoseg_jax.main), "export" (pseudoseg_jax.export_labels) or "select"
    (pseudoseg_jax.reliable).
  config: of a training: a file beside this one, with its argument.
  options: of a training or an export: {KEY: VALUE} of --config.KEY=VALUE, as text.
  flags: of an export or a selection.
  checkpoints: of a training: after each of so many equal parts of its steps the checkpoint stays.
  part: of an export: the part after which the labels are made; 0 = the last checkpoint.
  """

  name: str
  kind: str
  config: str = ""
  options: Mapping[str, str] = {}
  flags: tuple[str, ...] = ()
  checkpoints: int = 0
  part: int = 0


DATA = ("voc", "camvid", "quickstart")
# Labeled images a step, once all have labels: as many as other methods see labeled and unlabeled
# ones. VOC has recipes for that.
_LARGE_BATCH = {"camvid": {"batch": "8"}, "quickstart": {"batch": "16"}}
_OF_DATA = ("split", "lists", "train", "form", "recipe", "network", "backbone", "labels")


def get_config(argument=""):
  name, _, rest = (argument or "").partition(",")
  checks.check_name("pipeline", name, PIPELINES)
  return PIPELINES[name](rest)


def _arguments(text, **own):
  """A pipeline's own arguments, and those that go on to the data set's config."""
  chosen = configs.arguments(text, data="voc", **own, **dict.fromkeys(_OF_DATA, ""))
  checks.check_name("data", chosen["data"], DATA)
  return chosen, {name: chosen[name] for name in _OF_DATA if chosen[name]}


def _config(data, method, passed):
  return f"{data}.py:" + ",".join(
    f"{name}={value}" for name, value in {"method": method, **passed}.items()
  )


def _train(name, config, options, checkpoints=0):
  return Stage(name, "train", config=config, options=options, checkpoints=checkpoints)


def _export(name, of, *flags, part=0, options):
  return Stage(
    name,
    "export",
    flags=(f"--workdir={{{of}}}", f"--out={{{name}}}", *flags),
    options=options,
    part=part,
  )


def learn_pseudo(text):
  """Learning Pseudo Labels (Wang et al., Pattern Recognition 2022): two networks learn from few
  masks and the classes of all images; one of them labels the images; a fresh network learns from
  these labels, and needs no classes of images any more.
  """
  chosen, passed = _arguments(text)
  data = chosen["data"]
  if data == "voc":
    passed = {"recipe": "learn_pseudo"} | passed
  scales = "0.5,0.75,1.0,1.25,1.5" if data == "voc" else "1.0"
  return (
    _train("hybrid", _config(data, "learn_pseudo", passed), {"evaluation.image_labels": "True"}),
    _export(
      "labels",
      "hybrid",
      "--predictor=hybrid",
      "--image_labels",
      options={"evaluation.scales": scales, "evaluation.flip": "True"},
    ),
    _train(
      "retrained",
      _config(data, "supervised", passed | _LARGE_BATCH.get(data, {})),
      {"pseudo_labels.folder": "{labels}"},
    ),
  )


CORRECTIONS = ("none", "linear", "convolutional", "em_fixed")


def self_correcting(text):
  """Self-correcting networks (Ibrahim et al., CVPR 2020): an ancillary network that sees boxes
  learns from the masks; the primary one learns from the masks, and on the other images from the
  ancillary's labels, which get corrected as it learns.

  correction: "none", "linear", "convolutional" or, without an ancillary network, "em_fixed".
  """
  chosen, passed = _arguments(text, correction="linear")
  correction, data = chosen["correction"], chosen["data"]
  checks.check_name("correction", correction, CORRECTIONS)
  if data == "voc":
    passed = {"split": "1464"} | passed

  def primary(name, nets_from, learn_weak="True"):
    options = {
      "method.correction": correction,
      "method.learn_weak": learn_weak,
      "nets_from": nets_from,
    }
    return _train(name, _config(data, "self_correcting", passed), options)

  ancillary = _config(data, "ancillary", passed)
  if correction == "em_fixed":
    return (primary("primary", ""),)
  if correction == "convolutional":
    return (
      # Half of the masks: on those it learned from, its labels are too good for a correction to be
      # learned there.
      _train("ancillary", ancillary, {"labeled_every": "2"}),
      primary("correction", "ancillary={ancillary}", learn_weak="False"),
      primary("primary", "ancillary={ancillary},primary={correction},correction={correction}"),
    )
  return (_train("ancillary", ancillary, {}), primary("primary", "ancillary={ancillary}"))


def self_training(text):
  """Self-training (ST and ST++; Yang et al., CVPR 2022): a teacher learns from the masks and labels
  the other images; a student learns from masks and labels, on VOC under strong views, and labels
  anew for the next; `rounds` students in all.

  teacher: the method of the first stage. select: 1 = the first student learns from the half of the
  images whose labels changed least while the teacher learned (ST++), 0 = from all (ST). ST++ is
  rounds=2,select=1, ST rounds=1,select=0.

  Otherwise than in the official code: labels are those of the last checkpoint, there of the best on
  the very images that are evaluated; the second student's labels are all the first student's, there
  those of the reliable half stay the teacher's; the reliable half is chosen by labels made as all
  labels are, there on one scale without flip; all images of a student have strong views, there the
  labeled ones have not; and there is no CutOut. [ST++, main.py and dataset/semi.py]
  """
  chosen, passed = _arguments(text, teacher="supervised", rounds=2, select=1)
  data, rounds, select = chosen["data"], chosen["rounds"], chosen["select"]
  problems = checks.Problems("cannot make the pipeline self_training")
  if rounds < 1:
    problems.add("rounds", got=rounds, allowed="1 or more")
  if select not in (0, 1):
    problems.add("select", got=select, allowed="0, 1")
  problems.raise_if_any()

  of_teacher, of_student, labeling = {}, {}, {"evaluation.flip": "True"}
  larger = _LARGE_BATCH.get(data, {})
  if data == "voc":
    labeling |= {"evaluation.scales": "0.5,0.75,1.0,1.5,2.0", "evaluation.summed": "probabilities"}
    passed = {
      "recipe": "unimatch"
      if chosen["teacher"] == "supervised"
      else recipes.of_method(chosen["teacher"])
    } | passed
    if passed["recipe"] == "unimatch":
      of_teacher, of_student = _published(chosen["teacher"], passed.get("split", "92"))
  stages = [
    _train(
      "teacher",
      _config(data, chosen["teacher"], passed),
      of_teacher,
      checkpoints=3 if select else 0,
    )
  ]
  if select:
    stages.append(_export("labels_third", "teacher", part=1, options=labeling))
    stages.append(_export("labels_two_thirds", "teacher", part=2, options=labeling))
  stages.append(_export("labels", "teacher", options=labeling))
  if select:
    earlier = "--earlier", "{labels_third}", "{labels_two_thirds}"
    flags = "--labels={labels}", *earlier, "--share=0.5", "--out={reliable}/list.txt"
    stages.append(Stage("reliable", "select", flags=flags))
  labels = "labels"
  for number in range(1, rounds + 1):
    if number > 1:
      labels = f"labels{number - 1}"
      stages.append(_export(labels, f"student{number - 1}", options=labeling))
    options = {"pseudo_labels.folder": f"{{{labels}}}", "pseudo_labels.repeat_labeled": "True"}
    if data == "voc":  # a small network from scratch loses by strong views
      options["views.labeled_photometry"] = "True"
    if select and number == 1:
      options["pseudo_labels.list"] = "{reliable}/list.txt"
    stages.append(
      _train(f"student{number}", _config(data, "supervised", passed | larger), options | of_student)
    )
  return tuple(stages)


def _published(teacher, split):
  """ST++'s settings on VOC, of teacher and students, where UniMatch's recipe, by the same authors,
  has others: 16 labeled images a step; a supervised teacher's 80 epochs are passes over the labeled
  images, twice over if they are few. [ST++, main.py]
  """
  labeled = recipes.labeled_images(split, recipes.TRAIN_IMAGES["voc"])
  of_student = {"batch_size_global.labeled": "16"}
  if teacher != "supervised":
    return {}, of_student
  epoch = max(1, labeled * (2 if labeled < 200 else 1) // 16)
  return of_student | {"total_steps": str(80 * epoch)}, of_student


PIPELINES = {
  "learn_pseudo": learn_pseudo,
  "self_correcting": self_correcting,
  "self_training": self_training,
}
