"""``edged bundle``: edged for devices without a network."""

import collections
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edged.cli.screen import note, plain, progress_bar, say, say_json, size_text
from edged.cli.session import Json, catalog_of, config_of, end_on_signals, readable
from edged.errors import RequestError

if TYPE_CHECKING:
    from edged.bundle.manifest import Manifest

BundleFile = Annotated[Path, typer.Argument(metavar="FILE", callback=readable, readable=False, help="A bundle.")]


def create(
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

    end_on_signals()
    listed = [name for each in packages or () for name in each.split(",") if name]
    if no_packages and listed:
        raise RequestError("--packages and --no-packages exclude each other", hint="give one of them")
    config = config_of(context)
    catalog = catalog_of(config)
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
        note(f"· {step}")
    with progress_bar(step, total=None, shown=shown) as advance:
        yield advance


def _say_bundle(file: Path, manifest: "Manifest", signed: bool, *, as_json: bool) -> None:
    size = sum(declared.bytes for declared in manifest.files.values())
    if as_json:
        say_json({"file": str(file), "signed": signed, "bytes": size, "manifest": plain(manifest)})
        return
    kinds = collections.Counter(name.partition("/")[0] for name in manifest.files)
    lines = {
        "edged": manifest.edged,
        "for": f"{manifest.target} ({manifest.machine}), {manifest.suite}, Python {', '.join(manifest.python)}",
        "models": ", ".join(manifest.models) or "none",
        "packages": ", ".join(manifest.packages) or "none",
        "files": f"{size_text(size)}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}",
        "signature": "there, not checked" if signed else "none",
    }
    for name, text in lines.items():
        say(f"{name + ':':<11}{text}")


def show(file: BundleFile, as_json: Json = False) -> None:
    """Show what a bundle says of itself, unchecked."""
    from edged.bundle import archive

    _say_bundle(file, *archive.read(file), as_json=as_json)


def check(
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
        say_json({"file": str(file), "whole": True, "signed_by": str(key) if key is not None else None})
    else:
        signer = f"signed by {key}" if key is not None else "no signature was asked for (--key)"
        say(f"whole: {file}, {signer}")


def keygen(
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
        say_json({"private": str(private), "public": str(public)})
    else:
        say(f"made: {private} (keep it secret: who has it, installs on your devices)\nmade: {public}")
