"""Measures: `python -m jobs.bench` times the engine, `python -m jobs.bench plan` the driver's memory while it plans.

The last line is one JSON document.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from skipvar.config import load_config
from skipvar.errors import SkipvarError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="plan | key=value", help="what to measure; values for the config")
    parser.add_argument("--config", default="conf/emoji.yaml", help="whose model is timed")
    parser.add_argument("--images", type=int, default=24, help="images a round of the engine's timing")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the engine's timing; the median counts")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the input that is planned")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.words == ["plan"]:
            result = bench_plan(arguments.rows)
        else:
            from skipvar.distributed.measure import measure_engine

            config = load_config(arguments.config, arguments.words)
            result = measure_engine(config, num_images=arguments.images, num_rounds=arguments.rounds, show=print)
    except SkipvarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def bench_plan(num_rows: int) -> dict[str, object]:
    """Plan a Parquet and a text input of so many rows, each in a process of its own, and report its peak memory."""
    from skipvar.distributed.measure import measure_planning, write_inputs

    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, object] = {"rows": num_rows}
        for path in write_inputs(Path(folder), num_rows):
            found = measure_planning(path)
            memory = f"{found['peak_bytes'] / 1e6:.0f} MB"
            print(f"{path.suffix[1:]}: {num_rows:,} rows planned in {found['seconds']:.1f} s, peak memory {memory}")
            result[path.suffix[1:]] = found
    return result


if __name__ == "__main__":
    sys.exit(main())
