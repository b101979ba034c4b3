"""The `server` engine: sampling by any OpenAI-compatible server (vLLM, SGLang, `transformers serve`), adapters by name.

Prompts go out as token ids, and token ids come back with their log-probabilities where the server can (vLLM). A server
that knows text only gets each prompt as the text that its tokenizer turns into exactly those ids.

A server applies the sampling defaults of the checkpoint (Qwen3: top_k 20) where a request is silent, so every setting
is sent, the ones that are off included. Needs the optional package `openai`, which retries, waits and times out.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from errors import InputError, one_line
from model import eos_ids, find_checkpoint
from rollout import OnFinished, Response, Sampling, StreamKey

REQUEST_SECONDS = 2 * 3600  # 38,912 tokens on a busy server take most of an hour
CONNECT_SECONDS = 10
RETRIES = 10  # the client waits 0.5 s, then twice as long each time, 8 s at most: a minute in all
QUICK_RETRIES = 2  # before anything is sampled, and for adapters, whose errors come as a 500


class ServerEngine:
    """Samples over HTTP with at most `in_flight` requests open. Usable from one thread, outside of an event loop."""

    name = "server"

    def __init__(
        self, server: str, model: str, tokenizer: PreTrainedTokenizerBase, eos_ids: list[int], in_flight: int
    ) -> None:
        """`server`: the URL as typed; `model`: the name that the server knows the model by.

        Asks the server for its models and for one token. Raises InputError where it is not there, wants a key, serves
        another model or takes none of the two kinds of request.
        """
        try:
            import openai
        except ImportError:
            raise InputError("--engine server needs the openai package: pip install openai") from None
        self.server, self.base_model, self.tokenizer = server, model, tokenizer
        self.eos_ids, self.in_flight = eos_ids, in_flight
        self.model = model  # the name that requests go to: the base model's or an adapter's
        self.takes_ids = True  # False: prompts go out as text
        self.returns_ids = False  # known after the first answer; training needs it
        self._loaded: str | None = None  # the adapter that this engine has to unload
        self._client = openai.AsyncOpenAI(
            base_url=base_url(server), api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=RETRIES,
            timeout=openai.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS),
        )  # fmt: skip
        self._quick = self._client.with_options(max_retries=QUICK_RETRIES)
        self._runner = asyncio.Runner()
        try:
            self._run(self._meet())
        except BaseException:
            self.close()
            raise

    def sample(
        self,
        prompts: list[list[int]],
        keys: Sequence[StreamKey],
        settings: Sampling,
        on_finished: OnFinished | None = None,
    ) -> list[Response]:
        """One response per prompt, in the prompts' order; `on_finished(row, response)` as soon as a row is done.

        Each row has its own seed, a function of its key; whether equal seeds give equal answers is the server's affair.
        The first row that fails for good ends the call with InputError. Then, and on Ctrl-C, requests in flight are
        cancelled, here and on the server.
        """
        responses: list[Response | None] = [None] * len(prompts)
        rows = iter(range(len(prompts)))

        async def work() -> None:
            for row in rows:  # shared by all workers
                responses[row] = await self._complete(self._client, prompts[row], request_seed(keys[row]), settings)
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

        It is loaded as `NAME-RANDOM`, which `self.model` then holds. No name is used twice, because vLLM keeps the keys
        and values of prompts by the adapter's name and path, also after unloading: other weights under an old name
        would meet them. Raises InputError where the server cannot load it.
        """
        self._run(self._load(Path(directory).resolve(), f"{name}-{secrets.token_hex(4)}"))

    def close(self) -> None:
        """Unload the adapter, if there is one; a server that is gone, or a second call, is no error."""
        if not self._client.is_closed():
            with suppress(InputError):
                self._run(self._leave())
            self._runner.close()

    # -----------------------------------------------------------------------------------------------------------

    async def _meet(self) -> None:
        """Compare the name with /v1/models, then find out by a request for one token what the server takes."""
        import openai

        try:
            served = [entry.id for entry in (await self._quick.models.list()).data]
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError):
            raise
        except (openai.APIError, AttributeError, TypeError, ValueError):  # `transformers serve` asks the hub for it
            served = []
        if served and self.model not in served:
            names = ", ".join(map(str, served[:5]))
            raise InputError(f"--server {self.server}: serves {names}, not {self.model} (--served_model names it)")
        prompt, settings = self.tokenizer.encode("1"), Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1)
        try:
            first = await self._complete(self._quick, prompt, 0, settings)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if "field" not in error.response.text.lower():
                raise
            self.takes_ids = False
            first = await self._complete(self._quick, prompt, 0, settings)
        self.returns_ids = first.text is None

    async def _complete(self, client, prompt: list[int], seed: int, settings: Sampling) -> Response:
        fields = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_new_tokens}
        if self.takes_ids:
            fields |= {"prompt": prompt, "logprobs": 0, "extra_body": self._id_fields(settings)}
        else:
            text = prompt_text(self.tokenizer, prompt)
            fields |= {"prompt": text, "extra_body": {"generation_config": self._generation_config(settings)}}
        try:
            reply = await client.completions.create(model=self.model, seed=seed, **fields)
        except ValueError as error:  # a body that is not JSON
            raise InputError(f"--server {self.server}: answers something else than JSON ({error})") from None
        return self._read(reply)

    def _id_fields(self, settings: Sampling) -> dict:
        """What the API of OpenAI lacks and vLLM and SGLang have."""
        return {
            "top_k": settings.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": self.eos_ids,
            "return_token_ids": True,
        }  # fmt: skip

    def _generation_config(self, settings: Sampling) -> str:
        """The same in transformers' way, as a whole generation config."""
        config = {
            "do_sample": settings.temperature > 0, "top_k": settings.top_k, "eos_token_id": self.eos_ids,
            "pad_token_id": self.eos_ids[0], "max_new_tokens": settings.max_new_tokens,
        }  # fmt: skip
        return json.dumps(config)

    def _read(self, reply) -> Response:
        """A completion as a Response; raises InputError for anything else."""
        try:
            choice = reply.choices[0]
            finished = {"stop": True, "length": False}[choice.finish_reason]
            ids, logprobs = getattr(choice, "token_ids", None), getattr(choice.logprobs, "token_logprobs", None)
            if ids is None and isinstance(choice.text, str):  # null would be sampled as "None"
                return Response([], finished, text=choice.text, tokens=int(reply.usage.completion_tokens))
            good = len(ids) > 0 and (logprobs is None or len(logprobs) == len(ids))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise InputError(f"--server {self.server}: not a completion: {one_line(reply)}")
        if finished != (ids[-1] in self.eos_ids):
            raise InputError(
                f"--server {self.server}: a response {'ended' if finished else 'went on'} at token {ids[-1]}, but the "
                f"model's EOS ids are {self.eos_ids}: the server's checkpoint is another one"
            )
        if self.model != self.base_model and reply.model != self.model:
            raise InputError(f"--server {self.server}: answers as {reply.model}, not by the adapter {self.model}")
        return Response(ids, finished, logprobs)

    async def _load(self, directory: Path, name: str) -> None:
        import openai

        body = {"lora_name": name, "lora_path": str(directory), "load_inplace": True}  # in place: when asked again
        try:
            await self._quick.post("/load_lora_adapter", cast_to=str, body=body)
        except openai.APIStatusError as error:
            raise InputError(f"--server {self.server}: {_why_not_loaded(error, directory)}") from None
        before, self._loaded, self.model = self._loaded, name, name
        if before is not None:
            await self._unload(before)

    async def _unload(self, name: str) -> None:
        import openai

        with suppress(openai.NotFoundError):  # a server that was started anew
            await self._quick.post("/unload_lora_adapter", cast_to=str, body={"lora_name": name})

    async def _leave(self) -> None:
        try:
            if self._loaded is not None:
                await self._unload(self._loaded)
        finally:
            await self._client.close()

    def _run(self, work: Coroutine) -> None:
        """Run to the end; the client's errors become one line each. Ctrl-C cancels what is under way."""
        import openai

        try:
            self._runner.run(work)
            return
        except ExceptionGroup as group:
            error = group.exceptions[0]
        except openai.OpenAIError as alone:
            error = alone
        if not isinstance(error, openai.OpenAIError):
            raise error
        if isinstance(error, openai.APIConnectionError):
            reason = f"no answer ({one_line(error.__cause__ or error)})"
        elif isinstance(error, openai.AuthenticationError):
            reason = f"wants a key, which is read from OPENAI_API_KEY ({answer(error)})"
        elif isinstance(error, openai.APIStatusError):
            reason = f"refuses a request for {self.model} ({answer(error)})"
        else:
            reason = one_line(error)
        raise InputError(f"--server {self.server}: {reason}")


def base_url(server: str) -> str:
    """The address of the API behind `--server`: http:// and /v1 are added where they are missing."""
    url = server.strip()
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good or parts.query or parts.fragment:
        raise InputError(f"--server {server}: not an address like http://host:8000/v1")
    return url if url.endswith("/v1") else f"{url}/v1"


def checkpoint_eos_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """model.eos_ids of a checkpoint that is not loaded here."""
    try:
        return eos_ids(GenerationConfig.from_pretrained(find_checkpoint(model)), tokenizer)
    except OSError:  # a checkpoint need not have one
        return eos_ids(GenerationConfig(), tokenizer)


def request_seed(key: StreamKey) -> int:
    """31 bits of the row's stream, which fit every server."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text that the server's tokenizer, which adds its own BOS if it has one, turns into exactly `ids`."""
    for start in (0, 1):
        text = tokenizer.decode(ids[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer.encode(text) == ids:
            return text
    raise InputError("--server: a prompt cannot be written as text that encodes to the same tokens; use --engine")


def answer(error) -> str:
    """Status and message of a refusal, whatever form the server gives it."""
    text = error.response.text
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["detail"]
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]
        text = text["message"]
    return one_line(f"{error.status_code} {text}")


def _why_not_loaded(error, directory: Path) -> str:
    """vLLM's answers to an adapter that it does not load, in words of what to do."""
    text = answer(error)
    if "No adapter found" in text:
        return f"cannot read the adapter {directory}: the server needs the directory under this very path"
    if "max_lora_rank" in text:
        return f"the adapter {directory} has too high a rank: start vLLM with --max-lora-rank ({text})"
    if error.status_code in (404, 405) or "LoRA is not enabled" in text:
        return (
            "loads no adapters: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, "
            "or export the adapter (python -m runtime.export) and serve the result"
        )
    return f"does not load the adapter {directory} ({text})"
