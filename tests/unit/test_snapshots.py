"""States on disk: given back as they were, and never trusted when anything about them is different."""

from pathlib import Path

import pytest

from edged.engine.prefix import State, token_array
from edged.engine.snapshots import MOST_FILES, Snapshots


def state(number: int = 1) -> State:
    return State(token_array([number, 2, 3]), b"some state", prompt_tokens=3)


def written(folder: Path, number: int = 1, owner: str = "model a") -> Path:
    """Save in the foreground, for the test to see the end of it."""
    Snapshots(folder, owner)._write(state(number))
    (path,) = folder.glob("*.kv")
    return path


def loaded(folder: Path, owner: str = "model a") -> list[State]:
    return list(Snapshots(folder, owner).load())


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path)
    (back,) = loaded(tmp_path)
    assert (list(back.tokens), back.data, back.prompt_tokens) == ([1, 2, 3], b"some state", 3)
    assert path.stat().st_mode & 0o077 == 0


def test_the_state_of_another_model_or_build_is_ignored(tmp_path: Path) -> None:
    written(tmp_path)
    assert loaded(tmp_path, owner="model b") == []


@pytest.mark.parametrize("at", [0, 9, 50, 72, 80, -1])
def test_one_wrong_byte_anywhere_and_the_file_is_ignored(tmp_path: Path, at: int) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert loaded(tmp_path) == []


@pytest.mark.parametrize("length", [0, 10, 76, 80, 90])
def test_a_cut_file_is_ignored(tmp_path: Path, length: int) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert loaded(tmp_path) == []


def test_only_the_newest_files_are_kept(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, "model a")
    for number in range(MOST_FILES + 3):
        snapshots._write(state(number))
    assert len(list(tmp_path.iterdir())) == MOST_FILES


def test_a_folder_that_is_not_there_holds_nothing_and_one_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    assert loaded(tmp_path / "none") == []
    (tmp_path / "file").write_text("in the way")
    Snapshots(tmp_path / "file" / "folder", "model a")._write(state())
