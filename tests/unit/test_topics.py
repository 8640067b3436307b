"""Topic names and filters are those of the MQTT specification, and each device has its own where it is to."""

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.topics import at_device, check_filter, check_name, matches


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/+/c", "a/b/c", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("+", "a", True),
        ("+", "/a", False),
        ("+/+", "/a", True),
        ("#", "$SYS/uptime", False),
        ("+/uptime", "$SYS/uptime", False),
        ("$SYS/#", "$SYS/uptime", True),
        ("$share/boxes/a/+", "a/b", True),
        ("$share/boxes/a/+", "$share/boxes/a/b", False),
        ("$share/boxes//a", "/a", True),
        ("$share/boxes/#", "$SYS/uptime", False),
    ],
)
def test_filters_match_as_the_mqtt_specification_says(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@pytest.mark.parametrize("topic", ["a", "/", "/a//b/", "edged/{device}/status", "Größe/°C", "a" * 65_535])
def test_what_can_be_published_to_is_a_filter_too(topic: str) -> None:
    assert check_name(topic) == topic
    assert check_filter(topic) == topic


@pytest.mark.parametrize(
    "topic_filter", ["#", "+", "+/+", "a/#", "/#", "a/+/b", "$share/boxes/a/#", "$share/g//", "$SYS/#"]
)
def test_filters_of_the_specification_are_taken(topic_filter: str) -> None:
    assert check_filter(topic_filter) == topic_filter


@pytest.mark.parametrize(
    ("topic_filter", "words"),
    [
        ("a/#/b", "put it last and alone"),
        ("a/b#", "put it last and alone"),
        ("#/#", "put it last and alone"),
        ("a/##", "put it last and alone"),
        ("a+/b", "alone between slashes"),
        ("a/++", "alone between slashes"),
        ("$share", "\\$share/GROUP/FILTER"),
        ("$share/boxes", "\\$share/GROUP/FILTER"),
        ("$share/boxes/", "\\$share/GROUP/FILTER"),
        ("$share//a", "\\$share/GROUP/FILTER"),
        ("$share/+/a", "\\$share/GROUP/FILTER"),
        ("$share/boxes/a/#/b", "put it last and alone"),
    ],
)
def test_a_filter_that_brokers_refuse_is_refused_with_what_to_write(topic_filter: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_filter(topic_filter)


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("", "name a topic"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("°" * 32_768, "65536 bytes"),
        ("edged/{devcie}/status", "{device} is all"),
    ],
)
def test_what_is_no_topic_at_all_is_refused_with_what_to_do(topic: str, words: str) -> None:
    for check in (check_name, check_filter):
        with pytest.raises(ValueError, match=words):
            check(topic)


@pytest.mark.parametrize("topic", ["a/+", "a/#", "a+", "#"])
def test_nothing_is_published_to_a_wildcard(topic: str) -> None:
    with pytest.raises(ValueError, match="takes no wildcard"):
        check_name(topic)


@given(st.lists(st.sampled_from(["a", "b", "+", "#", "", "a+", "$share"]), min_size=1, max_size=5).map("/".join))
def test_every_filter_taken_can_be_compared_and_paho_takes_it_too(topic_filter: str) -> None:
    try:
        check_filter(topic_filter)
    except ValueError:
        return
    assert paho.Client._filter_wildcard_len_check(topic_filter.encode()) == paho.MQTT_ERR_SUCCESS
    assert matches(topic_filter, "a/b") in (True, False)


def test_a_devices_name_is_filled_in_as_one_level() -> None:
    assert at_device("edged/{device}/status", "pump/7+#") == "edged/pump-7--/status"
    assert at_device("edged/status", "pump") == "edged/status"
