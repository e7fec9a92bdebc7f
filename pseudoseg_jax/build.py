"""The parts of a run, made from its config.

They are its data, its method, its batches and its evaluation.
"""

from pseudoseg_jax.builders.checking import (
  check_run as check_run,
)
from pseudoseg_jax.builders.classes import (
  build_classes as build_classes,
)
from pseudoseg_jax.builders.data import (
  build_data as build_data,
  build_domains as build_domains,
  config_of as config_of,
  make_data as make_data,
  name_given as name_given,
  with_config as with_config,
)
from pseudoseg_jax.builders.evaluation import (
  build_evaluator as build_evaluator,
  build_labeler as build_labeler,
  build_protocol as build_protocol,
  describe_protocol as describe_protocol,
)
from pseudoseg_jax.builders.folder import (
  left_out as left_out,
  mask_options as mask_options,
  unlabeled_masks as unlabeled_masks,
)
from pseudoseg_jax.builders.inputs import (
  batches as batches,
  build_pipeline as build_pipeline,
  build_pipelines as build_pipelines,
  panel_batch as panel_batch,
  tell_imbalance as tell_imbalance,
  weigh_classes as weigh_classes,
)
from pseudoseg_jax.builders.method import (
  build_criterion as build_criterion,
  build_method as build_method,
  build_network as build_network,
  build_optimizer as build_optimizer,
  take_normalization as take_normalization,
  tell_normalization as tell_normalization,
)
from pseudoseg_jax.builders.opened import (
  Data as Data,
  Domain as Domain,
  images_of as images_of,
)
