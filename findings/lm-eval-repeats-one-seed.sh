#!/usr/bin/env bash
# Guess: a sampled task of lm-eval with `repeats: 64` takes 64 samples of every problem, whatever serves the model, so
# that maj@64 of gsm8k_cot_self_consistency is far above one sample of a model whose errors are scattered.
# True (lm-eval 0.4.13): through local-completions and local-chat-completions it takes the same sample 64 times. Every
# request of a run carries "seed": 1234, and a server that draws by the request's seed answers the same prompt with the
# same text. One sample, maj@8 and maj@64 are then equal to the last digit. With "seed": null in the caller's
# generation_kwargs (by the code, in the task's, too) each is a draw of its own, and maj@64 is 1.
# Why: TemplateAPI.model_call and amodel_call (lm_eval/models/api_models.py) hand the one seed of the model's arguments,
# 1234 where none is named, to _create_payload (lm_eval/models/openai_completions.py) for each request, and for repeats
# evaluator.evaluate sends a request again, word for word. Another seed in model_args only makes it another single
# sample. The generation_kwargs are laid over the payload, which is why null there helps.
# Bites: maj@k and, by reading, pass@k (humaneval_64) and averages of k samples behind vLLM, which honours the seed of a
# request (vllm-seeds-in-a-row.sh): self-consistency seems to gain nothing, pass@k is pass@1, and 64 times the time is
# spent on it. The server below is a stand-in that draws by the request's seed.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v && v/bin/pip install -q --disable-pip-version-check "lm-eval[api]==0.4.13"
export HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import json
import logging
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

logging.disable(logging.INFO)
print("lm-eval", version("lm-eval"))
asked = []


class Server(BaseHTTPRequestHandler):
    """A model that says 18 half of the time, else some other number. Equal seeds and prompts give equal answers."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked.append(request)
        prompt = str(request.get("prompt") or request["messages"])
        draw = random if request["seed"] is None else random.Random(f"{request['seed']} {prompt}")
        text = f"The answer is {18 if draw.random() < 0.5 else draw.randrange(100, 200)}."
        choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text}}
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
Path("rows.jsonl").write_text("".join(
    json.dumps({"question": f"{18 - i} and {i} are how many?", "answer": "#### 18"}) + "\n" for i in range(18)
))
own = Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k-cot-self-consistency.yaml"
Path("tasks").mkdir()
Path("tasks/votes.yaml").write_text(json.dumps({  # the harness's own task, with the rows above for its problems
    "include": str(own), "task": "votes", "dataset_path": "json", "dataset_name": None,
    "dataset_kwargs": {"data_files": {"test": str(Path("rows.jsonl").resolve())}},
}))
manager = TaskManager(include_path="tasks")


def run(kind, seed_argument, gen_kwargs):
    asked.clear()
    path = "chat/completions" if "chat" in kind else "completions"
    args = {"model": "m", "base_url": f"http://127.0.0.1:{server.server_address[1]}/v1/{path}",
            "tokenized_requests": False, "tokenizer_backend": None, **seed_argument}
    out = lm_eval.simple_evaluate(kind, model_args=args, tasks=["votes"], gen_kwargs=gen_kwargs, log_samples=True,
                                  apply_chat_template="chat" in kind, task_manager=manager)
    scores = {key.split(",")[1]: round(float(value), 4) for key, value in out["results"]["votes"].items()
              if key.startswith("exact_match,")}
    samples = [len(set(row["resps"][0])) for row in out["samples"]["votes"] if row["filter"] == "maj@64"]
    seeds, warmth = {request["seed"] for request in asked}, {request["temperature"] for request in asked}
    print(f"seen: {kind} {seed_argument} {gen_kwargs}: {len(asked)} requests, temperature {warmth}, seed {seeds}; "
          f"{min(samples)} to {max(samples)} different samples of 64; {scores}")
    assert len(asked) == 18 * 64 and warmth == {0.2}
    return scores, max(samples), min(samples), seeds


for kind in ("local-completions", "local-chat-completions"):
    for argument, seed in (({}, 1234), ({"seed": 7}, 7)):
        scores, most, _, seeds = run(kind, argument, None)
        assert seeds == {seed} and most == 1 and len(set(scores.values())) == 1 and 0.2 < scores["maj@64"] < 0.8
    scores, _, least, seeds = run(kind, {}, {"seed": None})
    assert seeds == {None} and least > 10 and scores["maj@64"] == 1
PY
v/bin/python seen.py
