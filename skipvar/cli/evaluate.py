"""Compare every fixed strategy and every given policy with `base`, on sets of prompts, in one run.

    python -m jobs.evaluate conf/calibrate.yaml --policies conf/policies/emoji_*.json \\
        --sets mixed=conf/prompts/emoji.txt plain=conf/prompts/emoji_plain.txt [--out outputs/evaluation]

Trials of the prompts are made first, as a run that resumes; every policy's choices are read off them. Then the clock:
each is run on `--timed` prompts of `mixed` (else of the first set), alone and in full batches. Writes evaluation.md,
evaluation.json, images.parquet, pareto.svg and pareto.png. The last line is JSON: `--headline` (else the last policy)
on `mixed`.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipvar.checks import check_one_of, shown
from skipvar.cli.running import Parser, check_folder, local_path, number, read_config, run_job, show_progress, whole
from skipvar.config import RunConfig
from skipvar.errors import ConfigError
from skipvar.model.device import Device
from skipvar.types import Request


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.evaluate") -> int:
    """Parse the arguments, evaluate, write the results and return the exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file such as conf/calibrate.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--policies", nargs="+", default=[], metavar="FILE", help="policy files to compare")
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME=PATH", help="sets of prompts (else input.path)")
    parser.add_argument("--headline", metavar="NAME", help="the policy of the last line")
    parser.add_argument("--floor", type=number(-1, 1), default=0.88, help="SSIM floor")
    parser.add_argument("--timed", type=whole(0), default=16, help="prompts that the clock runs on; 0: none")
    parser.add_argument("--rounds", type=whole(1), default=3, help="how often the clock runs")
    parser.add_argument("--out", type=local_path, default=Path("outputs/evaluation"), help="folder for the results")
    arguments = parser.parse_intermixed_args(argv)
    show_progress()
    return run_job(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    from skipvar.distributed.environment import prepare_environment
    from skipvar.engine.resolved import strategy_costs

    config = replace(read_config(arguments.config, arguments.overrides), policy=None)
    sets = _sets(arguments.sets, config)
    check_folder("--out", arguments.out)
    prepare_environment(config)  # before anything imports Ray
    from skipvar.distributed.cluster import connect
    from skipvar.distributed.opening import settle
    from skipvar.distributed.trials import make_trials_run
    from skipvar.local import build_local_engine
    from skipvar.quality.evaluate import ORACLE, evaluate, image_rows
    from skipvar.quality.speed import measure_speeds
    from skipvar.skip.strategy import STRATEGY_NAMES

    with connect(settle(config)) as cluster:
        files = _policies(arguments, config, cluster.device)
    trials, exit_code = {}, 0
    for name, path in sets.items():
        config = replace(config, input=replace(config.input, path=path))
        made = make_trials_run(config, show=print)
        if made.trials is None:
            return made.exit_code
        trials[name], exit_code = made.trials, max(exit_code, made.exit_code)
    costs = strategy_costs(made.resolved, config.sampling.aspect_ratio)
    headline_input = replace(config.input, path=sets[_headline_set(sets)])
    requests = spread_requests(replace(config, input=headline_input), made.resolved.num_scales, max(1, arguments.timed))
    rows = evaluate(trials, list(files.values()), requests[0], arguments.floor, costs)
    if arguments.timed:
        specs = {name: f"fixed:{name}" for name in STRATEGY_NAMES} | {one.name: name for name, one in files.items()}
        speeds = measure_speeds(config, specs, requests, arguments.rounds, build_local_engine)
        for row in rows:
            if row["policy"] == ORACLE:
                continue
            mine, base = speeds[row["policy"]], speeds["base"]
            row |= {"seconds_one": mine.one, "seconds": mine.full}
            row |= {"speedup_one": round(base.one / mine.one, 3), "speedup": round(base.full / mine.full, 3)}
    of_images = image_rows(trials, list(files.values()), requests[0], costs)
    _write(arguments.out, rows, of_images, made.resolved.model.name)
    print(json.dumps(_headline(rows, arguments, files)))
    return exit_code


def _policies(arguments: argparse.Namespace, config: RunConfig, device: Device) -> dict[str, Any]:
    """The policies to compare by their files; what cannot be compared is refused before any work."""
    from skipvar.distributed.opening import check_store_answers
    from skipvar.engine.resolved import resolve
    from skipvar.quality.evaluate import ORACLE
    from skipvar.shards.cache import StoredFiles
    from skipvar.skip.policy_file import check_spec
    from skipvar.skip.strategy import STRATEGY_NAMES

    others = [name for name in arguments.policies if not name.endswith(".json")]
    if others:
        raise ConfigError(f"--policies: {shown(others[0])} is no policy file; give files that end in .json.")
    found: dict[str, Any] = {}
    files = StoredFiles(config.storage)
    for file in arguments.policies:
        check_spec(file)
        check_store_answers(replace(config, policy=file))
        under = replace(config, policy=file)
        found[file] = resolve(under, files, device).policy
        if arguments.timed:
            resolve(under, files)  # the clock runs on this machine
    names = [one.name for one in found.values()]
    taken = (*STRATEGY_NAMES, ORACLE)
    if twice := next((name for name in names if names.count(name) > 1 or name in taken), None):
        raise ConfigError(f"--policies: {shown(twice)} is the name of two policies; names must differ.")
    if arguments.headline is not None:
        check_one_of("--headline", arguments.headline, [*STRATEGY_NAMES, *names])
    return found


def _sets(given: Sequence[str], config: RunConfig) -> dict[str, Any]:
    """Paths of prompts by the name of their set; the configuration's own input is `all`."""
    from skipvar.shards.inputs import Inputs

    if not given:
        return {"all": config.input.path}
    if "{fingerprint}" not in config.output.path and len(given) > 1:
        raise ConfigError("output.path: several --sets need {fingerprint} in it, so that each has its own trials.")
    pairs = [text.partition("=") for text in given]
    if not all(name and path for name, _, path in pairs):
        raise ConfigError("--sets: write NAME=PATH, such as mixed=conf/prompts/emoji.txt.")
    names = [name for name, _, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--sets: {shown(twice)} is the name of two sets; names must differ.")
    for _, _, path in pairs:
        Inputs(config.storage).find(replace(config.input, path=path).path)  # told now, not after the others' trials
    return {name: path for name, _, path in pairs}


def _headline_set(names: Iterable[str]) -> str:
    """Whose prompts the clock runs on, and whose row comes last."""
    known = list(names)
    return "mixed" if "mixed" in known else known[0]


def spread_requests(config: RunConfig, num_scales: int, count: int) -> list[Request]:
    """Some of the input's requests, spread over all of it."""
    from skipvar.shards.prompts import plan_input, read_unit

    plan = plan_input(config, num_scales)
    items = (item for unit in range(plan.num_units) for item in read_unit(plan.unit(unit), plan.spec))
    found = [item for item in items if isinstance(item, Request)]
    return found[:: max(1, len(found) // count)][:count]


def _write(folder: Path, rows: list[dict[str, Any]], of_images: list[dict[str, Any]], model: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from skipvar.quality.evaluate import markdown

    text = markdown(rows, model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.md").write_text(text)
        (folder / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")
        pq.write_table(pa.Table.from_pylist(of_images), folder / "images.parquet")
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror}); give another folder.") from error
    print(text)
    try:
        from skipvar.quality.pareto import draw

        print("plots:", *draw(rows, folder))
    except ImportError:
        print("no plot: matplotlib is not installed; pip install 'skipvar[calibrate]'")


def _headline(rows: list[dict[str, Any]], arguments: argparse.Namespace, files: dict[str, Any]) -> dict[str, Any]:
    """The row that the last line tells, with what its policy promises."""
    wanted = _headline_set([row["set"] for row in rows])
    name = arguments.headline or next((one.name for one in reversed(files.values())), "base")
    found = next(row for row in rows if (row["policy"], row["set"]) == (name, wanted))
    promises = {one.name: getattr(one, "promise", None) for one in files.values()}
    promise = promises.get(name)
    return found | {"alpha": promise.alpha if promise else None}
