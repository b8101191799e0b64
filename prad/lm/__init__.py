"""The frozen model, shared by prefill and decode: loading, fingerprint, forward, tokenizer, sampling."""

from prad.core.models import DEFAULT_MODEL, DEFAULT_MODEL_ID, served_name
from prad.lm.attention import Ragged
from prad.lm.device import require_device
from prad.lm.errors import (
    ChatTemplateError,
    DeviceError,
    GrammarError,
    MissingSiteError,
    ModelError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from prad.lm.families import Site
from prad.lm.fingerprint import Fingerprint, weights_digest
from prad.lm.grammar import Grammar, Grammars
from prad.lm.kv import KVTarget, PackedBatch, PromptKV, dtype_name, torch_dtype
from prad.lm.model import LanguageModel
from prad.lm.sampling import likeliest, sample
from prad.lm.serving import ServedModel, load_served
from prad.lm.shaping import CompiledRules, Shaping, begin_masks
from prad.lm.sites import (
    Adaptation,
    Placement,
    RowScaling,
    SiteVectors,
    placements,
    projection,
    require_sites,
)
from prad.lm.source import resolve_model
from prad.lm.tokenizer import TextStream, Tokenizer

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_MODEL_ID",
    "Adaptation",
    "ChatTemplateError",
    "CompiledRules",
    "DeviceError",
    "Fingerprint",
    "Grammar",
    "GrammarError",
    "Grammars",
    "KVTarget",
    "LanguageModel",
    "MissingSiteError",
    "ModelError",
    "ModelNotFoundError",
    "PackedBatch",
    "Placement",
    "PromptKV",
    "Ragged",
    "RowScaling",
    "ServedModel",
    "Shaping",
    "Site",
    "SiteVectors",
    "TextStream",
    "Tokenizer",
    "UnsupportedModelError",
    "begin_masks",
    "dtype_name",
    "likeliest",
    "load_served",
    "placements",
    "projection",
    "require_device",
    "require_sites",
    "resolve_model",
    "sample",
    "served_name",
    "torch_dtype",
    "weights_digest",
]
