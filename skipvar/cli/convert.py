"""Convert Infinity's published files to one folder of safetensors that `model.path` opens, and print its hashes."""

import argparse
from collections.abc import Sequence

from skipvar.cli.running import Parser, check_folder, local_path, run_job
from skipvar.errors import InputError
from skipvar.model.convert import convert_checkpoint
from skipvar.model.identity import read_config
from skipvar.model.pipeline import DTYPES
from skipvar.model.presets import PRESETS


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.convert_checkpoint") -> int:
    """Parse the arguments, convert and return the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--model", choices=sorted(PRESETS), help="the preset with the weights' sizes")
    parser.add_argument(
        "--config", type=local_path, help="sizes that no preset has: a config.json as this command writes it"
    )
    parser.add_argument(
        "--transformer", type=local_path, required=True, help="a .pth or safetensors file, or a sharded folder"
    )
    parser.add_argument("--vae", type=local_path, required=True, help="the official VAE: a .pth or safetensors file")
    parser.add_argument(
        "--text-encoder", type=local_path, required=True, help="a T5 in Hugging Face layout, with tokenizer"
    )
    parser.add_argument("--out", type=local_path, required=True, help="a new folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="what the weights are stored in")
    arguments = parser.parse_args(argv)
    if not arguments.model and not arguments.config:
        parser.error("either --model or --config is needed")
    return run_job(lambda: _convert(arguments))


def _convert(given: argparse.Namespace) -> int:
    dtype = DTYPES[given.dtype]
    check_folder("--out", given.out)
    try:
        config = read_config(given.config) if given.config else PRESETS[given.model]
        hashes = convert_checkpoint(config, given.transformer, given.vae, given.text_encoder, given.out, dtype)
    except OSError as error:
        raise InputError(str(error)) from error
    for name, sha256 in hashes.items():
        print(f"{sha256}  {name}")
    return 0
