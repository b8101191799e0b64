"""Every figure in the documents comes from a script here, which also writes hardware, versions, commit.

A benchmark is a module with

- a docstring: what is measured and how; `prad bench NAME --help` shows it
- run(arguments) -> dict: the figures, ready for JSON
- plot(result, figure), if there is something to see

and a class in `bench.flags`: what it can be told, and the values that make it small.
"""
