"""The command `prad`, the only room that knows all services: one file per group of subcommands."""
