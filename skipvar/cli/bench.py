"""Measure: the engine against one image at a time, `plan`: the driver's memory while it plans, `driver`: what it costs,
Ray's calls measured with real actors and the rest simulated.

The last line is one JSON document.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from skipvar.checks import MAX_SECONDS
from skipvar.cli.running import Parser, number, read_config, run_job, whole
from skipvar.config import RunConfig

NUM_MEASURED_UNITS = 10_000
MAX_ACTORS = 256
"""Each is a process of this machine."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.bench") -> int:
    """Parse the arguments, measure, print and return the exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", nargs="*", metavar="plan | driver | key=value", help="what to measure; values for the config"
    )
    parser.add_argument("--config", default="conf/emoji.yaml", help="whose model is timed")
    parser.add_argument("--images", type=whole(1), default=24, help="images a round of the engine's timing")
    parser.add_argument("--rounds", type=whole(1), default=3, help="rounds of the engine's timing; the median counts")
    parser.add_argument("--rows", type=whole(1), default=10_000_000, help="rows of the input that is planned")
    parser.add_argument("--replicas", type=whole(1), default=1000, help="simulated replicas of the driver")
    parser.add_argument("--units", type=whole(1), default=1_000_000, help="units that the driver hands out")
    parser.add_argument(
        "--actors",
        type=whole(0, MAX_ACTORS),
        default=8,
        help="real ones, to measure Ray's calls with; 0: leave those out",
    )
    parser.add_argument(
        "--unit-seconds",
        type=number(0, MAX_SECONDS, is_between=True),
        default=4.0,
        help="what a simulated replica takes for a unit",
    )
    arguments = parser.parse_intermixed_args(argv)
    return run_job(lambda: _bench(arguments))


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.words == ["plan"]:
        from skipvar.benchmarks.planning import measure_plans

        result = measure_plans(arguments.rows, show=print)
    elif arguments.words == ["driver"]:
        result = _bench_driver(arguments)
    else:
        from skipvar.benchmarks.measure import measure_engine
        from skipvar.model.allocator import keep_freed_memory

        config = read_config(arguments.config, arguments.words)
        keep_freed_memory()  # as replicas on CPUs do
        result = measure_engine(config, num_images=arguments.images, num_rounds=arguments.rounds, show=print)
    print(json.dumps(result))
    return 0


def _bench_driver(arguments: argparse.Namespace) -> dict[str, Any]:
    from skipvar.distributed.environment import prepare_environment

    prepare_environment(RunConfig())  # before anything imports Ray
    from skipvar.benchmarks.driver import measure_driver
    from skipvar.benchmarks.ray_calls import measure_calls

    call_seconds = 0.0
    if arguments.actors:
        cost = measure_calls(arguments.actors, NUM_MEASURED_UNITS)
        pace = cost.actors / cost.units_per_second
        alone = measure_driver(cost.actors, NUM_MEASURED_UNITS, pace, show=lambda _: None)
        call_seconds = max(0.0, cost.driver_seconds - alone["driver_seconds"]) / cost.calls
        print(
            f"{NUM_MEASURED_UNITS} units by {cost.actors} real actors on this machine: {cost.units_per_second:.0f} "
            f"units/s by the clock; each of {cost.calls} calls took {1e6 * call_seconds:.0f} us of processor time, "
            "beside the driver's own code"
        )
    return measure_driver(
        arguments.replicas, arguments.units, arguments.unit_seconds, show=print, call_seconds=call_seconds
    )
