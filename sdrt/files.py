"""Writing and naming files safely: atomic writes, staged folders, hashes, paths that stay inside a root."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sdrt.errors import BundleError, OutputError

_DRIVE = re.compile(r"^[A-Za-z]:")
_CHUNK_BYTES = 4 * 2**20


def write_atomically(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write a whole file or nothing: a temporary sibling is filled, synchronised, then moved into place.

    Raises OutputError when the target exists (unless `overwrite`), cannot be written, or the disk is full.
    """
    refuse_existing(path, overwrite=overwrite)
    with output_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(0o666 & ~_umask())
            _move_into_place(partial, path, overwrite=overwrite)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` that becomes `target` when the block ends well.

    Any exception, Ctrl-C included, removes it and leaves `target` as it was.
    Raises OutputError when the target exists (unless `overwrite`), cannot be written, or the disk is full.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  (a symlink as target must not be followed)
    refuse_existing(target, overwrite=overwrite)
    with output_errors(target):
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    try:
        with output_errors(target):
            yield staged
            staged.chmod(0o777 & ~_umask())
            _replace_directory(staged, target, overwrite=overwrite)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError when something is at `path` and may not be replaced."""
    if not overwrite and os.path.lexists(path):
        raise OutputError(f"{path} exists already", hint="name another output, or allow overwriting it with --force")


def check_writable(path: Path) -> None:
    """Raise OutputError unless a file or folder could be made at `path` now."""
    with output_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".sdrt.", suffix=".probe")
        os.close(handle)
        Path(name).unlink()


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or name an output on another disk"
            raise OutputError(f"the disk is full: {path} was not written", hint=hint) from error
        if error.errno == errno.EFBIG:
            hint = "raise the limit on file sizes (ulimit -f), or name an output on another disk"
            raise OutputError(f"{path} would exceed the allowed file size", hint=hint) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            hint = "name an output in a folder that exists and that you may write to"
            raise OutputError(f"{path} cannot be written: {error.strerror}", hint=hint) from error
        raise


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def contained_path(root: Path, relative: str) -> Path:
    """`root / relative`, for a relative path that comes from a file and may be hostile.

    Raises BundleError for anything that is absolute, climbs with "..", holds a drive letter, a backslash
    or NUL, or leads outside `root` through a symbolic link.
    """
    pure = PurePosixPath(relative)
    hostile = not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative
    if hostile or _DRIVE.match(relative):
        raise BundleError(f"the path {relative!r} leaves {root}", hint="the file is damaged or hostile; do not use it")
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(
            f"the path {relative!r} leads outside {root} through a link",
            hint="replace the link by the file it points to, if you trust it",
        )
    return path


def _move_into_place(partial: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        partial.replace(path)
        return
    try:
        os.link(partial, path)  # unlike a rename, a link never replaces a file that appeared meanwhile
    except FileExistsError:
        refuse_existing(path, overwrite=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV):
            raise
        partial.rename(path)  # a file system without hard links


def _replace_directory(staged: Path, target: Path, *, overwrite: bool) -> None:
    refuse_existing(target, overwrite=overwrite)
    if not os.path.lexists(target):
        staged.rename(target)
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".old") as grave:
        replaced = Path(grave) / "replaced"
        target.rename(replaced)
        try:
            staged.rename(target)
        except OSError:
            replaced.rename(target)
            raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
