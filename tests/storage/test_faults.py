"""What goes wrong between a run and its storage: nothing is lost, doubled or half there."""

import random
import threading
import time
from pathlib import Path

import pytest
from shards.making import Job, draw, make_config, make_dataset, write

from jobs.verify import main as verify_main
from skipvar.config import StorageConfig
from skipvar.errors import NotFoundError, StorageError
from skipvar.shards.storage import open_storage
from storage.proxy import Fault, Proxy
from storage.server import S3Server

BODY = random.Random(0).randbytes(3_000_000)
PASSING = {
    "cut at the start": Fault(cut_request=0.0),
    "cut in mid-upload": Fault(cut_request=0.5),
    "cut at the end": Fault(cut_request=0.999),
    "an internal error": Fault(answer=(500, "InternalError")),
    "slow down": Fault(answer=(503, "SlowDown")),
    "a conflict": Fault(answer=(409, "ConditionalRequestConflict")),
    "a delay": Fault(delay_seconds=0.5),
}


@pytest.mark.parametrize("fault", PASSING)
def test_an_upload_survives(bucket: str, proxy: Proxy, proxied: StorageConfig, fault: str) -> None:
    storage = open_storage(f"s3://{bucket}/x", proxied)
    proxy.script(PASSING[fault], PASSING[fault])
    assert storage.put_if_absent("data/a", BODY)
    assert storage.read("data/a") == BODY
    assert not storage.put_if_absent("data/a", b"other")


def test_a_lost_answer_is_found_as_already_there(bucket: str, proxy: Proxy, proxied: StorageConfig) -> None:
    storage = open_storage(f"s3://{bucket}/x", proxied)
    proxy.script(Fault(cut_response=0.0))
    assert not storage.put_if_absent("data/a", BODY)  # it is: by ourselves
    assert storage.read("data/a") == BODY


@pytest.mark.parametrize("fault", [Fault(cut_response=0.4), Fault(cut_response=0.0), Fault(answer=(503, "SlowDown"))])
def test_a_download_survives(bucket: str, proxy: Proxy, proxied: StorageConfig, fault: Fault) -> None:
    storage = open_storage(f"s3://{bucket}/x", proxied)
    storage.replace("a", BODY)
    proxy.script(fault, fault, method="GET")
    assert storage.read("a") == BODY
    proxy.script(fault, fault, method="GET")
    with storage.open("a") as file:
        file.seek(1_000_000)
        assert file.read() == BODY[1_000_000:]


def test_an_answer_that_says_no_may_be_cut_too(bucket: str, proxy: Proxy, proxied: StorageConfig) -> None:
    storage = open_storage(f"s3://{bucket}/x", proxied)
    proxy.script(*[Fault(cut_response=0.5)] * 2, method="GET")
    with pytest.raises(NotFoundError):
        storage.read("data/none")


def test_nothing_is_seen_of_an_upload_that_never_ends(bucket: str, proxy: Proxy) -> None:
    storage = open_storage(f"s3://{bucket}/x", StorageConfig(endpoint_url=proxy.url, retry_seconds=1))
    proxy.choose = lambda method, path: Fault(cut_request=0.7) if method == "PUT" else Fault()
    with pytest.raises(StorageError, match="did not answer properly"):
        storage.put_if_absent("data/a", BODY)
    proxy.choose = lambda method, path: Fault()
    assert list(storage.list("data/")) == []
    assert storage.put_if_absent("data/a", BODY)


def run_through_faults(tmp_path: Path, uri: str, storage: StorageConfig, num_units: int, num_workers: int) -> Job:
    """Several workers, each making every unit, in an order of its own."""
    prompts = [f"prompt {i}" + (" bad" if i % 7 == 3 else "") for i in range(4 * num_units)]
    path = write(tmp_path / "prompts.txt", "\n".join(prompts) + "\n")
    job = Job(make_config(input__path=path, output__path=uri, output__unit_rows=4, storage=storage))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        order = random.Random(seed).sample(range(num_units), num_units)
        try:
            reports = [job.make_unit(job.plan.unit(index), f"r{seed}") for index in order]
            assert all(report.same_content for report in reports)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_workers)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors, errors
    job.finish()
    return job


def check_against_undisturbed(tmp_path: Path, job: Job, server: S3Server) -> None:
    """Everything there once, and equal to the run that nothing disturbed."""
    assert verify_main([job.storage.uri, "--full", "--endpoint-url", server.url]) == 0
    (tmp_path / "calm").mkdir()
    prompts = Path(job.config.input.path).read_text().splitlines()
    calm = make_dataset(tmp_path / "calm", prompts)
    for index in range(job.plan.num_units):
        assert all(one.make_unit(one.plan.unit(index)).same_content for one in (job, calm))
        assert job.content_hash(index) == calm.content_hash(index)
    assert job.ledger.num_errors() == calm.ledger.num_errors()


def test_faults_at_random(tmp_path: Path, bucket: str, proxy: Proxy, proxied: StorageConfig, server: S3Server) -> None:
    proxy.spoil_at_random(0.25, seed=1)
    job = run_through_faults(tmp_path, f"s3://{bucket}/out", proxied, num_units=8, num_workers=2)
    proxy.choose = lambda method, path: Fault()
    check_against_undisturbed(tmp_path, job, server)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(10))
def test_many_faults_at_random(
    tmp_path: Path, bucket: str, proxy: Proxy, proxied: StorageConfig, server: S3Server, seed: int
) -> None:
    proxy.spoil_at_random(0.4, seed=seed)
    patient = StorageConfig(endpoint_url=proxied.endpoint_url, retry_seconds=120)
    job = run_through_faults(tmp_path, f"s3://{bucket}/out", patient, num_units=20, num_workers=3)
    proxy.choose = lambda method, path: Fault()
    check_against_undisturbed(tmp_path, job, server)


def test_the_server_dies_and_comes_back(tmp_path: Path, credentials: None) -> None:
    """A server of its own, killed in the middle of a run: writers wait for it."""
    server = S3Server(tmp_path / "weed")
    server.start()
    try:
        bucket = server.make_bucket()
        config = StorageConfig(endpoint_url=server.url, retry_seconds=90)
        storage = open_storage(f"s3://{bucket}/out", config)
        assert storage.put_if_absent("data/before", BODY)
        server.kill()
        restart = threading.Timer(3.0, server.start)
        restart.start()
        started = time.monotonic()
        assert storage.put_if_absent("data/after", BODY)
        assert time.monotonic() - started > 2
        restart.join()
        assert storage.read("data/before") == BODY and storage.read("data/after") == BODY
        job = run_through_faults(tmp_path, f"s3://{bucket}/job", config, num_units=4, num_workers=1)
        check_against_undisturbed(tmp_path, job, server)
    finally:
        server.kill()


def test_a_retry_on_s3(tmp_path: Path, bucket: str, proxy: Proxy, proxied: StorageConfig, server: S3Server) -> None:
    job = make_dataset(tmp_path, ["a", "b bad", "c"], output__path=f"s3://{bucket}/out", storage=proxied)
    proxy.spoil_at_random(0.3, seed=3)
    job.make = draw
    job.make_units(job.ledger.retry_units(job.plan))
    assert job.ledger.num_errors() == 0
    job.finish()
    assert verify_main([job.storage.uri, "--full", "--endpoint-url", server.url]) == 0
