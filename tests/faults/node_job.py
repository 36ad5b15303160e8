"""A run with a fake engine on the cluster that is named, in a process of its own: `node_job.py CONFIG [key=value ...]`.

The engine is that of tests/distributed: a step takes `STEP_SECONDS`, and pixels and strategy follow from the request.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import fakes
from ray import cloudpickle

from skipvar.config_file import load_config
from skipvar.distributed import driver
from skipvar.distributed.generate import generate
from skipvar.distributed.stopping import StopSignal

cloudpickle.register_pickle_by_value(fakes)
STEP_SECONDS = float(os.environ.get("STEP_SECONDS", "0.2"))


def build(config: object, resolved: object) -> fakes.FakeEngine:
    return fakes.FakeEngine(step_seconds=STEP_SECONDS)


if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    driver.SURVEY_SECONDS = 1.0
    stop = StopSignal()
    with stop.listening():
        outcome = generate(load_config(Path(sys.argv[1]), sys.argv[2:]), stop, build)
    print(outcome.exit_code, outcome.reason)
    sys.exit(outcome.exit_code)
