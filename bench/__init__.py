"""Every figure in the documents comes from a script here, which also writes hardware, versions, commit.

A benchmark is a module with

- a docstring: what is measured and how; `prad bench NAME --help` shows it
- SMOKE: values of its arguments that make it small
- add_arguments(parser): its flags (`--smoke` and `--out` are the runner's)
- run(arguments) -> dict: the figures, ready for JSON
- plot(result, figure), if there is something to see
"""
