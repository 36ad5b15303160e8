"""The input as a plan of units (counts and row ranges only), and a unit as requests."""

import hashlib
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from skipvar.checks import require
from skipvar.config import RunConfig
from skipvar.errors import InputError
from skipvar.shards.inputs import InputFile, Inputs
from skipvar.shards.looking import LookedAt, look_at_all, special_columns
from skipvar.shards.record import InputIdentity
from skipvar.shards.rows import InputSpec, requests_of
from skipvar.shards.sources import read_rows
from skipvar.shards.storage import Storage
from skipvar.shards.textinput import TextNormaliser, find_parts, publish_parts
from skipvar.types import Failure, FileSlice, Request, Unit

CHANNELS = 3
_HASHED_BYTES = 256 << 20
"""Local Parquet input up to this size in all is hashed; of more, footers, sizes and times must do."""


@dataclass(frozen=True)
class Plan:
    """The whole input, cut into units by count alone. Holds row ranges, and no rows."""

    identity: InputIdentity
    """How many rows, in which units, from which files."""
    spec: InputSpec
    """How the rows are read: with which columns of the user's, and which settings."""
    ranges: Sequence[FileSlice]
    """The rows of the input, in order."""
    unpublished: "TemporaryDirectory[str] | None" = None
    """Where text input in its normal form lies while it is on this machine only; `publish_input` puts it beside the
    dataset."""

    @property
    def num_units(self) -> int:
        return self.identity.num_units

    def unit(self, index: int) -> Unit:
        """Unit `index`, from 0: its range of prompts and where they lie."""
        unit = self.identity.unit(index)
        stop = unit.first_position + unit.num_rows
        return replace(unit, slices=tuple(_cut(self.ranges, self._ends, unit.first_position, stop)))

    @cached_property
    def _ends(self) -> Sequence[int]:
        return _ends(self.ranges)


@dataclass(frozen=True)
class PublishedInput:
    """The text input of a run that is there already."""

    parts: Sequence[FileSlice]
    files: Sequence[Mapping[str, Any]]
    """The text files as the run's record names them."""


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
    files, columns = look_at_all(inputs, config)
    spec = InputSpec.of(config, num_scales, columns)
    counted, parts, unpublished = _count_rows(inputs, config.input.limit, files, spec, published)
    num_rows = sum(one.num_rows for one in counted)
    if num_rows == 0:
        raise InputError(f"input.path: {config.input.path} holds no rows.")
    identity = InputIdentity(
        num_rows=num_rows,
        prompts_per_unit=per_unit,
        images_per_prompt=config.sampling.images_per_prompt,
        columns={column.name: str(column.type) for column in columns},
        files=_named_files(inputs, counted),
    )
    return Plan(identity, spec, list(_ranges(counted, parts)), unpublished)


def publish_input(plan: Plan, storage: Storage) -> Plan:
    """Put text input in its normal form under the output's `_input/`; the plan that reads it from there.

    To be called when the run is opened and its fingerprint is found to be that of the run there, if there is one.
    """
    if plan.unpublished is None:
        return plan
    moved = publish_parts(plan.unpublished.name, storage)
    ranges = [
        replace(moved[part.uri], first_row=part.first_row, num_rows=part.num_rows) if part.uri in moved else part
        for part in plan.ranges
    ]
    plan.unpublished.cleanup()
    return replace(plan, ranges=ranges, unpublished=None)


def find_published(storage: Storage, files: Sequence[Mapping[str, Any]]) -> PublishedInput | None:
    """The text input that a run of these files published; None where it is not all there."""
    texts = [file for file in files if "footer" not in file]
    num_rows = sum(file["rows"] for file in texts)
    parts = find_parts(storage) if num_rows else []
    if not parts or sum(part.num_rows for part in parts) != num_rows:
        return None
    return PublishedInput(parts, texts)


def read_unit(unit: Unit, spec: InputSpec, inputs: Inputs | None = None) -> Iterator[Request | Failure]:
    """The unit's requests in order of (position, image index); a bad row is a failure for each of its images.

    `inputs`: to read several units by one S3 client. `InputError` where a file is no longer what was planned.
    """
    inputs = inputs or Inputs(spec.storage)
    rows = (row for part in unit.slices for row in read_rows(inputs, part, spec.columns))
    for position, row in enumerate(rows, start=unit.first_position):
        for item in requests_of(row, position, spec):
            if unit.only is None or item.key in unit.only:
                yield item


class _Counted(NamedTuple):
    """A file of the input whose rows are counted, up to `input.limit`."""

    file: InputFile
    num_rows: int
    rows: FileSlice | None
    """Of Parquet: these."""
    sha256: str | None
    """Of text: as far as it was read."""


def _prompts_per_unit(config: RunConfig, max_image_pixels: int | None) -> int:
    rows = config.output.unit_rows
    if max_image_pixels is not None:
        most = max(1, config.output.max_file_bytes // (max_image_pixels * CHANNELS))
        count = config.sampling.images_per_prompt
        accepted = f"a whole number of 1 or more, up to {most}: more images do not fit output.max_file_bytes"
        require(count <= most, "sampling.images_per_prompt", count, accepted)
        rows = min(rows, most)
    return max(1, rows // config.sampling.images_per_prompt)


def _count_rows(
    inputs: Inputs,
    limit: int | None,
    files: Sequence[LookedAt],
    spec: InputSpec,
    published: PublishedInput | None,
) -> tuple[list[_Counted], Sequence[FileSlice], "TemporaryDirectory[str] | None"]:
    """Every file with its rows, those beyond `limit` not counted; the parts with the text's, and their folder if they
    are not published yet."""
    texts = [found for found in files if found.rows is None]
    known: Iterator[Mapping[str, Any]] = iter(())
    normaliser: TextNormaliser | None = None
    if published is not None and limit is None and _is_unchanged(inputs, texts, published):
        known = iter(published.files)
    elif texts:
        normaliser = TextNormaliser(spec, special_columns(texts, spec.input))
    counted = []
    left = sys.maxsize if limit is None else limit
    for found in files:
        rows, sha256 = found.rows, None
        if rows is not None:
            num_rows = min(left, rows.num_rows)
            rows = replace(rows, num_rows=num_rows)
        elif normaliser is not None:
            num_rows, sha256 = normaliser.add(inputs, found.file, left)
        else:
            entry = next(known)
            num_rows, sha256 = entry["rows"], entry["sha256"]
        counted.append(_Counted(found.file, num_rows, rows, sha256))
        left -= num_rows
    if normaliser is not None:
        return counted, normaliser.finish(), normaliser.folder
    return counted, () if published is None else published.parts, None


def _is_unchanged(inputs: Inputs, texts: Sequence[LookedAt], published: PublishedInput) -> bool:
    """Whether the text files are those that were published."""
    names = [found.file.name for found in texts]
    return names == [entry["name"] for entry in published.files] and all(
        _sha256(inputs, found.file.uri) == entry["sha256"] for found, entry in zip(texts, published.files, strict=True)
    )


def _ranges(counted: Iterable[_Counted], parts: Sequence[FileSlice]) -> Iterator[FileSlice]:
    """Where the input's rows lie, in order: text files that follow each other share parts, and so ranges."""
    first_row, ends = 0, _ends(parts)
    for is_text, files in groupby(counted, key=lambda one: one.rows is None):
        if is_text:
            num_rows = sum(one.num_rows for one in files)
            yield from _cut(parts, ends, first_row, first_row + num_rows)
            first_row += num_rows
        else:
            yield from (one.rows for one in files if one.rows and one.num_rows)


def _ends(ranges: Iterable[FileSlice]) -> Sequence[int]:
    """How many rows there are up to the end of each range."""
    return list(accumulate(part.num_rows for part in ranges))


def _cut(ranges: Sequence[FileSlice], ends: Sequence[int], start: int, stop: int) -> Iterator[FileSlice]:
    """Where the rows [start, stop) of all ranges together lie."""
    at = bisect_right(ends, start)
    while start < stop:
        whole, end = ranges[at], min(stop, ends[at])
        skipped = start - (ends[at] - whole.num_rows)
        yield replace(whole, first_row=whole.first_row + skipped, num_rows=end - start)
        start, at = end, at + 1


def _named_files(inputs: Inputs, counted: Sequence[_Counted]) -> list[dict[str, Any]]:
    """Each file's rows and content: a hash where the plan read it all, else size, footer and version."""
    local = (one.file.size for one in counted if one.rows is not None and not one.file.is_on_s3)
    is_hashed = sum(local) <= _HASHED_BYTES
    result = []
    for file, num_rows, rows, sha256 in counted:
        entry: dict[str, Any] = {"name": file.name, "rows": num_rows}
        if rows is None:
            entry["sha256"] = sha256
        else:
            entry |= {"size": file.size, "footer": f"{rows.footer_checksum:08x}"}
            if file.is_on_s3:
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
