"""CCT against its official code: perturbations, losses, schedules, decoders, and whole steps by the
method's own update.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from pseudoseg_jax import optim
from pseudoseg_jax.contract import Task
from pseudoseg_jax.methods import cct
from pseudoseg_jax.models import heads
from pseudoseg_jax.models.layers import BatchNorm
from pseudoseg_jax.models.pspnet import pixel_shuffle
from pseudoseg_jax.models.table import compose
from pseudoseg_jax.ops import components, confusion, losses, outlines, perturb, resize, schedules


def labels(array):
  return jnp.asarray(array.astype(np.int32))


def number(array):
  """A hyper-parameter stored as float32."""
  return round(array.item(), 6)


def nchw(array):
  return np.moveaxis(np.asarray(array), -1, 1)


@pytest.mark.golden("cct_ramps", case=r"c\d+")
def test_ramps(golden):
  with jax.enable_x64(True):
    for name, ramp in schedules.RAMPUPS.items():
      np.testing.assert_allclose(
        ramp(golden["t"], golden["length"].item()), golden[f"{name}_rampup"], rtol=0, atol=1e-6
      )


@pytest.mark.golden("cct_ramps", case=r"w\d+")
def test_the_weight_of_the_consistency(golden):
  final, epoch, start, end = map(number, golden["final_w_iters_starts_ends"])
  step = (golden["epoch"] * epoch + golden["iter"]).astype(np.int32)
  weight = final * schedules.rampup(
    step, shape="sigmoid", start_steps=start * epoch, length_steps=(end - start) * epoch
  )
  np.testing.assert_allclose(weight, golden["weight"], rtol=1e-6, atol=1e-6)


@pytest.mark.golden("cct_poly_lr", case=r"c\d+")
def test_learning_rates(golden):
  epochs, steps, rate = map(number, golden["epochs_iters_lr"])
  poly = functools.partial(schedules.poly, base=rate, total_steps=int(epochs * steps))
  optimizer = optim.sgd(poly, factors={"^backbone(?!/psp/)": 0.1})
  base = optimizer.learning_rate(np.arange(len(golden["lr_used_heads_backbone"]), dtype=np.int32))
  for column, paths in enumerate(
    (("head/kernel", "backbone/psp/kernel", "auxiliary/kernel"), ("backbone/kernel",))
  ):
    for path in paths:
      np.testing.assert_allclose(
        base * optimizer.multiplier(path), golden["lr_used_heads_backbone"][:, column], rtol=1e-6
      )


@pytest.mark.golden("cct_metrics", case=r"c\d+")
def test_metrics(golden):
  prediction, num_classes = golden["logits"].argmax(1), golden["logits"].shape[1]
  matrix = np.asarray(
    confusion.confusion_matrix(labels(golden["target"]), jnp.asarray(prediction), num_classes)
  )
  hit = np.diag(matrix)
  np.testing.assert_array_equal([hit.sum(), matrix.sum()], [golden["correct"], golden["labeled"]])
  np.testing.assert_array_equal(hit, golden["inter"])
  np.testing.assert_array_equal(matrix.sum(0) + matrix.sum(1) - hit, golden["union"])
  zero_where_absent = golden["inter"] / np.maximum(golden["union"], 1)
  assert confusion.scores(matrix, absent_classes="zero").miou == pytest.approx(
    zero_where_absent.mean()
  )


@pytest.mark.golden("cct_ab_ce", case=r"c\d+")
def test_bootstrapped_cross_entropy(golden):
  logits, label = toy.nhwc(golden["logits"]), labels(golden["target"])
  epoch, epochs, min_kept, ignore = golden["iters_epochs_minkept_ignore"].tolist()
  label = jnp.where(label == ignore, 255, label)
  steps = golden["epoch_iter"] @ np.array([epoch, 1])
  length_steps = 0.4 * epochs * epoch
  threshold = functools.partial(
    schedules.annealed_threshold, start=1 / logits.shape[-1], end=0.9, length_steps=length_steps
  )
  loss = jax.jit(
    jax.value_and_grad(functools.partial(losses.bootstrapped_cross_entropy, min_kept=min_kept))
  )
  got = [loss(logits, label, threshold=threshold(step)) for step in steps]
  np.testing.assert_allclose(threshold(steps), golden["threshold"], rtol=0, atol=1e-6)
  np.testing.assert_allclose([value for value, _ in got], golden["loss"], rtol=1e-5)
  np.testing.assert_allclose(nchw(got[0][1]), golden["grad_first"], rtol=0, atol=1e-6)
  np.testing.assert_allclose(nchw(got[-1][1]), golden["grad_last"], rtol=0, atol=1e-6)
  value, gradient = loss(logits, jnp.full_like(label, 255), threshold=0.5)
  assert value == golden["loss_all_ignored"] and not np.any(gradient)
  np.testing.assert_allclose(
    losses.cross_entropy_mean(logits, label), golden["ce_plain"], rtol=1e-5
  )
  np.testing.assert_allclose(
    losses.cross_entropy_mean(logits / 2, label), golden["ce_temp2"], rtol=1e-5
  )


@pytest.mark.golden("cct_consistency", case=r"c\d+")
def test_consistency(golden):
  logits, target = toy.nhwc(golden["student_logits"]), toy.nhwc(golden["target_probs"])
  names = [name.removeprefix("grad_") for name in golden if name.startswith("grad_")]
  assert {"mse", "mse_conf", "kl", "kl_conf", "js"} == set(names)
  for name in names:
    distance, _, masked = name.partition("_")
    loss = functools.partial(
      cct.consistency, distance, min_confidence=number(golden["threshold"]) if masked else 0.0
    )
    value, gradient = jax.value_and_grad(loss)(logits, target)
    np.testing.assert_allclose(value, golden[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(
      nchw(gradient), golden[f"grad_{name}"], rtol=1e-5, atol=1e-7, err_msg=name
    )
  for distance in ("mse", "kl"):
    np.testing.assert_array_equal(
      cct.consistency(distance, logits, target, min_confidence=1.0),
      golden[f"{distance}_conf_empty"],
    )
  each = jax.nn.softmax(jnp.moveaxis(jnp.asarray(golden["pair_logits"]), 2, -1))
  np.testing.assert_allclose(
    jnp.mean(losses.disagreement(each)), golden["pair_wise_loss"], rtol=1e-5
  )


def perturbed(kind, features, drawn=None, foreground=None):
  prediction = cct.Prediction(foreground, None)
  return nchw(cct.perturbed(kind, toy.nhwc(features), drawn, prediction, None, xi=0.1, eps=2.0))


@pytest.mark.golden("cct_guided_masking", case=r"c\d+")
def test_guided_masking(golden):
  foreground = jnp.asarray(golden["pred_logits"].argmax(1) != 0)
  np.testing.assert_array_equal(
    perturbed("context", golden["feat"], foreground=foreground), golden["con_msk"]
  )
  np.testing.assert_array_equal(
    perturbed("object", golden["feat"], foreground=foreground), golden["obj_msk"]
  )


@pytest.mark.golden("cct_fdrop_fnoise", case=r"c\d+")
def test_feature_drop_and_noise(golden):
  dropped = perturbed("feature_drop", golden["feat"], jnp.float32(number(golden["gamma"])))
  np.testing.assert_allclose(dropped, golden["fdrop"], rtol=0, atol=1e-6)
  np.testing.assert_array_equal(
    (dropped != 0).any(1), golden["fdrop_mask"] & (golden["feat"] != 0).any(1)
  )
  noise = jnp.asarray(np.moveaxis(golden["noise"], 0, -1))
  np.testing.assert_allclose(
    perturbed("feature_noise", golden["feat"], noise), golden["fnoise"], rtol=0, atol=1e-6
  )


@pytest.mark.golden("cct_gcutout", case=r"c\d+")
def test_guided_cutout(golden):
  foreground = jnp.asarray(golden["labels"] != 0)
  size = foreground.shape[1:]
  objects = perturb.large_objects(foreground)
  names, turns = (
    np.asarray(components.connected(foreground)),
    np.asarray(outlines.corners(foreground)),
  )
  contours, boxes = [], jax.tree.map(np.asarray, objects.regions)
  roots = {}
  for image, root in zip(*np.nonzero(boxes.area)):
    first, last = (
      (boxes.left[image, root], boxes.top[image, root]),
      (boxes.right[image, root] - 1, boxes.bottom[image, root] - 1),
    )
    corners = turns[image][names[image] == root].sum()
    if corners:  # regions in the holes of others have none
      contours.append((image, corners, *first, *last))
      roots[contours[-1]] = root
      assert objects.large[image, root] == (corners > 50)
  want = [tuple(row) for row in golden["contours"].tolist()]
  assert sorted(contours) == sorted(want)

  # Offsets that were drawn, as the uniforms in the middle of what gives them.
  position = np.full((*names.shape[:1], names[0].size, 2), 0.5, np.float32)
  kept = [row for row in want if row[1] > 50]
  for row, draw in zip(kept, golden["draws"], strict=True):
    position[row[0], roots[row]] = (draw[:, 2] + 0.5) / (draw[:, 1] + 1)
  erased = perturb.guided_cutout(
    objects, jnp.asarray(position), size, side_fraction=number(golden["erase"])
  )
  np.testing.assert_array_equal(~np.asarray(erased), golden["mask_full"].astype(bool))
  small = resize.nearest(~erased, golden["mask_feat"].shape[1:])
  np.testing.assert_array_equal(small, golden["mask_feat"].astype(bool))


def decoder_of(arrays, name):
  """{"NAME.upsample.1.conv.weight": ...} -> the parameters of `heads.subpixel_decoder`."""
  params = {"classifier": {"kernel": jnp.asarray(arrays[f"{name}upsample.0.weight"][:, :, 0, 0].T)}}
  step = 1
  while (kernel := arrays.get(f"{name}upsample.{step}.conv.weight")) is not None:
    bias = arrays[f"{name}upsample.{step}.conv.bias"]
    params[f"subpixel{step}"] = {
      "kernel": jnp.asarray(kernel[:, :, 0, 0].T),
      "bias": jnp.asarray(bias),
    }
    step += 1
  return params


@pytest.mark.golden("cct_decoder_vat", case=r"c\d+")
def test_decoder_and_vat(golden):
  params = decoder_of(golden.under("p_"), "")
  channels, num_classes = params["classifier"]["kernel"].shape
  decoder = heads.subpixel_decoder(
    channels, num_classes, doublings=golden["upscale"].item().bit_length() - 1
  )
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(params) == shapes(decoder.init(jax.random.key(0))[0])
  decode = lambda params, x: decoder.apply(params, {}, x, train=True)[0]
  x, start = (golden[name].transpose(0, 2, 3, 1) for name in ("x", "vat_uniform"))
  # of this length, which does not matter, the official 1e-8 below is nothing.
  start = 1e12 * (start - 0.5)
  np.testing.assert_allclose(nchw(decode(params, x)), golden["y"], rtol=0, atol=1e-4)

  xi, eps = map(number, golden["vat_xi_eps"])
  # Officially 1e-8 is added to the length of a gradient that is a mean over images, by a direction
  # that xi multiplies.
  vat = functools.partial(cct.vat_perturbation, xi=xi, eps=eps, tiny=1e-8 * len(x) / xi)
  with jax.enable_x64(True):
    exact = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
    got = vat(functools.partial(decode, exact(params)), exact(x), exact(start))
    np.testing.assert_allclose(nchw(got), golden["vat_r_adv_f64"], rtol=1e-6, atol=1e-8)
  moved = x + golden["vat_r_adv"].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(nchw(decode(params, moved)), golden["vat_out"], rtol=0, atol=1e-4)
  if xi > 1e-3:
    got = vat(functools.partial(decode, params), x, start)
    np.testing.assert_allclose(nchw(got), golden["vat_r_adv"], rtol=0, atol=1e-4)


class ToyBackbone(nn.Module):
  """conv3x3 of stride 2 -> batch norm -> ReLU -> conv1x1 -> ReLU."""

  hidden: int

  @nn.compact
  def __call__(self, x, *, train, groups=1):
    x = nn.Conv(self.hidden, (3, 3), 2, padding=1, use_bias=False, name="conv")(x)
    x = nn.relu(BatchNorm(name="bn")(x, train=train, groups=groups))
    return (nn.relu(nn.Conv(self.hidden, (1, 1), name="psp")(x)),)


class PooledBackbone(nn.Module):
  """Means of cells -> conv1x1 -> ReLU."""

  side: int
  hidden: int

  @nn.compact
  def __call__(self, x, *, train, groups=1):
    x = nn.avg_pool(x, (self.side, self.side), (self.side, self.side))
    return (nn.relu(nn.Conv(self.hidden, (1, 1), use_bias=False, name="c")(x)),)


class ShuffleHead(nn.Module):
  """The decoder of the official code, as a network's own head."""

  num_classes: int
  doublings: int

  @nn.compact
  def __call__(self, maps, *, train, groups=1):
    x = nn.Conv(self.num_classes, (1, 1), use_bias=False, name="classifier")(maps[-1])
    for step in range(self.doublings):
      x = pixel_shuffle(
        nn.relu(nn.Conv(4 * self.num_classes, (1, 1), name=f"subpixel{step + 1}")(x))
      )
    return x


def as_convolutions(params):
  """The parameters of `heads.subpixel_decoder` in the shapes of `ShuffleHead`."""
  return jax.tree.map(lambda leaf: leaf[None, None] if leaf.ndim == 2 else leaf, params)


def stacked(*trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def toy_tree(arrays):
  """The recorded arrays of the toy network -> (params, batch_stats) in our layout."""
  params, stats = toy.from_torch(arrays)
  heads_ = {
    name: {"classifier": part["in"], "subpixel1": part["up"]}
    for name, part in params.items()
    if "in" in part
  }
  alone = lambda tree: stacked(
    jax.tree.map(lambda leaf: leaf[0, 0] if leaf.ndim == 4 else leaf, tree)
  )
  kinds = {"context": "context", "object": "object", "feature_noise": "noise"}
  auxiliary = {kind: alone(heads_[name]) for kind, name in kinds.items()}
  backbone = {name: part for name, part in params.items() if "in" not in part}
  return {"backbone": backbone, "head": heads_["main"], "auxiliary": auxiliary}, {"backbone": stats}


def put(state, params, stats):
  net = state.nets["main"]
  assert jax.tree.structure(params) == jax.tree.structure(net.params)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, net.params)
  return state.replace(nets={"main": net.replace(params=params, batch_stats=stats)})


@pytest.mark.golden("cct_train_steps")
def test_steps(golden):
  hp = {name: value.item() for name, value in golden.under("hp/").items()}
  total_steps = hp["epochs"] * hp["iters_per_epoch"]
  rate = functools.partial(
    schedules.poly, base=hp["lr"], total_steps=total_steps, power=hp["lr_power"]
  )
  optimizer = optim.sgd(
    rate,
    momentum=hp["momentum"],
    weight_decay=hp["weight_decay"],
    decay_scope="all",
    factors={"^backbone/(conv|bn)": 0.1},
  )
  network = compose(
    ToyBackbone(hp["hid"]), ShuffleHead(hp["num_classes"], hp["upscale"].bit_length() - 1)
  )
  task = Task(
    hp["num_classes"], total_steps, network, toy.recording(optimizer), losses.cross_entropy_mean
  )
  method = cct.cct(
    task,
    weight=hp["unsupervised_w"],
    rampup_fraction=hp["rampup_epochs"] / hp["epochs"],
    decoders={"context": 1, "object": 1, "feature_noise": 1},
  )
  state = put(method.init(jax.random.key(0)), *toy_tree(golden.under("init/")))
  update, show = jax.jit(method.update), jax.jit(method.show)
  logged = {"loss_supervised": "loss_sup", "loss_consistency": "loss_unsup", "loss": "loss"}
  for index in range(toy.num_steps(golden)):
    batch = {
      "labeled": {
        "image": toy.nhwc(golden[f"image_{index}"]),
        "label": labels(golden[f"label_{index}"]),
      },
      "unlabeled": {"weak": toy.nhwc(golden[f"image_unsup_{index}"])},
    }
    draws = method.draw(jax.random.key(index), batch)
    draws["unlabeled"]["feature_noise"] = jnp.asarray(np.moveaxis(golden[f"noise_{index}"], 0, -1))[
      None
    ]
    shown, _ = show(state, batch, draws)
    np.testing.assert_array_equal(jnp.argmax(shown[-1].values, -1), golden[f"argmax_unsup_{index}"])
    state, metrics = update(state, batch, draws)
    for ours, theirs in logged.items():
      np.testing.assert_allclose(
        metrics[ours], golden[f"log/{theirs}"][index], rtol=0, atol=2e-5, err_msg=f"{ours} {index}"
      )
    np.testing.assert_allclose(metrics["learning_rate"], golden["log/lr"][index, 0], rtol=1e-6)
    net = state.nets["main"]
    gradient, _ = toy_tree(golden.under(f"step{index}/grad/"))
    after = {
      name: value
      for name, value in golden.under(f"step{index}/").items()
      if not name.startswith("grad/")
    }
    params, stats = toy_tree(after)
    toy.assert_tree_close(net.opt_state[0], gradient, 1e-5, f"gradient {index}")
    toy.assert_tree_close(net.params, params, 1e-5, f"parameters {index}")
    toy.assert_tree_close(net.batch_stats, stats, 1e-5, f"statistics {index}")


@pytest.mark.golden("cct_total_loss", case=r"c\d+")
def test_total_loss(golden, monkeypatch):
  # The README gives the schedule: final weight 30 after 8 epochs of 10 steps, pseudo masks with
  # 0.4.
  epochs, epoch, weight, weak_weight = 8, 10, 30.0, 0.4
  arrays = golden.under("p_")
  main = decoder_of(arrays, "main_decoder.")
  auxiliary = [decoder_of(arrays, f"aux_decoders.{index}.") for index in range(3)]
  encoder = jnp.asarray(arrays["encoder.c.weight"].transpose(2, 3, 1, 0))
  (channels, num_classes), doublings = main["classifier"]["kernel"].shape, len(main) - 1
  network = compose(PooledBackbone(2**doublings, channels), ShuffleHead(num_classes, doublings))
  optimizer = toy.recording(optim.sgd(lambda step: jnp.asarray(0.0), momentum=0.0))
  task = Task(num_classes, epochs * epoch, network, optimizer, losses.cross_entropy_mean)
  weak = bool(golden["weak"])
  method = cct.cct(
    task,
    weight=weight,
    rampup_fraction=1.0,
    decoders={"context": 1, "object": 2},
    distance="kl" if golden["is_kl"] else "mse",
    min_confidence=0.5 if golden["confidence_masking"] else 0.0,
    image_labels=weak,
    weak_weight=weak_weight,
    classification_weight=0.0,
  )
  monkeypatch.setattr(cct, "pseudo_mask", lambda cam, valid, **options: labels(golden["target_ul"]))
  state = method.init(jax.random.key(0))
  params = {
    "backbone": {"c": {"kernel": encoder}},
    "head": as_convolutions(main),
    "auxiliary": {"context": stacked(auxiliary[0]), "object": stacked(*auxiliary[1:])},
  }
  params |= {name: part for name, part in state.nets["main"].params.items() if name not in params}
  state = put(state, params, state.nets["main"].batch_stats).replace(
    step=jnp.int32(golden["epoch_iter"] @ np.array([epoch, 1]))
  )
  images = toy.nhwc(golden["x_ul"])
  batch = {
    "labeled": {"image": toy.nhwc(golden["x_l"]), "label": labels(golden["target_l"])},
    "unlabeled": {
      "weak": images,
      "valid": jnp.ones(images.shape[:3], bool),
      "image_label": jnp.ones((len(images), num_classes)),
    },
  }
  after, metrics = jax.jit(method.update)(state, batch, method.draw(jax.random.key(1), batch))
  logged = {
    "loss": "total",
    "loss_supervised": "loss_sup",
    "loss_consistency": "loss_unsup",
    "loss_weak": "loss_weakly",
  }
  assert ("loss_weak" in metrics) == weak == ("loss_weakly" in golden)
  for ours, theirs in logged.items():
    if ours in metrics:
      np.testing.assert_allclose(metrics[ours], golden[theirs], rtol=1e-4, err_msg=ours)
  gradient = after.nets["main"].opt_state[0]
  conv = lambda kernel: np.asarray(kernel).T[:, :, None, None]
  encoder = gradient["backbone"]["c"]["kernel"].transpose(3, 2, 0, 1)
  np.testing.assert_allclose(encoder, golden["grad_encoder"], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
    conv(gradient["head"]["classifier"]["kernel"][0, 0]),
    golden["grad_main_conv"],
    rtol=1e-4,
    atol=1e-6,
  )
  first = gradient["auxiliary"]["context"]["classifier"]["kernel"][0]
  np.testing.assert_allclose(conv(first), golden["grad_aux0_conv"], rtol=1e-4, atol=1e-6)
