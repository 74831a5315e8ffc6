"""Atomic writing of files: a file is written completely or not at all."""

import errno
import glob
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_HOST = platform.node()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file that replaces ``path`` when the block ends, and is deleted if the block fails.

    It is in its own hidden folder beside ``path``, together with any other files that its writer creates there. If a
    process is killed in the block, the next write to ``path`` from the same machine removes what it left.

    Raises:
        IsADirectoryError: if ``path`` is a folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "greeting") as file:
    ...     _ = file.write_text("hello")
    >>> (folder / "greeting").read_text()
    'hello'
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, which a file cannot replace", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    clear(target)
    folder = target.with_name(f".{target.name}.{_HOST}.{secrets.token_hex(8)}")
    folder.mkdir()
    try:
        with _locked(folder, wait=True):
            # The name keeps its suffix, because some writers choose the format by it.
            temporary = folder / f".{target.name}"
            with temporary.open("xb") as new:
                rights = os.fstat(new.fileno()).st_mode & 0o777  # the permissions that the umask leaves
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(rights)  # some writers, such as safetensors', replace it by a private file
            temporary.replace(target)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # for example, when the disk is full
            error.filename = str(target)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear(target: Path) -> None:
    """Remove what killed processes of this machine left; other machines' locks may not be visible from here."""
    for folder in target.parent.glob(f".{glob.escape(f'{target.name}.{_HOST}')}.{'[0-9a-f]' * 16}"):
        with suppress(OSError), _locked(folder, wait=False) as dead:
            if dead and any(folder.iterdir()):  # an empty folder may be so new that its owner has not locked it yet
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Lock a folder; yields False if another process of this machine holds it, and True if locks are not supported."""
    if sys.platform == "win32":
        yield True
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # the file system has no locks: treat the folder as free
            pass
        yield free
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Lock a folder; yields whether that succeeded. The operating system releases the lock of a killed process."""
    if sys.platform == "win32":  # Windows cannot open folders
        yield False
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has it, or the file system has no locks
            locked = False
        else:
            locked = True
        yield locked
    finally:
        os.close(handle)
