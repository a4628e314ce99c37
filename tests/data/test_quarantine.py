"""Bad samples are left out, counted and written down, and what stands in for one depends on nothing but its place."""

import json
import logging
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.data.quarantine import Quarantined
from latteflow.data.sources import open_source
from latteflow.data.sources.source import BadSample, picture_of, read_file
from latteflow.errors import UserError
from picture_sets import BROKEN, ListSource, picture, write_image_folder

PICTURE = picture(0)


def source_of(bad: list[bool]) -> ListSource:
    return ListSource({f"{i:03d}": None if one else PICTURE for i, one in enumerate(bad)})


def lines(folder):
    file = folder / "quarantine.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("name", BROKEN)
def test_no_broken_file_gets_through(name):
    began = time.process_time()
    with pytest.raises(BadSample) as found:
        picture_of(BROKEN[name])
    assert time.process_time() - began < 1  # a bomb is not unpacked first
    assert "0x" not in str(found.value)  # the same words every time
    with pytest.raises(BadSample) as again:
        picture_of(BROKEN[name])
    assert str(again.value) == str(found.value)


@pytest.mark.filterwarnings("ignore")  # as outside of tests, where Pillow only warns
def test_a_large_picture_is_not_decoded_to_find_out():
    with pytest.raises(BadSample, match="more than 89,478,485 pixels"):
        picture_of(BROKEN["large.png"])


def test_reasons_say_what_is_wrong():
    def reason(name):
        with pytest.raises(BadSample) as found:
            picture_of(BROKEN[name])
        return str(found.value)

    assert reason("empty.png") == "empty"
    assert reason("text.png") == "not a PNG, JPEG, WebP, GIF or BMP picture"
    assert reason("cut.jpg").startswith("broken: image file is truncated")
    assert reason("bomb.png") == reason("large.png") == "more than 89,478,485 pixels"
    assert reason("line.png") == "900 by 100 pixels: more than 8 to 1"


def test_a_machine_at_fault_is_no_bad_sample(monkeypatch, tmp_path):
    import errno
    from pathlib import Path

    def fail(number):
        def read(self):
            raise OSError(number, "why")

        monkeypatch.setattr(Path, "read_bytes", read)

    for number in (errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM):
        fail(number)
        with pytest.raises(OSError, match="why"):
            read_file(tmp_path / "x")
    for number in (errno.ENOENT, errno.EACCES, errno.EIO, errno.EISDIR):
        fail(number)
        with pytest.raises(BadSample):
            read_file(tmp_path / "x")


def test_every_broken_file_is_listed_and_replaced(tmp_path, caplog):
    folder = write_image_folder(tmp_path / "set", {"cat": 3})
    for name, data in BROKEN.items():
        (folder / "cat" / name).write_bytes(data)
    source = Quarantined(open_source("image_folder", folder), tmp_path / "run", limit=0.9)
    assert len(source) == 3 + len(BROKEN)
    with caplog.at_level(logging.WARNING):
        found = [source.resolve(i, epoch=0)[0] for i in range(len(source))]
    names = [source.name(i) for i in range(len(source))]
    assert {names[i] for i in found} <= {f"cat/{i:03d}.png" for i in range(3)}
    listed = lines(tmp_path / "run")
    assert sorted(entry["name"] for entry in listed) == sorted(f"cat/{name}" for name in BROKEN)
    assert source.bad == {entry["name"]: entry["reason"] for entry in listed}
    assert len(caplog.records) == len(BROKEN)
    assert list((tmp_path / "set").iterdir()) == [tmp_path / "set" / "cat"]  # nothing beside the user's data


@settings(max_examples=40, deadline=None)
@given(
    bad=st.lists(st.booleans(), min_size=2, max_size=30).filter(lambda bad: not all(bad)),
    order=st.randoms(use_true_random=False),
    epoch=st.integers(0, 10**6),
)
def test_what_stands_in_depends_on_epoch_and_index_alone(tmp_path_factory, bad, order, epoch):
    """Not on what was read before, nor on who knows of which bad sample already."""
    one = Quarantined(source_of(bad), tmp_path_factory.mktemp("one"), limit=1)
    other = Quarantined(source_of(bad), tmp_path_factory.mktemp("other"), limit=1)
    places = list(range(len(bad)))
    straight = {i: one.resolve(i, epoch)[0] for i in places}
    order.shuffle(places)
    for i in places:
        other.resolve(order.choice(places), order.randrange(5))  # a past of its own
        assert other.resolve(i, epoch)[0] == straight[i]
    for i, found in straight.items():
        assert not bad[found]
        assert bad[i] or found == i
    late = Quarantined(source_of(bad), one.file.parent, limit=1)  # a resumed run, which knows all from the file
    assert {i: late.resolve(i, epoch)[0] for i in places} == straight
    assert not any(bad[i] for i in late.source.reads)  # and does not try them again


def test_replacements_differ_by_epoch_and_index(tmp_path):
    source = Quarantined(source_of([True] * 20 + [False] * 200), tmp_path, limit=1)
    by_epoch = [[source.resolve(i, epoch)[0] for i in range(20)] for epoch in range(4)]
    assert len({tuple(found) for found in by_epoch}) == 4
    assert len(set(by_epoch[0])) > 10
    again = Quarantined(source_of([True] * 20 + [False] * 200), tmp_path / "again", limit=1)
    assert [again.resolve(i, 0)[0] for i in range(20)] == by_epoch[0]


def test_the_replacements_are_the_same_for_ever(tmp_path):
    """A run resumed with a later version goes on with the same samples: these numbers must not change."""
    source = Quarantined(source_of([True, True] + [False] * 98), tmp_path, limit=1)
    assert [source.resolve(i, epoch)[0] for i in range(2) for epoch in range(3)] == [99, 15, 16, 90, 12, 25]


def test_only_those_that_may_stand_in(tmp_path):
    source = Quarantined(source_of([True] * 10 + [False] * 30), tmp_path, limit=1)
    among = torch.tensor([2, 3, 15, 20, 33])
    found = {source.resolve(i, epoch, among)[0] for i in range(10) for epoch in range(5)}
    assert found == {15, 20, 33}
    assert source.resolve(11, 0, among)[0] == 11  # which is good
    with pytest.raises(UserError, match="none of the 2 samples can be read"):
        source.read(0, 0, among[:2])


def test_a_bad_sample_for_which_none_stands_in(tmp_path):
    source = Quarantined(source_of([False, True]), tmp_path, limit=1)
    assert source.good(0).caption == "picture 000"
    assert source.good(1) is None
    assert [entry["name"] for entry in lines(tmp_path)] == ["001"]


def test_past_the_limit_the_run_stops(tmp_path):
    bad = [i in (3, 7, 9) for i in range(100)]
    source = Quarantined(source_of(bad), tmp_path, limit=0.02)
    for i in range(9):
        source.read(i, 0)
    assert len(source.bad) == 2  # exactly the limit goes
    with pytest.raises(
        UserError, match=r"3 of 100 samples are bad, .*quarantine_limit=0.02.*009 \(broken on purpose\)"
    ):
        source.read(9, 0)
    with pytest.raises(UserError, match=r"3 of 100 .*quarantine\.jsonl"):
        Quarantined(source_of(bad), tmp_path, limit=0.02)  # a resumed run does not begin
    assert len(Quarantined(source_of(bad), tmp_path, limit=0.03).bad) == 3
    (tmp_path / "quarantine.jsonl").unlink()
    assert not Quarantined(source_of(bad), tmp_path, limit=0.02).bad


def test_nothing_can_be_read(tmp_path):
    with pytest.raises(UserError, match="none of the 3 samples"):
        Quarantined(source_of([True] * 3), tmp_path, limit=1).read(0, 0)


def test_a_line_cut_short_does_no_harm(tmp_path):
    source = Quarantined(source_of([True, True, False]), tmp_path, limit=1)
    source.read(0, 0)
    file = tmp_path / "quarantine.jsonl"
    with file.open("a") as added:
        added.write('{"name": "001", "rea')  # a process killed while it wrote
    late = Quarantined(source_of([True, True, False]), tmp_path, limit=1)
    late.read(1, 0)
    late.read(1, 1)
    last = Quarantined(source_of([True, True, False]), tmp_path, limit=1)
    last.read(1, 0)
    assert set(last.bad) == {"000", "001"}


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path):
    source = Quarantined(source_of([True, True, False]), tmp_path, limit=1)
    with (tmp_path / "quarantine.jsonl").open("a") as other:
        other.write('{"name": "another", "rea')
        other.flush()
        source._catch_up()
        other.write('son": "why"}\n')
    source._catch_up()
    assert source.bad == {"another": "why"}


class Rows(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        found, sample = self.source.resolve(index, epoch=1)
        return found, sample.caption


def test_worker_processes_agree_and_count_together(tmp_path):
    bad = [i % 5 == 0 for i in range(60)]
    alone = [Rows(Quarantined(source_of(bad), tmp_path / "alone", limit=1))[i] for i in range(60)]
    together = Quarantined(source_of(bad), tmp_path / "together", limit=1)
    loader = torch.utils.data.DataLoader(Rows(together), batch_size=None, num_workers=2, collate_fn=lambda row: row)
    assert list(loader) == alone
    assert {entry["name"] for entry in lines(tmp_path / "together")} == {f"{i:03d}" for i in range(0, 60, 5)}


def test_lines_of_several_writers_do_not_mix(tmp_path):
    """Four at the same time, each with the file open for itself; every line is whole and none is lost."""
    start = threading.Barrier(4)

    def write(part):
        source = Quarantined(source_of([True] * 400 + [False]), tmp_path, limit=1)
        start.wait()
        for i in range(part, 400, 4):
            source.good(i)

    writers = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {entry["name"] for entry in lines(tmp_path)} == {f"{i:03d}" for i in range(400)}


def test_processes_reach_the_limit_together(tmp_path):
    """Each of two finds less than the limit by itself."""
    bad = [i < 4 for i in range(100)]
    one, other = (Quarantined(source_of(bad), tmp_path, limit=0.03) for _ in range(2))
    one.read(0, 0)
    other.read(1, 0)
    one.read(2, 0)
    with pytest.raises(UserError, match="4 of 100"):
        other.read(3, 0)
