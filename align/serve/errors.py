"""Errors that a client sees, as OpenAI's error object or as a page."""

import errno
import sqlite3

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class ServeError(Exception):
    """A request that is refused.

    Args:
        status: the HTTP status.
        message: where, what was found, what was expected, what to do.
        code: a word that programs compare, such as ``invalid_api_key``.
        param: the field of the request that is wrong.
        headers: of the response, such as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, object]:
        """Return OpenAI's error object."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": str(self),
            "type": TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def broken_text() -> ServeError:
    """Return the error of a text that UTF-8 cannot encode, such as half of an emoji."""
    return ServeError(
        400,
        "A text of the request has half of a surrogate pair, which UTF-8 cannot encode. Remove or "
        "replace that character.",
    )


def full_disk(error: Exception) -> ServeError | None:
    """Return the error of a disk without room, which is the operator's to mend; None of others."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not is_full and not (isinstance(error, sqlite3.Error) and "disk is full" in str(error)):
        return None
    message = "The disk of the server is full. Nothing was changed; free some space and try again."
    return ServeError(507, message, code="disk_full")


def not_found(what: str, name: str, *, param: str = "id") -> ServeError:
    """Return the error of a thing that does not exist or belongs to somebody else."""
    return ServeError(404, f"No such {what}: {name[:200]!r}.", code="not_found", param=param)
