"""A finished dataset in the forms that others read: a GenEval folder tree, WebDataset tar shards."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from skipvar.errors import ConfigError
from skipvar.shards.encode import decode_image, encode_image
from skipvar.shards.ledger import SUCCESS_FILE, Ledger
from skipvar.shards.schema import own_names
from skipvar.shards.storage import Storage, explained
from skipvar.shards.unitfile import data_name, open_unit, unit_files

MAX_SHARD_BYTES = 1_000_000_000
MAX_SHARD_IMAGES = 10_000

Row = dict[str, Any]


def export(storage: Storage, form: str, destination: Path) -> int:
    """Write the dataset as `geneval` or `webdataset` to a folder that appears only when it is complete.

    Returns the number of images. `ConfigError` where the dataset is not finished or the folder is in use.
    """
    ledger = Ledger(storage)
    record = ledger.read_run()
    if record is None or not ledger.is_finished():
        raise ConfigError(f"{storage.uri} is not a finished dataset (it has no {SUCCESS_FILE}); finish the run first.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination} exists and is not an empty folder; give another destination.")
    destination = destination.resolve()
    temporary = destination.with_name(f".{destination.name}.partial")
    num_units = record.input.num_units
    units = unit_files(storage, range(num_units))
    num_missing = num_units - sum(0 in retries for retries in units.values())
    if num_missing:
        raise ConfigError(
            f"{storage.uri} is not whole: {num_missing} of {num_units} units are missing; "
            "`skipvar verify OUTPUT --repair` says which."
        )
    names = {stored: own for own, stored in own_names(list(record.input.columns)).items()}
    with explained(f"write {temporary}"):
        try:
            temporary.mkdir(parents=True)
        except FileExistsError as error:
            raise ConfigError(f"{temporary} is left of an export that was cut off; remove it.") from error
        num_images = FORMS[form](_rows(storage, units), names, temporary)
        temporary.rename(destination)
    return num_images


def _export_geneval(rows: Iterable[Row], names: dict[str, str], folder: Path) -> int:
    """`00000/metadata.jsonl` with the prompt and the user's own columns, `00000/samples/0000.png` ..., by position."""
    num_images = 0
    for row in rows:
        of_prompt = folder / f"{row['position']:05d}"
        samples = of_prompt / "samples"
        if not samples.exists():
            samples.mkdir(parents=True)
            own = {name: row[stored] for stored, name in names.items() if row[stored] is not None}
            (of_prompt / "metadata.jsonl").write_text(_json({**own, "prompt": row["prompt"]}) + "\n", encoding="utf-8")
        data = row["image"]["bytes"]
        if row["format"] != "png":
            data = encode_image(decode_image(data), "png")
        (samples / f"{row['image_index']:04d}.png").write_bytes(data)
        num_images += 1
    return num_images


def _export_webdataset(rows: Iterable[Row], _names: dict[str, str], folder: Path) -> int:
    """`shard-000000.tar` ... with the image, `.txt` (the prompt) and `.json` (the other columns) of each row."""
    num_images = num_shards = in_shard = 0
    shard: tarfile.TarFile | None = None
    for row in rows:
        if shard is None or in_shard >= MAX_SHARD_IMAGES or shard.offset >= MAX_SHARD_BYTES:
            if shard is not None:
                shard.close()
            shard = tarfile.open(folder / f"shard-{num_shards:06d}.tar", "w")  # noqa: SIM115 (closed at the next, or below)
            num_shards, in_shard = num_shards + 1, 0
        key = f"{row['position']:012d}-{row['image_index']}"
        image = row.pop("image")["bytes"]
        suffix = {"jpeg": "jpg"}.get(row["format"], row["format"])
        for name, data in ((suffix, image), ("txt", row["prompt"].encode()), ("json", _json(row).encode())):
            entry = tarfile.TarInfo(f"{key}.{name}")  # times and owners are zero: the same dataset gives the same bytes
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
        num_images, in_shard = num_images + 1, in_shard + 1
    if shard is not None:
        shard.close()
    return num_images


FORMS: dict[str, Callable[[Iterable[Row], dict[str, str], Path], int]] = {
    "geneval": _export_geneval,
    "webdataset": _export_webdataset,
}


def _rows(storage: Storage, units: dict[int, list[int]]) -> Iterator[Row]:
    """All rows by position and image, a unit at a time, retries merged in."""
    for unit, retries in units.items():
        rows: list[Row] = []
        for retry in retries:
            with open_unit(storage, data_name(unit, retry)) as parquet:
                rows += parquet.read(use_threads=False).to_pylist()
        yield from sorted(rows, key=lambda row: (row["position"], row["image_index"]))


def _json(values: Row) -> str:
    """Values that JSON lacks become text; bytes are left out."""
    plain = {name: value for name, value in values.items() if not isinstance(value, bytes)}
    return json.dumps(plain, ensure_ascii=False, default=str)
