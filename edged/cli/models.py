"""``edged models``: model files on this device."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edged.cli.screen import note, progress_bar, say, say_json, say_table, size_text
from edged.cli.session import Json, catalog_of, client_of, config_of, readable
from edged.errors import DaemonUnreachableError, EdgedError, RequestError

if TYPE_CHECKING:
    from edged.config import Config
    from edged.models.catalog import Catalog, ModelInfo
    from edged.models.wide import Copied


def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the models of the catalogue and the imported ones."""
    found = catalog_of(config_of(context)).available()
    if as_json:
        say_json([_model_body(model) for model in found])
        return
    rows = [
        (model.name, model.kind, _model_state(model), size_text(model.size_bytes), model.description) for model in found
    ]
    say_table(("NAME", "KIND", "STATE", "SIZE", "DESCRIPTION"), rows)


def pull(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Models; the configured ones when none is named.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Download nothing: what is not installed comes from the cache.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Download models and check them; what is there and right is left as it is."""
    config = config_of(context)
    catalog = catalog_of(config)
    configured = [model.model for model in (config.chat, config.embed) if model.path is None]
    pulled = []
    for name in names or configured:
        with progress_bar(name, total=None, shown=not as_json) as advance:
            catalog.pull(name, advance, offline=offline)
        pulled.append(catalog.info(name))
    _say_models(pulled, as_json=as_json)
    for model in pulled:
        _widen_once(config, catalog, model)


def widen(
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

    config = config_of(context)
    catalog = catalog_of(config)
    given = config.chat.path if name is None else None
    name = given.stem if given else name or config.chat.model
    file = given or catalog.path(name)
    if reason := widening.unsuitable(config, file):
        if as_json:
            say_json({"model": name, "kept": False, "reason": reason})
        else:
            say(f"{name}: no copy: {reason}")
        return
    copied = widening.widen(config, catalog.identity(given or name), file)
    if as_json:
        say_json({"model": name, "kept": copied.kept, **msgspec.to_builtins(copied.trial)})
    else:
        say(_trial_line(name, copied))


def _widen_once(config: "Config", catalog: "Catalog", model: "ModelInfo") -> None:
    """After an installation, which does not fail for it: the model answers without a copy as well."""
    from edged.serving import widening

    try:
        copied = widening.widen_once(config, catalog.identity(model.name), model.path)
    except EdgedError as error:
        note(f"no eight-bit copy of {model.name}: {error.message}")
        return
    if copied is not None:
        note(_trial_line(model.name, copied))


def _trial_line(name: str, copied: "Copied") -> str:
    file, copy = copied.trial.file, copied.trial.copy
    speeds = f"prompts {file.prompt / copy.prompt:.2f}x and answers {file.answer / copy.answer:.2f}x as fast"
    end = f"kept ({size_text(copied.size_bytes)})" if copied.kept else "not kept"
    return f"{name}: {speeds} from an eight-bit copy: {end}"


def verify(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A model; all installed ones by default.")] = None,
    as_json: Json = False,
) -> None:
    """Read installed models again and compare their checksums."""
    from edged.models.wide import Copies

    config = config_of(context)
    catalog = catalog_of(config)
    names = [name] if name else [model.name for model in catalog.available() if model.installed]
    verified = []
    for each in names:
        verified.append(catalog.verify(each))
        Copies(config.wide_dir).verify(catalog.identity(each))
    _say_models(verified, as_json=as_json)


def import_(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", callback=readable, readable=False, dir_okay=False, help="A GGUF file.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Its name; from the catalogue or the file when unset.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a GGUF file in, so that chat.model or embed.model can name it."""
    config = config_of(context)
    catalog = catalog_of(config)
    model = catalog.import_file(file, name)
    _say_models([model], as_json=as_json)
    _widen_once(config, catalog, model)


def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An installed model that is not in use.")],
    as_json: Json = False,
) -> None:
    """Remove a model's files, also from the cache, unless it is configured or in use."""
    from edged.models.wide import Copies

    config = config_of(context)
    catalog = catalog_of(config)
    file = catalog.info(name).path
    for section in (config.chat, config.embed):
        if name == section.model if section.path is None else section.path.resolve() == file.resolve():
            raise RequestError(
                f"the configuration names {name}", hint="let chat.model or embed.model name another first"
            )
    if config.events_db.exists() and (use := _use_of(context, name)):
        raise RequestError(f"{name} {use}", hint="'edged models activate' brings another into service")
    Copies(config.wide_dir).drop(name)  # first: once the model is gone, this command would not come to it again
    freed = catalog.remove(name)
    if as_json:
        say_json({"model": name, "freed_bytes": freed})
    else:
        say(f"removed {name} ({size_text(freed)})")


def _use_of(context: typer.Context, name: str) -> str:
    """What the daemon does with a model, empty if nothing. Only a running one knows what it was told to serve."""
    try:
        with client_of(context) as client:
            body = client.rollouts()
    except DaemonUnreachableError as error:
        error.hint = f"which models were activated is known to a running daemon alone; {error.hint}"
        raise
    if any(serving is not None and serving.model.rpartition("@")[0] == name for serving in body.serving.values()):
        return "serves"
    if any(rollout.outcome is None and rollout.model == name for rollout in body.rollouts):
        return "is being brought into service"
    return ""


def _say_models(found: Sequence["ModelInfo"], *, as_json: bool) -> None:
    if as_json:
        say_json([_model_body(model) for model in found])
        return
    for model in found:
        say(
            f"{_model_state(model):<10} {model.name} ({size_text(model.size_bytes)}, sha256 {model.sha256[:16]})"
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
