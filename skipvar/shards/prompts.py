"""The input as a plan of units (counts and offsets only), and a unit as requests."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
class Plan:
    """The whole input, cut into units by count alone. Holds two numbers a unit at most, and no rows."""

    num_rows: int
    prompts_per_unit: int
    images_per_prompt: int
    columns: pa.Schema
    """The user's own columns, in the types that the dataset keeps them in."""
    spec: InputSpec
    identity: dict[str, Any]
    """What the run was planned from: files with sizes and hashes or versions, counts, columns. Part of the fingerprint."""
    files: Sequence[InputFile]
    first_rows: np.ndarray
    """`(files + 1,)` int64: the position of each file's first row, and the number of rows."""
    scans: Sequence[textscan.TextScan | None]
    """For text files the offsets of their parts of units; None for Parquet."""

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
        slices = [self._slice(file, index, start, stop) for file in range(first, last)]
        return Unit(
            index=index,
            first_position=start,
            num_rows=stop - start,
            slices=tuple(part for part in slices if part.num_rows),
        )

    def _slice(self, file: int, unit: int, start: int, stop: int) -> FileSlice:
        file_start, file_stop = int(self.first_rows[file]), int(self.first_rows[file + 1])
        begin, end = max(start, file_start), min(stop, file_stop)
        scan = self.scans[file]
        if scan is None or begin >= end:
            return FileSlice(uri=self.files[file].uri, first_row=begin - file_start, num_rows=max(0, end - begin))
        segment = unit - file_start // self.prompts_per_unit
        offset = int(scan.cuts[segment])
        return FileSlice(
            uri=self.files[file].uri,
            first_row=begin - file_start,
            num_rows=end - begin,
            byte_offset=offset,
            num_bytes=int(scan.cuts[segment + 1]) - offset,
            checksum=int(scan.checksums[segment]),
        )


def plan_input(config: RunConfig, num_scales: int | None = None, max_image_pixels: int | None = None) -> Plan:
    """Plan the input of a run: expand globs, count rows, find the columns. Reads Parquet footers only and streams text once.

    `num_scales` is K of the model's schedules where it is known, `max_image_pixels` the pixels of its largest image: a unit's
    raw pixels are kept under `output.max_file_bytes`. `InputError` and `ConfigError` name the file or key at fault.
    """
    per_unit = _prompts_per_unit(config, max_image_pixels)
    inputs = Inputs(config.storage)
    files = inputs.find(config.input.path)
    footers = _read_footers(inputs, files)
    counts: list[int] = []
    scans: list[textscan.TextScan | None] = []
    found: list[pa.Schema] = []
    for file, footer in zip(files, footers, strict=True):
        left = None if config.input.limit is None else max(0, config.input.limit - sum(counts))
        if footer is not None:
            scan, count = None, footer.num_rows if left is None else min(left, footer.num_rows)
            columns = footer.schema
        else:
            scan = _scan(inputs, file, sum(counts), per_unit, left)
            count, columns = scan.num_rows, _text_columns(file, scan, config)
            scan.sample.clear()
        counts.append(count)
        scans.append(scan)
        found.append(_own_columns(file, columns, config))
    num_rows = sum(counts)
    if num_rows == 0:
        raise InputError(f"input.path: {config.input.path} holds no rows.")
    _check_id_column(config, files, scans, footers)
    columns = _unify(files, found)
    identity = _identity(inputs, files, counts, scans, footers)
    return Plan(
        num_rows=num_rows,
        prompts_per_unit=per_unit,
        images_per_prompt=config.sampling.images_per_prompt,
        columns=columns,
        spec=_spec(config, num_scales, columns, files, scans, footers),
        identity={
            "num_rows": num_rows,
            "prompts_per_unit": per_unit,
            "images_per_prompt": config.sampling.images_per_prompt,
            "columns": {field.name: str(field.type) for field in columns},
            "files": identity,
        },
        files=files,
        first_rows=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        scans=scans,
    )


def read_unit(unit: Unit, spec: InputSpec) -> Iterator[Request | Failure]:
    """The unit's requests in order of (position, image index); a bad row is a failure for each of its images.

    `InputError` where a file is no longer what was planned.
    """
    reader, inputs = RowReader(spec), Inputs(spec.storage)
    position = unit.first_position
    for part in unit.slices:
        file = spec.files[part.uri]
        rows = READERS[file.format](inputs, part, file)
        fit = FITS[file.format]
        for row in rows:
            where = (
                f"{part.uri.rpartition('/')[2]}, row {position - unit.first_position + 1 + _rows_before(unit, part)}"
            )
            for item in reader.read(position, row, fit, where):
                if unit.only is None or item.key in unit.only:
                    yield item
            position += 1


def _rows_before(unit: Unit, part: FileSlice) -> int:
    """What to add to a row's number in the unit for its number in the file."""
    before = sum(other.num_rows for other in unit.slices[: list(unit.slices).index(part)])
    return part.first_row - before


def _prompts_per_unit(config: RunConfig, max_image_pixels: int | None) -> int:
    images = config.sampling.images_per_prompt
    rows = config.output.unit_rows
    if max_image_pixels is not None:
        rows = min(rows, config.output.max_file_bytes // (max_image_pixels * CHANNELS))
    return max(1, rows // images)


def _scan(inputs: Inputs, file: InputFile, start: int, per_unit: int, limit: int | None) -> textscan.TextScan:
    scan = textscan.scan_csv if file.format == "csv" else textscan.scan_lines
    with inputs.open(file.uri) as stream:
        return scan(
            stream, file.uri, rows_to_first_cut=per_unit - start % per_unit, rows_per_unit=per_unit, limit=limit
        )


def _read_footers(inputs: Inputs, files: Sequence[InputFile]) -> list[Footer | None]:
    def read(file: InputFile) -> Footer | None:
        if file.format != "parquet":
            return None
        with inputs.open(file.uri) as stream:
            return read_footer(stream, file.uri, file.size)

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return list(pool.map(read, files))


def _text_columns(file: InputFile, scan: textscan.TextScan, config: RunConfig) -> pa.Schema:
    """All columns of a text file; types matter for the user's own only."""
    if file.format == "txt":
        return pa.schema([(config.input.prompt_column, pa.string())])
    if file.format == "csv":
        assert scan.header is not None
        return infer_csv(scan.header, scan.sample, scan.header)
    rows = []
    for line in scan.sample:
        try:
            rows.append(parse_json(line))
        except RowError:  # becomes an error row when it is read
            continue
    names = list(dict.fromkeys(name for row in rows for name in row))
    if scan.num_rows and rows and config.input.prompt_column not in names:
        raise _no_prompt_column(file, names, config)
    special = _special(config)
    own = infer_json(rows, [name for name in names if name not in special], file.uri)
    return pa.schema([*((name, pa.string()) for name in names if name in special), *own])


def _own_columns(file: InputFile, columns: pa.Schema, config: RunConfig) -> pa.Schema:
    if config.input.prompt_column not in columns.names and (file.format != "jsonl" or len(columns)):
        raise _no_prompt_column(file, columns.names, config)
    if len(set(columns.names)) < len(columns.names):
        raise InputError(f"{file.uri}: two columns have one name; names must differ.")
    if file.format == "parquet":
        kind = storable_columns([columns.field(config.input.prompt_column)], file.uri).types[0]
        if not pa.types.is_string(kind):
            raise InputError(f"{file.uri}: column '{config.input.prompt_column}' is {kind}; prompts must be text.")
    special = _special(config)
    own = [field for field in columns if field.name not in special]
    return pa.schema(own) if file.format == "jsonl" else storable_columns(own, file.uri)


def _no_prompt_column(file: InputFile, names: Sequence[str], config: RunConfig) -> InputError:
    shown = ", ".join(names[:20]) or "none"
    return InputError(
        f"{file.uri} has no column '{config.input.prompt_column}'; it has {shown}; name the prompts' with input.prompt_column."
    )


def _special(config: RunConfig) -> frozenset[str]:
    return frozenset({config.input.prompt_column, config.input.id_column, *SETTINGS})


def _check_id_column(
    config: RunConfig,
    files: Sequence[InputFile],
    scans: Sequence[textscan.TextScan | None],
    footers: Sequence[Footer | None],
) -> None:
    """An id column that the user named must be somewhere; the default one need not (jsonl rows are looked at one by one)."""
    name = config.input.id_column
    if name == "id" or any(file.format == "jsonl" for file in files):
        return
    known = [*(scan.header or () for scan in scans if scan), *(footer.schema.names for footer in footers if footer)]
    if not any(name in names for names in known):
        raise InputError(f"input.id_column: no file of the input has a column '{name}'.")


def _unify(files: Sequence[InputFile], found: Sequence[pa.Schema]) -> pa.Schema:
    """One type for each column over all files."""
    result = found[0]
    for file, columns in zip(files[1:], found[1:], strict=True):
        if columns.equals(result, check_metadata=True):
            continue
        try:
            result = pa.unify_schemas([result, columns], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"{file.uri}: a column has another type than in the files before it ({str(error).splitlines()[0]}); make them alike."
            ) from error
    return result.remove_metadata()


def _identity(
    inputs: Inputs,
    files: Sequence[InputFile],
    counts: Sequence[int],
    scans: Sequence[textscan.TextScan | None],
    footers: Sequence[Footer | None],
) -> list[dict[str, Any]]:
    """Each file's rows and content: a hash where the plan read it all, else size, footer and version."""
    local_bytes = sum(file.size for file in files if file.format == "parquet" and not file.uri.startswith("s3://"))
    result = []
    for file, count, scan, footer in zip(files, counts, scans, footers, strict=True):
        entry: dict[str, Any] = {"name": file.name, "rows": count}
        if scan is not None:
            entry["sha256"] = scan.sha256
        elif footer is not None:
            entry |= {"size": file.size, "footer": f"{footer.checksum:08x}"}
            if file.uri.startswith("s3://"):
                entry["etag"] = file.version
            elif local_bytes <= _HASHED_BYTES:
                with inputs.open(file.uri) as stream:
                    entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            else:
                entry["modified"] = int(file.version)
        result.append(entry)
    return result


def _spec(
    config: RunConfig,
    num_scales: int | None,
    columns: pa.Schema,
    files: Sequence[InputFile],
    scans: Sequence[textscan.TextScan | None],
    footers: Sequence[Footer | None],
) -> InputSpec:
    sampling = config.sampling
    for name, value in (("cfg", sampling.cfg), ("tau", sampling.tau)):
        try:
            per_scale(value, name, num_scales)
        except RowError as error:
            raise ConfigError(f"sampling.{error}.") from error
    return InputSpec(
        files={
            file.uri: FileSpec(
                file.format,
                file.size,
                (config.input.prompt_column,) if file.format == "txt" else scan.header if scan else None,
                footer.checksum if footer else None,
            )
            for file, scan, footer in zip(files, scans, footers, strict=True)
        },
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
