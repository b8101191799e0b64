"""Adapter versions and routing: operators push and promote, prefill services follow and fetch."""
