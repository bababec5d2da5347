"""The errors a user can meet.

Every message is one text that says what was expected, what was found and what to do. The command line prints it
without a traceback and exits with `exit_code`; anything else that escapes is a bug and keeps its traceback.
Each class also inherits the builtin it refines, so that library users may catch either.
"""

from __future__ import annotations

from collections.abc import Sequence


class OrpoDistillError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = 1


class ConfigError(OrpoDistillError, ValueError):
    """A setting is missing, unknown or out of range. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class MissingVariable(ConfigError):
    """An environment variable is not set, such as the one that holds a key: the settings themselves may be right."""


class DataError(OrpoDistillError, ValueError):
    """Problems, traces or pairs are missing, malformed, or leave nothing to train on."""


class ModelError(OrpoDistillError, RuntimeError):
    """A checkpoint is not there, cannot be loaded, or cannot do what is asked of it."""


class RunError(OrpoDistillError, RuntimeError):
    """The run folder is locked, stale or damaged, or a stage's process failed."""


class RunInUse(RunError):
    """Another process holds the run folder."""


class TrainingError(OrpoDistillError, RuntimeError):
    """Training stopped: loss not finite, or out of memory."""


class Interrupted(BaseException):
    """A signal asked the run to stop; what was finished is kept. `exit_code` is 128 plus the signal's number.

    Like KeyboardInterrupt it is no Exception, so that nobody's `except Exception` swallows it.
    """

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__("interrupted")


def missing_extra(package: str, extra: str) -> ConfigError:
    """The error for an optional dependency that is not installed."""
    return ConfigError(
        f"expected the package {package}, found that it is not installed: pip install 'orpo-distill[{extra}]'"
    )


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an engine's error says that memory ran out."""
    words = ("out of memory", "can't allocate memory", "not enough memory")  # accelerators, Linux, Windows
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, not imported here
    return named or any(word in str(error) for word in words)
