"""Files and batches as OpenAI's API has them, in memory; a batch works through its rows in a settable time."""

from __future__ import annotations

import asyncio
import json
import random
import time
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from tests.servers.account import Account
from tests.servers.answers import messages_hash
from tests.servers.completions import Completions
from tests.servers.faults import Fault, error_reply
from tests.servers.http1 import Asked, Reply, json_reply

URLS = ("/v1/chat/completions", "/v1/completions")
STEPS = 20  # a batch's delay is cut into so many; rows are generated evenly over them
ENDED = ("failed", "completed", "expired", "cancelled")
EXPIRED = {"code": "batch_expired", "message": "This request could not be executed before the window expired."}
CANCELLED = {"code": "batch_cancelled", "message": "This request was not executed: the batch was cancelled."}


@dataclass
class Job:
    """A batch: the object that is shown, its rows, and its output so far."""

    shown: dict[str, Any]
    rows: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    done: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    cancel: bool = False
    listed_from: float = 0.0


class Batches:
    """Holds files and batches. Numbers in ids count up, so that two equal batches can be told apart."""

    def __init__(self, options: Namespace, completions: Completions, account: Account) -> None:
        self.options, self.completions, self.account = options, completions, account
        self.files: dict[str, tuple[dict[str, Any], bytes]] = {}
        self.jobs: dict[str, Job] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def answer(self, asked: Asked) -> Reply:
        """Answer a call under /v1/files or /v1/batches."""
        parts = asked.path.split("/")[2:]
        known = self.files if parts[0] == "files" else self.jobs
        if len(parts) > 1 and parts[1] not in known:
            return error_reply(404, f"No such {parts[0]} object: {parts[1]}", param="id")
        if parts[0] == "files":
            return self._files(asked, parts[1:])
        if asked.method == "POST":
            return self._cancel(parts[1]) if parts[2:] == ["cancel"] else self._create(asked)
        if len(parts) == 2:
            return json_reply(self.jobs[parts[1]].shown)
        shown = [job.shown for job in reversed(self.jobs.values()) if time.monotonic() >= job.listed_from]
        return self._page(asked, shown)

    def _page(self, asked: Asked, items: list[dict[str, Any]]) -> Reply:
        """Newest first, `limit` of them after the one with the id `after`."""
        query = {name: values[-1] for name, values in parse_qs(asked.query).items()}
        ids = [item["id"] for item in items]
        start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
        page = items[start : start + min(int(query.get("limit", 20)), self.options.batch_page)]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return json_reply({"object": "list", "data": page, **ends, "has_more": start + len(page) < len(items)})

    def _files(self, asked: Asked, parts: list[str]) -> Reply:
        if asked.method == "POST":
            return self._upload(asked)
        if not parts:
            return self._page(asked, [shown for shown, _ in reversed(self.files.values())])
        shown, content = self.files[parts[0]]
        if asked.method == "DELETE":
            del self.files[parts[0]]
            return json_reply({"id": parts[0], "object": "file", "deleted": True})
        if parts[1:] == ["content"]:
            return Reply(body=content, kind="application/octet-stream")
        return json_reply(shown)

    def _upload(self, asked: Asked) -> Reply:
        fields = multipart(asked.headers.get("content-type", ""), asked.body)
        if "file" not in fields or "purpose" not in fields:
            return error_reply(400, "expected the fields 'file' and 'purpose'")
        name, content = fields["file"]
        return json_reply(self._keep(content, name, fields["purpose"][1].decode()))

    def _keep(self, content: bytes, name: str, purpose: str) -> dict[str, Any]:
        number = f"file-{len(self.files) + 1:06d}-{self.account.requests}"
        shown = {"id": number, "object": "file", "bytes": len(content), "created_at": int(time.time())}
        shown |= {"filename": name, "purpose": purpose, "status": "processed"}
        self.files[number] = (shown, content)
        return shown

    def _create(self, asked: Asked) -> Reply:
        body = json.loads(asked.body)
        file, url = body.get("input_file_id"), body.get("endpoint")
        if file not in self.files:
            return error_reply(400, f"No such File object: {file}", param="input_file_id")
        if url not in URLS or body.get("completion_window") != "24h":
            return error_reply(400, "expected an endpoint that generates and a completion_window of 24h")
        rows, errors = read_rows(self.files[file][1], url)
        shown = {"id": f"batch_{len(self.jobs) + 1:06d}", "object": "batch", "endpoint": url, "errors": None}
        shown |= {"input_file_id": file, "completion_window": "24h", "status": "validating"}
        shown |= {"output_file_id": None, "error_file_id": None, "created_at": int(time.time())}
        shown |= {"expires_at": int(time.time()) + 86_400, "metadata": body.get("metadata")}
        shown |= {"request_counts": {"total": 0, "completed": 0, "failed": 0}}
        job = Job(shown, rows, errors, listed_from=time.monotonic() + self.options.batch_hidden)
        self.jobs[shown["id"]] = job
        task = asyncio.get_running_loop().create_task(self._work(job))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return json_reply(shown)

    def _cancel(self, number: str) -> Reply:
        job = self.jobs[number]
        if job.shown["status"] not in ENDED:
            job.cancel = True
            job.shown |= {"status": "cancelling", "cancelling_at": int(time.time())}
        return json_reply(job.shown)

    async def _work(self, job: Job) -> None:
        step = self.options.batch_delay / STEPS
        await asyncio.sleep(step)
        if job.errors:
            self._end(job, "failed", errors={"object": "list", "data": job.errors})
            return
        job.shown["request_counts"]["total"] = len(job.rows)
        if not job.cancel:
            job.shown |= {"status": "in_progress", "in_progress_at": int(time.time())}
        last = round(len(job.rows) * self.options.batch_expire) if self.options.batch_expire else len(job.rows)
        for number in range(1, STEPS):
            await asyncio.sleep(step)
            if job.cancel:
                break
            await self._rows(job, last * number // (STEPS - 1))
        ended = "cancelled" if job.cancel else "expired" if self.options.batch_expire else "completed"
        why = CANCELLED if job.cancel else EXPIRED
        for row in job.rows[len(job.done) + len(job.failed) :]:
            job.failed.append(self._line(row["custom_id"], None, why))
        self._end(job, ended)

    async def _rows(self, job: Job, upto: int) -> None:
        for at in range(len(job.done) + len(job.failed), upto):
            self._row(job, job.rows[at], random.Random(f"{self.options.seed}-{job.shown['id']}-{at}"))
            if at % 100 == 99:
                await asyncio.sleep(0)
        job.shown["request_counts"] |= {"completed": len(job.done), "failed": len(job.failed)}

    def _row(self, job: Job, row: dict[str, Any], draw: random.Random) -> None:
        chat, body = row["url"].endswith("chat/completions"), row["body"]
        refused = self.completions.refuse(body, chat)
        if not refused and draw.random() < self.options.batch_fail:
            refused = error_reply(500, "The server had an error while processing your request.")
        if refused:
            response = {"status_code": refused.status, "request_id": "", "body": json.loads(refused.body)}
            job.failed.append(self._line(row["custom_id"], response, None))
            return
        made = self.completions.make(body, chat, Fault())
        self.account.charge(made.count, batch=True)
        line = {"batch": job.shown["id"], "custom_id": row["custom_id"], "fault": "", "status": 200}
        line |= {"messages": messages_hash(body["messages" if chat else "prompt"]), "n": body.get("n") or 1}
        line |= {"seed": body.get("seed"), **made.count.as_dict(), "texts": made.texts, "usage": made.response["usage"]}
        self.account.write(line)
        response = {"status_code": 200, "request_id": f"req_{row['custom_id']}", "body": made.response}
        job.done.append(self._line(row["custom_id"], response, None))

    def _line(self, custom: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> dict[str, Any]:
        return {"id": f"batch_req_{messages_hash(custom)}", "custom_id": custom, "response": response, "error": error}

    def _odd(self, lines: list[Any]) -> list[Any]:
        """With --batch-odd: also rows of nobody's, one twice, and one whose status is text."""
        if not self.options.batch_odd:
            return lines
        one, other = lines[0], lines[-1]
        stranger = {**one, "custom_id": "not-yours"}
        if other["response"]:
            other = {**other, "response": {**other["response"], "status_code": "200"}}
        return [None, 7, [one], {}, {"custom_id": 3}, stranger, {**one, "custom_id": None}, *lines[:-1], other, one]

    def _end(self, job: Job, status: str, errors: dict[str, Any] | None = None) -> None:
        draw = random.Random(job.shown["id"])
        for name, lines in (("output_file_id", job.done), ("error_file_id", job.failed)):
            if lines:
                draw.shuffle(lines)  # no order is promised
                content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._odd(lines))
                job.shown[name] = self._keep(content.encode(), f"{job.shown['id']}.jsonl", "batch_output")["id"]
        job.shown["request_counts"] |= {"completed": len(job.done), "failed": len(job.failed)}
        job.shown |= {"status": status, "errors": errors, f"{status}_at": int(time.time())}


def read_rows(content: bytes, url: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A batch's rows, and what is wrong with its file: no JSON, another endpoint, a `custom_id` used twice."""
    rows: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
            problem = "" if row["url"] == url and row["method"] == "POST" else "mismatched_endpoint"
            problem = problem or ("duplicate_custom_id" if row["custom_id"] in seen else "")
            problem = problem or ("" if isinstance(row["body"], dict) else "invalid_request")
            seen.add(row["custom_id"])
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            problem = "invalid_json_line"
        if problem:
            errors.append({"code": problem, "line": number, "message": problem.replace("_", " "), "param": None})
    if not content.strip():
        errors.append({"code": "empty_file", "line": None, "message": "the file is empty", "param": None})
    return rows, errors


def multipart(content_type: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """The fields of a form: name -> (file name or "", content)."""
    boundary = content_type.partition("boundary=")[2].strip('"').encode()
    found = {}
    for part in body.split(b"--" + boundary)[1:-1] if boundary else ():
        head, _, content = part.partition(b"\r\n\r\n")
        values = {}
        for piece in head.decode().replace("\r\n", ";").split(";"):
            name, _, value = piece.strip().partition("=")
            values[name] = value.strip('"')
        found[values.get("name", "")] = (values.get("filename", ""), content.removesuffix(b"\r\n"))
    return found
