"""The `server` engine against a real vLLM, a real `transformers serve`, and sockets that misbehave.

The tests with vLLM need its address: export PWOPSD_VLLM=$(tests/vllm_server.sh start).
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from errors import InputError
from model import (
    TINY_MODEL,
    add_lora,
    load_model,
    load_tokenizer,
    lora_layers,
    response_hidden,
)
from problems import tiny_problems
from rollout import Sampling, sample
from runtime import server
from runtime.checkpoint import load_adapter, save_adapter
from runtime.metrics import GAP_FLOAT32
from runtime.server import ServerEngine, answer, base_url, prompt_text
from teacher import EVALUATION_PROMPT, encode_prompt

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
VLLM = os.environ.get("PWOPSD_VLLM")
needs_vllm = pytest.mark.skipif(not VLLM, reason="no PWOPSD_VLLM: export PWOPSD_VLLM=$(tests/vllm_server.sh start)")
needs_openai = pytest.mark.skipif("openai" in MISSING, reason="pip install openai")
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=96)
SAMPLED = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode_prompt(tokenizer, EVALUATION_PROMPT, item, True) for item in tiny_problems("heldout", 24)]


def connect(tokenizer, url, model="tiny", in_flight=8) -> ServerEngine:
    return ServerEngine(url, model, tokenizer, [tokenizer.eos_token_id], in_flight)


def keys(count, seed=0):
    return [(seed, row) for row in range(count)]


def one_line_of(caught) -> str:
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# A real vLLM


@pytest.fixture
def engine(tokenizer):
    engine = connect(tokenizer, VLLM)
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
    """Greedy answers of `generate`, and the model."""
    model = load_model("tiny", device="cpu").eval()
    if adapter is not None:
        load_adapter(model, adapter)
    return model, greedy_ids(model, tokenizer, prompts)


def greedy_ids(model, tokenizer, prompts):
    return [response.ids for response in sample(model, tokenizer, prompts, keys(len(prompts)), GREEDY)]


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
    assert engine.takes_ids and engine.returns_ids
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
def test_equal_keys_give_equal_answers_and_the_limit_holds(engine, prompts):
    first, again = (engine.sample(prompts[:8], keys(8), SAMPLED) for _ in range(2))
    other = engine.sample(prompts[:8], keys(8, seed=1), SAMPLED)
    assert first == again and first != other
    cut = engine.sample(prompts[:2], keys(2), Sampling(1.0, 0.95, 0, max_new_tokens=3))
    assert [(len(response.ids), response.finished) for response in cut] == [(3, False)] * 2


@needs_vllm
def test_top_k_is_sent(engine, prompts):
    """top_k 1 leaves the greedy token only, at any temperature."""
    hot = Sampling(temperature=2.0, top_p=1.0, top_k=1, max_new_tokens=96)
    greedy = engine.sample(prompts[:4], keys(4), GREEDY)
    assert [r.ids for r in engine.sample(prompts[:4], keys(4), hot)] == [r.ids for r in greedy]


@needs_vllm
def test_adapters_are_loaded_used_and_unloaded_by_name(engine, tokenizer, prompts, tmp_path):
    base, before = [response.ids for response in engine.sample(prompts[:8], keys(8), GREEDY)], served_names()
    for number in (1, 2):
        adapter = random_adapter(tmp_path / f"adapter-{number}", 16, number)
        engine.use_adapter(adapter, f"step-{number}")
        assert engine.model.startswith(f"step-{number}-")
        assert served_names() == before | {engine.model}
        ids = [response.ids for response in engine.sample(prompts[:8], keys(8), GREEDY)]
        assert ids == in_process(tokenizer, prompts[:8], adapter)[1] != base
    engine.close()
    assert served_names() == before


@needs_vllm
def test_two_processes_with_one_adapter_do_not_meet(engine, tokenizer, prompts, tmp_path):
    """A killed run leaves its adapter loaded; two evaluations of one adapter unload each their own."""
    adapter, before = random_adapter(tmp_path / "adapter", 16, 3), served_names()
    other = connect(tokenizer, VLLM)
    for one in (other, engine):
        one.use_adapter(adapter, "same")
    other.close()
    assert [response.finished for response in engine.sample(prompts[:2], keys(2), GREEDY)] == [True] * 2
    assert served_names() == before | {engine.model}
    other.close()  # a second time: nothing to do


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
    with pytest.raises(InputError, match=r"serves tiny.*, not other") as caught:
        connect(tokenizer, VLLM, "other")
    one_line_of(caught)
    with pytest.raises(InputError, match="too high a rank: start vLLM with --max-lora-rank") as caught:
        engine.use_adapter(random_adapter(tmp_path / "large", 128, 6), "large")
    one_line_of(caught)
    with pytest.raises(InputError, match=r"cannot read the adapter .*nowhere: the server needs") as caught:
        engine.use_adapter(tmp_path / "nowhere", "x")
    one_line_of(caught)
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "large" / "adapter_model.safetensors", tmp_path / "half")
    with pytest.raises(InputError, match="adapter"):
        engine.use_adapter(tmp_path / "half", "x")
    with pytest.raises(InputError, match=r"max_tokens=600 cannot be greater than max_model_len"):
        engine.sample(prompts[:1], keys(1), Sampling(1.0, 1.0, 0, max_new_tokens=600))
    engine.model = "gone"
    with pytest.raises(InputError, match=r"gone.*does not exist") as caught:
        engine.sample(prompts[:1], keys(1), GREEDY)
    one_line_of(caught)


@needs_vllm
def test_an_update_that_is_withheld_from_the_server_is_seen(monkeypatch, capsys, tmp_path):
    withheld, publish = {1, 3}, train.publish

    def publish_late(engine, model, folder, step):
        if step not in withheld:
            publish(engine, model, folder, step)

    flags = {"num_steps": 5, "batch_size": 8, "max_new_tokens": 48, "eval_data": "", "device": "cpu"}
    words = [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr(train, "publish", publish_late)
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--server", VLLM, "--output_dir", str(tmp_path / "run")])
    before = signal.getsignal(signal.SIGTERM)
    train.main()
    signal.signal(signal.SIGTERM, before)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stale = [row["sampler_gap"] for row in rows if row["step"] in withheld]
    right = [row["sampler_gap"] for row in rows if row["step"] not in withheld]
    assert max(right) < GAP_FLOAT32 / 10 < 10 * GAP_FLOAT32 < min(stale)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: after step 2: sampler_gap")


# ---------------------------------------------------------------------------------------------------------------
# A real `transformers serve`: text only, no adapters


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def text_server(tmp_path_factory):
    if MISSING:
        pytest.skip(f"`transformers serve` needs {', '.join(MISSING)}: pip install 'transformers[serving]'")
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(TINY_MODEL), "--device", "cpu",
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_server_of_text_samples_solves_and_stops(text_server, tokenizer, prompts, tmp_path):
    engine = connect(tokenizer, text_server, str(TINY_MODEL), in_flight=4)
    assert not engine.takes_ids and not engine.returns_ids
    responses = engine.sample(prompts[:8] * 2, keys(16), SAMPLED)
    assert all(r.finished and "\\boxed{" in r.text and 10 < r.tokens < 64 and r.ids == [] for r in responses)
    assert any(responses[row].text != responses[row + 8].text for row in range(8))  # sampled, not greedy
    (cut,) = engine.sample(prompts[:1], keys(1), Sampling(1.0, 0.95, 0, max_new_tokens=5))
    assert (cut.finished, cut.tokens) == (False, 5)
    greedy = engine.sample(prompts[:4], keys(4), GREEDY)
    expected = in_process(tokenizer, prompts[:4])[1]
    assert [r.text for r in greedy] == tokenizer.batch_decode(expected, skip_special_tokens=True)
    with pytest.raises(InputError, match="loads no adapters: start vLLM with --enable-lora"):
        engine.use_adapter(random_adapter(tmp_path / "adapter", 4, 0), "x")
    engine.close()


def test_a_server_of_text_with_another_model_is_one_line(text_server, tokenizer):
    with pytest.raises(InputError, match="some/other") as caught:
        connect(tokenizer, text_server, "some/other")
    one_line_of(caught)


# ---------------------------------------------------------------------------------------------------------------
# What a real server will not do on demand


class Handler(BaseHTTPRequestHandler):
    """Misbehaves by `faults`: each request for a row takes the next one, `ok` once there are none."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200, {"data": [{"id": "m"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            is_row = body["max_tokens"] > 1  # not the engine's first question
            fault = self.faults.pop(0) if is_row and self.faults else "ok"
            self.seen.append((fault, body, self.headers["Authorization"]))
            type(self).open += 1
            type(self).most = max(self.most, self.open)
        time.sleep(0.02)
        if fault == "hang":
            self.connection.settimeout(60)
            self.gone.append(self.connection.recv(1) == b"")  # the client closes
        with self.lock:
            type(self).open -= 1
        if fault in ("hang", "drop"):
            self.close_connection = True
        elif fault in ("torn", "nonsense"):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "500" if fault == "torn" else "9")
            self.end_headers()
            self.wfile.write(b'{"choices')
            self.close_connection = True
        elif fault == "ok":
            choice = {"text": "", "token_ids": [5, 1], "finish_reason": "stop", "logprobs": {"token_logprobs": [0, 0]}}
            usage = {"completion_tokens": 2}
            self.answer(200, {"model": body["model"], "choices": [choice | self.changes], "usage": usage})
        else:
            self.answer(int(fault), {"error": {"message": "as asked"}})

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "10")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 3)
    own = {"faults": [], "seen": [], "gone": [], "changes": {}, "lock": threading.Lock(), "open": 0, "most": 0}
    handler = type("Own", (Handler,), own)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.handle_error = lambda *_: None  # clients that go away are the point
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    handler.url, handler.httpd = f"http://127.0.0.1:{httpd.server_port}/", httpd
    yield handler
    httpd.shutdown()
    httpd.server_close()


class Tokens:
    """The one thing that the engine asks of a tokenizer where a server takes ids."""

    def encode(self, text):
        return [2]


def ask(url, count=12, in_flight=3, on_finished=None):
    engine = ServerEngine(url, "m", Tokens(), [1], in_flight)
    try:
        return engine.sample([[2]] * count, keys(count), Sampling(1.0, 0.95, 0, 64), on_finished)
    finally:
        engine.close()


@needs_openai
def test_at_most_so_many_requests_are_open(fake):
    assert len(ask(fake.url)) == 12
    assert 2 <= fake.most <= 3
    assert len({body["seed"] for _, body, _ in fake.seen[1:]}) == 12


@needs_openai
def test_busy_broken_dropped_and_torn_answers_are_asked_for_again(fake):
    fake.faults += ["429", "500", "503", "drop", "torn"]
    assert len(ask(fake.url)) == 12
    assert len(fake.seen) == 1 + 12 + 5


@needs_openai
def test_rows_that_were_done_before_a_failure_are_kept(fake):
    fake.faults += ["ok"] * 5 + ["500"] * 100
    kept = {}
    with pytest.raises(InputError, match=r"500.*as asked") as caught:
        ask(fake.url, on_finished=lambda row, response: kept.update({row: response.ids}))
    one_line_of(caught)
    assert list(kept.values()) == [[5, 1]] * 5


@needs_openai
def test_an_error_of_the_caller_comes_through_and_ends_the_rest(fake):
    def full(row, response):
        raise OSError(28, "No space left on device")

    fake.faults += ["ok", "hang", "hang"]
    start = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        ask(fake.url, on_finished=full)
    assert time.monotonic() - start < 5


@needs_openai
def test_what_does_not_get_better_is_one_line(fake, monkeypatch):
    with pytest.raises(InputError, match=r"no answer \(.*") as caught:
        ask(f"http://127.0.0.1:{free_port()}")
    assert "refused" in one_line_of(caught) or "attempts failed" in one_line_of(caught)
    fake.faults.append("nonsense")
    with pytest.raises(InputError, match="something else than JSON") as caught:
        ask(fake.url)
    one_line_of(caught)
    for changes, line in (
        ({"finish_reason": "abort"}, "not a completion"),
        ({"token_ids": []}, "not a completion"),
        ({"token_ids": None, "text": None}, "not a completion"),
        ({"logprobs": {"token_logprobs": [0]}}, "not a completion"),
        ({"token_ids": [5, 6]}, "ended at token 6, but the model's EOS ids are"),
        ({"finish_reason": "length"}, "went on at token 1, but"),
    ):
        fake.changes = changes
        with pytest.raises(InputError, match=line) as caught:
            ask(fake.url)
        one_line_of(caught)
    fake.changes = {}
    with pytest.raises(InputError, match="serves m, not other"):
        ServerEngine(fake.url, "other", Tokens(), [1], 1)
    fake.faults.append("401")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        ask(fake.url)
    one_line_of(caught)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ask(fake.url, 1)
    assert fake.seen[-1][2] == "Bearer secret"


@pytest.mark.parametrize(
    "body",
    [
        '{"error": "Unauthorized"}',
        '{"error": {"message": "Unauthorized"}}',
        '{"detail": "Unauthorized"}',
        "Unauthorized",
    ],
)
def test_a_refusal_has_its_message_in_whatever_form_it_comes(body):
    assert answer(SimpleNamespace(status_code=401, response=SimpleNamespace(text=body))) == "401 Unauthorized"


@needs_openai
def test_a_server_that_hangs_is_asked_again_and_given_up(fake, monkeypatch):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    fake.faults += ["hang"]
    assert len(ask(fake.url)) == 12
    fake.faults += ["hang"] * 100
    with pytest.raises(InputError, match=r"no answer .*[Tt]ime"):
        ask(fake.url, 1)


CTRL_C = """
import sys
from rollout import Sampling
from runtime.server import ServerEngine
class Tokens:
    def encode(self, text):
        return [2]
engine = ServerEngine(sys.argv[1], "m", Tokens(), [1], 4)
keys = [(row,) for row in range(40)]
try:
    engine.sample([[2]] * 40, keys, Sampling(1.0, 1.0, 0, 64), lambda *_: print("row", flush=True))
except KeyboardInterrupt:
    print("stopped", flush=True)
finally:
    engine.close()
"""


@needs_openai
def test_ctrl_c_ends_at_once_with_requests_in_flight_cancelled(fake):
    fake.faults += ["ok", "ok"] + ["hang"] * 100
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C, fake.url], cwd=root, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout.readline() == process.stdout.readline() == "row\n"
    while fake.open < 4:
        time.sleep(0.01)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopped\n"
    assert time.monotonic() - start < 2  # 0.1 s; what follows is Python's own end
    assert process.wait(timeout=120) == 0
    for _ in range(100):
        if len(fake.gone) == 4:
            break
        time.sleep(0.05)
    assert fake.gone == [True] * 4


# ---------------------------------------------------------------------------------------------------------------
# Addresses and text


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("host:8000/", "http://host:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/some/path", "https://host/some/path/v1"),
        ("localhost", "http://localhost/v1"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_addresses(typed, address):
    assert base_url(typed) == address


@pytest.mark.parametrize("typed", ["", "http://", "ftp://host", "host:port", "http://host/?key=1", "host:99999"])
def test_what_is_no_address_is_one_line(typed):
    with pytest.raises(InputError, match="not an address"):
        base_url(typed)


def test_prompts_survive_as_text(tokenizer):
    ids = encode_prompt(tokenizer, EVALUATION_PROMPT, tiny_problems("train", 1)[0], True)
    assert tokenizer.encode(prompt_text(tokenizer, ids)) == ids


def test_a_bos_in_the_template_is_left_to_the_servers_tokenizer():
    class WithBos:  # the interface of a tokenizer that puts token 0 in front of everything it encodes
        def decode(self, ids, **_):
            return "".join("<s>" if i == 0 else chr(i) for i in ids)

        def encode(self, text):
            return [0] + [0] * text.startswith("<s>") + [ord(c) for c in text.removeprefix("<s>")]

    assert prompt_text(WithBos(), [0, 65, 66]) == "AB"
    with pytest.raises(InputError, match="cannot be written as text"):
        prompt_text(WithBos(), [65, 66])
