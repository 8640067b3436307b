"""The command line: the only module that prints or picks an exit code.

Exit codes: 0 done, 1 failed, 2 used wrongly, 3 no daemon answers. What is heavy is imported by the command needing it.
"""

import collections
import contextlib
import itertools
import json
import os
import platform
import pwd
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer
from typer.core import TyperGroup

from edged import __version__
from edged.errors import DaemonUnreachableError, EdgedError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from edged.bundle.manifest import Manifest
    from edged.client import Client
    from edged.config import Config
    from edged.demo.runner import Message
    from edged.doctor.finding import Finding as Diagnosis
    from edged.gateway import wire
    from edged.gateway.rollouts_wire import ProgressBody, RolloutBody
    from edged.models.catalog import Catalog, ModelInfo
    from edged.models.wide import Copied
    from edged.probe.digging import Dug
    from edged.probe.profile import Profile
    from edged.rehearse import Rehearsed

FAILED = 1
NO_DAEMON = 3
FORMATS: dict[str, Literal["markdown", "text"]] = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".txt": "text",
    ".text": "text",
}
# A document must not steer the terminal that shows it: all of C0 and C1 but tab and line feed go.
CONTROLS = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n")


@dataclass
class Session:
    """What holds for the whole invocation."""

    config_file: Path | None = None
    as_json: bool = False


class Commands(TyperGroup):
    """All commands; their errors become two lines on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EdgedError as error:
            _show_error(error, as_json=_session(ctx).as_json)
            raise typer.Exit(NO_DAEMON if isinstance(error, DaemonUnreachableError) else FAILED) from error


def _session(context: typer.Context) -> Session:
    return context.ensure_object(Session)


def _remember_json(context: typer.Context, value: bool) -> bool:
    session = _session(context)
    session.as_json = session.as_json or value
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_remember_json)]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration; else $EDGED_CONFIG, else <home>/edged.toml."),
]
Collection = Annotated[str, typer.Option("--collection", help="Collection of documents.")]

app = typer.Typer(
    cls=Commands,
    name="edged",
    help="Answers questions on this device, from its own documents, with its own model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
docs = typer.Typer(name="docs", help="The documents that answers stand on.", no_args_is_help=True)
models = typer.Typer(name="models", help="Model files on this device.", no_args_is_help=True)
bundle = typer.Typer(name="bundle", help="Offline bundles: edged for devices without a network.", no_args_is_help=True)
profile = typer.Typer(name="profile", help="What the workers use, kept for later.", no_args_is_help=True)
app.add_typer(docs)
app.add_typer(models)
app.add_typer(profile)
app.add_typer(bundle)


def main() -> None:
    """The ``edged`` program."""
    app(prog_name="edged")


@app.callback()
def _everything(context: typer.Context, config: ConfigFile = None) -> None:
    context.obj = Session(config_file=config)


# --- configuration ---------------------------------------------------------------------------------


def _load(
    context: typer.Context, overrides: Mapping[str, object] | None = None, *, file: Path | None = None
) -> "Config":
    from edged.config import load

    return load(file or _config_file(_session(context)), os.environ, overrides)


def _config_file(session: Session) -> Path | None:
    """The file asked for, which must exist, or the usual one where there is one."""
    from edged.config import Config

    named = session.config_file or os.environ.get("EDGED_CONFIG")
    if named:
        return Path(named)
    home = os.environ.get("EDGED_HOME")
    usual = (Path(home).expanduser() if home else Config().home) / "edged.toml"
    return usual if os.path.lexists(usual) else None  # a link that leads nowhere is an error, not the defaults


@contextlib.contextmanager
def _daemon(context: typer.Context) -> Iterator["Client"]:
    from edged.client import Client

    with Client.of(_load(context)) as client:
        yield client


def _readable(path: Path | None) -> Path | None:
    """A file that is there. What this user may not look at, or not even look for, is not said to be missing."""
    if path is None or os.access(path, os.R_OK):
        return path
    with contextlib.suppress(PermissionError):
        try:
            path.stat()
        except FileNotFoundError as error:
            raise typer.BadParameter(f"'{path}' does not exist.") from error
    raise RequestError(
        f"the user {pwd.getpwuid(os.geteuid()).pw_name} may not read {path}",
        hint=f"put a copy where that user may: sudo install -m 644 {shlex.quote(str(path))} /var/tmp/",
    )


# --- output ----------------------------------------------------------------------------------------


def _say(text: str = "", *, end: str = "\n") -> None:
    typer.echo(text.translate(CONTROLS) + end, nl=False)


def _note(text: str) -> None:
    typer.echo(text.translate(CONTROLS), err=True)


def _say_json(body: object) -> None:
    typer.echo(json.dumps(body, ensure_ascii=False, default=str))


def _show_error(error: EdgedError, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"error": error.body()}, ensure_ascii=False), err=True)
        return
    _note(f"error: {error.message}")
    if error.hint:
        _note(f"hint:  {error.hint}")


def _say_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns; cut to the terminal's width, but never in a pipe or file."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell.translate(CONTROLS)) for cell in row))
    _console().print(table)


def _console() -> "Console":
    """As wide as the terminal; in a pipe or file as wide as it takes."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=1000)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86_400
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes:.0f} min"
    return f"{hours:.0f} h" if days < 2 else f"{days:.0f} days"


# --- the daemon ------------------------------------------------------------------------------------


@app.command()
def serve(
    context: typer.Context,
    config: ConfigFile = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS:PORT", help="Serve HTTP here, over http.listen.")
    ] = None,
    model_path: Annotated[
        Path | None, typer.Option("--model-path", metavar="FILE.gguf", help="Chat model, over chat.path.")
    ] = None,
    as_json: Json = False,  # noqa: ARG001  # heard by its callback: how an error is shown
) -> None:
    """Run the daemon until it is told to stop."""
    if config is not None:
        _session(context).config_file = config
    overrides: dict[str, object] = {}
    if host is not None:
        overrides["http.listen"] = host
    if model_path is not None:
        overrides["chat.path"] = str(model_path)
    file = _config_file(_session(context))
    settings = _load(context, overrides, file=file)
    from edged import daemon

    # A file that is gone is refused then: the defaults are nothing that anybody asked to reload.
    raise typer.Exit(daemon.serve(settings, lambda: _load(context, overrides, file=file)))


@app.command()
def cleanup(context: typer.Context, as_json: Json = False) -> None:
    """Remove what a killed daemon left behind: sockets, worker processes, cgroups. Does nothing while one runs."""
    from edged.cleanup import clean_up

    removed = clean_up(_load(context))
    if as_json:
        _say_json(_plain(removed))
    elif removed.held:
        _say("a daemon runs: nothing was touched")
    else:
        _say(f"removed: {len(removed.sockets)} sockets, {len(removed.workers)} workers, {len(removed.groups)} cgroups")


@app.command()
def reserve(
    context: typer.Context,
    free: Annotated[bool, typer.Option("--free", help="Give them back.")] = False,
    as_json: Json = False,
) -> None:
    """Keep services and logins off the chat worker's cores, where hardware.reserve_cores asks for that. Needs root."""
    cores: tuple[int, ...] = ()
    if free:  # whatever the configuration says by now
        from edged.hardware import reserve as others

        others.free()
    elif (config := _load(context)).hardware.reserve_cores:
        from edged.hardware import detect
        from edged.hardware.placement import place
        from edged.serving.keeper import reserve_cores, wishes

        machine = detect.machine()
        placement = place(machine, wishes(config))
        reserve_cores(machine, placement)
        cores = placement.reserved
    if as_json:
        _say_json({"reserved": list(cores)})
    else:
        _say(f"reserved cores: {', '.join(map(str, cores)) or 'none'}")


@app.command()
def probe(
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="FILE", help="Listen here, instead of in /run/edged-probe.")
    ] = None,
    highest: Annotated[
        Literal["ebpf", "counters", "procfs"], typer.Option("--highest", help="Measure by no more than this.")
    ] = "ebpf",
    as_json: Json = False,  # noqa: ARG001  # heard by its callback: how an error is shown
) -> None:
    """Measure the processes that the daemon names, until told to stop. Needs CAP_BPF and CAP_PERFMON for all of it."""
    from edged import log
    from edged.probe import protocol, server
    from edged.probe.sample import Step
    from edged.runtime.notify import Notifier

    log.configure()
    server.serve(socket or protocol.SOCKET, Step(highest), Notifier.of(os.environ, os.getpid()))


@app.command()
def check(
    context: typer.Context,
    stores: Annotated[
        bool, typer.Option("--stores", help="Also bring copies of the stores to this version's schema.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the configuration and what it refers to; says what differs from the defaults."""
    from edged.config import Config

    config, file = _load(context), _config_file(_session(context))
    defaults = _flat(Config().model_dump(mode="json"))
    changed = {name: value for name, value in _flat(config.model_dump(mode="json")).items() if defaults[name] != value}
    findings = list(_findings(config))
    rehearsed = _rehearse(config) if stores else []
    if as_json:
        found = [finding.__dict__ for finding in findings]
        body = {"file": file, "home": config.home, "changed": changed, "findings": found, "stores": _plain(rehearsed)}
        _say_json(body)
    else:
        _say(f"configuration: {file or 'defaults, no file'}\nhome: {config.home}")
        for name, value in changed.items():
            _say(f"  {name} = {json.dumps(value, ensure_ascii=False)}")
        for finding in findings:
            _say(f"{finding.severity}: {finding.text}\n  hint: {finding.hint}")
        for store in rehearsed:
            _say(f"store {store.file}: schema {store.schema}{f' → {store.schema_after}' * store.migrates}")
        if not findings:
            _say("nothing to complain about")
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(FAILED)


def _plain(structs: object) -> Any:
    """msgspec's structs as JSON has them."""
    import msgspec

    return msgspec.to_builtins(structs)


def _rehearse(config: "Config") -> "list[Rehearsed]":
    from edged.rehearse import rehearse

    return list(rehearse(config))


@dataclass
class Finding:
    """What ``edged check`` found: an ``error`` keeps the daemon from starting, a ``warning`` makes it serve less."""

    severity: Literal["error", "warning"]
    text: str
    hint: str


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _findings(config: "Config") -> Iterator[Finding]:
    from edged import credentials
    from edged.config import is_loopback, split_listen
    from edged.runtime import home

    for refusal in (*home.refusals(config), *credentials.refusals(config)):
        yield Finding("error", refusal.message, refusal.hint)
    if not is_loopback(split_listen(config.http.listen)[0]) and config.http.tls_cert is None:
        hint = "set http.tls_cert and http.tls_key: the API key travels in the clear"
        yield Finding("warning", f"{config.http.listen} is served without TLS", hint)
    with contextlib.suppress(EdgedError):  # a certificate that cannot be used at all was told above
        if objection := credentials.objection(config.http, time.time()):
            hint = "replace http.tls_cert and http.tls_key, and restart edged; the device's clock must be right too"
            yield Finding("warning", f"http.tls_cert {config.http.tls_cert}, as clients see it: {objection}", hint)
    yield from _model_findings(config)
    yield from _service_findings(config)


def _service_findings(config: "Config") -> Iterator[Finding]:
    """What the service, where it is installed for this user, cannot reach as it is confined."""
    from edged.doctor.device import Daemon, Device
    from edged.doctor.service import out_of_reach, read_unit

    for found in out_of_reach(read_unit(Device(config, Daemon(None)))):
        yield Finding("warning", found.what, found.fix)


def _model_findings(config: "Config") -> Iterator[Finding]:
    from edged.models.rollout import ROLES
    from edged.serving.launch import Launcher

    launcher = Launcher(config, _catalog(config), {})
    for role in ROLES:
        name = launcher.configured(role)
        try:
            launcher.locate(role, name)
        except EdgedError as error:
            yield Finding("warning", f"{role}: {error.message}", launcher.advice(role, name))


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show how the running daemon is; fails when the daemon is failing."""
    with _daemon(context) as client:
        body = client.status()
    if as_json:
        _say_json(body.model_dump(mode="json"))
    else:
        _say_status(body)
    if body.failing:
        raise typer.Exit(FAILED)


def _say_status(body: "wire.StatusBody") -> None:
    _say(f"edged {body.version}: {body.status}, up {_duration(body.uptime)}")
    for role, worker in (("chat", body.chat), ("embed", body.embed)):
        threads = f", {worker.threads} threads" if worker.threads else ""
        _say(f"{role + ':':<11}{worker.model or 'no model'}, {worker.state}{threads}, {worker.restarts} restarts")
    _say(f"documents: {body.documents}, {body.chunks} passages")
    if body.probe is not None:
        _say(f"load:      score {body.probe.score:.2f}, measured by {body.probe.step}")
    events = body.events
    _say(
        f"events:    {events.open} open, {events.closed} closed "
        f"({events.failed} failed, {events.expired} expired), {events.unpublished} unpublished"
    )
    _say(f"mqtt:      {'connected, MQTT ' + (body.mqtt.protocol or '?') if body.mqtt.connected else 'not connected'}")
    for condition in body.conditions:
        _say(f"{condition.severity}: {condition.text} ({condition.code})\n  hint: {condition.hint}")


@app.command()
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Look at this device for what keeps edged from working well, and say the fix; fails when a line fails."""
    from edged.doctor import checks

    found: dict[str, Diagnosis] = {}
    for name, finding in checks.examine(_load(context)):
        found[name] = finding
        if not as_json:
            _say_diagnosis(name, finding)
    counts = checks.count(found.values())
    if as_json:
        lines = [{"check": name, "level": f.level, "what": f.what, "fix": f.fix} for name, f in found.items()]
        _say_json({"findings": lines, "counts": counts})
    else:
        _say(", ".join(f"{number} {level}" for level, number in counts.items()))
    if counts["fail"]:
        raise typer.Exit(FAILED)


def _say_diagnosis(name: str, finding: "Diagnosis") -> None:
    _say(f"{finding.level:<6}{name:<15}{finding.what}")
    if finding.fix:
        _say(f"{'':<21}fix: {finding.fix}")


@app.command()
def version(as_json: Json = False) -> None:
    """Show the version."""
    if as_json:
        _say_json({"edged": __version__, "python": platform.python_version(), "machine": platform.machine()})
    else:
        _say(f"edged {__version__} (Python {platform.python_version()}, {platform.machine()})")


# --- questions -------------------------------------------------------------------------------------


@app.command()
def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    collection: Collection = "default",
    deadline_ms: Annotated[
        int | None, typer.Option("--deadline-ms", min=1, help="Answer within this time, degrading to meet it.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer, tokens.")] = None,
    as_json: Json = False,
) -> None:
    """Ask the running daemon; shows the answer as it grows, then its sources and times."""
    from edged.types import Delta, Restarted

    query = _query(query=question, collection=collection, deadline_ms=deadline_ms, max_tokens=max_tokens)
    screen = AnswerScreen()
    with _daemon(context) as client, contextlib.closing(client.ask(query)) as events:
        for event in events:
            match event:
                case Delta(text=text) if not as_json:
                    screen.delta(text)
                case Restarted(reason=reason) if not as_json:
                    screen.restarted(reason)
                case Delta() | Restarted():
                    pass
                case answer if as_json:
                    _say_json(answer.model_dump(mode="json"))
                case answer:
                    screen.finish(answer)


def _query(**fields: object) -> "wire.QueryRequest":
    from pydantic import ValidationError

    from edged.gateway import wire

    try:
        return wire.QueryRequest.model_validate(fields)
    except ValidationError as error:
        raise wire.explain(error.errors(), wire.QueryRequest.model_fields) from error


class AnswerScreen:
    """Shows an answer as it grows, then what it stands on and where the time went."""

    def __init__(self) -> None:
        self._shown = ""

    def delta(self, text: str) -> None:
        self._shown += text
        _say(text, end="")

    def restarted(self, reason: str) -> None:
        if self._shown:
            _say()
        self._shown = ""
        _note(f"(from the start again: {reason})")

    def finish(self, answer: "wire.AnswerBody") -> None:
        streamed, self._shown = self._shown, ""
        if streamed:
            _say()
        if streamed.strip() != answer.answer.strip():
            _say(answer.answer)
        for number, cited in enumerate(answer.citations, start=1):
            place = " › ".join(dict.fromkeys([cited.title, *cited.headings]))
            _say(f"  [{number}] {place} ({cited.document_id}): {cited.text}")
        if answer.note:
            _say(f"  {answer.step}: {answer.note}")
        _say(f"  {_times(answer)}")


def _times(answer: "wire.AnswerBody") -> str:
    timings = answer.timings
    first = "" if timings.first_token_ms is None else f"first token {timings.first_token_ms:.0f} ms, "
    parts = {
        "embed": timings.embed_ms,
        "retrieve": timings.retrieve_ms,
        "queue": timings.queue_ms,
        "prefill": timings.prefill_ms,
        "generate": timings.generate_ms,
    }
    shown = ", ".join(f"{name} {spent:.0f}" for name, spent in parts.items())
    return f"{first}total {timings.total_ms:.0f} ms ({shown}); {answer.model or 'no model'}"


# --- documents -------------------------------------------------------------------------------------


@dataclass
class Upload:
    """A file and the document it becomes."""

    file: Path
    document_id: str


@docs.command("add")
def docs_add(
    context: typer.Context,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", exists=True, help="Files, or directories of .md and .txt.")
    ],
    collection: Collection = "default",
    as_json: Json = False,
) -> None:
    """Add documents; one that is known by its id is replaced. A file's id is its path below the directory given."""
    uploads = _uploads(paths)
    results: list[dict[str, Any]] = []
    with _daemon(context) as client, _progress("adding", total=len(uploads), shown=not as_json) as advance:
        for upload in uploads:
            results.append(_upload(client, upload, collection))
            advance(len(results), len(uploads))
    if as_json:
        _say_json(results)
    else:
        for result in results:
            _say(_told(result))
    if any("error" in result for result in results):
        raise typer.Exit(FAILED)


def _uploads(paths: Iterable[Path]) -> list[Upload]:
    uploads: dict[str, Upload] = {}
    for upload in _found(paths):
        known = uploads.setdefault(upload.document_id, upload)
        if known.file.resolve() != upload.file.resolve():
            raise RequestError(
                f"{known.file} and {upload.file} would both be the document '{upload.document_id}'",
                hint="add them by a common parent directory, or to different collections",
            )
    if not uploads:
        raise RequestError("there is no .md or .txt file in what was given", hint="give files or their directory")
    return list(uploads.values())


def _found(paths: Iterable[Path]) -> Iterator[Upload]:
    for path in paths:
        if path.is_file():
            yield Upload(path, path.name)
            continue
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            hidden = any(part.startswith(".") for part in inside.parts)
            if file.suffix.lower() in FORMATS and file.is_file() and not hidden:
                yield Upload(file, inside.as_posix())


def _upload(client: "Client", upload: Upload, collection: str) -> dict[str, Any]:
    """The daemon's answer, or what is wrong with this one file; only a lost daemon ends the whole command."""
    try:
        ingested = client.add_document(_document(upload, collection))
    except DaemonUnreachableError:
        raise
    except EdgedError as error:
        return {"file": str(upload.file), "error": error.body()}
    return {"file": str(upload.file), **ingested.model_dump(mode="json")}


def _document(upload: Upload, collection: str) -> "wire.DocumentRequest":
    from pydantic import ValidationError

    from edged.gateway import wire

    try:
        text = upload.file.read_text(encoding="utf-8-sig")
        return wire.DocumentRequest(
            id=upload.document_id,
            text=text,
            format=FORMATS.get(upload.file.suffix.lower(), "text"),
            collection=collection,
        )
    except OSError as error:
        raise RequestError(f"cannot read the file: {error.strerror}", hint="check its permissions") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"it is no UTF-8 text: {error.reason}", hint="convert it to UTF-8") from error
    except ValidationError as error:
        raise wire.explain(error.errors(), wire.DocumentRequest.model_fields) from error


def _told(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"failed     {result['file']}: {result['error']['message']} (hint: {result['error']['hint']})"
    document = result["document"]
    return f"{result['outcome']:<10} {document['id']} ({document['chunks']} passages)"


@docs.command("list")
def docs_list(
    context: typer.Context,
    collection: Annotated[str | None, typer.Option("--collection", help="Only this collection.")] = None,
    as_json: Json = False,
) -> None:
    """List the documents."""
    with _daemon(context) as client:
        found = client.documents(collection)
    if as_json:
        _say_json([document.model_dump(mode="json") for document in found])
        return
    rows = [(item.id, item.collection, item.title, str(item.chunks), _size(item.bytes)) for item in found]
    _say_table(("ID", "COLLECTION", "TITLE", "PASSAGES", "SIZE"), rows)


@docs.command("remove")
def docs_remove(
    context: typer.Context,
    document_id: Annotated[str, typer.Argument(metavar="ID", help="The document's id.")],
    collection: Collection = "default",
    as_json: Json = False,
) -> None:
    """Remove a document."""
    with _daemon(context) as client:
        client.remove_document(collection, document_id)
    if as_json:
        _say_json({"removed": document_id, "collection": collection})
    else:
        _say(f"removed    {document_id}")


# --- models ----------------------------------------------------------------------------------------


def _catalog(config: "Config") -> "Catalog":
    from edged.models.catalog import Catalog

    return Catalog(config.models_dir, config.models_cache_dir)


@models.command("list")
def models_list(context: typer.Context, as_json: Json = False) -> None:
    """List the models of the catalogue and the imported ones."""
    found = _catalog(_load(context)).available()
    if as_json:
        _say_json([_model_body(model) for model in found])
        return
    rows = [
        (model.name, model.kind, _model_state(model), _size(model.size_bytes), model.description) for model in found
    ]
    _say_table(("NAME", "KIND", "STATE", "SIZE", "DESCRIPTION"), rows)


@models.command("pull")
def models_pull(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Models; the configured ones when none is named.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download models and check them; what is there and right is left as it is."""
    config = _load(context)
    catalog = _catalog(config)
    configured = [model.model for model in (config.chat, config.embed) if model.path is None]
    pulled = []
    for name in names or configured:
        with _progress(name, total=None, shown=not as_json) as advance:
            catalog.pull(name, advance)
        pulled.append(catalog.info(name))
    _say_models(pulled, as_json=as_json)
    for model in pulled:
        _widen_once(config, catalog, model)


@models.command("widen")
def models_widen(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A chat model; the configured one by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a model's weights into eight bits, and keep the copy where this device answers sooner with it.

    'edged models pull' does so once by itself. It takes seconds; a daemon that runs loads the copy at its next start.
    """
    import msgspec

    from edged.serving import widening

    config = _load(context)
    catalog = _catalog(config)
    given = config.chat.path if name is None else None
    name = given.stem if given else name or config.chat.model
    file = given or catalog.path(name)
    if reason := widening.unsuitable(config, file):
        if as_json:
            _say_json({"model": name, "kept": False, "reason": reason})
        else:
            _say(f"{name}: no copy: {reason}")
        return
    copied = widening.widen(config, catalog.identity(given or name), file)
    if as_json:
        _say_json({"model": name, "kept": copied.kept, **msgspec.to_builtins(copied.trial)})
    else:
        _say(_trial_line(name, copied))


def _widen_once(config: "Config", catalog: "Catalog", model: "ModelInfo") -> None:
    """After an installation, which does not fail for it: the model answers without a copy as well."""
    from edged.errors import EdgedError
    from edged.serving import widening

    try:
        copied = widening.widen_once(config, catalog.identity(model.name), model.path)
    except EdgedError as error:
        _note(f"no eight-bit copy of {model.name}: {error.message}")
        return
    if copied is not None:
        _note(_trial_line(model.name, copied))


def _trial_line(name: str, copied: "Copied") -> str:
    file, copy = copied.trial.file, copied.trial.copy
    speeds = f"prompts {file.prompt / copy.prompt:.2f}x and answers {file.answer / copy.answer:.2f}x as fast"
    end = f"kept ({_size(copied.size_bytes)})" if copied.kept else "not kept"
    return f"{name}: {speeds} from an eight-bit copy: {end}"


@models.command("verify")
def models_verify(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A model; all installed ones by default.")] = None,
    as_json: Json = False,
) -> None:
    """Read installed models again and compare their checksums."""
    from edged.models.wide import Copies

    config = _load(context)
    catalog = _catalog(config)
    names = [name] if name else [model.name for model in catalog.available() if model.installed]
    verified = []
    for each in names:
        verified.append(catalog.verify(each))
        Copies(config.wide_dir).verify(catalog.identity(each))
    _say_models(verified, as_json=as_json)


@models.command("import")
def models_import(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", callback=_readable, readable=False, dir_okay=False, help="A GGUF file.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Its name; from the catalogue or the file when unset.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a GGUF file in, so that chat.model or embed.model can name it."""
    config = _load(context)
    catalog = _catalog(config)
    model = catalog.import_file(file, name)
    _say_models([model], as_json=as_json)
    _widen_once(config, catalog, model)


NoWait = Annotated[bool, typer.Option("--no-wait", help="Return at once; 'edged models status' shows how it goes.")]
ForEmbedding = Annotated[bool, typer.Option("--embed", help="The embedding model, not the chat model.")]


@models.command("activate")
def models_activate(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An installed model.")],
    canary: Annotated[
        str, typer.Option("--canary", metavar="SHARE", help="Share of the requests it gets first, such as 10%.")
    ] = "0%",
    golden: Annotated[
        Path | None,
        typer.Option(
            "--golden",
            metavar="FILE",
            callback=_readable,
            readable=False,
            dir_okay=False,
            help="Golden questions (TOML).",
        ),
    ] = None,
    embed: ForEmbedding = False,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Let the running daemon serve a model, once it has shown to be no worse than the one in service."""
    from edged.gateway.rollouts_wire import RolloutRequest

    order = RolloutRequest(
        model=name,
        role="embed" if embed else "chat",
        canary=_share(canary),
        golden=_golden_text(golden) if golden is not None else None,
    )
    with _daemon(context) as client:
        _follow(client, client.activate(order), wait=not no_wait, as_json=as_json)


@models.command("rollback")
def models_rollback(
    context: typer.Context, embed: ForEmbedding = False, no_wait: NoWait = False, as_json: Json = False
) -> None:
    """End the activation under way, or bring the model back that served before the last one."""
    from edged.gateway.rollouts_wire import RollbackRequest

    with _daemon(context) as client:
        begun = client.roll_back(RollbackRequest(role="embed" if embed else "chat"))
        _follow(client, begun, wait=not no_wait, as_json=as_json, wanted=("promoted", "unchanged", "rolled_back"))


@models.command("status")
def models_status(context: typer.Context, as_json: Json = False) -> None:
    """Show which models serve, and how the latest activations went and why."""
    with _daemon(context) as client:
        body = client.rollouts()
    if as_json:
        _say_json(body.model_dump(mode="json"))
        return
    for role, serving in body.serving.items():
        before = f", before: {serving.previous}" if serving is not None and serving.previous else ""
        _say(f"{role + ':':<7}{serving.model + ', ' + serving.state + before if serving is not None else 'no model'}")
    for rollout in body.rollouts:
        _say(f"{rollout.id:>4}  {_ago(rollout.started_at)}  {_rollout_line(rollout)}")


def _share(text: str) -> float:
    """``10%`` or ``0.1``."""
    number = text.removesuffix("%")
    try:
        share = float(number) / (100 if number != text else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise RequestError(f"--canary {text} is no share", hint="give one below 100%, such as 10%")
    return share


def _golden_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {file}: {error}", hint="golden questions are a TOML file in UTF-8") from error


def _follow(
    client: "Client",
    begun: "RolloutBody",
    *,
    wait: bool,
    as_json: bool,
    wanted: Sequence[str] = ("promoted", "unchanged"),
) -> None:
    """Show a rollout until its end; fails when that is another than the one wanted."""
    rollout, step = begun, ""
    for rollout in client.follow(begun) if wait else ():
        if rollout.progress is not None and not as_json:
            step = _say_progress(rollout.progress, step)
    if as_json:
        _say_json(rollout.model_dump(mode="json"))
    else:
        _say(_rollout_line(rollout))
    if rollout.outcome not in (None, *wanted):
        raise typer.Exit(FAILED)


def _say_progress(progress: "ProgressBody", shown: str) -> str:
    """On a terminal each count, elsewhere each step; returns what is shown now."""
    counted = f" ({progress.done} of {progress.total})" if progress.total else ""
    if sys.stderr.isatty():
        typer.echo(f"\r\x1b[K· {(progress.step + counted).translate(CONTROLS)}", err=True, nl=False)
        if not progress.total or progress.done == progress.total:
            typer.echo(err=True)
    elif progress.step != shown:
        _note(f"· {progress.step}")
    return progress.step


def _rollout_line(rollout: "RolloutBody") -> str:
    if rollout.progress is not None:
        return f"{rollout.role} {rollout.model}: under way: {rollout.progress.step}"
    outcome = (rollout.outcome or "under way").replace("_", " ")
    return f"{rollout.role} {rollout.model}: {outcome}{': ' + rollout.reason if rollout.reason else ''}"


def _ago(moment: float) -> str:
    return f"{_duration(max(0.0, time.time() - moment))} ago"


def _say_models(found: Sequence["ModelInfo"], *, as_json: bool) -> None:
    if as_json:
        _say_json([_model_body(model) for model in found])
        return
    for model in found:
        _say(
            f"{_model_state(model):<10} {model.name} ({_size(model.size_bytes)}, sha256 {model.sha256[:16]})"
            f" {model.path}"
        )


def _model_body(model: "ModelInfo") -> dict[str, Any]:
    import msgspec

    body = msgspec.structs.asdict(model)
    return {**body, "path": str(model.path), "prefixes": msgspec.to_builtins(model.prefixes)}


def _model_state(model: "ModelInfo") -> str:
    if not model.installed:
        return "available"
    return "verified" if model.verified else "installed"


@contextlib.contextmanager
def _progress(label: str, *, total: int | None, shown: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, where that is a terminal; the caller tells it what is done and what is to do."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(label, total=total)
        yield lambda done, whole: bars.update(bar, completed=done, total=whole)


# --- offline bundles -------------------------------------------------------------------------------

BundleFile = Annotated[Path, typer.Argument(metavar="FILE", callback=_readable, readable=False, help="A bundle.")]


@bundle.command("create")
def bundle_create(
    context: typer.Context,
    target: Annotated[str, typer.Option("--target", metavar="BOARD", help="rpi5, rpi4, jetson, rk3588 or amd64.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", dir_okay=False, help="The bundle to write.")],
    names: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="A model of the catalogue; may be repeated.")
    ] = None,
    packages: Annotated[
        list[str] | None,
        typer.Option("--packages", metavar="NAME,…", help="Debian packages beside those that edged needs."),
    ] = None,
    no_packages: Annotated[bool, typer.Option("--no-packages", help="No Debian packages at all.")] = False,
    python: Annotated[
        str | None, typer.Option("--python", metavar="VERSION", help="The device's Python, such as 3.11.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY.pem", exists=True, dir_okay=False, help="Sign it by this key.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", metavar="DIRECTORY", help="edged's source tree, if not this program's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Gather all that a device needs to install edged without a network; a fit llama.cpp is compiled for it here."""
    from edged.bundle import archive, gather

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    listed = [name for each in packages or () for name in each.split(",") if name]
    if no_packages and listed:
        raise RequestError("--packages and --no-packages exclude each other", hint="give one of them")
    config = _load(context)
    catalog = _catalog(config)
    order = gather.plan(
        catalog,
        target,
        python=python,
        models=names or (),
        packages=None if no_packages else listed,
        source=source,
        cache=config.cache,
    )
    gather.create(order, catalog, out, lambda step: _bundle_step(step, shown=not as_json), _signing(sign))
    _say_bundle(out, *archive.read(out), as_json=as_json)


def _signing(key: Path | None) -> Callable[[bytes], bytes] | None:
    if key is None:
        return None
    from edged.bundle.sign import load_key

    return load_key(key, lambda: str(typer.prompt(f"Passphrase of {key}", hide_input=True, err=True))).sign


@contextlib.contextmanager
def _bundle_step(step: str, *, shown: bool) -> Iterator[Callable[[int, int | None], None]]:
    if shown:
        _note(f"· {step}")
    with _progress(step, total=None, shown=shown) as advance:
        yield advance


def _say_bundle(file: Path, manifest: "Manifest", signed: bool, *, as_json: bool) -> None:
    size = sum(declared.bytes for declared in manifest.files.values())
    if as_json:
        _say_json({"file": str(file), "signed": signed, "bytes": size, "manifest": _plain(manifest)})
        return
    kinds = collections.Counter(name.partition("/")[0] for name in manifest.files)
    lines = {
        "edged": manifest.edged,
        "for": f"{manifest.target} ({manifest.machine}), {manifest.suite}, Python {', '.join(manifest.python)}",
        "models": ", ".join(manifest.models) or "none",
        "packages": ", ".join(manifest.packages) or "none",
        "files": f"{_size(size)}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}",
        "signature": "there, not checked" if signed else "none",
    }
    for name, text in lines.items():
        _say(f"{name + ':':<11}{text}")


@bundle.command("show")
def bundle_show(file: BundleFile, as_json: Json = False) -> None:
    """Show what a bundle says of itself, unchecked."""
    from edged.bundle import archive

    _say_bundle(file, *archive.read(file), as_json=as_json)


@bundle.command("check")
def bundle_check(
    file: BundleFile,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PUB.pem", help="The public key that must have signed it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every file of a bundle with its manifest, and that with its signature, as a device does."""
    from edged.bundle import archive

    archive.check(file, key)
    if as_json:
        _say_json({"file": str(file), "whole": True, "signed_by": str(key) if key is not None else None})
    else:
        signer = f"signed by {key}" if key is not None else "no signature was asked for (--key)"
        _say(f"whole: {file}, {signer}")


@bundle.command("keygen")
def bundle_keygen(
    out: Annotated[Path, typer.Option("--out", metavar="NAME", help="Makes NAME.pem and NAME.pub.")] = Path("bundle"),
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Ask for one, and encrypt the private key.")] = False,
    as_json: Json = False,
) -> None:
    """Make a key pair: NAME.pem signs bundles and stays here; NAME.pub goes to the devices."""
    from edged.bundle.sign import make_key

    private, public = out.with_name(out.name + ".pem"), out.with_name(out.name + ".pub")
    secret = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True) if passphrase else ""
    make_key(private, public, secret)
    if as_json:
        _say_json({"private": str(private), "public": str(public)})
    else:
        _say(f"made: {private} (keep it secret: who has it, installs on your devices)\nmade: {public}")


# --- profiles --------------------------------------------------------------------------------------


@app.command()
def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Show the last ten seconds and end.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the workers use, each second: a table, and a heat map of the cores."""
    from edged.probe.profile import to_json

    with _daemon(context) as client:
        if once:
            shown = client.profile("10s")
            _say_profiles(shown, [shown], as_json=as_json)
            return
        with contextlib.closing(client.profiles()) as seconds, contextlib.suppress(KeyboardInterrupt):
            if as_json:
                for second in seconds:
                    typer.echo(to_json(second))
            else:
                _watch_profiles(seconds)


def _watch_profiles(seconds: "Iterable[Profile]") -> None:
    from rich.live import Live

    from edged.probe.draw import HEAT_COLUMNS, screen

    history: collections.deque[Profile] = collections.deque(maxlen=HEAT_COLUMNS)
    console = _console()
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        for second in seconds:
            history.append(second)
            live.update(screen(second, history), refresh=True)


def _say_profiles(shown: "Profile", history: "Sequence[Profile]", *, as_json: bool) -> None:
    from edged.probe.draw import screen
    from edged.probe.profile import to_json

    if as_json:
        typer.echo(to_json(shown))
    else:
        _console().print(screen(shown, history))


@profile.command("record")
def profile_record(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="Where to; a line of JSON a second.")],
    seconds: Annotated[int, typer.Option("--seconds", min=1, help="How long.")] = 60,
    as_json: Json = False,
) -> None:
    """Keep the profiles of the coming seconds in a file."""
    from edged.probe.profile import to_json

    recorded = 0
    with (
        _daemon(context) as client,
        contextlib.closing(client.profiles()) as stream,
        _writing(file) as output,
        _progress("recording", total=seconds, shown=not as_json) as advance,
    ):
        for second in itertools.islice(stream, seconds):
            output.write(to_json(second) + b"\n")
            recorded += 1
            advance(recorded, seconds)
    if as_json:
        _say_json({"file": file, "seconds": recorded})
    else:
        _say(f"recorded   {file} ({recorded} s)")


@contextlib.contextmanager
def _writing(file: Path) -> "Iterator[BinaryIO]":
    try:
        with file.open("wb") as output:
            yield output
    except OSError as error:
        raise RequestError(f"cannot write {file}: {error.strerror}", hint="choose another file") from error


@profile.command("show")
def profile_show(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", callback=_readable, readable=False, dir_okay=False, help="A recording.")
    ],
    as_json: Json = False,
) -> None:
    """Show a recording: the whole time as one profile, and a heat map of its seconds."""
    from edged.probe.profile import from_json, merge

    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}", hint="check its permissions") from error
    seconds = [from_json(line) for line in lines]
    if not seconds:
        raise RequestError(f"{file} is empty", hint="record one: edged profile record FILE")
    _say_profiles(merge(seconds), seconds, as_json=as_json)


@profile.command("worker")
def profile_worker(
    context: typer.Context,
    role: Annotated[Literal["chat", "embed"], typer.Option("--role", help="Whose worker.")] = "chat",
    seconds: Annotated[int, typer.Option("--seconds", min=1, max=600, help="How long.")] = 60,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIRECTORY", file_okay=False, help="Where to; edged-<role>-<time> by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out where a running worker's time goes and what memory it keeps: flame graph, memory report, timeline."""
    from edged.gateway.inspection_wire import Finished, InspectionRequest, Started
    from edged.probe import digging

    folder = out or Path(f"edged-{role}-{time.strftime('%Y%m%d-%H%M%S')}")
    order = InspectionRequest(role=role, seconds=seconds, tracer=os.getpid())
    with (
        _daemon(context) as client,
        digging.Digging(folder, digging.find_py_spy(), role=role, seconds=seconds) as dig,
        contextlib.closing(client.inspect(order)) as events,
        _progress(f"looking into the {role} worker", total=seconds, shown=not as_json) as advance,
    ):
        for number, event in enumerate(events):
            match event:
                case Started(pid=pid):
                    dig.started(pid)
                case Finished(allocations=file):
                    dig.finished(Path(file))
                case second:
                    dig.profile(second)
                    advance(number, seconds)
    _say_dug(dig.write(), as_json=as_json)


def _say_dug(dug: "Dug", *, as_json: bool) -> None:
    if as_json:
        _say_json(_plain(dug))
        return
    reach = "into llama.cpp" if dug.native else "of Python alone"
    _say(f"time: {dug.samples} stacks, {reach}; innermost:")
    for frame, share in dug.innermost:
        _say(f"{share:>8.0%}  {frame}")
    _say(f"memory taken meanwhile and kept: {_size(sum(kept.bytes for kept in dug.kept))}")
    for kept in dug.kept:
        _say(f"{_size(kept.bytes):>9}  {kept.allocations} pieces, {kept.place}")
    for note in dug.notes:
        _note(f"note: {note}")
    _say(f"written to {dug.folder}: {', '.join(dug.files)}")


# --- demo ------------------------------------------------------------------------------------------


@app.command()
def demo(
    context: typer.Context,
    broker: Annotated[
        str | None, typer.Option("--broker", metavar="URL", help="MQTT broker to use; its own by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the whole way once: a broker, a daemon, shipped manuals, three sensors' events and their answers."""
    from edged.demo import runner

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    record = DemoRecord()
    runner.run(_load(context), record if as_json else DemoScreen(), broker_url=broker)
    if as_json:
        _say_json({"steps": record.steps, "events": record.events})


def _leave(number: int, _frame: object) -> None:
    """End as on an error, so that the daemon and the broker that the demo started end too."""
    raise SystemExit(128 + number)


class DemoScreen:
    """Shows the demo to a person."""

    def __init__(self) -> None:
        self._answer = AnswerScreen()

    def step(self, text: str) -> None:
        _say(f"· {text}")

    def event(self, message: "Message", question: str) -> None:
        _say(f"\n{message.topic} ← {message.payload}\n? {question}")

    def delta(self, text: str) -> None:
        self._answer.delta(text)

    def restarted(self, reason: str) -> None:
        self._answer.restarted(reason)

    def answer(self, answer: "wire.AnswerBody", round_trip_ms: float) -> None:
        self._answer.finish(answer)
        _say(f"  from sensor to sensor {round_trip_ms:.0f} ms")


class DemoRecord:
    """Keeps the demo for a program: what was done, and each event with its answer."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.events: list[dict[str, Any]] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def event(self, message: "Message", question: str) -> None:
        asked = {"topic": message.topic, "payload": message.payload, "question": question}
        self.events.append({**asked, "streamed": "", "restarted": []})

    def delta(self, text: str) -> None:
        self.events[-1]["streamed"] += text

    def restarted(self, reason: str) -> None:
        self.events[-1]["restarted"].append(reason)

    def answer(self, answer: "wire.AnswerBody", round_trip_ms: float) -> None:
        self.events[-1].update(answer=answer.model_dump(mode="json"), round_trip_ms=round_trip_ms)


if __name__ == "__main__":
    main()
