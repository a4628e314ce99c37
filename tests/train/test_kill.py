"""What a killed process, or a full disk, leaves behind: a checkpoint that is whole, and the straight run's bits."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_loop import Regression, assert_same, newest, recipe

from latteflow.train import checkpoint
from latteflow.train.checkpoint import checkpoint_folders, newest_checkpoint
from latteflow.train.loop import train

HERE = Path(__file__).parent


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save_a_run_goes_on_to_the_same_bits(tmp_path):
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE), str(HERE.parent)]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, HERE / "killed.py", tmp_path], env=environment, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    moments = Counter(each["moment"] for each in found)
    assert moments["before fsync"] == moments["after fsync"] == 7  # four parts, the manifest, two folders
    assert moments["half way save_file"] == 2
    assert moments["half way save"] == 1
    assert moments["half way write_text"] == 2
    assert moments["before replace"] == moments["after replace"] == 1
    assert moments["before unlink"] == 5  # of the oldest checkpoint
    assert {each["signal"] for each in found} == {9}
    assert {each["resumed"] for each in found} == {0}
    renamed = [each["moment"] for each in found].index("after replace")
    assert [each["newest"] for each in found[:renamed]] == ["step-00000004"] * renamed
    assert [each["newest"] for each in found[renamed:]] == ["step-00000006"] * (len(found) - renamed)
    for number in range(1, len(found) + 1):
        assert_same(newest(tmp_path / f"run-{number}"), newest(tmp_path / "straight"))
        kept = sorted(folder.name for folder in (tmp_path / f"run-{number}" / "checkpoints").iterdir())
        assert kept == ["step-00000006", "step-00000008"]  # and no leftovers


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """What a power cut needs: every part, then the manifest, then the folder, then the name, then the folder's own."""
    done, names = [], {}
    open_, fsync, replace = os.open, os.fsync, os.replace

    def named(path, *given, **settings):
        descriptor = open_(path, *given, **settings)
        names[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", named)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(names[descriptor]), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(f"{old.name} {new.name}"), replace(old, new)))
    checkpoint.save_checkpoint(tmp_path, 3, model={}, ema={}, optimizer={}, state={}, keep=2)
    assert set(done[:4]) == {"model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"}
    partial = ".step-00000003.partial"
    assert done[4:] == ["manifest.json", partial, f"{partial} step-00000003", "checkpoints"]


def test_leftovers_of_killed_processes_are_removed_and_the_rest_is_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in (".step-00000003.partial", "step-00000004", "step-00000099", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    for step in (5, 10, 15):
        checkpoint.save_checkpoint(tmp_path, step, model={}, ema={}, optimizer={}, state={}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "step-00000010", "step-00000015"]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_new_one(tmp_path):
    for step in (5, 20, 25):
        checkpoint.save_checkpoint(tmp_path, step, model={}, ema={}, optimizer={}, state={}, keep=3)
    for folder in checkpoint_folders(tmp_path)[1:]:
        (folder / "state.json").write_text("{")
    checkpoint.save_checkpoint(tmp_path, 10, model={}, ema={}, optimizer={}, state={}, keep=2)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000005", "step-00000010"]
    assert newest_checkpoint(tmp_path).name == "step-00000010"


WIDE = 5000
"""Outputs of a regression whose checkpoint has about 320 kB, half of them in one file."""
FULL = {"steps": 12, "checkpoint_every": 2, "preview_every": 99, "keep_checkpoints": 2}


@contextlib.contextmanager
def small_disk(folder):
    """Mount a disk that holds two checkpoints and not three; yields what enlarges it, None where that is refused."""
    folder.mkdir()

    def mount(options):
        try:
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    if not mount("size=800k"):
        yield None
        return
    try:
        yield lambda: mount("remount,size=8m")
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def small_files():
    """Let no file grow beyond 100 kB: writing fails as on a full disk. Yields what lifts the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_out_of_space(output, room, caplog, message, kept):
    """Train; make room after step 7; look at what is there when the save of step 6 has failed."""
    found = []

    def watch(progress):
        if progress.step == 6:
            found.append([folder.name for folder in (output / "checkpoints").glob("*")])
        if progress.step == 7:
            room()

    train(recipe(output, **FULL), Regression(WIDE), watch=watch)
    assert [sorted(names) for names in found] == [kept]
    said = [record.message for record in caplog.records if "step-00000006" in record.message]
    assert len(said) == 1
    assert re.search(rf"step-00000006 cannot be written: .*{message}.*; the last good checkpoint is kept", said[0])
    train(recipe(output.parent / "straight", **FULL), Regression(WIDE))
    assert_same(newest(output), newest(output.parent / "straight"))


def test_a_full_disk_is_said_and_the_last_good_checkpoint_kept(tmp_path, caplog):
    """A real disk where one can be mounted, else the limit on the size of files, reached from the third save on."""
    with contextlib.ExitStack() as stack:
        disk = tmp_path / "disk"
        room = stack.enter_context(small_disk(disk))
        if room is None:
            run_into_the_limit(disk, caplog)
        else:
            kept = ["step-00000002", "step-00000004"]
            run_out_of_space(disk / "run", room, caplog, "No space left on device", kept)
            shutil.rmtree(disk / "run")


def run_into_the_limit(folder, caplog):
    with small_files() as room:
        run_out_of_space(folder / "run", room, caplog, "File too large", [])


def test_a_limit_on_files_is_said_and_training_goes_on(tmp_path, caplog):
    run_into_the_limit(tmp_path, caplog)


def test_a_disk_that_stays_full_ends_the_run_with_an_error_and_room_lets_it_go_on(tmp_path):
    with small_files() as room:
        with pytest.raises(OSError, match=r"step-00000012 cannot be written: .*File too large"):
            train(recipe(tmp_path / "run", **FULL), Regression(WIDE))
        assert not (tmp_path / "run" / "final").exists()
        room()
    train(recipe(tmp_path / "run", **FULL), Regression(WIDE))
    train(recipe(tmp_path / "straight", **FULL), Regression(WIDE))
    assert_same(newest(tmp_path / "run"), newest(tmp_path / "straight"))


def test_a_preview_that_cannot_be_written_is_said_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "previews").write_text("in the way")
    train(recipe(tmp_path), Regression())
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 2
    assert re.search(r"step-00000010\.png cannot be written .*; training goes on", said[0])
    assert (tmp_path / "final").is_dir()
