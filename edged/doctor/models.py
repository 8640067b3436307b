"""Checks of the models and their engine: what llama.cpp was built with, memory, checksums."""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from edged.config import Config
from edged.doctor import systemd
from edged.doctor.device import Device, Reach
from edged.doctor.finding import Finding, fail, ok, skip, warn
from edged.errors import EdgedError
from edged.hardware.detect import available_memory, cpu_flags
from edged.hardware.features import CPU_FLAGS, built_with
from edged.hardware.usage import read_usage
from edged.models.catalog import Catalog
from edged.models.gguf import read_header
from edged.models.manifest import Prefixes, load_manifests, manifests_directory
from edged.models.memory import KEEP_FREE_SHARE
from edged.models.rollout import ROLES, Role
from edged.runtime.health import CPU_UNUSED
from edged.serving.launch import Launcher, Model

MEGABYTE = 1_000_000

# --- build -----------------------------------------------------------------------------------------

LOAD_SECONDS = 9.0  # of a cold cache on an SD card, or beside models that load
SAY_SYSTEM = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"


class Build(msgspec.Struct, frozen=True):
    """Flags of /proc/cpuinfo, and features of llama.cpp's CPU backend (None: it cannot be loaded; ``is_late``: or not
    in the time that it was given).
    """

    cpu_flags: frozenset[str]
    features: tuple[str, ...] | None
    is_late: bool = False


def read_build(device: Device) -> Build:
    flags = cpu_flags(device.path("proc/cpuinfo"))
    status = device.daemon.status
    if status is not None and status.engine is not None:
        return Build(flags, tuple(status.engine.backends.get("CPU", ())))
    try:  # what does not load, or dies of a wrong build, does so in a child
        said = device.run([sys.executable, "-c", SAY_SYSTEM], LOAD_SECONDS)
    except TimeoutError:
        return Build(flags, None, is_late=True)
    return Build(flags, None if said is None else built_with(said).get("CPU", ()))


def judge_build(facts: Build) -> Finding:
    if facts.is_late:
        return skip(
            f"llama.cpp did not load within {LOAD_SECONDS:.0f} s: the disk is slow, or the device busy; try again"
        )
    if facts.features is None:
        return fail("llama.cpp cannot be loaded: it is missing, or was built for another processor", CPU_UNUSED.hint)
    if not facts.features or not facts.cpu_flags:
        return skip("llama.cpp or the kernel does not say what it has")
    unused = [name for name, flags in CPU_FLAGS.items() if flags <= facts.cpu_flags and name not in facts.features]
    if unused:
        what = f"llama.cpp was built without {', '.join(unused)}, which this processor has: it is slower than need be"
        return warn(what, CPU_UNUSED.hint)
    used = [name for name in CPU_FLAGS if name in facts.features]
    return ok(f"llama.cpp uses what this processor has: {', '.join(used) or 'none of the fast instructions'}")


# --- which models ----------------------------------------------------------------------------------


class Choice(msgspec.Struct, frozen=True):
    """The model of a role: its file, or what keeps it from being there (``problem`` and ``fix``).

    ``sha256`` is empty for a file that nobody knows the sum of. ``again`` is how the file comes anew.
    """

    role: Role
    name: str
    path: Path
    sha256: str = ""
    problem: str = ""
    fix: str = ""
    again: str = ""


def choices(device: Device) -> Iterator[Choice]:
    """Those that the running daemon serves, else the configured ones."""
    manifests = load_manifests(manifests_directory())
    catalog = Catalog(device.config.models_dir, device.config.models_cache_dir, manifests=manifests)
    for role in ROLES:
        name, path = _served(device, role)
        if path is not None:
            yield Choice(role, str(path), path)
            continue
        try:
            file, info = catalog.path(name), catalog.info(name)
        except EdgedError as error:
            yield Choice(role, name, Path(), problem=error.message, fix=error.hint)
        else:
            again = f"edged models pull {name}" if name in manifests else f"edged models import FILE --name {name}"
            yield Choice(role, name, file, info.sha256, again=again)


def _served(device: Device, role: Role) -> tuple[str, Path | None]:
    """A name in the catalogue, or a path where that is what serves."""
    section = device.config.chat if role == "chat" else device.config.embed
    status = device.daemon.status
    worker = None if status is None else (status.chat if role == "chat" else status.embed)
    # of a missing worker the daemon tells the name in the configuration, also where that has a path in its place
    serving = "" if worker is None or worker.state == "missing" else worker.model.partition("@")[0]
    if section.path is not None and serving in ("", section.path.stem, str(section.path)):
        return serving, section.path
    return serving or section.model, None


# --- memory ----------------------------------------------------------------------------------------

SMALLEST_CONTEXT_TOKENS = 256


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that the workers take (``weights`` of them are mapped files), and that they could have.

    ``missing`` are models that are not there. ``kv_per_token`` is of the chat model. ``is_silent``: edged runs, and
    what its workers hold is not known.
    """

    needed: int
    weights: int
    available: int | None
    context_tokens: int
    kv_per_token: int
    missing: tuple[str, ...] = ()
    is_silent: bool = False


def read_memory(device: Device) -> Memory:
    catalog = Catalog(device.config.models_dir, device.config.models_cache_dir)
    launcher = Launcher(device.config, catalog, lambda _role: 1)
    needed = weights = kv_per_token = 0
    missing = []
    for choice in choices(device):
        model = None if choice.problem else _model(choice, catalog, launcher)
        if model is None:
            missing.append(choice.name)
            continue
        need = launcher.need(choice.role, model)
        needed += need.total
        weights += need.weights if _is_mapped(device.config, choice.role) else 0
        kv_per_token += need.kv // device.config.chat.context_tokens if choice.role == "chat" else 0
    return Memory(
        needed=needed,
        weights=weights,
        available=_available(device, weights),
        context_tokens=device.config.chat.context_tokens,
        kv_per_token=kv_per_token,
        missing=tuple(missing),
        is_silent=device.daemon.reach in (Reach.RUNS, Reach.CLOSED),
    )


def _model(choice: Choice, catalog: Catalog, launcher: Launcher) -> Model | None:
    name, file = choice.name, choice.path
    try:
        identity = catalog.recorded_identity(name if choice.sha256 else file)
        copy = launcher.copy(choice.role, identity) if identity else None
        header = read_header(copy or file)
    except (EdgedError, OSError):
        return None  # the check of the checksums says so
    return Model(asked=name, path=file, copy=copy, header=header, identity=identity, template=None, prefixes=Prefixes())


def _is_mapped(config: Config, role: Role) -> bool:
    return (config.chat if role == "chat" else config.embed).load_mode == "mmap"


def _available(device: Device, weights: int) -> int | None:
    """What is free now, and what running workers would give back; pages of mapped files already count as free."""
    status = device.daemon.status
    workers = () if status is None else (status.chat, status.embed)
    pids = [worker.pid for worker in workers if worker.pid is not None]
    free = _free(device, pids)
    if free is None:
        return None
    usages = [read_usage(pid, device.path("proc")) for pid in pids]
    held = sum(usage.resident_bytes for usage in usages if usage is not None)
    return free + max(0, held - weights)


def _free(device: Device, pids: Sequence[int]) -> int | None:
    """What the models' cgroup leaves: the daemon's, the unit's before its start, or else the doctor's."""
    if pids:
        return _free_in(device, _parent(device, pids[0]))
    limits = systemd.memory_limits(device)
    if limits is None:
        return _free_in(device, "self")
    free = _free_in(device, "1")  # where the system's own limits are, such as a container's
    return None if free is None else min([free, *limits])


def _free_in(device: Device, process: str) -> int | None:
    membership = device.path(f"proc/{process}/cgroup")
    return available_memory(device.path("sys/fs/cgroup"), membership, device.path("proc/meminfo"))


def _parent(device: Device, pid: int) -> str:
    """The daemon's process: its worker's own cgroup has the limits of that worker alone."""
    lines = device.read(f"proc/{pid}/status").splitlines()
    return next((line.split()[1] for line in lines if line.startswith("PPid:")), "self")


def judge_memory(facts: Memory) -> Finding:
    if facts.missing:
        return skip(f"not known without {' and '.join(facts.missing)}: see the line on models")
    if facts.is_silent:
        return skip("edged runs, and what its workers hold is not known without its status: see the line on the port")
    if facts.available is None:
        return skip("the system does not say how much memory is free")
    room = int(facts.available * (1 - KEEP_FREE_SHARE))
    shown = f"the models need {facts.needed / MEGABYTE:.0f} MB, {facts.available / MEGABYTE:.0f} MB can be had"
    if facts.needed <= room:
        return ok(shown)
    fix = _less_memory(facts, facts.needed - room)
    if facts.needed - facts.weights <= room:
        return warn(f"{shown}: weights will be read from the disk again and again", fix)
    return fail(f"{shown}: the kernel will end a worker", fix)


def _less_memory(facts: Memory, excess: int) -> str:
    if facts.kv_per_token:
        spare = -(-excess // facts.kv_per_token)
        left = (facts.context_tokens - spare) // SMALLEST_CONTEXT_TOKENS * SMALLEST_CONTEXT_TOKENS
        if left >= SMALLEST_CONTEXT_TOKENS:
            return f"set chat.context_tokens = {left} (now {facts.context_tokens}), or end other programs"
    return "set chat.model to a smaller one ('edged models list' shows sizes), or end other programs"


# --- checksums -------------------------------------------------------------------------------------

READ_SECONDS = 5.0
READ_BYTES = 1 << 20


class Checked(msgspec.Struct, frozen=True):
    """A model's file against its sum. ``found`` is None when it was not read to its end in time.

    ``again`` is how the file comes anew.
    """

    name: str
    expected: str
    found: str | None
    problem: str = ""
    fix: str = ""
    again: str = ""


def read_checksums(device: Device) -> tuple[Checked, ...]:
    until = time.monotonic() + READ_SECONDS
    return tuple(_checked(choice, until) for choice in choices(device))


def _checked(choice: Choice, until: float) -> Checked:
    if choice.problem:
        return Checked(choice.name, "", None, choice.problem, choice.fix)
    try:
        read_header(choice.path)
        return Checked(choice.name, choice.sha256, _sha256(choice.path, until), again=choice.again)
    except EdgedError as error:
        return Checked(choice.name, "", None, error.message, choice.again or error.hint)
    except OSError as error:
        problem = f"{choice.path} cannot be read: {error.strerror}"
        return Checked(choice.name, "", None, problem, f"sudo chmod a+r {choice.path}")


def _sha256(file: Path, until: float) -> str | None:
    digest = hashlib.sha256()
    with file.open("rb") as readable:
        while block := readable.read(READ_BYTES):
            digest.update(block)
            if time.monotonic() > until:
                return None
    return digest.hexdigest()


def judge_checksums(models: tuple[Checked, ...]) -> Finding:
    """A missing model degrades, as at the start of the daemon; a wrong one is never served knowingly."""
    wrong = [model for model in models if model.expected and model.found and model.found != model.expected]
    if wrong:
        names = " ".join(model.name for model in wrong)
        what = f"{names}: the file is not what was installed; the disk may be failing"
        return fail(what, " && ".join(model.again for model in wrong))
    for model in models:
        if model.problem:
            return warn(model.problem, model.fix)
    unread = [model.name for model in models if model.found is None]
    if unread:
        names = " ".join(unread)
        return skip(f"{names}: not read to the end in {READ_SECONDS:.0f} s; 'edged models verify' takes its time")
    unknown = [model.name for model in models if not model.expected]
    right = ", ".join(model.name for model in models if model.expected)
    return ok("; ".join(([right] if right else []) + [f"{name} is whole, its sum is not known" for name in unknown]))
