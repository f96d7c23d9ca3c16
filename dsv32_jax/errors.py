"""The errors that reach a user, and the exit code each one ends a command with."""


class DsvError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(DsvError, ValueError):
    """The call or the command line asks for something that makes no sense."""

    exit_code = 2


class ConfigError(DsvError, ValueError):
    """config.json does not describe a DeepSeek-V3.2 that this code computes."""

    exit_code = 3


class CheckpointError(DsvError, ValueError):
    """A checkpoint is damaged, incomplete, or in a format that is not supported."""

    exit_code = 3


class VerificationError(DsvError):
    """Bytes are not what the manifest says they are."""

    exit_code = 4


class CapacityError(DsvError):
    """Not enough disk, memory or devices."""

    exit_code = 5


class OutputExistsError(DsvError):
    """The output holds something else, or another process is writing it."""

    exit_code = 6


class StorageError(DsvError, OSError):
    """The operating system refused to read or write."""

    exit_code = 74


def listing(items, limit: int = 8) -> str:
    """`items` joined by commas, the first `limit` of them, and how many more there are."""
    items = [str(item) for item in items]
    more = f", ... and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
