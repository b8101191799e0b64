"""`python -m prad.harness`: lm-eval's own command, which knows the model `prad` then."""

from lm_eval.__main__ import cli_evaluate

import prad.harness.model  # noqa: F401 - it registers itself

if __name__ == "__main__":
    cli_evaluate()
