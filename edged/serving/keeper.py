"""Puts the daemon and each worker where the placement says, and finds out whether they are still there."""

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from edged.config import Config
from edged.errors import ConfinementError
from edged.hardware import reserve
from edged.hardware.cores import SYSFS_CPU, format_list, read_cores, read_online
from edged.hardware.placement import Bounds, Machine, Placement, Strain, Wishes, place
from edged.hardware.pressure import PROC_PRESSURE
from edged.models.rollout import Role
from edged.runtime import health as conditions
from edged.runtime.health import Health
from edged.workers.cgroup import Confinement, Drift, Tree, group_of, limits_of


def wishes(config: Config) -> Wishes:
    """What the configuration asks of the placement."""
    return Wishes(
        chat_threads=config.chat.threads,
        embed_threads=config.embed.threads,
        share=config.hardware.share,
        reserve_cores=config.hardware.reserve_cores,
    )


def reserve_cores(machine: Machine, placement: Placement, group: str) -> bool:
    """Keep others off the cores that the placement reserves. False where that is so already. Blocks.

    ``group`` is the cgroup that edged is in, or will be. Raises :class:`ConfinementError`.
    """
    cores = frozenset(placement.reserved)
    if any(group.startswith(f"/{unit}/") for unit in reserve.OTHERS):
        raise ConfinementError(f"edged is itself in {group}, and would lose the cores with the others")
    left = (read_online() or {core.number for core in machine.cores}) - cores
    if not cores or not left:
        raise ConfinementError("there are too few cores to keep some for the chat worker")
    if reserve.is_reserved(cores):
        return False
    reserve.reserve(left)
    return True


class Look(msgspec.Struct, frozen=True):
    """By process: what was not as decided and was put right, and how many were killed for want of memory.

    ``unreserved``: why cores that are to be kept from others are not; empty where all is as wished.
    """

    drifts: dict[int, list[Drift]]
    killed: dict[int, int]
    unreserved: str = ""


class Keeper:
    """Owns the cgroups. :meth:`begin` before any worker is started, :meth:`end` after the last has ended."""

    def __init__(
        self,
        machine: Machine,
        wishes: Wishes,
        health: Health,
        claim: Callable[[], Tree] | None,
        *,
        sysfs_cpu: Path = SYSFS_CPU,
    ) -> None:
        """``claim`` takes our part of the cgroup tree, and blocks; without it there is affinity and nice alone."""
        self.machine = machine
        self._sysfs_cpu = sysfs_cpu
        self._online = frozenset[int]()
        self._kept_from_us = frozenset[int]()
        self._wishes = wishes
        self._health = health
        self._claim = claim
        self._confinement = Confinement(None)
        self._needed: dict[Role, int] = {}
        self._reserved = False
        self._refusal = ""
        self._log = structlog.get_logger("keeper")

    @property
    def placement(self) -> Placement:
        """The decision for a device that nothing strains."""
        return self.under(Strain())

    @property
    def uses_cgroups(self) -> bool:
        return self._confinement.tree is not None

    @property
    def pressure_file(self) -> Path:
        """Where to read the memory pressure that concerns us."""
        tree = self._confinement.tree
        return tree.pressure_file if tree is not None and "memory" in tree.controllers else PROC_PRESSURE

    def under(self, strain: Strain) -> Placement:
        """The decision under strain."""
        return place(
            self.machine,
            self._wishes,
            chat_bytes=self._needed.get("chat"),
            embed_bytes=self._needed.get("embed"),
            strain=strain,
        )

    async def begin(self) -> None:
        """Confine the daemon itself. What cannot be had becomes a condition."""
        if self._claim is not None:
            await asyncio.to_thread(self._enter, self._claim)
        placement = self.placement
        self._online = await asyncio.to_thread(read_online, self._sysfs_cpu)
        self._kept_from_us = self._online - {core.number for core in self.machine.cores}
        await asyncio.to_thread(self._confinement.confine, "daemon", os.getpid(), placement.daemon)
        if self._wishes.reserve_cores:
            await asyncio.to_thread(self._reserve, placement)
        self._log.info("placed", cgroups=self.uses_cgroups, **msgspec.to_builtins(placement))

    async def launched(self, role: Role, pid: int, needed_bytes: int) -> None:
        """A worker's process runs and will need so much memory: confine it before it takes any."""
        self._needed[role] = needed_bytes
        await asyncio.to_thread(lambda: self._confinement.confine(role, pid, self.placement.bounds(role)))

    def look(self) -> Look:
        """Compare what is with what was decided, and put it right. Blocks."""
        self._follow_cores()
        drifts = self._confinement.repair()
        return Look(drifts, self._confinement.sweep(), self._unreserved())

    def _follow_cores(self) -> None:
        """Decide anew when cores went offline or came (``nvpmodel``, CPU hotplug)."""
        online = read_online(self._sysfs_cpu)
        if online == self._online:
            return
        self._online = online
        cores = tuple(core for core in read_cores(self._sysfs_cpu) if core.number not in self._kept_from_us)
        if not cores:
            return
        self.machine = msgspec.structs.replace(self.machine, cores=cores)
        self._log.info("cores_changed", online=format_list(online))
        self._confinement.confine_anew(self._bounds)

    def _bounds(self, name: str) -> Bounds:
        placement = self.placement
        return {"chat": placement.chat, "embed": placement.embed}.get(name, placement.daemon)

    def _unreserved(self) -> str:
        cores = frozenset(self.placement.reserved)
        if not self._wishes.reserve_cores or (cores and reserve.is_reserved(cores)):
            return ""
        return self._refusal or f"services and logins may run on cores {format_list(cores)}"

    def group(self, pid: int) -> str:
        """The path of the cgroup that is a process's own; empty where it has none."""
        return self._confinement.group(pid)

    async def end(self) -> None:
        """Give everything back."""
        if self._reserved:
            with contextlib.suppress(ConfinementError):
                await asyncio.to_thread(reserve.free)
        cores = frozenset(core.number for core in self.machine.cores)
        await asyncio.to_thread(functools.partial(self._confinement.release, cores))

    def _enter(self, claim: Callable[[], Tree]) -> None:
        try:
            tree = claim()
        except ConfinementError as error:
            self._health.set(conditions.CGROUPS_MISSING, error.message)
            return
        self._confinement = Confinement(tree)
        # A kernel without quotas (CONFIG_CFS_BANDWIDTH) does all that is wanted of it where none is wanted.
        limits = limits_of(self.placement.chat)
        lacking = [file for file in sorted(tree.lacking) if not limits[file].startswith("max")]
        if tree.missing or lacking:
            names = ", ".join((*tree.missing, *lacking))
            self._health.set(conditions.CGROUPS_MISSING, f"the kernel does not offer {names} here")

    def _reserve(self, placement: Placement) -> None:
        try:
            self._reserved = reserve_cores(self.machine, placement, group_of(os.getpid()))
        except ConfinementError as error:
            self._refusal = error.message
            self._health.set(conditions.CORES_NOT_RESERVED, error.message)
