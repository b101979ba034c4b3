"""Completions from any OpenAI-compatible server: vLLM or SGLang over many GPUs, or `transformers serve`.

Prompts are rendered here and sent to /v1/completions, so that a server sees the very tokens that the in-process engines
see. Seeds are sent with every request; whether equal seeds give equal text is the server's affair.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from problems import InputError

REQUEST_SECONDS = 2 * 3600  # 38,912 tokens on a busy server take most of an hour
RETRY_AFTER_SECONDS = (1, 2, 4, 8, 16, 32)
BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Completion:
    """One answer of the server."""

    row: int
    text: str
    tokens: int
    finish_reason: str  # "eos" or "length"


def complete_all(
    url: str, model: str, prompts: list[str], seeds: list[int], settings: dict, in_flight: int
) -> Iterator[Completion]:
    """Yield one completion per prompt, in the order in which they finish, with at most `in_flight` requests open.

    `settings`: temperature, top_p, top_k, max_tokens, eos_token_id. Raises InputError, in one line, where the server is
    not there, serves another model, or refuses a request.
    """
    base = {"model": model, **_dialect(url, model, prompts[0], settings)}

    def one(row: int) -> Completion:
        reply = _post(url, {**base, "prompt": prompts[row], "seed": seeds[row]}, RETRY_AFTER_SECONDS)
        try:
            choice, tokens = reply["choices"][0], int(reply["usage"]["completion_tokens"])
            reason = {"stop": "eos", "length": "length"}[choice["finish_reason"]]
            return Completion(row, str(choice["text"]), tokens, reason)
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(f"--server {url}: not a completion: {json.dumps(reply)[:200]}") from None

    pool = ThreadPoolExecutor(max_workers=in_flight)
    try:
        for future in as_completed([pool.submit(one, row) for row in range(len(prompts))]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text that the server's tokenizer, which adds its own BOS if it has one, turns into exactly `ids`."""
    for start in (0, 1):
        text = tokenizer.decode(ids[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer.encode(text) == ids:
            return text
    raise InputError("--server: a prompt cannot be written as text that encodes to the same tokens; use --engine")


def _dialect(url: str, model: str, prompt: str, settings: dict) -> dict:
    """The sampling fields of a request in the server's own form, found by asking for one token.

    Checkpoints bring sampling defaults (Qwen3: top_k 20) that servers apply where a request is silent, so top_k is
    always sent: as a field, which vLLM and SGLang take, or in `generation_config`, which is transformers' way.
    """
    _check_served(url, model)
    plain = {name: settings[name] for name in ("temperature", "top_p", "max_tokens")}
    field = {**plain, "top_k": settings["top_k"] or -1}
    config = {
        "do_sample": settings["temperature"] > 0, "top_k": settings["top_k"], "eos_token_id": settings["eos_token_id"],
        "pad_token_id": settings["eos_token_id"][0], "max_new_tokens": settings["max_tokens"],
    }  # fmt: skip
    for form in (field, {**plain, "generation_config": json.dumps(config)}):
        try:
            _post(url, {"model": model, "prompt": prompt, **form, "max_tokens": 1}, RETRY_AFTER_SECONDS[:2])
            return form
        except InputError as error:
            if "fields" not in str(error).lower() or form is not field:
                raise
    raise AssertionError("unreachable")


def _check_served(url: str, model: str) -> None:
    """Compare with /v1/models where the server has it (`transformers serve` needs the hub for it)."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=30) as response:
            served = [entry["id"] for entry in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return
    if served and model not in served:
        raise InputError(f"--server {url}: serves {', '.join(map(str, served[:5]))}, not --model {model}")


def _post(url: str, body: dict, waits: tuple[int, ...]) -> dict:
    """POST to /v1/completions; once more after each of `waits` where there is no connection or the server is busy."""
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for wait in (*waits, None):
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {' '.join(error.read(2000).decode('utf-8', 'replace').split())[:300]}"
            if error.code not in BUSY:
                raise InputError(
                    f"--server {url}: refused the request for --model {body['model']}: {problem}"
                ) from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            problem = str(getattr(error, "reason", None) or error or type(error).__name__)
        except ValueError:
            raise InputError(f"--server {url}: answers something else than JSON") from None
        if wait is not None:
            time.sleep(wait)
    raise InputError(f"--server {url}: no answer after {len(waits) + 1} tries ({problem})")
