"""`python -m prad.harness`: lm-eval's own command, which knows the model `prad` beside its own then."""

import lm_eval.models  # noqa: F401 - they register themselves
from lm_eval.__main__ import cli_evaluate

import prad.harness.model  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
