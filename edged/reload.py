"""A new configuration while the daemon runs: all of it is valid, or the one before stays in force."""

import asyncio
from collections.abc import Callable

import structlog

from edged.config import Config, differences
from edged.errors import EdgedError
from edged.runtime import health as conditions
from edged.runtime.health import Health
from edged.runtime.notify import Notifier

Apply = Callable[[Config], None]


class Reloader:
    """Reads the configuration again when asked and hands it to those who can use it at once.

    ``read`` blocks and raises :class:`EdgedError`. :meth:`run` is one supervised service.
    """

    def __init__(self, started_with: Config, read: Callable[[], Config], notifier: Notifier) -> None:
        self._started_with = started_with
        self._in_force = started_with
        self._read = read
        self._notifier = notifier
        self._users: list[Apply] = []
        self._asked = asyncio.Event()
        self._log = structlog.get_logger("reload")

    @property
    def config(self) -> Config:
        """The one in force, as far as its settings can change while the daemon runs."""
        return self._in_force

    def on_change(self, apply: Apply) -> None:
        """Call ``apply`` with each new configuration, of which it uses what is marked live. It must not fail."""
        self._users.append(apply)

    def request(self) -> None:
        """Read it again, soon: a signal handler calls this."""
        self._asked.set()

    async def run(self, health: Health) -> None:
        """Reload whenever asked, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._notifier.reloading()
            try:
                await self._reload(health)
            finally:
                self._notifier.ready()

    async def _reload(self, health: Health) -> None:
        try:
            new = await asyncio.to_thread(self._read)
        except EdgedError as error:
            self._log.error("reload_refused", reason=error.message, hint=error.hint)
            health.set(conditions.CONFIG_REFUSED, error.message)
            return
        changed = [name for name, live in differences(self._in_force, new) if live]
        if changed:
            for apply in self._users:
                apply(new)
        self._in_force = new
        health.clear(conditions.CONFIG_REFUSED)
        waiting = self._say_what_waits(new, health)
        self._log.info("reloaded", changed=changed, restart_needed=waiting)

    def _say_what_waits(self, new: Config, health: Health) -> list[str]:
        waiting = [name for name, live in differences(self._started_with, new) if not live]
        if waiting:
            health.set(conditions.RESTART_NEEDED, f"changed, but read at the start only: {', '.join(waiting)}")
        else:
            health.clear(conditions.RESTART_NEEDED)
        return waiting
