"""What ends a program on purpose: one class and one documented exit code for each kind of ending."""

OK = 0
INTERRUPTED = 130  # by Ctrl-C, where nothing else is made of it
UNREAD = 141  # whoever reads the output has gone


class XarScaleError(Exception):
    """An ending that the user can act on: printed as one line, without a traceback.

    ``rank`` is the one process that reports it; None means that every rank met it alike, and rank 0 speaks.
    """

    exit_code = 1
    rank: int | None = None


class UsageError(XarScaleError):
    """The command line asks for something that is not there, or would overwrite what is."""

    exit_code = 64


class DataError(XarScaleError):
    """Latents, an index or a checkpoint are missing, torn or changed."""

    exit_code = 65


class HangError(XarScaleError):
    """A step took many times as long as steps do: the job is ended, so that it can be started again."""

    exit_code = 69


class NonFiniteError(XarScaleError):
    """A loss, a gradient or an image is NaN or infinite; the weights on disk are those before it."""

    exit_code = 70


class ProcessError(XarScaleError):
    """A process died: killed, or out of memory. A data worker, or another rank, whose own message says why."""

    exit_code = 71


class FileError(XarScaleError):
    """A file or folder cannot be read or written: permissions, a full disk, something else in its place."""

    exit_code = 74


class PreemptedError(XarScaleError):
    """A signal said that the machine will be taken away; a checkpoint is written, and the job may be queued again."""

    exit_code = 75


class StoppedError(XarScaleError):
    """Somebody asked the run to stop before its end; a checkpoint is written, and the same command goes on from it."""

    exit_code = 76


class ConfigError(XarScaleError):
    """The configuration contradicts itself, the data or the machine."""

    exit_code = 78
