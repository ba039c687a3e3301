import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrt import files
from sdrt.errors import BundleError, OutputError
from sdrt.files import (
    check_writable,
    contained_path,
    output_errors,
    refuse_existing,
    sha256_of,
    staged_directory,
    unshare,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(number, *names):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), *names)

    return fail


@pytest.fixture
def read_only_folder():
    """A folder that this process may look into but not write to, also when the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        own = os.geteuid()
        if own == 0:
            os.seteuid(65534)
        yield folder
        if own == 0:
            os.seteuid(0)
        folder.chmod(0o755)


@contextlib.contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


# Files


def test_a_file_is_written_whole_and_alone(tmp_path):
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_an_existing_file_is_kept_unless_it_may_be_overwritten(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already") as caught:
        write_atomically(path, b"new")
    assert "--force" in caught.value.hint
    assert path.read_bytes() == b"mine"
    write_atomically(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_a_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already"):
        write_atomically(tmp_path / "a", b"new")
    with pytest.raises(OutputError, match="exists already"):
        refuse_existing(tmp_path / "a", overwrite=False)


def test_a_file_that_appears_while_writing_is_kept(tmp_path, monkeypatch):
    real = os.link

    def other_is_faster(source, target):
        Path(target).write_bytes(b"theirs")
        real(source, target)

    monkeypatch.setattr(os, "link", other_is_faster)
    with pytest.raises(OutputError, match="in the meantime"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert names(tmp_path) == ["a"]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_new_files_and_folders_have_the_rights_that_the_umask_leaves(tmp_path):
    with umask(0o027):
        write_atomically(tmp_path / "a", b"")
        with staged_directory(tmp_path / "b"):
            pass
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EIO, "Input/output")]
)
def test_a_disk_that_fails_at_the_last_moment_leaves_nothing(tmp_path, monkeypatch, number, said):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OutputError, match=said) as caught:
        write_atomically(tmp_path / "a", b"new")
    assert caught.value.hint
    assert names(tmp_path) == []


def test_a_full_disk_does_not_harm_the_file_that_was_to_be_overwritten(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"mine")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OutputError):
        write_atomically(tmp_path / "a", b"new", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert names(tmp_path) == ["a"]


LIMITED = """
import resource, sys
from pathlib import Path
from sdrt.errors import OutputError
from sdrt.files import staged_directory, write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
root = Path(sys.argv[1])
def staged():
    with staged_directory(root / "b") as folder:
        (folder / "small").write_bytes(bytes(10))
        (folder / "large").write_bytes(bytes(2000))
for action in (lambda: write_atomically(root / "a", bytes(2000)), staged):
    try:
        action()
    except OutputError as error:
        print(error.message, "|", error.hint)
"""


def test_writes_that_really_stop_in_the_middle_leave_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert [line.partition(" would exceed")[1] != "" for line in done.stdout.splitlines()] == [True, True]
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["nowhere/a", "file/a", "x" * 300])
def test_a_place_that_cannot_hold_a_file_is_an_output_error(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    for action in (lambda path: write_atomically(path, b"new"), check_writable):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            action(tmp_path / name)
        assert "folder that exists" in caught.value.hint
    with pytest.raises(OutputError, match="cannot be written"), staged_directory(tmp_path / name):
        pytest.fail("the block ran without a folder")
    assert names(tmp_path) == ["file"]


def test_a_folder_is_not_overwritten_by_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError):
        write_atomically(tmp_path / "a", b"new", overwrite=True)
    assert names(tmp_path) == ["a"]


def test_a_read_only_folder_is_an_output_error(read_only_folder):
    with pytest.raises(OutputError, match="Permission denied"):
        write_atomically(read_only_folder / "a", b"new")
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(read_only_folder / "a")
    with pytest.raises(OutputError, match="Permission denied"), staged_directory(read_only_folder / "a"):
        pytest.fail("the block ran without a folder")
    assert names(read_only_folder) == []


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        check_writable(tmp_path / name)
        write_atomically(tmp_path / name, b"new")
        (tmp_path / name).unlink()
        with staged_directory(tmp_path / name):
            pass


def test_a_place_that_can_hold_a_file_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "a")
    assert names(tmp_path) == []


# Folders


def test_a_staged_folder_appears_only_when_it_is_whole(tmp_path):
    with staged_directory(tmp_path / "a") as staged:
        (staged / "x").write_text("1")
        assert not (tmp_path / "a").exists()
        assert staged.parent == tmp_path
    assert (tmp_path / "a" / "x").read_text() == "1"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_whatever_stops_the_block_leaves_everything_as_it_was(tmp_path, failure, overwrite):
    if overwrite:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").write_text("mine")

    def stopped():
        with staged_directory(tmp_path / "a", overwrite=overwrite) as staged:
            (staged / "x").write_text("new")
            (staged / "deep" / "er").mkdir(parents=True)
            raise failure

    with pytest.raises(failure):
        stopped()
    assert names(tmp_path) == (["a"] if overwrite else [])
    if overwrite:
        assert (tmp_path / "a" / "x").read_text() == "mine"


def test_an_existing_target_is_refused_before_the_block(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="exists already"), staged_directory(tmp_path / "a"):
        pytest.fail("the work was done in vain")


def test_a_target_that_appears_during_the_block_is_kept(tmp_path):

    def overtaken():
        with staged_directory(tmp_path / "a") as staged:
            (staged / "x").write_text("new")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "x").write_text("theirs")

    with pytest.raises(OutputError, match="exists already"):
        overtaken()
    assert (tmp_path / "a" / "x").read_text() == "theirs"
    assert names(tmp_path) == ["a"]


def test_a_target_that_appears_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    real = files._replace_directory

    def other_is_faster(staged, target, *, overwrite):
        monkeypatch.setattr(files, "refuse_existing", lambda path, *, overwrite: None)
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
        target.mkdir()
        (target / "x").write_text("theirs")
        real(staged, target, overwrite=overwrite)

    monkeypatch.setattr(files, "_replace_directory", other_is_faster)
    with pytest.raises(OutputError, match="in the meantime"), staged_directory(tmp_path / "a") as staged:
        (staged / "x").write_text("new")
    assert (tmp_path / "a" / "x").read_text() == "theirs"
    assert names(tmp_path) == ["a"]


def test_an_overwritten_folder_is_replaced_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("1")
    with staged_directory(tmp_path / "a", overwrite=True) as staged:
        (staged / "new").write_text("2")
    assert names(tmp_path / "a") == ["new"]
    assert names(tmp_path) == ["a"]


def test_an_overwritten_link_does_not_reach_what_it_points_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("1")
    (tmp_path / "a").symlink_to("mine")
    with staged_directory(tmp_path / "a", overwrite=True):
        pass
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "mine" / "x").read_text() == "1"
    assert names(tmp_path) == ["a", "mine"]


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_what_stops_the_exchange_of_folders_brings_the_old_one_back(tmp_path, monkeypatch, failure):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("mine")
    real = Path.rename

    def stop(self, target):
        if self.name.endswith(".partial"):
            raise failure
        return real(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(type(failure)), staged_directory(tmp_path / "a", overwrite=True) as staged:
        (staged / "x").write_text("new")
    assert (tmp_path / "a" / "x").read_text() == "mine"
    assert names(tmp_path) == ["a"]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synchronised, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synchronised.append(str(Path(f"/proc/self/fd/{handle}").readlink())), real(handle))
    )
    with staged_directory(tmp_path / "a") as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "x").write_text("1")
        (staged / "dangling").symlink_to("nowhere")
    assert set(synchronised) == {str(staged / "deep" / "x"), str(staged / "deep"), str(staged), str(tmp_path)}
    assert synchronised[-1] == str(tmp_path)


def test_a_full_disk_during_the_block_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="disk is full"), staged_directory(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_an_input_that_is_missing_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), staged_directory(tmp_path / "a"):
        (tmp_path / "input").read_bytes()
    with pytest.raises(FileNotFoundError), output_errors(tmp_path / "a"):
        (tmp_path / "input").read_bytes()
    assert names(tmp_path) == []


def test_a_refusal_inside_the_staged_folder_is_blamed_on_the_output(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"), staged_directory(tmp_path / "a") as staged:
        (staged / "nowhere" / "x").write_text("1")
    with pytest.raises(OutputError, match="cannot be written"), output_errors(tmp_path / "no" / "a"):
        (tmp_path / "no" / "a").mkdir()


INTERRUPTED = """
import sys, time
from pathlib import Path
from sdrt.files import staged_directory
with staged_directory(Path(sys.argv[1]) / "a", overwrite=True) as staged:
    for number in range(10_000):
        (staged / str(number % 50)).write_bytes(bytes(1000))
        if number == int(sys.argv[2]):
            print("here", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("moment", [0, 3000, 9999])
def test_a_real_ctrl_c_leaves_nothing(tmp_path, moment):
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(moment)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    assert len(names(tmp_path)) == 1
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode != 0
    assert names(tmp_path) == []


# Paths and hashes


def test_the_hash_is_that_of_the_whole_file(tmp_path):
    import hashlib

    for size in (0, 1, files._CHUNK_BYTES, files._CHUNK_BYTES + 1):
        data = bytes(size)
        (tmp_path / "a").write_bytes(data)
        assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("relative", ["a", "a/b.bin", "./a", "a//b", "a..b", "...", "a/C:b", " "])
def test_honest_paths_stay_in_the_root(tmp_path, relative):
    assert contained_path(tmp_path, relative).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "relative",
    [
        *("", ".", "./", "..", "../a", "./../a", "a/../../b", "a/..", "/", "/etc/passwd", "//a"),
        *("\\a", "a\\b", "..\\a", "C:", "c:/a", "C:\\a", "a\0", "\0", "a\ud800"),
    ],
)
def test_hostile_paths_are_refused(tmp_path, relative):
    with pytest.raises(BundleError) as caught:
        contained_path(tmp_path, relative)
    assert caught.value.hint


@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "..", "loop"])
@pytest.mark.parametrize("relative", ["loop", "loop/x"])
def test_links_that_leave_the_root_or_lead_nowhere_are_refused(tmp_path, target, relative):
    root = tmp_path / "root"
    root.mkdir()
    (root / "loop").symlink_to(target)
    with pytest.raises(BundleError):
        contained_path(root, relative)


def test_links_within_the_root_and_to_the_root_are_followed(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "x").write_text("1")
    (root / "link").symlink_to("x")
    (tmp_path / "alias").symlink_to("root")
    assert contained_path(root, "link").read_text() == "1"
    assert contained_path(tmp_path / "alias", "x").read_text() == "1"


@given(st.text(alphabet=st.sampled_from("./\\aC:\0 \ud800é"), max_size=12))
def test_no_text_at_all_leaves_the_root(relative):
    root = Path("/root-that-is-not-there")
    try:
        path = contained_path(root, relative)
    except BundleError:
        return
    assert os.path.normpath(path).startswith(f"{root}/")


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    files.check_replaceable(pictures, mark="bundle.json", overwrite=True)  # empty: nothing to lose
    (pictures / "holiday.png").write_bytes(b"dear")
    with pytest.raises(OutputError, match="did not make"):
        files.check_replaceable(pictures, mark="bundle.json", overwrite=True)
    (pictures / "bundle.json").write_text("{}")
    files.check_replaceable(pictures, mark="bundle.json", overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        files.check_replaceable(pictures, mark="bundle.json", overwrite=False)


def test_unshared_files_keep_their_content_and_lose_their_links(tmp_path):
    (tmp_path / "kept").write_bytes(b"kept")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    os.link(tmp_path / "kept", folder / "deep" / "linked")
    unshare(folder)
    assert (folder / "deep" / "linked").read_bytes() == b"kept"
    assert (tmp_path / "kept").stat().st_nlink == (folder / "deep" / "linked").stat().st_nlink == 1
    assert [item.name for item in folder.rglob("*")] == ["deep", "linked"]
