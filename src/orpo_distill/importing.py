"""Import: texts that a user already owns become traces of a run, and the next `run` samples only what is missing.

They are appended to `traces.partial-import.jsonl` in the stage's folder, where sampling finds them as if it had sampled
them itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from orpo_distill import interrupt
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, DataError, RunError
from orpo_distill.execution import refuse_stale, state
from orpo_distill.experiment import run
from orpo_distill.forms import Form, Side, Text, read_texts
from orpo_distill.plan import plan, select
from orpo_distill.progress import say
from orpo_distill.records import (
    FinishReason,
    JsonlAppender,
    Message,
    Problem,
    Trace,
    read_jsonl,
    repair_torn_line,
    stable_hash,
)
from orpo_distill.runs import Asked, RunFolder, Stage, disk_errors_explained, flat_options
from orpo_distill.samplers import Completion, Request
from orpo_distill.samplers.prompts import plain_prompt
from orpo_distill.sampling import prompt_id_of, trace_of, with_prefix
from orpo_distill.stages.sample import SampleOptions

PARTIAL = "traces.partial-import.jsonl"

# Why a text is skipped.
UNKNOWN, OTHER, FAILED, EMPTY = "of no train problem of this run", "by another policy", "failed", "empty"
MALFORMED = "malformed"
THERE, REPEATED = "there already", "repeated in other pairs"


def import_texts(
    config: Config, files: Sequence[Path], policy: str, form: Form | None = None, redo: Sequence[str] = ()
) -> str:
    """Put the texts of `files` into a run as traces of `policy` (teacher or student-0). Returns in words what was done.

    Brings the stage `problems` up to date first. A text becomes the sample it was asked for, or else the first one that
    its problem lacks; what comes after `samples` is kept until that is raised. Equal texts of a problem are skipped as
    often as the stage has them already, so that importing a file twice adds nothing; malformed rows are skipped and
    counted. A sample that failed is one that its problem lacks. Before anything is written, raises DataError if no row
    belongs to a train problem, RunError if the stage is stale, or finished without failures (naming it in `redo` sets
    the old one aside), ConfigError for a policy that is not sampled.
    """
    stages = plan(config)
    stage, options = _stage(stages, policy)
    folder = RunFolder(config.run_dir)
    if missing := [str(path) for path in files if not path.is_file()]:
        raise DataError(f"expected files of texts, found none at {', '.join(missing)}; check the paths")
    _refuse_stale(select(stages, policy), folder, redo)
    run(config, "problems", [pattern for pattern in redo if fnmatch("problems", pattern)])
    replaced = any(fnmatch(policy, pattern) for pattern in redo)
    with disk_errors_explained(folder.path), folder.lock():
        if not replaced:
            _refuse_finished(stage, folder)
        importer = _Importer(options, form, read_jsonl(folder.of("problems") / "problems.jsonl", Problem))
        importer.check(files)
        if replaced and (old := folder.supersede(policy)):
            say(f"{policy}: the old traces are kept in {old}")
        _begin(stage, folder)
        (folder.of(policy) / "manifest.json").unlink(missing_ok=True)  # one with failed samples goes on
        return importer.write(files, folder.of(policy))


def _stage(stages: Sequence[Stage], policy: str) -> tuple[Stage, SampleOptions]:
    """The stage that samples a policy on every train problem."""
    found = {
        stage.name: (stage, stage.options)
        for stage in stages
        if isinstance(stage.options, SampleOptions) and not stage.options.round
    }
    if policy not in found:
        raise ConfigError(f"expected --policy to be {' or '.join(found)} in this experiment, found {policy!r}")
    return found[policy]


def _refuse_stale(stages: Sequence[Stage], folder: RunFolder, redo: Sequence[str]) -> None:
    try:
        refuse_stale(stages, folder, redo)
    except RunError as error:
        raise RunError(f"{error}\n(`import` takes --redo too; --keep is an option of `run`)") from error


def _refuse_finished(stage: Stage, folder: RunFolder) -> None:
    if state(stage, folder) == "finished" and not _has_failed(folder.of(stage.name)):
        role = stage.name.partition("-")[0]
        raise RunError(
            f"expected that {folder.of(stage.name)} lacks traces, found it finished; raise {role}.samples to add more, "
            f"or add --redo {stage.name} to begin anew with these texts (the old ones are kept in superseded/)"
        )


def _has_failed(out: Path) -> bool:
    return any(trace.finish_reason is FinishReason.ERROR for trace in read_jsonl(out / "traces.jsonl", Trace))


def _begin(stage: Stage, folder: RunFolder) -> None:
    """Note what the stage is asked for, as its start does, so that `run` goes on with it or says what changed."""
    if folder.asked(stage.name) is None:
        manifests = {name: folder.manifest(source) for name, source in stage.inputs.items()}
        contents = {name: manifest.content for name, manifest in manifests.items() if manifest}
        folder.write_asked(stage.name, Asked(stage.work, flat_options(stage), contents))


@dataclass
class _Samples:
    """What one problem has: which samples, and how often each text."""

    messages: tuple[Message, ...]
    taken: set[int] = field(default_factory=set)
    texts: Counter[str] = field(default_factory=Counter)  # by digest
    free: int = 0  # no sample before this one is free

    def place(self, wanted: int | None, samples: int) -> int:
        """Where the next text goes: to `wanted` if that is one of the `samples` and free, or to the first free one."""
        if wanted is None or not 0 <= wanted < samples or wanted in self.taken:
            while self.free in self.taken:
                self.free += 1
            wanted = self.free
        self.taken.add(wanted)
        return wanted


class _Importer:
    """Finds the problems of texts, and writes those that are new."""

    def __init__(self, options: SampleOptions, form: Form | None, problems: Iterable[Problem]) -> None:
        self._options, self._form = options, form
        self._side: Side = "chosen" if options.policy == "teacher" else "rejected"
        self._samples: dict[str, _Samples] = {}
        self._by_prompt: dict[object, str] = {}  # messages or a text -> problem; "" where it stands for several
        questions: dict[object, str] = {}
        for problem in problems:
            messages = options.task.messages(problem)
            asked = with_prefix(messages, options.prefix)
            self._samples[problem.id] = _Samples(asked)
            for prompt in dict.fromkeys((messages, asked)):
                for key in dict.fromkeys((prompt, plain_prompt(prompt).strip(), _last_said(prompt))):
                    _note(self._by_prompt, key, problem.id)
            _note(questions, problem.question.strip(), problem.id)
        self._by_prompt = questions | self._by_prompt
        self._skipped: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # reason -> the first text that was skipped for it
        self._imported: Counter[str] = Counter()  # by problem
        self._later = 0  # imported as samples that are not asked for yet

    def check(self, files: Sequence[Path]) -> None:
        """Read everything once. Raises DataError if no text could be imported."""
        matched = sum(1 for path in files for _ in self._usable(path))
        if not matched:
            raise DataError(
                f"expected texts of this run's train problems in {', '.join(map(str, files))}, found none: "
                f"{self._reasons()}; name problems by their ids in problems/problems.jsonl, or give the prompts that "
                "`orpo-distill check --show` prints"
            )
        self._skipped.clear()

    def write(self, files: Sequence[Path], out: Path) -> str:
        """Append what is new to the stage's folder. Returns what was done, in words."""
        self._read_standing(out)
        with JsonlAppender(out / PARTIAL) as traces:
            for path in files:
                self._write_file(path, traces)
        parts = [f"imported {self._imported.total()} texts for {len(self._imported)} problems into {out}"]
        if self._later:
            role = self._options.policy.partition("-")[0]
            parts.append(f"{self._later} of them are kept for when {role}.samples ({self._options.samples}) is raised")
        if self._skipped:
            parts.append(f"skipped {self._skipped.total()}: {self._reasons()}")
        return "; ".join(parts)

    def _write_file(self, path: Path, traces: JsonlAppender) -> None:
        found: Counter[tuple[str, str]] = Counter()  # this file's texts by problem
        for name, text in self._usable(path):
            interrupt.check()
            samples, words = self._samples[name], _digest(text.text)
            found[name, words] += 1
            if text.paired and found[name, words] > 1:
                self._skip(REPEATED, text)
            elif found[name, words] <= samples.texts[words]:
                self._skip(THERE, text)
            else:
                index = samples.place(text.index, self._options.samples)
                traces.append(self._made(name, index, text))
                self._imported[name] += 1
                self._later += index >= self._options.samples
        for (name, words), times in found.items():
            texts = self._samples[name].texts
            texts[words] = max(texts[words], times)

    def _made(self, name: str, index: int, text: Text) -> Trace:
        """The trace that sampling this text would have made."""
        request = Request(name, index, self._samples[name].messages, seed=0)
        tokens = text.prompt_tokens, text.completion_tokens
        return trace_of(Completion(request, text.text, text.finish_reason, *tokens), self._options.policy)

    def _usable(self, path: Path) -> Iterator[tuple[str, Text]]:
        """A file's texts that are somebody's, with their problems; the others are counted."""
        for text in read_texts(path, self._form, self._side, self._skip_row):
            name = self._problem(text)
            if text.policy not in ("", self._options.policy):
                self._skip(OTHER, text)
            elif not name:
                self._skip(UNKNOWN, text)
            elif text.finish_reason is FinishReason.ERROR:
                self._skip(FAILED, text)
            elif not text.text.strip():
                self._skip(EMPTY, text)
            else:
                yield name, text

    def _problem(self, text: Text) -> str:
        """The id of the problem that a text answers, "" for none of the run's."""
        if text.problem_id in self._samples:
            return text.problem_id
        prompt = text.prompt
        keys = [prompt.strip()] if isinstance(prompt, str) else [prompt, _last_said(prompt)]
        return next((self._by_prompt[key] for key in keys if self._by_prompt.get(key)), "")

    def _read_standing(self, out: Path) -> None:
        """Take note of the traces of the stage's folder that answer the prompts of now, but for those that failed."""
        ids = {name: prompt_id_of(samples.messages) for name, samples in self._samples.items()}
        partials = sorted(out.glob("traces.partial*.jsonl"))
        for path in partials:
            repair_torn_line(path)
        for path in (out / "traces.jsonl", *partials, out / "traces.spare.jsonl"):
            for trace in read_jsonl(path, Trace) if path.exists() else ():
                if trace.finish_reason is FinishReason.ERROR:
                    continue
                samples = self._samples.get(trace.problem_id)
                if samples and trace.prompt_id == ids[trace.problem_id] and trace.sample_index not in samples.taken:
                    samples.taken.add(trace.sample_index)
                    samples.texts[_digest(trace.text)] += 1

    def _skip(self, reason: str, text: Text) -> None:
        self._skipped[reason] += 1
        prompt = text.prompt if isinstance(text.prompt, str) else _last_said(text.prompt)
        found = {OTHER: text.policy, UNKNOWN: text.problem_id or prompt[:60]}.get(reason)
        self._first.setdefault(reason, f"{found!r} at {text.where}" if found is not None else text.where)

    def _skip_row(self, error: DataError) -> None:
        self._skipped[MALFORMED] += 1
        self._first.setdefault(MALFORMED, str(error))

    def _reasons(self) -> str:
        return ", ".join(f"{number} {why} (the first: {self._first[why]})" for why, number in self._skipped.items())


def _note(table: dict[object, str], key: object, problem_id: str) -> None:
    """Let `key` stand for a problem; for none if it stands for another one already."""
    table[key] = problem_id if table.get(key, problem_id) == problem_id else ""


def _last_said(messages: Sequence[Message]) -> str:
    """The last message of a user, "" where there is none."""
    return next((message.content.strip() for message in reversed(messages) if message.role == "user"), "")


def _digest(text: str) -> str:
    """What equal texts share. Text that UTF-8 cannot hold counts as it stands in a trace."""
    return stable_hash(text.encode(errors="replace").decode())[:16]
