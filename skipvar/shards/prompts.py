"""The input as a plan of units (counts and row ranges only), and a unit as requests."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from skipvar.checks import require
from skipvar.config import RunConfig
from skipvar.errors import ConfigError, InputError, RowError
from skipvar.shards.inputs import Inputs
from skipvar.shards.looking import LookedAt, look_at_all, special_columns, unify
from skipvar.shards.parts import LocalParts, Part, find_parts, part_slices, publish_parts
from skipvar.shards.record import InputIdentity
from skipvar.shards.rows import FileSpec, InputSpec, RowReader, per_scale
from skipvar.shards.schema import storable_columns
from skipvar.shards.sources import read_footer, read_rows
from skipvar.shards.storage import Storage
from skipvar.shards.textinput import NormalFile, TextNormaliser
from skipvar.types import Failure, FileSlice, Request, Unit

CHANNELS = 3
_HASHED_BYTES = 256 << 20
"""Local Parquet input up to this size in all is hashed; of more, footers, sizes and times must do."""


@dataclass(frozen=True)
class Plan:
    """The whole input, cut into units by count alone. Holds row ranges, and no rows."""

    identity: InputIdentity
    """How many rows, in which units, from which files."""
    columns: pa.Schema
    """The user's own columns, in the types that the dataset keeps them in."""
    spec: InputSpec
    ranges: Sequence[FileSlice]
    """The rows of the input, in order."""
    first_rows: np.ndarray
    """`(ranges + 1,)` int64: the position of each range's first row, and the number of rows."""
    unpublished: LocalParts | None = None
    """Text input in its normal form, on this machine only; `publish_input` puts it beside the dataset."""

    @property
    def num_units(self) -> int:
        return self.identity.num_units

    def unit(self, index: int) -> Unit:
        """Unit `index`, from 0: its range of prompts and where they lie."""
        unit = self.identity.unit(index)
        start, stop = unit.first_position, unit.first_position + unit.num_rows
        first = int(np.searchsorted(self.first_rows, start, side="right")) - 1
        last = int(np.searchsorted(self.first_rows, stop, side="left"))
        return replace(unit, slices=tuple(self._slice(at, start, stop) for at in range(first, last)))

    def _slice(self, at: int, start: int, stop: int) -> FileSlice:
        """The part of range `at` within the positions [start, stop)."""
        begin, end = max(start, int(self.first_rows[at])), min(stop, int(self.first_rows[at + 1]))
        whole = self.ranges[at]
        return replace(whole, first_row=whole.first_row + begin - int(self.first_rows[at]), num_rows=end - begin)


@dataclass(frozen=True)
class PublishedInput:
    """The text input of a run that is there already."""

    parts: Sequence[Part]
    files: Sequence[Mapping[str, Any]]
    """The input's files as the run's record names them."""


def plan_input(
    config: RunConfig,
    num_scales: int,
    max_image_pixels: int | None = None,
    published: PublishedInput | None = None,
) -> Plan:
    """Plan the input of a run: expand globs, count rows, find columns. Reads Parquet footers only; text is streamed
    once into its normal form, or only hashed where it is that of `published`.

    `num_scales` is K of the model's schedules. With `max_image_pixels`, the pixels of its largest image, a unit's raw
    pixels are kept under `output.max_file_bytes`. `InputError` and `ConfigError` name what is at fault.
    """
    per_unit = _prompts_per_unit(config, max_image_pixels)
    inputs = Inputs(config.storage)
    files = look_at_all(inputs, config)
    columns = unify(files)
    spec = input_spec(config, num_scales, columns)
    planned, parts, unpublished = _read_through(inputs, config.input.limit, files, spec, published)
    num_rows = sum(item.num_rows for item in planned)
    if num_rows == 0:
        raise InputError(f"input.path: {config.input.path} holds no rows.")
    ranges = list(_ranges(planned, parts))
    return Plan(
        identity=InputIdentity(
            num_rows=num_rows,
            prompts_per_unit=per_unit,
            images_per_prompt=config.sampling.images_per_prompt,
            columns={column.name: str(column.type) for column in columns},
            files=_named_files(inputs, planned),
        ),
        columns=columns,
        spec=replace(spec, files=_file_specs(inputs, planned, parts, columns)),
        ranges=ranges,
        first_rows=np.cumsum([0, *(part.num_rows for part in ranges)], dtype=np.int64),
        unpublished=unpublished,
    )


def publish_input(plan: Plan, storage: Storage) -> Plan:
    """Put text input in its normal form under the output's `_input/`; the plan that reads it from there.

    To be called when the run is opened and its fingerprint is found to be that of the run there, if there is one.
    """
    if plan.unpublished is None:
        return plan
    parts = publish_parts(plan.unpublished, storage)
    inputs = Inputs(plan.spec.storage)
    moved = {old.uri: new.uri for old, new in zip(plan.unpublished.parts, parts, strict=True)}
    files = {uri: spec for uri, spec in plan.spec.files.items() if uri not in moved}
    files |= {part.uri: _part_spec(inputs, part) for part in parts}
    return replace(
        plan,
        spec=replace(plan.spec, files=files),
        ranges=[replace(part, uri=moved.get(part.uri, part.uri)) for part in plan.ranges],
        unpublished=None,
    )


def find_published(storage: Storage, files: Sequence[Mapping[str, Any]]) -> PublishedInput | None:
    """The text input that a run of these files published; None where it is not all there."""
    num_rows = sum(file["rows"] for file in files if _is_text_entry(file))
    parts = find_parts(storage) if num_rows else []
    if not parts or sum(part.num_rows for part in parts) != num_rows:
        return None
    return PublishedInput(parts, files)


def read_unit(unit: Unit, spec: InputSpec, inputs: Inputs | None = None) -> Iterator[Request | Failure]:
    """The unit's requests in order of (position, image index); a bad row is a failure for each of its images.

    `inputs`: to read several units by one S3 client. `InputError` where a file is no longer what was planned.
    """
    reader, inputs = RowReader(spec), inputs or Inputs(spec.storage)
    position = unit.first_position
    for part in unit.slices:
        file = spec.files[part.uri]
        for row in read_rows(inputs, part, file):
            for item in reader.read(position, row.values, row.error, row.where, file.retyped):
                if unit.only is None or item.key in unit.only:
                    yield item
            position += 1


@dataclass(frozen=True)
class _PlannedFile:
    """A file of the input whose rows are counted."""

    looked_at: LookedAt
    num_rows: int
    text: NormalFile | None
    """Of text files."""


def _prompts_per_unit(config: RunConfig, max_image_pixels: int | None) -> int:
    rows = config.output.unit_rows
    if max_image_pixels is not None:
        most = max(1, config.output.max_file_bytes // (max_image_pixels * CHANNELS))
        count = config.sampling.images_per_prompt
        accepted = f"a whole number of 1 or more, up to {most}: more images do not fit output.max_file_bytes"
        require(count <= most, "sampling.images_per_prompt", count, accepted)
        rows = min(rows, most)
    return max(1, rows // config.sampling.images_per_prompt)


def _read_through(
    inputs: Inputs,
    limit: int | None,
    files: Sequence[LookedAt],
    spec: InputSpec,
    published: PublishedInput | None,
) -> tuple[list[_PlannedFile], Sequence[Part], LocalParts | None]:
    """Every file with its rows and the parts with the text's. Files that begin beyond `limit` count as empty."""
    texts = [found for found in files if found.footer is None]
    normaliser: TextNormaliser | None = None
    known: Iterator[NormalFile] = iter(())
    if published is not None and limit is None and (hashed := _unchanged(inputs, texts, published)):
        known = iter(hashed)
    elif texts:
        normaliser = TextNormaliser(spec, special_columns(texts, spec.input))
    planned: list[_PlannedFile] = []
    left = limit
    for found in files:
        text = None
        if found.footer is not None:
            num_rows = found.footer.num_rows if left is None else min(left, found.footer.num_rows)
        else:
            text = next(known) if normaliser is None else normaliser.add(inputs, found.file, left)
            num_rows = text.num_rows
        planned.append(_PlannedFile(found, num_rows, text))
        left = None if left is None else left - num_rows
    if normaliser is None:
        return planned, published.parts if published is not None and texts else (), None
    local = normaliser.finish()
    return planned, local.parts, local


def _unchanged(inputs: Inputs, texts: Sequence[LookedAt], published: PublishedInput) -> list[NormalFile]:
    """The text files as they were published, if they are still the same; else none."""
    entries = [entry for entry in published.files if _is_text_entry(entry)]
    if [entry["name"] for entry in entries] != [found.file.name for found in texts]:
        return []
    first_row = 0
    result = []
    for entry, found in zip(entries, texts, strict=True):
        if _sha256(inputs, found.file.uri) != entry["sha256"]:
            return []
        result.append(NormalFile(first_row, entry["rows"], entry["sha256"]))
        first_row += entry["rows"]
    return result


def _is_text_entry(entry: Mapping[str, Any]) -> bool:
    return "footer" not in entry


def _ranges(planned: Iterable[_PlannedFile], parts: Sequence[Part]) -> Iterator[FileSlice]:
    """Where the input's rows lie, in order; text files that follow each other in one part are one range."""
    last: FileSlice | None = None
    for item in planned:
        if item.text is None:
            slices = [FileSlice(uri=item.looked_at.file.uri, first_row=0, num_rows=item.num_rows)]
        else:
            slices = list(part_slices(parts, item.text.first_row, item.num_rows))
        for part in slices:
            if last is not None and (last.uri, last.first_row + last.num_rows) == (part.uri, part.first_row):
                last = replace(last, num_rows=last.num_rows + part.num_rows)
            elif part.num_rows:
                if last is not None:
                    yield last
                last = part
    if last is not None:
        yield last


def _file_specs(
    inputs: Inputs, planned: Iterable[_PlannedFile], parts: Iterable[Part], columns: pa.Schema
) -> dict[str, FileSpec]:
    specs = {part.uri: _part_spec(inputs, part) for part in parts}
    for item in planned:
        file, footer, own = item.looked_at.file, item.looked_at.footer, item.looked_at.own
        if footer is not None:
            plain = storable_columns(own, file.uri)
            retyped = tuple(name for name in plain.names if plain.field(name).type != columns.field(name).type)
            specs[file.uri] = FileSpec(size=file.size, footer_checksum=footer.checksum, retyped=retyped)
    return specs


def _part_spec(inputs: Inputs, part: Part) -> FileSpec:
    with inputs.open(part.uri) as stream:
        size = stream.seek(0, 2)
        return FileSpec(size=size, footer_checksum=read_footer(stream, part.uri, size).checksum, is_part=True)


def _named_files(inputs: Inputs, planned: Sequence[_PlannedFile]) -> list[dict[str, Any]]:
    """Each file's rows and content: a hash where the plan read it all, else size, footer and version."""
    parquet = [item.looked_at.file for item in planned if item.text is None]
    is_hashed = sum(file.size for file in parquet if not file.uri.startswith("s3://")) <= _HASHED_BYTES
    result = []
    for item in planned:
        file, footer = item.looked_at.file, item.looked_at.footer
        entry: dict[str, Any] = {"name": file.name, "rows": item.num_rows}
        if item.text is not None:
            entry["sha256"] = item.text.sha256
        elif footer is not None:
            entry |= {"size": file.size, "footer": f"{footer.checksum:08x}"}
            if file.uri.startswith("s3://"):
                entry["etag"] = file.version
            elif is_hashed:
                entry["sha256"] = _sha256(inputs, file.uri)
            else:
                entry["modified"] = int(file.version)
        result.append(entry)
    return result


def _sha256(inputs: Inputs, uri: str) -> str:
    with inputs.open(uri) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        except OSError as error:
            raise InputError(f"{uri} cannot be read: {error.strerror or error}.") from error


def input_spec(config: RunConfig, num_scales: int, columns: pa.Schema) -> InputSpec:
    """How rows are read, before any file is known. `ConfigError` for a cfg or tau that does not fit the scales."""
    sampling = config.sampling
    try:
        cfg, tau = per_scale(sampling.cfg, "cfg", num_scales), per_scale(sampling.tau, "tau", num_scales)
    except RowError as error:
        raise ConfigError(f"sampling.{error}.") from error
    return InputSpec(
        files={},
        columns=columns,
        storage=config.storage,
        input=config.input,
        sampling=config.sampling,
        cfg=cfg,
        tau=tau,
    )
