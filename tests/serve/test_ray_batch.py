"""Pictures by the list: the same files whoever drew them, however often they were stopped."""

import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import toys
from latteflow.errors import UserError
from latteflow.serve.deploy import batch as module
from latteflow.serve.deploy.batch import BatchWork, draw_batch
from latteflow.serve.deploy.prompt_rows import BadRow, PromptRow

PATIENCE = 300  # on a busy machine, Ray's workers take a minute to start
ROWS = [PromptRow(i, f"a red circle {i}", 100 + i) for i in range(11) if i != 3]


@pytest.fixture
def work(saved_pipeline, tmp_path):
    def made(name="out", **settings):
        settings = {"steps": 2, "batch_size": 2, "shard_size": 4, "rows": ROWS, **settings}
        return BatchWork(tmp_path / name, model=str(saved_pipeline), **settings)

    return made


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_picture_a_row_as_the_pipeline_draws_it(work):
    done = []
    bad = [BadRow(3, "no prompt")]
    folder = draw_batch(work(), bad, watch=done.append)
    assert done == [3, 4, 3]
    assert {name for name in files(folder) if name.endswith(".png")} == {
        f"{row.row // 4:05d}/{row.row:08d}.png" for row in ROWS
    }
    assert json.loads((folder / "bad-rows.json").read_text()) == [{"row": 3, "reason": "no prompt"}]
    with Image.open(folder / "00001" / "00000006.png") as picture:
        assert (picture.text["prompt"], picture.text["seed"], picture.text["steps"]) == ("a red circle 6", "106", "2")
        expected = toys.toy_pipeline()("a red circle 6", num_inference_steps=2, generator=toys.seeded(106)).images[0]
        assert np.abs(np.asarray(picture, np.int16) - np.asarray(expected, np.int16)).max() <= 1


def test_what_is_there_is_not_drawn_again(work, monkeypatch):
    drawn = []
    draw = BatchWork._draw
    monkeypatch.setattr(BatchWork, "_draw", lambda self, at, rows: (drawn.append(rows[0].row), draw(self, at, rows)))
    folder = draw_batch(work())
    assert drawn == [0, 2, 4, 6, 8, 10]
    before = files(folder)
    (folder / ".00001.1.partial").mkdir()
    draw_batch(work())
    assert len(drawn) == 6
    (folder / "00000" / "00000001.png").write_bytes(b"damaged")
    (folder / "00001" / "00000005.png").unlink()
    (folder / "00002" / "shard.json").write_text("{")
    done = []
    draw_batch(work(), watch=done.append)
    assert len(drawn) == 12
    assert done == [3, 4, 3]
    assert files(folder) == before


def test_rows_may_be_added_but_not_changed(work):
    folder = draw_batch(work(rows=ROWS[:3]))
    before = files(folder)
    draw_batch(work(rows=ROWS))
    assert before.items() <= files(folder).items()
    for changed in ({"rows": [PromptRow(0, "another", 100)]}, {"steps": 3}, {"guidance_scale": 1.0}, {"batch_size": 1}):
        with pytest.raises(UserError, match="was drawn from other rows or with other settings"):
            draw_batch(work(**changed))


def test_other_weights_are_other_settings(work, monkeypatch):
    draw_batch(work())
    load = module.load_pipeline

    def changed(*asked):
        pipe = load(*asked)
        with torch.no_grad():
            next(pipe.transformer.parameters()).add_(1)
        return pipe

    monkeypatch.setattr(module, "load_pipeline", changed)
    with pytest.raises(UserError, match="with other settings"):
        draw_batch(work())


def test_a_shard_is_whole_or_not_there(work, monkeypatch):
    def broken(self, folder, rows):
        (folder / "half.png").write_bytes(b"half")
        if rows[0].row == 2:
            raise OSError("full")

    monkeypatch.setattr(BatchWork, "_draw", broken)
    with pytest.raises(OSError, match="full"):
        draw_batch(work())
    assert {file.name for file in work().folder.iterdir()} == {"bad-rows.json"}


def test_what_cannot_be_cut(work):
    with pytest.raises(UserError, match="there is no row to draw"):
        work(rows=[])
    with pytest.raises(UserError, match="a shard of 4 is no multiple of a batch of 3"):
        work(batch_size=3)
    with pytest.raises(UserError, match="2 workers are Ray's"):
        draw_batch(work(), workers=2)


def command(place, *words):
    # Its own Ray, wherever this test runs; in a folder of its own, under a short name for its sockets.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": place, "HOME": place}
    return subprocess.Popen(
        [sys.executable, "-m", "latteflow", "batch", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_two_workers_killed_and_started_again_leave_the_files_of_one(saved_pipeline, tmp_path):
    pytest.importorskip("ray")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\n" + "".join(f"circle {i}\n" if i != 5 else '""\n' for i in range(64)))
    asked = [prompts, "--model", saved_pipeline, "--seed", 7, "--steps", 150, "--batch-size", 2, "--shard-size", 4]
    spread = tmp_path / "spread"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as place:
        first = command(place, *asked, "--out", spread, "--ray", "--workers", 2)
        end = time.monotonic() + PATIENCE
        while not list(spread.glob("0*")) and first.poll() is None:
            assert time.monotonic() < end, "nothing was drawn"
            time.sleep(0.02)
        workers = set()
        for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
            if "_Actor" in process.name() or "MapBatches" in " ".join(process.cmdline()):
                workers.add(process.pid)
            process.kill()
        first.communicate()
        shards = {shard.name: os.stat(shard).st_mtime_ns for shard in spread.glob("0*")}
        assert 0 < len(shards) < 16
        again = command(place, *asked, "--out", spread, "--ray", "--workers", 2)
        out, err = again.communicate(timeout=PATIENCE)
        assert again.returncode == 0, err
    assert len(workers) == 2
    assert out == f"pictures: {spread}: 63, 1 rows left out ({spread / 'bad-rows.json'})\n"
    assert all(os.stat(spread / name).st_mtime_ns == when for name, when in shards.items())
    assert len(list(spread.glob("0*"))) == 16
    assert not list(spread.glob(".*"))
    alone = command(str(tmp_path), *asked, "--out", tmp_path / "alone")
    _, err = alone.communicate(timeout=PATIENCE)
    assert alone.returncode == 0, err
    assert files(spread) == files(tmp_path / "alone")
