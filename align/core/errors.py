"""The error hierarchy: one class per thing a user can put right, plus the process exit codes.

Form of every message: where, what was found, what was expected, what to do.
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75


class AlignError(Exception):
    """Report a failure whose message is meant for the user; the terminal shows no traceback."""

    exit_code = EXIT_FAILED


class RecipeError(AlignError, ValueError):
    """Report one or more mistakes in a recipe, each as ``file:line:column: path: what``."""

    exit_code = EXIT_USER


class DataError(AlignError, ValueError):
    """Report a row or a data set that cannot be used, as ``file:line: what``.

    Args:
        message: where, found, expected, what to do.
        code: the entry of align/data/check/codes.yaml that says more (``align explain D040``).
    """

    exit_code = EXIT_USER

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class ArtefactError(AlignError, OSError):
    """Report an artefact that is missing, damaged or of the wrong kind."""

    exit_code = EXIT_USER


class PreflightError(AlignError):
    """Report a stage that a check stopped before its first step; each line says what to do."""

    exit_code = EXIT_USER


class TrainingError(AlignError, RuntimeError):
    """Report a run that cannot go on: a non-finite loss, an engine on old weights."""


class DeviceError(AlignError, RuntimeError):
    """Report a machine whose GPU cannot be used, or a world of another size than the recipe's."""

    exit_code = EXIT_USER


class Preempted(AlignError):
    """Report that the stage stopped on a signal after saving a checkpoint."""

    exit_code = EXIT_PREEMPTED
