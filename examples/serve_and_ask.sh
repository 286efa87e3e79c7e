#!/usr/bin/env bash
# Trains the quick start unless it is there, serves it, and asks it through OpenAI's client (pip install openai).
#
#     bash examples/serve_and_ask.sh [PORT]
#
# The server ends with this script. To keep one, and to ask in a browser: hrm-lm serve --run_name arithmetic
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)
port=${1:-8000}

[ -e runs/arithmetic/result.json ] ||
    hrm-lm train --config "$examples/../configs/arithmetic.yaml" --run_name arithmetic ${STEPS:+--steps "$STEPS"}

python -c "import socket; socket.create_server(('127.0.0.1', $port))" 2>/dev/null ||
    { echo "port $port is taken; give another"; exit 1; }
hrm-lm serve --run_name arithmetic --port "$port" &
server=$!
trap 'kill -INT $server 2>/dev/null; wait $server || true' EXIT
until python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health')" 2>/dev/null; do
    kill -0 $server || exit 1    # it has said why
    sleep 1
done
python "$examples/ask.py" "http://127.0.0.1:$port/v1"
