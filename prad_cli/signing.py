"""`prad adapter sign`: an adapter's files are signed before they are pushed, and a key for it is made."""

from pathlib import Path
from typing import Annotated

import typer

from prad.artefact import read_servable
from prad.artefact.signatures import SIGNATURES, fingerprint
from prad_cli.operating import operator


def sign(
    key: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Your private key (Ed25519), as ssh-keygen writes it, or PEM."),
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Folder with prad.json and the weights.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Make the key first, and FILE.pub with the public one.")
    ] = False,
) -> None:
    """Sign an adapter, so that a registry can know whose it is: what is pushed from DIR then is signed.

    A registry with `--signing-keys` takes only what one of its keys signed. Sign again after a file changed.
    """
    from prad.artefact import signing  # imports cryptography

    if folder is None and not generate:
        raise typer.BadParameter("name the folder to sign, or make a key with --generate", param_hint="[DIR]")
    if folder is not None:
        read_servable(folder)  # before a key is made for nothing
    if generate:
        made = signing.generate(key, operator())
        print(f"{key} is your key: keep it to yourself, nobody else can read it")
        print(f"{key}.pub ({fingerprint(made)}) is for the registry: put it among its --signing-keys")
    if folder is not None:
        signed = signing.sign(folder, key)
        print(f"signed by {signed.fingerprint}: {folder / SIGNATURES} goes along with the push")
