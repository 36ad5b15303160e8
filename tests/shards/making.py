"""Datasets without a model: every image is noise from its request's seed."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from skipvar.config import RunConfig
from skipvar.shards.ledger import Ledger
from skipvar.shards.prompts import Plan, plan_input, read_unit
from skipvar.shards.record import RunRecord, fingerprint
from skipvar.shards.schema import SCHEMA_VERSION
from skipvar.shards.storage import Storage, open_storage
from skipvar.shards.unitfile import data_name, read_unit_footer
from skipvar.shards.writer import DatasetSpec, UnitWriter
from skipvar.types import Failure, Image, Probe, Request, Unit, UnitReport

STRATEGIES = ("base", "skip_1", "uncond_2")
NUM_SCALES = 3


def make_config(**values: Any) -> RunConfig:
    """A configuration with `section__key=value` changes."""
    config = RunConfig()
    for path, value in values.items():
        section, _, key = path.partition("__")
        changed = dataclasses.replace(getattr(config, section), **{key: value}) if key else value
        config = dataclasses.replace(config, **{section: changed})
    return config


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read_all(config: RunConfig, num_scales: int = NUM_SCALES) -> list[Request | Failure]:
    """The whole input, unit by unit, as replicas read it."""
    plan = plan_input(config, num_scales)
    return [item for index in range(plan.num_units) for item in read_unit(plan.unit(index), plan.spec)]


def draw(request: Request) -> Image:
    """An image that depends on its request alone."""
    generator = np.random.default_rng(request.seed)
    return Image(
        request=request,
        pixels=generator.integers(0, 256, (16, 24, 3), dtype=np.uint8),
        strategy=STRATEGIES[request.seed % len(STRATEGIES)],
        probe=Probe(sobel_change=0.1, fft_high_frequency_ratio=0.2),
        strategy_scores={"base": 0.75, "skip_1": 0.25},
        scales_run=NUM_SCALES,
        cost_share=0.5,
        engine_seconds=0.01,
    )


def refuse_bad(request: Request) -> Image | Failure:
    """`draw`, except that prompts with the word `bad` fail."""
    return Failure.of(request, ValueError("a bad prompt")) if "bad" in request.prompt else draw(request)


class Job:
    """A run in miniature: plan, open, make units, finish."""

    def __init__(
        self, config: RunConfig, make: Callable[[Request], Image | Failure] = refuse_bad, parts: Any = None
    ) -> None:
        self.config = config
        self.make = make
        self.storage: Storage = open_storage(config.output.path, config.storage)
        self.ledger = Ledger(self.storage)
        self.plan: Plan = plan_input(config, NUM_SCALES)
        self.parts = {"policy": {"name": "spread"}} if parts is None else parts
        self.record, _ = self.ledger.open_run(self.new_record())
        self.spec = DatasetSpec(
            output=self.storage.uri,
            storage=config.storage,
            form=config.output,
            images_per_prompt=config.sampling.images_per_prompt,
            columns=self.plan.spec.columns,
            model="emoji",
            policy="spread",
            fingerprint=self.record.fingerprint,
        )

    def new_record(self, **versions: str) -> RunRecord:
        return RunRecord(
            fingerprint=fingerprint(self.parts),
            schema_version=SCHEMA_VERSION,
            parts=self.parts,
            input=self.plan.identity,
            resolved={"dtype": "float32"},
            versions=versions,
        )

    def make_unit(self, unit: Unit, replica: str = "r0", attempt: int = 1) -> UnitReport:
        writer = UnitWriter(unit, self.spec, replica, attempt, self.storage)
        for item in read_unit(unit, self.plan.spec):
            writer.add(self.make(item) if isinstance(item, Request) else item)
        return writer.publish()

    def content_hash(self, unit: int) -> str:
        """Of a published unit."""
        return read_unit_footer(self.storage, data_name(unit)).content_hash

    def make_units(self, units: Iterable[Unit] | None = None) -> list[UnitReport]:
        done = self.ledger.done_units()
        left = (self.plan.unit(index) for index in range(self.plan.num_units) if index not in done)
        return [self.make_unit(unit) for unit in (left if units is None else units)]

    def finish(self) -> None:
        errors = self.ledger.num_errors()
        self.ledger.finish("finished_with_errors" if errors else "finished", {"errors": errors})


def make_dataset(folder: Path, prompts: Iterable[str], **values: Any) -> Job:
    """A finished dataset of a txt input in `folder/out`."""
    path = write(folder / "prompts.txt", "\n".join(prompts) + "\n")
    defaults = {"input__path": path, "output__path": str(folder / "out"), "output__unit_rows": 4}
    job = Job(make_config(**{**defaults, **values}))
    job.make_units()
    job.finish()
    return job
