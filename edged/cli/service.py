"""What systemd's units run: the daemon, its probe, and what is done before and after them."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from edged.cli.screen import plain, say, say_json
from edged.cli.session import ConfigFile, Json, config_file, config_of, session_of


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
        session_of(context).config_file = config
    overrides: dict[str, object] = {}
    if host is not None:
        overrides["http.listen"] = host
    if model_path is not None:
        overrides["chat.path"] = str(model_path)
    file = config_file(session_of(context))
    settings = config_of(context, overrides, file=file)
    from edged import daemon

    # A file that is gone is refused then: the defaults are nothing that anybody asked to reload.
    raise typer.Exit(daemon.serve(settings, lambda: config_of(context, overrides, file=file)))


def cleanup(context: typer.Context, as_json: Json = False) -> None:
    """Remove what a killed daemon left behind: sockets, worker processes, cgroups. Does nothing while one runs."""
    from edged.cleanup import clean_up

    removed = clean_up(config_of(context))
    if as_json:
        say_json(plain(removed))
    elif removed.held:
        say("a daemon runs: nothing was touched")
    else:
        say(f"removed: {len(removed.sockets)} sockets, {len(removed.workers)} workers, {len(removed.groups)} cgroups")


def reserve(
    context: typer.Context,
    free: Annotated[bool, typer.Option("--free", help="Give them back.")] = False,
    as_json: Json = False,
) -> None:
    """Keep services and logins off the chat worker's cores, where hardware.reserve_cores asks for that. Needs root."""
    cores: tuple[int, ...] = ()
    from edged.hardware import reserve as others

    config = None if free else config_of(context)
    if config is None or not config.hardware.reserve_cores:  # also what an earlier run could not give back
        others.free()
    else:
        from edged.hardware import detect
        from edged.hardware.placement import place
        from edged.serving.keeper import reserve_cores, wishes

        machine = detect.machine()
        placement = place(machine, wishes(config))
        reserve_cores(machine, placement, others.group_of_service())
        cores = placement.reserved
    if as_json:
        say_json({"reserved": list(cores)})
    else:
        say(f"reserved cores: {', '.join(map(str, cores)) or 'none'}")


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
