"""One local Ray for all tests of this folder, with more room than the machine has cores."""

from collections.abc import Iterator

import fakes
import pytest

from skipvar.config import RunConfig
from skipvar.distributed.environment import prepare_environment


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    prepare_environment(RunConfig())
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(fakes)  # replicas have no tests/ on their path
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
