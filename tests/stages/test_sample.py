"""The sample stage."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from orpo_distill.component import Options
from orpo_distill.mixing import latest_share
from orpo_distill.records import FinishReason, Message, Problem, Trace, derive_seed, read_jsonl, write_jsonl
from orpo_distill.samplers import Completion, Decoding, Generate, Request, Sampler
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.prompts import encode_prompt
from orpo_distill.samplers.scripted import Reply, Scripted
from orpo_distill.stages.sample import SampleOptions, StopRule, sample
from orpo_distill.tasks import Task
from orpo_distill.verifiers import Verifier
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint

PROBLEMS = [Problem(f"p{number}", f"What is {number}?", str(number)) for number in range(20)]


class Plain(Task):
    """The question and nothing else."""

    def load(self, split: str) -> list[Problem]:
        return PROBLEMS

    def messages(self, problem: Problem) -> tuple[Message, ...]:
        return (Message("user", problem.question),)

    def judge(self) -> Verifier:
        return Verifier.model_validate("exact")


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    folder = tmp_path / "problems"
    folder.mkdir()
    write_jsonl(folder / "problems.jsonl", PROBLEMS)
    return folder


def options(**changes: object) -> SampleOptions:
    base = {
        "task": Plain(),
        "sampler": Scripted(default=("one two", Reply(text="cut", finish_reason="length"))),
        "model": "any",
        "decoding": Decoding(),
        "samples": 3,
        "policy": "teacher",
        "seed": 0,
    }
    return SampleOptions(**{**base, **changes})


def folder(tmp_path: Path, name: str) -> Path:
    out = tmp_path / name
    out.mkdir()
    return out


def test_k_traces_a_problem_and_their_counts(tmp_path: Path, problems: Path) -> None:
    """Replies of 2, 1 and 2 words; questions of 3 words."""
    out = folder(tmp_path, "teacher")
    metrics = sample(options(), {"problems": problems}, out)
    assert metrics == {
        "problems": 20,
        "traces": 60,
        "finish_reasons": {"stop": 40, "length": 20, "error": 0},
        "prompt_tokens": 180,
        "completion_tokens": 100,
        "mean_completion_tokens": 100 / 60,
    }
    assert len(list(read_jsonl(out / "traces.jsonl", Trace))) == 60


def test_nothing_goes_to_stdout(tmp_path: Path, problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(options(), {"problems": problems}, folder(tmp_path, "out"))
    assert capsys.readouterr().out == ""


def test_a_later_round_samples_what_the_coin_gives(tmp_path: Path, problems: Path) -> None:
    out = folder(tmp_path, "student")
    sample(options(policy="student-1", round=2, phi=0.5, phi_unit="trace"), {"problems": problems}, out)
    found = [(trace.problem_id, trace.sample_index) for trace in read_jsonl(out / "traces.jsonl", Trace)]
    shares = {problem.id: latest_share(0.5, "trace", 0, 2, problem.id, 3) for problem in PROBLEMS}
    assert found == [(name, index) for name, share in shares.items() for index in range(share)]
    assert 0 < len(found) < 60


def test_no_problem_may_fall_to_the_latest_student(tmp_path: Path, problems: Path) -> None:
    out = folder(tmp_path, "student")
    metrics = sample(options(round=2, phi=0.0), {"problems": problems}, out)
    assert (metrics["traces"], metrics["mean_completion_tokens"]) == (0, None)
    assert (out / "traces.jsonl").read_bytes() == b""


def test_shards_leave_the_result_to_the_last_call(tmp_path: Path, problems: Path) -> None:
    whole, split = folder(tmp_path, "whole"), folder(tmp_path, "split")
    sample(options(), {"problems": problems}, whole)
    for index in range(2):
        assert sample(options(shard=(index, 2)), {"problems": problems}, split) == {}
    metrics = sample(options(), {"problems": problems}, split)
    assert metrics["traces"] == 60
    assert (split / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()


def test_the_trained_model_its_template_the_prefix_and_the_seeds_reach_the_sampler(
    tmp_path: Path, problems: Path
) -> None:
    """The same texts as the engine gives for the prompt and the seeds that the stage should have made."""
    trained = save_tiny_checkpoint(tmp_path / "train" / "model", chat_template=CHAT_TEMPLATE).parent
    asked = options(
        sampler=HF(),
        model=None,
        decoding=Decoding(temperature=1, max_new_tokens=8),
        prefix="Think.",
        policy="student-1",
    )
    out = folder(tmp_path, "student")
    sample(asked, {"problems": problems, "model": trained}, out)
    found = list(read_jsonl(out / "traces.jsonl", Trace))
    assert len({trace.text for trace in found}) > 50

    from orpo_distill.samplers.decode import Job, Rules, decode

    with HF().open(str(trained / "model")) as engine:
        prompt = tuple(encode_prompt(engine.tokenizer, (Message("user", "Think.\n\nWhat is 4?"),)))
        job = Job(0, prompt, derive_seed(0, "student-1", "p4", 2), 8)
        (drawn,) = decode(engine.model, [job], Rules(asked.decoding, engine.ends), 1)
        assert found[14].text == engine.tokenizer.decode(drawn.tokens, skip_special_tokens=True)
    assert found[14].prompt_tokens == len(prompt)


def test_options_survive_the_way_to_another_process() -> None:
    asked = options(task=Plain(), shard=(1, 2), phi_unit="round")
    assert isinstance(asked, Options)
    assert SampleOptions.model_validate(asked.model_dump(mode="json")).sampler == asked.sampler


class Sums(Plain):
    """Judged by the number."""

    def judge(self) -> Verifier:
        return Verifier.model_validate("number")


RIGHT = tuple(f"{opening} The answer is 1." for opening in ("We add.", "By counting up.", "Take one.", "It is plain."))
REPLIES = {
    "p0": ("The answer is 0.",),  # right, but always the same
    "p1": RIGHT,
    "p2": ("The answer is 3.", "The answer is 4.", "No idea.", "The answer is 2.", "Two it is. The answer is 2."),
    "p3": ("The answer is 7.",),  # never right
}


def in_waves(most: int = 6, at: int = 2, samples: int = 2, **changes: object) -> SampleOptions:
    rule = StopRule(at=at, most=most, rouge_l_max=0.8)
    rest = tuple(f"p{number}" for number in range(4, 20))
    sampler = Scripted(replies=REPLIES | dict.fromkeys(rest, ("a. The answer is 1.", "The answer is 1.")))
    return options(**{"task": Sums(), "sampler": sampler, "samples": samples, "stopping": rule, **changes})


def counts(out: Path) -> dict[str, int]:
    found = Counter(trace.problem_id for trace in read_jsonl(out / "traces.jsonl", Trace))
    return {name: found[name] for name in REPLIES}


def test_a_problem_is_left_in_whole_waves_once_it_has_enough(problems: Path, tmp_path: Path) -> None:
    """p1 is done after one wave of 2; p2 after three (its right ones are number 3 and 4); the others never."""
    out = folder(tmp_path, "out")
    metrics = sample(in_waves(), {"problems": problems}, out)
    assert counts(out) == {"p0": 6, "p1": 2, "p2": 6, "p3": 6}
    assert [problem.id for problem in read_jsonl(out / "unsolved.jsonl", Problem)] == [
        "p3",
        *(f"p{number}" for number in range(4, 20)),
    ]
    assert (metrics["usable"], metrics["unsolved"], metrics["money_a_usable_trace"]) == (1 + 2 + 2, 17, None)


def test_waves_grow_resume_and_share_out_to_the_same(problems: Path, tmp_path: Path) -> None:
    """More a problem later, a broken-off run and two processes end with the bytes of one run."""
    inputs, whole = {"problems": problems}, folder(tmp_path, "whole")
    sample(in_waves(), inputs, whole)
    grown, shared = folder(tmp_path, "grown"), folder(tmp_path, "shared")
    sample(in_waves(most=2), inputs, grown)
    sample(in_waves(), inputs, grown)
    for number in range(2):
        assert sample(in_waves(shard=(number, 2)), inputs, shared) == {}
    sample(in_waves(), inputs, shared)
    wanted = (whole / "traces.jsonl").read_bytes()
    assert wanted == (grown / "traces.jsonl").read_bytes() == (shared / "traces.jsonl").read_bytes()


def test_each_wave_has_its_temperature(problems: Path, tmp_path: Path) -> None:
    out = folder(tmp_path, "out")
    rule = StopRule(at=2, most=6, rouge_l_max=0.8, temperatures=(0.5, 1.5))
    sample(in_waves(sampler=Thermometer(), stopping=rule), {"problems": problems}, out)
    texts = [trace.text for trace in read_jsonl(out / "traces.jsonl", Trace) if trace.problem_id == "p1"]
    assert texts == ["0.5", "0.5", "1.5", "1.5", "1.5", "1.5"]


class Thermometer(Sampler):
    """Says at what temperature it is asked."""

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        def generate(requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
            for request in requests:
                yield Completion(request, str(decoding.temperature), FinishReason.STOP)

        yield generate


class Healing(Scripted):
    """Fails only for a while."""

    heals: ClassVar[bool] = True


def test_failed_samples_that_may_heal_are_asked_for_again(problems: Path, tmp_path: Path) -> None:
    """Only they are, in the run that goes on; the finished file then holds the good ones."""
    inputs, out = {"problems": problems}, folder(tmp_path, "out")
    broken = tuple(Reply(text="", finish_reason="error") if index == 1 else "fine" for index in range(3))
    assert sample(options(sampler=Scripted(default=broken)), inputs, out)["finish_reasons"]["error"] == 20
    again = sample(options(sampler=Healing(default=("new", "better", "new"))), inputs, out)
    assert again["finish_reasons"]["error"] == 0
    assert [trace.text for trace in read_jsonl(out / "traces.jsonl", Trace)][:3] == ["fine", "better", "fine"]
