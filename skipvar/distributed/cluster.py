"""Joining or starting a Ray cluster, and what it has room for."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import tenacity

from skipvar.config import RunConfig
from skipvar.distributed.environment import check_output_stays, cluster_address
from skipvar.errors import ConfigError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
START_ATTEMPTS = 3
LOCAL_OBJECT_STORE_BYTES = 100_000_000
"""Images never pass through Ray's object store, so a local cluster needs next to none."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connected cluster and what one replica takes of it."""

    is_local: bool
    device: str
    """cpu or cuda: where the replicas run."""
    cpus_per_replica: int
    gpus_per_replica: float

    def actor_options(self) -> dict[str, Any]:
        """Ray options of one replica. Threads are set before any library starts them: too many cost a factor of ten."""
        threads = str(self.cpus_per_replica)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        return {
            "num_cpus": self.cpus_per_replica,
            "num_gpus": self.gpus_per_replica,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": environment},
        }

    def room(self) -> int:
        """How many replicas the cluster can hold as it is now."""
        resources = ray.cluster_resources()
        room = int(resources.get("CPU", 0) // self.cpus_per_replica)
        return min(room, int(resources.get("GPU", 0) // self.gpus_per_replica)) if self.gpus_per_replica else room


@contextlib.contextmanager
def connect(config: RunConfig) -> Iterator[Cluster]:
    """Join the cluster that the configuration names, or start a local one; leave it (or end it) afterwards."""
    address = cluster_address(config)
    if address is not None:
        _check_answers(address)
    if ray.is_initialized():  # a test or a notebook brought its own
        yield _survey(config, is_local=address is None)
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address is None:
            start_local(_local_cpus(config))
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises bare ones too
        where = f"Ray cluster at {address} cannot be joined" if address else "A local Ray cluster cannot be started"
        raise ConfigError(f"{where}: {str(error).strip().splitlines()[0].rstrip('.')}.") from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts one of its own on SIGTERM
            signal.signal(number, handler)
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # deaths of replicas are ours to report, once
    try:
        yield _survey(config, is_local=address is None)
    finally:
        ray.shutdown()


@tenacity.retry(
    stop=tenacity.stop_after_attempt(START_ATTEMPTS),
    retry=tenacity.retry_if_exception_message(match=r"(?s).*timed out during startup.*"),
    before_sleep=lambda _: logger.warning("This machine is too busy for Ray to start in its 30 seconds; trying again"),
    reraise=True,
)
def start_local(num_cpus: int) -> None:
    """Start a Ray cluster on this machine alone, with as few processes as it can do with."""
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
    )


def _check_answers(address: str) -> None:
    """Ray tries a wrong address for minutes; a look at its port tells in seconds."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            return
    except (OSError, ValueError):
        raise ConfigError(
            f"No Ray cluster answers at {address} (cluster.address or RAY_ADDRESS); give the head's host:port, "
            "or cluster.address=local for this machine alone."
        ) from None


def _local_cpus(config: RunConfig) -> int:
    """This machine's cores, or more where the configuration asks for more replicas by number."""
    asked = config.cluster.replicas.min if config.cluster.replicas.max == "auto" else config.cluster.replicas.max
    return int(max(len(os.sched_getaffinity(0)), asked * config.cluster.cpus_per_replica))


def _survey(config: RunConfig, *, is_local: bool) -> Cluster:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        check_output_stays(
            config.output.path, f"the {len(nodes)} nodes of this cluster would each write into their own"
        )
    num_gpus = ray.cluster_resources().get("GPU", 0)
    device = config.model.device
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    if is_local and device == "cuda" and not num_gpus:
        raise ConfigError("model.device: cuda is asked for, but this machine has no GPU; use model.device=cpu or auto.")
    gpus = config.cluster.gpus_per_replica
    return Cluster(
        is_local=is_local,
        device=device,
        cpus_per_replica=config.cluster.cpus_per_replica,
        gpus_per_replica=float(1 if device == "cuda" else 0) if gpus == "auto" else float(gpus),
    )
