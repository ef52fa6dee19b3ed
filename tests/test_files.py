"""Atomic writes: all of the new file or none of it, and disk errors as one sentence."""

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headprof.errors import HeadprofError
from headprof.utils.files import atomic_write, check_writable, remove_leftovers


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_through_a_temporary_beside_the_target_and_makes_parents(tmp_path):
    target = tmp_path / "deep" / "er" / "report.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent
        assert temporary.suffix == ".partial"
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["report.txt"]


def test_takes_a_string_and_a_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_write("plain.txt") as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == ["plain.txt"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(3), ConnectionResetError()])
def test_any_exception_leaves_the_old_file_alone_and_passes_through(tmp_path, error):
    target = tmp_path / "report.txt"
    target.write_text("old")
    with pytest.raises(type(error)) as caught, atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["report.txt"]


def test_an_interrupt_of_the_rename_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == []


def test_a_failing_sync_says_that_the_disk_is_full(tmp_path, monkeypatch):
    target = tmp_path / "report.txt"
    target.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HeadprofError) as caught, atomic_write(target) as temporary:
        temporary.write_text("new")
    assert str(caught.value) == (
        f"There is no space left on the disk that holds {target}: free some or choose another place with -o."
    )
    assert target.read_text() == "old"
    assert names(tmp_path) == ["report.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_write_that_fails_inside_the_block_says_that_the_disk_is_full(tmp_path, number):
    with pytest.raises(HeadprofError, match="no space left") as caught, atomic_write(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_the_sync_comes_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("replace"), replace(self, target)))
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert events == ["fsync", "replace", "fsync"]


def test_a_missing_input_read_inside_the_block_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        (tmp_path / "input.txt").read_text()
    assert names(tmp_path) == []


def test_a_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(HeadprofError, match="is a folder"), atomic_write(tmp_path / "out"):
        pytest.fail("the block ran")
    for folder in ("/", "."):
        with pytest.raises(HeadprofError, match="is a folder"), atomic_write(folder):
            pytest.fail("the block ran")
    assert names(tmp_path) == ["out"]


def test_a_device_is_refused_and_not_replaced():
    with pytest.raises(HeadprofError, match="is a device"), atomic_write(os.devnull):
        pytest.fail("the block ran")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
        with pytest.raises(HeadprofError, match="one of its folders is a file"), atomic_write(path):
            pytest.fail("the block ran")


def test_a_name_that_is_too_long_is_refused_before_any_work(tmp_path):
    with pytest.raises(HeadprofError, match="too long"), atomic_write(tmp_path / ("x" * 300)):
        pytest.fail("the block ran")
    assert names(tmp_path) == []


def test_a_denied_folder_says_so(tmp_path, monkeypatch):
    def denied(self, *args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(HeadprofError, match=r"Permission to write .*a is denied"), atomic_write(tmp_path / "a"):
        pytest.fail("the block ran")


def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    target = tmp_path / "kept.txt"
    target.write_text("kept")
    # A test run as root may write anything, so the answer of the system is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(HeadprofError, match="Permission"), atomic_write(target):
        pytest.fail("the block ran")
    assert target.read_text() == "kept"


def test_permissions_follow_the_umask_or_the_file_that_is_replaced(tmp_path):
    target = tmp_path / "x.safetensors"
    previous = os.umask(0o027)
    try:
        for expected in (0o640, 0o604):
            # The library renames a file of its own, with mode 0600, over the one it is given.
            with atomic_write(target) as temporary:
                save_file({"a": torch.zeros(3)}, temporary)
            assert stat.S_IMODE(target.stat().st_mode) == expected
            target.chmod(0o604)
    finally:
        os.umask(previous)


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


LIMITED = """
import sys, torch
from safetensors.torch import save_file
from headprof.errors import HeadprofError
from headprof.utils.files import atomic_write, check_writable, remove_leftovers
try:
    with atomic_write(sys.argv[1]) as temporary:
        if sys.argv[2] == "rust":
            save_file({"a": torch.zeros(100_000)}, temporary)
        else:
            temporary.write_bytes(b"a" * 400_000)
except HeadprofError as error:
    print(error)
"""


@pytest.mark.parametrize("writer", ["rust", "python"])
def test_a_real_refusal_of_the_system_is_explained(tmp_path, writer):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "big"), writer],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.stdout.startswith(f"{tmp_path / 'big'} would be larger than this disk or account allows"), done.stderr
    assert names(tmp_path) == []


def test_importing_does_not_load_torch():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, headprof.utils.files, headprof.profile, headprof.plots; print(*sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "matplotlib", "transformers"}.intersection(done.stdout.split())


def test_whether_a_file_can_be_written_is_found_out_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old").write_text("kept")
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
    with pytest.raises(HeadprofError, match="is a folder: choose the name of a file"):
        check_writable(tmp_path / "new")


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".a.safetensors.0123.partial").write_text("")
    (tmp_path / ".b.safetensors.0123.partial").write_text("")
    (tmp_path / "a.safetensors").write_text("")
    remove_leftovers(tmp_path / "a.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", ".b.safetensors.0123.partial"}
