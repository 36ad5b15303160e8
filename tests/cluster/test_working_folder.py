"""What `ray job submit --working-dir .` would send: packed as Ray packs it."""

import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

from cluster.manifests import REPOSITORY

LIMIT_BYTES = 20 * 2**20
RAYS_LIMIT_BYTES = 100 * 2**20
WEIGHTS = "skipvar/assets/emoji/"
"""The embedded weights travel along: conf/emoji.yaml then works on any cluster, and Ray sends a folder that has not
changed once. Infinity's weights never lie in the folder: `model.path` is on S3."""


def test_the_working_folder_is_small(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(REPOSITORY), package, include_gitignore=True)
    with zipfile.ZipFile(package) as packed:
        sizes = {item.filename: item.compress_size for item in packed.infolist()}
    weights = {name for name in sizes if name.startswith(WEIGHTS) and name.endswith(".safetensors")}
    assert len(weights) == 3
    others = sum(size for name, size in sizes.items() if name not in weights)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert others < LIMIT_BYTES, f"{others} bytes without weights, the largest files: {largest}"
    assert package.stat().st_size < RAYS_LIMIT_BYTES / 2

    tops = {name.split("/")[0] for name in sizes}
    assert {"jobs", "skipvar", "conf"} <= tops
    assert not tops & {".git", ".venv", "outputs", "build", "tests", ".ci", "training_runs"}
