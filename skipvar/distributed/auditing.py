"""The audit book of a run: opened with the run, brought up to date when it ends. No Ray in here."""

from skipvar.config import RunConfig
from skipvar.distributed.opening import OpenRun
from skipvar.quality.audit_book import AuditBook
from skipvar.shards.storage import open_storage

STATE = "_audit"
"""In the output, where the configuration names no other place."""


def open_audits(config: RunConfig, run: OpenRun) -> AuditBook | None:
    """The book with all that the run has published; None where no promise is audited.

    Raises `ConfigError` where the state is that of another promise.
    """
    promise = run.resolved.promise
    if promise is None:
        return None
    storage = open_storage(config.audit.state or f"{run.storage.uri}/{STATE}", config.storage)
    if config.audit.state is not None:
        storage.check_writable()
    parts = run.resolved.fingerprint_parts()
    subject = {"policy": parts["policy"], "model": parts["model"]}
    book = AuditBook(storage, promise, subject, run.dataset.fingerprint, run.plan.num_units)
    count_published(book, run)
    return book


def count_published(book: AuditBook, run: OpenRun) -> None:
    """Count all that is published and next in order."""
    book.catch_up(run.storage)
    book.count()
