"""Joining or starting a Ray cluster, and what it has room for."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import tenacity
from ray._private.state import state as draining

from skipvar.config import RunConfig
from skipvar.distributed.environment import check_output_stays, cluster_address
from skipvar.errors import ConfigError, first_line
from skipvar.model import allocator
from skipvar.model.device import Device, has_gpu

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
START_ATTEMPTS = 3
LOCAL_OBJECT_STORE_BYTES = 100_000_000
"""Images never pass through Ray's object store, so a local cluster needs next to none."""


class Cluster:
    """A cluster and what one replica takes of it. A local one starts when the first replica is needed."""

    def __init__(self, config: RunConfig, *, is_local: bool) -> None:
        """Use `connect`."""
        self._config, self._is_local = config, is_local
        self.cpus_per_replica = config.cluster.cpus_per_replica
        self.device = self._find_device()
        """cpu or cuda: where the replicas run."""
        gpus = config.cluster.gpus_per_replica
        self.gpus_per_replica = float(1 if self.device == "cuda" else 0) if gpus == "auto" else float(gpus)

    def start(self) -> None:
        """Have Ray running, if it is not yet. Raises `ConfigError` where it cannot be started here."""
        if not ray.is_initialized():
            with _ray_trouble("A local Ray cluster cannot be started"):
                start_local(_local_cpus(self._config))

    def actor_options(self) -> dict[str, Any]:
        """Ray options of one replica. Threads are set before any library starts them: too many cost a factor of ten."""
        threads = str(self.cpus_per_replica)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        if self.device == "cpu":
            environment |= allocator.ENVIRONMENT
        return {
            "num_cpus": self.cpus_per_replica,
            "num_gpus": self.gpus_per_replica,
            "scheduling_strategy": "SPREAD",  # a node that is lost takes as few as possible along
            "max_restarts": 0,
            "max_task_retries": 0,
            "enable_task_events": False,  # a line in the dashboard for every message helps nobody, and costs the driver
            "runtime_env": {"env_vars": environment},
        }

    def room(self) -> int:
        """How many replicas the cluster can hold as it is now, without the nodes that are going."""
        leaving = self.leaving_nodes()
        nodes = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
        return sum(self._room_on(node["Resources"]) for node in nodes)

    def leaving_nodes(self) -> frozenset[str]:
        """Nodes that have announced that they are going (preemption, `ray drain-node`, the autoscaler)."""
        return frozenset(draining.get_draining_nodes())  # Ray's own libraries ask it too; there is no public way

    def _room_on(self, resources: Mapping[str, float]) -> int:
        room = int(resources.get("CPU", 0) // self.cpus_per_replica)
        return min(room, int(resources.get("GPU", 0) // self.gpus_per_replica)) if self.gpus_per_replica else room

    def _find_device(self) -> Device:
        wanted = self._config.model.device
        has_gpus = has_gpu() if self._is_local else ray.cluster_resources().get("GPU", 0) > 0
        if self._is_local and wanted == "cuda" and not has_gpus:
            raise ConfigError(
                "model.device: cuda is asked for, but this machine has no GPU; use model.device=cpu or auto."
            )
        return ("cuda" if has_gpus else "cpu") if wanted == "auto" else wanted


@contextlib.contextmanager
def connect(config: RunConfig) -> Iterator[Cluster]:
    """Join the cluster that the configuration names, or have a local one ready; leave it (or end it) afterwards."""
    address = cluster_address(config)
    is_ours = not ray.is_initialized()  # else a test or a notebook brought its own
    if address is not None:
        _check_answers(address)
        if is_ours:
            with _ray_trouble(f"Ray cluster at {address} cannot be joined"):
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if address is not None:
            _check_output(config)
        yield Cluster(config, is_local=address is None)
    finally:
        if is_ours:
            ray.shutdown()


@contextlib.contextmanager
def _ray_trouble(what: str) -> Iterator[None]:
    """Start or join Ray: its errors become a sentence, its signal handlers and its log do not stay."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception as error:  # Ray raises bare ones too
        raise ConfigError(f"{what}: {first_line(error)}.") from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts one of its own on SIGTERM
            signal.signal(number, handler)
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # deaths of replicas are ours to report, once


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


def _check_output(config: RunConfig) -> None:
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if num_nodes > 1:
        check_output_stays(config.output.path, f"the {num_nodes} nodes of this cluster would each write into their own")
