"""Converts Infinity's published files to one folder of safetensors that `model.path` opens, and prints its hashes."""

import argparse
import sys
from pathlib import Path

from skipvar.errors import SkipvarError
from skipvar.model.config import ModelConfig
from skipvar.model.convert import convert_checkpoint
from skipvar.model.pipeline import DTYPES, read_config
from skipvar.model.presets import PRESETS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.convert_checkpoint", description=__doc__)
    parser.add_argument("--model", choices=sorted(PRESETS), help="the preset with the weights' sizes")
    parser.add_argument("--config", type=Path, help="sizes that no preset has: a config.json as this command writes it")
    parser.add_argument(
        "--transformer", type=Path, required=True, help="a .pth or safetensors file, or a sharded folder"
    )
    parser.add_argument("--vae", type=Path, required=True, help="the official VAE: a .pth or safetensors file")
    parser.add_argument("--text-encoder", type=Path, required=True, help="a T5 in Hugging Face layout, with tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="what the weights are stored in")
    args = parser.parse_args()
    if not args.model and not args.config:
        parser.error("either --model or --config is needed")
    return args


def main() -> int:
    args = parse_arguments()
    try:
        config: ModelConfig = read_config(args.config) if args.config else PRESETS[args.model]
        hashes = convert_checkpoint(config, args.transformer, args.vae, args.text_encoder, args.out, DTYPES[args.dtype])
    except (SkipvarError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for name, sha256 in hashes.items():
        print(f"{sha256}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
