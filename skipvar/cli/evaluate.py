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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvar.checks import check_one_of, shown
from skipvar.cli.running import Parser, check_folder, local_path, number, read_config, run_job, show_progress, whole
from skipvar.config import RunConfig
from skipvar.errors import ConfigError
from skipvar.model.device import Device
from skipvar.skip.policy import CertifiedPolicy, Policy

if TYPE_CHECKING:
    import pyarrow as pa

    from skipvar.quality.evaluate import Score


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
    main_set = "mixed" if "mixed" in sets else next(iter(sets))
    check_folder("--out", arguments.out)
    prepare_environment(config)  # before anything imports Ray
    from skipvar.distributed.cluster import connect
    from skipvar.distributed.opening import settle
    from skipvar.distributed.trials import make_trials_run
    from skipvar.local import build_local_engine
    from skipvar.quality.evaluate import choices, evaluate, image_table
    from skipvar.quality.speed import measure_speeds, spread_requests
    from skipvar.skip.strategy import STRATEGY_NAMES

    with connect(settle(config)) as cluster:
        files = _policies(arguments, config, cluster.device)
    policies = list(files.values())
    trials, exit_code = {}, 0
    for name, path in sets.items():
        made = make_trials_run(_of_set(config, path), show=print)
        if made.trials is None:
            return made.exit_code
        trials[name], exit_code = made.trials, max(exit_code, made.exit_code)
    costs = strategy_costs(made.resolved, config.sampling.aspect_ratio)
    clocked = _of_set(config, sets[main_set])
    requests = spread_requests(clocked, made.resolved.num_scales, max(1, arguments.timed))
    speeds = {}
    if arguments.timed:
        specs = {name: f"fixed:{name}" for name in STRATEGY_NAMES} | {one.name: file for file, one in files.items()}
        speeds = measure_speeds(clocked, specs, requests, arguments.rounds, build_local_engine)
    chosen = {name: choices(policies, of_set, requests[0]) for name, of_set in trials.items()}
    scores = evaluate(trials, chosen, arguments.floor, costs, speeds)
    _show(scores, image_table(trials, chosen, costs), made.resolved.model.name, arguments.out)
    name = arguments.headline or (policies[-1].name if policies else "base")
    headline = next(score for score in scores if (score.policy, score.set) == (name, main_set))
    alphas = {one.name: one.promise.alpha for one in policies if isinstance(one, CertifiedPolicy)}
    print(json.dumps(headline.to_dict() | {"alpha": alphas.get(name)}))
    return exit_code


def _show(scores: "Sequence[Score]", images: "pa.Table", model: str, folder: Path) -> None:
    """Into the folder, and the table on standard output, too."""
    from skipvar.quality.results import draw, markdown, write

    table = markdown(scores, model)
    try:
        write(folder, scores, images, table)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror}); give another folder.") from error
    print(table)
    try:
        print("plots:", *draw(scores, folder))
    except ImportError:
        print("no plot: matplotlib is not installed; pip install 'skipvar[calibrate]'")


def _of_set(config: RunConfig, path: Any) -> RunConfig:
    return replace(config, input=replace(config.input, path=path))


def _policies(arguments: argparse.Namespace, config: RunConfig, device: Device) -> dict[str, Policy]:
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
    found: dict[str, Policy] = {}
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
        Inputs(config.storage).find(_of_set(config, path).input.path)  # told now, not after the others' trials
    return {name: path for name, _, path in pairs}
