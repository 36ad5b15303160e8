"""What all tests share: one thread, a seeded emoji model, and requests."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_worker_niceness", "0")  # else replicas starve beside other tests, and time runs out

from collections.abc import Callable

import pytest
import torch

from skipvar.config import EngineConfig, ModelSection, RunConfig
from skipvar.types import Request

torch.set_num_threads(1)

NUM_SCALES = 10
PROMPTS = (
    "an apple",
    "four red cars in a grid on a blue background, with many small details that make a longer text",
    "x",
    "a dog on a bicycle",
)

WHOLE_JOBS = ("faults", "jobs", "distributed", "storage")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs come first: they wait the most, and the last file of all should be a short one."""
    items.sort(key=lambda item: item.path.parent.name not in WHOLE_JOBS)


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """Requests that differ in text length, guidance, negative prompt and seed."""

    def make(position: int, **changes: object) -> Request:
        values: dict[str, object] = {
            "position": position,
            "image_index": 0,
            "id": f"{position:012d}",
            "prompt": PROMPTS[position % len(PROMPTS)],
            "negative_prompt": None if position % 5 else "blurry, dark",
            "seed": 7 * position,
            "cfg": (3.0,) * NUM_SCALES if position % 3 else (3.0, 1.0, 2.0) * 3 + (1.0,),
            "tau": (0.5,) * NUM_SCALES,
            "top_k": 900,
            "top_p": 0.97,
            "aspect_ratio": 1.0,
        }
        return Request(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def run_config() -> Callable[..., RunConfig]:
    """A configuration of the emoji sizes with seeded random weights."""

    def make(policy: str = "spread", *, force: bool = False, **engine: object) -> RunConfig:
        model = ModelSection(name="emoji", path="random:0", dtype="float32", device="cpu")
        return RunConfig(model=model, policy=policy, policy_force=force, engine=EngineConfig(**engine))  # type: ignore[arg-type]

    return make
