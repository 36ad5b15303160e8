"""Run as a process: a run on a Ray of its own; prints the last line that Ray's Prometheus endpoint had
of each of our numbers, once all names were there.

`python scraped.py FOLDER PORT NAME ...`: a run over 800 prompts into FOLDER, the endpoint on PORT.
"""

import sys
import threading
import time
import urllib.request
from pathlib import Path

import fakes
import ray
from ray import cloudpickle

from skipvar.config_file import load_config
from skipvar.distributed.generate import generate
from skipvar.distributed.stopping import StopSignal

PATIENCE_SECONDS = 600


def main(folder: Path, port: int, names: list[str]) -> None:
    cloudpickle.register_pickle_by_value(fakes)
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", _metrics_export_port=port)
    (folder / "prompts.txt").write_text(
        "\n".join("please fail" if n == 7 else f"prompt {n}" for n in range(800)) + "\n"
    )
    (folder / "run.yaml").write_text(
        f"input: {{path: {folder}/prompts.txt}}\n"
        f"output: {{path: {folder}/out, unit_rows: 4}}\n"
        "model: {path: 'random:0', device: cpu}\n"
        "cluster: {replicas: {max: 1}}\n"
        "budget: {usd_per_replica_hour: 3.6}\n"
    )
    stop = StopSignal()
    run = threading.Thread(
        target=generate, args=(load_config(folder / "run.yaml"), stop, fakes.build_slow_engine), daemon=True
    )
    run.start()
    deadline, found = time.monotonic() + PATIENCE_SECONDS, dict[str, str]()
    while time.monotonic() < deadline and not all(f"ray_{name}" in found for name in names):
        time.sleep(0.5)
        try:
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            continue
        for line in page.splitlines():
            if line.startswith("ray_skipvar_"):
                found[line.partition("{")[0].partition(" ")[0]] = line
    stop.stop("the test")
    run.join(30)
    print("\n".join(found.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
