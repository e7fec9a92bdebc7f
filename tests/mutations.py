"""What people and disks do to JSON files."""


def mutated(value, rng):
  """A JSON value with one leaf (or branch) replaced by something else."""
  other = rng.choice(
    [None, True, -1, 0, 1e308, "", "x", [], {}, [1], {"a": 1}, [[0]], "\x00", 2**70]
  )
  if isinstance(value, dict) and value and rng.random() < 0.9:
    key = rng.choice(sorted(value))
    if rng.random() < 0.1:
      return {name: item for name, item in value.items() if name != key}
    return value | {key: mutated(value[key], rng)}
  if isinstance(value, list) and value and rng.random() < 0.7:
    index = rng.randrange(len(value))
    return [*value[:index], mutated(value[index], rng), *value[index + 1 :]]
  return other
