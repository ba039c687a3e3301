"""The build cache: finished results of the build stages, found again by everything that entered them."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
import warnings
from pathlib import Path

from sdrt.bundle import JsonValue
from sdrt.errors import BundleError, OutputError
from sdrt.files import contained_path, sha256_of, staged_directory, write_atomically

_INDEX_NAME = "entry.json"
_CONTENT_NAME = "content"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_SETTLED_SECONDS = 2.0  # the coarsest clock of a file system: a younger file may change without changing its time


def cache_key(**inputs: JsonValue) -> str:
    """The sha256 of the inputs' canonical JSON. Whatever changes the result must be among them."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache_root() -> Path:
    """$SDRT_CACHE, else $XDG_CACHE_HOME/sdrt, else ~/.cache/sdrt. A variable that is empty counts as unset."""
    if own := os.environ.get("SDRT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sdrt"


class Store:
    """A content-addressed store of folders of files, safe to share between processes.

    It only saves time: where it cannot be written, it warns, and the work is done again the next time.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = default_cache_root() if root is None else root

    def fetch(self, key: str, into: Path) -> bool:
        """Materialise the entry's files in the existing folder `into`; False when there is no such entry.

        Files are hard links where the file system allows, copies elsewhere. An entry whose files do not have
        the recorded sizes or times is dropped with a warning and counts as absent.
        """
        entry = self._entry(key)
        index = _read_index(entry)
        if index is None:
            return False
        if damaged := _damaged(entry, index):
            warnings.warn(f"the cache entry {entry} is damaged ({damaged[0]}); it is made again", stacklevel=2)
            shutil.rmtree(entry, ignore_errors=True)
            return False
        placed: list[Path] = []
        try:
            for name in index:
                target = into / name
                target.parent.mkdir(parents=True, exist_ok=True)
                placed.append(target)
                _link_or_copy(entry / name, target)
        except FileNotFoundError:
            if not _damaged(entry, index):
                raise
            for target in placed:  # another process dropped the entry meanwhile
                target.unlink(missing_ok=True)
            return False
        return True

    def keep(self, key: str, folder: Path) -> None:
        """Store every file of `folder` under the key. A second process storing the same key does no harm.

        Warns where the store cannot be written.
        """
        entry = self._entry(key)
        if _read_index(entry) is not None:
            return
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            # What has no index is no entry. What a loss of power took is found by its size.
            with staged_directory(entry, overwrite=entry.is_dir(), durable=False) as staged:
                index = {}
                for path in sorted(item for item in folder.rglob("*") if item.is_file()):
                    name = path.relative_to(folder).as_posix()
                    (staged / name).parent.mkdir(parents=True, exist_ok=True)
                    _link_or_copy(path, staged / name)
                    index[name] = _stamp(staged, name)
                (staged / _INDEX_NAME).write_text(json.dumps(index))
        except (OSError, OutputError) as error:
            if _read_index(entry) is None:  # else another process was faster
                self._warn(error)

    def share(self, path: Path, sha256: str) -> None:
        """Make the file a hard link to the store's own of the same content, or keep it there for the next one.

        sha256: of its content. Nothing happens where the store cannot hold links to the file.
        """
        if not self._can_link(path):
            return
        key = cache_key(stage="content", sha256=sha256)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sharing.") as name:
            folder = Path(name)
            if self.fetch(key, folder):
                (folder / _CONTENT_NAME).replace(path)
            else:
                _link_or_copy(path, folder / _CONTENT_NAME)
                self.keep(key, folder)

    def sha256(self, path: Path) -> str:
        """A file's sha256, remembered by its size, time and inode so that it is read only once.

        The place counts only where the time is too coarse to tell files apart: a file that the store lends to one
        temporary folder after another is still the same.
        """
        status = path.stat()
        memo = self._memo(path, status)
        if (remembered := _read_memo(memo)) is not None:
            return remembered
        digest = sha256_of(path)
        settled = time.time() - status.st_mtime >= _SETTLED_SECONDS
        if settled and self._memo(path, path.stat()) == memo:
            try:
                memo.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(memo, digest.encode(), overwrite=True, durable=False)
            except (OSError, OutputError) as error:
                self._warn(error)
        return digest

    def _can_link(self, path: Path) -> bool:
        probe = self.root / f".{secrets.token_hex(8)}.probe"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            os.link(path, probe)
            probe.unlink()
        except OSError:
            return False
        return True

    def _entry(self, key: str) -> Path:
        return self.root / "entries" / key[:2] / key

    def _memo(self, path: Path, status: os.stat_result) -> Path:
        # Archives restore times in whole seconds, so that a file which takes over an inode may have its time too.
        coarse = status.st_mtime_ns % 1_000_000 == 0
        identity = cache_key(
            place=str(path.resolve()) if coarse else status.st_dev,
            size=status.st_size,
            mtime=status.st_mtime_ns,
            inode=status.st_ino,
        )
        return self.root / "hashes" / identity[:2] / identity

    def _warn(self, error: Exception) -> None:
        warnings.warn(
            f"the cache {self.root} cannot be written ({error}); the next build does this work again", stacklevel=3
        )


def _read_index(entry: Path) -> dict[str, list[int]] | None:
    try:
        index = json.loads((entry / _INDEX_NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return index if isinstance(index, dict) else None


def _read_memo(memo: Path) -> str | None:
    try:
        text = memo.read_text()
    except (OSError, ValueError):
        return None
    return text if _SHA256.fullmatch(text) else None


def _damaged(entry: Path, index: dict[str, list[int]]) -> list[str]:
    return [name for name, stamp in index.items() if _stamp(entry, name) != stamp]


def _stamp(entry: Path, name: str) -> list[int] | None:
    """Size and modification time: a truncated or edited file differs in one of them. None where it has none."""
    try:
        status = contained_path(entry, name).stat()
    except (OSError, BundleError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copy2(source, target)
    except BaseException:
        with contextlib.suppress(OSError):
            target.unlink()
        raise
