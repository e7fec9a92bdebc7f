"""Every method, by name; its options and their defaults are the factory's keyword arguments."""

from collections.abc import Callable

from pseudoseg_jax.contract import Method
from pseudoseg_jax.methods import (
  ael,
  cct,
  classmix,
  cps,
  cross_prob,
  cutmix_seg,
  gct,
  ict,
  learn_pseudo,
  mean_teacher,
  pi_model,
  pseudoseg,
  self_correcting,
  single_pseudo,
  supervised,
  temporal_ensembling,
  unimatch,
  vat,
)

METHODS: dict[str, Callable[..., Method]] = {
  "supervised": supervised.supervised,
  "cps": cps.cps,
  "cps_cutmix": cps.cps_cutmix,
  "mean_teacher": mean_teacher.mean_teacher,
  "pseudoseg": pseudoseg.pseudoseg,
  "single_pseudo": single_pseudo.single_pseudo,
  "single_pseudo_cutmix": single_pseudo.single_pseudo_cutmix,
  "cross_prob": cross_prob.cross_prob,
  "fixmatch": unimatch.fixmatch,
  "unimatch": unimatch.unimatch,
  "cutmix_seg": cutmix_seg.cutmix_seg,
  "ict": ict.ict,
  "vat": vat.vat,
  "pi_model": pi_model.pi_model,
  "temporal_ensembling": temporal_ensembling.temporal_ensembling,
  "ael": ael.ael,
  "classmix": classmix.classmix,
  "cct": cct.cct,
  "cct_domains": cct.cct_domains,
  "ancillary": self_correcting.ancillary,
  "self_correcting": self_correcting.self_correcting,
  "learn_pseudo": learn_pseudo.learn_pseudo,
  "gct": gct.gct,
}
