"""What a run would only find out after hours of work, looked at before its first stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orpo_distill.component import Options
from orpo_distill.errors import ConfigError
from orpo_distill.judging import Judge
from orpo_distill.models import checkpoint_folder, load_tokenizer, pick_device
from orpo_distill.runs import Stage
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.vllm import VLLM
from orpo_distill.stages.evaluate import EvaluateOptions
from orpo_distill.stages.extrapolate import ChooseOptions
from orpo_distill.stages.judge import JudgePairsOptions
from orpo_distill.stages.problems import ProblemsOptions, has_validation
from orpo_distill.stages.score import ScoreOptions
from orpo_distill.stages.train import TrainOptions
from orpo_distill.teaching import TeacherOptions, require_one_vocabulary


def check_ahead(stages: Iterable[Stage], validation: int | None = None) -> None:
    """Raise now what late stages would raise after hours of work: ConfigError, ModelError or DataError.

    That is for a teacher in training with another vocabulary than the student's or on a device that is not there, for a
    model that is to score texts and is not there, for a judge that cannot be asked, and for what is measured on
    validation where there is none. `validation` is the number of validation problems, where the stage `problems` stands
    and is not among the stages.
    """
    checked, all_options = set(), [stage.options for stage in stages]
    _check_validation(all_options, validation)
    scoring = [(one.model, one.trust_remote_code) for one in all_options if isinstance(one, ScoreOptions)]
    for model, trusted in dict.fromkeys(scoring):
        if model is not None:
            load_tokenizer(model, trusted)
    for options in all_options:
        if isinstance(options, JudgePairsOptions):
            _check_judge(options.judge)
        elif isinstance(options, TrainOptions) and options.teacher:
            models = options.model, options.teacher.model
            if models not in checked:
                _check_teacher(options, options.teacher)
                checked.add(models)


def _check_validation(found: Sequence[Options], standing: int | None) -> None:
    needing = ["extrapolate" for one in found if isinstance(one, ChooseOptions)]
    measured = [one.limits for one in found if isinstance(one, EvaluateOptions)]
    needing += ["evaluate.test: false" for limits in measured if "test" not in limits]
    if not needing:
        return
    made = next((one for one in found if isinstance(one, ProblemsOptions)), None)
    if standing == 0 if made is None else not has_validation(made):
        raise ConfigError(
            f"expected validation problems for {needing[0]}, found none in the task; name a split that has some in "
            "problems.validation, or hold some of train out with problems.holdout"
        )


def _check_judge(judge: Judge) -> None:
    if isinstance(judge.sampler, HF | VLLM):
        checkpoint_folder(judge.model)
    judge.sampler.check()


def _check_teacher(options: TrainOptions, teacher: TeacherOptions) -> None:
    student = load_tokenizer(options.model, options.train.trust_remote_code)
    require_one_vocabulary(options.objective, student, load_tokenizer(teacher.model, teacher.trust_remote_code))
    pick_device(teacher.device)
