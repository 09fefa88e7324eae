"""The error hierarchy, with one class per kind of error a user can fix, and the process exit codes.

Every message says where the problem is, what was found, what was expected, and what to do.
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75


class AlignError(Exception):
    """A failure whose message is meant for the user; the terminal shows no traceback."""

    exit_code = EXIT_FAILED


class RecipeError(AlignError, ValueError):
    """One or more errors in a recipe, each as ``file:line:column: path: what``."""

    exit_code = EXIT_USER


class DataError(AlignError, ValueError):
    """A row or a dataset that cannot be used, as ``file:line: what``.

    Args:
        message: where, found, expected, what to do.
        code: an entry of align/data/check/codes.yaml with details (``align explain D040``).
    """

    exit_code = EXIT_USER

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class ArtifactError(AlignError, OSError):
    """An artifact that is missing, damaged or of the wrong kind."""

    exit_code = EXIT_USER


class UnreadableError(AlignError):
    """A file of a run that belongs to another user; nothing is known about its content."""

    exit_code = EXIT_USER

    def __init__(self, path: object) -> None:
        super().__init__(
            f"{path}: this user may not read it, so nothing is known about it. Fix the permissions "
            "(ls -l), or run as the user who made it; nothing was changed"
        )


class PreflightError(AlignError):
    """A stage that a check stopped before its first step; each line says what to do."""

    exit_code = EXIT_USER


class InstallError(AlignError, ImportError):
    """A package that a command needs and that is not installed."""

    exit_code = EXIT_USER


class TrainingError(AlignError, RuntimeError):
    """A run that cannot continue: a non-finite loss, an engine with old weights."""


class DeviceError(AlignError, RuntimeError):
    """Report a machine whose GPU cannot be used, or a world of another size than the recipe's."""

    exit_code = EXIT_USER


class Preempted(AlignError):
    """A stage that stopped on a signal after saving a checkpoint."""

    exit_code = EXIT_PREEMPTED


class RunError(AlignError):
    """A run from Python that did not end well, with the last message of its stage.

    Args:
        message: what failed and why.
        stage: the stage that failed; empty if all ran, but an expectation does not hold.
        code: the exit code of the same run by ``align run``.
    """

    def __init__(self, message: str, *, stage: str = "", code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.stage = stage
        self.exit_code = code
