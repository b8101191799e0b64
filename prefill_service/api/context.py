"""What every endpoint is given: the parts behind the HTTP face, put together once in `create_app`."""

from dataclasses import dataclass

from prad.lm import Tokenizer
from prefill_service.api.admission import Admission
from prefill_service.api.logprobs import TokenScorer
from prefill_service.api.metrics import Metrics
from prefill_service.api.protocols import ApiLimits, Catalogue, ModelInfo, Readiness
from prefill_service.generation import Engine


@dataclass(frozen=True, slots=True)
class Context:
    engine: Engine
    catalogue: Catalogue
    readiness: Readiness
    tokenizer: Tokenizer
    scorer: TokenScorer
    admission: Admission
    metrics: Metrics
    model: ModelInfo
    limits: ApiLimits
