"""Looks after the device once a second: heat, memory, neighbours, drift; and lets the workers do as much as is good.

Each has a pure decision of its own in :mod:`edged.hardware`; here they meet, and the smallest limit holds.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog

from edged.hardware.cores import format_list
from edged.hardware.governor import STEPS, Governor, Reading
from edged.hardware.neighbours import Crowd, Neighbours, Scheduled, crowd, read_busy_seconds, read_scheduled, vacant
from edged.hardware.placement import Placement, Strain
from edged.hardware.pressure import Pressure, Stage, Stall, Stalled, Supply, read_stalled, stall, supply
from edged.hardware.thermal import Heat, Zone
from edged.models.rollout import Role
from edged.probe.profile import Profile
from edged.runtime import health as conditions
from edged.runtime.health import ConditionKind, Health
from edged.serving.deviation import Deviation, blame, deviations
from edged.serving.drift import Drifts
from edged.serving.keeper import Keeper, Look
from edged.serving.restraint import Restraint
from edged.serving.tuning import Tuning, combine, untuned
from edged.workers.protocol import Tune
from edged.workers.worker import Worker

OBSERVE_EVERY_SECONDS = 1.0
Workers = Mapping[Role, Sequence[Worker]]
"""The workers of each role, the one that serves it first."""


class HeatLimits(msgspec.Struct, frozen=True, kw_only=True):
    """See ``[hardware]`` in the configuration."""

    throttle_celsius: float
    margin_celsius: float
    hot_max_tokens: int


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """What was read of the device, ``at`` a time of the monotonic clock.

    ``scheduled`` is by process, the daemon and its workers; ``busy_seconds`` those of the chat worker's cores.
    ``profile`` is that of the last second, None where it was seen before or there is none.
    """

    at: float
    available: int | None
    stalled: Stalled | None
    heat: Heat
    scheduled: dict[int, Scheduled]
    busy_seconds: float
    look: Look
    profile: Profile | None = None


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Where readings come from; all may block."""

    available: Callable[[], int | None]
    heat: Callable[[], Heat]
    profile: Callable[[], Profile | None] = lambda: None
    clock: Callable[[], float] = time.monotonic


class Care:
    """One supervised service: :meth:`run`."""

    def __init__(
        self,
        keeper: Keeper,
        workers: Callable[[], Workers],
        restraint: Restraint,
        health: Health,
        sources: Sources,
        heat_limits: HeatLimits,
        *,
        reserve_bytes: int,
    ) -> None:
        self._keeper = keeper
        self._workers = workers
        self._restraint = restraint
        self._health = health
        self._sources = sources
        self._heat_limits = heat_limits
        self._reserve_bytes = reserve_bytes
        self._before: Readings | None = None
        self._tuned: Worker | None = None
        self._tuning: Tuning | None = None
        self._drifts = Drifts()
        self._profile_at = 0.0
        self._log = structlog.get_logger("care")
        self.governor = Governor()
        self.pressure = Pressure()
        self.neighbours = Neighbours()
        self.hottest: Zone | None = None
        self.repairs = 0

    @property
    def placement(self) -> Placement:
        """What holds now."""
        return self._keeper.under(self._strain)

    @property
    def celsius(self) -> float:
        """Of the hottest sensor, as it is told in metrics: not a number where there is none."""
        return math.nan if self.hottest is None else self.hottest.celsius

    @property
    def tuned(self) -> Tune | None:
        """What the active chat worker may do now."""
        return self._tuned.tuned if self._tuned is not None else None

    @property
    def uses_cgroups(self) -> bool:
        return self._keeper.uses_cgroups

    async def run(self) -> None:
        """Observe until cancelled."""
        while True:
            workers = self._workers()
            pids = {role: [each.pid for each in those if each.pid is not None] for role, those in workers.items()}
            self.observe(await asyncio.to_thread(self._read, pids), workers)
            await asyncio.sleep(OBSERVE_EVERY_SECONDS)

    def observe(self, readings: Readings, workers: Workers) -> None:
        """Decide and act on one set of readings."""
        before, self._before = self._before, readings
        found = self._supply(before, readings)
        self.pressure = self.pressure.observe(found)
        self._observe_heat(readings)
        found_off = tuple(deviations(readings.profile, self._keeper.placement)) if readings.profile is not None else ()
        self._observe_neighbours(before, readings, workers, found_off)
        self._tune(found, workers)
        self._restrain()
        self._show_look(readings, found_off)

    # --- reading ---------------------------------------------------------------------------------------

    def _read(self, pids: Mapping[Role, Sequence[int]]) -> Readings:
        placement = self._keeper.placement
        look = self._keeper.look()
        return Readings(
            at=self._sources.clock(),
            available=self._sources.available(),
            stalled=read_stalled(self._keeper.pressure_file),
            heat=self._sources.heat(),
            scheduled={pid: read_scheduled(pid) for pid in self._on_chat_cores(placement, pids)},
            busy_seconds=read_busy_seconds(placement.chat.cores),
            look=look,
            profile=self._new_profile(),
        )

    def _new_profile(self) -> Profile | None:
        profile = self._sources.profile()
        if profile is None or profile.at == self._profile_at:
            return None
        self._profile_at = profile.at
        return profile

    @staticmethod
    def _on_chat_cores(placement: Placement, pids: Mapping[Role, Sequence[int]]) -> list[int]:
        """Those of our processes that compute on the chat worker's cores."""
        chosen = list(pids.get("chat", ()))
        if set(placement.embed.cores) & set(placement.chat.cores):
            chosen += pids.get("embed", ())
        if set(placement.daemon.cores) & set(placement.chat.cores):
            chosen.append(os.getpid())
        return chosen

    # --- deciding --------------------------------------------------------------------------------------

    def _supply(self, before: Readings | None, now: Readings) -> Supply:
        waited: Stall | None = None
        if before is not None:
            waited = stall(before.stalled, now.stalled, now.at - before.at)
        return supply(available=now.available, reserve=self._reserve_bytes, stall=waited)

    def _observe_heat(self, readings: Readings) -> None:
        limits, heat = self._heat_limits, readings.heat
        self.hottest = heat.hottest(limits.throttle_celsius)
        below = None
        if self.hottest is not None and self.hottest.slows_at is not None:
            below = self.hottest.slows_at - self.hottest.celsius
        level = self.governor.level
        self.governor = self.governor.observe(
            Reading(below_celsius=below, slowed=heat.slowed, under_voltage=heat.under_voltage),
            margin_celsius=limits.margin_celsius,
            now=readings.at,
        )
        if self.governor.level != level:
            celsius = self.hottest.celsius if self.hottest is not None else None
            self._log.info("governor", old=level, new=self.governor.level, celsius=celsius)
        self._show(conditions.UNDER_VOLTAGE, "the power supply gives too little", holds=heat.under_voltage)
        self._show(conditions.CPU_SLOWED, "the CPU runs below its speed for heat or power", holds=heat.slowed)
        name = self.hottest.name if self.hottest is not None else "the CPU"
        least = f"{name} is near the point of being slowed: step {self.governor.level} of {len(STEPS) - 1}"
        self._show(conditions.HOT, least, holds=self.governor.level > 0)

    def _observe_neighbours(
        self, before: Readings | None, now: Readings, workers: Workers, found_off: Sequence[Deviation]
    ) -> None:
        chat = next(iter(workers.get("chat", ())), None)
        found = None if before is None else self._crowd(before, now, None if chat is None else chat.pid)
        crowded = self.neighbours.crowded
        starved = [each for each in found_off if each.kind == "starved" and chat is not None and each.pid == chat.pid]
        self.neighbours = self.neighbours.observe(found, starved=bool(starved))
        if self.neighbours.crowded != crowded:
            self._log.info("neighbours", crowded=self.neighbours.crowded, found=found, starved=starved)
        cores = format_list(self._keeper.placement.chat.cores)
        self._show(conditions.CORES_CROWDED, f"another program keeps one of {cores}", holds=self.neighbours.crowded)

    def _crowd(self, before: Readings, now: Readings, chat: int | None) -> Crowd | None:
        """What happened on the chat worker's cores; ``chat`` is its process, which may be none."""
        seconds, busy = now.at - before.at, now.busy_seconds - before.busy_seconds
        own = sum(now.scheduled[pid].run - before.scheduled.get(pid, Scheduled()).run for pid in now.scheduled) / 1e9
        if chat is None or chat not in before.scheduled or chat not in now.scheduled:
            return vacant(busy_seconds=busy, own_seconds=own, seconds=seconds)
        return crowd(
            before.scheduled[chat],
            now.scheduled[chat],
            busy_seconds=busy,
            own_seconds=own,
            seconds=seconds,
            quota_cores=self._keeper.placement.chat.quota_cores,
        )

    @property
    def _strain(self) -> Strain:
        return Strain(thread_share=self.governor.step.threads, crowded=self.neighbours.crowded)

    # --- acting ----------------------------------------------------------------------------------------

    def _tune(self, found: Supply, workers: Workers) -> None:
        placement = self.placement
        shrinking = self.pressure.stage is Stage.SHRINKING
        for number, worker in enumerate(workers.get("chat", ())):
            if number == 0:
                if worker is not self._tuned or self._tuning is None:
                    self._tuned, self._tuning = worker, untuned(worker.settings)
                self._tuning = self._tuning.observe(found, worker.settings, shrinking=shrinking)
            assert self._tuning is not None
            worker.tune(combine(self._tuning, self.governor.step, worker.settings, threads=placement.chat.threads))
        for worker in workers.get("embed", ()):
            settings = worker.settings
            worker.tune(
                Tune(
                    sequences=settings.sequences,
                    threads=min(settings.threads, placement.embed.threads),
                    prefix_cache_bytes=settings.prefix_cache_bytes,
                )
            )

    def _restrain(self) -> None:
        factor = self.governor.step.answer_factor
        shedding = self.pressure.stage is not Stage.CALM
        self._restraint.set(
            shedding=shedding,
            longest_answer=None if factor is None else factor * self._heat_limits.hot_max_tokens,
        )
        given_up = "batch work" if self.pressure.stage is Stage.SHEDDING else "batch work, sequences and kept states"
        self._show(conditions.MEMORY_SHORT, f"given up for now: {given_up}", holds=shedding)

    # --- showing ---------------------------------------------------------------------------------------

    def _show_look(self, readings: Readings, found_off: Sequence[Deviation]) -> None:
        for pid, drifts in readings.look.drifts.items():
            for drift in drifts:
                kind = conditions.QUOTA_STOPS if drift.kind == "stopped" else conditions.PLACEMENT_DRIFTED
                self._drifts.find(kind.code, pid, f"process {pid}: {drift.text}", readings.at)
                self.repairs += drift.kind != "stopped"
        for each in found_off:
            if each.kind != "starved":
                kind = conditions.QUOTA_STOPS if each.kind == "throttled" else conditions.PLACEMENT_DRIFTED
                self._drifts.find(kind.code, each.pid, f"{each.worker} ({each.pid}): {each.text}", readings.at)
        for worker in readings.profile.workers.values() if readings.profile is not None else ():
            if culprit := blame(worker, os.getpid()):
                self._drifts.blame(conditions.PLACEMENT_DRIFTED.code, worker.pid, culprit, readings.at)
        for kind in (conditions.QUOTA_STOPS, conditions.PLACEMENT_DRIFTED):
            text = self._drifts.text(kind.code, readings.at)
            self._show(kind, text, holds=bool(text))
        unreserved = readings.look.unreserved
        self._show(conditions.CORES_NOT_RESERVED, unreserved, holds=bool(unreserved))
        for pid, kills in readings.look.killed.items():
            self._log.warning("worker_out_of_memory", pid=pid, killed=kills)

    def _show(self, kind: ConditionKind, text: str, *, holds: bool) -> None:
        if holds:
            self._health.set(kind, text)
        else:
            self._health.clear(kind)
