"""Files that are written whole or not at all, durably; secrets with mode 0600 and never over another file."""

import os
from pathlib import Path

from fedfin.errors import ConfigError

__all__ = ["sync_directory", "write_private", "write_public"]


def write_private(path: Path, content: bytes) -> None:
    """Write a secret with mode 0600, whole or not at all; an existing file is never replaced.

    Raises:
        ConfigError: The file exists already, or cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # not rename, which would replace
        part.unlink()
        sync_directory(path.parent)
    except FileExistsError as error:
        part.unlink(missing_ok=True)
        msg = f"{path} exists already; it is never overwritten: use an empty folder, or move the old one away"
        raise ConfigError(msg) from error
    except OSError as error:
        part.unlink(missing_ok=True)
        msg = f"{path} cannot be written ({error.strerror}); free the disk or use another folder"
        raise ConfigError(msg) from error


def write_public(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file whole or not at all: a temporary file beside it, fsync, rename.

    Raises:
        ConfigError: The file cannot be written; what was there before stays.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            part.chmod(mode)  # before the content: nobody reads it in between
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        # The rename itself must survive a power cut, or a charge could outlive its release.
        sync_directory(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        msg = f"{path} cannot be written ({error.strerror}); free the disk or check the folder's permissions"
        raise ConfigError(msg) from error


def sync_directory(path: Path) -> None:
    """Have the names in a directory outlast a power cut; OSError where the disk does not take them."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
