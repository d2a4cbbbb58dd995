"""A lender's structured log: one JSON line for each thing that happened, appended durably.

It holds counts, digests and reasons; never a row of loans, a key or a token. (The signed Merkle log of the
evidence work replaces it behind the same call.)
"""

import datetime as dt
import errno
import json
import os
from pathlib import Path

from fedfin.errors import ConfigError

__all__ = ["Journal"]


class Journal:
    """Appends to one file; each call is on the disk when it returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **fields: str | float | None) -> None:
        """Append an event.

        Raises:
            ConfigError: The line cannot be written; what would go unlogged must not go on.
        """
        line = {"time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        text = json.dumps(line, ensure_ascii=False) + "\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                line_bytes = text.encode()
                if os.write(descriptor, line_bytes) != len(line_bytes):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a full disk takes a part
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            msg = (
                f"{self._path} cannot be written ({error.strerror}); free the disk: nothing goes on unlogged"
            )
            raise ConfigError(msg) from error
