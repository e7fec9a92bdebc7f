"""AEL: its functions and its training step against the official code."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import toy
from test_functions import close, flat_net, labels, last
from test_train_steps import make_task

from pseudoseg_jax import nets
from pseudoseg_jax.contract import IGNORE_LABEL, Head, Network
from pseudoseg_jax.methods import ael
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.layers import BatchNorm
from pseudoseg_jax.ops import balance, components, confusion, losses, mixing, schedules, targets


def number(array):
  """A hyper-parameter, which was stored as float32."""
  return round(float(array), 6)


@pytest.mark.golden("ael_confidence_bank", case=r"c\d+")
def test_confidence_bank(golden):
  bank = jnp.asarray(golden["bank0"][0])  # row 0 of three is the one that is used
  for step in range(sum(name.endswith("_bank") for name in golden)):
    logits, label = last(golden[f"s{step}_logits"]), labels(golden[f"s{step}_labels"])
    close(balance.class_confidence(logits, label), golden[f"s{step}_category_conf"], 1e-6)
    bank = balance.moved_bank(bank, logits, label, number(golden["momentum"]))
    close(bank, golden[f"s{step}_bank"][0], 1e-6)


@pytest.mark.golden("ael_sampling_probs", case=r"c\d+")
def test_class_probabilities(golden):
  bank, candidates = jnp.asarray(golden["conf"]), golden["acp_candidates"]
  pasted = balance.class_probabilities(bank, tuple(candidates.tolist()), power=0.5)
  close(pasted[candidates], golden["acp_prob"], 1e-6)
  assert np.isclose(pasted.sum(), 1) and np.count_nonzero(pasted) == len(candidates)
  close(balance.class_probabilities(bank), golden["acm_prob"], 1e-6)


@pytest.mark.golden("ael_unsup_loss", case=r"c\d+")
def test_consistency_loss(golden):
  logits, label, confidence = (
    last(golden["student_logits"]),
    labels(golden["pseudo_label"]),
    golden["teacher_conf"],
  )
  rate = balance.sampling_rate(jnp.asarray(golden["bank"]), number(golden["beta"]))
  close(rate, golden["sampling_rate"], 1e-6)
  kept = balance.sampled(jnp.argmax(logits, axis=-1), rate, golden["uniform_maps"])
  np.testing.assert_array_equal(kept, golden["sample_map"])
  for name, where in {"sampled": kept, "plain": jnp.ones(kept.shape, bool)}.items():
    options = {
      "label": label,
      "confidence": confidence,
      "kept": where,
      "gamma": number(golden["gamma"]),
    }
    loss = functools.partial(balance.reweighted_loss, **options)
    value, gradient = jax.value_and_grad(loss)(logits)
    close(value, golden[f"loss_{name}"], 0, 1e-5)
    close(gradient, np.moveaxis(golden[f"grad_{name}"], 1, -1), 1e-7, 1e-5)


@pytest.mark.golden("ael_pseudo_labels", case=r"c\d+")
def test_pseudo_labels(golden):
  for part in ("sup", "unsup"):
    label, confidence = targets.hard_label(last(golden[f"teacher_logits_{part}"]))
    close(confidence, golden[f"conf_{part}"], 1e-6)
    np.testing.assert_array_equal(
      ael.ignore_unconfident(label, confidence, number(golden["threshold"])),
      golden[f"label_{part}"],
    )


@pytest.mark.golden("ael_ema", case=r"c\d+")
def test_ema(golden):
  teacher = flat_net(golden["t_init_weight"], golden["t_init_bias"])
  for index, step in enumerate(golden["iters"].tolist()):
    decay = schedules.ema_decay(step, number(golden["decay"]), "from_copy")
    close(decay, golden[f"decay_used_{index}"], 1e-6)
    teacher = nets.ema(
      teacher, flat_net(golden[f"s_{index}_weight"], golden[f"s_{index}_bias"]), decay
    )
    close(teacher.params["flat"], golden[f"t_{index}_weight"], 1e-6)
    close(teacher.params["1"], golden[f"t_{index}_bias"], 1e-6)


@pytest.mark.golden("ael_adaptive_cutmix", case=r"c\d+")
def test_region_boxes(golden):
  label = np.argmax(golden["teacher_logits"][1], axis=0)
  table = golden["components_cat_id_area_y0x0y1x1"]
  priority = np.zeros((len(golden["cats"]), *label.shape), np.float32)
  for row, (category, order) in enumerate(zip(golden["cats"], golden["visit_order"], strict=True)):
    names, count = scipy.ndimage.label(label == category, np.ones((3, 3)))
    np.testing.assert_array_equal(
      [np.sum(names == 1 + index) for index in range(count)], table[table[:, 0] == category, 2]
    )
    for place, name in enumerate(order[order > 0]):
      priority[row][names == name] = -place  # the first that is visited comes first
  several = jnp.broadcast_to(label, priority.shape)
  options = {"min_area": number(golden["area_thresh_and_2"][0])}
  boxes, found = ael.region_boxes(several, jnp.asarray(golden["cats"]), priority, **options)
  assert found.any()
  np.testing.assert_array_equal(boxes[found], golden["box_masks"][found])

  absent = jnp.full(1, golden["teacher_logits"].shape[1])
  assert not ael.region_boxes(several[:1], absent, priority[:1], **options)[1].any()
  with jax.enable_x64(True):
    uniforms = mixing.BoxDraws(
      *(jnp.asarray(golden[f"fallback_u{index}_f64"]) for index in range(3))
    )
    np.testing.assert_array_equal(
      mixing.box_masks(uniforms, label.shape, area_range=(0.5, 0.5))[0], golden["fallback_mask"]
    )


@pytest.mark.golden("ael_adaptive_cutmix", case=r"c\d+")
def test_components(golden):
  label = np.argmax(golden["teacher_logits"][1], axis=0)
  found = []
  for category in range(golden["teacher_logits"].shape[1]):
    regions = components.regions(components.connected(jnp.asarray(label == category)[None]))
    rows = np.stack([np.asarray(part)[0] for part in regions], axis=-1)
    found += [(category, *row) for row in rows[rows[:, 0] > 0].tolist()]
  recorded = golden["components_cat_id_area_y0x0y1x1"]
  assert sorted(found) == sorted(map(tuple, np.delete(recorded, 1, axis=1).tolist()))


@pytest.mark.golden("ael_adaptive_cutmix", case=r"c\d+")
def test_image_bank(golden):
  label = labels(np.argmax(golden["teacher_logits"], axis=1))
  check_image_bank(
    golden,
    label,
    number(golden["area_thresh_and_2"][1]),
    golden["img_id_sample_id"],
    "bank_before",
    "bank_after",
  )


def check_image_bank(golden, label, min_area, columns, before, after):
  """The bank of classes by images is what the two images at hand hold now, and what it was in the
  other columns.
  """
  bank = golden[before].copy()
  bank[:, columns] = np.asarray(balance.presence(label, len(bank), min_area)).T
  np.testing.assert_array_equal(bank, golden[after])


@pytest.mark.golden("ael_copy_paste", case=r"c\d+")
def test_copy_paste(golden):
  images, label = (
    np.split(golden["images_and_paste"], 2, axis=1),
    np.split(golden["labels_and_paste"], 2, axis=1),
  )
  classes = jnp.zeros(IGNORE_LABEL, bool).at[golden["query"]].set(True)
  source = ael.Source(last(images[1]), labels(label[1]), classes)
  image, label = ael.copy_paste(last(images[0]), labels(label[0]), source)
  np.testing.assert_array_equal(image, last(golden["out_images"]))
  np.testing.assert_array_equal(label, golden["out_labels"])


@pytest.mark.golden("ael_ohem", case=r"c\d+")
def test_ohem_with_a_second_head(golden):
  threshold, min_kept, auxiliary_weight = map(number, golden["thresh_minkept_auxw"])
  logits, second, label = (
    last(golden["logits"]),
    last(golden["aux_logits"]),
    labels(golden["target"]),
  )
  mined = functools.partial(
    losses.ohem_cross_entropy,
    label=label,
    min_confidence=threshold,
    min_kept=int(min_kept),
    scope="batch",
  )
  value, gradient = jax.value_and_grad(
    lambda logits: mined(logits) + auxiliary_weight * mined(second)
  )(logits)
  close(mined(logits), golden["loss_main_only"], 0, 1e-5)
  close(value, golden["loss"], 0, 1e-5)
  close(gradient, np.moveaxis(golden["grad"], 1, -1), 1e-7, 1e-5)


@pytest.mark.golden("ael_lr_iou", case=r"c\d+")
def test_learning_rate_and_iou(golden):
  epochs, iterations, base = map(number, golden["epochs_iters_lr"])
  total = int(epochs * iterations)
  rate = schedules.poly(np.arange(total), base=base, total_steps=total)
  close(np.stack([rate, 10 * rate], axis=1), golden["lr_used_backbone_head"], 0, 1e-6)
  matrix = confusion.confusion_matrix(
    labels(golden["truth"]), labels(golden["pred"]), len(golden["inter"])
  )
  np.testing.assert_array_equal(np.diag(matrix), golden["inter"])
  np.testing.assert_array_equal(matrix.sum(1), golden["target_area"])
  np.testing.assert_array_equal(matrix.sum(0) + matrix.sum(1) - np.diag(matrix), golden["union"])


class Features(nn.Module):
  """The toy network without its last convolution."""

  hidden: int

  @nn.compact
  def __call__(self, x, *, train, groups):
    x = nn.Conv(self.hidden, (3, 3), padding=1, use_bias=False, name="conv")(x)
    return nn.relu(BatchNorm(name="bn")(x, train=train, groups=groups))


def linear(params, x):
  return x @ params["kernel"][0, 0] + params["bias"]


def in_two_halves(init, hidden):
  """The toy network with its map laid open; twice, as the second head takes the last but one."""

  def encode(params, stats, images, *, train, groups=1, dropout=None):
    variables = {"params": params, "batch_stats": stats}
    features, moved = Features(hidden).apply(
      variables, images, train=train, groups=groups, mutable=["batch_stats"]
    )
    return (features, features), stats | {"bn": moved["batch_stats"]["bn"]}

  def decode(params, stats, maps, *, train, groups=1, dropout=None):
    return linear(params["cls"], maps[-1]), stats

  def apply(params, stats, images, **keywords):
    maps, stats = encode(params, stats, images, **keywords)
    return decode(params, stats, maps, **keywords)

  return Network(init, apply, encode, decode, lambda scores, size: scores)


def toy_auxiliary(channels, num_classes):
  params = {"kernel": jnp.zeros((1, 1, channels, num_classes)), "bias": jnp.zeros(num_classes)}
  return Head(
    lambda key: (params, {}),
    lambda params, stats, maps, train, dropout: (linear(params, maps), stats),
  )


def choose_as_recorded(monkeypatch):
  """Puts the recorded choices, which stand among the draws, in the place of the method's own;
  returns what passes by.
  """
  seen = {"pasted": [], "pseudo_label": [], "teacher": []}
  copy_paste, ignore_unconfident = ael.copy_paste, ael.ignore_unconfident

  def note(name, value):
    jax.debug.callback(lambda value: seen[name].append(np.asarray(value)), value, ordered=True)

  def noted_copy_paste(image, label, source):
    image, label = copy_paste(image, label, source)
    note("pasted", label)
    return image, label

  def noted_ignore_unconfident(*arguments):
    label = ignore_unconfident(*arguments)
    note("pseudo_label", label)
    return label

  def choose_mix(label, bank, draws, **options):
    note("teacher", label)
    return draws

  monkeypatch.setattr(ael, "copy_paste", noted_copy_paste)
  monkeypatch.setattr(ael, "ignore_unconfident", noted_ignore_unconfident)
  monkeypatch.setattr(ael, "choose_source", lambda image, label, bank, draws, **options: draws)
  monkeypatch.setattr(ael, "choose_mix", choose_mix)
  return seen


def recorded_step(golden, index):
  """The batch of a step, and its draws with what the official step drew and chose."""
  image, label = toy.nhwc(golden[f"image_{index}"]), labels(golden[f"label_{index}"])
  unlabeled = toy.nhwc(golden["unsup_images"][golden[f"image_id_{index}"]])  # A and B
  classes = jnp.isin(jnp.arange(golden["hp/num_classes"]), golden[f"paste_classes_{index}"])
  source = ael.Source(
    toy.nhwc(golden[f"paste_image_{index}"]), labels(golden[f"paste_label_{index}"]), classes
  )
  mix = ael.Mix(
    jnp.array([0]),
    jnp.array([1]),
    jnp.asarray(golden[f"mix_mask_{index}"][None] > 0),
    jnp.array([True]),
  )
  uniforms = {
    "labeled": golden[f"uniform_sup_{index}"],
    "unlabeled": golden[f"uniform_unsup_{index}"],
  }
  batch = {"labeled": {"image": image, "label": label}, "unlabeled": {"weak": unlabeled}}
  return batch, {"sample": uniforms, "paste": source, "mix": mix}


@pytest.mark.golden("ael_train_steps")
def test_steps(golden, monkeypatch):
  golden = type(golden)(
    {name.replace("/aux.", "/auxiliary."): value for name, value in golden.items()}
  )
  hp = {name: value.item() for name, value in golden.under("hp/").items()}
  monkeypatch.setattr(heads, "auxiliary", toy_auxiliary)
  seen = choose_as_recorded(monkeypatch)
  ohem = {"min_confidence": hp["ohem_thresh"], "min_kept": hp["ohem_min_kept"], "scope": "batch"}
  task = make_task(
    golden,
    criterion=functools.partial(losses.ohem_cross_entropy, **ohem),
    decay_scope="all",
    factors={"^(auxiliary|cls)": 10.0},
  )
  method = ael.ael(
    task._replace(network=in_two_halves(task.network.init, hp["hid"])),
    weight=hp["consist_weight"],
    gamma=hp["gamma"],
    min_confidence=hp["threshold"],
    bank_momentum=hp["bank_momentum"],
    auxiliary_weight=hp["aux_weight"],
    decay=hp["ema_decay"],
  )
  state = toy.start(method, golden, {"student": "init/student/", "teacher": "init/teacher/"})
  for role, net in state.nets.items():
    state.nets[role] = net.replace(batch_stats=net.batch_stats | {"auxiliary": {}})
  state = state.replace(memory={"confidence": jnp.asarray(golden["init/confidence_bank"][0])})
  batches, recorded = zip(
    *(recorded_step(golden, index) for index in range(toy.num_steps(golden))), strict=True
  )
  logged = {"loss_supervised": "sup", "loss_labeled": "cons_sup", "loss_unlabeled": "cons_unsup"}
  before = "init/"
  for index, (state, metrics) in enumerate(toy.run(method, state, batches, recorded)):
    for ours, theirs in logged.items():
      close(metrics[ours], golden[f"log/loss_{theirs}"][index], 2e-5)
    close(metrics["loss"], golden["log/loss"][index], 2e-5)
    close(metrics["learning_rate"], golden["log/lr"][index, 0], 0, 1e-6)
    close(state.memory["confidence"], golden[f"step{index}/confidence_bank"][0], 1e-6)
    toy.assert_gradient(state.nets["student"], golden, f"step{index}/grad/student/")
    for role in ("student", "teacher"):
      net = state.nets[role]
      toy.assert_net(
        net.replace(batch_stats={"bn": net.batch_stats["bn"]}), golden, f"step{index}/{role}/"
      )

    jax.effects_barrier()
    np.testing.assert_array_equal(seen["pasted"].pop(0), golden[f"pasted_label_{index}"])
    for part in ("sup", "unsup"):
      np.testing.assert_array_equal(
        seen["pseudo_label"].pop(0), golden[f"pseudo_label_{part}_{index}"]
      )
    teacher_label, columns = seen["teacher"].pop(0), golden[f"image_id_{index}"]
    check_image_bank(
      golden,
      teacher_label,
      hp["area_thresh2"],
      columns,
      f"{before}image_bank",
      f"step{index}/image_bank",
    )
    before = f"step{index}/"
