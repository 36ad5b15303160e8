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

    from skipvar.distributed.cluster import start_local

    cloudpickle.register_pickle_by_value(fakes)  # replicas have no tests/ on their path
    start_local(num_cpus=4)
    yield
    ray.shutdown()
