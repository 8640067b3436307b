"""One tree of errors. Each carries a stable code, facts, advice, and whether trying again can help.

Edges translate: :data:`HTTP_STATUS` maps a code to its status; MQTT answers carry the same body as JSON.
"""

from typing import ClassVar


class EdgedError(Exception):
    """An error with a stable ``code``, the ``facts`` of this case and a ``hint`` saying what to do."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint
        self.facts = facts

    def body(self) -> dict[str, object]:
        """The error as every door shows it: ``code``, ``message``, ``hint``, ``retryable`` and the facts."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
            **({"facts": {key: _plain(value) for key, value in self.facts.items()}} if self.facts else {}),
        }


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | None) else str(value)


# --- configuration ---------------------------------------------------------------------------------


class ConfigError(EdgedError):
    code = "config_invalid"


class HomeInUseError(ConfigError):
    """Another daemon holds the home directory."""


# --- models ----------------------------------------------------------------------------------------


class ModelError(EdgedError):
    code = "model_error"


class ModelNotFoundError(ModelError):
    code = "model_not_found"


class ModelSourceError(ModelError):
    """A source did not deliver: no network, an HTTP error, a missing member."""

    code = "model_source_failed"
    retryable = True


class ChecksumError(ModelError):
    code = "model_checksum_mismatch"


class GgufError(ModelError):
    """The file is no GGUF, or a broken one."""

    code = "model_file_invalid"


class ModelTooLargeError(ModelError):
    """The memory has no room for the model, not even alone."""

    code = "model_too_large"


class RolloutBusyError(EdgedError):
    """Another model is being brought into service."""

    code = "rollout_busy"
    retryable = True


class RolloutNotFoundError(EdgedError):
    code = "rollout_not_found"


class DiskFullError(EdgedError):
    code = "disk_full"
    retryable = True


# --- workers ---------------------------------------------------------------------------------------


class WorkerError(EdgedError):
    code = "worker_error"


class WorkerUnavailableError(WorkerError):
    """No worker is ready to take the request."""

    code = "worker_unavailable"
    retryable = True


class WorkerLostError(WorkerError):
    """The worker died under the request, and again under its second run."""

    code = "worker_lost"
    retryable = True


class QueueFullError(WorkerError):
    code = "queue_full"
    retryable = True


class BatchShedError(QueueFullError):
    """The device is short of memory and takes no batch work for now."""

    code = "batch_shed"


class PromptTooLongError(WorkerError):
    code = "prompt_too_long"


class OutputFormatError(WorkerError):
    """The grammar or JSON schema asked for cannot be held to; ``message`` says where and why."""

    code = "output_format_invalid"


class DeadlineError(WorkerError):
    code = "deadline_exceeded"
    retryable = True


class InspectionUnavailableError(WorkerError):
    """A tool that looks into a worker is missing, or cannot be used here."""

    code = "inspection_unavailable"
    default_hint = (
        "install the tools where edged is: sudo /opt/edged/current/bin/pip install 'edged[profiling]' "
        "(without the service: edged's own pip), then restart edged"
    )


class InspectionBusyError(WorkerError):
    """Somebody looks into this worker already."""

    code = "inspection_busy"
    retryable = True
    default_hint = "wait until that is over"


# --- the device -----------------------------------------------------------------------------------


class ConfinementError(EdgedError):
    """Processes cannot be kept where it was decided."""

    code = "confinement_failed"


class ProbeError(EdgedError):
    """A means of measurement cannot be used, or the probe and its client do not understand each other."""

    code = "probe_error"


class ProfileError(EdgedError):
    """What was read is no profile, or one of another schema."""

    code = "profile_invalid"


class ProfileUnavailableError(EdgedError):
    """Nothing is measured, or nothing yet."""

    code = "profile_unavailable"
    retryable = True


# --- stores ----------------------------------------------------------------------------------------


class StoreError(EdgedError):
    code = "store_error"


class StoreClosedError(StoreError):
    code = "store_closed"
    retryable = True


class NewerSchemaError(StoreError):
    """The database was written by a newer edged."""

    code = "store_schema_newer"


class EmbedderMismatchError(StoreError):
    """Vectors of one embedder met those of another."""

    code = "embedder_mismatch"


class DocumentNotFoundError(StoreError):
    code = "document_not_found"


# --- bundles ---------------------------------------------------------------------------------------


class BundleError(EdgedError):
    """An offline bundle cannot be made."""

    code = "bundle_failed"


class BundleInvalidError(BundleError):
    """A bundle is damaged, changed, or not signed by the key asked for."""

    code = "bundle_invalid"


# --- requests --------------------------------------------------------------------------------------


class RequestError(EdgedError):
    """What a sender sent cannot be used as it is."""

    code = "request_invalid"


class UnsupportedParameterError(RequestError):
    """A parameter that other servers of the same API may know, and this one does not; never ignored silently."""

    code = "unsupported_parameter"


class PayloadTooLargeError(RequestError):
    code = "payload_too_large"


class IdReusedError(RequestError):
    """The sender's id is still that of an event with another content."""

    code = "id_reused"
    default_hint = "use a new id for each event; the same id with the same payload asks for the same answer again"


class UnauthorizedError(RequestError):
    code = "unauthorized"


class DaemonUnreachableError(EdgedError):
    """No daemon answers at the configured address."""

    code = "daemon_unreachable"
    retryable = True


class UnanswerableError(EdgedError):
    """No honest answer can be given in the format that was asked for."""

    code = "unanswerable"
    default_hint = "ask without a format to get the passages themselves"


class ExpiredError(EdgedError):
    """The event was no longer worth answering when its turn came."""

    code = "expired"


HTTP_STATUS: dict[str, int] = {
    RequestError.code: 422,
    UnsupportedParameterError.code: 400,
    PayloadTooLargeError.code: 413,
    UnauthorizedError.code: 401,
    PromptTooLongError.code: 422,
    OutputFormatError.code: 422,
    DocumentNotFoundError.code: 404,
    ModelNotFoundError.code: 404,
    RolloutNotFoundError.code: 404,
    ModelError.code: 422,
    GgufError.code: 422,
    ChecksumError.code: 422,
    RolloutBusyError.code: 409,
    ModelTooLargeError.code: 507,
    EmbedderMismatchError.code: 409,
    DiskFullError.code: 507,
    ExpiredError.code: 410,
    UnanswerableError.code: 422,
    DeadlineError.code: 504,
    QueueFullError.code: 503,
    BatchShedError.code: 503,
    WorkerUnavailableError.code: 503,
    WorkerLostError.code: 503,
    InspectionUnavailableError.code: 501,
    InspectionBusyError.code: 409,
    StoreClosedError.code: 503,
    ProfileUnavailableError.code: 503,
}
"""Error code to HTTP status (RFC 9110); every other code is a 500."""
