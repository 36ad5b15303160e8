"""One run a name: joined, reported or resumed, never started twice. Against a job server made of a dictionary."""

import http.server
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from ray.job_submission import JobDetails, JobStatus, JobType

from skipvar.distributed import submission
from skipvar.distributed.stopping import StopSignal
from skipvar.distributed.submission import run_once
from skipvar.errors import StoppedError

NAME = "nightly-2026-11-24"


class FakeServer:
    """Jobs that end as `ends` says, one look after they were submitted; None: they go on."""

    def __init__(self, *ends: tuple[JobStatus, int | None] | None) -> None:
        self.ends = list(ends)
        self.jobs: dict[str, JobDetails] = {}
        self.submitted: list[str] = []
        self.num_stops = 0
        self.is_away = False

    def put(self, status: JobStatus, code: int | None = None) -> None:
        self.jobs[NAME] = job(status, code)

    def list_jobs(self) -> list[JobDetails]:
        if self.is_away:
            raise ConnectionError("no route to the head")
        seen = list(self.jobs.values())
        if self.ends and NAME in self.jobs and self.jobs[NAME].status == JobStatus.RUNNING:
            end = self.ends.pop(0)
            if end is not None:
                self.put(*end)
        return seen

    def submit_job(self, *, entrypoint: str, submission_id: str) -> None:
        if submission_id in self.jobs:
            raise RuntimeError("already exists")
        self.submitted.append(entrypoint)
        self.put(JobStatus.RUNNING)

    def delete_job(self, submission_id: str) -> None:
        assert self.jobs.pop(submission_id).status.is_terminal()

    def stop_job(self, submission_id: str) -> None:
        self.num_stops += 1
        self.put(JobStatus.STOPPED)

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        yield "a line\n"


def job(status: JobStatus, code: int | None) -> JobDetails:
    details: dict[str, Any] = {"type": JobType.SUBMISSION, "entrypoint": "x", "driver_exit_code": code}
    return JobDetails(submission_id=NAME, status=status, **details)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submission, "LOST_SECONDS", 0.1)


def run(server: FakeServer, stop: StopSignal | None = None) -> tuple[int, str]:
    said: list[str] = []
    return run_once(server, NAME, "make", stop or StopSignal(), said.append), "".join(said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ((JobStatus.SUCCEEDED, 0), 0),
        ((JobStatus.FAILED, 2), 2),
        ((JobStatus.FAILED, 3), 3),
        ((JobStatus.FAILED, 4), 4),
        ((JobStatus.FAILED, -9), 4),
        ((JobStatus.STOPPED, None), 4),
    ],
)
def test_a_new_run_is_submitted_followed_and_its_exit_code_handed_on(
    end: tuple[JobStatus, int | None], code: int
) -> None:
    server = FakeServer(None, end)
    assert run(server) == (code, "a line\n")
    assert server.submitted == ["make"]


@pytest.mark.parametrize(("status", "code"), [(JobStatus.SUCCEEDED, 0), (JobStatus.FAILED, 3)])
def test_a_run_that_has_ended_is_reported_and_not_made_again(status: JobStatus, code: int) -> None:
    server = FakeServer()
    server.put(status, code)
    found, said = run(server)
    assert found == code and "has ended before" in said and server.submitted == []


@pytest.mark.parametrize(("status", "code"), [(JobStatus.FAILED, 2), (JobStatus.FAILED, 4), (JobStatus.STOPPED, None)])
def test_a_run_that_was_stopped_is_resumed_under_its_name(status: JobStatus, code: int | None) -> None:
    server = FakeServer((JobStatus.SUCCEEDED, 0))
    server.put(status, code)
    assert run(server)[0] == 0
    assert server.submitted == ["make"]


def test_a_run_that_is_under_way_is_joined() -> None:
    server = FakeServer(None, (JobStatus.SUCCEEDED, 0))
    server.put(JobStatus.RUNNING)
    assert run(server)[0] == 0 and server.submitted == []


def test_a_run_that_another_submits_in_the_same_moment_is_joined() -> None:
    class Racing(FakeServer):
        def submit_job(self, *, entrypoint: str, submission_id: str) -> None:
            self.put(JobStatus.RUNNING)
            super().submit_job(entrypoint=entrypoint, submission_id=submission_id)

    server = Racing((JobStatus.SUCCEEDED, 0))
    assert run(server)[0] == 0 and server.submitted == []


def test_sigterm_stops_the_run_in_order() -> None:
    server, stop = FakeServer(None), StopSignal()
    stop.stop("SIGTERM")
    with pytest.raises(StoppedError, match="SIGTERM"):
        run(server, stop)
    assert server.num_stops == 1 and server.jobs[NAME].status == JobStatus.STOPPED


@pytest.mark.parametrize("what", ["away", "forgotten"])
def test_a_lost_head_can_be_resumed(what: str) -> None:
    class Lost(FakeServer):
        def submit_job(self, *, entrypoint: str, submission_id: str) -> None:
            super().submit_job(entrypoint=entrypoint, submission_id=submission_id)
            if what == "away":
                self.is_away = True
            else:
                self.jobs.clear()

    with pytest.raises(StoppedError, match="resumed"):
        run(Lost())


@contextmanager
def job_server(answer: int) -> Iterator[http.server.ThreadingHTTPServer]:
    """What Ray's own client speaks with: a version, and one job that is running; or a refusal."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"}
            running = [{"type": "SUBMISSION", "submission_id": NAME, "status": "RUNNING", "entrypoint": "x"}]
            self.send_response(answer)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(version if "version" in self.path else running).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("answer", [401, 503])
def test_a_server_that_refuses_is_a_sentence(answer: int) -> None:
    with job_server(answer) as server, pytest.raises(StoppedError, match="No job server answers"):
        submission.connect(f"http://127.0.0.1:{server.server_port}")


def test_a_head_that_goes_away_under_ray_s_own_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "LAST_LINES_SECONDS", 0.1)
    with job_server(200) as server:
        client = submission.connect(f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(StoppedError, match=r"does not answer; .* can be resumed"):
        run_once(client, NAME, "make", StopSignal(), lambda _: None)
    with job_server(200) as server:
        client = submission.connect(f"http://127.0.0.1:{server.server_port}")
        threading.Timer(0.3, server.shutdown).start()
        threading.Timer(0.4, server.server_close).start()
        with pytest.raises(StoppedError, match=r"does not answer any more; .* can be resumed"):
            run_once(client, NAME, "make", StopSignal(), lambda _: None)
