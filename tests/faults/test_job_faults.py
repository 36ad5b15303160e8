"""A job that is killed, cut off from its storage, started twice or changed: one whole dataset in the end, or a no."""

import random
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from storage.proxy import Fault, Proxy
from storage.server import SECRET_KEY, S3Server

from faults.conftest import Rows
from faults.running import kill_tree, published, rows, run, start, wait_for_units
from jobs.verify import main as verify_main
from skipvar.config import StorageConfig
from skipvar.shards.storage import open_storage

Calm = Callable[[int], Rows]


def s3_run_with_a_dying_server(
    tmp_path: Path, prompts: Path, calm: Calm, *, num_prompts: int, num_kills: int, share: float
) -> None:
    """A job to S3 through a spoiling proxy, whose server is killed and restarted: equal to an undisturbed local run."""
    server = S3Server(tmp_path / "weed")
    server.start()
    proxy = Proxy(server.port)
    proxy.spoil_at_random(share, seed=num_prompts)
    try:
        bucket = server.make_bucket()
        uri = f"s3://{bucket}/out"
        direct = StorageConfig(endpoint_url=server.url)
        storage = open_storage(uri, direct)
        process = start(
            f"input.path={prompts}", f"input.limit={num_prompts}", f"output.path={uri}",
            f"storage.endpoint_url={proxy.url}", "storage.retry_seconds=200",
        )  # fmt: skip
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stdout or ()))
        reader.start()
        for kill in range(1, num_kills + 1):
            goal = kill * (num_prompts // 4) // (num_kills + 1)
            while process.poll() is None and sum(1 for _ in storage.list("data/")) < goal:
                time.sleep(0.5)
            server.kill()
            time.sleep(3)
            server.start()
        assert process.wait(timeout=1500) == 0, "".join(said)
        reader.join()
        assert verify_main([uri, "--full", "--endpoint-url", server.url]) == 0
        assert rows(uri, direct) == calm(num_prompts)
        written = b"".join(storage.read(entry.name) for entry in storage.list())
        assert SECRET_KEY.encode() not in written and SECRET_KEY not in "".join(said)
    finally:
        proxy.close()
        server.kill()


def test_s3_dies_and_connections_are_cut(tmp_path: Path, prompts: Path, calm: Calm, credentials: None) -> None:
    s3_run_with_a_dying_server(tmp_path, prompts, calm, num_prompts=16, num_kills=1, share=0.15)


@pytest.mark.faults
def test_s3_dies_twice_in_500_prompts(tmp_path: Path, prompts: Path, calm: Calm, credentials: None) -> None:
    s3_run_with_a_dying_server(tmp_path, prompts, calm, num_prompts=500, num_kills=2, share=0.2)


def killed_again_and_again(tmp_path: Path, prompts: Path, calm: Calm, *, num_prompts: int, num_kills: int) -> None:
    """`kill -9` at random moments, each time the same command again."""
    output = tmp_path / "out"
    arguments = (f"input.path={prompts}", f"input.limit={num_prompts}", f"output.path={output}")
    generator = random.Random(num_kills)
    for kill in range(num_kills):
        process = start(*arguments)
        if kill % 2:  # somewhere in the start
            time.sleep(generator.uniform(0.5, 25.0))
        else:
            goal = min(len(published(output)) + 1, num_prompts // 4)
            wait_for_units(output, goal, process)
            time.sleep(generator.uniform(0.0, 3.0))
        kill_tree(process)
        before = published(output)
        assert not [name for name in before if "tmp" in name]
        if kill == 0:
            assert before, "the first job published nothing before it was killed"
    code, said = run(*arguments)
    assert code == 0, said
    assert verify_main([str(output), "--full"]) == 0
    after = published(output)
    assert all(after[name] == data for name, data in before.items()), "a published unit was made again"
    assert rows(str(output)) == calm(num_prompts)
    assert not list((output / "_tmp").iterdir())


def test_killed_and_started_again(tmp_path: Path, prompts: Path, calm: Calm) -> None:
    killed_again_and_again(tmp_path, prompts, calm, num_prompts=16, num_kills=1)


@pytest.mark.faults
def test_killed_twenty_times(tmp_path: Path, prompts: Path, calm: Calm) -> None:
    killed_again_and_again(tmp_path, prompts, calm, num_prompts=200, num_kills=20)


def two_at_once(
    output: str, prompts: Path, *more: str, environment: Mapping[str, str] | None = None
) -> list[tuple[int, str]]:
    """Start the same job twice at the same second; both exit codes and what both said."""
    arguments = (f"input.path={prompts}", "input.limit=16", f"output.path={output}", *more)
    processes = [start(*arguments, environment=environment) for _ in range(2)]
    outcomes: list[tuple[int, str]] = []
    for process in processes:
        said, _ = process.communicate(timeout=900)
        outcomes.append((process.returncode, said))
    print(*(said for _, said in outcomes), sep="\n-- the other --\n")
    return outcomes


def test_two_jobs_on_one_output(tmp_path: Path, prompts: Path, calm: Calm, on_cluster: dict[str, str]) -> None:
    output = tmp_path / "out"
    outcomes = two_at_once(str(output), prompts, environment=on_cluster)
    codes = sorted(code for code, _ in outcomes)
    assert codes in ([0, 0], [0, 4])
    for code, said in outcomes:
        assert "Traceback" not in said
        if code == 4:
            assert "Another run is at work" in said and "host" in said
    assert verify_main([str(output), "--full"]) == 0
    assert rows(str(output)) == calm(16)


@pytest.mark.faults
def test_two_jobs_on_one_s3_output(
    prompts: Path, calm: Calm, bucket: str, server: S3Server, config: StorageConfig
) -> None:
    uri = f"s3://{bucket}/out"
    outcomes = two_at_once(uri, prompts, f"storage.endpoint_url={server.url}")
    assert sorted(code for code, _ in outcomes) in ([0, 0], [0, 4])
    assert verify_main([uri, "--full", "--endpoint-url", server.url]) == 0
    assert rows(uri, config) == calm(16)


@pytest.mark.faults
def test_changes_are_refused_and_what_changes_nothing_is_not(tmp_path: Path, prompts: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("".join(prompts.read_text().splitlines(keepends=True)[:6]))
    output = tmp_path / "out"
    arguments = (f"input.path={mine}", f"output.path={output}")
    assert run(*arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in (output / "data").iterdir()}
    assert run(*arguments, "engine.batch_size=3", "storage.retry_seconds=100")[0] == 0
    changes = {
        "sampling.cfg=4": "sampling.cfg: 2.0 -> 4",
        "policy=fixed:base": "policy.",
        "model.path=random:1": "model.weights_sha256",
    }
    for change, named in changes.items():
        code, said = run(*arguments, change)
        assert code == 2 and named in said and "output.path" in said, said
    mine.write_text(mine.read_text().replace("number 3", "number three"))
    code, said = run(*arguments)
    assert code == 2 and "input.files[mine.txt].sha256" in said, said
    assert {path.name: path.read_bytes() for path in (output / "data").iterdir()} == before


@pytest.mark.faults
def test_a_full_disk_stops_the_run_and_room_lets_it_finish(tmp_path: Path, prompts: Path, calm: Calm) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        arguments = (f"input.path={prompts}", "input.limit=24", f"output.path={folder}/out")
        code, said = run(*arguments)
        assert code == 4 and "the disk is full" in said and "Traceback" not in said, said
        subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)
        code, said = run(*arguments)
        assert code == 0, said
        assert verify_main([f"{folder}/out", "--full"]) == 0
        assert rows(f"{folder}/out") == calm(24)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.faults
def test_an_endpoint_that_stays_away_stops_the_run(
    tmp_path: Path, prompts: Path, calm: Calm, bucket: str, proxy: Proxy, server: S3Server, config: StorageConfig
) -> None:
    uri = f"s3://{bucket}/out"
    arguments = (f"input.path={prompts}", "input.limit=24", f"output.path={uri}", f"storage.endpoint_url={proxy.url}")
    process = start(*arguments, "storage.retry_seconds=5")
    storage = open_storage(uri, config)
    while process.poll() is None and not list(storage.list("data/")):
        time.sleep(0.2)
    proxy.choose = lambda method, path: Fault(answer=(503, "ServiceUnavailable"))
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 4 and "did not answer properly" in said and "Traceback" not in said, said
    proxy.choose = lambda method, path: Fault()
    code, said = run(*arguments)
    assert code == 0, said
    assert verify_main([uri, "--full", "--endpoint-url", server.url]) == 0
    assert rows(uri, config) == calm(24)


def test_wrong_credentials_are_told_at_the_start(
    prompts: Path, bucket: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    code, said = run(f"input.path={prompts}", f"output.path=s3://{bucket}/out", f"storage.endpoint_url={server.url}")
    assert code in (2, 4) and "Traceback" not in said
    assert ("secret key is wrong" in said or "access denied" in said) and "wrong-secret-value" not in said
