"""The build cache: finished results of the build stages, found again by everything that entered them."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from sdrt.bundle import JsonValue
from sdrt.files import sha256_of, staged_directory, write_atomically

_INDEX_NAME = "entry.json"


def cache_key(**inputs: JsonValue) -> str:
    """The sha256 of the inputs' canonical JSON. Whatever changes the result must be among them."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache_root() -> Path:
    """$SDRT_CACHE, else $XDG_CACHE_HOME/sdrt, else ~/.cache/sdrt."""
    if "SDRT_CACHE" in os.environ:
        return Path(os.environ["SDRT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sdrt"


class Store:
    """A content-addressed store of folders of files, safe to share between processes."""

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
        damaged = [name for name, stamp in index.items() if _stamp(entry / name) != stamp]
        if damaged:
            warnings.warn(f"the cache entry {entry} is damaged ({damaged[0]}); it is made again", stacklevel=2)
            shutil.rmtree(entry, ignore_errors=True)
            return False
        for name in index:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(entry / name, into / name)
        return True

    def keep(self, key: str, folder: Path) -> None:
        """Store every file of `folder` under the key. A second process storing the same key does no harm."""
        entry = self._entry(key)
        if _read_index(entry) is not None:
            return
        entry.parent.mkdir(parents=True, exist_ok=True)
        with staged_directory(entry, overwrite=True) as staged:
            index = {}
            for path in sorted(item for item in folder.rglob("*") if item.is_file()):
                name = path.relative_to(folder).as_posix()
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(path, staged / name)
                index[name] = _stamp(staged / name)
            (staged / _INDEX_NAME).write_text(json.dumps(index))

    def sha256(self, path: Path) -> str:
        """A file's sha256, remembered by its place, size, time and inode so that it is read only once."""
        status = path.stat()
        identity = cache_key(
            path=str(path.resolve()), size=status.st_size, mtime=status.st_mtime_ns, inode=status.st_ino
        )
        memo = self.root / "hashes" / identity[:2] / identity
        if memo.is_file() and len(remembered := memo.read_text()) == 64:
            return remembered
        digest = sha256_of(path)
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, digest.encode(), overwrite=True)
        return digest

    def _entry(self, key: str) -> Path:
        return self.root / "entries" / key[:2] / key


def _read_index(entry: Path) -> dict[str, list[int]] | None:
    try:
        index = json.loads((entry / _INDEX_NAME).read_text())
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def _stamp(path: Path) -> list[int] | None:
    """Size and modification time: a truncated or edited file differs in one of them."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
            pass
        shutil.copy2(source, partial.name)
        Path(partial.name).replace(target)
