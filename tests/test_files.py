"""Files are whole: the old one or the new one."""

import errno

import pytest

from eupe_jax import files


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    files.write_whole(path, "ä")
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_whole(path, "old")

    def full(partial):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write tells it: of no file

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'") as caught:
        files.write_whole(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.write_whole(tmp_path / "nowhere" / "b", "new")


def test_a_folder_gets_its_name_when_all_in_it_is_on_the_disk(tmp_path, monkeypatch):
    partial, path = tmp_path / ".x.partial", tmp_path / "x"
    (partial / "a").mkdir(parents=True)
    (partial / "a" / "b").write_text("content")
    flushed, flush = [], files.flush

    def noted(each):
        flushed.append(str(each.relative_to(tmp_path)))
        flush(each)

    monkeypatch.setattr(files, "flush", noted)
    files.move_whole(partial, path)
    assert sorted(flushed[:-1]) == [".x.partial", ".x.partial/a", ".x.partial/a/b"] and flushed[-1] == "."
    assert (path / "a" / "b").read_text() == "content" and not partial.exists()
