"""The baseline: one network on the labeled images alone."""

from pseudoseg_jax import nets
from pseudoseg_jax.contract import Method, Needs, Task


def supervised(task: Task) -> Method:
  """Trains one network on the task's criterion, on labeled images.

  The criterion is cross entropy, or OHEM where the config asks for it.
  """

  def draw(key, batch):
    return nets.dropout_keys(key, "student")

  def update(state, batch, draws):
    labeled = batch["labeled"]

    def objective(live):
      (logits,), student = nets.forward(
        task.network, live["student"], labeled["image"], dropout=draws["student"]
      )
      supervised_loss = task.criterion(logits, labeled["label"])
      return nets.Outcome({"supervised": supervised_loss}, {"student": student})

    return nets.descend(task.optimizer, state, objective)

  return Method(
    Needs(unlabeled=False),
    nets.init_student(task),
    draw,
    update,
    nets.predictors(task.network, "student"),
  )
