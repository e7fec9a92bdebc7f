"""ClassMix against the official code: its functions, and whole training steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_functions import close, flat_net, labels, last
from test_train_steps import make_task

from pseudoseg_jax import nets
from pseudoseg_jax.contract import IGNORE_LABEL
from pseudoseg_jax.methods import classmix
from pseudoseg_jax.ops import gaussian, losses, mixing, schedules

THRESHOLD, WARMUP = 0.968, "from_copy"


def number(array):
  """A scalar that was stored in single precision."""
  return round(array.item(), 6)


def with_void(array, ignored):
  return labels(np.where(array == ignored, IGNORE_LABEL, array.astype(np.int32)))


def uniforms(chosen, num_classes):
  """Draws by which the recorded classes, padded with -1, are chosen: theirs are the smallest."""
  return 1.0 - jnp.max(jax.nn.one_hot(chosen, num_classes), axis=1) * 0.5


@pytest.mark.golden("classmix_mask_mix_loss", case=r"c\d+")
def test_mask_mix_and_loss(golden):
  teacher, images, student = (
    last(golden[name]) for name in ("teacher_logits", "images", "student_logits")
  )
  predicted = jnp.argmax(teacher, axis=-1)
  np.testing.assert_array_equal(predicted, golden["argmax"])
  chosen = mixing.choose_classes(uniforms(golden["chosen_classes"], teacher.shape[-1]), predicted)
  np.testing.assert_array_equal(jnp.sum(chosen, axis=-1), golden["num_classes_present"] // 2)
  mask = mixing.class_masks(predicted, chosen)
  np.testing.assert_array_equal(mask, golden["mix_mask"])
  close(classmix.paste_on_next(mask, images), np.moveaxis(golden["images_mixed"], 1, -1), 1e-6)

  mixed = classmix.paste_on_next(mask, teacher)
  confidence = jnp.max(jax.nn.softmax(mixed), axis=-1)
  np.testing.assert_array_equal(jnp.argmax(mixed, axis=-1), golden["pseudo_label"])
  close(confidence, golden["max_probs"], 1e-6)

  with np.load(golden.path) as file:
    step = file["sigmoid_mode_iter"].item()  # of all cases

  def unsupervised(student, loss, by):
    weight = classmix.pixel_weight(
      confidence, step, by=by, min_confidence=THRESHOLD, rampup_steps=10_000
    )
    return jnp.mean(weight * classmix.consistency(loss, student, mixed))

  for theirs, by in {
    "threshold_uniform": "batch",
    "threshold": "pixel",
    "sigmoid": "ramp",
    "False": "none",
  }.items():
    close(unsupervised(student, "cross_entropy", by), golden[f"CE_{theirs}"], 0, 1e-5)
  close(unsupervised(student, "mse", "batch"), golden["MSE_threshold_uniform"], 0, 1e-5)
  share = classmix.pixel_weight(confidence, 0, by="batch", min_confidence=THRESHOLD, rampup_steps=0)
  close(share, golden["CE_threshold_uniform_weight"], 1e-6)
  close(share, golden["MSE_threshold_uniform_weight"], 1e-6)
  gradient = jax.grad(unsupervised)(student, "cross_entropy", "batch")
  close(gradient, np.moveaxis(golden["CE_threshold_uniform_grad"], 1, -1), 1e-7, 1e-5)


@pytest.mark.golden("classmix_cut_cow_masks", case=r"c\d+")
def test_cut_and_cow_masks(golden):
  size = tuple(golden["cut_hw"].tolist())
  low, high, value = golden["cut_draws_low_high_value"].T
  low = np.floor(low)  # as NumPy's randint does
  draws = (value - low + 0.5) / (high - low)
  np.testing.assert_array_equal(
    mixing.cut_masks(jnp.asarray(draws[None]), size)[0], golden["cut_mask"]
  )

  sigma, share = golden["cow_sigma_p"].tolist()
  with jax.enable_x64(True):
    draws = mixing.CowDraws(
      jnp.asarray(golden["cow_noise_f64"][None]), jnp.asarray([round(sigma, 6)])
    )
    masks = mixing.cow_masks(draws, share=round(share, 6), max_sigma=sigma)
  assert np.mean(masks[0] != golden["cow_mask"]) <= 0.005


@pytest.mark.golden("classmix_ema", case=r"c\d+")
def test_teacher_of_parameters(golden):
  names = sorted(golden.under("t_init_"))
  net = flat_net(*(golden[f"t_init_{name}"] for name in names))
  for index, step in enumerate(golden["iters"].tolist()):
    student = flat_net(*(golden[f"s_{index}_{name}"] for name in names))
    net = nets.ema(net, student, schedules.ema_decay(step, number(golden["alpha"]), WARMUP))
    jax.tree.map(
      lambda got, want: close(got, want, 1e-6),
      net,
      flat_net(*(golden[f"t_{index}_{name}"] for name in names)),
    )


@pytest.mark.golden("classmix_schedules")
def test_schedules(golden):
  for name in golden.under("sigmoid_ramp_"):
    weight = classmix.pixel_weight(
      jnp.ones(1), golden["iter"], by="ramp", min_confidence=THRESHOLD, rampup_steps=int(name)
    )
    close(weight, golden[f"sigmoid_ramp_{name}"], 1e-6)
  for name in golden.under("lr_poly_"):
    rates = schedules.poly(golden["iter"], base=golden["lr_base"].item(), total_steps=int(name))
    close(rates, golden[f"lr_poly_{name}"], 0, 1e-6)


@pytest.mark.golden("classmix_sup_ce")
def test_supervised_cross_entropy(golden):
  label = with_void(golden["target"], golden["ignore"].item())
  value, gradient = jax.value_and_grad(losses.cross_entropy_mean)(last(golden["logits"]), label)
  close(value, golden["loss"], 1e-6)
  close(gradient, np.moveaxis(golden["grad"], 1, -1), 1e-6)


@pytest.mark.golden("classmix_blur_kernel")
def test_blur_kernel_size(golden):
  for size, kernel in zip(golden["hw"].tolist(), golden["kernel_yx"].tolist(), strict=True):
    assert gaussian.kernel_size(tuple(size)) == tuple(kernel)


@pytest.mark.golden("classmix_train_steps")
def test_classmix_steps(golden):
  hp = {name: value.item() for name, value in golden.under("hp/").items()}
  # The learning rate falls over num_iterations; batch norm's parameters are frozen, everything else
  # decays.
  task = make_task(
    golden,
    epochs=1,
    iters_per_epoch=hp["num_iterations"],
    decay_scope="all",
    factors={"^bn": 0.0, "^cls": 10.0},
  )
  method = classmix.classmix(
    task, weight=hp["consistency_weight"], min_confidence=hp["conf_thresh"], decay=hp["ema_alpha"]
  )
  state = toy.start(method, golden, {"student": "init/student/", "teacher": "init/teacher/"})
  steps = range(toy.num_steps(golden))
  batches = [
    {
      "labeled": {
        "image": toy.nhwc(golden[f"image_{index}"]),
        "label": with_void(golden[f"label_{index}"], hp["ignore_label"]),
      },
      "unlabeled": {"weak": toy.nhwc(golden[f"image_unsup_{index}"])},
    }
    for index in steps
  ]
  recorded = [
    {"mask": uniforms(golden[f"chosen_classes_{index}"], hp["num_classes"])} for index in steps
  ]

  show = jax.jit(method.show)
  before = state
  for index, (after, metrics) in enumerate(toy.run(method, state, batches, recorded)):
    draws = method.draw(jax.random.key(index), batches[index]) | recorded[index]
    panels, _ = show(before, batches[index], draws)
    _, teacher, pasted, _ = (panel.values for panel in panels)
    np.testing.assert_array_equal(pasted, golden[f"mix_mask_{index}"])
    mixed = classmix.paste_on_next(pasted.astype(bool), teacher)
    np.testing.assert_array_equal(jnp.argmax(mixed, axis=-1), golden[f"pseudo_label_{index}"])

    check = functools.partial(np.testing.assert_allclose, rtol=0, err_msg=f"step {index}")
    check(metrics["loss_supervised"], golden["log/loss_l"][index], atol=2e-5)
    check(metrics["loss_unsupervised"], golden["log/loss_u"][index], atol=2e-5)
    check(metrics["confident_fraction"], golden["log/unlabeled_weight"][index], atol=1e-6)
    rates = [
      metrics["learning_rate"] * task.optimizer.multiplier(path)
      for path in ("conv/kernel", "cls/kernel")
    ]
    check(rates, golden["log/lr"][index], atol=1e-6)
    gradient = {
      name: part for name, part in after.nets["student"].opt_state[0].items() if name != "bn"
    }
    toy.assert_tree_close(
      gradient,
      toy.from_torch(golden.under(f"step{index}/grad/student/"))[0],
      1e-5,
      f"gradient {index}",
    )
    for role in ("student", "teacher"):
      toy.assert_net(after.nets[role], golden, f"step{index}/{role}/")
    before = after
