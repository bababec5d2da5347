"""The config page: defaults, overrides, and errors that teach."""

from pathlib import Path

import pytest

from orpo_distill.errors import ConfigError
from orpo_distill.loading import load_config
from orpo_distill.plan import plan
from orpo_distill.samplers import Decoding

ROOT = Path(__file__).parents[1]
SMALLEST = "name: small\ntask: gsm8k\nteacher: {model: big}\nstudent: {model: little}\n"
SHIPPED = [*sorted((ROOT / "configs").rglob("*.yaml")), ROOT / "src/orpo_distill/quickstart/quickstart.yaml"]


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(SMALLEST)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_makes_a_plan(path: Path) -> None:
    assert plan(load_config(path))[-1].name == "student"


def test_only_four_settings_are_needed_and_the_paper_is_the_default(smallest: Path) -> None:
    """arXiv 2509.25100: K 8, temperature 0.8, ROUGE-L 0.80, phi 0.5, lambda 1, 5 epochs."""
    config = load_config(smallest)
    assert (config.teacher.samples, config.student.samples) == (8, 8)
    assert config.teacher.decoding.temperature == config.student.decoding.temperature == 0.8
    assert (config.pairs.rouge_l_max, config.pairs.phi, config.rounds) == (0.8, 0.5, 5)
    assert config.objective.weight == 1.0


def test_students_and_judges_are_read_greedily_unless_the_config_says_otherwise(smallest: Path) -> None:
    short, role = "decoding: {max_new_tokens: 9}", "task={type: jsonl, path: x, verifier: role}"
    config = load_config(smallest, [role, f"judge={{model: m, {short}}}", f"evaluate={{{short}}}"])
    assert config.judge is not None
    assert config.evaluate.decoding == config.judge.decoding == Decoding(temperature=0, max_new_tokens=9)
    assert load_config(smallest, ["student.decoding.max_new_tokens=9"]).student.decoding.temperature == 0.8


@pytest.mark.parametrize(
    ("override", "value"),
    [("train.learning_rate=1e-5", 1e-5), ("train.learning_rate=2.0e-5", 2e-5), ("train.learning_rate=1", 1.0)],
)
def test_overrides_read_numbers_as_people_write_them(smallest: Path, override: str, value: float) -> None:
    assert load_config(smallest, [override]).train.learning_rate == value


def test_an_override_reaches_into_a_component_named_by_a_word(smallest: Path) -> None:
    assert load_config(smallest, ["task.system=Be brief."]).task.system == "Be brief."


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["pairs.ph=0.5"], ["pairs.ph: unknown key; did you mean 'phi'?"]),
        (["taks=gsm8k"], ["taks: unknown key; did you mean 'task'?"]),
        (["task={type: gsm8k, promt: x}"], ["task.promt: unknown key; did you mean 'prompt'?"]),
        (["objective.weight=1", "objective.type=gkd"], ["objective.weight: unknown key of gkd, which has beta, "]),
        (["task=gsm9k"], ["did you mean 'gsm8k'"]),
        (["evaluate.test=false", "evaluate.teacher=true", "problems.validation=val"], ["evaluate.test: true beside"]),
        (["train.learning_rate=-1", "rounds=0"], ["train.learning_rate", "rounds"]),
        (["pairs.phi=[0.5, 0.5]"], ["one value a round (5)", "found [0.5, 0.5]"]),
        (["pairs.phi=[0.5, 0.5, 1, 1, 1]"], ["the first 0"]),
        (["pairs.phi=1.5"], ["pairs.phi: expected a number from 0 to 1", "found 1.5"]),
        (["pairs.phi=adaptiv"], ["pairs.phi: expected a number from 0 to 1", "adaptive", "found 'adaptiv'"]),
        (["pairs.phi={adaptive: luck}"], ["{adaptive: yield or diversity", "found {'adaptive': 'luck'}"]),
        (["pairs.phi={adaptive: yield, start: 1.5}"], ["start: above 0 and at most 1}", "'start': 1.5"]),
        (["pairs.phi={adaptive: yield, start: 0}"], ["start: above 0 and at most 1}", "'start': 0"]),
        (["pairs.phi={start: 0.5}"], ["{start, end}", "found {'start': 0.5}"]),
        (["pairs.phi=adaptive", "rounds=1"], ["rounds of at least 3", "adaptive pairs.phi", "found 1"]),
        (["pairs.phi=adaptive", "rounds=2"], ["round 3 the first whose phi can move", "found 2"]),
        (["teacher.decoding.temperature=0"], ["teacher.decoding.temperature > 0"]),
        (
            ["teacher={model: t, samples: 1, stop_at: 2, max_samples: 4, decoding: {temperature: 0}}"],
            ["teacher.decoding.temperature > 0 to draw 4 different traces"],
        ),
        (["student.decoding.temperature=0", "student.samples=2"], ["student.decoding.temperature > 0 to draw 2"]),
        (["extrapolate={alpha: [0.1, 0.10000001]}"], ["extrapolate: expected different values of alpha"]),
        (
            [
                "objective=gkd",
                "teacher.scoring=echo",
                "teacher.sampler={type: openai, base_url: 'http://x', tokenizer: small}",
            ],
            ["expected teacher.scoring: local for gkd", "found echo"],
        ),
        (["no-equals-sign"], ["expected key=value, found 'no-equals-sign'"]),
        (["name=../../etc"], ["name"]),
        (["train="], ["expected a value behind train=, found none; write train=null for no value"]),
        (["train=7"], ["train: expected settings ({key: value, ...}), found 7"]),
        (
            ["teacher.sampler={type: openai, base_url: 'http://x', price: 3, timeout: long}"],
            ["teacher.sampler.price: expected settings", "teacher.sampler.timeout: expected a number, found 'long'"],
        ),
        (["rounds=many", "teacher.prefix=[1]"], ["rounds: expected a whole number", "teacher.prefix: expected text"]),
        (["rounds=0"], ["rounds: expected a number greater than 0, found 0"]),
    ],
    ids=str,
)
def test_errors_are_all_named_at_once(smallest: Path, overrides: list[str], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(smallest, overrides)
    for message in messages:
        assert message in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_component_without_type_is_the_default_one(smallest: Path) -> None:
    config = load_config(smallest, ["objective.weight=0.1", "teacher.sampler.dtype=float32"])
    assert (config.objective.weight, config.teacher.sampler.dtype) == (0.1, "float32")


def test_quoted_text_that_looks_like_a_number_stays_text(smallest: Path) -> None:
    assert load_config(smallest, ["teacher.decoding.stop=['1e5']"]).teacher.decoding.stop == ("1e5",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list\n", "expected a mapping"),
        ("name: [unclosed\n", "expected YAML"),
        ("name: x\n", "task: expected one of arc_challenge, .* or module:Class, found none; add it"),
    ],
)
def test_a_file_that_is_no_config_is_one_message(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a YAML file at"):
        load_config(tmp_path / "none.yaml")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="expected YAML"):
        load_config(path)
