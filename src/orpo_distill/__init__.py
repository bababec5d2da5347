"""Distil a model you can only ask into a small one of any architecture.

from orpo_distill import load_config, run
folder = run(load_config(Path("experiment.yaml")))
"""

from importlib import metadata

__version__ = metadata.version("orpo-distill")

from orpo_distill.config import Config
from orpo_distill.errors import OrpoDistillError
from orpo_distill.experiment import run, status
from orpo_distill.loading import load_config, parse_config
from orpo_distill.objectives import Loss, Objective, ScoredGroups
from orpo_distill.plan import plan
from orpo_distill.records import Message, Outcome, Pair, Problem, Trace, Verdict
from orpo_distill.samplers import Completion, Decoding, Request, Sampler
from orpo_distill.tasks import Task
from orpo_distill.verifiers import Verifier

__all__ = [
    "Completion",
    "Config",
    "Decoding",
    "Loss",
    "Message",
    "Objective",
    "OrpoDistillError",
    "Outcome",
    "Pair",
    "Problem",
    "Request",
    "Sampler",
    "ScoredGroups",
    "Task",
    "Trace",
    "Verdict",
    "Verifier",
    "load_config",
    "parse_config",
    "plan",
    "run",
    "status",
]
