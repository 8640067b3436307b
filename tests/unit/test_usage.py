"""Memory and page faults of a process as /proc tells them."""

import os
from pathlib import Path

import psutil

from edged.hardware.usage import Usage, parse_stat, read_usage

RECORDED = (
    "17683 (python) R 17678 17678 28205 0 -1 4194304 12049 0 6 0 20 2 0 0 35 15 2 0 1255588 280686592 38878 "
    "18446744073709551615 94524975357952 94524975358293 140726857357104 0 0 0 0 16781312 2 0 0 0 17 1 0 0 0 0 0 "
    "94524975369648 94524975370264 94525917294592 140726857357949 140726857358044 140726857358044 140726857359326 0\n"
)


def test_resident_memory_and_both_kinds_of_faults_are_read_from_their_fields() -> None:
    assert parse_stat(RECORDED, page_bytes=4096) == Usage(38878 * 4096, minor_faults=12049, major_faults=6)


def test_pages_of_16_kilobytes_count_as_such() -> None:
    assert parse_stat(RECORDED, page_bytes=16384).resident_bytes == 38878 * 16384


def test_a_name_with_spaces_and_parentheses_shifts_no_field() -> None:
    assert parse_stat(RECORDED.replace("(python)", "(a) b (c)"), page_bytes=1) == parse_stat(RECORDED, page_bytes=1)


def test_this_process_is_as_large_as_others_say_it_is() -> None:
    usage = read_usage(os.getpid())
    assert usage is not None
    assert abs(usage.resident_bytes - psutil.Process().memory_info().rss) < 32 * 1024 * 1024
    assert usage.minor_faults > 0


def test_a_process_that_is_gone_uses_nothing(tmp_path: Path) -> None:
    assert read_usage(1, tmp_path) is None
