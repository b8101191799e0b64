#!/bin/sh
# curl: a completion of a task, a chat as a stream, a response, a message, a file of requests as a batch.
# Where a server listens: PRAD_API_URL; one of its tasks: PRAD_TASK; a key, if it asks for one: PRAD_API_KEY.
set -eu
url=${PRAD_API_URL:-http://127.0.0.1:8000}
task=${PRAD_TASK:-sentiment}
key=${PRAD_API_KEY:-none}

ask() { # PATH BODY
    curl --silent --show-error --fail-with-body --noproxy '*' -H "authorization: Bearer $key" \
        -H 'content-type: application/json' "$url$1" -d "$2"
    echo
}

ask /v1/completions "{\"model\": \"$task\", \"prompt\": \"a fine film\", \"max_tokens\": 8}"
ask /v1/chat/completions '{"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8, "stream": true}'
ask /v1/responses '{"input": "Name a colour.", "max_output_tokens": 8}'
ask /v1/messages "{\"model\": \"$task\", \"messages\": [{\"role\": \"user\", \"content\": \"a fine film\"}], \"max_tokens\": 8}"

lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
body="{\"model\": \"$task\", \"prompt\": \"a fine film\", \"max_tokens\": 8}"
for number in 1 2 3; do
    echo "{\"custom_id\": \"$number\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": $body}" >>"$lines"
done
sent=$(curl --silent --show-error --noproxy '*' -H "authorization: Bearer $key" "$url/v1/files" \
    -F purpose=batch -F "file=@$lines;filename=requests.jsonl")
id=$(echo "$sent" | sed -n 's/.*"id": *"\(file-[0-9a-z]*\)".*/\1/p')
if [ -z "$id" ]; then
    echo "batches are off at this server: $sent"
    exit 0
fi
ask /v1/batches "{\"input_file_id\": \"$id\", \"endpoint\": \"/v1/completions\", \"completion_window\": \"24h\"}"
