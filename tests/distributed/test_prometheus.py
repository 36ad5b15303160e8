"""The numbers of a run on Ray's own Prometheus endpoint, and who names them."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SOURCE = "".join((REPOSITORY / f"skipvar/distributed/{name}.py").read_text() for name in ("metrics", "replica"))


def exported_names() -> set[str]:
    """By Ray's rule: `ray_` before all, `_total` behind counters."""
    made = re.findall(r'(Counter|Gauge)\(\s*"(skipvar_\w+)"', SOURCE)
    return {f"ray_{name}{'_total' if kind == 'Counter' else ''}" for kind, name in made}


def test_the_endpoint_has_every_number_of_a_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    waited_for = {name.removeprefix("ray_") for name in exported_names()} - {
        "skipvar_replica_losses_total",  # nothing is lost in this run
        "skipvar_units_retried_total",
    }
    said = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("scraped.py")), str(tmp_path), str(port), *sorted(waited_for)],
        env={**os.environ, "RAY_metrics_report_interval_ms": "500", "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = {line.partition("{")[0]: line for line in said.stdout.splitlines() if line.startswith("ray_skipvar")}
    assert {f"ray_{name}" for name in waited_for} <= lines.keys(), said.stdout + said.stderr[-2000:]
    assert 'strategy="' in lines["ray_skipvar_images_total"]
    assert 'phase="suffix"' in lines["ray_skipvar_phase_seconds"] and 'replica="' in lines["ray_skipvar_batch_fill"]
    assert float(lines["ray_skipvar_cost_usd"].split()[-1]) > 0


def test_every_panel_of_the_dashboard_asks_for_numbers_that_exist() -> None:
    dashboard = json.loads((REPOSITORY / "cluster/dashboard.json").read_text())
    names = exported_names()
    asked = set()
    for panel in dashboard["panels"]:
        assert {"id", "type", "title", "gridPos", "targets", "datasource", "fieldConfig", "options"} <= panel.keys()
        assert {"h", "w", "x", "y"} == panel["gridPos"].keys() and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel["targets"]:
            queried = set(re.findall(r"\bray_\w+", target["expr"]))
            assert queried and queried <= names, target["expr"]
            asked |= queried
    assert asked == names, "a number without a panel"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert {"title", "uid", "schemaVersion", "templating", "time", "refresh"} <= dashboard.keys()
    [source] = dashboard["templating"]["list"]
    assert source["type"] == "datasource" and source["query"] == "prometheus"


def test_every_number_is_documented() -> None:
    text = (REPOSITORY / "cluster/README.md").read_text()
    assert all(f"`{name}`" in text for name in exported_names())
