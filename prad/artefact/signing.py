"""Ed25519 over an adapter's digest: keys, signatures and their check. Needs `cryptography`, and no torch.

Keys are files as OpenSSH writes them (`ssh-keygen -t ed25519`), or PEM as OpenSSL does.
"""

import base64
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from prad.artefact.files import files_digest
from prad.artefact.signatures import KEY_TYPE, Signature, Signatures, read_signatures, write_signatures
from prad.core.errors import PradError

_OPENSSH = b"-----BEGIN OPENSSH PRIVATE KEY-----"
_PEM_PUBLIC = b"-----BEGIN PUBLIC KEY-----"
_HOW = "(prad adapter sign --generate --key FILE makes a pair, as ssh-keygen -t ed25519 does)"


class SigningError(PradError):
    """A key cannot be read, written or used; the message names the file and how to mend it."""


def message(digest: str) -> bytes:
    """What is signed: with words before it that nothing else signed with the same key begins with."""
    return b"prad adapter sha256:" + digest.encode()


def generate(path: Path, comment: str) -> str:
    """Writes a new private key for this user alone, and `path`.pub beside it; the public key in base64.

    comment: whose it is, behind the public key. Raises SigningError, also if either is there already.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    beside = path.with_name(f"{path.name}.pub")
    if beside.exists():
        raise SigningError(f"{beside} is there already: choose another name for the new key")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_new(path, private, 0o600)
        _write_new(beside, f"{public} {comment}\n", 0o644)
    except FileExistsError:
        raise SigningError(
            f"{path} is there already: leave out --generate to sign with it, or choose another name"
        ) from None
    except OSError as error:
        raise SigningError(f"cannot write {path}: {error.strerror or error}") from error
    return _raw(key.public_key())


def sign(folder: Path, key: Path) -> Signature:
    """Signs the adapter in `folder`, beside what others signed of these very files. Raises SigningError,
    ArtefactError."""
    private, digest = _private(key), files_digest(folder)
    signed = base64.b64encode(private.sign(message(digest))).decode()
    own = Signature(key=_raw(private.public_key()), signature=signed)
    found = read_signatures(folder)
    others = found.signatures if found is not None and found.digest == digest else ()
    kept = (*(each for each in others if each.key != own.key), own)
    write_signatures(folder, Signatures(digest=digest, signatures=kept))
    return own


def verifies(signature: Signature, digest: str) -> bool:
    """Whether the key that it names signed this digest."""
    try:
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(signature.key))
        public.verify(base64.b64decode(signature.signature), message(digest))
    except (InvalidSignature, ValueError):  # the latter for what is no key at all
        return False
    return True


def public_keys(path: Path) -> Mapping[str, str]:
    """Names by public key (base64), of a file or of all files of a folder. Names are the comments behind
    the keys, else those of the files. Raises SigningError, also if there is none."""
    try:
        files = sorted(_files(path)) if path.is_dir() else [path]
        found = {key: name for file in files for key, name in _public(file)}
    except OSError as error:
        raise SigningError(f"cannot read the public keys in {path}: {error.strerror or error}") from error
    if not found:
        raise SigningError(f"{path} holds no public key: put one there for everybody who may sign {_HOW}")
    return found


def _files(folder: Path) -> Iterator[Path]:
    """But hidden ones, as what mounts a folder of secrets leaves some."""
    return (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _public(path: Path) -> Iterator[tuple[str, str]]:
    """Each key of a file, and its name."""
    text = path.read_bytes()
    if b"PRIVATE KEY" in text:
        raise SigningError(f"{path} holds a private key, and only public ones belong there: put {path}.pub")
    if _PEM_PUBLIC in text:
        try:
            pem = load_pem_public_key(text)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SigningError(f"{path} holds no whole public key in PEM: {error} {_HOW}") from error
        yield _raw(_ed25519(path, pem)), path.stem
        return
    for line in filter(None, map(bytes.strip, text.splitlines())):
        if line.startswith(b"#"):
            continue
        try:
            key = load_ssh_public_key(line)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SigningError(
                f"{path} holds a line that is no public key: expected {KEY_TYPE.decode()} AAAA... NAME {_HOW}"
            ) from error
        comment = line.split(maxsplit=2)[2:]
        yield (
            _raw(_ed25519(path, key)),
            "".join(filter(str.isprintable, b"".join(comment).decode("utf-8", "replace"))) or path.stem,
        )


def _private(path: Path) -> Ed25519PrivateKey:
    try:
        text = path.expanduser().read_bytes()
    except OSError as error:
        raise SigningError(f"cannot read the key {path}: {error.strerror or error} {_HOW}") from error
    load = load_ssh_private_key if _OPENSSH in text else load_pem_private_key
    try:
        key = load(text, password=None)
    except TypeError as error:
        raise SigningError(
            f"{path} is locked with a passphrase, which is not asked for here: ssh-keygen -p -f FILE takes "
            "it off a copy"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningError(f"{path} holds no private key {_HOW}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{path} is a key of another kind: expected an Ed25519 key {_HOW}")
    return key


def _ed25519(path: Path, key: object) -> Ed25519PublicKey:
    if not isinstance(key, Ed25519PublicKey):
        raise SigningError(f"{path} holds a key of another kind: expected Ed25519 keys {_HOW}")
    return key


def _raw(key: Ed25519PublicKey) -> str:
    return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def _write_new(path: Path, text: str, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
