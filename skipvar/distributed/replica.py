"""The Ray actor around one engine: thin; what happens to a unit is in worker.py."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from skipvar.config import RunConfig
from skipvar.distributed.dispatch import Assignment
from skipvar.distributed.logs import StoredLog, log_name
from skipvar.distributed.opening import WorkOrder
from skipvar.distributed.worker import Progress, Worker, fail_poisoned
from skipvar.shards.cache import fetch
from skipvar.shards.prompts import read_unit
from skipvar.shards.storage import open_storage
from skipvar.shards.writer import UnitWriter
from skipvar.types import Failure, Request, UnitReport

logger = logging.getLogger(__name__)

EngineFactory = Callable[[RunConfig], Any]

CACHE_FOLDER = Path(os.environ.get("SKIPVAR_CACHE", "~/.cache/skipvar")).expanduser()


def build_real_engine(config: RunConfig) -> Any:
    """The engine that the configuration describes, on this process' device."""
    import torch  # replicas only: the driver does without

    from skipvar.engine.build import build_engine

    torch.set_num_threads(config.cluster.cpus_per_replica)
    return build_engine(_with_local_files(config))


def _with_local_files(config: RunConfig) -> RunConfig:
    """The configuration with weights and policy fetched from S3, once a node."""

    def local(uri: str | None) -> str | None:
        if uri is None or not uri.startswith("s3://"):
            return uri
        return str(fetch(uri, CACHE_FOLDER, config=config.storage))

    model = config.model
    return replace(
        config,
        model=replace(
            model,
            path=local(model.path),
            vae_path=local(model.vae_path),
            text_encoder_path=local(model.text_encoder_path),
        ),
        policy=local(config.policy),
    )


class Replica:
    """One engine on one device. Every method returns something small; images never pass through Ray."""

    def __init__(self, name: str, engine_factory: EngineFactory) -> None:
        self.name = f"{name}@{socket.gethostname()}"
        self._engine_factory = engine_factory
        self._worker: Worker | None = None
        self._log: StoredLog | None = None

    async def start(self, config: RunConfig) -> dict[str, Any]:
        """Load the model; returns what was resolved and measured (`Engine.describe`)."""
        return await asyncio.to_thread(self._start, config)

    def _start(self, config: RunConfig) -> dict[str, Any]:
        self._config = config
        self._engine = self._engine_factory(config)
        return {**self._engine.describe(), "replica": self.name, "process": os.getpid()}

    async def open(self, order: WorkOrder) -> None:
        """Make ready to take units of this run."""
        storage = open_storage(order.dataset.output, order.dataset.storage)
        self._log = StoredLog(storage, log_name(order.session, self.name))
        logging.getLogger("skipvar").addHandler(self._log)
        logging.getLogger("skipvar").setLevel(logging.INFO)

        def read(assignment: Assignment) -> Iterable[Request | Failure]:
            return fail_poisoned(read_unit(assignment.unit, order.input), assignment)

        def open_writer(assignment: Assignment) -> UnitWriter:
            return UnitWriter(assignment.unit, order.dataset, self.name, assignment.attempt, storage)

        self._worker = Worker(
            self._engine,
            read,
            open_writer,
            wanted_requests=order.wanted_requests,
            max_open_requests=order.max_open_requests,
            num_encoders=self._config.cluster.cpus_per_replica,
        )

    async def run(self, assignment: Assignment) -> UnitReport | None:
        """Make a unit and publish it; its report, or None for a trial. Several units may run at a time."""
        return await asyncio.wrap_future(self._ready_worker().add(assignment))

    async def want_unit(self) -> None:
        """Returns when another unit is welcome."""
        await asyncio.wrap_future(self._ready_worker().want_unit())

    async def finish_up(self) -> None:
        """Nothing more is to come for now."""
        self._ready_worker().finish_up()

    async def progress(self, delay_seconds: float) -> Progress:
        """What is made but not published, after a while."""
        await asyncio.sleep(delay_seconds)
        return self._ready_worker().progress()

    async def stop(self) -> dict[str, Any]:
        """Finish what is being published, drop the rest, and return the engine's statistics."""
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop)
        if self._log is not None:
            await asyncio.to_thread(self._log.close)
        statistics: dict[str, Any] = self._engine.statistics.to_dict()
        return statistics

    def _ready_worker(self) -> Worker:
        assert self._worker is not None, "open() comes first"
        return self._worker


ReplicaActor = ray.remote(Replica)
