"""FocusLLM as a model of the lm-evaluation-harness; run as a program, this is the harness's command with that model.

    python -m focusllm.evaluation.harness run --model focusllm --model_args model=smollm2-135m --tasks ...

Texts may be as long as the method reads, not only as long as the base model's window. Importing this module registers
the model, for `lm_eval.simple_evaluate(model="focusllm", ...)`.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from focusllm.config import FocusConfig
from focusllm.errors import ConfigError, FocusError, missing_package
from focusllm.evaluation.example import LossExample
from focusllm.evaluation.method import Prompt
from focusllm.evaluation.methods.focus import Focus
from focusllm.huggingface.embedded import DEFAULT, resolve_model
from focusllm.llm import FocusLLM

try:
    import lm_eval.models  # noqa: F401  # before ours, so that its registry is complete
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise missing_package("the harness needs", "lm_eval", "lm-eval") from error

MAX_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be; the harness's own."""
MOST_TOKENS = 2**26

LOG = logging.getLogger("lm_eval.models.focusllm")
"""Below the harness's own, so that its command shows what is said here."""


@register_model("focusllm")
class FocusHarness(TemplateLM):
    """A model of the harness.

    Args:
        model, adapter, dtype, device: as `FocusLLM.from_pretrained` takes them; or a loaded `FocusLLM` alone. A GPU
            that is not there, which the harness's command asks for by itself, becomes the CPU, as in the harness's own.
        batch_size: answers that are generated together. Likelihoods are computed one by one: texts that share their
            far context, such as the options of a question, share its chunks, which are read once.
        max_length: most tokens of a text; None: as many as the method can read here. Of longer ones the end counts.
        tokenizer: for tasks that look for one among these arguments, as RULER's do; the model has its own.
        settings: single fields of `FocusConfig`, by name.

    Raises:
        ConfigError, ModelError, AdapterError: as loading the model does; an unknown setting, or any for a loaded model.
    """

    def __init__(
        self,
        model: str | FocusLLM = DEFAULT,
        adapter: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        tokenizer: str | None = None,
        **settings: Any,
    ):
        super().__init__()
        FocusConfig.check_names(settings)
        if isinstance(model, FocusLLM):
            how = {"adapter": adapter, "dtype": dtype != "auto", "device": device}
            late = [*(name for name, given in how.items() if given), *settings]
            if late:
                raise ConfigError(f"{', '.join(late)}: too late for a loaded model; set that in from_pretrained().")
        else:
            if device and device.startswith("cuda") and not torch.cuda.is_available():
                LOG.warning("There is no GPU %s here; computing on the CPU.", device)
                device = "cpu"
            model = FocusLLM.from_pretrained(
                model, adapter=adapter, dtype=dtype, device=device, notify=LOG.info, **settings
            )
        try:
            self.batch_size = max(1, int(batch_size))
        except ValueError as error:
            raise ConfigError(f"batch_size is {batch_size!r}; it must be a number.") from error
        self.llm, self.tokenizer = model, model.tokenizer
        self.method = Focus(model)
        self.max_length = int(max_length) if max_length else self._longest()
        self._device = model.model.device

    def _longest(self) -> int:
        """The longest text that the method can read, to a thousandth or a token."""
        low, high = 1, MOST_TOKENS
        while high - low > max(1, high // 1000):
            middle = (low + high) // 2
            low, high = (middle, high) if self.method.fits(middle) is None else (low, middle)
        return low

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        end: int = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, control tokens as such; a start token is not put in front of one."""
        start = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (start and string.startswith(start))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without the generation prompt its last message goes on."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Nats of every continuation, and whether greedy decoding makes it: token by token, as in decoding."""
        results = []
        for key, context, continuation in tqdm(requests, disable=disable_tqdm, desc="loglikelihood"):
            room = max(1, self.max_length - len(continuation))
            logits, step = self.method.start(plain(context[-room:]), len(continuation))
            total, greedy = 0.0, True
            for i, token in enumerate(continuation):
                total += float(logits.float().log_softmax(-1)[token])
                greedy &= int(logits.argmax()) == token
                if i + 1 < len(continuation):
                    logits = step(token)
            results.append((total, greedy))
            self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts: every token is predicted from all before it, in parts only beyond `max_length`."""
        results = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="rolling"):
            ids = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            nats = 0.0
            for first, stop in parts(len(ids), self.max_length):
                example = LossExample("", tuple(ids[max(0, stop - self.max_length - 1) : stop]), stop - first)
                nats += self.method.loss(example)[0]
            results.append(-nats)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, by transformers' `generate()` with the task's arguments."""
        results: list[str] = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        for group in grouped([request.args[1] for request in requests], self.batch_size):
            texts, arguments = [requests[i].args[0] for i in group], requests[group[0]].args[1]
            for i, answer in zip(group, self._answers(texts, arguments), strict=True):
                results[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args, answer)
            bar.update(len(group))
        bar.close()
        return results

    def _answers(self, texts: list[str], arguments: dict[str, Any]) -> list[str]:
        given: dict[str, Any] = dict(normalize_gen_kwargs(arguments, MAX_NEW_TOKENS))
        until, count = [stop for stop in given.pop("until") if stop], int(given.pop("max_gen_toks"))
        temperature = given.pop("temperature", None)
        given["do_sample"] = bool(given.get("do_sample") and temperature != 0)
        if given["do_sample"] and temperature:
            given["temperature"] = temperature
        if until:
            given |= {"stop_strings": until, "tokenizer": self.tokenizer}
        ids = [self.tok_encode(text)[-max(1, self.max_length - count) :] for text in texts]
        width = max(map(len, ids))
        padding, device = [[self.eot_token_id] * (width - len(row)) for row in ids], self._device
        made = self.llm.model.generate(
            torch.tensor([[*front, *row] for front, row in zip(padding, ids, strict=True)], device=device),
            attention_mask=torch.tensor(
                [[0] * len(front) + [1] * (width - len(front)) for front in padding], device=device
            ),
            max_new_tokens=count,
            pad_token_id=self.eot_token_id,
            **given,
        )
        answers = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return [cut_at(answer, until) for answer in answers]


def plain(ids: list[int]) -> Prompt:
    """A prompt that is one text."""
    return Prompt(start=[], before=[], context=ids, after=[], end=[], chat=False, query="")


def parts(length: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of the tokens that are predicted together; the first token is given."""
    for first in range(1, length, most):
        yield first, min(first + most, length)


def grouped(arguments: Sequence[dict[str, Any]], size: int) -> Iterator[list[int]]:
    """Indices of requests that are answered together: neighbours with the same arguments, `size` at most."""
    group: list[int] = []
    for i, given in enumerate(arguments):
        if group and (len(group) == size or given != arguments[group[0]]):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def cut_at(text: str, until: Sequence[str]) -> str:
    """What comes before the first of the stop strings."""
    ends = [text.find(stop) for stop in until if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def name_tokenizer(arguments: Namespace) -> None:
    """Give the tasks our tokenizer by its folder, since they would look for an alias of ours on the hub.

    Raises:
        ModelError: the embedded model can be had from nowhere.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig.from_cli(arguments)  # with what a file given by --config says
    if config.model == "focusllm":
        names = [config.metadata.get(key) for key in ("tokenizer", "pretrained", "model")]  # in the tasks' order
        name = next(filter(None, names), DEFAULT)
        arguments.metadata = {**config.metadata, "tokenizer": resolve_model(name, LOG.info)}


def main() -> None:
    """The harness's command: what its `cli_evaluate` does, with the tokenizer named for the tasks."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    command = HarnessCLI()
    arguments = command.parse_args()
    try:
        if arguments.command == "run":
            name_tokenizer(arguments)
        command.execute(arguments)
    except FocusError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
