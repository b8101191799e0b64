"""`python -m decode_service`: one decode service, configured by PRAD_DECODE_* in the environment."""

import logging

from decode_service import DecodeSettings, run

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run(DecodeSettings())
