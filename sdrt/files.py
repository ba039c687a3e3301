"""Writing and naming files safely: atomic writes, staged folders, hashes, paths that stay inside a root."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sdrt.errors import BundleError, OutputError

_DRIVE = re.compile(r"^[A-Za-z]:")
_CHUNK_BYTES = 4 * 2**20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_PREFIX = 40  # characters of the target's name that a temporary sibling repeats, lest its own be too long


def write_atomically(path: Path, data: bytes | memoryview, *, overwrite: bool = False, durable: bool = True) -> None:
    """Write a whole file or nothing: a temporary sibling is filled, then moved into place.

    durable: wait until the disk has it. Without, a loss of power may leave an empty or shorter file.
    Raises OutputError when the target exists (unless `overwrite`), cannot be written, or the disk is full.
    """
    refuse_existing(path, overwrite=overwrite)
    partial = _sibling(path, "partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        _move_into_place(partial, path, overwrite=overwrite)
        if durable:
            _synchronise(path.parent)
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """A temporary sibling of `target` that becomes `target` when the block ends well.

    Any exception, Ctrl-C included, removes it and leaves `target` as it was.
    durable: wait until the disk has every file. Without, a loss of power may leave empty or shorter files.
    Raises OutputError when the target exists (unless `overwrite`), cannot be written, or the disk is full.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  (a symlink as target must not be followed)
    refuse_existing(target, overwrite=overwrite)
    staged = _sibling(target, "partial")
    try:
        with output_errors(target):
            _check_name(target)
            staged.mkdir()
            yield staged
            if durable:
                _synchronise_tree(staged)
            _replace_directory(staged, target, overwrite=overwrite)
            if durable:
                _synchronise(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def unshare(folder: Path) -> None:
    """Give every file in `folder` that has other hard links a content of its own."""
    for path in [item for item in folder.rglob("*") if item.is_file() and item.stat().st_nlink > 1]:
        partial = _sibling(path, "partial")
        shutil.copy2(path, partial)
        partial.replace(path)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError when something is at `path` and may not be replaced."""
    if not overwrite and os.path.lexists(path):
        raise OutputError(f"{path} exists already", hint="name another output, or allow overwriting it with --force")


def check_replaceable(path: Path, *, mark: str, overwrite: bool) -> None:
    """Raise OutputError unless `path` is free, or may be replaced and is a folder of ours.

    mark: the file that tells such a folder ("bundle.json"). A folder of somebody's pictures is never replaced.
    """
    refuse_existing(path, overwrite=overwrite)
    foreign = path.is_dir() and any(path.iterdir()) and not (path / mark).exists()
    if foreign or path.is_file():
        raise OutputError(
            f"{path} holds something that sdrt did not make there (no {mark} in it)",
            hint="name another output, or remove it yourself",
        )


def check_writable(path: Path) -> None:
    """Raise OutputError unless a file or folder could be made at `path` now."""
    probe = _sibling(path, "probe")
    try:
        _check_name(path)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        probe.unlink()
    except OSError as error:
        raise _refusal(path, error) from error


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path`, or anything in it, into OutputError.

    A full disk counts whatever file met it; any other error only when it names `path`, its temporary sibling, or
    a folder above it. An input that cannot be read stays the OSError that it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL and not _concerns(error, path):
            raise
        raise _refusal(path, error) from error


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
    hostile = not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative
    if hostile or _DRIVE.match(relative):
        raise BundleError(f"the path {relative!r} leaves {root}", hint="the file is damaged or hostile; do not use it")
    path = root / pure
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a name that no file system holds
        raise BundleError(
            f"the path {relative!r} in {root} leads nowhere: {error}",
            hint="the file is damaged or hostile; do not use it",
        ) from error
    if not inside:
        raise BundleError(
            f"the path {relative!r} leads outside {root} through a link",
            hint="replace the link by the file it points to, if you trust it",
        )
    return path


def _refusal(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"the disk is full: {path} was not written", hint="free some space, or name an output on another disk"
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{path} would exceed the allowed file size",
            hint="raise the limit on file sizes (ulimit -f), or name an output on another disk",
        )
    names = [os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and os.fspath(path) in names:
        return OutputError(
            f"{path} exists already: it was made in the meantime", hint="name another output, or look at what made it"
        )
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}",
        hint="name an output in a folder that exists and that you may write to",
    )


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the error names `path`, something in it or in its temporary siblings, or a folder above it."""
    target = Path(os.path.abspath(path))  # noqa: PTH100  (links are not followed: they may be what failed)
    for name in (error.filename, error.filename2):
        if not isinstance(name, str | os.PathLike):
            continue
        named = Path(os.path.abspath(name))  # noqa: PTH100
        if target.is_relative_to(named):
            return True
        if named.is_relative_to(target.parent):
            first = named.relative_to(target.parent).parts[0]
            if first == target.name or first.startswith(_sibling_prefix(target)):
                return True
    return False


def _check_name(path: Path) -> None:
    """Let the system refuse a name that is too long, which that of a temporary sibling is not."""
    with contextlib.suppress(FileNotFoundError):
        path.lstat()


def _sibling_prefix(path: Path) -> str:
    return f".{path.name[:_LONGEST_PREFIX]}."


def _sibling(path: Path, suffix: str) -> Path:
    """A name beside `path` that nothing has."""
    return path.parent / f"{_sibling_prefix(path)}{secrets.token_hex(8)}.{suffix}"


def _move_into_place(partial: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        partial.replace(path)
        return
    try:
        os.link(partial, path)  # unlike a rename, a link never replaces a file that appeared meanwhile
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV):
            raise
        refuse_existing(path, overwrite=False)
        partial.rename(path)  # a file system without hard links


def _replace_directory(staged: Path, target: Path, *, overwrite: bool) -> None:
    refuse_existing(target, overwrite=overwrite)
    if not os.path.lexists(target):
        staged.rename(target)
        return
    old = _sibling(target, "old")
    try:
        target.rename(old)
        staged.rename(target)
    finally:  # whatever came between, Ctrl-C included, one of the two is at `target`
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        else:
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _synchronise_tree(folder: Path) -> None:
    """Have the disk hold every file of the folder, so that a name in place never stands for lost content."""
    for parent, _, files in os.walk(folder):
        for name in files:
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink():
                _synchronise(path)
        _synchronise(Path(parent))


def _synchronise(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
        return  # one may write into a folder without the right to read it
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EROFS):
            raise  # those three: a file system that cannot synchronise a folder
    finally:
        os.close(handle)
