"""``edged docs``: the documents that answers stand on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edged.cli.screen import progress_bar, say, say_json, say_table, size_text
from edged.cli.session import FAILED, Collection, Json, client_of
from edged.errors import DaemonUnreachableError, EdgedError, RequestError

if TYPE_CHECKING:
    from edged.client import Client
    from edged.gateway import wire

FORMATS: dict[str, Literal["markdown", "text"]] = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".txt": "text",
    ".text": "text",
}


@dataclass
class Upload:
    """A file and the document it becomes."""

    file: Path
    document_id: str


def add(
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
    with client_of(context) as client, progress_bar("adding", total=len(uploads), shown=not as_json) as advance:
        for upload in uploads:
            results.append(_upload(client, upload, collection))
            advance(len(results), len(uploads))
    if as_json:
        say_json(results)
    else:
        for result in results:
            say(_told(result))
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


def list_(
    context: typer.Context,
    collection: Annotated[str | None, typer.Option("--collection", help="Only this collection.")] = None,
    as_json: Json = False,
) -> None:
    """List the documents."""
    with client_of(context) as client:
        found = client.documents(collection)
    if as_json:
        say_json([document.model_dump(mode="json") for document in found])
        return
    rows = [(item.id, item.collection, item.title, str(item.chunks), size_text(item.bytes)) for item in found]
    say_table(("ID", "COLLECTION", "TITLE", "PASSAGES", "SIZE"), rows)


def remove(
    context: typer.Context,
    document_id: Annotated[str, typer.Argument(metavar="ID", help="The document's id.")],
    collection: Collection = "default",
    as_json: Json = False,
) -> None:
    """Remove a document."""
    with client_of(context) as client:
        client.remove_document(collection, document_id)
    if as_json:
        say_json({"removed": document_id, "collection": collection})
    else:
        say(f"removed    {document_id}")
