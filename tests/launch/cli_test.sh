#!/usr/bin/env bash
# The command line as a user sees it: what it prints, its exit status, and one clear line for every bad input.
# Usage: cli_test.sh TRIREME MPIEXEC MODELS_DIR    (MODELS_DIR holds stories260K)
set -u
mpiexec=$2
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
# Names without spaces, wherever the repository lies.
ln -s "$1" "$work/trireme"; trireme=$work/trireme
ln -s "$3/stories260K" "$work/stories260K"; model=$work/stories260K
passed=0 failed=0

fail() { printf 'FAILED: %s\n' "$*"; failed=$((failed + 1)); }
# expect STATUS 'extended regex of the last stderr line' COMMAND...: also checks that stderr is a single line on failure.
expect() {
  local status=$1 pattern=$2; shift 2
  timeout 60 "$@" >"$work/out" 2>"$work/err"; local got=$?
  local lines; lines=$(grep -c '^trireme:' "$work/err")
  if [ "$got" != "$status" ]; then fail "$* : exit status $got, not $status: $(head -c 400 "$work/err")"; return; fi
  if ! grep -qE -e "$pattern" "$work/err" "$work/out"; then fail "$* : no '$pattern' in: $(head -c 400 "$work/err")"; return; fi
  if [ "$status" != 0 ] && [ "$lines" != 1 ]; then fail "$* : $lines lines of our own, not one"; return; fi
  passed=$((passed + 1))
}
# mpirun adds lines of its own when a rank fails; only ours start with "trireme:".
ranks() { printf '%s\n' "$mpiexec -np $1 $trireme"; }

expect 0 '^trireme [0-9]' "$trireme" --version
expect 0 'generate' "$trireme" --help
expect 0 'temperature' "$trireme" generate --help
expect 0 'little girl named Lily|little' "$trireme" generate "$model" --prompt "Once upon a time" --max-tokens 40
expect 0 'first token' "$trireme" generate "$model" --prompt "Once upon a time" --max-tokens 4
expect 0 '"token_ids"' "$trireme" generate "$model" --prompt "Once upon a time" --max-tokens 4 --json --logprobs 2
expect 0 '"index":1' "$trireme" generate "$model" --prompt "Once" --prompt "Tom" --max-tokens 4 --json
expect 0 '"prompt_tokens":2' "$trireme" generate "$model" --prompt-ids 1,403 --max-tokens 4 --json
expect 0 'LlamaForCausalLM' "$trireme" inspect "$model" --tp 2 --pp 2
for layout in "1 1 1" "2 2 1" "4 2 2" "4 1 4" "4 4 1" "2 1 1"; do
  set -- $layout
  expect 0 'upon|there|was' $(ranks "$1") generate "$model" --tp "$2" --pp "$3" --prompt "Once upon a time" --max-tokens 20
done

# The published story, in one process and under TP 2 x PP 2.
story=$(python3 - "$model" <<'P' 2>/dev/null
import json, sys
story = json.load(open(sys.argv[1] + "/golden/greedy.json"))["upstream_story"]
print(",".join(map(str, story["new_ids"])), "|", ",".join(map(str, story["prompt_ids"])))
P
)
if [ -n "$story" ]; then
  ids=${story% |*} prompt=${story#*| }
  for layout in "1 1 1" "4 2 2"; do
    set -- $layout
    $(ranks "$1") generate "$model" --tp "$2" --pp "$3" --prompt-ids "$prompt" --max-tokens 255 --ignore-eos --json >"$work/story" 2>/dev/null
    got=$(python3 -c 'import json,sys; print(",".join(map(str, json.loads(open(sys.argv[1]).readline())["token_ids"])))' "$work/story")
    case "$ids," in "$got,"*) passed=$((passed + 1)) ;; *) fail "the published story under tp $2 pp $3" ;; esac
  done
else
  printf 'skipped: the published story (python3 is missing)\n'
fi

# eval
python3 -c 'import json,sys; print(",".join(map(str, json.load(open(sys.argv[1]))["token_ids"])))' "$model/golden/perplexity.json" >"$work/ids" 2>/dev/null
if [ -s "$work/ids" ]; then
  expect 0 'nll 1\.53918[89]|nll 1\.539190' "$trireme" eval "$model" --ids "$work/ids"
  expect 0 'nll 1\.53918[89]|nll 1\.539190' $(ranks 4) eval "$model" --ids "$work/ids" --tp 2 --pp 2 --logits-out "$work/logits.safetensors"
  [ -s "$work/logits.safetensors" ] || fail "no logits written"
  expect 1 'nowhere/x' $(ranks 4) eval "$model" --ids "$work/ids" --logits-out "$work/nowhere/x"
fi

# Bad input.
expect 2 'frobnicate' "$trireme" generate "$model" --frobnicate
expect 2 'subcommand' "$trireme"
expect 2 'give --prompt' "$trireme" generate "$model"
expect 1 'nothere/config.json' "$trireme" generate "$work/nothere" --prompt x
expect 2 '--tp 2 --pp 2: .* number of ranks, which is 3' $(ranks 3) generate "$model" --tp 2 --pp 2 --prompt x
expect 2 'tp' $(ranks 3) generate "$model" --tp 3 --prompt x
expect 2 'temperature' "$trireme" generate "$model" --prompt x --temperature -1
expect 2 'top-p' "$trireme" generate "$model" --prompt x --top-p 0
expect 2 'dtype' "$trireme" generate "$model" --prompt x --dtype int3
expect 1 'device' "$trireme" generate "$model" --prompt x --device tpu
# Unless this machine could do it.
[ -e /dev/nvidia0 ] || expect 1 'no CUDA backend|no NVIDIA driver' $(ranks 2) generate "$model" --prompt x --device cuda
expect 1 'vocabulary' "$trireme" generate "$model" --prompt-ids 1,512
expect 1 'not a token id' "$trireme" generate "$model" --prompt-ids 1,x
expect 1 'UTF-8' "$trireme" generate "$model" --prompt "$(printf 'a\xff')"
expect 1 '512' "$trireme" generate "$model" --prompt-ids "$(seq -s, 1 511 | sed 's/^/1,/')"
expect 2 'max-model-len 513.* 512' $(ranks 2) generate "$model" --prompt x --max-model-len 513
expect 1 'cannot be read: Is a directory' $(ranks 2) eval "$model" --text "$work"
expect 1 '"dog\\x01" is not a token id' "$trireme" eval "$model" --ids <(printf '1,dog\001 ,5')
expect 1 'two tokens' $(ranks 2) eval "$model" --ids /dev/null
expect 1 'save .*nowhere' $(ranks 2) bench latency "$model" --save "$work/nowhere/x"
expect 2 'input-len 4000' $(ranks 2) bench latency "$model" --input-len 4000
expect 2 'one page' $(ranks 2) generate "$model" --prompt x --kv-cache-memory 10
expect 1 'prompts.txt' "$trireme" generate "$model" --prompts "$work/prompts.txt"
printf '{"prompt": "a", "temprature": 1}\n' >"$work/p.jsonl"
expect 1 'p.jsonl:1.*temprature' "$trireme" generate "$model" --prompts "$work/p.jsonl"
expect 1 'standard output' bash -c "'$trireme' generate '$model' --prompt x --max-tokens 5 >/dev/full"

# A leader that gives up while steps or other replicas' answers are on their way leaves nobody waiting.
expect 1 'standard output' $mpiexec -np 2 bash -c "exec '$trireme' generate '$model' --pp 2 --prompt a --prompt b --max-tokens 50 >/dev/full"
printf '{"prompt":"a","max_tokens":2}\n{"prompt":"b","max_tokens":500,"ignore_eos":true}\n' >"$work/dp.jsonl"
expect 1 'standard output' $mpiexec -np 2 bash -c "exec '$trireme' generate '$model' --dp 2 --prompts '$work/dp.jsonl' >/dev/full"
printf '{"prompt":"a","max_tokens":4}\n{"prompt":"b","max_tokens":200}\n' >"$work/dp.jsonl"
expect 1 'needs 13 KV pages' $(ranks 2) generate "$model" --dp 2 --prompts "$work/dp.jsonl" --kv-cache-memory 40KiB
expect 0 'prefill 4 tokens' $(ranks 2) generate "$model" --dp 2 --prompt a --prompt b --max-tokens 4

# Numbers at the edge of their types.
printf '{"prompt":"a","max_tokens":9223372036854775807}\n' >"$work/p.jsonl"
expect 1 'max_tokens' "$trireme" generate "$model" --prompts "$work/p.jsonl"
printf '{"prompt_ids":[1,4294967699]}\n' >"$work/p.jsonl"
expect 1 'prompt_ids' "$trireme" generate "$model" --prompts "$work/p.jsonl"
printf '{"prompt":"a","temperature":true}\n' >"$work/p.jsonl"
expect 1 'temperature' "$trireme" generate "$model" --prompts "$work/p.jsonl"
expect 0 'first token' $(ranks 2) generate "$model" --tp 2 --prompt x --max-tokens 4 --temperature 1 --top-k 2000000000
expect 2 'ranks' "$trireme" inspect "$model" --tp 2 --dp 2147483647
expect 2 'max-model-len 1' "$trireme" eval "$model" --ids /dev/null --max-model-len 1

# Flags that would have no effect.
expect 2 'json' "$trireme" generate "$model" --prompt x --logprobs 2
expect 2 'echo' "$trireme" generate "$model" --prompt x --echo --json

# bench: the baseline is read before it is overwritten.
expect 0 'tokens_per_s' "$trireme" bench latency "$model" --input-len 8 --output-len 4 --warmup 0 --iterations 1 --save "$work/bench.json"
sed -i 's/"\(prefill_\|decode_\|\)tokens_per_s": [0-9.e+]*/"\1tokens_per_s": 1e12/' "$work/bench.json"
expect 1 'slower than .*bench.json' "$trireme" bench latency "$model" --input-len 8 --output-len 4 --warmup 0 --iterations 1 --save "$work/bench.json" --compare "$work/bench.json"
expect 2 'input-len' $(ranks 2) bench latency "$model" --input-len 500 --output-len 100

# Broken checkpoints; every rank stops with the same one line.
broken() { rm -rf "$work/m"; mkdir "$work/m"; cp "$model"/config.json "$model"/tokenizer.json "$model"/model.safetensors "$work/m"; }
broken; head -c 500000 "$model/model.safetensors" >"$work/m/model.safetensors"
expect 1 'model.safetensors' $(ranks 4) generate "$work/m" --prompt x
broken; rm "$work/m/model.safetensors"
expect 1 'model.safetensors' $(ranks 2) generate "$work/m" --prompt x
broken; sed -i 's/"hidden_size": 64/"hidden_size": 72/' "$work/m/config.json"
expect 1 'shape|head_dim|hidden' $(ranks 2) generate "$work/m" --prompt x
broken; sed -i 's/LlamaForCausalLM/GPT2LMHeadModel/' "$work/m/config.json"
expect 1 'GPT2LMHeadModel' "$trireme" generate "$work/m" --prompt x
broken; sed -i 's/"rope_scaling": null/"rope_scaling": {"rope_type": "yarn", "factor": 4}/' "$work/m/config.json"
expect 1 'rope_type: "yarn" is not supported' $(ranks 2) generate "$work/m" --prompt x
broken; sed -i 's/"vocab_size": 512/"vocab_size": 4611686018427387904/' "$work/m/config.json"
expect 1 'vocab_size: is 4611686018427387904' $(ranks 2) generate "$work/m" --prompt x
broken; { printf '\377\377\377\377\377\377\377\177'; tail -c +9 "$model/model.safetensors"; } >"$work/m/model.safetensors"
expect 1 'model.safetensors: says its header has 9223372036854775807 bytes' $(ranks 2) generate "$work/m" --prompt x
broken; sed -i 's/"dtype":"F32"/"dtype":"Q32"/' "$work/m/model.safetensors"
expect 1 'dtype' $(ranks 2) generate "$work/m" --prompt x
broken; printf '\377\377\377\177\377\377\377\177' | dd of="$work/m/model.safetensors" bs=1 conv=notrunc seek=$(($(stat -c %s "$model/model.safetensors") - 256)) 2>/dev/null  # NaN in the final norm
expect 1 'no finite logit' $(ranks 2) generate "$work/m" --tp 2 --prompt x
broken; printf '{"weight_map": {"model.norm.weight": "absent.safetensors"}}' >"$work/m/model.safetensors.index.json"; rm "$work/m/model.safetensors"
expect 1 'absent.safetensors' $(ranks 2) generate "$work/m" --prompt x
broken; rm "$work/m/tokenizer.json"; echo x >"$work/m/tokenizer.model"
expect 1 'tokenizer.model: is no SentencePiece model' $(ranks 2) generate "$work/m" --prompt x
broken; rm "$work/m/tokenizer.json"
expect 1 'prompt-ids' "$trireme" generate "$work/m" --prompt x
expect 0 '^[0-9]+,' "$trireme" generate "$work/m" --prompt-ids 1 --max-tokens 4
broken; echo '{' >"$work/m/tokenizer.json"
expect 1 'tokenizer.json' "$trireme" generate "$work/m" --prompt x

# make-checkpoint refuses a folder that holds something, and names the models it knows.
expect 2 'llama-3.2-1b|like' "$trireme" make-checkpoint --like nonsense "$work/new"
expect 1 'empty|not empty|holds' "$trireme" make-checkpoint --like qwen2.5-0.5b --layers 1 "$work/m"

# Ctrl-C and SIGTERM while answers are coming out: one line, every rank leaves. mpirun has an exit status of its own.
yes "Once upon a time" | head -n 2000 >"$work/many.txt"
printf '%s' "$work/many.txt" >"$work/name"  # in a file: a command line with it would find itself
ranks_left() { grep -qsF -f "$work/name" /proc/[0-9]*/cmdline; }
interrupt() {
  local signal=$1 status=$2 got; shift 2
  "$@" generate "$model" --prompts "$work/many.txt" --max-tokens 500 --ignore-eos >"$work/out" 2>"$work/err" & local pid=$!
  for _ in $(seq 200); do [ -s "$work/out" ] && break; sleep 0.05; done
  kill -"$signal" $pid; wait $pid; got=$?
  if [ "$got" != "$status" ] || [ "$(grep -c '^trireme: interrupted$' "$work/err")" != 1 ]; then
    fail "$signal to $*: exit status $got, not $status: $(cat "$work/err")"; return
  fi
  for _ in $(seq 100); do ranks_left || break; sleep 0.05; done
  if ranks_left; then fail "$signal to $*: a rank is left"; else passed=$((passed + 1)); fi
}
set -m  # background jobs of a script would ignore SIGINT otherwise
interrupt INT 130 "$trireme"
interrupt TERM 130 "$trireme"
interrupt INT 1 $(ranks 4)

printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
