import pytest

from pseudoseg_jax import checks
from pseudoseg_jax.data import splits


def test_read_list_takes_any_line_ending_and_no_final_newline(tmp_path):
  path = tmp_path / "list.txt"
  path.write_bytes(b"\xef\xbb\xbfb\r\n\r\n  a \r\nc/d")
  assert splits.read_list(path) == ("b", "a", "c/d")


@pytest.mark.parametrize(
  ("content", "part"), [(b"\n \r\n", "none"), (b"a\nb\na\n", "a more than once"), (b"\xff\xfe\x00", "file")]
)
def test_unusable_list_is_named(tmp_path, content, part):
  path = tmp_path / "list.txt"
  path.write_bytes(content)
  with pytest.raises(checks.InputError) as error:
    splits.read_list(path)
  assert str(path) in str(error.value) and part in str(error.value)


def test_missing_list_is_named(tmp_path):
  with pytest.raises(checks.InputError, match="nowhere.txt"):
    splits.read_list(tmp_path / "nowhere.txt")


def test_every_kth_is_nested_and_counts_as_published():
  ids = [f"{number:03d}" for number in reversed(range(367))]  # CamVid's count
  parts = {name: splits.every_kth(ids, name) for name in ("1_16", "1_8", "1_4", "1_2", "full")}
  assert [len(part) for part in parts.values()] == [23, 46, 92, 184, 367]
  assert parts["1_8"][:3] == ("000", "008", "016")
  assert set(parts["1_16"]) < set(parts["1_8"]) < set(parts["1_4"]) < set(parts["1_2"]) < set(parts["full"])


@pytest.mark.parametrize("name", ["1_0", "1/8", "0.5", ""])
def test_unknown_fraction_says_what_is_allowed(name):
  with pytest.raises(checks.InputError, match="1_8"):
    splits.every_kth(["a"], name)


def test_complement_keeps_the_order_and_rejects_a_foreign_list():
  assert splits.complement(["c", "a", "b"], ["a"]) == ("c", "b")
  with pytest.raises(checks.InputError, match="1 of 2 that are not among all ids: x"):
    splits.complement(["a", "b"], ["a", "x"])


def test_overlapping_lists_are_all_reported():
  splits.check_disjoint(labeled=["a"], unlabeled=["b"], val=["c"])
  with pytest.raises(checks.InputError) as error:
    splits.check_disjoint(labeled=["a", "v"], unlabeled=["a", "b"], val=["v"])
  assert "labeled and unlabeled" in str(error.value) and "labeled and val" in str(error.value)
  assert "unlabeled and val" not in str(error.value)
