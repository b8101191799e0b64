"""`python -m prad`: the command `prad`."""

from prad.cli.app import main

main()
