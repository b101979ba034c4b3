"""The client against a real `transformers serve` process on loopback, and against sockets that misbehave."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import server
from model import TINY_MODEL, load_tokenizer
from problems import InputError, tiny_problems
from server import complete_all, prompt_text
from teacher import EVALUATION_PROMPT, encode_prompt

SETTINGS = {"temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_tokens": 64}
MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(server, "RETRY_AFTER_SECONDS", (0.01, 0.01, 0.01))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------------
# A real server


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
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


def test_a_real_server_samples_solves_and_stops(real_server):
    tokenizer, problems = load_tokenizer("tiny"), tiny_problems("heldout", 8)
    prompts = [prompt_text(tokenizer, encode_prompt(tokenizer, EVALUATION_PROMPT, p, True)) for p in problems]
    settings = SETTINGS | {"eos_token_id": [tokenizer.eos_token_id]}
    done = list(complete_all(real_server, str(TINY_MODEL), prompts * 2, list(range(16)), settings, in_flight=4))
    assert sorted(item.row for item in done) == list(range(16))
    assert all(item.finish_reason == "eos" and "\\boxed{" in item.text and 10 < item.tokens < 64 for item in done)
    texts = {item.row: item.text for item in done}
    assert any(texts[row] != texts[row + 8] for row in range(8))  # sampled, not greedy
    cut = next(complete_all(real_server, str(TINY_MODEL), prompts[:1], [0], settings | {"max_tokens": 5}, 1))
    assert (cut.finish_reason, cut.tokens) == ("length", 5)


def test_a_real_server_with_another_model_is_one_line(real_server):
    with pytest.raises(InputError, match="some/other") as caught:
        list(complete_all(real_server, "some/other", ["a"], [0], SETTINGS | {"eos_token_id": [1]}, 1))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# Misbehaving sockets


class Handler(BaseHTTPRequestHandler):
    """Takes top_k as vLLM does; the class attributes say how it misbehaves and what it saw."""

    drop, busy, reply, models = 0, 0, None, None

    def do_GET(self):
        self.answer(404 if self.models is None else 200, {"data": [{"id": name} for name in self.models or ()]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.append(body)
            probe = "seed" not in body
            drop, busy = not probe and self.drop > 0, not probe and self.busy > 0
            type(self).drop -= drop
            type(self).busy -= busy and not drop
            type(self).open += 1
            type(self).most = max(self.most, self.open)
        time.sleep(0.02)
        with self.lock:
            type(self).open -= 1
        if drop:
            self.connection.close()
            return
        choice = {"text": f"<{body['prompt']} {body['seed']}>" if "seed" in body else "", "finish_reason": "stop"}
        good = {"choices": [choice], "usage": {"completion_tokens": 3}}
        self.answer(503 if busy else 200, good if self.reply is None else self.reply)

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def fake():
    """A server of our own making, for what a real one does too rarely to be waited for."""
    fields = {"seen": [], "lock": threading.Lock(), "open": 0, "most": 0}
    handler = type("Own", (Handler,), fields)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}/"
    yield handler
    httpd.shutdown()
    httpd.server_close()


def ask(url, count=12, in_flight=3, **changes):
    settings = SETTINGS | {"eos_token_id": [1]} | changes
    return {
        d.row: d
        for d in complete_all(url, "m", [f"p{i}" for i in range(count)], list(range(count)), settings, in_flight)
    }


def test_requests_carry_all_settings_and_at_most_so_many_are_open(fake):
    done = ask(fake.url)
    assert [done[row].text for row in range(12)] == [f"<p{row} {row}>" for row in range(12)]
    assert 2 <= fake.most <= 3
    for body in fake.seen[1:]:
        assert body.items() >= {"model": "m", "temperature": 1.0, "top_p": 0.95, "top_k": -1, "max_tokens": 64}.items()
    ask(fake.url, 1, top_k=20)
    assert fake.seen[-1]["top_k"] == 20


def test_dropped_connections_and_busy_answers_are_tried_again(fake):
    fake.drop, fake.busy = 2, 2
    assert len(ask(fake.url)) == 12
    assert len(fake.seen) == 1 + 12 + 4


def test_what_does_not_get_better_is_one_line(fake):
    with pytest.raises(InputError, match=r"no answer after \d tries .*refused"):
        ask(f"http://127.0.0.1:{free_port()}")
    fake.reply = {"error": "?"}
    with pytest.raises(InputError, match="not a completion"):
        ask(fake.url)
    fake.models = ["theirs"]
    with pytest.raises(InputError, match="serves theirs, not --model m"):
        ask(fake.url)


def test_prompts_survive_as_text():
    tokenizer = load_tokenizer("tiny")
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
