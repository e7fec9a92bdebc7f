"""Settings that follow from the data: what holds of them for data of any kind, and that what a user
sets stays.
"""

import json

import numpy as np
import pytest

import pseudoseg_jax
from pseudoseg_jax import build, config as configs, settings, summary
from pseudoseg_jax.options import is_open


def draw_facts(seed):
  rng = np.random.default_rng(seed)
  sizes = [
    tuple(int(side) for side in np.exp(rng.uniform(np.log(20), np.log(6000), 2)))
    for _ in range(rng.integers(1, 9))
  ]
  accelerator = bool(rng.integers(2))
  return settings.Facts(
    num_labeled=int(rng.integers(1, 3000)),
    num_unlabeled=int(rng.integers(1, 100_000)),
    sizes=sizes,
    accelerator=accelerator,
    num_devices=int(rng.choice([1, 2, 3, 8, 64])),
    memory_gib=float(rng.choice([0, 8, 80])) * accelerator,
  )


@pytest.mark.parametrize("seed", range(40))
def test_settings_fit_data_and_machine(seed):
  facts = draw_facts(seed)
  choices = settings.choose(facts)
  assert all(choice.reason for choice in choices) and {choice.option for choice in choices} <= set(
    settings.OPTIONS
  )
  chosen = {choice.option: choice.value for choice in choices}
  assert not any(is_open(value) for value in chosen.values())
  height, width = np.median(np.array(facts.sizes), axis=0).astype(int)
  crop, (least, greatest) = chosen["views.crop_size"][0], chosen["views.scales"]
  assert crop % 16 == 0 and 16 <= crop <= max(16, min(height, width))
  assert 0 < least <= greatest <= 1
  assert max(height, width) * least <= 1.06 * crop  # a whole photograph, but for rounding
  assert chosen["evaluation.scales"] == (greatest,)
  for stream in ("labeled", "unlabeled"):
    assert chosen[f"batch_size_global.{stream}"] % facts.num_devices == 0
  assert (
    1000 <= chosen["total_steps"] <= 20_000
    and chosen["checkpoint_every_steps"] <= chosen["total_steps"] // 10
  )
  if chosen["evaluation.style"] == "whole":
    assert max(height, width) * greatest <= 640


@pytest.mark.parametrize("seed", range(20))
def test_what_is_set_stays_and_the_rest_is_chosen(seed):
  rng, facts = np.random.default_rng(seed), draw_facts(seed)
  own = {
    "views.crop_size": (48, 48),
    "views.scales": (0.7, 1.3),
    "evaluation.scales": (0.5, 1.0),
    "evaluation.style": "slide",
    "evaluation.pad_multiple": 8,
    "evaluation.window_pixels": (64, 64),
    "batch_size_global.labeled": 64,
    "batch_size_global.unlabeled": 128,
    "total_steps": 123,
    "eval_every_steps": 7,
    "checkpoint_every_steps": 9,
  }
  assert own.keys() == set(settings.OPTIONS)
  own = {option: value for option, value in own.items() if rng.integers(2)}
  config = configs.make_config(
    "supervised", network="tiny", overrides={key: _text(value) for key, value in own.items()}
  )
  before = configs.all_options(config)
  settled, chosen = settings.settle(configs.frozen(config), facts)
  after = configs.all_options(settled)
  assert {option: after[option] for option in own} == own and not settings.open_options(settled)
  assert {key for key in after if after[key] != before[key]} <= set(settings.OPTIONS) - own.keys()
  assert not {choice.option for choice in chosen} & own.keys()
  assert after["eval_every_steps"] <= after["total_steps"] or "eval_every_steps" in own
  # What is printed can be typed.
  typed = configs.make_config(
    "supervised", network="tiny", overrides={key: _text(value) for key, value in own.items()}
  )
  flags = [
    line.split()[0].removeprefix("--config.").split("=", 1)
    for line in settings.in_words(chosen).splitlines()[1:]
  ]
  configs.override(typed, dict(flags))
  assert all(configs.all_options(typed)[choice.option] == choice.value for choice in chosen)


def _text(value):
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_configs_without_open_options_are_left_alone():
  for path in ("quickstart.py", "voc.py", "camvid.py:method=cps"):
    assert settings.open_options(configs.frozen(configs.load(f"configs/{path}"))) == []
  given = configs.load("configs/folder.py:crop=33,steps=4")
  assert given.views.crop_size == (33, 33) and given.total_steps == 4


def test_a_run_chooses_tells_and_keeps_its_settings(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  images = {f"{index}": rng.integers(0, 255, (20, 40, 3), np.uint8) for index in range(9)}
  masks = {name: (image[..., 0] > 99).astype(np.uint8) for name, image in images.items()}
  labeled = [images[name] for name in "0123"], [masks[name] for name in "0123"]
  data = pseudoseg_jax.make_data(
    *labeled,
    ["dark", "bright"],
    unlabeled=[images[name] for name in "4567"],
    evaluated=([images["8"]], [masks["8"]]),
    background="no",
  )
  options = {"network.width": 4, "evaluation.pictures": 0, "checkpoint_every_steps": 1}
  monkeypatch.setattr(
    settings, "facts_of", lambda data: draw_facts(0)._replace(num_devices=8, sizes=[(20, 40)])
  )
  choose = settings.choose

  def briefly(facts, crop, steps):
    return [
      choice._replace(value=2) if choice.option == "total_steps" else choice
      for choice in choose(facts, crop=crop, steps=steps)
    ]

  monkeypatch.setattr(settings, "choose", briefly)
  config = lambda: pseudoseg_jax.make_config("single_pseudo", network="tiny", overrides=options)
  pseudoseg_jax.train(config(), tmp_path, data=data)
  saved = json.loads((tmp_path / "config.json").read_text())
  assert (
    saved["total_steps"] == 2
    and saved["views"]["crop_size"] == [16, 16]
    and saved["checkpoint_every_steps"] == 1
  )
  log = (tmp_path / "log.txt").read_text()
  assert (
    "chosen from the data" in log
    and "--config.views.crop_size=16,16" in log
    and "checkpoint_every_steps=" not in log
  )
  monkeypatch.setattr(
    settings, "choose", lambda *_, **__: pytest.fail("a resumed run chooses nothing")
  )
  again = pseudoseg_jax.train(config(), tmp_path, data=data)
  assert again["finished"] and "resumed with a change" not in (tmp_path / "log.txt").read_text()


def test_what_is_set_wrongly_is_told_although_the_rest_is_open():
  config = configs.make_config(
    "supervised", network="tiny", overrides={"batch_size_global.labeled": -2, "total_steps": -5}
  )
  problems = pseudoseg_jax.checks.Problems("the config cannot be run")
  with pytest.raises(
    pseudoseg_jax.checks.InputError, match="total_steps: got -5(.|\n)*labeled: got -2"
  ):
    build.check_run(configs.frozen(config, problems), problems)


def test_the_supervised_run_to_compare_with_is_named_although_the_file_leaves_settings_open():
  source = {"path": "configs/folder.py", "argument": "method=fixmatch"}
  config = configs.frozen(configs.load("configs/folder.py:method=fixmatch"))
  # As a run reads it: pretrained weights bring their normalization.
  config, _ = settings.settle(build.take_normalization(config), draw_facts(0))
  assert summary.baseline_command(source, config, {}) == "configs/folder.py:method=supervised"
