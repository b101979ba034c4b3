"""The `server` engine against a real vLLM, and sockets that misbehave.

The tests with vLLM need its address: export PWOPSD_VLLM=$(tests/vllm_server.sh start).
"""

import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from contextlib import closing, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from forked import run_ranks, script

from errors import InputError
from model import add_lora, lora_layers, response_hidden
from problems import tiny_problems
from rollout import Sampling, sample
from runtime import engines
from runtime.checkpoint import load_adapter, save_adapter
from runtime.loading import TINY_MODEL, load_model, load_tokenizer
from runtime.metrics import GAP_FLOAT32
from teacher import EVALUATION_PROMPT, encode_prompt

pytest.importorskip("openai", reason="pip install openai")
from runtime import server
from runtime.ranks import StoppedError
from runtime.server import ServerEngine, base_url

VLLM = os.environ.get("PWOPSD_VLLM")
needs_vllm = pytest.mark.skipif(not VLLM, reason="no PWOPSD_VLLM: export PWOPSD_VLLM=$(tests/vllm_server.sh start)")
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=96)
SAMPLED = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode_prompt(tokenizer, EVALUATION_PROMPT, item, True) for item in tiny_problems("heldout", 24)]


def keys(count, seed=0):
    return [(seed, row) for row in range(count)]


@contextmanager
def one_line(words: str):
    """What is inside ends with InputError, in one line that has these words."""
    with pytest.raises(InputError, match=words) as caught:
        yield
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.fixture
def engine(tokenizer):
    engine = ServerEngine(VLLM, "tiny", tokenizer, 8)
    yield engine
    engine.close()


def random_adapter(directory: Path, rank: int, seed: int) -> Path:
    """An adapter that changes answers: B is not zero."""
    torch.manual_seed(seed)
    model = load_model("tiny", device="cpu")
    add_lora(model, rank, 2.0 * rank)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    save_adapter(model, directory, "tiny")
    return directory


def in_process(tokenizer, prompts, adapter=None):
    """The model, and its greedy answers."""
    model = load_model("tiny", device="cpu").eval()
    if adapter is not None:
        load_adapter(model, adapter)
    return model, [response.ids for response in sample(model, tokenizer, prompts, keys(len(prompts)), GREEDY)]


@torch.no_grad()
def logprobs_of(model, prompts, responses) -> list[list[float]]:
    """log p(y_t) of each token at temperature 1."""
    logp_BTV = model.get_output_embeddings()(response_hidden(model, prompts, responses)).float().log_softmax(dim=-1)
    return [[logp_BTV[row, t, y].item() for t, y in enumerate(ids)] for row, ids in enumerate(responses)]


def served_names() -> set[str]:
    with urllib.request.urlopen(f"{base_url(VLLM)}/models", timeout=30) as reply:
        return {entry["id"] for entry in json.load(reply)["data"]}


@needs_vllm
def test_vllm_gives_the_answers_and_the_log_probabilities_of_the_process(engine, tokenizer, prompts):
    model, expected = in_process(tokenizer, prompts)
    seen = {}
    responses = engine.sample(prompts, keys(len(prompts)), GREEDY, lambda row, response: seen.update({row: response}))
    assert [response.ids for response in responses] == expected
    assert [seen[row] for row in range(len(prompts))] == responses
    sampled = engine.sample(prompts, keys(len(prompts)), SAMPLED)
    assert all(response.finished == (response.ids[-1] == tokenizer.eos_token_id) for response in sampled)
    assert sum(response.finished for response in sampled) > 0
    for ours, theirs in zip(logprobs_of(model, prompts, [r.ids for r in sampled]), sampled, strict=True):
        assert theirs.logprobs == pytest.approx(ours, abs=1e-3)


@needs_vllm
def test_equal_keys_give_equal_answers_and_the_settings_hold(engine, prompts):
    first, again = (engine.sample(prompts[:8], keys(8), SAMPLED) for _ in range(2))
    other = engine.sample(prompts[:8], keys(8, seed=1), SAMPLED)
    assert first == again and first != other
    cut = engine.sample(prompts[:2], keys(2), Sampling(1.0, 0.95, 0, max_new_tokens=3))
    assert [(len(response.ids), response.finished) for response in cut] == [(3, False)] * 2
    greedy = engine.sample(prompts[:4], keys(4), GREEDY)
    hot = engine.sample(prompts[:4], keys(4), Sampling(temperature=2.0, top_p=1.0, top_k=1, max_new_tokens=96))
    assert [r.ids for r in hot] == [r.ids for r in greedy]


@needs_vllm
def test_adapters_are_loaded_used_and_unloaded_by_name(engine, tokenizer, prompts, tmp_path):
    """Also where two processes have the same adapter, as a killed one and its successor: each unloads its own."""
    base, before = [response.ids for response in engine.sample(prompts[:8], keys(8), GREEDY)], served_names()
    for number in (1, 2):
        adapter = random_adapter(tmp_path / f"adapter-{number}", 16, number)
        other = ServerEngine(VLLM, "tiny", tokenizer, 8)
        for one in (other, engine):
            one.use_adapter(adapter, f"step-{number}")
        other.close()
        assert engine.model.startswith(f"step-{number}-") and served_names() == before | {engine.model}
        ids = [response.ids for response in engine.sample(prompts[:8], keys(8), GREEDY)]
        assert ids == in_process(tokenizer, prompts[:8], adapter)[1] != base


@needs_vllm
def test_other_weights_under_one_name_and_path_do_not_meet_old_keys_and_values(engine, prompts, tmp_path):
    """vLLM keeps prompts of more than a block (128 tokens on a CPU) by the adapter's name and path, not its weights."""
    long = [[token for prompt in prompts for token in prompt][:300]]
    for seed in (4, 5):
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        engine.use_adapter(random_adapter(tmp_path / "adapter", 16, seed), "same")
        (response,) = engine.sample(long, keys(1), Sampling(0.0, 1.0, 0, max_new_tokens=8))
        model = load_model("tiny", device="cpu").eval()
        load_adapter(model, tmp_path / "adapter")
        assert response.logprobs == pytest.approx(logprobs_of(model, long, [response.ids])[0], abs=1e-3)


@needs_vllm
def test_what_vllm_does_not_do_is_one_line(engine, tokenizer, prompts, tmp_path):
    with one_line(r"vLLM needs .*--max-lora-rank.*rank"):
        engine.use_adapter(random_adapter(tmp_path / "large", 128, 6), "large")
    with one_line(r"loads no adapter .*nowhere: vLLM needs"):
        engine.use_adapter(tmp_path / "nowhere", "x")
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "large" / "adapter_model.safetensors", tmp_path / "half")
    with one_line("adapter"):
        engine.use_adapter(tmp_path / "half", "x")
    with one_line(r"its context of 512 tokens does not hold a prompt of \d+ and 600 new tokens"):
        engine.sample(prompts[:1], keys(1), Sampling(1.0, 1.0, 0, max_new_tokens=600))
    engine.context = None  # a server that does not tell: vLLM generates what is left behind the prompt
    long = [[token for prompt in prompts * 2 for token in prompt][:500]]
    with one_line("a row of 12 tokens, ended by 'length', for a limit of 40"):
        engine.sample(long, keys(1), Sampling(1.0, 1.0, 0, max_new_tokens=40))
    engine.model = "gone"
    with one_line(r"gone.*does not exist"):
        engine.sample(prompts[:1], keys(1), GREEDY)


# CompletionRequest of vLLM 0.32: what is sent, and what draws no other tokens.
OWN = ["model", "prompt", "seed", "temperature", "top_p", "top_k", "max_tokens", "stop_token_ids"]
DRAWS_NOTHING = {
    "stream", "stream_options", "stream_interval", "suffix", "user", "include_stop_str_in_output",
    "skip_special_tokens", "spaces_between_special_tokens", "truncation_side", "prompt_logprobs", "logprob_token_ids",
    "prompt_embeds", "add_special_tokens", "priority", "request_id", "session_id", "return_tokens_as_token_ids",
    "cache_salt", "routed_experts_prompt_start", "return_token_offsets", "mm_payload", "return_mm_kwargs",
    "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
}  # fmt: skip


@needs_vllm
def test_every_field_that_vllm_knows_is_sent_or_draws_nothing():
    with urllib.request.urlopen(f"{VLLM}/openapi.json", timeout=30) as reply:
        known = set(json.load(reply)["components"]["schemas"]["CompletionRequest"]["properties"])
    assert known - DRAWS_NOTHING == {*OWN, *server.VLLM_FIELDS}


WITHHELD = {1, 3}


def train_with_updates_withheld(arguments: list[str]) -> None:
    publish = engines.publish
    engines.publish = lambda engine, model, folder, step: step in WITHHELD or publish(engine, model, folder, step)
    script("train.py", arguments)


@needs_vllm
def test_an_update_that_is_withheld_from_the_server_is_seen(tmp_path):
    flags = f"--num_steps 5 --batch_size 8 --max_new_tokens 48 --eval_data= --device cpu --server {VLLM} --output_dir"
    arguments = [*flags.split(), str(tmp_path / "run")]
    (printed,) = run_ranks(tmp_path, train_with_updates_withheld, arguments, ranks=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stale = [row["sampler_gap"] for row in rows if row["step"] in WITHHELD]
    right = [row["sampler_gap"] for row in rows if row["step"] not in WITHHELD]
    assert max(right) < GAP_FLOAT32 / 10 < 10 * GAP_FLOAT32 < min(stale)
    warnings = [line for line in printed.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: after step 2: sampler_gap")


class Handler(BaseHTTPRequestHandler):
    """Misbehaves by `faults`: each request for a row takes the next one, `ok` once there are none."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_GET(self):
        self.answer(200, {"data": self.entries})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "max_tokens" not in body:
            self.adapters.append((self.path, body))
            self.answer(200, "done")
            return
        first = body["max_tokens"] == 1  # the engine's first question
        with self.lock:
            fault = self.faults.pop(0) if self.faults and not first else "ok"
            self.seen.append((fault, body, self.headers["Authorization"]))
            type(self).open += 1
            type(self).most = max(self.most, self.open)
        time.sleep(0.01)
        if fault == "hang":
            self.connection.settimeout(60)
            self.gone.append(self.connection.recv(1) == b"")  # the client closes
        with self.lock:
            type(self).open -= 1
        self.close_connection = fault in ("hang", "drop", "torn", "nonsense")
        if fault in ("torn", "nonsense"):
            self.send(200, b'{"choices', 500 if fault == "torn" else 9)
        elif self.close_connection:
            pass
        elif fault == "ok":
            self.answer(200, completion(body, **(self.first if first else self.changes)))
        else:
            self.answer(int(fault), {"error": {"message": "as asked"}})

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send(status, data, len(data))

    def send(self, status, data, length):
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", length), ("retry-after-ms", 10)):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def completion(body, usage=(), model=None, **changes) -> dict:
    """An answer to `body` as vLLM gives it: one token where one is asked for, else two, the second of them the EOS."""
    tokens = {"token_ids": [5, 1], "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5, 0.0]}}
    if body["max_tokens"] == 1:
        tokens = {"token_ids": [5], "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5]}}
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens["token_ids"]), **dict(usage)}
    return {"model": model or body["model"], "choices": [{"text": "", **tokens, **changes}], "usage": usage}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 3)
    monkeypatch.setattr(server, "ends_and_vocabulary", lambda *_: ([1], 9))
    monkeypatch.setenv("HTTP_PROXY", "what://ever")  # no proxy is asked
    own = {"faults": [], "seen": [], "gone": [], "adapters": [], "changes": {}, "first": {}, "entries": [{"id": "m"}],
           "open": 0, "most": 0, "lock": threading.Lock()}  # fmt: skip
    handler = type("Own", (Handler,), own)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.handle_error = lambda *_: None  # clients that go away are the point
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    handler.url, handler.httpd = f"http://127.0.0.1:{httpd.server_port}/", httpd
    yield handler
    httpd.shutdown()
    httpd.server_close()


class Tokens:
    """The one prompt that there is."""

    def encode(self, text):
        return [2]


SETTINGS = Sampling(0.7, 0.95, 20, 64)


def ask(url, count=12, in_flight=3, on_finished=None, settings=SETTINGS):
    with closing(ServerEngine(url, "m", Tokens(), in_flight)) as engine:
        return engine.sample([[2]] * count, keys(count), settings, on_finished)


def test_a_signal_ends_sampling_at_once_as_itself_and_cancels_what_is_in_flight(fake):
    rows = []

    def ctrl_c():
        while len(rows) < 2 or fake.open < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def stop(row, response):  # as the handler of a training run does
        raise StoppedError

    fake.faults += ["ok", "ok"] + ["hang"] * 100
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=ctrl_c, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(fake.url, 40, 4, on_finished=lambda row, response: rows.append(row))
    finally:
        signal.signal(signal.SIGINT, before)
    end = time.monotonic() + 30  # as long as the server would wait for the client, halved
    while len(fake.gone) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(rows) == 2 and fake.gone == [True] * 4
    fake.faults.clear()
    with pytest.raises(StoppedError):
        ask(fake.url, on_finished=stop)


def test_busy_broken_dropped_and_torn_answers_are_asked_for_again_with_few_requests_open(fake):
    fake.faults += ["429", "500", "503", "drop", "torn"]
    assert len(ask(fake.url)) == 12 and len(fake.seen) == 1 + 12 + 5
    assert 2 <= fake.most <= 3 and len({body["seed"] for _, body, _ in fake.seen[1:]}) == 12


def test_rows_that_were_done_before_a_failure_are_kept(fake):
    fake.faults += ["ok"] * 5 + ["500"] * 100
    kept = {}
    with one_line(r"500.*as asked"):
        ask(fake.url, on_finished=lambda row, response: kept.update({row: response.ids}))
    assert list(kept.values()) == [[5, 1]] * 5


def test_a_request_says_everything(fake, monkeypatch):
    ask(fake.url, 1)
    assert fake.seen[-1][1] == {
        "model": "m", "prompt": [2], "seed": 1484405855, "temperature": 0.7, "top_p": 0.95, "top_k": 20,
        "max_tokens": 64, "stop_token_ids": [1], "logprobs": 0, "return_token_ids": True, "n": 1, "echo": False,
        "stop": [], "logit_bias": None, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "min_p": 0.0, "use_beam_search": False, "length_penalty": 1.0, "watermarking": False, "ignore_eos": False,
        "min_tokens": 0, "bad_words": [], "allowed_token_ids": None, "structured_outputs": None,
        "response_format": None, "truncate_prompt_tokens": None, "repetition_detection": None,
        "thinking_token_budget": -1,
    }  # fmt: skip
    monkeypatch.setattr(server, "ends_and_vocabulary", lambda *_: ([1, 3], 9))
    ask(fake.url, 2, 1, settings=Sampling(0.0, 1.0, 0, 64))
    body = fake.seen[-1][1]
    assert (body["seed"], body["top_k"], body["stop_token_ids"]) == (1982462498, -1, [1, 3])


def test_adapters_are_loaded_and_unloaded_each_once(fake, tmp_path):
    engine = ServerEngine(fake.url, "m", Tokens(), 1)
    names, model = [], load_model("tiny", device="cpu")
    add_lora(model, 2, 4.0)
    for step in (1, 2):
        engines.publish(engine, model, tmp_path, step)
        names.append(engine.model)
        engine.sample([[2]], keys(1), SETTINGS)
        assert fake.seen[-1][1]["model"] == engine.model
    assert names[0].startswith("step-1-") and names[1].startswith("step-2-")
    fake.changes = {"model": "m"}
    with one_line(f"answers as m, not by the adapter {names[1]}"):
        engine.sample([[2]], keys(1), SETTINGS)
    engine.close()
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    paths = [str(tmp_path / "served" / f"step-{step}") for step in (1, 2)]
    whole = [{"lora_name": a, "lora_path": b, "load_inplace": True} for a, b in zip(names, paths, strict=True)]
    gone = [{"lora_name": name} for name in names]
    assert fake.adapters == [(load, whole[0]), (load, whole[1]), (unload, gone[0]), (unload, gone[1])]
    load_adapter(load_model("tiny", device="cpu"), tmp_path / "served" / "step-2")
    engines.withdraw(tmp_path)
    assert not list(tmp_path.iterdir())


NOT_ASKED_FOR = [
    ({"finish_reason": "repetition"}, "a row ended by 'repetition', which is neither an EOS nor the limit"),
    ({"finish_reason": ["stop"]}, "not a completion"),
    ({"token_ids": [5] * 5000, "usage": {"completion_tokens": 5000}}, "a row of 5000 tokens, .* a limit of 64"),
    ({"token_ids": [], "usage": {"completion_tokens": 0}}, "a row of 0 tokens, ended"),
    ({"finish_reason": "length"}, "a row of 2 tokens, ended by 'length', for a limit of 64"),
    ({"token_ids": [5, 5, 1]}, "a row of 2 tokens with 3 token ids"),
    ({"token_ids": [-5, 1]}, "the token id -5; the model has 0 to 8"),
    ({"token_ids": [9, 1]}, "the token id 9; the model has 0 to 8"),
    ({"token_ids": [5.0, 1]}, "the token id 5.0"),
    ({"token_ids": None}, "returns no token ids; vLLM does"),
    ({"token_ids": [5, 6]}, r"a row ended at token 6, but EOS is \[1\]"),
    ({"token_ids": [1, 1]}, r"a row went on behind token 1, but EOS is \[1\]"),
    ({"logprobs": {"token_logprobs": [-1]}}, "a row of 2 tokens with 1 log-probabilities"),
    ({"logprobs": {"token_logprobs": [-1, None]}}, "the log-probability None"),
    ({"logprobs": {"token_logprobs": [-1, float("nan")]}}, "the log-probability nan"),
    ({"logprobs": {"token_logprobs": [12.5, -1]}}, "the log-probability 12.5; start vLLM with --logprobs-mode"),
    ({"usage": {"prompt_tokens": 3}}, "read a prompt of 1 tokens as 3"),
]  # fmt: skip


def test_an_answer_that_was_not_asked_for_is_one_line_and_is_not_kept(fake):
    kept = []
    with closing(ServerEngine(fake.url, "m", Tokens(), 1)) as engine:
        for changes, line in NOT_ASKED_FOR:
            fake.changes = changes
            with one_line(f"--server {fake.url}: {line}"):
                engine.sample([[2]], keys(1), SETTINGS, lambda *row: kept.append(row))
        assert kept == []


def test_what_does_not_get_better_is_one_line(fake, monkeypatch):
    with monkeypatch.context() as quick, one_line(r"no answer \(.*(refused|attempts failed)"):
        quick.setattr(server, "QUICK_RETRIES", 0)
        ask("http://127.0.0.1:1")  # where nothing listens
    fake.faults.append("nonsense")
    with one_line("something else than JSON"):
        ask(fake.url)
    with one_line("serves m, not other"):
        ServerEngine(fake.url, "other", Tokens(), 1)
    fake.entries = [{"id": "m", "root": "/models/other"}]  # the checkpoint that is served under another name
    assert ServerEngine(fake.url, "/models/other", Tokens(), 1).model == "m"
    fake.entries = [{"id": "x", "root": "y"}, {"id": "m", "root": "x"}]  # a name goes before a checkpoint of that name
    assert ServerEngine(fake.url, "x", Tokens(), 1).model == "x"
    fake.entries = [{"id": "m", "root": "/models/other"}]
    with one_line("serves m, not /models"):
        ServerEngine(fake.url, "/models", Tokens(), 1)
    fake.entries = None
    with one_line("/v1/models lists no models"):
        ask(fake.url)
    fake.entries = [{"id": "m"}]
    fake.faults.append("401")
    with one_line(r"wants a key, which is read from OPENAI_API_KEY \(.*401.*as asked"):
        ask(fake.url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ask(fake.url, 1)
    assert fake.seen[-1][2] == "Bearer secret"


def test_what_the_server_cannot_hold_is_not_sampled(fake):
    fake.entries = [{"id": "m", "max_model_len": 64}]
    with one_line("its context of 64 tokens does not hold a prompt of 1 and 64 new tokens"):
        ask(fake.url)
    fake.entries[0]["max_model_len"] = 65
    engine = ServerEngine(fake.url, "m", Tokens(), 1)  # a context for all leaves each row its own limit
    engine.sample([[2], [2, 2, 2]], keys(2), Sampling(1.0, 1.0, 0, 65, context=65))
    assert [body["max_tokens"] for _, body, _ in fake.seen[-2:]] == [64, 62]


@pytest.mark.parametrize(("told", "raw"), [(-0.5, True), (0.0, False)])
def test_log_probabilities_behind_the_filters_are_seen(fake, monkeypatch, told, raw):
    """Asked with top_k 1: --logprobs-mode processed_logprobs gives 0."""
    fake.first = {"logprobs": {"token_logprobs": [told]}}
    engines.connect(fake.url, "m", Tokens(), 1).close()
    assert fake.seen[0][1]["top_k"] == 1
    with nullcontext() if raw else one_line("--logprobs-mode raw_logprobs"):
        engines.connect(fake.url, "m", Tokens(), 1, needs_raw=True).close()


def test_a_server_that_hangs_is_asked_again_and_given_up(fake, monkeypatch):
    for name, value in (("RETRIES", 1), ("REQUEST_SECONDS", 0.2), ("QUICK_RETRIES", 0)):
        monkeypatch.setattr(server, name, value)
    fake.faults += ["hang"]
    assert len(ask(fake.url)) == 12
    monkeypatch.setattr(server, "START_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf, one_line(r"no answer \(.*[Tt]ime"):
        ask(f"http://127.0.0.1:{deaf.getsockname()[1]}")  # accepts and never answers


ADDRESSES = {
    "http://host:8000": "http://host:8000/v1", "host:8000/": "http://host:8000/v1", "https://host/v1/": "https://host/v1",
    "https://host/some/path": "https://host/some/path/v1", "http://[::1]:80/v1": "http://[::1]:80/v1",
}  # fmt: skip


def test_addresses(fake):
    assert {typed: base_url(typed) for typed in ADDRESSES} == ADDRESSES
    for typed in ("host:port", "host:99999"):
        with one_line(f"--server {typed}: Port"):
            ask(typed)


def test_eos_ids_and_vocabulary_are_the_checkpoints(tokenizer, tmp_path):
    """Generation configs list several EOS ids; without one the model's config has them, as for a loaded model."""
    model = Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
    assert server.ends_and_vocabulary("tiny", tokenizer) == ([97], 111)
    (model / "generation_config.json").write_text('{"eos_token_id": [97, 5]}')
    assert server.ends_and_vocabulary(str(model), tokenizer) == ([5, 97], 111)
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": 7, "vocab_size": 128}
    (model / "config.json").write_text(json.dumps(config))
    assert server.ends_and_vocabulary(str(model), tokenizer) == ([7, 97], 128)
