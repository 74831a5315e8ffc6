"""Writing files wholly or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block ends, and vanishes when it fails.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "greeting") as file:
    ...     _ = file.write_text("hello")
    >>> (folder / "greeting").read_text()
    'hello'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because some writers choose the format by it.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(8)}{target.suffix}")
    with temporary.open("xb") as new:
        rights = os.fstat(new.fileno()).st_mode & 0o777  # what the umask leaves
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(rights)  # some writers, safetensors' among them, put a private file in its place
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
