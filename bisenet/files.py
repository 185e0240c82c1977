"""Atomic writing: a file is there whole or not at all, even after a kill or a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open a draft for writing; when the ``with`` block ends, the draft, synced to disk, replaces the file.

    Args:
        path: the file; its folder is made.
        keep: new path of the file that is replaced; None: that file is deleted.

    Raises:
        OSError: the file cannot be written, as on a full disk; the message names it.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if keep is not None:
            os.replace(path, keep)
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error
        raise


def remove_drafts(folder: Path) -> None:
    """Remove drafts that killed processes have left of :func:`replacing`; no other process may write there now."""
    for draft in folder.glob(".*.draft"):
        draft.unlink()
