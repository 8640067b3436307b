"""Model manifests: those that come with edged, and what a wrong one is told."""

from pathlib import Path

import pytest

from edged.errors import ModelError
from edged.models.manifest import (
    FileSource,
    HttpsSource,
    WheelSource,
    load_manifests,
    manifests_directory,
    parse_manifest,
)

GOOD = """
name = "tiny"
kind = "chat"
description = "A tiny model"
licence = "MIT"
context_tokens = 128
file = "tiny.gguf"
size_bytes = 10

[template]
source = "chatml"

[[sources]]
type = "https"
url = "https://example.org/tiny.gguf"
"""


def test_the_manifests_that_come_with_edged_are_valid_and_hold_the_defaults() -> None:
    manifests = load_manifests(manifests_directory())
    assert manifests["smollm2-135m-instruct"].kind == "chat"
    assert manifests["all-minilm-l6-v2"].kind == "embed"
    assert manifests["all-minilm-l6-v2"].convert == "minilm-bert"
    assert manifests["gemma3-270m"].template.source == "plain"
    files = [manifest.file for manifest in manifests.values()]
    assert len(set(files)) == len(files)


def test_sources_keep_their_order_and_type() -> None:
    more = """
[[sources]]
type = "wheel"
parts = [{ package = "a", version = "1", member = "x" }, { package = "b", version = "2", member = "y" }]

[[sources]]
type = "file"
path = "/media/usb/tiny.gguf"
"""
    manifest = parse_manifest(GOOD + more, "tiny.toml")
    assert [type(source) for source in manifest.sources] == [HttpsSource, WheelSource, FileSource]
    wheel = manifest.sources[1]
    assert isinstance(wheel, WheelSource)
    assert [part.package for part in wheel.members] == ["a", "b"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('kind = "chat"', 'kind = "chatty"', "kind"),
        ("size_bytes = 10", "size_byte = 10", "size_byte"),
        ("size_bytes = 10", 'size_bytes = "10"', "size_bytes"),
        ("size_bytes = 10", "size_bytes = 0", "positive"),
        ('name = "tiny"', 'name = "../tiny"', "no model name"),
        ('file = "tiny.gguf"', 'file = "../tiny.gguf"', "no plain name"),
        ('licence = "MIT"', 'licence = "MIT"\nsha256 = "abc"', "no sha256"),
        ("https://example.org", "http://example.org", "no https"),
        ('type = "https"', 'type = "ftp"', "ftp"),
        ('type = "https"\nurl = "https://example.org/tiny.gguf"', 'type = "wheel"\npackage = "a"', "needs package"),
        ('licence = "MIT"', 'licence = "MIT"\nconvert = "minilm-bert"', "belong together"),
        ('source = "chatml"', 'source = "chatml', "manifest tiny.toml"),
    ],
)
def test_a_wrong_manifest_is_told_what_is_wrong(old: str, new: str, reason: str) -> None:
    assert old in GOOD
    with pytest.raises(ModelError, match=reason) as caught:
        parse_manifest(GOOD.replace(old, new), "tiny.toml")
    assert "tiny.toml" in caught.value.message


def test_plain_http_is_taken_from_this_machine_alone() -> None:
    manifest = parse_manifest(GOOD.replace("https://example.org", "http://127.0.0.1:8000"), "tiny.toml")
    assert isinstance(manifest.sources[0], HttpsSource)


def test_a_file_named_unlike_its_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text(GOOD)
    with pytest.raises(ModelError, match="is for 'tiny'"):
        load_manifests(tmp_path)


def test_a_directory_without_manifests_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model manifests"):
        load_manifests(tmp_path)
