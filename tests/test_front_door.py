"""`skipvar.load(...).generate(...)`: the pixels that the job makes, in the prompts' order, with clear refusals."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

import skipvar
from skipvar.engine import build
from skipvar.errors import ConfigError, RowError

PROMPTS = ["an apple", "four red cars in a grid", "nine cats on pink", "x", "an apple", "a dog"]
SEEDS = [None, 5, None, 2**63 - 1, 5, None]


@pytest.fixture(scope="module")
def model() -> "skipvar.Model":
    """Random weights, so that nothing depends on what was trained."""
    return skipvar.load("emoji", path="random:0", device="cpu", dtype="float32", batch_size=3)


def test_the_very_pixels_of_the_job(model: "skipvar.Model", tmp_path: Path) -> None:
    lines = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ["sampling.seed=7", "sampling.cfg=2.5", "sampling.tau=0.4", "policy=spread", "model.path=random:0"]
    command = [sys.executable, "-m", "jobs.generate", "conf/emoji.yaml", f"input.path={tmp_path}/rows.jsonl", *settings]
    places = [f"output.path={tmp_path}/out", "model.device=cpu", "cluster.replicas.max=1", "output.unit_rows=4"]
    done = subprocess.run([*command, *places], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {}
    for path in (tmp_path / "out" / "data").glob("*.parquet"):
        rows |= {row["position"]: row for row in pq.read_table(path).to_pylist()}

    images = list(model.generate(PROMPTS, policy="spread", seed=7, seeds=SEEDS, cfg=2.5, tau=0.4))
    assert [image.request.prompt for image in images] == PROMPTS
    assert len({image.strategy for image in images}) >= 3
    for position, image in enumerate(images):
        made = np.asarray(Picture.open(io.BytesIO(rows[position]["image"]["bytes"])))
        assert (image.pixels == made).all() and image.strategy == rows[position]["strategy"]
        assert image.request.seed == rows[position]["seed"]
        assert image.probe is not None and image.probe.sobel_change == rows[position]["probe_sobel_change"]


def test_an_image_is_saved_without_loss(model: "skipvar.Model", tmp_path: Path) -> None:
    [image] = model.generate(["an apple"], policy="fixed:skip_2")
    image.save(tmp_path / "apple.png")
    assert (np.asarray(Picture.open(tmp_path / "apple.png")) == image.pixels).all()
    assert image.strategy == "skip_2" and image.probe is None


def test_a_call_that_was_left_disturbs_no_other(model: "skipvar.Model") -> None:
    expected = [image.pixels for image in model.generate(PROMPTS[:3], seed=1)]
    left = model.generate(PROMPTS, seed=2)
    next(left)
    again = [image.pixels for image in model.generate(PROMPTS[:3], seed=1)]
    assert all((one == other).all() for one, other in zip(expected, again, strict=True))
    with pytest.raises(RuntimeError, match="later call"):
        list(left)
    assert list(model.generate([])) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prompts": "a cat"}, "a list of texts"),
        ({"prompts": ["a cat", ""]}, "not empty"),
        ({"seeds": [1, 2]}, "one a prompt"),
        ({"seeds": [-1]}, "2\\^63"),
        ({"seeds": [True]}, "2\\^63"),
        ({"seed": -1}, "sampling.seed"),
        ({"cfg": "much"}, "sampling.cfg"),
        ({"tau": [0.5]}, "list of 1"),
        ({"size": "9M"}, "9M"),
        ({"policy": "spred"}, "fixed:<strategy>"),
        ({"policy": "fixed:skip_9"}, "skip_3"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(
    settings: dict[str, object], expected: str, model: "skipvar.Model"
) -> None:
    with pytest.raises(ConfigError, match=expected):
        model.generate(**{"prompts": ["a cat"], **settings})  # type: ignore[arg-type]


def test_a_model_is_loaded_once_and_a_refused_policy_leaves_it_as_it_was(
    model: "skipvar.Model", monkeypatch: pytest.MonkeyPatch
) -> None:
    [expected] = model.generate(["an apple"], policy="fixed:skip_1")
    monkeypatch.setattr(build, "load_pipeline", lambda section: pytest.fail("the weights were loaded again"))
    with pytest.raises(ConfigError, match="infinity_2b"):
        model.generate(["an apple"], policy="conf/policies/infinity_2b_0.86.json")
    [other] = model.generate(["an apple"], policy="fixed:skip_2")
    [again] = model.generate(["an apple"], policy="fixed:skip_1")
    assert (again.pixels == expected.pixels).all() and other.strategy == "skip_2"


def test_an_image_that_cannot_be_made_is_an_error_in_its_place(model: "skipvar.Model") -> None:
    with pytest.raises(RowError, match="aspect"):
        next(model.generate(["a cat"], aspect_ratio=9.0))


def test_load_says_what_it_accepts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="infinity_2b"):
        skipvar.load("emojo")
    with pytest.raises(ConfigError, match=r"model\.path"):
        skipvar.load("infinity_2b")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="converted"):
        skipvar.load(str(tmp_path))
    with pytest.raises(AttributeError, match="nothing"):
        skipvar.nothing  # noqa: B018


def test_a_converted_folder_is_a_model() -> None:
    folder = Path(skipvar.__file__).parent / "assets" / "emoji"
    [image] = skipvar.load(str(folder), device="cpu", dtype="float32").generate(["a red apple"], policy="fixed:skip_3")
    [same] = skipvar.load(device="cpu", dtype="float32").generate(["a red apple"], policy="fixed:skip_3")
    assert (image.pixels == same.pixels).all()


def test_a_call_that_is_out_of_date_takes_nothing_from_the_latest() -> None:
    model = skipvar.load(device="cpu", dtype="float32")
    texts = ["a red apple", "two blue cars"]
    alone = list(model.generate(texts, policy="fixed:skip_3", seed=2))
    old, new = (model.generate(texts, policy="fixed:skip_3", seed=seed) for seed in (1, 2))
    next(new)
    with pytest.raises(RuntimeError, match="a later call"):
        next(old)
    assert (next(new).pixels == alone[1].pixels).all()
