"""A model on this machine, without Ray: what a replica, a benchmark and a dry run build their engine with."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from skipvar.config import ModelSection, RunConfig, StorageConfig
from skipvar.engine.resolved import Resolved, resolve
from skipvar.shards.cache import StoredFiles, fetch
from skipvar.skip.policy import TRIALS

if TYPE_CHECKING:
    from skipvar.engine.audit import AuditRule
    from skipvar.engine.engine import Engine
    from skipvar.engine.trials import TrialRule
    from skipvar.model.pipeline import Pipeline

CACHE_FOLDER = Path(os.environ.get("SKIPVAR_CACHE", "~/.cache/skipvar")).expanduser()


def build_local_engine(
    config: RunConfig, resolved: Resolved | None = None, pipeline: "Pipeline | None" = None
) -> "Engine":
    """The engine that the configuration describes, on this process' device; sets torch's number of threads.

    `resolved` is the run's (None: resolved here). `pipeline` is the model where it is loaded already; else weights are
    fetched from S3 where they lie there, once a machine.
    """
    import torch  # here, so that the driver, which only hands this function to its replicas, does without

    from skipvar.engine.build import build_engine

    torch.set_num_threads(config.cluster.cpus_per_replica)
    resolved = resolved or resolve(config, StoredFiles(config.storage))
    if pipeline is None:
        config = replace(config, model=_with_local_files(config.model, config.storage))
    return build_engine(config, resolved, _rule(config, resolved), pipeline)


def _rule(config: RunConfig, resolved: Resolved) -> "TrialRule | AuditRule | None":
    """How images are compared with `base`, where any are; a run without does without torchmetrics."""
    if resolved.policy.name == TRIALS:
        from skipvar.engine.trials import TrialRule
        from skipvar.quality.similarity import find_lpips, psnr, ssim

        return TrialRule(ssim, psnr, find_lpips())
    if fraction := config.audit.fraction:
        from skipvar.engine.audit import AuditRule
        from skipvar.quality.audit import is_audited
        from skipvar.quality.similarity import ssim

        return AuditRule(lambda request: is_audited(request, fraction), ssim)
    return None


def _with_local_files(model: ModelSection, storage: StorageConfig) -> ModelSection:
    def local(uri: str | None) -> str | None:
        return None if uri is None else str(fetch(uri, CACHE_FOLDER, storage))

    return replace(
        model,
        path=local(model.path),
        vae_path=local(model.vae_path),
        text_encoder_path=local(model.text_encoder_path),
    )
