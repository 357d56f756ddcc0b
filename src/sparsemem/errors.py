"""Everything a user can do wrong, as exceptions that give the value, the reason and the remedy.

Each is also the builtin kind a caller would catch (`ValueError`, `FileNotFoundError`, ...), so code
that knows nothing of sparsemem handles it. The command exits with `exit_code`: 2 for a user's
mistake, found before anything was changed, 1 for a run that failed on its way.
"""


class SparsememError(Exception):
    """Base of all errors raised on purpose by sparsemem."""

    exit_code = 2


class ConfigError(SparsememError, ValueError):
    """An option has a value that cannot work."""


class DataError(SparsememError, ValueError):
    """A row of facts, probes or text is malformed; the message names file and line."""


class MissingFileError(SparsememError, FileNotFoundError):
    """A path given by the user does not exist."""


class LayerNotFoundError(SparsememError, ValueError):
    """A layer index lies outside the model."""


class UnknownArchitectureError(SparsememError, ValueError):
    """The blocks or the feed-forward network of a model could not be found."""


class NotAttachedError(SparsememError, ValueError):
    """The model has no memory, or has one already."""


class PoolMismatchError(SparsememError, ValueError):
    """Usage or a delta was made for another pool."""


class ModelMismatchError(SparsememError, ValueError):
    """A memory was saved for another base model."""


class CheckpointError(SparsememError, ValueError):
    """A file of a checkpoint is damaged, foreign or of a newer format."""


class HistoryError(SparsememError, LookupError):
    """There is no such update."""


class OutputError(SparsememError, OSError):
    """A result could not be written; what was there before is untouched."""

    exit_code = 1


class ExistsError(OutputError):
    """The folder to make is there already."""

    exit_code = 2


class MissingDependencyError(SparsememError, ImportError):
    """An optional package is not installed."""


class TrainingDivergedError(SparsememError, ArithmeticError):
    """The loss is not finite; nothing was learned."""

    exit_code = 1


class ProcessError(SparsememError, RuntimeError):
    """Another of the processes that learn together ended."""

    exit_code = 1


class RunFailedError(SparsememError, RuntimeError):
    """A run of several failed; the results of the others are there."""

    exit_code = 1
