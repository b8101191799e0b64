"""The contract between prefill and decode: how a KV cache travels, and how tokens come back."""
