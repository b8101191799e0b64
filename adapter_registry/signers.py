"""Who may sign what is pushed: the allow-list of keys, and the check of what came with a push."""

from collections.abc import Mapping
from pathlib import Path

from adapter_registry.errors import CannotStartError, SignatureRefusedError, SigningKeysError
from adapter_registry.messages import SignedBy
from prad.artefact import ArtefactError
from prad.artefact.signatures import SIGNATURES, Signatures, fingerprint, read_signatures
from prad.artefact.signing import SigningError, public_keys, verifies

_AGAIN = "sign it again (prad adapter sign FOLDER --key FILE), and push again"
_NAMED = 8  # keys that an error message lists


class Signers:
    """`allowed`: a file or folder of public keys; None: nobody needs to sign, and anybody may.

    The keys are read at every push: one that is put there counts at once, and one that is taken away no more.
    Raises CannotStartError if they cannot be read.
    """

    def __init__(self, allowed: Path | None) -> None:
        self._allowed = None if allowed is None else allowed.expanduser()
        try:
            self._known()
        except SigningKeysError as error:
            raise CannotStartError(f"{error.message} (signing_keys, PRAD_REGISTRY_SIGNING_KEYS)") from error

    def take(self, staged: Path, digest: str) -> tuple[SignedBy, ...]:
        """The signatures in a staged folder, whose files have `digest`; the file with them is removed.

        Raises SignatureRefusedError, SigningKeysError.
        """
        known = self._known()
        try:
            found = read_signatures(staged)
        except ArtefactError as error:
            raise SignatureRefusedError(f"{error}; {_AGAIN}", param=SIGNATURES) from error
        if found is None:
            if known is not None:
                raise SignatureRefusedError(
                    "the adapter is not signed, and this registry takes signed ones only: sign it (prad "
                    f"adapter sign FOLDER --key FILE) with a key that it knows ({_listed(known)}), and push "
                    "again",
                    param=SIGNATURES,
                )
            return ()
        _require_true(found, digest)
        if known is not None and not any(each.key in known for each in found.signatures):
            by = ", ".join(each.fingerprint for each in found.signatures)
            raise SignatureRefusedError(
                f"the adapter is signed by {by}, which this registry does not know: sign it with a key that "
                f"it knows ({_listed(known)}), or have the public key added to its signing_keys",
                param=SIGNATURES,
            )
        (staged / SIGNATURES).unlink()
        names = known or {}
        return tuple(SignedBy(**each.model_dump(), name=names.get(each.key, "")) for each in found.signatures)

    def _known(self) -> Mapping[str, str] | None:
        """Names by key; None: whoever signs is taken. Raises SigningKeysError."""
        if self._allowed is None:
            return None
        try:
            return public_keys(self._allowed)
        except SigningError as error:
            raise SigningKeysError(str(error)) from error


def _require_true(found: Signatures, digest: str) -> None:
    """Raises SignatureRefusedError."""
    if found.digest != digest:
        raise SignatureRefusedError(
            f"{SIGNATURES} is of digest {found.digest}, and the files have {digest}: one of them was changed "
            f"after it was signed; {_AGAIN}",
            param=SIGNATURES,
        )
    for each in found.signatures:
        if not verifies(each, digest):
            raise SignatureRefusedError(
                f"the signature in {SIGNATURES} is not one of {each.fingerprint} over these files: it is "
                f"damaged, or made up; {_AGAIN}",
                param=SIGNATURES,
            )


def _listed(known: Mapping[str, str]) -> str:
    found = [f"{name} {fingerprint(key)}" for key, name in known.items()]
    return ", ".join(found[:_NAMED]) + (" and others" if len(found) > _NAMED else "")
