"""The input as a plan of units (counts and offsets only), and a unit as requests."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from skipvar.config import RunConfig
from skipvar.errors import ConfigError, InputError, RowError
from skipvar.shards import textscan
from skipvar.shards.columns import infer_csv, infer_json, parse_json
from skipvar.shards.inputs import InputFile, Inputs
from skipvar.shards.rows import SETTINGS, FileSpec, InputSpec, RowReader, per_scale
from skipvar.shards.schema import storable_columns
from skipvar.shards.sources import FITS, READERS, Footer, read_footer
from skipvar.types import Failure, FileSlice, Request, Unit

CHANNELS = 3
_FOOTER_THREADS = 16
_HASHED_BYTES = 256 << 20
"""Local Parquet input up to this size in all is hashed; of more, footers, sizes and times must do."""


@dataclass(frozen=True)
class PlannedFile:
    """A file of the input after it was looked at. Holds two numbers for each of its units at most, and no rows."""

    file: InputFile
    num_rows: int
    columns: Sequence[str]
    """All names, those that are settings too."""
    own: pa.Schema
    """The user's own columns."""
    scan: textscan.TextScan | None = field(default=None, repr=False)
    """Of text files."""
    footer: Footer | None = field(default=None, repr=False)
    """Of Parquet files."""


@dataclass(frozen=True)
class Plan:
    """The whole input, cut into units by count alone."""

    num_rows: int
    prompts_per_unit: int
    images_per_prompt: int
    columns: pa.Schema
    """The user's own columns, in the types that the dataset keeps them in."""
    spec: InputSpec
    identity: dict[str, Any]
    """What was planned from: files with sizes and hashes or versions, counts, columns. Part of the fingerprint."""
    files: Sequence[PlannedFile]
    first_rows: np.ndarray
    """`(files + 1,)` int64: the position of each file's first row, and the number of rows."""

    @property
    def num_requests(self) -> int:
        return self.num_rows * self.images_per_prompt

    @property
    def num_units(self) -> int:
        return -(-self.num_rows // self.prompts_per_unit)

    def unit(self, index: int) -> Unit:
        """Unit `index`, from 0: its range of prompts and where they lie."""
        if not 0 <= index < self.num_units:
            raise IndexError(f"unit {index} of {self.num_units}")
        start = index * self.prompts_per_unit
        stop = min(start + self.prompts_per_unit, self.num_rows)
        first = int(np.searchsorted(self.first_rows, start, side="right")) - 1
        last = int(np.searchsorted(self.first_rows, stop, side="left"))
        slices = [self._slice(at, index, start, stop) for at in range(first, last) if self.files[at].num_rows]
        return Unit(index=index, first_position=start, num_rows=stop - start, slices=tuple(slices))

    def _slice(self, at: int, unit: int, start: int, stop: int) -> FileSlice:
        """The part of file `at` within the positions [start, stop) of `unit`."""
        file_start, file_stop = int(self.first_rows[at]), int(self.first_rows[at + 1])
        begin, end = max(start, file_start), min(stop, file_stop)
        planned = self.files[at]
        text: dict[str, int] = {}
        if planned.scan is not None:
            segment = unit - file_start // self.prompts_per_unit
            offset, end_offset = map(int, planned.scan.cuts[segment : segment + 2])
            text = {
                "byte_offset": offset,
                "num_bytes": end_offset - offset,
                "checksum": int(planned.scan.checksums[segment]),
            }
        return FileSlice(uri=planned.file.uri, first_row=begin - file_start, num_rows=end - begin, **text)


def plan_input(config: RunConfig, num_scales: int | None = None, max_image_pixels: int | None = None) -> Plan:
    """Plan the input of a run: expand globs, count rows, find columns. Reads Parquet footers only, streams text once.

    `num_scales` is K of the model's schedules where it is known, `max_image_pixels` the pixels of its largest image:
    a unit's raw pixels are kept under `output.max_file_bytes`. `InputError` and `ConfigError` name what is at fault.
    """
    per_unit = _prompts_per_unit(config, max_image_pixels)
    inputs = Inputs(config.storage)
    files = _plan_files(inputs, config, per_unit)
    first_rows = np.concatenate([[0], np.cumsum([planned.num_rows for planned in files])]).astype(np.int64)
    num_rows = int(first_rows[-1])
    if num_rows == 0:
        raise InputError(f"input.path: {config.input.path} holds no rows.")
    _check_id_column(config, files)
    columns = _unify(files)
    return Plan(
        num_rows=num_rows,
        prompts_per_unit=per_unit,
        images_per_prompt=config.sampling.images_per_prompt,
        columns=columns,
        spec=_spec(config, num_scales, columns, files),
        identity={
            "num_rows": num_rows,
            "prompts_per_unit": per_unit,
            "images_per_prompt": config.sampling.images_per_prompt,
            "columns": {column.name: str(column.type) for column in columns},
            "files": _identity(inputs, files),
        },
        files=files,
        first_rows=first_rows,
    )


def read_unit(unit: Unit, spec: InputSpec) -> Iterator[Request | Failure]:
    """The unit's requests in order of (position, image index); a bad row is a failure for each of its images.

    `InputError` where a file is no longer what was planned.
    """
    reader, inputs = RowReader(spec), Inputs(spec.storage)
    position = unit.first_position
    for part in unit.slices:
        file = spec.files[part.uri]
        fit = FITS[file.format]
        for number, row in enumerate(READERS[file.format](inputs, part, file), start=part.first_row + 1):
            where = f"{part.uri.rpartition('/')[2]}, row {number}"
            for item in reader.read(position, row, fit, where):
                if unit.only is None or item.key in unit.only:
                    yield item
            position += 1


def _prompts_per_unit(config: RunConfig, max_image_pixels: int | None) -> int:
    rows = config.output.unit_rows
    if max_image_pixels is not None:
        rows = min(rows, config.output.max_file_bytes // (max_image_pixels * CHANNELS))
    return max(1, rows // config.sampling.images_per_prompt)


def _plan_files(inputs: Inputs, config: RunConfig, per_unit: int) -> list[PlannedFile]:
    """Look at every file once. Files that begin beyond `input.limit` count as empty."""
    files = inputs.find(config.input.path)
    planned: list[PlannedFile] = []
    start = 0
    for file, footer in zip(files, _read_footers(inputs, files), strict=True):
        left = None if config.input.limit is None else max(0, config.input.limit - start)
        if footer is not None:
            rows = footer.num_rows if left is None else min(left, footer.num_rows)
            names, own = footer.schema.names, _parquet_columns(file, footer.schema, config)
            planned.append(PlannedFile(file, rows, names, own, footer=footer))
        else:
            scan = _scan(inputs, file, start, per_unit, left)
            names, own = _text_columns(file, scan, config)
            scan.sample.clear()
            planned.append(PlannedFile(file, scan.num_rows, names, own, scan=scan))
        _check_names(planned[-1], config)
        start += planned[-1].num_rows
    return planned


def _scan(inputs: Inputs, file: InputFile, start: int, per_unit: int, limit: int | None) -> textscan.TextScan:
    scan = textscan.scan_csv if file.format == "csv" else textscan.scan_lines
    with inputs.open(file.uri) as stream:
        return scan(
            stream, file.uri, rows_to_first_cut=per_unit - start % per_unit, rows_per_unit=per_unit, limit=limit
        )


def _read_footers(inputs: Inputs, files: Sequence[InputFile]) -> list[Footer | None]:
    """Parquet files' footers, several at a time: on S3 each takes two round trips."""

    def read(file: InputFile) -> Footer | None:
        if file.format != "parquet":
            return None
        with inputs.open(file.uri) as stream:
            return read_footer(stream, file.uri, file.size)

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return list(pool.map(read, files))


def _parquet_columns(file: InputFile, columns: pa.Schema, config: RunConfig) -> pa.Schema:
    own = [column for column in columns if column.name not in _special(config)]
    prompts = columns.get_all_field_indices(config.input.prompt_column)
    for at in prompts:
        kind = storable_columns([columns.field(at)], file.uri).types[0]
        if not pa.types.is_string(kind):
            raise InputError(f"{file.uri}: column '{config.input.prompt_column}' is {kind}; prompts must be text.")
    storable_columns(own, file.uri)
    return pa.schema(own)


def _text_columns(file: InputFile, scan: textscan.TextScan, config: RunConfig) -> tuple[Sequence[str], pa.Schema]:
    """All names of a text file's columns, and the user's own with their types."""
    special = _special(config)
    if file.format == "txt":
        return [config.input.prompt_column], pa.schema([])
    if file.format == "csv":
        assert scan.header is not None
        return scan.header, infer_csv(scan.header, scan.sample, [name for name in scan.header if name not in special])
    rows = []
    for line in scan.sample:
        try:
            rows.append(parse_json(line))
        except RowError:  # becomes an error row when it is read
            continue
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, infer_json(rows, [name for name in names if name not in special])


def _check_names(planned: PlannedFile, config: RunConfig) -> None:
    names, wanted = planned.columns, config.input.prompt_column
    if len(set(names)) < len(names):
        raise InputError(f"{planned.file.uri}: two columns have one name; names must differ.")
    if wanted not in names and (names or planned.file.format != "jsonl"):
        shown = ", ".join(names[:20]) or "none"
        raise InputError(
            f"{planned.file.uri} has no column '{wanted}'; it has {shown}; name the right one by input.prompt_column."
        )


def _check_id_column(config: RunConfig, files: Sequence[PlannedFile]) -> None:
    """An id column that the user named must be somewhere; the default one need not. A jsonl row may lack it."""
    name = config.input.id_column
    if name != "id" and not any(name in planned.columns for planned in files):
        raise InputError(f"input.id_column: no file of the input has a column '{name}'.")


def _special(config: RunConfig) -> frozenset[str]:
    return frozenset({config.input.prompt_column, config.input.id_column, *SETTINGS})


def _unify(files: Sequence[PlannedFile]) -> pa.Schema:
    """One type for each of the user's columns over all files."""
    result = pa.schema([])
    for planned in files:
        if planned.num_rows == 0 or planned.own.equals(result, check_metadata=True):
            continue
        try:
            result = pa.unify_schemas([result, planned.own], promote_options="permissive")
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{planned.file.uri}: a column has another type than in the files before it ({reason})."
            ) from error
    return storable_columns(result, files[0].file.uri)


def _identity(inputs: Inputs, files: Sequence[PlannedFile]) -> list[dict[str, Any]]:
    """Each file's rows and content: a hash where the plan read it all, else size, footer and version."""
    local = [p.file for p in files if p.footer is not None and not p.file.uri.startswith("s3://")]
    is_hashed = sum(file.size for file in local) <= _HASHED_BYTES
    result = []
    for planned in files:
        file = planned.file
        entry: dict[str, Any] = {"name": file.name, "rows": planned.num_rows}
        if planned.scan is not None:
            entry["sha256"] = planned.scan.sha256
        elif planned.footer is not None:
            entry |= {"size": file.size, "footer": f"{planned.footer.checksum:08x}"}
            if file.uri.startswith("s3://"):
                entry["etag"] = file.version
            elif is_hashed:
                with inputs.open(file.uri) as stream:
                    entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            else:
                entry["modified"] = int(file.version)
        result.append(entry)
    return result


def _spec(config: RunConfig, num_scales: int | None, columns: pa.Schema, files: Sequence[PlannedFile]) -> InputSpec:
    sampling = config.sampling
    for name, value in (("cfg", sampling.cfg), ("tau", sampling.tau)):
        try:
            per_scale(value, name, num_scales)
        except RowError as error:
            raise ConfigError(f"sampling.{error}.") from error
    return InputSpec(
        files={planned.file.uri: _file_spec(planned) for planned in files},
        columns=columns,
        storage=config.storage,
        prompt_column=config.input.prompt_column,
        id_column=config.input.id_column,
        seed=sampling.seed,
        cfg=sampling.cfg,
        tau=sampling.tau,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        aspect_ratio=sampling.aspect_ratio,
        negative_prompt=sampling.negative_prompt,
        images_per_prompt=sampling.images_per_prompt,
        num_scales=num_scales,
    )


def _file_spec(planned: PlannedFile) -> FileSpec:
    return FileSpec(
        format=planned.file.format,
        size=planned.file.size,
        columns=tuple(planned.columns) if planned.scan is not None else (),
        footer_checksum=planned.footer.checksum if planned.footer is not None else None,
    )
