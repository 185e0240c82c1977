"""Files that are there whole or not at all, whatever ends the process or the machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Write a draft within, which takes the place of a file at the end; its folder is made.

    Args:
        path: the file.
        keep: what the file that was there is called from now on; None: it is lost.

    Raises:
        OSError: it cannot be written, as on a full disk; the message names it.
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
    """Remove what processes that were killed have left of :func:`replacing`; no other may be writing there."""
    for draft in folder.glob(".*.draft"):
        draft.unlink()
