"""Rules of the house that a machine can check: imports point downwards, nothing heavy at import time, sizes."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_distill.component import SpeedOnly, component_class
from orpo_distill.config import Config, LoraSection
from orpo_distill.objectives import Objective
from orpo_distill.samplers import Sampler
from orpo_distill.tasks import Task
from orpo_distill.verifiers import Verifier

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "orpo_distill"

# Top row first. Modules in one row do not import each other, except inside a family's or the stages' own package.
ROWS = [
    {"cli"},
    {"compare"},
    {"preview", "pilot", "cases", "importing", "exporting", "billing", "reporting"},
    {"experiment"},
    {"call"},
    {"plan", "launch", "execution"},
    {"additions", "ahead"},
    {"stages"},
    {"trainer", "likelihood", "negatives", "page"},
    {"teaching", "rollouts", "win_rates"},
    {"scoring", "checkpoints", "sampling", "verification", "judged", "statistics", "measures", "runs", "given"},
    {"attention", "head"},
    {"packing", "loading", "alignment", "steps"},
    {"config"},
    {"mixing", "groups", "diversity", "forms", "judging", "priming"},
    {"tasks", "samplers", "objectives"},
    {"verifiers", "models", "ledger"},
    {"component", "records", "progress", "interrupt", "ledger_file"},
    {"errors"},
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "math_verify",
    "vllm",
    "numpy",
    "scipy",
    "matplotlib",
    "pyarrow",
    "openai",
    "httpx",
)


def modules() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if "quickstart" not in path.parts]


def imported_rooms(path: Path) -> set[str]:
    """First name below the package of everything a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orpo_distill."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imported_rooms(path) - {room}:
        assert ROW_OF[room] < ROW_OF[other], f"{room} must not import {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} is longer than 50 lines"
            is_command = any("command" in ast.unparse(mark) for mark in node.decorator_list)  # these are its flags
            count = len(node.args.args) + len(node.args.kwonlyargs)
            assert count <= 7 or is_command, f"{node.name} has too many parameters"


def test_importing_and_validating_loads_nothing_heavy() -> None:
    script = (
        "import sys, orpo_distill, orpo_distill.cli, orpo_distill.preview, orpo_distill.pilot, orpo_distill.plan\n"
        "from orpo_distill.loading import load_config\n"
        "from pathlib import Path\n"
        "from orpo_distill.plan import plan\n"
        "for path in sorted(Path('configs').rglob('*.yaml')): plan(load_config(path))\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("family", [Task, Verifier, Sampler, Objective])
def test_every_short_name_leads_to_a_component_of_its_family(family: type) -> None:
    for name in family.types:
        assert issubclass(component_class(family, name), family)


def test_every_module_imports() -> None:
    for path in modules():
        name = ".".join(("orpo_distill", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        importlib.import_module(name)


def test_speed_only_options_are_exactly_these() -> None:
    """A new option is part of the fingerprint unless it is listed here on purpose."""

    def walk(model: type, prefix: str) -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            key = f"{prefix}{name}"
            if any(isinstance(mark, SpeedOnly) for mark in field.metadata):
                found.add(key)
            elif isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                found |= walk(field.annotation, f"{key}.")
        return found

    families = {
        f"{family.family}.{name}": component_class(family, name)
        for family in (Task, Verifier, Sampler, Objective)
        for name in family.types
    }
    found = walk(Config, "") | walk(LoraSection, "train.lora.")
    for prefix, model in families.items():
        found |= walk(model, f"{prefix}.")
    assert found == {
        "launch",
        "ledger",
        "runs",
        "teacher.scorer_device",
        "train.tokens_per_batch",
        "train.gradient_checkpointing",
        "train.checkpoint_minutes",
        "train.logging_steps",
        "train.report_to",
        "train.keep",
        "verify.processes",
        "sampler.hf.rows",
        "sampler.hf.device",
        "sampler.openai.account",
        "sampler.openai.api_key_env",
        "sampler.openai.base_url",
        "sampler.openai.batch",
        "sampler.openai.batch_poll",
        "sampler.openai.budget",
        "sampler.openai.concurrency",
        "sampler.openai.endpoint",
        "sampler.openai.extra_headers",
        "sampler.openai.ledger",
        "sampler.openai.n",
        "sampler.openai.patience",
        "sampler.openai.price",
        "sampler.openai.requests_per_minute",
        "sampler.openai.retries",
        "sampler.openai.seeds",
        "sampler.openai.timeout",
        "sampler.openai.tokens_per_minute",
        "sampler.scripted.delay",
        "sampler.vllm.python",
        "sampler.vllm.tensor_parallel_size",
        "sampler.vllm.gpu_memory_utilization",
    }
