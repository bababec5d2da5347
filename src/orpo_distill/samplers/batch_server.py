"""A server's batch endpoint: files up, a batch made, looked at and found again, files down; every call insisted on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from orpo_distill.errors import ModelError
from orpo_distill.progress import say
from orpo_distill.samplers.faults import NAME_PATIENCE, Fault, Refused, fault_of

if TYPE_CHECKING:
    from openai import OpenAI as Client

    from orpo_distill.samplers.openai import OpenAI

LISTED = 2_000  # of the server's batches that are looked through, newest first
NAME = "orpo-distill"  # the batch's metadata field that holds its name in the ledger
ENDED = ("completed", "failed", "expired", "cancelled")
SILENT, SAID_EVERY = 10.0, 60.0  # seconds of failures before the first word about them, and between words


class Gone(ModelError):
    """The server does not know what it is asked about."""

    def __init__(self) -> None:
        super().__init__(
            "expected a server with a batch endpoint, found HTTP 404; set sampler.batch: false, or check base_url"
        )


class BatchServer:
    """The first of the sampler's addresses. Methods raise ModelError for what cannot be had within `patience`."""

    def __init__(self, options: OpenAI) -> None:
        self._options = options
        self._client = _client(options, *options.secrets())
        self._secrets = options.secret_values

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def create(self, name: str, content: bytes, about_to: Callable[[], None]) -> str | None:
        """The server's name for a new batch; None where it may have been made unseen.

        `about_to` is called when the content is there, right before the batch is made of it.
        """
        file = self._ask(lambda: _id(self._client.files.create(file=(f"{name}.jsonl", content), purpose="batch")))
        about_to()
        found: str | None = self._ask(
            lambda: _id(
                self._client.batches.create(
                    input_file_id=file,
                    endpoint=self._options.path,  # type: ignore[arg-type]
                    completion_window="24h",
                    metadata={NAME: name},
                )
            ),
            again=False,  # the server's list of batches will tell
        )
        return found

    def ended(self, remote: str) -> Any:
        """A batch once it has ended; None if the server does not know it."""
        while True:
            try:
                batch = self._ask(lambda: _known(self._client.batches.retrieve(remote)))
            except Gone:
                return None
            say(f"  batch {remote}: {batch.status}, {_progress(batch)}")
            if batch.status in ENDED:
                return batch
            time.sleep(self._options.batch_poll)

    def ended_already(self, remote: str) -> Any:
        """A batch that has ended; None for one that has not, or if the server does not say so at once."""
        try:
            batch = self._ask(lambda: _known(self._client.batches.retrieve(remote)), patience=0.0)
        except ModelError:
            return None
        return batch if batch.status in ENDED else None

    def rows(self, file: str, least: int) -> list[dict[str, Any]]:
        """The rows of a file that are objects, once it has as many rows as there must be."""
        found: list[dict[str, Any]] = self._ask(partial(self._rows, file, least))
        return found

    def found_again(self, name: str) -> str | None:
        """A batch whose creation was not answered, among the server's: looked for until patience ends."""
        end = time.monotonic() + self._options.patience
        while True:
            found: str | None = self._ask(partial(self._named, name))
            if found or time.monotonic() > end:
                return found or None
            time.sleep(self._options.batch_poll)

    def unusable(self, found: str) -> ModelError:
        """The error for a server that takes no batches."""
        return self._options.unusable(found, "take a batch")

    def _rows(self, file: str, least: int) -> list[dict[str, Any]]:
        """Raises ValueError for a file that is not whole. A line that is no JSON counts as a row, but is none."""
        content: bytes = self._client.files.content(file).content
        rows = [_object(line) for line in content.splitlines() if line.strip()]
        if len(rows) < least or (rows and rows[-1] is None and not content.endswith(b"\n")):
            raise ValueError(f"{len(rows)} rows of {least}")
        return [row for row in rows if row is not None]

    def _named(self, name: str) -> str:
        """The server's name for a batch, "" if it lists none of ours."""
        for place, batch in enumerate(self._client.batches.list(limit=100)):
            metadata = batch.metadata if isinstance(batch.metadata, Mapping) else {}
            if metadata.get(NAME) == name:
                return _id(batch)
            if place >= LISTED:
                break
        return ""

    def _ask(self, call: Callable[[], Any], again: bool = True, patience: float | None = None) -> Any:
        """What a call to the server gives, tried until patience ends; None where it may not be made `again`."""
        started, failures, said = time.monotonic(), 0, float("-inf")
        patience = self._options.patience if patience is None else patience
        while True:
            try:
                return call()
            except Exception as error:
                fault = fault_of(error, self._secrets)
                if fault is None and isinstance(error, ValueError | AttributeError | TypeError):
                    fault = Fault(f"a malformed answer ({error})", paid=True)  # the client takes anything for one
                if fault is None:
                    raise
            if not again and fault.paid:
                return None
            waited = time.monotonic() - started
            self._stop_at(fault, waited, patience)
            if waited > SILENT and time.monotonic() - said > SAID_EVERY:
                said = time.monotonic()
                say(f"  no answer of {self._options.urls[0]} for {waited:.0f} s, the last: {fault}")
            failures += 1
            time.sleep(fault.pause if fault.pause is not None else min(60.0, 2.0**failures))

    def _stop_at(self, fault: Fault, waited: float, patience: float) -> None:
        if isinstance(fault, Refused) and str(fault).startswith("HTTP 404"):
            raise Gone from None
        if isinstance(fault, Refused) or waited >= (min(patience, NAME_PATIENCE) if fault.nowhere else patience):
            raise self.unusable(str(fault)) from None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _id(made: Any) -> str:
    """What the server calls what it made. Raises ValueError if it does not tell."""
    if not isinstance(made.id, str):
        raise ValueError(f"id {made.id!r}")
    return made.id


def _known(batch: Any) -> Any:
    """A batch whose status the server tells. Raises ValueError if it does not."""
    if not isinstance(batch.status, str):
        raise ValueError(f"status {batch.status!r}")
    return batch


def _progress(batch: Any) -> str:
    counts = batch.request_counts
    return f"{counts.completed} of {counts.total} done, {counts.failed} failed" if counts else "no counts"


def _client(options: OpenAI, key: str, headers: dict[str, str]) -> Client:
    from openai import DefaultHttpxClient
    from openai import OpenAI as Client

    return Client(
        api_key=key or "none",
        base_url=options.urls[0],
        timeout=options.timeout,
        max_retries=0,
        default_headers=headers,
        http_client=DefaultHttpxClient(follow_redirects=False),  # headers hold keys
    )
