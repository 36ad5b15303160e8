"""A run with a fake engine on the cluster that is named, in a process of its own: `node_job.py CONFIG [key=value ...]`.

The engine is that of tests/distributed: a step takes `STEP_SECONDS`, and pixels and strategy follow from the request.
No step begins while a file `pause` lies beside the input: what a test does meanwhile may take as long as it likes.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import fakes
from ray import cloudpickle

from skipvar.config import RunConfig
from skipvar.config_file import load_config
from skipvar.distributed import driver
from skipvar.distributed.generate import generate
from skipvar.distributed.stopping import StopSignal
from skipvar.types import Failure, Image

cloudpickle.register_pickle_by_value(fakes)
STEP_SECONDS = float(os.environ.get("STEP_SECONDS", "0.2"))


class PausedEngine(fakes.FakeEngine):
    def __init__(self, pause: Path) -> None:
        super().__init__(step_seconds=STEP_SECONDS)
        self.pause = pause

    def step(self, flush: bool = False) -> list[Image | Failure]:
        while self.pause.exists():
            time.sleep(0.1)
        return super().step(flush)


def build(config: RunConfig, resolved: object) -> fakes.FakeEngine:
    return PausedEngine(Path(config.input.path).with_name("pause"))


if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    driver.SURVEY_SECONDS = 1.0
    stop = StopSignal()
    with stop.listening():
        outcome = generate(load_config(Path(sys.argv[1]), sys.argv[2:]), stop, build)
    print(outcome.exit_code, outcome.reason)
    sys.exit(outcome.exit_code)
