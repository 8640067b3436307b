"""A small synchronous client of the daemon's HTTP door, for the command line."""

import json
import ssl
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from edged import credentials
from edged.config import Config, split_listen
from edged.errors import DaemonUnreachableError, EdgedError
from edged.gateway import wire
from edged.gateway.inspection_wire import Finished, InspectionRequest, Started
from edged.gateway.rollouts_wire import RollbackRequest, RolloutBody, RolloutRequest, RolloutsBody
from edged.probe.profile import Profile, from_json
from edged.probe.rollup import Window
from edged.types import Delta, Restarted

E = TypeVar("E")
AskEvent = Delta | Restarted | wire.AnswerBody
InspectionEvent = Started | Profile | Finished
CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 30.0
FOLLOW_SECONDS = 20
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # what a listener takes, no one can connect to


class Client:
    """Talks to one daemon. Every error is an :class:`EdgedError` with the server's own code and hint.

    ``certificate`` is the daemon's own, for HTTPS: that one is trusted, and no other.
    ``transport`` replaces the network.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        certificate: Path | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._base_url = base_url
        self._http = httpx.Client(
            base_url=base_url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            verify=_trusting(certificate) if certificate is not None else base_url.startswith("https"),
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # a slow device may think for long
            transport=transport,
            trust_env=False,  # no proxy stands between us and our own device
        )

    @classmethod
    def of(cls, config: Config) -> Self:
        """A client of the daemon that serves with ``config``."""
        host, port = split_listen(config.http.listen)
        host = WILDCARDS.get(host, host)
        certificate = config.http.tls_cert
        scheme = "http" if certificate is None else "https"
        address = f"[{host}]" if ":" in host else host
        key = _read_key(config.api_key_path)
        return cls(f"{scheme}://{address}:{port}", api_key=key, certificate=certificate)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def status(self) -> wire.StatusBody:
        """What ``/health`` shows, also while it is failing."""
        # A socket that systemd holds takes the request also where no daemon comes to answer it.
        response = self._send("GET", "/health", expected=(200, 503), timeout_seconds=HEALTH_SECONDS)
        try:
            return wire.StatusBody.model_validate_json(response.content)
        except ValidationError as error:
            raise self._foreign(response) from error

    def ask(self, query: wire.QueryRequest) -> Generator[AskEvent, None, None]:
        """The answer as it grows; the finished one comes last. Closing the iterator cancels the work."""
        request = self._http.build_request(
            "POST",
            "/v1/query",
            json=query.model_dump(exclude_defaults=True),
            headers={"accept": "text/event-stream"},
        )
        yield from self._events(request, _ask_events)

    def add_document(self, document: wire.DocumentRequest) -> wire.IngestedBody:
        """Add or replace a document."""
        response = self._send("POST", "/v1/documents", body=document.model_dump(exclude_none=True), expected=(200, 201))
        return wire.IngestedBody.model_validate_json(response.content)

    def documents(self, collection: str | None = None) -> list[wire.DocumentBody]:
        """All documents, or those of one collection."""
        parameters = {} if collection is None else {"collection": collection}
        response = self._send("GET", "/v1/documents", parameters=parameters)
        return wire.DocumentsBody.model_validate_json(response.content).documents

    def remove_document(self, collection: str, document_id: str) -> None:
        """Remove a document."""
        path = f"/v1/documents/{quote(document_id)}"
        self._send("DELETE", path, parameters={"collection": collection}, expected=(204,))

    def activate(self, order: RolloutRequest) -> RolloutBody:
        """Begin to bring a model into service."""
        return self._rollout("POST", "/v1/rollouts", body=order.model_dump(exclude_none=True))

    def roll_back(self, order: RollbackRequest) -> RolloutBody:
        """End the rollout under way, or begin to bring the model before back."""
        return self._rollout("POST", "/v1/rollouts/rollback", body=order.model_dump())

    def profile(self, window: Window) -> Profile:
        """What the workers used in the latest window."""
        return from_json(self._send("GET", "/v1/profile", parameters={"window": window}).content)

    def profiles(self) -> Generator[Profile, None, None]:
        """The last second and each from now on, without an end."""
        request = self._http.build_request("GET", "/v1/profile", headers={"accept": "text/event-stream"})
        yield from self._events(request, _profile_events)

    def inspect(self, order: InspectionRequest) -> Generator[InspectionEvent, None, None]:
        """Look into a worker: started, profiles, finished. What it recorded is there until the generator is closed."""
        request = self._http.build_request("POST", "/v1/profile/worker", json=order.model_dump())
        yield from self._events(request, _inspection_events)

    def rollouts(self) -> RolloutsBody:
        """The models that serve, and the latest rollouts."""
        return RolloutsBody.model_validate_json(self._send("GET", "/v1/rollouts").content)

    def follow(self, rollout: RolloutBody) -> Iterator[RolloutBody]:
        """The rollout each time that it has changed; the last one has its outcome."""
        while rollout.outcome is None:
            seen = rollout.progress.version if rollout.progress is not None else 0
            parameters = {"seen": str(seen), "wait_s": str(FOLLOW_SECONDS)}
            rollout = self._rollout("GET", f"/v1/rollouts/{rollout.id}", parameters=parameters)
            yield rollout

    def _rollout(self, method: str, path: str, **request: Any) -> RolloutBody:
        response = self._send(method, path, expected=(200, 202), **request)
        return RolloutBody.model_validate_json(response.content)

    def _events(
        self, request: httpx.Request, read: Callable[[Iterable[tuple[str, str]]], Iterator[E]]
    ) -> Generator[E, None, None]:
        response = self._exchange(request, stream=True)
        try:
            if response.status_code != 200:
                response.read()
                raise self._error(response)
            yield from read(server_sent_events(response.iter_lines()))
        except httpx.TransportError as error:
            raise _lost(error) from error
        finally:
            response.close()

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        parameters: dict[str, str] | None = None,
        expected: tuple[int, ...] = (200,),
        timeout_seconds: float | None = None,
    ) -> httpx.Response:
        timeout = httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS)
        response = self._exchange(self._http.build_request(method, path, json=body, params=parameters, timeout=timeout))
        if response.status_code not in expected:
            raise self._error(response)
        return response

    def _exchange(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            return self._http.send(request, stream=stream)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise DaemonUnreachableError(
                f"no daemon answers at {self._base_url}: {error}",
                hint="start it with 'edged serve', or 'systemctl start edged'; http.listen says where it serves",
                url=self._base_url,
            ) from error
        except httpx.TransportError as error:
            raise _lost(error) from error

    def _error(self, response: httpx.Response) -> EdgedError:
        try:
            return error_from(response.json())
        except (ValueError, KeyError, TypeError):
            return self._foreign(response)

    def _foreign(self, response: httpx.Response) -> EdgedError:
        return DaemonUnreachableError(
            f"what answers at {self._base_url} is no edged: HTTP status {response.status_code}",
            hint="another program has the port; http.listen says where edged serves",
            url=self._base_url,
        )


def error_from(body: dict[str, Any]) -> EdgedError:
    """The error a problem document tells of, of the class that has its code."""
    facts = {str(name): value for name, value in body.get("facts", {}).items() if name not in ("message", "hint")}
    kind = _class_of(str(body["code"]), retryable=bool(body["retryable"]))
    return kind(str(body["detail"]), hint=str(body["hint"]), **facts)


def _class_of(code: str, *, retryable: bool) -> type[EdgedError]:
    """The class of a code; for one of HTTP itself or of a newer daemon, a class of its own."""
    kinds = [EdgedError]
    for kind in kinds:
        if kind.code == code:
            return kind
        kinds += kind.__subclasses__()
    return type("RemoteError", (EdgedError,), {"code": code, "retryable": retryable})


def server_sent_events(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and data of each event in a ``text/event-stream``."""
    name, data = "message", [""]
    for line in lines:
        field, _, value = line.partition(":")
        match field:
            case "event":
                name = value.removeprefix(" ")
            case "data":
                data.append(value.removeprefix(" "))
            case "" if not line:
                if data[1:]:
                    yield name, "\n".join(data[1:])
                name, data = "message", [""]


def _ask_events(events: Iterable[tuple[str, str]]) -> Iterator[AskEvent]:
    for name, data in events:
        match name:
            case "delta":
                yield Delta(json.loads(data)["text"])
            case "restarted":
                yield Restarted(json.loads(data)["reason"])
            case "answer":
                yield wire.AnswerBody.model_validate_json(data)
                return
            case "error":
                raise error_from(json.loads(data))
    raise _lost("the stream ended without an answer")


def _profile_events(events: Iterable[tuple[str, str]]) -> Iterator[Profile]:
    for name, data in events:
        match name:
            case "profile":
                yield from_json(data)
            case "error":
                raise error_from(json.loads(data))
    raise _lost("the stream of profiles ended")


def _inspection_events(events: Iterable[tuple[str, str]]) -> Iterator[InspectionEvent]:
    for name, data in events:
        match name:
            case "started":
                yield Started.model_validate_json(data)
            case "profile":
                yield from_json(data)
            case "finished":
                yield Finished.model_validate_json(data)
                return
            case "error":
                raise error_from(json.loads(data))
    raise _lost("the daemon ended before it had looked into the worker")


def _lost(reason: object) -> DaemonUnreachableError:
    return DaemonUnreachableError(
        f"the connection to the daemon broke: {reason}", hint="see the daemon's log, then ask again"
    )


def _read_key(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None  # the daemon then says itself that it needs one


def _trusting(certificate: Path) -> ssl.SSLContext:
    """We know the certificate from our own configuration."""
    try:
        return credentials.trusting(certificate)
    except OSError as error:
        raise DaemonUnreachableError(
            f"cannot read the daemon's certificate {certificate}: {error}", hint="http.tls_cert names it"
        ) from error
