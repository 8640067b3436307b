"""When an eight-bit copy of a model is made, kept and found."""

import os
import sys
from pathlib import Path

import msgspec
import pytest

from edged.errors import ChecksumError, ModelError
from edged.models import wide
from edged.models.gguf import read_header
from edged.types import TokenSeconds, Trial
from tests.gguf_files import gguf_bytes

F32, Q4_0, Q4_1 = 0, 2, 3
IDENTITY = "m@0123456789abcdef"
FASTER = Trial(file=TokenSeconds(prompt=0.003, answer=0.008), copy=TokenSeconds(prompt=0.0015, answer=0.008))
NO_FASTER = Trial(file=TokenSeconds(prompt=0.003, answer=0.008), copy=TokenSeconds(prompt=0.0029, answer=0.0085))
SLOWER_ANSWERS = Trial(file=TokenSeconds(prompt=0.010, answer=0.060), copy=TokenSeconds(prompt=0.009, answer=0.090))


def model_file(path: Path, *kinds: tuple[int, int]) -> Path:
    tensors = [(f"t{number}", (32, 100), kind, size * 100) for number, (kind, size) in enumerate(kinds)]
    path.write_bytes(gguf_bytes(tensors=tensors))
    return path


def command(trial: Trial) -> tuple[str, ...]:
    """A child that writes a copy and says what was measured."""
    said = msgspec.json.encode(trial).decode()
    script = f"import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2]); print({said!r})"
    return (sys.executable, "-c", script)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return model_file(tmp_path / "m.gguf", (Q4_1, 20), (F32, 128))


def test_only_weights_without_fast_kernels_are_copied(tmp_path: Path) -> None:
    slow = read_header(model_file(tmp_path / "slow", (Q4_1, 20), (Q4_1, 20), (Q4_0, 18)))
    fast = read_header(model_file(tmp_path / "fast", (Q4_1, 20), (Q4_0, 18), (Q4_0, 18)))
    size = wide.size(slow)
    assert size == 3 * 100 * 34
    assert wide.unsuitable(slow, memory_bytes=4 * size, available_bytes=2 * size) == ""
    assert wide.unsuitable(slow, memory_bytes=None, available_bytes=None) == ""
    assert "a quarter of" in wide.unsuitable(slow, memory_bytes=4 * size - 4, available_bytes=2 * size)
    assert "free now" in wide.unsuitable(slow, memory_bytes=4 * size, available_bytes=2 * size - 2)
    assert "fast as they are" in wide.unsuitable(fast, memory_bytes=None, available_bytes=None)


@pytest.mark.parametrize(("trial", "kept"), [(FASTER, True), (NO_FASTER, False), (SLOWER_ANSWERS, False)])
def test_a_copy_is_kept_where_a_typical_answer_is_there_sooner(
    tmp_path: Path, file: Path, trial: Trial, kept: bool
) -> None:
    copies = wide.Copies(tmp_path / "wide")
    assert copies.make(IDENTITY, file, 2, {}, command(trial)).kept is kept
    found = copies.find(IDENTITY)
    assert (found is not None and found.read_bytes() == file.read_bytes()) is kept
    tried = copies.tried(IDENTITY)
    assert tried is not None and tried.trial == trial


def test_a_copy_that_is_not_the_one_that_was_tried_is_not_used(tmp_path: Path, file: Path) -> None:
    copies = wide.Copies(tmp_path / "wide")
    assert copies.find(IDENTITY) is None
    copies.make(IDENTITY, file, 2, {}, command(FASTER))
    copy = copies.find(IDENTITY)
    assert copy is not None
    with copy.open("r+b") as damaged:
        damaged.seek(-1, 2)
        damaged.write(b"!")
    assert copies.find(IDENTITY) is None  # its time tells
    copy.unlink()
    assert copies.find(IDENTITY) is None
    copies.make(IDENTITY, file, 2, {}, command(FASTER))
    assert copies.find(IDENTITY) == copy


def test_a_copy_that_rotted_on_the_disk_is_found_when_it_is_read(tmp_path: Path, file: Path) -> None:
    copies = wide.Copies(tmp_path / "wide")
    copies.verify(IDENTITY)
    copies.make(IDENTITY, file, 2, {}, command(FASTER))
    copies.verify(IDENTITY)
    copy = copies.find(IDENTITY)
    assert copy is not None
    status = copy.stat()
    with copy.open("r+b") as damaged:
        damaged.seek(-1, 2)
        damaged.write(b"!")
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ChecksumError) as rotted:
        copies.verify(IDENTITY)
    assert "edged models widen m'" in rotted.value.hint


def test_a_trial_that_fails_leaves_the_copy_from_before(tmp_path: Path, file: Path) -> None:
    copies = wide.Copies(tmp_path / "wide")
    copies.make(IDENTITY, file, 2, {}, command(FASTER))
    for script in ("raise SystemExit('no memory')", "print('garbage')"):
        with pytest.raises(ModelError):
            copies.make(IDENTITY, file, 2, {}, (sys.executable, "-c", script))
    assert copies.find(IDENTITY) is not None


def test_another_llama_cpp_is_tried_anew(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = wide.Copies(tmp_path / "wide")
    copies.make(IDENTITY, file, 2, {}, command(FASTER))
    monkeypatch.setattr(wide, "version", lambda _package: "0.0.0")
    assert copies.tried(IDENTITY) is None and copies.find(IDENTITY) is None


def test_the_copy_of_an_earlier_file_of_the_model_goes(tmp_path: Path, file: Path) -> None:
    copies = wide.Copies(tmp_path / "wide")
    copies.make(IDENTITY, file, 2, {}, command(FASTER))
    copies.make("m@2@0123456789abcdef", file, 2, {}, command(FASTER))
    copies.make("m@fedcba9876543210", file, 2, {}, command(FASTER))
    assert copies.find(IDENTITY) is None
    assert copies.find("m@2@0123456789abcdef") and copies.find("m@fedcba9876543210")


def test_the_copy_of_an_earlier_file_goes_also_where_none_is_made_of_the_new_one(tmp_path: Path, file: Path) -> None:
    copies = wide.Copies(tmp_path / "wide")
    copies.drop_former(IDENTITY)  # nothing was ever copied here
    for identity in (IDENTITY, "m@2@0123456789abcdef"):
        copies.make(identity, file, 2, {}, command(FASTER))
    copies.drop_former(IDENTITY)
    assert copies.find(IDENTITY) is not None
    copies.drop_former("m@fedcba9876543210")
    copies.drop("n")
    assert {each.stem for each in (tmp_path / "wide").iterdir() if "@" in each.name} == {"m@2@0123456789abcdef"}
    copies.drop("m@2")
    assert not [each for each in (tmp_path / "wide").iterdir() if "@" in each.name]


def test_a_child_that_fails_leaves_nothing_and_says_why(tmp_path: Path, file: Path) -> None:
    script = "import sys; open(sys.argv[2], 'wb').write(b'half'); sys.exit('no memory')"
    copies = wide.Copies(tmp_path / "wide")
    with pytest.raises(ModelError, match="no memory") as failed:
        copies.make(IDENTITY, file, 2, {}, (sys.executable, "-c", script))
    assert "used as it is" in failed.value.hint
    assert copies.tried(IDENTITY) is None
    assert [left.name for left in (tmp_path / "wide").iterdir()] == [".lock"]
