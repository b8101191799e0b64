"""Everything the registry refuses, as one tree: raised by the server's parts, raised again by the client.

`code` travels in the error body, so that both ends speak of the same class. The table to HTTP statuses is
in `replies.py`; the state machine raises `IllegalTransitionError`.
"""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from prad.core.errors import PradError


class RegistryError(PradError):
    """Base of everything. `param` names the part of the request that is at fault, where one is."""

    code: ClassVar[str] = "registry_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(RegistryError):
    """The request itself is malformed."""

    code = "invalid_request"


class InvalidTaskNameError(InvalidRequestError):
    code = "invalid_task_name"


class AdapterRefusedError(InvalidRequestError):
    """The pushed files are no usable adapter; nothing was stored."""

    code = "adapter_refused"


class UploadTooLargeError(RegistryError):
    code = "upload_too_large"


class ForbiddenError(RegistryError):
    """Local paths are switched off, or a web page of another origin asks for a change."""

    code = "forbidden"


class HostNotAllowedError(ForbiddenError):
    """The request names this service by a host name that is not allowed."""

    code = "host_not_allowed"


class SignatureRefusedError(ForbiddenError):
    """A push is not signed as this registry wants it; nothing was stored."""

    code = "signature_refused"


class SourceNotAllowedError(ForbiddenError):
    """A push by URI leads, or is sent on, to where this registry fetches nothing from."""

    code = "source_not_allowed"


class NotAReplicaError(ForbiddenError):
    """Who speaks as a prefill replica does not show the secret that replicas have."""

    code = "not_a_replica"


class UnauthorizedError(RegistryError):
    """The registry asks for a token, and the request shows none that is in force."""

    code = "unauthorized"


class RoleTooLowError(ForbiddenError):
    """The token is in force, and its role is not enough for this call."""

    code = "role_too_low"


class NotFoundError(RegistryError):
    code = "not_found"


class TaskNotFoundError(NotFoundError):
    code = "task_not_found"


class VersionNotFoundError(NotFoundError):
    code = "version_not_found"


class FileNotStoredError(NotFoundError):
    code = "file_not_found"


class KeyNotFoundError(NotFoundError):
    code = "key_not_found"


class ConflictError(RegistryError):
    """The request is well formed but not possible in the present state."""

    code = "conflict"


class IllegalTransitionError(ConflictError):
    """The version's state does not allow the event; the message names what would be legal."""

    code = "illegal_transition"


class VersionRoutedError(ConflictError):
    """Retiring a version that plain `task` or an alias means."""

    code = "version_routed"


class NoRoutingBeforeError(ConflictError):
    """A rollback, with no routing before, or one that names what cannot answer any more."""

    code = "no_routing_before"


class QuotaExceededError(ConflictError):
    """A task holds as much as it may; nothing was stored."""

    code = "quota_exceeded"


class KeyExistsError(ConflictError):
    """Two keys of one name could not be told apart in the history."""

    code = "key_exists"


class WouldLockOutError(ConflictError):
    """A change of keys after which those who run the registry could not reach it."""

    code = "would_lock_out"


class NotEmptyError(ConflictError):
    """An export is read into an empty registry only."""

    code = "not_empty"


class RoutingChangedError(RegistryError):
    """The task's routing is no longer the one that the request names: somebody else was first."""

    code = "routing_changed"


class TooManyWaitersError(RegistryError):
    code = "too_many_waiters"


class StoreUnavailableError(RegistryError):
    """The registry's Redis, or the bucket of its files, cannot be used now. What replicas know already goes
    on being served."""

    code = "store_unavailable"


class SourceUnavailableError(RegistryError):
    """What a push by URI names cannot be reached, or not in time; nothing was stored."""

    code = "source_unavailable"


class MissingExtraError(RegistryError):
    """A push by URI needs a package that is not installed with this registry."""

    code = "missing_extra"


class SigningKeysError(RegistryError):
    """The keys that pushes must be signed with cannot be read: nothing is taken until they can."""

    code = "signing_keys_unreadable"


class StorageFullError(RegistryError):
    """The registry's disk is full, or nearly."""

    code = "storage_full"


class StoredFilesDamagedError(RegistryError):
    """The registry's own files are gone, or no longer have the digest they were stored under."""

    code = "stored_files_damaged"


class DigestMismatchError(RegistryError):
    """Client: the files that arrived are not the files of that digest. Never served."""

    code = "digest_mismatch"


class FolderInUseError(RegistryError):
    """Client: files are to be pulled into a folder that holds some."""

    code = "folder_in_use"


class RegistryUnreachableError(RegistryError):
    """Client: no answer, or none that can be read."""

    code = "registry_unreachable"


class CannotStartError(RegistryError):
    """The port or the data folder is taken, or cannot be used."""

    code = "cannot_start"


class ErrorBody(BaseModel):
    """The shape that OpenAI's API gives its errors."""

    model_config = ConfigDict(frozen=True)

    message: str = Field(examples=["support has no version 9; its versions: 1, 2"])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(None, examples=["version"])
    code: str | None = Field(None, examples=["version_not_found"])


class ErrorReply(BaseModel):
    model_config = ConfigDict(frozen=True)

    error: ErrorBody
