"""Which models can be served exactly: all others are refused by name, before their weights are mapped.

Only what a configuration tells is decided here; what shows itself in the first pass (soft caps, sinks,
layers without keys and values) is refused there.
"""

from typing import Any

from prad.lm.errors import UnsupportedModelError

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def require_servable(config: Any) -> None:
    """Raises UnsupportedModelError with the model's name and what stands in the way."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise UnsupportedModelError(f"a '{config.model_type}' model is not a causal language model")
    if config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"{kind.__name__} is a language model inside a model of images or sound; "
            "only a text model of its own can be served"
        )
    if not kind._supports_attention_backend:
        raise UnsupportedModelError(
            f"{kind.__name__} has no attention, or computes it in a way of its own; only plain and "
            "sliding-window attention over stored K and V can be served"
        )
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if foreign:
        raise UnsupportedModelError(
            f"{kind.__name__} has layers of {', '.join(foreign)}; only plain and sliding-window attention "
            "over stored K and V can be served"
        )
    if differing := getattr(config, "per_layer_attributes", None):
        raise UnsupportedModelError(
            f"{kind.__name__} has layers that differ in {', '.join(sorted(differing))}; "
            "only layers of one size can be served"
        )


def max_context(config: Any) -> int:
    """Positions for which a token's encoding depends on its position alone.

    LongRoPE changes every frequency once the longest sequence of a pass is longer than the original
    context: what one tenant sends would then change another's answer.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one per type of layer
    originals = [p["original_max_position_embeddings"] for p in parts if p.get("rope_type") == "longrope"]
    return int(min([config.max_position_embeddings, *originals]))
