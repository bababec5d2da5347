"""The teacher's server as its scorer: tokens split as training splits them, and what it cannot do said at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from orpo_distill.billing import forecast
from orpo_distill.errors import ConfigError, ModelError
from orpo_distill.experiment import run
from orpo_distill.given import with_given
from orpo_distill.groups import Row
from orpo_distill.loading import load_config
from orpo_distill.models import load_tokenizer
from orpo_distill.objectives import ScoredGroups
from orpo_distill.page.costs import costs
from orpo_distill.page.files import RunFiles
from orpo_distill.plan import plan, select
from orpo_distill.records import Message, Pair, Score, read_jsonl
from orpo_distill.runs import read_manifest
from orpo_distill.samplers.openai import OpenAI
from orpo_distill.samplers.prompts import encode_prompt, end_of_response
from orpo_distill.samplers.server_scores import Way
from orpo_distill.stages.score import PARTIAL, ScoreOptions, score
from orpo_distill.stages.scorer import ScorerOptions, ScoreServer, scorer
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint
from tests.servers import FaultyServer, faulty_server
from tests.servers.scores import logp
from tests.test_end_to_end import experiment
from tests.training import ragged_pairs, write_pairs

WAYS = get_args(Way)


def vocabulary(checkpoint: Path, out: Path) -> Path:
    """The texts of a checkpoint's tokens, by id."""
    tokenizer = load_tokenizer(str(checkpoint))
    out.write_text(json.dumps([tokenizer.decode([token]) for token in range(len(tokenizer))]))
    return out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which only the tokenizer is ever read."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("teacher"), chat_template=CHAT_TEMPLATE)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def server(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    with faulty_server(vocabulary=vocabulary(teacher, tmp_path_factory.mktemp("server") / "texts.json")) as running:
        yield running


def api(server: FaultyServer, folder: Path, **options: Any) -> OpenAI:
    return OpenAI(base_url=server.base_url, ledger=folder / "ledger.sqlite", account="run", **options)


def score_by(
    server: FaultyServer, teacher: Path, pairs: list[Pair], out: Path, way: Way = "echo", **options: Any
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    where = ScoreServer(sampler=api(server, out.parent, **options), model="faulty", way=way)
    what = ScoreOptions(model=str(teacher), server=where, policy="teacher", prefix="Explain.", student=str(teacher))
    return score(what, {"pairs": write_pairs(out.with_name(f"{out.name}-pairs"), pairs)}, out)


def found(out: Path) -> dict[str, Score]:
    return {one.trace_id: one for one in read_jsonl(out / "scores.jsonl", Score)}


@pytest.mark.parametrize("way", WAYS)
def test_the_responses_tokens_and_its_end_are_summed(
    server: FaultyServer, teacher: Path, tmp_path: Path, way: Way
) -> None:
    """What the server says of each token is known here; a text that was cut has no end of sequence."""
    pairs = ragged_pairs(5)
    assert {pair.rejected_cut for pair in pairs} == {True, False}
    metrics = score_by(server, teacher, pairs, tmp_path / "out", way)
    scores, tokenizer, sent = found(tmp_path / "out"), load_tokenizer(str(teacher)), 0
    texts = {pair.chosen_id: (pair, pair.chosen, False) for pair in pairs}
    texts |= {pair.rejected_id: (pair, pair.rejected, pair.rejected_cut) for pair in pairs}
    assert scores.keys() == texts.keys()
    for trace, (pair, text, cut) in texts.items():
        prompt = encode_prompt(tokenizer, [Message("user", f"Explain.\n\n{pair.prompt[0].content}")])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + ([] if cut else [end_of_response(tokenizer)])
        row = [*prompt, *ids]
        expected = sum(logp(row[: place + 1]) for place in range(len(prompt), len(row)))
        assert scores[trace].logp_sum == pytest.approx(expected, abs=1e-9)
        assert (scores[trace].tokens, scores[trace].entropy) == (len(ids), None)
        sent += len(row)
    assert (metrics["scored"], metrics["prompt_tokens"], metrics["same_tokens"]) == (len(texts), sent, True)


def test_killed_it_goes_on_and_nothing_is_asked_again(server: FaultyServer, teacher: Path, tmp_path: Path) -> None:
    """Half of the scores stand in the folder, the others in the ledger alone, as after a kill."""
    pairs = ragged_pairs(6)
    score_by(server, teacher, pairs, tmp_path / "out")
    whole, asked = (tmp_path / "out/scores.jsonl").read_bytes(), server.stats()["requests"]
    partial = tmp_path / "out" / PARTIAL
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:9])
    (tmp_path / "out/scores.jsonl").unlink()
    score_by(server, teacher, pairs, tmp_path / "out")
    assert (tmp_path / "out/scores.jsonl").read_bytes() == whole
    score_by(server, teacher, pairs, tmp_path / "another")
    assert (tmp_path / "another/scores.jsonl").read_bytes() == whole
    assert server.stats()["requests"] == asked


def test_other_tokens_than_the_students_are_spoken_of(
    server: FaultyServer, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = save_tiny_checkpoint(tmp_path / "student", vocab="abcdef .xqueston0123456789")
    where = ScoreServer(sampler=api(server, tmp_path), model="faulty", way="echo")
    what = ScoreOptions(model=str(teacher), server=where, policy="teacher", student=str(student))
    metrics = score(what, {"pairs": write_pairs(tmp_path / "pairs", ragged_pairs(2))}, tmp_path)
    assert metrics["same_tokens"] is False
    assert "only the log-probabilities of whole texts are compared" in capsys.readouterr().err


def test_the_scorer_asks_one_text_once(server: FaultyServer, teacher: Path, tmp_path: Path) -> None:
    before = server.stats()["requests"]
    for way in WAYS:
        where = ScoreServer(sampler=api(server, tmp_path), model="faulty", way=way)
        for _ in range(2):
            assert scorer(ScorerOptions(server=where, tokenizer=str(teacher)), {}, tmp_path) == {"scoring": way}
    assert server.stats()["requests"] - before == len(WAYS)


def test_another_models_tokens_are_found_out(server: FaultyServer, tmp_path: Path) -> None:
    letters = "".join(sorted(set("The quick brown fox jumps over the lazy dog.Say it")))
    other = save_tiny_checkpoint(tmp_path / "other", vocab=letters)
    where = ScoreServer(sampler=api(server, tmp_path), model="faulty", way="echo")
    words = r"expected .*other to have the tokens of faulty, found that the server reads 'The quick .*' as '.*'; name"
    with pytest.raises(ModelError, match=words):
        scorer(ScorerOptions(server=where, tokenizer=str(other)), {}, tmp_path)


def test_an_entropy_that_no_server_tells_is_no_number() -> None:
    """Nothing may take it for 0: what reads it gets NaN, which stops training; what does not read it is as it was."""
    one = torch.zeros(2)
    batch = ScoredGroups(one, one, one, one, torch.tensor([0]), torch.tensor([1]), 1.0)
    rows = [Row(1, Pair("p", (), "a", "b", "c0", "r0", "teacher", "student-0"), (1,), (2,), (3,))]
    given = {"c0": Score("c0", "", -1.0, 2, None), "r0": Score("r0", "", -2.0, 2, 0.25)}
    teacher = with_given(batch, rows, {"teacher": given}).teacher
    assert teacher is not None
    assert teacher.logp_sum.tolist() == [-1.0, -2.0]
    assert math.isnan(teacher.entropy[0]) and teacher.entropy[1] == 0.25


def dadpo(folder: Path, server: FaultyServer, teacher: Path, **changes: Any) -> Path:
    """An experiment whose teacher, texts and scores, is the server."""
    price = {"prompt": 1, "completion": 10}
    sampler = {"type": "openai", "base_url": server.base_url, "ledger": str(folder / "ledger.sqlite"), "price": price}
    described = {"model": "faulty", "samples": 2, "sampler": sampler, "scorer": str(teacher), "scoring": "echo"}
    path = experiment(
        folder, teacher=described | changes, objective="dadpo", mechanisms={"enabled": False}, evaluate={}
    )
    for split in (folder / "data").iterdir():  # sums that the server can do
        split.write_text(split.read_text().replace(" plus ", " + "))
    return path


def test_a_run_is_scored_by_its_server_alone(server: FaultyServer, teacher: Path, tmp_path: Path) -> None:
    folder = run(load_config(dadpo(tmp_path, server, teacher)), until="round-2/train")
    used: set[str] = set()
    for number in (1, 2):
        for pair in read_jsonl(folder / f"round-{number}/pairs/pairs.jsonl", Pair):
            used |= {pair.chosen_id, pair.rejected_id}
        scores = list(read_jsonl(folder / f"round-{number}/teacher-scores/scores.jsonl", Score))
        assert {one.trace_id for one in scores} == used
        assert {one.entropy for one in scores} == {None}
        log = [json.loads(line) for line in (folder / f"round-{number}/train/log.jsonl").read_text().splitlines()]
        assert all(math.isfinite(line["loss"]) for line in log)
    (cost,) = [one for one in costs(RunFiles(folder), []) if one.stage == "round-1/teacher-scores"]
    metrics = read_manifest(folder / cost.stage).metrics
    assert (cost.prompt, cost.sampled) == (metrics["prompt_tokens"], metrics["scored"])
    assert cost.money == pytest.approx((metrics["prompt_tokens"] + 10 * metrics["scored"]) / 1e6)
    asked = server.stats()["requests"]
    run(load_config(dadpo(tmp_path, server, teacher)), until="round-2/train")
    assert server.stats()["requests"] == asked


def test_a_server_that_cannot_is_found_out_before_anything_is_bought(teacher: Path, tmp_path: Path) -> None:
    with faulty_server() as server:
        config = load_config(dadpo(tmp_path, server, teacher))
        with pytest.raises(ModelError, match=r"to score given texts \(teacher\.scoring: echo\), found: HTTP 200"):
            run(config)
        assert server.stats()["requests"] == 1
    assert not (config.run_dir / "teacher").exists()
    bill = {line[0]: line[1:] for line in forecast(config)}
    assert bill["round-1/teacher-scores: calls"] == ("one for each new text of the pairs", "192")
    most = int(bill["round-1/teacher-scores: prompt tokens"][1].split()[0])
    assert float(bill["round-1/teacher-scores: money"][1]) == pytest.approx((most * 1 + 192 * 10) / 1e6, abs=1e-4)
    names = [stage.name for stage in plan(config)]
    assert names.index("teacher-scorer") < names.index("teacher")
    assert "teacher-scorer" in [stage.name for stage in select(plan(config), "round-1/pairs")]  # a pilot
    texts_alone = config.model_copy(update={"objective": load_config(experiment(tmp_path / "orpo")).objective})
    assert "teacher-scorer" not in [stage.name for stage in plan(texts_alone)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": None}, r"teacher: expected the tokenizer of what the server runs beside scoring: echo, found none"),
        (
            {"sampler": {"type": "hf"}},
            r"teacher: expected the sampler openai beside scoring: echo, found hf, which asks no server",
        ),
        (
            {"scoring": "local", "scorer": None},
            r"for dadpo, found openai, which only writes texts; name .* in teacher\.scoring",
        ),
        ({"scoring": "guess"}, r"teacher\.scoring: expected 'local', 'prompt_logprobs' or 'echo', found 'guess'"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    server: FaultyServer, teacher: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(dadpo(tmp_path, server, teacher, **changes))


def test_whole_distributions_come_from_no_server(server: FaultyServer, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected teacher\.scoring: local for gkd, .* found echo: no server lends"):
        load_config(dadpo(tmp_path, server, teacher), ["objective=gkd"])


def test_the_samplers_own_tokenizer_will_do(server: FaultyServer, teacher: Path, tmp_path: Path) -> None:
    sampler = {"type": "openai", "base_url": server.base_url, "tokenizer": str(teacher)}
    config = load_config(dadpo(tmp_path, server, teacher, scorer=None, sampler=sampler))
    assert config.teacher.scored_by == str(teacher)
