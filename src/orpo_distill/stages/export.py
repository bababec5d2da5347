"""Export: the final student as an ordinary Hugging Face folder, adapters merged, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from orpo_distill.component import Options
from orpo_distill.models import HUB_ID
from orpo_distill.records import write_text
from orpo_distill.stages.report import headline_text, markdown_table, results_table


class ExportOptions(Options):
    """What the model card says beside the report."""

    name: str
    teacher: str
    student: str
    task: str
    objective: str
    rounds: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False


def export(options: ExportOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Put the model of input `model` into `out`: safetensors, tokenizer, chat template, README.md."""
    source = inputs["model"] / "model"
    if (source / "adapter_config.json").exists():
        _merge_adapter(source, out, options)
    else:
        for file in source.iterdir():
            shutil.copyfile(file, out / file.name)
    content = json.loads((inputs["report"] / "report.json").read_bytes())
    write_text(out / "README.md", model_card(options, content))
    return {"files": sorted(file.name for file in out.iterdir() if file.suffix != ".tmp")}


def model_card(options: ExportOptions, content: dict[str, Any]) -> str:
    """The generated README.md of the student."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {options.student}"] if HUB_ID.fullmatch(options.student) else []),
        "tags: [orpo-distill, distillation]",
        "---",
        "",
        f"# {options.name}",
        "",
        f"`{Path(options.student).name}` trained on text of `{Path(options.teacher).name}`: task `{options.task}`, "
        f"objective `{options.objective}`, {options.rounds} rounds, orpo-distill {content['version']}.",
        "",
        headline_text(content["headline"]) + ".",
        "",
        *markdown_table(results_table(content, content["headline"]["split"])),
        "",
        "Wilson intervals of 95%. The prompt and every other setting stand in the run's `config.yaml`.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
        "```",
        "",
        "The licences of the initial model and of the questions apply, and so do the terms of the teacher's provider.",
        "",
    ]
    return "\n".join(lines)


def _merge_adapter(source: Path, out: Path, options: ExportOptions) -> None:
    from orpo_distill.models import load_model, load_tokenizer, save_checkpoint

    merged = load_model(str(source), options.dtype, "cpu", options.trust_remote_code)
    save_checkpoint(merged, load_tokenizer(str(source), options.trust_remote_code), out)
