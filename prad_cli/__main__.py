"""`python -m prad_cli`: the command `prad`, also for launchers that start a module."""

from prad_cli.app import main

main()
