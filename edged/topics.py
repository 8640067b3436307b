"""MQTT's topic names and filters (MQTT 5.0, section 4.7), and the place of a device's name in them. Pure."""

import re

LONGEST_BYTES = 65_535  # section 1.5.4
DEVICE = "{device}"

_SHARED = "$share"
_PLACEHOLDER = re.compile(r"\{[A-Za-z_]+\}")
# U+0000 is forbidden; brokers may hang up on the other control characters too (section 1.5.4), and mosquitto does.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MARKS = str.maketrans("/+#", "---")


def check_name(topic: str) -> str:
    """The same topic; ``ValueError`` says why nothing can be published to it."""
    _check_text(topic)
    if "+" in topic or "#" in topic:
        raise ValueError("it is published to and takes no wildcard: leave + and # out")
    return topic


def check_filter(topic_filter: str) -> str:
    """The same filter; ``ValueError`` says why it cannot be subscribed to."""
    _check_text(topic_filter)
    levels = _levels(topic_filter)
    if any("+" in level and level != "+" for level in levels):
        raise ValueError("+ stands for one whole level: put it alone between slashes, as in plant/+/alarm")
    if any("#" in level for level in levels[:-1]) or ("#" in levels[-1] and levels[-1] != "#"):
        raise ValueError("# stands for all further levels: put it last and alone, as in plant/#")
    return topic_filter


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic falls under a filter with ``+`` and ``#``, which may be a shared subscription."""
    wanted, levels = _levels(topic_filter), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(levels) or level not in ("+", levels[index]):
            return False
    return len(wanted) == len(levels)


def at_device(topic: str, device: str) -> str:
    """The topic with ``{device}`` filled in: what would be a level or a wildcard in the name is a hyphen there."""
    return topic.replace(DEVICE, device.translate(_MARKS))


def _levels(topic_filter: str) -> list[str]:
    """The levels that topics are compared with: without ``$share/GROUP/`` (section 4.8.2). Raises ``ValueError``."""
    levels = topic_filter.split("/")
    if levels[0] != _SHARED:
        return levels
    group, *rest = levels[1:] or [""]
    if not group or "+" in group or "#" in group or not "/".join(rest):
        raise ValueError("a shared subscription is $share/GROUP/FILTER, and its group has no wildcard")
    return rest


def _check_text(topic: str) -> None:
    if not topic:
        raise ValueError("it is empty: name a topic")
    if len(topic.encode()) > LONGEST_BYTES:
        raise ValueError(f"it has {len(topic.encode())} bytes: MQTT takes {LONGEST_BYTES} at most")
    if control := _CONTROL.search(topic):
        raise ValueError(f"it holds the control character {control[0]!r}, on which brokers hang up: remove it")
    if other := next((found for found in _PLACEHOLDER.findall(topic) if found != DEVICE), None):
        raise ValueError(f"{other} is not filled in: {DEVICE} is all that can be")
