"""The `server` engine: sampling by vLLM, adapters by name. Token ids go out; they come back with log-probabilities.

A server applies its own or the checkpoint's sampling defaults (Qwen3: top_k 20) where a request is silent, so every
setting is sent, the ones that are off included; an answer that cannot be the one asked for is an error. Needs the
optional package `openai`, which retries, waits and times out.
"""

import asyncio
import os
import secrets
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from chat import eos_ids
from errors import InputError, one_line
from rollout import OnFinished, Response, Sampling, StreamKey, until_eos
from runtime.engines import Engine
from runtime.loading import find_checkpoint, load_config

try:
    import openai
except ImportError:
    raise InputError("--server needs the openai package: pip install openai") from None

REQUEST_SECONDS = 2 * 3600  # 38,912 tokens on a busy server take most of an hour
START_SECONDS = 30  # for a try at what comes before sampling: the models' names, one token
LOAD_SECONDS = 300  # an adapter, perhaps of gigabytes over a network
RETRIES = 10  # the client waits 0.5 s, then twice as long each time, 8 s at most: a minute in all
QUICK_RETRIES = 2  # before anything is sampled, and for adapters, whose errors come as a 500
ENDS = {"stop": True, "length": False}  # finish_reason: was there an EOS?
ROUNDING = 1e-2  # by which a log-probability may be above 0
timeout = partial(openai.Timeout, connect=10)

# All that draws other tokens in vLLM (CompletionRequest), switched off.
VLLM_FIELDS = {
    "return_token_ids": True, "logprobs": 0,  # raw ones of the sampled tokens
    "n": 1, "echo": False, "stop": [], "logit_bias": None, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "min_p": 0.0, "use_beam_search": False, "length_penalty": 1.0, "watermarking": False,
    "ignore_eos": False, "min_tokens": 0, "bad_words": [], "allowed_token_ids": None, "structured_outputs": None,
    "response_format": None, "truncate_prompt_tokens": None, "repetition_detection": None, "thinking_token_budget": -1,
}  # fmt: skip
AnswerError = openai.OpenAIError  # what is wrong with an answer; `_run` puts the server's address before it


class ServerEngine(Engine):
    """Samples over HTTP with at most `in_flight` requests open. Usable from one thread, outside of an event loop.

    Raises InputError where the server is not there, wants a key, serves another model, fails for good or gives what
    was not asked for. Then, and on Ctrl-C, requests in flight are cancelled, here and on the server.
    """

    def __init__(self, server: str, model: str, tokenizer: PreTrainedTokenizerBase, in_flight: int) -> None:
        """`server`: the URL as typed; `model`: the checkpoint, by which the server knows it."""
        self.server, self.base_model, self.tokenizer, self.in_flight = server, model, tokenizer, in_flight
        self.eos_ids, self.vocabulary = ends_and_vocabulary(model, tokenizer)
        self.model = model  # the name that requests go to: the base model's or an adapter's
        self.context: int | None = None  # tokens of a prompt with its response, where the server tells
        self.raw_logprobs = True  # False: they are those after temperature, top_k and top_p
        self._loaded: str | None = None  # the adapter that this engine has to unload
        http, key = openai.DefaultAsyncHttpxClient(trust_env=False), os.environ.get("OPENAI_API_KEY")  # without proxies
        more = {"http_client": http, "max_retries": RETRIES, "timeout": timeout(REQUEST_SECONDS)}
        try:
            self._client = openai.AsyncOpenAI(base_url=base_url(server), api_key=key or "none", **more)
        except Exception as error:  # an address that is none
            raise InputError(f"--server {server}: {one_line(error)}") from None
        self._quick = self._client.with_options(max_retries=QUICK_RETRIES, timeout=timeout(START_SECONDS))
        self._runner = asyncio.Runner()
        self._run(self._meet())

    def sample(
        self, prompts: list[list[int]], keys: Sequence[StreamKey], settings: Sampling,
        on_finished: OnFinished | None = None,
    ) -> list[Response]:  # fmt: skip
        """Whether equal seeds, which come from the keys, give equal answers is the server's affair."""
        longest = max(prompts, key=lambda prompt: len(prompt) + settings.limit(prompt), default=[])
        if self.context is not None and len(longest) + settings.limit(longest) > self.context:
            what = f"a prompt of {len(longest)} and {settings.limit(longest)} new tokens (vLLM: --max-model-len)"
            raise InputError(f"--server {self.server}: its context of {self.context} tokens does not hold {what}")
        responses: list[Response | None] = [None] * len(prompts)
        rows = iter(range(len(prompts)))

        async def work() -> None:
            for row in rows:  # shared by all workers
                seed = int(np.random.SeedSequence(keys[row]).generate_state(1)[0]) >> 1  # 31 bits fit every server
                responses[row] = await self._complete(self._client, prompts[row], seed, settings)
                if on_finished is not None:
                    on_finished(row, responses[row])

        async def work_together() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.in_flight, len(prompts))):
                    group.create_task(work())

        self._run(work_together())
        return responses

    def use_adapter(self, directory: Path, name: str) -> None:
        """Load the adapter in `directory` on the server, send requests to it from now on, unload the one before it.

        It is loaded as `NAME-RANDOM`: vLLM keeps the keys and values of prompts by the adapter's name and path, also
        after unloading, and other weights under an old name would meet them.
        """
        self._run(self._load(directory.resolve(), f"{name}-{secrets.token_hex(4)}"))

    def close(self) -> None:
        """Unload the adapter, if there is one; a server that is gone is no error."""
        with suppress(InputError):
            if self._loaded is not None:
                self._run(self._unload(self._loaded))
        self._runner.run(self._client.close())
        self._runner.close()

    async def _meet(self) -> None:
        """Look into /v1/models, then find out by a request for one token what its log-probabilities are."""
        try:
            served = (await self._quick.models.list()).data
            names = {getattr(entry, "root", None): entry for entry in served} | {entry.id: entry for entry in served}
        except (AttributeError, TypeError, ValueError):
            raise AnswerError("/v1/models lists no models") from None
        if self.model not in names:  # `root` is the checkpoint behind a name that vLLM was told
            ids = ", ".join(str(entry.id) for entry in served[:5])
            raise AnswerError(f"serves {ids}, not {self.model} (vLLM: --served-model-name {self.model})")
        entry = names[self.model]
        context, self.model = getattr(entry, "max_model_len", None), entry.id
        self.context = context if isinstance(context, int) else None
        # With top_k 1 the token has probability 1 after the filters, and less before them.
        settings = Sampling(temperature=1.0, top_p=1.0, top_k=1, max_new_tokens=1)
        first = await self._complete(self._quick, self.tokenizer.encode("1"), 0, settings)
        self.raw_logprobs = first.logprobs != [0.0]

    async def _complete(self, client, prompt: list[int], seed: int, settings: Sampling) -> Response:
        limit = settings.limit(prompt)
        fields = {
            "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k or -1,
            "max_tokens": limit, "stop_token_ids": self.eos_ids, **VLLM_FIELDS,
        }  # fmt: skip
        reply = "something else than JSON"
        try:
            reply = await client.completions.create(model=self.model, prompt=prompt, seed=seed, extra_body=fields)
            if self.model != self.base_model and reply.model != self.model:
                raise AnswerError(f"answers as {reply.model}, not by the adapter {self.model}")
            return self._read(reply, len(prompt), limit)
        except (AttributeError, TypeError, ValueError):
            raise AnswerError(f"not a completion: {one_line(reply)}") from None

    def _read(self, reply, prompt: int, limit: int) -> Response:
        """A completion of at most `limit` tokens behind `prompt` tokens; raises AnswerError for what cannot be one."""
        (choice,), count = reply.choices, reply.usage.completion_tokens
        ids, logprobs = getattr(choice, "token_ids", None), getattr(choice.logprobs, "token_logprobs", None)
        reason, finished = choice.finish_reason, ENDS.get(choice.finish_reason)
        if finished is None:
            raise AnswerError(f"a row ended by {reason!r}, which is neither an EOS nor the limit")
        if reply.usage.prompt_tokens != prompt:
            raise AnswerError(f"read a prompt of {prompt} tokens as {reply.usage.prompt_tokens}")
        if not (1 if finished else limit) <= count <= limit:
            raise AnswerError(f"a row of {count} tokens, ended by {reason!r}, for a limit of {limit}")
        if ids is None:
            raise AnswerError("returns no token ids; vLLM does")
        for what, values in (("token ids", ids), ("log-probabilities", logprobs)):
            if values is not None and len(values) != count:
                raise AnswerError(f"a row of {count} tokens with {len(values)} {what}")
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise AnswerError(f"the token id {token}; the model has 0 to {self.vocabulary - 1}")
        for value in logprobs or ():
            if type(value) not in (int, float) or not float("-inf") < value < ROUNDING:
                raise AnswerError(f"the log-probability {value}; start vLLM with --logprobs-mode raw_logprobs")
        until = until_eos(ids, self.eos_ids)
        if until != Response(ids, finished):
            how = f"{'went on behind' if until.finished else 'ended at'} token {until.ids[-1]}"
            raise AnswerError(f"a row {how}, but EOS is {self.eos_ids}: is it another checkpoint?")
        return Response(ids, finished, logprobs)

    async def _load(self, directory: Path, name: str) -> None:
        body = {"lora_name": name, "lora_path": str(directory), "load_inplace": True}  # in place: when asked again
        try:
            patient = self._quick.with_options(timeout=timeout(LOAD_SECONDS))
            await patient.post("/load_lora_adapter", cast_to=str, body=body)
        except openai.APIStatusError as error:
            needs = "--enable-lora, --max-lora-rank, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and the files at this path"
            raise AnswerError(f"loads no adapter {directory}: vLLM needs {needs} ({one_line(error)})") from None
        before, self._loaded, self.model = self._loaded, name, name
        if before is not None:
            await self._unload(before)

    async def _unload(self, name: str) -> None:
        with suppress(openai.NotFoundError):  # a server that was started anew
            await self._quick.post("/unload_lora_adapter", cast_to=str, body={"lora_name": name})

    def _run(self, work: Coroutine) -> None:
        """Run to the end; the client's errors become one line each. Ctrl-C cancels what is under way."""
        try:
            self._runner.run(work)
            return
        except openai.OpenAIError as caught:
            error = caught
        except BaseExceptionGroup as group:  # a signal's StoppedError among them goes before the errors of the rest
            error = min(group.exceptions, key=lambda error: isinstance(error, Exception))
        reason = one_line(error)
        if isinstance(error, openai.APIConnectionError):
            reason = f"no answer ({one_line(error.__cause__ or error)})"
        elif isinstance(error, openai.AuthenticationError):
            reason = f"wants a key, which is read from OPENAI_API_KEY ({reason})"
        elif isinstance(error, openai.APIStatusError):
            reason = f"refuses a request for {self.model} ({reason})"
        elif not isinstance(error, openai.OpenAIError):
            raise error
        raise InputError(f"--server {self.server}: {reason}")


def base_url(server: str) -> str:
    """The address of the API behind `--server`: http:// and /v1 are added where they are missing."""
    url = (server if "://" in server else f"http://{server}").rstrip("/")
    _ = urlsplit(url).port  # ValueError where it is none
    return url if url.endswith("/v1") else f"{url}/v1"


def ends_and_vocabulary(model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """model.eos_ids and the number of token ids of a checkpoint, which need not be loaded here."""
    config = load_config(model)
    try:
        generation = GenerationConfig.from_pretrained(find_checkpoint(model))
    except OSError:  # a checkpoint need not have one
        generation = GenerationConfig.from_model_config(config)
    return eos_ids(generation, tokenizer), config.get_text_config().vocab_size
