"""What can go wrong, as a tree, so that a caller can catch at the level wanted.

    GoodfitError
    ├── RequestError        what was asked cannot be done (unknown key, bad value, no such model)   exit 2
    │   └── WeightsError    pretrained weights are absent, unreachable or do not fit                exit 2
    ├── DataError           the dataset cannot be used as it is                                     exit 3
    ├── StorageError        disk full, no permission, a damaged or missing file of a run            exit 4
    ├── TrainingError       the run diverged, or a rehearsal check failed                           exit 5
    │   └── OutOfMemory     even one sample at a time does not fit                                  exit 5
    ├── ExportError         the exported model does not reproduce the trained one, or is too slow   exit 1
    └── Stopped             asked to stop (Ctrl-C, SIGTERM); the run can be resumed                 exit 130 or 143

Every error answers four questions: what happened, where, what was kept, and what to do next.
"""

from __future__ import annotations


class GoodfitError(Exception):
    """Base of all errors that goodfit raises on purpose.

    Attributes:
        message: What happened, in one sentence.
        where: The file, item or option concerned; empty if there is none.
        kept: What was saved or left untouched.
        next: What to do next, preferably a command that can be copied.
    """

    exit_code = 1
    status = "failed"

    def __init__(self, message: str, *, where: str = "", kept: str = "", next: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.kept = kept
        self.next = next

    def describe(self) -> dict[str, str]:
        """The error as the JSON object that `json=true` prints."""
        return {
            "status": self.status,
            "error": self.message,
            "where": self.where,
            "kept": self.kept,
            "next": self.next,
        }

    def __str__(self) -> str:
        parts = [self.message]
        for label, text in (("where", self.where), ("kept", self.kept), ("next", self.next)):
            if text:
                parts.append(f"  {label + ':':<6} {text}")
        return "\n".join(parts)


class RequestError(GoodfitError):
    """What was asked cannot be done; nothing was started."""

    exit_code = 2
    status = "refused"


class WeightsError(RequestError):
    """Pretrained weights are absent, unreachable, or do not fit the model."""


class DataError(GoodfitError):
    """The dataset cannot be used as it is; no file of it was changed."""

    exit_code = 3
    status = "refused"


class StorageError(GoodfitError):
    """A file of a run cannot be written, or is missing or damaged."""

    exit_code = 4


class TrainingError(GoodfitError):
    """Training cannot go on: it diverged, or the rehearsal found that it would not learn."""

    exit_code = 5


class OutOfMemory(TrainingError):
    """Not even a micro-batch of one sample fits into memory."""


class ExportError(GoodfitError):
    """The exported model does not reproduce the trained one, or is over its latency limit, so no bundle was written."""


class Stopped(GoodfitError):
    """The run was asked to stop, and can be resumed.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM.
    """

    status = "stopped"

    def __init__(self, message: str, *, exit_code: int = 130, where: str = "", kept: str = "", next: str = "") -> None:
        super().__init__(message, where=where, kept=kept, next=next)
        self.exit_code = exit_code
