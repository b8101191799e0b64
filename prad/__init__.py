"""PrAd: adapters that act on the prompt only, one frozen model for hundreds of tasks."""

__version__ = "0.1.0"
