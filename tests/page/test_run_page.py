"""The page of one run: its numbers, its warnings, what it says of runs that are not finished or damaged."""

import json
import re
from pathlib import Path

import pytest

from orpo_distill.errors import DataError, RunError
from orpo_distill.page import run_page
from orpo_distill.page.health import warnings
from orpo_distill.records import Pair, write_jsonl
from tests.page.folders import FolderOfARun, whole_run
from tests.page.reading import Seen


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_page(whole_run(tmp_path_factory.mktemp("runs") / "demo").path)


@pytest.fixture(scope="module")
def seen(page: str) -> Seen:
    return Seen(page)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo").path
    assert run_page(run) == run_page(run)


def test_every_section_is_there_and_linked(seen: Seen) -> None:
    anchors = [attrs["id"] for tag, attrs in seen.elements if tag == "section"]
    assert anchors == ["results", "health", "yield", "outcomes", "lengths", "traces", "cost", "settings"]
    links = [attrs["href"] for tag, attrs in seen.elements if tag == "a"]
    assert {f"#{anchor}" for anchor in anchors} <= set(links)


def test_nothing_is_loaded_and_only_own_code_may_run(page: str, seen: Seen) -> None:
    """No address in any attribute; the policy names exactly the hash of the script and of the style sheet."""
    for tag, attrs in seen.elements:
        assert not attrs.keys() & {"src", "srcset", "data", "action", "style", "onclick", "onload"}, tag
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)
    (policy,) = [attrs["content"] for _, attrs in seen.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert policy.count("sha256-") == 2
    assert "unsafe" not in policy


def test_ids_are_unique_and_drawings_point_to_their_own(seen: Seen) -> None:
    ids = [attrs["id"] for _, attrs in seen.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in seen.elements:
        for value in attrs.values():
            for name in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert name in ids
        if (attrs.get("href") or "").startswith("#"):
            assert attrs["href"][1:] in ids


def test_the_headline_and_the_table_are_paired_with_the_initial_student(seen: Seen) -> None:
    """Student 2 answers t0 to t3, student 0 only t0: 3 problems only it has, so p = 2 / 2^3 = 0.25."""
    assert "student-2 answers 66.7% of 6 test problems rightly: +50.0 points" in seen.text
    row = seen.row("student-2")
    assert row[1:3] == ["6", "66.7%"]
    assert row[4] == "+50.0"
    assert row[6:] == ["0.25", "3 / 0", "83.3%", "0.0%"]
    assert seen.row("student-1")[-1] == "16.7%"
    assert seen.row("student-0")[4:8] == ["–", "–", "–", "–"]


def test_the_student_of_the_chosen_alpha_is_the_headline(tmp_path: Path) -> None:
    """It is right on t1 and t2 alone; the warm-up and the last round's student stand beside it."""
    run = whole_run(tmp_path / "demo")
    run.evaluated("warmup/evaluate", "warmup", "++----")
    run.evaluated("extrapolate/0.5/evaluate", "student-2+0.5", "-++---")
    run.finish("extrapolate/chosen", {"alpha": 0.5})
    (run.path / "extrapolate/chosen/choice.json").write_text(json.dumps({"alpha": 0.5, "policy": "student-2+0.5"}))
    seen = Seen(run_page(run.path))
    assert "student-2+0.5 answers 33.3% of 6 test problems rightly: +16.7 points" in seen.text
    assert seen.row("student-2+0.5")[1:3] == ["6", "33.3%"] and seen.row("warmup")[2] == "33.3%"
    chart = next(
        attrs["aria-label"] for _, attrs in seen.elements if "Accuracy by rounds" in (attrs.get("aria-label") or "")
    )
    assert "student-0 16.7%, warmup 33.3%, student-1 50.0%, student-2 66.7%, student-2+0.5 33.3%" in chart
    assert "as far behind its round" in seen.text
    assert "This run is not finished" not in seen.text


def test_scores_of_whole_texts_are_named(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo")
    run.finish("round-1/reference-scores", {"same_tokens": True})
    run.finish("round-1/teacher-scores", {"same_tokens": False})
    run.finish("round-2/teacher-scores", {"same_tokens": None})
    assert "Scores of whole texts (round-1/teacher-scores): the model" in Seen(run_page(run.path)).text


def test_the_funnel_counts_what_is_left_after_each_step(seen: Seen) -> None:
    assert seen.row("problems")[1:] == ["6 (100%)"] * 2
    assert seen.row("with a correct teacher trace")[1:] == ["5 (83%)"] * 2
    assert seen.row("and a wrong trace against it")[1:] == ["4 (67%)"] * 2
    assert seen.row("in a pair")[1:] == ["3 (50%)"] * 2
    assert seen.row("too similar to a kept one")[1:] == ["1", "1"]
    assert seen.row("no rejected trace was left")[1:] == ["2", "2"]


def test_outcomes_lengths_and_cost_are_counted(seen: Seen) -> None:
    assert seen.row("student-0", "12", "25.0%", "58.3%", "8.3%", "8.3%", "83.3%", "8.3%")
    assert seen.row("chosen in pairs of round 1")[1:] == ["10", "10", "10", "10", "–"]
    assert seen.row("teacher", "12 s", "120")
    assert seen.row("round-1/train", "2.2 min", "–", "–", "3,000", "–")


def test_every_chart_has_words_and_every_colour_is_the_pages(page: str, seen: Seen) -> None:
    charts = [attrs for tag, attrs in seen.elements if tag == "svg"]
    assert len(charts) >= 12
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 30 for attrs in charts)
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.search(r'(?:fill|stroke)="#', drawings)


def test_the_config_hides_what_may_be_secret(tmp_path: Path) -> None:
    sampler = {
        "type": "openai",
        "base_url": "https://me:word@host/v1",
        "extra_headers": {"X-Key": "hush"},
        "api_key_env": "KEY",
        "price": {"prompt": 2.0, "completion": 10.0},
    }
    text = run_page(whole_run(tmp_path / "demo", teacher={"model": "m", "sampler": sampler}).path)
    assert "hush" not in text
    assert "me:word" not in text
    assert "api_key_env: KEY" in text
    assert Seen(text).row("teacher", "12 s")[-1] == "0.0014"  # 120 prompt tokens x 2 and 120 sampled x 10, a million


def test_chosen_falling_while_the_margin_grows_is_named(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo")
    run.trained("round-2/train", 2, chosen=-0.3)
    text = Seen(run_page(run.path)).text
    assert "In round 2 the chosen log-probability fell from" in text
    assert "In round 1" not in text


@pytest.mark.parametrize(
    ("chosen", "margin", "named"), [(-0.3, 0.5, True), (0.3, 0.5, False), (-0.3, -0.5, False), (-0.003, 0.5, False)]
)
def test_the_warning_takes_more_than_noise(tmp_path: Path, chosen: float, margin: float, named: bool) -> None:
    from orpo_distill.page.health import _with_margin

    run = FolderOfARun(tmp_path / "demo")
    run.trained("round-1/train", 1, chosen=chosen, margin=margin)
    rows = [json.loads(line) for line in (run.path / "round-1" / "train" / "log.jsonl").read_text().splitlines()]
    assert bool(warnings("round 1", _with_margin(rows))) is named


def test_a_run_that_has_just_begun_is_shown_with_what_is_missing(tmp_path: Path) -> None:
    """Teacher traces are arriving, one line is torn; nothing else is there."""
    run = FolderOfARun(tmp_path / "demo")
    run.sampled("teacher", "teacher", "++")
    folder = run.path / "teacher"
    (folder / "manifest.json").unlink()
    (folder / "traces.jsonl").rename(folder / "traces.partial.jsonl")
    with (folder / "traces.partial.jsonl").open("ab") as file:
        file.write(b'{"id": "torn')
    seen = Seen(run_page(run.path, missing=["student-0", "round-1/train"]))
    assert "This run is not finished. Begun: teacher." in seen.text
    assert "Yet to come: student-0, round-1/train." in seen.text
    assert "No evaluation has finished yet." in seen.text
    assert len(seen.packed()["traces"]["text"]) == 2


def test_folders_may_be_links_to_those_of_another_run(tmp_path: Path) -> None:
    shared, run = whole_run(tmp_path / "a" / "demo"), tmp_path / "b" / "demo"
    run.mkdir(parents=True)
    for path in shared.path.iterdir():
        if path.name.startswith("round-"):
            (run / path.name).mkdir()
            for stage in path.iterdir():
                (run / path.name / stage.name).symlink_to(stage)
        else:
            (run / path.name).symlink_to(path)
    assert run_page(run) == run_page(shared.path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("baseline/results.json", "[{]", "baseline/results.json"),
        ("baseline/results.json", '[{"policy": "student-0"}]', "accuracy"),
        ("round-1/train/log.jsonl", "nonsense\n", "log.jsonl:1"),
        ("teacher/traces.jsonl", '{"id": 1}\n', "traces.jsonl:1"),
        ("round-1/pairs/dropped.jsonl", "[]\n", "dropped.jsonl:1"),
        ("times.json", "[]", "times.json"),
        ("config.yaml", "a: [", "config.yaml"),
        ("mechanisms/mechanisms.json", '{"tables": [{"title": "t", "columns": ["a"], "rows": [[1, 2]]}]}', "2 cells"),
    ],
)
def test_a_damaged_file_is_one_message_that_names_it(tmp_path: Path, name: str, content: str, said: str) -> None:
    run = whole_run(tmp_path / "demo").path
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    with pytest.raises(DataError, match=r"expected .*found") as caught:
        run_page(run)
    assert said in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match="expected a run folder"):
            run_page(path)


def test_mechanisms_are_shown_as_they_were_written(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo").path
    tables = [{"title": "Diversity", "note": "n.", "columns": ["by", "ROUGE-L"], "rows": [["student-0", 0.51234]]}]
    (run / "mechanisms").mkdir()
    (run / "mechanisms" / "mechanisms.json").write_text(json.dumps({"tables": tables}))
    assert Seen(run_page(run)).row("student-0", "0.512")


def test_pairs_and_reasons_point_to_their_traces(seen: Seen) -> None:
    data = seen.packed()
    traces, pairs = data["traces"], data["pairs"]
    assert len(traces["text"]) == 12 + 12 + 6 * 5
    assert pairs["round"] == [1] * 4 + [2] * 4
    outcome = [data["outcomes"][number] for number in traces["outcome"]]
    assert {outcome[row] for row in pairs["chosen"]} == {"correct"}
    assert {outcome[row] for row in pairs["rejected"]} == {"wrong"}
    problem = [data["problems"][number][0] for number in traces["problem"]]
    assert [problem[row] for row in pairs["chosen"]] == [problem[row] for row in pairs["rejected"]]
    unused = data["unused"]
    assert [problem[row] for row in unused["trace"]] == ["p3", "p4"] * 2
    assert [unused["reasons"][number] for number in unused["reason"][:2]] == [
        "too similar to a kept one",
        "not wrong: correct",
    ]


def test_a_page_holds_whole_problems_up_to_a_number_of_traces(tmp_path: Path) -> None:
    """Train problems have 4 traces, test problems 5. With 20, whole problems only, and it is said."""
    run = whole_run(tmp_path / "demo").path
    seen = Seen(run_page(run, traces=20))
    data = seen.packed()
    counts = [data["traces"]["problem"].count(place) for place in range(len(data["problems"]))]
    kinds = [4 if row[0].startswith("p") else 5 for row in data["problems"]]
    assert counts == kinds
    assert 12 < sum(counts) <= 20
    assert f"{len(counts)} of 12 problems" in seen.text
    assert run_page(run, traces=20) == run_page(run, traces=20)


def test_a_run_without_problems_files_still_shows_its_traces(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo").path
    write_jsonl(run / "problems" / "problems.jsonl", [])
    assert {row[0] for row in Seen(run_page(run)).packed()["problems"]} >= {"p0", "t0"}


def test_without_a_rejected_side_no_wrong_trace_is_counted(tmp_path: Path) -> None:
    """An objective that only likes: pairs have no rejected side."""
    run = FolderOfARun(tmp_path / "demo")
    run.sampled("teacher", "teacher", "++++++++++--")
    rows = [Pair(t.problem_id, (), t.text, "", t.id, "", "teacher", "") for t in run.traces["teacher"][:10]]
    write_jsonl(run.folder("round-1/pairs") / "pairs.jsonl", rows)
    (run.path / "round-1" / "pairs" / "dropped.jsonl").write_text("")
    run.finish("round-1/pairs", {"pairs": 10, "problems": 6})
    seen = Seen(run_page(run.path))
    assert seen.row("in a pair", "5 (83%)")
    assert "and a wrong trace against it" not in seen.text
    assert set(seen.packed()["pairs"]["rejected"]) == {-1}
