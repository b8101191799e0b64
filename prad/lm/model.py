"""The frozen model: one forward over a packed batch, with taps at named sites.

Two implementations under the same oracle: the generic one here, over transformers' own modules, serves every
family whose layers have plain K and V; the fused one (fused.py) the Llama family and GPT-2 on a CPU.
"""

import copy
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prad.core.kv import KVLayout, LayerKV, ModelSpec
from prad.lm import attention
from prad.lm.attention import Ragged
from prad.lm.blocks import Blocks, load_blocks
from prad.lm.device import require_device
from prad.lm.errors import ModelNotFoundError, UnsupportedModelError
from prad.lm.families import Site
from prad.lm.fingerprint import Fingerprint, config_digest, weights_digest
from prad.lm.fuse import fuse
from prad.lm.fused import FusedModel
from prad.lm.head import entering_head, widen_head
from prad.lm.kernels import Kernels, Precision
from prad.lm.kv import KVTarget, PackedBatch, PromptKV, dtype_name
from prad.lm.sampling import lowest_argmax
from prad.lm.sites import Adaptation, TappedKV, require_sites, state_widths, tapped
from prad.lm.support import max_context, require_servable


class LanguageModel:
    """A frozen decoder-only model.

    `module` is the transformers model underneath; `fingerprint` says exactly which model this is. A packed
    one that lies on disk is opened by prad.lm.packed.
    """

    def __init__(self, module: Any, weights: str, blocks: Mapping[str, Blocks] | None = None) -> None:
        self._module: nn.Module = module.eval().requires_grad_(False)
        widen_head(module)
        self._set_up(module.config, module.device, module.dtype)
        self.max_context = max_context(self.config)
        self._blocks = blocks or {}
        settings = config_digest(self.config)
        self.fingerprint = Fingerprint(architecture(self.config), weights, settings, self._probe())

    def _set_up(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.config: Any = config
        self.device = device
        self.dtype = dtype
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.kernels: Kernels | None = None
        self._fused: FusedModel | None = None
        self._one_pass = threading.Lock()
        self._one_fused_pass = threading.Lock()

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
    ) -> "LanguageModel":
        """Maps the safetensors in `folder`; in the files' own dtype on CPU nothing is copied.

        `device`: cpu, cuda or cuda:N. Raises DeviceError, ModelNotFoundError (no model there) or
        UnsupportedModelError (not plain K and V).
        """
        from transformers import AutoConfig  # takes seconds: not for a packed model

        require_device(device)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"{folder} holds no model that can be read: {error}") from error
        require_servable(config)
        digest = weights_digest(folder)
        return cls(_mapped(folder, config, dtype).to(device), digest, load_blocks(folder))

    def accelerate(self, kernels: Kernels, precision: Precision = "full") -> None:
        """From now on passes without gradients compute with `kernels` where the model's family allows it.

        The weights are packed into a copy, which alone is used from then on; the files stay mapped. precision
        int8 rounds those of the linear layers to 8 bits, int4 takes them in the file's blocks. Raises
        UnsupportedModelError if that cannot be had for this model, or the model is not on a CPU.
        """
        if self.device.type != "cpu":
            raise UnsupportedModelError(f"the kernels compute on a CPU, not on {self.device}")
        with torch.no_grad():
            self._fused = fuse(self.module, kernels, precision, self._blocks)
        if self._fused is None and precision != "full":
            raise UnsupportedModelError(
                f"{precision} weights are for bfloat16 models of the Llama family and GPT-2 on a CPU, "
                f"not for {type(self.module).__name__} in {self.dtype} on {self.device}"
            )
        self.kernels = kernels

    def beside(self, threads: int) -> "LanguageModel":
        """The same weights, computed by so many threads of its own beside passes of this one. Itself where
        torch computes: taps are in its modules, so that there is one pass at a time."""
        if self._fused is None or self.kernels is None:
            return self
        other = copy.copy(self)
        other.kernels = self.kernels.beside(threads)
        other._fused = replace(self._fused, kernels=other.kernels)
        other._one_fused_pass = threading.Lock()
        return other

    @property
    def module(self) -> nn.Module:
        """transformers' own."""
        return self._module

    @property
    def frozen(self) -> nn.Module:
        """Modules by their names in `module`, with its weights: what adapters look up, whatever computes."""
        return self.module

    @property
    def fused(self) -> FusedModel | None:
        """What `accelerate` made of it."""
        return self._fused

    @property
    def is_fused(self) -> bool:
        """Whether the fused forward serves it."""
        return self._fused is not None

    @property
    def layout(self) -> KVLayout:
        return self.fingerprint.layout

    @property
    def spec(self) -> ModelSpec:
        return self.fingerprint.spec

    @property
    def state_widths(self) -> dict[Site, int]:
        """The sites at which a decode step takes request state, with their widths."""
        return state_widths(self.frozen, self.config.model_type)

    def stop_ids(self, folder: Path) -> frozenset[int]:
        """The ids that end a sequence, as the model's generation config names them, or else its config.

        The tokenizer may know more: `Tokenizer.end_ids`.
        """
        try:
            eos = json.loads((folder / "generation_config.json").read_bytes()).get("eos_token_id")
        except (OSError, ValueError):
            eos = None
        if eos is None:
            eos = self.config.eos_token_id
        if eos is None:
            return frozenset()
        return frozenset(eos) if isinstance(eos, list) else frozenset({eos})

    def forward(self, batch: PackedBatch, adaptation: Adaptation | None = None) -> Tensor:
        """Logits float32 [R, vocab] of `batch.logit_rows`; keys and values go to `batch.kv`.

        One pass of torch's at a time, and one of the kernels': a second thread waits, so that taps never meet
        another pass's rows. Raises MissingSiteError if `adaptation` wants a site that the family does not
        have.
        """
        batch = replace(batch, kv=TappedKV.of(batch.kv, adaptation))
        if self._fused is not None and not torch.is_grad_enabled():
            if adaptation is not None:
                require_sites(self.config.model_type, adaptation.sites)
            with self._one_fused_pass:
                return self._fused.forward(batch, adaptation)
        with self._one_pass:
            with tapped(self.module, self.config.model_type, adaptation):
                if (given := batch.given) is None:
                    return self._generic(batch, batch.logit_rows)
                hidden: list[Tensor] = []

                def apart(states: Tensor) -> Tensor:
                    hidden.append(states[0, len(batch.logit_rows) :])
                    return states[:, : len(batch.logit_rows)]

                with entering_head(self.module, apart):
                    logits = self._generic(batch, torch.cat((batch.logit_rows, given.rows)))
            given.score(hidden[0], self._head, self.vocab_size)
        return logits

    def _generic(self, batch: PackedBatch, logit_rows: Tensor) -> Tensor:
        output = self.module(
            input_ids=batch.ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logit_rows,
            kv_target=batch.kv,
        )
        logits: Tensor = output.logits.squeeze(0)
        return logits.float()  # as they are, but for a head that `widen_head` does not know

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, vocab] of hidden states [R, width]: the generic forward of a token that finds
        them at its head."""
        batch = _one_token(self.device)
        with entering_head(self.module, lambda _: hidden[None]):
            return self._generic(batch, batch.logit_rows)

    def argmax(self, logits: Tensor) -> list[int]:
        """The lowest id of each row's largest logit; logits [R, vocab] as `forward` returns them."""
        if self.kernels is not None and logits.is_contiguous():
            return self.kernels.argmax(logits)
        return lowest_argmax(logits)

    def _probe(self) -> KVLayout:
        """Runs one token to learn what each layer stores, and that each does store it."""
        recorder = _Recorder()
        with torch.inference_mode():
            self.forward(_one_token(self.device, recorder))
        if sorted(recorder.layers) != list(range(self.num_layers)):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} has {self.num_layers} layers, but plain K and V in "
                f"{len(recorder.layers)}: latent, state-space and linear attention cannot be handed over"
            )
        return KVLayout(tuple(recorder.layers[i] for i in range(self.num_layers)), dtype_name(self.dtype))


def _one_token(device: torch.device, kv: KVTarget | None = None) -> PackedBatch:
    zero = torch.zeros(1, dtype=torch.long, device=device)
    return PackedBatch(zero, zero, kv or PromptKV(Ragged.of((1,), device)), logit_rows=zero)


class _Recorder:
    """A KV target that only notes the shapes."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerKV] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        self.layers[layer] = LayerKV(key.shape[1], key.shape[2], value.shape[2])
        return PromptKV(Ragged.of((1,), query.device)).attend(layer, query, key, value, scale, window)


def architecture(config: Any) -> str:
    """What an adapter's shapes depend on, as one readable line."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    ffn = next(filter(None, named), 4 * hidden)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return (
        f"{config.model_type} layers={config.num_hidden_layers} hidden={hidden} "
        f"heads={heads}/{getattr(config, 'num_key_value_heads', None) or heads} "
        + (f"head_dim={head_dim} " if head_dim * heads != hidden else "")
        + f"ffn={ffn} vocab={config.vocab_size}"
    )


def _mapped(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """transformers' model over the files of `folder`: every parameter from them, none of theirs left.

    Raises ModelNotFoundError with what does not fit: transformers would go on with random numbers.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    with _no_load_bar():
        try:
            module, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention.NAME,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported
            )
        except OSError as error:  # an index that names a file which is not there
            raise ModelNotFoundError(f"{folder} is no whole model: {error}") from error
    for what, key in (
        ("lacks weights", "missing_keys"),
        ("holds weights that are not the model's", "unexpected_keys"),
        ("holds weights of another shape than its configuration's", "mismatched_keys"),
    ):
        if report[key]:
            raise ModelNotFoundError(f"{folder} {what}: {', '.join(sorted(map(str, report[key])))}")
    return module


@contextmanager
def _no_load_bar() -> Iterator[None]:
    """Mapping takes a moment; transformers' bar for it is noise in a service's log."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
