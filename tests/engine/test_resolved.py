"""Everything that a run depends on is known before a model is loaded, and a model that differs is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from skipvar.config import EngineConfig, ModelSection, RunConfig, SamplingConfig
from skipvar.distributed.messages import Started, pack
from skipvar.engine.build import build_engine
from skipvar.engine.memory import batch_sizes
from skipvar.engine.resolved import resolve, strategy_costs
from skipvar.errors import ConfigError, ModelError
from skipvar.model import device
from skipvar.model.identity import EMBEDDED_FOLDER, NETWORKS, sha256_of
from skipvar.skip.policy import LogisticPolicy

RANDOM = RunConfig(model=ModelSection(path="random:0", device="cpu", dtype="float32"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model"))


def test_the_embedded_model_tells_its_hashes() -> None:
    resolved = resolve(RunConfig(policy="conf/policies/emoji_0.86.json"), device="cpu")
    assert resolved.weights_sha256 == {name: sha256_of(EMBEDDED_FOLDER / file) for name, file in NETWORKS.items()}
    assert isinstance(resolved.policy, LogisticPolicy)
    assert (resolved.num_scales, resolved.policy.decision_scale, resolved.max_image_pixels) == (10, 6, 128 * 128)
    json.dumps([resolved.to_dict(), resolved.fingerprint_parts()])


def test_it_needs_neither_torch_nor_ray() -> None:
    code = """
import sys
from skipvar.config import RunConfig
from skipvar.engine.resolved import resolve
resolve(RunConfig())
print(sorted({"torch", "ray"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_replica_tells_of_its_device_brings_no_torch_to_the_driver(run_config: Callable[..., RunConfig]) -> None:
    packed = pack([Started(report=build_engine(run_config()).report, wanted_requests=1)])
    code = (
        "import sys\n"
        "from skipvar.distributed.messages import unpack\n"
        "[started] = unpack(sys.stdin.buffer.read())\n"
        "assert 'torch' not in sys.modules and started.report.torch"
    )
    subprocess.run([sys.executable, "-c", code], input=packed, check=True)


def test_infinity_by_its_preset() -> None:
    model = ModelSection(name="infinity_8b", path="random:3", device="cpu")
    resolved = resolve(RunConfig(model=model, sampling=SamplingConfig(size="1M")))
    assert resolved.num_scales == 13 and 1024 * 1024 <= resolved.max_image_pixels < 1.1 * 1024 * 1024
    assert len(resolved.schedules) == 15


def test_a_folder_without_hashes_is_hashed(folder: Path) -> None:
    config = RunConfig(model=ModelSection(path=str(folder)))
    told = resolve(config).weights_sha256
    content = json.loads((folder / "config.json").read_text())
    del content["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(content))
    assert resolve(config).weights_sha256 == told


def test_other_weights_than_the_run_s_are_refused(folder: Path) -> None:
    config = RunConfig(model=ModelSection(path=str(folder), device="cpu", dtype="float32"))
    content = json.loads((folder / "config.json").read_text())
    right = content["weights_sha256"]["vae"]
    content["weights_sha256"]["vae"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"the vae weights here have SHA-256 {right}"):
        build_engine(config, resolve(config))


def test_an_aspect_ratio_that_the_model_lacks_is_for_the_rows_to_bring() -> None:
    """Its rows are error rows; a replica comes up all the same, as on a GPU."""
    sampling = SamplingConfig(aspect_ratio=9.0)
    engine = build_engine(replace(RANDOM, sampling=sampling))
    assert engine.report.self_check is not None and engine.report.self_check["is_invariant"]


def test_how_long_an_image_may_wait_is_what_the_configuration_says() -> None:
    config = replace(RANDOM, engine=EngineConfig(max_age=5, batch_invariant=False))
    assert build_engine(config)._batcher.limits.max_age == 5


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(RunConfig(model=ModelSection(path=str(tmp_path / "missing"))))
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(RunConfig(model=ModelSection(path="no\0file")))
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"model\.vae_path is needed"):
        resolve(RunConfig(model=ModelSection(path=str(tmp_path / "none"))))
    missing = ModelSection(name="infinity_2b", path=f"{tmp_path}/a", vae_path=f"{tmp_path}/b", text_encoder_path="/c")
    with pytest.raises(ConfigError, match=r"model\.path: .*/a does not exist"):
        resolve(RunConfig(model=missing))


@pytest.mark.parametrize(
    ("flags", "where", "dtype"),
    [({"avx512f"}, "cpu", "float32"), ({"amx_bf16"}, "cpu", "bfloat16"), (set(), "cuda", "bfloat16")],
)
def test_auto_dtype(flags: set[str], where: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_flags", lambda: frozenset(flags))
    resolved = resolve(RunConfig(), device=where)
    assert (resolved.dtype, resolved.batch_invariant) == (dtype, where == "cpu")


def test_fixed_shapes_fix_the_batch_sizes_of_all_replicas() -> None:
    free = resolve(RANDOM)
    assert free.batch_size is None and "batch_size" not in free.fingerprint_parts()["engine"]
    fixed = resolve(replace(RANDOM, engine=EngineConfig(fixed_shapes=True)))
    sizes = batch_sizes(fixed.costs, device=fixed.device)
    assert fixed.fingerprint_parts()["engine"]["batch_size"] == {
        "prefix": sizes.prefix_images,
        "decode": sizes.decode_images,
        **sizes.suffix_images,
    }


def test_batch_invariance_is_for_cpus() -> None:
    with pytest.raises(ConfigError, match="fixed_shapes"):
        resolve(RunConfig(engine=EngineConfig(batch_invariant=True)), device="cuda")


def test_costs_of_the_strategies() -> None:
    costs = strategy_costs(resolve(RANDOM), 1.0)
    assert costs["base"] == 2 * 680 and costs["skip_3"] == 2 * 155
    with pytest.raises(ConfigError, match=r"sampling\.aspect_ratio 2"):
        strategy_costs(resolve(RANDOM), 2.0)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("transformer", "num_heads", 0, "num_heads is 0"),
        ("transformer", "depth", "many", "depth is many"),
        ("schedules", "grids", {}, "no aspect ratio"),
        ("schedules", "grids", {"1.0": []}, "need pairs of whole numbers"),
        ("schedules", "grids", [], "not a model configuration"),
        ("schedules", "sizes", {"128": 99}, "keeps 99 scales"),
        ("schedules", "grids", {"x": [[1, 1]]}, "not a model configuration"),
        ("schedules", "grids", {"1.0": [[1, 1.5]]}, "need pairs of whole numbers"),
        ("transformer", "mlp_ratio", float("nan"), "mlp_ratio nan"),
        ("transformer", "depth", 10**9, "from 1 to 1024"),
        ("transformer", "spatial_patchify", "yes", "true or false"),
        ("vae", "base_width", 10**30, "from 1 to 1048576"),
        ("vae", "width_multipliers", ["x"], "width_multipliers must be"),
        ("schedules", "default_size", "9M", "default_size '9M'"),
        ("vae", "width_multipliers", [], "width_multipliers must be"),
    ],
)
def test_an_impossible_model_configuration_is_refused_before_any_work(
    folder: Path, section: str, key: str, value: object, told: str
) -> None:
    content = json.loads((folder / "config.json").read_text())
    content[section][key] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=told) as refusal:
        resolve(RunConfig(model=ModelSection(path=str(folder))))
    assert str(folder / "config.json") in str(refusal.value) and refusal.value.exit_code == 2


@pytest.mark.parametrize("content", ["{broken", "[1]", "[" * 100_000])
def test_a_config_json_that_holds_no_object_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: not a model configuration"):
        resolve(RunConfig(model=ModelSection(path=str(folder))))


def test_a_network_that_a_converted_folder_lacks_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ModelError, match="text_encoder is missing"):
        resolve(RunConfig(model=ModelSection(path=str(folder))))
