"""An image depends on its own request only: batch size, number of replicas and order of the input change no pixel."""

import json
from pathlib import Path

import pyarrow.parquet as pq

NUM_PROMPTS = 18


def images(output: Path) -> dict[str, tuple[str, bytes]]:
    """Strategy and picture by id."""
    rows = [row for path in (output / "data").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["id"]: (row["strategy"], row["image"]["bytes"]) for row in rows}


def test_same_images_in_any_company(generate, tmp_path: Path) -> None:
    words = ("an apple", "four red cars in a grid on a blue background, and some more words", "x")
    rows = [{"id": f"row-{n}", "prompt": f"{words[n % 3]} {n}"} for n in range(NUM_PROMPTS)]
    rows[3]["negative_prompt"] = "blurry"
    rows[4] |= {"cfg": 1.0}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    alone = generate(
        f"input.path={tmp_path}/a.jsonl", f"output.path={tmp_path}/alone", "engine.batch_size=1", "output.unit_rows=64"
    )
    assert alone.returncode == 0, alone.stderr
    mixed = generate(
        f"input.path={tmp_path}/b.jsonl", f"output.path={tmp_path}/mixed", "engine.batch_size=8",
        "cluster.replicas.max=2", "output.unit_rows=3",
    )  # fmt: skip
    assert mixed.returncode == 0, mixed.stderr
    assert len(images(tmp_path / "alone")) == NUM_PROMPTS
    assert images(tmp_path / "alone") == images(tmp_path / "mixed")
    assert len({strategy for strategy, _ in images(tmp_path / "alone").values()}) >= 4
