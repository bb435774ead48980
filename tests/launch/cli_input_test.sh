#!/usr/bin/env bash
# One clear line for every bad input, nothing lost, and values taken as they are.
# Usage: cli_input_test.sh TRIREME MPIEXEC MODELS_DIR
. "$(dirname "$0")/cli_expect.sh"

# Bad input.
expect 2 'frobnicate' "$trireme" generate "$model" --frobnicate
expect 2 'give a command: generate, eval, .*; see trireme --help' "$trireme"
expect 2 'there is no command "generat"; give one of generate, ' "$trireme" generat "$model"
expect 2 'give a command: latency, throughput, mol, serving, scheduler; see trireme bench --help' "$trireme" bench
expect 2 'MODEL_DIR is required; see trireme generate --help' "$trireme" generate
expect 2 '^trireme: --tp: must be a positive number, not 0; see trireme generate --help$' "$trireme" generate "$model" --tp 0
expect 2 '^trireme: --warmup: must be 0 or more, not -1; see trireme bench latency --help$' "$trireme" bench latency "$model" --warmup -1
expect 2 'give --prompt' "$trireme" generate "$model"
expect 1 'nothere/config.json' "$trireme" generate "$work/nothere" --prompt x
expect 2 '--tp 2 --pp 2: needs 4 ranks and there are 3: mpirun -n 4' $(ranks 3) generate "$model" --tp 2 --pp 2 --prompt x
expect 2 'tp' $(ranks 3) generate "$model" --tp 3 --prompt x
for seed in -1 18446744073709551616 1.5 0x10 x; do
  expect 2 "^trireme: --seed: must be an integer from 0 to 18446744073709551615, not $seed;" "$trireme" generate "$model" --prompt x --seed $seed
done
"$trireme" generate "$model" --prompt x --max-tokens 9 --temperature 1 --seed 10 >"$work/ten" 2>/dev/null
"$trireme" generate "$model" --prompt x --max-tokens 9 --temperature 1 --seed 010 >"$work/octal" 2>/dev/null
[ -s "$work/ten" ] && cmp "$work/ten" "$work/octal" || fail "--seed 010 is 10"
expect 2 '^trireme: --seed: must be' "$trireme" make-checkpoint --like qwen2.5-0.5b --seed -1 "$work/new"
expect 0 'first token' "$trireme" generate "$model" --prompt x --max-tokens 2 --temperature 1 --seed 18446744073709551615
expect 2 '^trireme: --logprobs: ' "$trireme" generate "$model" --prompt x --json --logprobs -2
expect 2 '^trireme: --logprobs: ' "$trireme" generate "$model" --prompt x --json --logprobs 101
expect 2 '^trireme: --temperature is -1; it must be 0 ' "$trireme" generate "$model" --prompt x --temperature -1
expect 2 '^trireme: --temperature is nan; ' $(ranks 2) generate "$model" --prompts "$work/nothere" --temperature nan
expect 2 '^trireme: --top-p is 0; ' "$trireme" generate "$model" --prompt x --top-p 0
expect 2 '^trireme: --stop: a stop string is empty' "$trireme" generate "$model" --prompt x --stop ''
printf '{"prompt": "a", "top_p": 2}\n' >"$work/p.jsonl"
expect 2 'p.jsonl:1: top-p is 2; ' "$trireme" generate "$model" --prompts "$work/p.jsonl"
expect 2 'dtype' "$trireme" generate "$model" --prompt x --dtype int3
echo 1,403,407 >"$work/ids"
for command in "generate $model --prompt x" "eval $model --ids $work/ids" "bench latency $model" "inspect $model"; do
  expect 2 '^trireme: --quantization int3: must be none, fp8 or fp8-dynamic' "$trireme" $command --quantization int3
done
expect 2 'matmul' "$trireme" generate "$model" --prompt x --matmul fast
expect 2 '^trireme: --matmul cublaslt: is a GPU.s, and --device cpu was given' "$trireme" generate "$model" --prompt x --device cpu --matmul cublaslt
expect 2 'device' "$trireme" generate "$model" --prompt x --device tpu
expect 2 'threads' "$trireme" generate "$model" --prompt x --threads 100000
# Unless this machine could do it.
[ -e /dev/nvidia0 ] || expect 1 'no CUDA backend|no NVIDIA driver' $(ranks 2) generate "$model" --prompt x --device cuda
# Before mpirun is started, which would add a page of its own.
[ -e /dev/nvidia0 ] || expect 1 'no CUDA backend|no NVIDIA driver' "$trireme" generate "$model" --prompt x --device cuda --ranks 2
expect 1 'vocabulary' "$trireme" generate "$model" --prompt-ids 1,512
expect 2 'not a token id' "$trireme" generate "$model" --prompt-ids 1,x
expect 1 'UTF-8' "$trireme" generate "$model" --prompt "$(printf 'a\xff')"
expect 1 '512' "$trireme" generate "$model" --prompt-ids "$(seq -s, 1 511 | sed 's/^/1,/')"
expect 2 'max-model-len 513.* 512' $(ranks 2) generate "$model" --prompt x --max-model-len 513
expect 1 'cannot be read: Is a directory' $(ranks 2) eval "$model" --text "$work"
expect 1 '"dog\\x01" is not a token id' "$trireme" eval "$model" --ids <(printf '1,dog\001 ,5')
expect 1 '/fd/.*: "3\\x00" is not a token id \(line 2, byte 1\)' "$trireme" eval "$model" --ids <(printf '1,2\n3\000,4')
expect 2 'prompt-ids: "1\+5" is not a token id' "$trireme" generate "$model" --prompt-ids 1+5
expect 1 'two tokens' $(ranks 2) eval "$model" --ids /dev/null
expect 1 'save .*nowhere' $(ranks 2) bench latency "$model" --save "$work/nowhere/x"
# What is written at the end is tried at the start: nothing is printed before.
for flag in metrics trace; do
  expect 1 "^trireme: --$flag .*nowhere/x: cannot be written: No such file" $(ranks 2) generate "$model" --prompt x --$flag "$work/nowhere/x"
  [ -s "$work/out" ] && fail "--$flag into a missing folder: generated all the same"
  expect 1 "^trireme: --$flag .*cannot be written: Is a directory" $(ranks 2) bench serving "$model" --pp 2 --$flag "$work"
  [ -s "$work/out" ] && fail "--$flag into a folder's place: measured all the same"
done
# What is read is not written over.
cp -r "$model" "$work/copy"; echo hello >"$work/copy.txt"
expect 1 '^trireme: --logits-out .*model.safetensors: is a file of the model and would be lost' $(ranks 2) eval "$work/copy" --text "$work/copy.txt" --logits-out "$work/copy/model.safetensors"
expect 1 '^trireme: --logits-out .*is the file of --text too' "$trireme" eval "$model" --text "$work/copy.txt" --logits-out "$work/copy.txt"
expect 1 '^trireme: --metrics .*is the file of --prompts too' $(ranks 2) generate "$model" --prompts "$work/copy.txt" --metrics "$work/copy.txt"
expect 1 'save .*is a file of the model' "$trireme" bench latency "$work/copy" --save "$work/copy/config.json"
cmp -s "$model/model.safetensors" "$work/copy/model.safetensors" && [ "$(cat "$work/copy.txt")" = hello ] || fail 'an input was written over'
expect 1 'save .*nowhere' "$trireme" bench mol --shape 2x2x8 --items 500 --batch 2 --save "$work/nowhere/x"
echo '{}' >"$work/empty.json"
expect 1 'compare .*empty.json: not a saved bench result' $(ranks 2) bench latency "$model" --pp 2 --compare "$work/empty.json"
[ -s "$work/out" ] && fail "--compare with no bench result: measured all the same"
expect 2 'input-len 4000' $(ranks 2) bench latency "$model" --input-len 4000
expect 2 'one page' $(ranks 2) generate "$model" --prompt x --kv-cache-memory 10
expect 1 'prompts.txt' "$trireme" generate "$model" --prompts "$work/prompts.txt"
printf '{"prompt": "a", "temprature": 1}\n' >"$work/p.jsonl"
expect 1 'p.jsonl:1.*temprature' "$trireme" generate "$model" --prompts "$work/p.jsonl"
printf '{"prompt": "a"}\n\n{"prompt": "a", "seed": 1, "seed": 2}\n' >"$work/p.jsonl"
expect 1 'p.jsonl:3: has the key "seed" twice in one object' "$trireme" generate "$model" --prompts "$work/p.jsonl"
printf '{"prompt": "a", "seed": -1}\n' >"$work/p.jsonl"
expect 1 'p.jsonl:1: "seed" must be a whole number' "$trireme" generate "$model" --prompts "$work/p.jsonl"
printf '{"prompt": "a", "seed": 18446744073709551615, "max_tokens": 2}\n' >"$work/p.jsonl"
expect 0 'first token' "$trireme" generate "$model" --prompts "$work/p.jsonl"
printf '{"prompt": "a"\n' >"$work/p.jsonl"
expect 1 'p.jsonl:1: is not valid JSON' "$trireme" generate "$model" --prompts "$work/p.jsonl"
# A file without an end.
expect 1 '^trireme: /dev/zero: has more than the 1.0 GiB' "$trireme" generate "$model" --prompts /dev/zero
expect 1 'standard output' bash -c "'$trireme' generate '$model' --prompt x --max-tokens 5 >/dev/full"

# A leader that gives up while steps or other replicas' answers are on their way leaves nobody waiting.
expect 1 'standard output' $mpiexec -np 2 bash -c "exec '$trireme' generate '$model' --pp 2 --prompt a --prompt b --max-tokens 50 >/dev/full"
printf '{"prompt":"a","max_tokens":2}\n{"prompt":"b","max_tokens":500,"ignore_eos":true}\n' >"$work/dp.jsonl"
expect 1 'standard output' $mpiexec -np 2 bash -c "exec '$trireme' generate '$model' --dp 2 --prompts '$work/dp.jsonl' >/dev/full"
printf '{"prompt":"a","max_tokens":4}\n{"prompt":"b","max_tokens":200}\n' >"$work/dp.jsonl"
expect 1 'prompt 2 of 2: the request needs 13 KV pages' $(ranks 2) generate "$model" --dp 2 --prompts "$work/dp.jsonl" --kv-cache-memory 40KiB
grep -q -- '--- 1/2: a' "$work/out" || fail "the other replica's prompt has no answer"
expect 0 'prefill 4 tokens' $(ranks 2) generate "$model" --dp 2 --prompt a --prompt b --max-tokens 4

# A request that is refused is one answer of many: it used to end all others, without a line for them.
refused_one() {  # WHICH 'why' COMMAND...: of three, that one; the others are answered in full
  local which=$1 why=$2; shift 2
  expect 1 "1 of 3 answers failed; the first: prompt $which of 3: $why" "$@" --json
  grep -q "^  prompt $which of 3: $why" "$work/err" || fail "$*: no line for the prompt"
  [ "$(grep -c '"finish_reason":"length"' "$work/out")" = 2 ] && [ "$(wc -l <"$work/out")" = 3 ] &&
    grep '"finish_reason":"error","error":"'"$why" "$work/out" | grep -q "^{\"index\":$((which - 1))," || fail "$*: $(head -c 600 "$work/out")"
}
printf '{"prompt":"a","max_tokens":4}\n{"prompt":"b","max_tokens":200}\n{"prompt":"c","max_tokens":4}\n' >"$work/mix.jsonl"
for n in 1 2; do
  refused_one 2 'the request needs 13 KV pages' $(ranks $n) generate "$model" --dp $n --prompts "$work/mix.jsonl" --kv-cache-memory 40KiB
done
refused_one 2 'the request needs 13 KV pages' "$trireme" generate "$model" --ranks 2 --max-restarts 1 --prompts "$work/mix.jsonl" --kv-cache-memory 40KiB
refused_one 3 'overloaded: 2 samples are open and this request has 1' "$trireme" generate "$model" --prompt x --prompt y --prompt z --max-num-seqs 1 --max-queue 1 --max-tokens 400 --ignore-eos

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

# Numbers that are none pass CLI11's own ranges.
for seconds in -1 nan -nan inf 0.0001 86401 ''; do
  expect 2 '--failure-timeout: must be 0 or from 0.1 to 86400 seconds, not' "$trireme" generate "$model" --prompt x --ranks 2 --failure-timeout "$seconds"
done
expect 2 '--start-timeout: must be from 0.1 to 86400, not nan' $(ranks 2) generate "$model" --prompt x --start-timeout nan
expect 2 '--start-timeout: must be from 0.1 to 86400, not 0' "$trireme" generate "$model" --prompt x --start-timeout 0
expect 2 '--request-rates: must be a positive number, not inf' "$trireme" bench serving "$model" --request-rates 1,inf
expect 2 '--slo-first-token-ms: must be a positive number, not nan' "$trireme" bench serving "$model" --slo-first-token-ms nan
expect 2 '--tolerance: must be 0 or more, not nan' "$trireme" bench latency "$model" --tolerance nan
expect 2 '--alpha: must be 0 or more, not nan' "$trireme" bench mol --alpha nan
expect 2 '--memory-gb: must be from 0.001 to 1e\+?09, not nan' "$trireme" tune mol --latency-ms 1 --memory-gb nan
expect 0 'first token' $(ranks 2) generate "$model" --prompt x --max-tokens 4 --failure-timeout 0

# A value is one word, as it is, and a flag's name in it is no flag.
for prompt in '[INST] a story, please [/INST]' '[]' '--ranks' '--max-restarts' ':'; do
  for how in "" "--ranks 2" "--ranks 2 --max-restarts 1"; do
    expect 0 '"index":0' "$trireme" generate "$model" $how --prompt "$prompt" --max-tokens 3 --json
    python3 - "$work/out" "$prompt" <<'P' || fail "$how --prompt $prompt: $(cat "$work/out")"
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
assert len(lines) == 1 and lines[0]["prompt"] == sys.argv[2], lines
P
  done
done
expect 2 'not expected: Tom' "$trireme" generate "$model" --prompt Once Tom
expect 0 '"index":1' "$trireme" generate "$model" --prompt-ids 1,403 --prompt-ids=1 --max-tokens 2 --json

# A folder, a pipe or a device in place of a tokenizer is named; nobody waits for it.
mkdir -p "$work/odd"; ln -sf "$(readlink -f "$model")"/{config.json,model.safetensors} "$work/odd/"
for make in 'mkdir' 'mkfifo' 'ln -s /dev/zero'; do
  for name in tokenizer.json tokenizer.model; do
    $make "$work/odd/$name"
    expect 1 "$name: is not a regular file" "$trireme" generate "$work/odd" --prompt x
    rm -r "${work:?}/odd/$name"
  done
done

# What cannot be written is said, by whoever writes it.
[ -w /dev/full ] && expect 1 'standard output cannot be written' sh -c '"$@" >/dev/full' _ "$trireme" --help
for how in "" "--ranks 2" "--ranks 2 --max-restarts 1"; do
  for where in '/dev/full:No space left' '&-:Bad file descriptor'; do
    expect 1 "standard output cannot be written: ${where#*:}" sh -c "\"\$@\" >${where%:*}" _ "$trireme" generate "$model" $how --prompt x --max-tokens 4
  done
done

# Flags that would have no effect.
expect 2 'json' "$trireme" generate "$model" --prompt x --logprobs 2
expect 2 'echo' "$trireme" generate "$model" --prompt x --echo --json

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
expect 1 '"finish_reason":"error","error":"request id 0: the model gave no finite logit' $(ranks 2) generate "$work/m" --tp 2 --prompt x --json
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

finish
