"""Compose a set of prompts for the embedded model or for photographic ones, of little detail, mixed, or of much.

conf/prompts/emoji.txt is `mixed 96 --seed 1`, emoji_plain.txt `plain 96 --seed 3`, emoji_high.txt `high 96 --seed 4`;
emoji_calibration.jsonl is `mixed 2000 --seed 2 --without
conf/prompts/emoji.txt`; photo_<detail>.jsonl are `<detail> 200 --for photo`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from skipvar.checks import INT64_MAX
from skipvar.cli.running import Parser, local_path, run_job, whole
from skipvar.errors import ConfigError


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.make_prompts") -> int:
    """Parse the arguments, write the file and return the exit code."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detail", choices=("plain", "mixed", "high"), help="how much detail the prompts ask for")
    parser.add_argument("--for", dest="family", choices=("emoji", "photo"), default="emoji", help="for which models")
    parser.add_argument("count", type=whole(1, 2000), help="how many prompts, all different")
    parser.add_argument("--seed", type=whole(0, INT64_MAX), default=0, help="the same seed composes the same prompts")
    parser.add_argument("--without", type=local_path, help="a text file of prompts whose pictures are left out")
    parser.add_argument(
        "--out", type=local_path, required=True, help="a .txt, or a .jsonl that holds each prompt's group"
    )
    arguments = parser.parse_args(argv)
    return run_job(lambda: _write(arguments))


def _write(arguments: argparse.Namespace) -> int:
    from skipvar.training.photo_prompts import compose_photos
    from skipvar.training.prompt_sets import compose

    if arguments.out.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--out {arguments.out}: give a name that ends with .txt or .jsonl.")
    try:
        if arguments.without and not arguments.without.is_file():
            raise ConfigError(f"--without {arguments.without} is no file; give a text file with a prompt a line.")
        without = arguments.without.read_text(encoding="utf-8").splitlines() if arguments.without else []
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--without {arguments.without} cannot be read ({reason}).") from error
    if arguments.family == "photo":
        if without:
            raise ConfigError("--without: is for emoji prompts.")
        prompts = compose_photos(arguments.detail, arguments.count, arguments.seed)
    else:
        prompts = compose(arguments.detail, arguments.count, arguments.seed, without)
    is_text = arguments.out.suffix == ".txt"
    lines = [prompt.prompt if is_text else json.dumps(asdict(prompt)) for prompt in prompts]
    try:
        arguments.out.write_text("".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise ConfigError(f"--out {arguments.out} cannot be written ({error.strerror}).") from error
    print(f"{len(prompts)} prompts in {arguments.out}")
    return 0
