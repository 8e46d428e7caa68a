"""Errors that end a program deliberately: one class and one documented exit code for each kind of exit."""

import errno

OK = 0
INTERRUPTED = 130  # Ctrl-C, where no command handles it
UNREAD = 141  # the reader of the output has exited


class XarScaleError(Exception):
    """An error that the user can act on: printed as one line, without a traceback.

    ``rank`` is the process that reports it; None means that it occurred on every rank alike, and rank 0 reports it.
    """

    exit_code = 1
    rank: int | None = None

    def __str__(self) -> str:
        """The message, on one line: names in it come from files, and may hold line breaks or a terminal's commands."""
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class UsageError(XarScaleError):
    """The command line asks for something that does not exist, or would overwrite something that does."""

    exit_code = 64


class DataError(XarScaleError):
    """Latents, an index, a checkpoint or a step report are missing, truncated or changed."""

    exit_code = 65


class HangError(XarScaleError):
    """A step took many times the median step: the job is ended so that it can be restarted."""

    exit_code = 69


class NonFiniteError(XarScaleError):
    """A loss, a gradient or an image is NaN or infinite; the weights on disk are from before it."""

    exit_code = 70


class ProcessError(XarScaleError):
    """A process died, killed or out of memory: this rank, a data worker, or another rank, which reports the reason itself."""

    exit_code = 71


class FileError(XarScaleError):
    """A file or folder cannot be read or written: permissions, a full disk, something else at that path."""

    exit_code = 74


class PreemptedError(XarScaleError):
    """A signal announced preemption; a checkpoint is written, and the job may be requeued."""

    exit_code = 75


class StoppedError(XarScaleError):
    """The run was asked to stop early; a checkpoint is written, and the same command resumes from it."""

    exit_code = 76


class ConfigError(XarScaleError):
    """The configuration contradicts itself, the data or the machine."""

    exit_code = 78


def is_damage(error: Exception) -> bool:
    """Whether the content of a file made its reader fail: damage raises any of two dozen types. Else it was the machine."""
    if isinstance(error, OSError):
        return error.errno in (None, errno.EINVAL)  # the latter: a seek before the start of a torn archive
    return not isinstance(error, XarScaleError | MemoryError)
