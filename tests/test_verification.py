"""Verdicts in this process and in killable workers: hangs, crashes, exceptions, order, threads."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from orpo_distill.errors import ConfigError, Interrupted
from orpo_distill.interrupt import signals_raise
from orpo_distill.records import FinishReason, Outcome, Problem, Trace, Verdict
from orpo_distill.verification import verify_all
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.number import Number

PROBLEM = Problem("p", "?", "1")


class Moody(Verifier):
    """Does what the trace says: hang, die, raise, print, lie, name modules; else it is right."""

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        match trace.text:
            case "hang":
                while True:
                    time.sleep(60)
            case "die":
                os._exit(7)
            case "exit":
                sys.exit(3)
            case "raise":
                raise KeyError("no such thing")
            case "print":
                print("noise")
            case "lie":
                return "correct"  # type: ignore[return-value]
            case "modules":
                return Verdict(trace.id, Outcome.CORRECT, str("torch" in sys.modules), "modules")
            case "where":
                return Verdict(trace.id, Outcome.CORRECT, str(os.getpid()), "process")
        return Verdict(trace.id, Outcome.CORRECT, trace.text, "fine")


class Inline(Moody):
    """The same in this process."""

    isolated = False


class Unready(Moody):
    """Cannot be prepared."""

    def prepare(self) -> None:
        raise ImportError("no module named magic")


def traces(*texts: str) -> list[tuple[Problem, Trace]]:
    return [(PROBLEM, Trace(f"t{index}", "p", "teacher", index, text)) for index, text in enumerate(texts)]


def test_a_hang_a_crash_and_an_exception_cost_one_verdict_each() -> None:
    texts = ("a", "hang", "b", "die", "exit", "c", "raise", "lie", "print", "d")
    found = list(verify_all(Moody(), traces(*texts), timeout=3.0))
    assert [verdict.trace_id for verdict in found] == [f"t{index}" for index in range(len(texts))]
    assert [verdict.answer for verdict in found] == ["a", None, "b", None, None, "c", None, None, "print", "d"]
    reasons = {text: verdict.reason for text, verdict in zip(texts, found, strict=True) if verdict.answer is None}
    assert reasons == {
        "hang": "the verifier took longer than 3 s",
        "die": "the verifier's process died (exit code 7)",
        "exit": "the verifier's process died (exit code 3)",
        "raise": "the verifier raised KeyError: 'no such thing'",
        "lie": "expected a Verdict(trace.id, Outcome, answer, reason) of the verifier, found 'correct'",
    }
    assert all(verdict.outcome is Outcome.FAILED for verdict in found if verdict.answer is None)


def test_several_workers_keep_the_order() -> None:
    texts = [f"{index}" if index % 7 else "die" for index in range(40)]
    found = list(verify_all(Moody(), traces(*texts), timeout=20.0, processes=3))
    assert [verdict.trace_id for verdict in found] == [f"t{index}" for index in range(40)]
    assert [verdict.answer for verdict in found] == [text if text != "die" else None for text in texts]


def test_works_outside_the_main_thread() -> None:
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.extend(verify_all(Moody(), traces("a", "hang", "b"), timeout=1.0)))
    thread.start()
    thread.join()
    assert [verdict.answer for verdict in found] == ["a", None, "b"]


def test_a_worker_is_another_process_and_does_not_import_torch() -> None:
    modules, process = verify_all(Moody(), traces("modules", "where"))
    assert modules.answer == "False"
    assert process.answer != str(os.getpid())


def test_inline_verifiers_run_here_and_their_exceptions_are_verdicts() -> None:
    here, raised, lied = verify_all(Inline(), traces("where", "raise", "lie"))
    assert here.answer == str(os.getpid())
    assert raised.reason == "the verifier raised KeyError: 'no such thing'"
    assert lied.outcome is Outcome.FAILED


@pytest.mark.parametrize("verifier", [Moody(), Inline()])
def test_a_trace_without_text_never_reaches_the_verifier(verifier: Verifier) -> None:
    trace = Trace("t", "p", "teacher", 0, "", FinishReason.ERROR, error="HTTP 500")
    (found,) = verify_all(verifier, [(PROBLEM, trace)])
    assert (found.outcome, found.reason) == (Outcome.FAILED, "HTTP 500")


def test_a_verifier_that_cannot_start_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="no module named magic"):
        list(verify_all(Unready(), traces("a")))


def test_stopping_early_ends_the_workers() -> None:
    endless = ((PROBLEM, Trace(f"t{index}", "p", "teacher", index, "where")) for index in iter(int, 1))
    verdicts = verify_all(Moody(), endless, processes=2)
    pids = {int(str(next(verdicts).answer)) for _ in range(10)}
    verdicts.close()  # type: ignore[attr-defined]
    assert not any(alive(pid) for pid in pids)


def test_items_are_taken_as_they_are_needed() -> None:
    taken = 0

    def items() -> Iterator[tuple[Problem, Trace]]:
        nonlocal taken
        for item in traces(*"abcdefghijklmnopqrstuvwxyz"):
            taken += 1
            yield item

    verdicts = verify_all(Moody(), items())
    next(verdicts)
    assert taken < 10
    verdicts.close()  # type: ignore[attr-defined]


def test_an_error_in_the_items_ends_the_workers_and_is_raised() -> None:
    def items() -> Iterator[tuple[Problem, Trace]]:
        yield from traces("a")
        raise ValueError("broken file")

    with pytest.raises(ValueError, match="broken file"):
        list(verify_all(Moody(), items()))


def test_number_is_judged_inline() -> None:
    (found,) = verify_all(Number(), traces("The answer is 1."))
    assert found.outcome is Outcome.CORRECT


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Signalled(Verifier):
    """Is interrupted while it judges, as by Ctrl-C."""

    isolated = False

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        os.kill(os.getpid(), signal.SIGTERM)
        return Verdict(trace.id, Outcome.CORRECT, None, "never reached")


def test_an_interruption_is_never_taken_for_a_verifiers_fault() -> None:
    with pytest.raises(Interrupted) as caught, signals_raise():
        list(verify_all(Signalled(), traces("a")))
    assert caught.value.exit_code == 128 + signal.SIGTERM
