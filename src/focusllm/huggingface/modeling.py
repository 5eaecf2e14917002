"""The method behind Hugging Face's own interface: `generate()`, `pipeline`, `save_pretrained`, `from_pretrained`.

Sampling, logits processors, stopping criteria, stop strings and streamers are transformers' own. What they call is
`forward`, and what they carry from step to step is a `FocusState` in the place of a KV cache.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from focusllm.config import FocusConfig
from focusllm.decoding.engine import decode, prefill, start_request
from focusllm.decoding.opened import check_positions as check_opened
from focusllm.decoding.request import Request
from focusllm.errors import ConfigError, DocumentError, ModelError
from focusllm.files import give_usual_modes
from focusllm.huggingface.adapter_files import load_adapter, save_adapter
from focusllm.huggingface.embedded import cache_folder, public_name
from focusllm.huggingface.head_files import HEADS_NAME, known_heads, save_heads
from focusllm.huggingface.loading import (
    ADAPTER_FOLDER,
    GENERATE_NAME,
    SETTINGS_NAME,
    cannot_load,
    find_saved,
    saved_folder,
    saved_settings,
)
from focusllm.memory.chunking import split, split_start
from focusllm.memory.chunks import ChunkBlock, Place, Progress, document_key, encode
from focusllm.memory.cost import check_read
from focusllm.memory.lookup import Heads, middle_heads
from focusllm.method.adapter import AdapterConfig, injected, injected_config, remove
from focusllm.method.base import CACHE_NAME, layout
from focusllm.method.opened import read_start

_wrapping = threading.Lock()


class FocusState(Cache):
    """What generation carries from step to step: one `Request` for every sequence of the batch.

    Args:
        blocks: chunks that are far context already (documents that were read); the input ids are then the local
            context. None: the far context is cut off the input ids.
        prompt_length: most tokens of the dynamic prompt; None: as configured.
        word_scores: what the question's words are worth in each chunk [R] (see `Request`); None: no words are counted.
    """

    def __init__(
        self,
        blocks: Sequence[ChunkBlock] | None = None,
        prompt_length: int | None = None,
        word_scores: Tensor | None = None,
    ):
        super().__init__(layers=[])
        self.word_scores = word_scores
        self.blocks = blocks
        self.prompt_length = prompt_length
        self.requests: list[Request] = []
        self.num_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, the far context's included, padding too."""
        return self.num_tokens

    @property
    def is_compileable(self) -> bool:
        """Steps differ in shape."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Not recurrent, which no layer tells `generate()`: given the whole text, it cuts off what was seen."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        """Rows cannot forget tokens (see `crop`)."""
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams: sequence i goes on from what sequence beam_idx[i] was."""
        taken: set[int] = set()
        kept = []
        for i in beam_idx.tolist():
            kept.append(self.requests[i].fork() if i in taken else self.requests[i])
            taken.add(i)
        self.requests = kept

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self.reorder_cache(torch.arange(len(self.requests)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self.reorder_cache(indices)

    def crop(self, max_length: int) -> None:
        """Refused: rows cannot forget tokens (assisted generation needs this)."""
        raise ConfigError("assisted generation is not supported: rows cannot take tokens back; generate without it.")


def _take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of keyword arguments, by whichever of its two names it is there; None: there is none."""
    new, old = (arguments.pop(name, None) for name in ("cache", "past_key_values"))
    if None not in (new, old) and new is not old:
        raise ConfigError("cache and past_key_values are two names of one thing, and differ; pass only one of them.")
    return old if new is None else new


class FocusForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose far context is read by FocusLLM.

    Args:
        base: a causal language model of transformers; candidate projections are injected into it by `load_adapter`
            or `inject`, and it is otherwise left as it is.
        focus_config: lengths and options.

    Raises:
        ModelError: the method cannot work with this model.
    """

    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, base: Any, focus_config: FocusConfig | None = None):
        layout(base)
        devices = sorted({str(parameter.device) for parameter in base.parameters()})
        if len(devices) > 1:
            raise ModelError(
                f"the model's weights lie on {', '.join(devices)}, but a pass runs on one device; load it without "
                f"device_map, or with device_map={{'': 0}}."
            )
        config: Any = base.config
        super().__init__(config)
        self.base = base
        self.focus_config = focus_config or FocusConfig()
        self.found_heads: Heads | None = None
        self.usual_questions: Sequence[Sequence[int]] = ()
        self.generation_config: GenerationConfig = base.generation_config
        self.eval()

    @property
    def adapter_config(self) -> AdapterConfig | None:
        """Settings of the candidate projections that the model has; None: none, so candidates are untrained."""
        return injected_config(self.base)

    @property
    def settings(self) -> FocusConfig:
        """`focus_config` with what it leaves open settled: how the far context is seen (`far_context`)."""
        return self.settled(self.focus_config)

    def settled(self, config: FocusConfig) -> FocusConfig:
        """Settings with what they leave open as it is best for this model."""
        return config.settled(self.adapter_config is not None)

    @property
    def lookup_heads(self) -> Heads:
        """What chooses chunks: the heads that were found for the model, else those of some middle layers, and the usual
        questions, where a tokenizer has said what these are (`FocusLLM`).
        """
        return (self.found_heads or middle_heads(self.base)).asking(self.usual_questions)

    def load_candidates(self, source: str | Path) -> AdapterConfig:
        """Load candidate projections from a folder or the hub (see `load_adapter`)."""
        return load_adapter(self.base, source)

    def unload(self) -> Any:
        """Remove the candidate projections and return the base model, bit for bit what it was."""
        remove(self.base)
        return self.base

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        past_key_values: Cache | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Prefill with a whole text, or one decode step.

        Args:
            input_ids: [B, T]. Without a state (or with an empty one): texts, cut into far and local context each.
                With a state: the newest token of every sequence.
            attention_mask: [B, >= T], 0 for padding on either side.
            cache: a `FocusState`, changed in place; None: a new one.
            logits_to_keep: for a single sequence, how many of its last local tokens get logits (0: all); a batch
                gets the last one's.
            past_key_values: another name of `cache`, transformers' own before 5.24.

        Returns:
            Logits [B, n, V] and the state, as transformers names it.

        Raises:
            ConfigError: a sequence without tokens, another kind of cache, or lengths beyond the model's positions.
            MemoryLimitError: the far context would not fit.
        """
        given = _take_cache({"cache": cache, "past_key_values": past_key_values})
        if given is not None and not isinstance(given, FocusState):
            if not isinstance(given, Cache) or given.get_seq_length() > 0:
                raise ConfigError(f"the cache is a {type(given).__name__} with tokens in it; pass a FocusState.")
            given = None
        state = FocusState() if given is None else given
        if not input_ids.shape[1]:
            raise ConfigError(f"there are no tokens behind the {state.num_tokens} that were read; give at least one.")
        if not state.requests:
            logits = self._read(input_ids, attention_mask, state, logits_to_keep)
            state.num_tokens += input_ids.shape[1]
        else:
            for column in input_ids.T.tolist():
                logits = decode(self.base, state.requests, column, self.settings)[:, None]
                state.num_tokens += 1
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: state})

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None, state: FocusState, logits_to_keep: int) -> Tensor:
        """Start a request for every sequence; equal ones (beams, return sequences) are read once.

        The state is changed when all went well.
        """
        config = self.settings
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, : input_ids.shape[1]]
        texts = [tuple(row[mask].tolist()) for row, mask in zip(input_ids, seen.bool(), strict=True)]
        logits: dict[tuple[int, ...], Tensor] = {}
        first: dict[tuple[int, ...], Request] = {}
        requests = []
        for text in texts:
            if text in first:
                requests.append(first[text].fork())
                continue
            far, local = split(text, config) if state.blocks is None else ([], list(text))
            blocks = self._far_context(far) if state.blocks is None else state.blocks
            first[text] = start_request(
                *(self.base, blocks, local, config, state.prompt_length, self.lookup_heads, state.word_scores)
            )
            logits[text] = prefill(self.base, first[text], config, logits_to_keep if len(texts) == 1 else 1)
            requests.append(first[text])
        state.requests = requests
        return torch.stack([logits[text] for text in texts])

    def _far_context(self, token_ids: list[int]) -> list[ChunkBlock]:
        start, rest = split_start(token_ids, self.settings)
        return self.encode(rest, start_ids=start)

    def encode(
        self,
        token_ids: Sequence[int],
        progress: Progress | None = None,
        store: Path | None = None,
        notify: Callable[[str], None] = lambda _: None,
        config: FocusConfig | None = None,
        start_ids: Sequence[int] = (),
    ) -> list[ChunkBlock]:
        """Read far context, and put its keys and values where the settings and the free memory say.

        Args:
            store: a folder that keeps them; the same text is not read again.
            config: lengths and options; None: the model's.
            start_ids: what every chunk is read behind, where chunks are opened.

        Raises:
            MemoryLimitError, ConfigError: it would not fit; raised before anything is computed.
            DocumentError: the disk is full (what is in `store` stays), or `store` cannot be used.
        """
        if not token_ids:
            return []
        folder = store or cache_folder() / "rows"
        config = self.settled(config or self.focus_config)
        config = config if store is None else config.replace(kv_place="disk")
        start_ids = start_ids if config.is_opened else ()
        if config.is_opened:
            check_opened(config, layout(self.base).max_positions, len(start_ids))
        name = document_key(self.base, token_ids, config, start_ids) if store else None
        try:
            written = sum(path.stat().st_size for path in folder.glob(f"{name}-*.rows")) if name else 0
            kind = check_read(self.base, config, len(token_ids), folder, written, heads=self.lookup_heads)
        except OSError as error:
            reason = error.strerror or error
            raise DocumentError(f"chunks cannot be kept in {folder} ({reason}); choose another folder.") from error
        start, heads = read_start(self.base, start_ids), self.lookup_heads if config.is_opened else None
        return encode(self.base, token_ids, config, progress, Place(kind, folder, name), notify, start, heads)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Transformers' `generate()` with all its arguments; see its documentation.

        `cache` (or `past_key_values`, its name before transformers 5.24) may be a `FocusState` that holds documents
        (then the input ids are the local context).
        """
        state = _take_cache(kwargs)
        return super().generate(inputs, **kwargs, **{CACHE_NAME: FocusState() if state is None else state})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What the state has not seen yet.

        Args:
            input_ids: the whole text so far, or the new tokens alone.
            next_sequence_length: how many of them are new; None: all, but with `use_cache=False` it is the whole text.

        Raises:
            ConfigError: there is nothing new.
        """
        state = _take_cache(kwargs)
        seen, length = state.get_seq_length() if state is not None else 0, input_ids.shape[1]
        if next_sequence_length is None:
            next_sequence_length = length - seen if kwargs.get("use_cache") is False else length
        if next_sequence_length < 1:
            raise ConfigError(f"the text has {length} tokens, and the state has read {seen}; append at least one.")
        return {
            "input_ids": input_ids[:, -next_sequence_length:],
            "attention_mask": kwargs.get("attention_mask"),
            "cache": state,
        }

    def get_input_embeddings(self) -> nn.Module:
        """The base model's."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The base model's."""
        embeddings: nn.Module = self.base.get_output_embeddings()
        return embeddings

    def get_decoder(self) -> nn.Module:
        """The base model's."""
        decoder: nn.Module = self.base.get_decoder()
        return decoder

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that any tool reads as the base model, with the candidate projections in a folder below.

        A model without candidate projections leaves none in the folder. Loaded by transformers itself, it generates
        with FocusLLM if `trust_remote_code=True` allows it to (see `custom_generate.py`).
        """
        folder = Path(save_directory)
        wrappers = injected(self.base)
        if self.adapter_config is not None:
            name = public_name(str(self.config.name_or_path))
            save_adapter(self.base, folder / ADAPTER_FOLDER, self.adapter_config, name)
        else:
            shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)  # of an earlier save
        base_only = {
            name.replace(".base.", "."): tensor
            for name, tensor in self.base.state_dict().items()
            if not any(name.startswith(f"{path}.") and not name.startswith(f"{path}.base.") for path in wrappers)
        }
        self.base.save_pretrained(folder, state_dict=base_only, **kwargs)
        give_usual_modes(folder.glob("*.safetensors"), folder)
        if self.found_heads is not None:
            save_heads(self.base, self.found_heads, folder / HEADS_NAME)
        else:
            (folder / HEADS_NAME).unlink(missing_ok=True)  # of an earlier save
        (folder / SETTINGS_NAME).write_text(json.dumps(self.focus_config.to_dict(), indent=2) + "\n")
        (folder / GENERATE_NAME).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("custom_generate.py"), folder / GENERATE_NAME)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        focus_config: FocusConfig | None = None,
        adapter: str | Path | None = None,
        **kwargs: Any,
    ) -> FocusForCausalLM:
        """Load a base model from a folder or the hub, with the settings and candidate projections saved beside it.

        Args:
            pretrained_model_name_or_path: what `AutoModelForCausalLM.from_pretrained` takes.
            focus_config: lengths and options; None: those saved in the folder, else the defaults.
            adapter: folder or hub repository of candidate projections, or `smollm2-135m` for those in this package;
                None: those saved in the folder, else those in this package for the model; "none": untrained ones.
            kwargs: passed on (dtype, device_map, revision, ...).

        Raises:
            ModelError: the model cannot be loaded, or the method cannot work with it.
            AdapterError: the candidate projections do not fit.
        """
        name, revision = pretrained_model_name_or_path, kwargs.get("revision")
        looks = adapter is None or focus_config is None  # else the hub need not be asked
        folder = saved_folder(name, revision) if looks else Path(name)
        adapter, focus_config = find_saved(name, folder, adapter, focus_config)
        try:
            base = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except Exception as error:  # a missing folder, a damaged file, an unknown type, a proxy that refuses, ...
            raise cannot_load(pretrained_model_name_or_path, error) from error
        vars(base).pop("generate", None)  # with trust_remote_code=True the folder's own, which would come back here
        model = cls(base, focus_config)
        if adapter is not None:
            model.load_candidates(adapter)
        model.found_heads = known_heads(base, str(name), folder)
        return model

    @classmethod
    def from_loaded(cls, base: Any) -> FocusForCausalLM:
        """Put a base model that transformers loaded from a folder or the hub behind this interface, with the settings
        and candidate projections saved there; it keeps those that it has.

        Raises:
            ModelError: nothing is saved there, or what is saved is damaged.
            AdapterError: the candidate projections do not fit.
        """
        name = str(base.config.name_or_path)
        folder = saved_folder(name, getattr(base.config, "_commit_hash", None))
        if saved_settings(folder) is None:
            raise ModelError(
                f"{name}, which the model was loaded from, has no {SETTINGS_NAME}; load one that FocusLLM saved."
            )
        adapter, focus_config = find_saved(name, folder, None, None)
        with _wrapping:  # threads that come at once load the projections once
            model = cls(base, focus_config)
            if adapter is not None and model.adapter_config is None:
                model.load_candidates(adapter)
            model.found_heads = known_heads(base, name, folder)
        return model
