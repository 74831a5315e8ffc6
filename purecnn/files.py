"""Writing files wholly or not at all."""

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
    """A temporary file that takes the place of ``path`` when the block ends, and vanishes when it fails.

    It lies beside ``path``, in a hidden folder of its own, with whatever its writer puts beside it in turn. What a
    process leaves that is killed in the block goes when the same machine writes to ``path`` again.

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
        raise IsADirectoryError(errno.EISDIR, "is a folder, and no file can take its place", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    clear(target)
    folder = target.with_name(f".{target.name}.{_HOST}.{secrets.token_hex(8)}")
    folder.mkdir()
    try:
        with _locked(folder, wait=True):
            # The suffix stays last, because some writers choose the format by it.
            temporary = folder / f".{target.name}"
            with temporary.open("xb") as new:
                rights = os.fstat(new.fileno()).st_mode & 0o777  # what the umask leaves
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(rights)  # some writers, safetensors' among them, put a private file in its place
            temporary.replace(target)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as when the disk is full
            error.filename = str(target)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear(target: Path) -> None:
    """Remove what killed processes of this machine left of writing a file; others' locks may not be seen from here."""
    for folder in target.parent.glob(f".{glob.escape(f'{target.name}.{_HOST}')}.{'[0-9a-f]' * 16}"):
        with suppress(OSError), _locked(folder, wait=False) as dead:
            if dead and any(folder.iterdir()):  # an empty one may be so new that its owner has yet to lock it
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Keep a folder, and say whether no other process of this machine does; True where there are no locks."""
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
        except OSError:  # the file system has no locks
            pass
        yield free
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Lock a folder, and say whether that was possible; the system unlocks it for a process that is killed."""
    if sys.platform == "win32":  # which cannot open folders
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
