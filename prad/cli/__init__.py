"""The command `prad`: one file per group of subcommands, put together in `app`."""
