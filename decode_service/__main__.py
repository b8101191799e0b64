"""`python -m decode_service`: one decode service, configured by PRAD_DECODE_* in the environment."""

import logging

from decode_service.server import run
from decode_service.settings import DecodeSettings

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run(DecodeSettings())
