"""A run submitted under a name of its own, once, and waited for: what the pod of a night does."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

import aiohttp
import ray.job_submission as jobs
from ray.exceptions import RayError

from skipvar.distributed.stopping import StopSignal
from skipvar.errors import EXIT_ALL_ROWS, EXIT_ERROR_ROWS, EXIT_STOPPED, EXIT_USAGE, StoppedError, first_line

POLL_SECONDS = 2.0
LOST_SECONDS = 120.0
"""The head may be away for so long before the run counts as gone with it."""
AWAY = (OSError, RuntimeError, RayError)
"""What Ray's client raises where the head is gone, busy or refuses: its errors, and those of `requests` (`OSError`)."""
LAST_LINES_SECONDS = 10.0
STOP_SECONDS = 140.0
"""How long a stopped run may take to end: more than the cluster's RAY_JOB_STOP_WAIT_TIME_S."""


def connect(address: str) -> jobs.JobSubmissionClient:
    """The job server at `address` (http://host:port); `RAY_AUTH_MODE` and `RAY_AUTH_TOKEN` are respected.

    Raises `StoppedError` where none answers: it may be starting, and another try is worth it.
    """
    try:
        return jobs.JobSubmissionClient(address)
    except AWAY as error:
        raise StoppedError(f"No job server answers at {address}: {first_line(error)}") from error


def run_once(
    client: jobs.JobSubmissionClient, submission_id: str, entrypoint: str, stop: StopSignal, say: Callable[[str], None]
) -> int:
    """Submit `entrypoint` as `submission_id` unless that is there already, follow it to its end, return its exit code.

    A run that is under way is joined, one that ended well (0, or 3: rows in the error table) is reported, any other is
    submitted again under the same name and so resumes. `say` gets what the run prints. `stop` stops the run as well, in
    order. Raises `StoppedError` when the cluster is lost or `stop` asks.
    """
    try:
        found = find(client, submission_id)
        if found is not None and found.status.is_terminal():
            code = exit_code(found)
            if code in (EXIT_ALL_ROWS, EXIT_ERROR_ROWS):
                say(f"{submission_id} has ended before, with exit code {code}\n")
                return code
            say(f"{submission_id} was stopped or failed before (exit code {code}): submitted again\n")
            client.delete_job(submission_id)
            found = None
        if found is None:
            _submit(client, submission_id, entrypoint)
    except AWAY as error:
        why = first_line(error)
        raise StoppedError(f"The cluster does not answer; {submission_id} can be resumed: {why}") from error
    follower = threading.Thread(target=_follow, args=(client, submission_id, say), name="follow", daemon=True)
    follower.start()
    try:
        job = _wait(client, submission_id, stop.sleep)
        follower.join(LAST_LINES_SECONDS)
        return exit_code(job)
    except StoppedError:
        with contextlib.suppress(*AWAY):
            client.stop_job(submission_id)
            _wait(client, submission_id, time.sleep, STOP_SECONDS)
        raise


def find(client: jobs.JobSubmissionClient, submission_id: str) -> jobs.JobDetails | None:
    return next((job for job in client.list_jobs() if job.submission_id == submission_id), None)


def exit_code(job: jobs.JobDetails) -> int:
    """The run's own exit code; 4 where it was stopped or left none."""
    if job.status == jobs.JobStatus.SUCCEEDED:
        return EXIT_ALL_ROWS
    return job.driver_exit_code if job.driver_exit_code in (EXIT_USAGE, EXIT_ERROR_ROWS) else EXIT_STOPPED


def _submit(client: jobs.JobSubmissionClient, submission_id: str, entrypoint: str) -> None:
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=submission_id)
    except AWAY as error:
        if find(client, submission_id) is None:  # else another submitter was faster: join its run
            raise StoppedError(f"{submission_id} was not taken: {first_line(error)}") from error


def _wait(
    client: jobs.JobSubmissionClient, submission_id: str, sleep: Callable[[float], None], seconds: float | None = None
) -> jobs.JobDetails:
    """The job, once it has ended; `seconds` bounds the wait."""
    started = answered = time.monotonic()
    while True:
        try:
            job = find(client, submission_id)
            answered = time.monotonic()
        except AWAY as error:
            if time.monotonic() - answered > LOST_SECONDS:
                raise StoppedError(f"The cluster does not answer any more; {submission_id} can be resumed.") from error
        else:
            if job is None:
                raise StoppedError(f"The cluster has forgotten {submission_id}: its head was lost; it can be resumed.")
            if job.status.is_terminal():
                return job
        if seconds is not None and time.monotonic() - started > seconds:
            raise StoppedError(f"{submission_id} did not end within {seconds:g} seconds.")
        sleep(POLL_SECONDS)


def _follow(client: jobs.JobSubmissionClient, submission_id: str, say: Callable[[str], None]) -> None:
    async def follow() -> None:
        async for text in client.tail_job_logs(submission_id):
            say(text)

    with contextlib.suppress(*AWAY, aiohttp.ClientError):  # the log is a service, not the run
        asyncio.run(follow())
