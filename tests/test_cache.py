import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from sdrt import cache
from sdrt.cache import Store, cache_key, default_cache_root
from sdrt.files import sha256_of

KEY = cache_key(test="x")
OLD = 1_600_000_000_123_456_789  # a time with nanoseconds, long ago


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture
def result(tmp_path):
    """A finished result of two files."""
    folder = tmp_path / "result"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "deep" / "b").write_text("2")
    return folder


@pytest.fixture
def into(tmp_path):
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def no_hard_links(source, target):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def aged(path, text, time=OLD):
    path.write_text(text)
    os.utime(path, ns=(time, time))
    return path


@pytest.fixture
def count_hashes(monkeypatch):
    read, real = [], cache.sha256_of
    monkeypatch.setattr(cache, "sha256_of", lambda path: (read.append(path), real(path))[1])
    return read


# Keys and the root


def test_a_key_depends_on_every_name_and_value_but_not_on_their_order():
    keys = [
        cache_key(a=1, b=2),
        cache_key(a=2, b=1),
        cache_key(a="1", b=2),
        cache_key(a=1, b=[2]),
        cache_key(a=1, c=2),
        cache_key(a=1),
        cache_key(a=1, b=None),
        cache_key(a=True, b=2),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(b=2, a=1) == cache_key(a=1, b=2)
    assert cache_key(a={"x": 1, "y": 2}) == cache_key(a={"y": 2, "x": 1})
    assert all(len(key) == 64 for key in keys)


def test_a_key_is_the_same_in_every_process():
    code = "from sdrt.cache import cache_key; print(cache_key(b=[1.5, None], a={'y': 'é', 'x': 2}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == cache_key(a={"x": 2, "y": "é"}, b=[1.5, None])


def test_nan_is_no_key():
    with pytest.raises(ValueError, match="not JSON compliant"):
        cache_key(a=float("nan"))


def test_the_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store().root == tmp_path / "own"
    monkeypatch.setenv("SDRT_CACHE", "")
    assert default_cache_root() == tmp_path / "xdg" / "sdrt"
    monkeypatch.delenv("SDRT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_root() == tmp_path / "home" / ".cache" / "sdrt"


# Entries


def test_what_was_kept_is_fetched_as_hard_links(store, result, into):
    assert store.fetch(KEY, into) is False
    store.keep(KEY, result)
    assert store.fetch(KEY, into) is True
    assert content(into) == content(result)
    assert (into / "a").stat().st_ino == (result / "a").stat().st_ino


def test_another_key_is_absent(store, result, into):
    store.keep(KEY, result)
    assert store.fetch(cache_key(test="y"), into) is False
    assert content(into) == {}


def test_what_was_kept_survives_the_result(store, result, into):
    store.keep(KEY, result)
    shutil.rmtree(result)
    assert store.fetch(KEY, into)
    assert content(into) == {"a": "1", "deep/b": "2"}


def test_across_file_systems_files_are_copied(store, result, into, monkeypatch):
    monkeypatch.setattr(os, "link", no_hard_links)
    store.keep(KEY, result)
    assert store.fetch(KEY, into)
    assert content(into) == content(result)
    assert (into / "a").stat().st_ino != (result / "a").stat().st_ino


def test_a_copy_that_the_disk_has_no_room_for_leaves_nothing(store, result, into, monkeypatch):
    store.keep(KEY, result)

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", no_hard_links)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space"):
        store.fetch(KEY, into)
    assert content(into) == {}


def test_files_that_are_in_the_way_are_replaced_not_written_through(store, result, into, tmp_path):
    aged(tmp_path / "mine", "mine")
    os.link(tmp_path / "mine", into / "a")
    store.keep(KEY, result)
    assert store.fetch(KEY, into)
    assert (into / "a").read_text() == "1"
    assert (tmp_path / "mine").read_text() == "mine"


def entry_of(store):
    (entry,) = store.root.glob("entries/*/*")
    return entry


DAMAGE = {
    "edited": lambda entry: aged(entry / "a", "3"),
    "cut": lambda entry: os.truncate(entry / "a", 0),
    "longer": lambda entry: aged(entry / "deep" / "b", "2222"),
    "gone": lambda entry: (entry / "a").unlink(),
    "link": lambda entry: ((entry / "a").unlink(), (entry / "a").symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_dropped_with_a_warning_and_can_be_made_again(store, result, into, damage):
    store.keep(KEY, result)
    good = content(result)
    damage(entry_of(store))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.fetch(KEY, into) is False
    assert content(into) == {}
    shutil.rmtree(result)
    (result / "deep").mkdir(parents=True)
    for name, text in good.items():
        (result / name).write_text(text)
    store.keep(KEY, result)
    assert store.fetch(KEY, into)
    assert content(into) == good


@pytest.mark.parametrize("index", ["", "{", "[]", "null", '"a"', "[" * 100_000, "\0"])
def test_an_entry_without_an_index_counts_as_absent_and_is_made_again(store, result, into, index):
    store.keep(KEY, result)
    (entry_of(store) / "entry.json").write_text(index)
    assert store.fetch(KEY, into) is False
    store.keep(KEY, result)
    assert store.fetch(KEY, into)
    assert content(into) == content(result)


@pytest.mark.parametrize("name", ["../../../../mine", "/etc/passwd", "a\0", ""])
def test_an_index_cannot_reach_outside_its_entry(store, result, into, tmp_path, name):
    mine = aged(tmp_path / "mine", "mine")
    store.keep(KEY, result)
    index = {name: [mine.stat().st_size, mine.stat().st_mtime_ns]}
    (entry_of(store) / "entry.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.fetch(KEY, into) is False
    assert mine.read_text() == "mine"


def test_an_entry_that_another_process_drops_meanwhile_counts_as_absent(store, result, into, monkeypatch):
    store.keep(KEY, result)
    real = os.link

    def drop_before_the_second(source, target):
        if list(into.iterdir()):
            shutil.rmtree(entry_of(store))
        real(source, target)

    monkeypatch.setattr(os, "link", drop_before_the_second)
    assert store.fetch(KEY, into) is False
    assert content(into) == {}


def test_keeping_twice_keeps_the_first(store, result, into):
    store.keep(KEY, result)
    before = (entry_of(store) / "a").stat().st_ino
    shutil.copytree(result, into / "again")
    store.keep(KEY, into / "again")
    assert (entry_of(store) / "a").stat().st_ino == before


def test_many_at_once_keep_one_whole_entry_and_all_can_fetch_it(store, result, tmp_path):
    problems = []

    def work(number):
        own = tmp_path / f"own-{number}"
        shutil.copytree(result, own)
        for turn in range(20):
            key = cache_key(turn=turn)
            store.keep(key, own)
            target = tmp_path / f"into-{number}-{turn}"
            target.mkdir()
            if not store.fetch(key, target) or content(target) != {"a": "1", "deep/b": "2"}:
                problems.append((number, turn))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    assert [str(warning.message) for warning in caught] == []
    assert list(store.root.rglob("*.partial")) == []


def test_a_store_that_cannot_be_written_warns_and_the_work_goes_on(result, into, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="cannot be written"):
        store.keep(KEY, result)
    assert store.fetch(KEY, into) is False
    aged(tmp_path / "weights", "x")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert store.sha256(tmp_path / "weights") == cache.sha256_of(tmp_path / "weights")


def test_a_full_disk_while_keeping_warns_and_leaves_no_half_entry(store, result, into, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="disk is full"):
        store.keep(KEY, result)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []
    assert store.fetch(KEY, into) is False


# Hashes


def test_a_hash_is_read_once(store, tmp_path, count_hashes):
    path = aged(tmp_path / "weights", "x")
    digest = store.sha256(path)
    assert digest == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert Store(store.root).sha256(path) == digest
    assert count_hashes == [path]


def test_a_file_that_the_store_lends_to_another_folder_is_not_read_again(store, tmp_path, count_hashes):
    (tmp_path / "result").mkdir()
    path = aged(tmp_path / "result" / "weights", "x")
    store.sha256(path)
    store.keep(KEY, tmp_path / "result")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert store.fetch(KEY, tmp_path / name)
        store.sha256(tmp_path / name / "weights")
    assert count_hashes == [path]


@pytest.mark.parametrize(("text", "time"), [("y", OLD + 1), ("xx", OLD), ("y", OLD - 10**9)])
def test_a_changed_file_is_read_again(store, tmp_path, text, time):
    path = aged(tmp_path / "weights", "x")
    before = store.sha256(path)
    aged(path, text, time)
    assert store.sha256(path) == cache.sha256_of(path) != before


def test_another_file_of_the_same_size_and_time_is_read_again(store, tmp_path):
    path = aged(tmp_path / "weights", "x")
    before = store.sha256(path)
    aged(tmp_path / "other", "y").replace(path)
    assert store.sha256(path) == cache.sha256_of(path) != before


def test_files_with_times_from_an_archive_are_told_apart_by_their_place(store, tmp_path, count_hashes):
    whole_seconds = OLD - OLD % 10**9
    first = aged(tmp_path / "first", "x", whole_seconds)
    os.link(first, tmp_path / "second")
    store.sha256(first)
    store.sha256(tmp_path / "second")
    store.sha256(first)
    assert count_hashes == [first, tmp_path / "second"]


def test_a_file_that_was_just_written_is_not_remembered(store, tmp_path):
    path = tmp_path / "weights"
    path.write_text("x")
    status = path.stat()
    before = store.sha256(path)
    path.write_text("y")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a coarse clock would
    assert store.sha256(path) == cache.sha256_of(path) != before


def test_a_file_that_changes_while_it_is_read_is_not_remembered(store, tmp_path, monkeypatch):
    path = aged(tmp_path / "weights", "x")
    real = cache.sha256_of
    monkeypatch.setattr(cache, "sha256_of", lambda path: (real(path), aged(path, "y", OLD + 1))[0])
    store.sha256(path)
    monkeypatch.setattr(cache, "sha256_of", real)
    assert not list(store.root.rglob("hashes/*/*"))
    assert store.sha256(path) == real(path)


@pytest.mark.parametrize("memo", [b"", b"x" * 64, b"\xff" * 64, b"A" * 63])
def test_a_damaged_memory_is_ignored(store, tmp_path, memo):
    path = aged(tmp_path / "weights", "x")
    digest = store.sha256(path)
    (remembered,) = store.root.glob("hashes/*/*")
    remembered.write_bytes(memo)
    assert store.sha256(path) == digest
    assert remembered.read_text() == digest


def test_a_missing_file_has_no_hash(store, tmp_path):
    with pytest.raises(FileNotFoundError):
        store.sha256(tmp_path / "nowhere")


def test_files_of_one_content_become_one_file(store, tmp_path):
    first, second, other = (
        aged(tmp_path / name, text) for name, text in (("a", "x" * 99), ("b", "x" * 99), ("c", "y"))
    )
    for path in (first, second, other):
        store.share(path, sha256_of(path))
    assert first.samefile(second)
    assert not first.samefile(other)
    assert [path.read_text() for path in (first, second, other)] == ["x" * 99, "x" * 99, "y"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "cache"]


def test_what_was_changed_since_is_not_shared(store, tmp_path):
    first, second = (aged(tmp_path / name, "same") for name in ("a", "b"))
    digest = sha256_of(first)
    store.share(first, digest)
    first.write_text("else")
    with pytest.warns(UserWarning, match="damaged"):
        store.share(second, digest)
    assert second.read_text() == "same"


def test_where_there_are_no_links_files_are_left_as_they_are(store, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_hard_links)
    first, second = (aged(tmp_path / name, "same") for name in ("a", "b"))
    for path in (first, second):
        store.share(path, sha256_of(path))
    assert not first.samefile(second)
    assert [path.read_text() for path in (first, second)] == ["same", "same"]
    assert list(store.root.rglob("content")) == []  # a copy there would serve nobody
