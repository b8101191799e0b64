#!/bin/sh
# `vllm bench serve`: random prompts to two tasks in turn, which it knows as LoRA modules, eight at once; what it says.
# More flags of its own may follow, as --save-result. Where a server listens: PRAD_API_URL; its tasks: PRAD_TASKS, with
# spaces between; a key, if it asks for one: PRAD_API_KEY; a folder with the model's tokenizer: PRAD_TOKENIZER, or what
# `prad model path` says; vLLM's command: VLLM.
set -eu
url=${PRAD_API_URL:-http://127.0.0.1:8000}
tokenizer=${PRAD_TOKENIZER:-$(prad model path)}
export OPENAI_API_KEY="${PRAD_API_KEY:-none}"

# shellcheck disable=SC2086 # each task is a word of its own
exec "${VLLM:-vllm}" bench serve --backend openai --base-url "$url" --endpoint /v1/completions \
    --header "authorization=Bearer $OPENAI_API_KEY" --tokenizer "$tokenizer" \
    --lora-modules ${PRAD_TASKS:-sentiment e2e} --lora-assignment round-robin \
    --dataset-name random --random-input-len 48 --random-output-len 16 --num-prompts 32 --max-concurrency 8 "$@"
