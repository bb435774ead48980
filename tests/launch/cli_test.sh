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
# The mpirun of Open MPI 5 loses part or all of what ranks print, now and then on a busy machine.
loses_output=$("$mpiexec" --version 2>/dev/null | grep -o 'Open MPI) 5') || loses_output=

fail() { printf 'FAILED: %s\n' "$*"; failed=$((failed + 1)); }
# expect STATUS 'extended regex of the last stderr line' COMMAND...: also checks that stderr is a single line on failure.
expect() {
  local status=$1 pattern=$2; shift 2
  local problem; problem=$(try "$status" "$pattern" "$@")
  if [ -n "$problem" ] && [ -n "$loses_output" ]; then echo "once more: $problem"; problem=$(try "$status" "$pattern" "$@"); fi
  if [ -n "$problem" ]; then fail "$problem"; else passed=$((passed + 1)); fi
}
try() {  # prints what is wrong
  local status=$1 pattern=$2; shift 2
  timeout 60 "$@" >"$work/out" 2>"$work/err"; local got=$?
  local lines; lines=$(grep -c '^trireme:' "$work/err")
  if [ "$got" != "$status" ]; then echo "$* : exit status $got, not $status: $(head -c 400 "$work/err")"
  elif ! grep -qE -e "$pattern" "$work/err" "$work/out"; then echo "$* : no '$pattern' in: $(head -c 400 "$work/err")"
  elif [ "$status" != 0 ] && [ "$lines" != 1 ]; then echo "$* : $lines lines of our own, not one"; fi
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
expect 0 '"overhead_ms"' $(ranks 4) generate "$model" --dp 2 --tp 2 --prompt Once --prompt Tom --max-tokens 9 --n 2 --temperature 1 --json
python3 - "$work/out" <<'P' || fail "timings: $(cat "$work/out")"
import json, sys
answers = [json.loads(line)["timings"] for line in open(sys.argv[1])]
assert len(answers) == 4
for t in answers:
    assert 0 < t["prefill_ms"] and 0 < t["decode_ms"] and 0 <= t["queue_ms"], t
    assert t["queue_ms"] + t["prefill_ms"] + t["decode_ms"] <= t["total_ms"] + 0.1, t
    assert 0 < t["communication_ms"] <= t["prefill_ms"] + t["decode_ms"], t
    assert 0 <= t["overhead_ms"] <= t["prefill_ms"] + t["decode_ms"], t
P
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
  mkdir "$work/folder"; mkfifo "$work/pipe"; ln -s target "$work/link"
  expect 1 'nowhere/x' $(ranks 4) eval "$model" --ids "$work/ids" --logits-out "$work/nowhere/x"
  expect 1 'folder: cannot be written: Is a directory' $(ranks 2) eval "$model" --ids "$work/ids" --logits-out "$work/folder"
  # A pipe is written to, however long its reader takes; a link stays one.
  { sleep 1; head -c 10000; sleep 1; cat; } <"$work/pipe" >"$work/read" &
  expect 0 'nll' $(ranks 2) eval "$model" --ids "$work/ids" --pp 2 --failure-timeout 0.5 --logits-out "$work/pipe"; wait $!
  expect 0 'nll' $(ranks 2) eval "$model" --ids "$work/ids" --pp 2 --logits-out "$work/link"
  cmp "$work/read" "$work/target" && [ -p "$work/pipe" ] && [ -L "$work/link" ] || fail "logits through a pipe and a link"
fi

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
expect 2 'device' "$trireme" generate "$model" --prompt x --device tpu
expect 2 'threads' "$trireme" generate "$model" --prompt x --threads 100000
# Unless this machine could do it.
[ -e /dev/nvidia0 ] || expect 1 'no CUDA backend|no NVIDIA driver' $(ranks 2) generate "$model" --prompt x --device cuda
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

# Scheduling, memory, layout.
expect 0 'answer 2: Once' "$trireme" generate "$model" --prompt Once --n 2 --temperature 1 --max-tokens 4
expect 0 '"sample":1' $(ranks 2) generate "$model" --prompt Once --n 2 --json --max-tokens 4 --policy static
printf '{"prompt":"a","n":2,"priority":3,"max_tokens":4}\n' >"$work/p.jsonl"
expect 0 'answer 2: a' "$trireme" generate "$model" --prompts "$work/p.jsonl" --no-overlap --no-prefix-cache --no-graphs
expect 0 '3/3: c' "$trireme" generate "$model" --prompt a --prompt b --prompt c --policy static --max-num-seqs 2 --max-tokens 4
expect 2 'policy greedy' $(ranks 2) generate "$model" --prompt x --policy greedy
expect 0 'prefill 3 tokens' $(ranks 2) generate "$model" --prompt x --pp-split 1,4 --pp 2 --max-tokens 4
expect 2 'pp-split adds up to 4 layers; the model has 5' $(ranks 2) generate "$model" --prompt x --pp-split 1,3 --pp 2
expect 2 'pp-split 1,x' $(ranks 2) generate "$model" --prompt x --pp-split 1,x --pp 2
expect 1 'memory-limit: rank 0 needs' $(ranks 2) generate "$model" --prompt x --memory-limit 100KiB
expect 2 'kv-cache-memory banana: must be' "$trireme" inspect "$model" --kv-cache-memory banana
expect 0 'KV cache +planned +1\.' "$trireme" inspect "$model" --tp 2 --pp 2 --ledger --memory-limit 3MiB
expect 0 'first token' $(ranks 4) generate "$model" --prompt x --tp 2 --pp 2 --max-tokens 4 --trace "$work/trace.json" --metrics "$work/metrics.txt"
grep -q '"name":"rank 3' "$work/trace.json" && grep -q '"name":"all-reduce","ph":"X","pid":3' "$work/trace.json" || fail "no trace of rank 3"
python3 -c 'import json,sys; json.load(open(sys.argv[1]))' "$work/trace.json" || fail "the trace is no JSON"
grep -q '^trireme_requests_total 1$' "$work/metrics.txt" || fail "no metrics"
expect 1 'trace .*nowhere' $(ranks 2) generate "$model" --prompt x --max-tokens 2 --trace "$work/nowhere/t.json"
expect 0 '"sequences_per_step"' "$trireme" bench scheduler --running 64 --steps 50
expect 0 '"holds": ' $(ranks 2) bench serving "$model" --pp 2 --num-prompts 8 --max-len 32 --request-rates 200
expect 0 '"policy": "static"' "$trireme" bench serving "$model" --num-prompts 8 --max-len 32 --policies continuous,static
printf '{"at":0,"prompt_tokens":5,"max_tokens":3}\n{"at":0.3,"prompt_tokens":9,"max_tokens":4}\n' >"$work/arrivals.jsonl"
expect 0 '"prefill_tokens": 14,' $(ranks 2) bench serving "$model" --tp 2 --arrivals "$work/arrivals.jsonl"
python3 - "$work/out" <<'P' || fail "the recording is not replayed: $(head -c 600 "$work/out")"
import json, sys
run, = json.load(open(sys.argv[1]))
assert run["arrivals"].endswith("arrivals.jsonl") and run["requests"] == 2 and run["seconds"] > 0.3, run
assert round(run["output_tokens_per_s"] * run["seconds"]) == 7, run
P
printf '{"at":0.1,"prompt_tokens":5,"max_tokens":3}\n' >>"$work/arrivals.jsonl"
expect 1 'arrivals.jsonl:3: "at" is 0.1, before the 0.3 of the request above' $(ranks 2) bench serving "$model" --arrivals "$work/arrivals.jsonl" --tp 2
expect 1 'cannot be read' "$trireme" bench serving "$model" --arrivals "$work/nowhere"
expect 2 'excludes' "$trireme" bench serving "$model" --arrivals "$work/arrivals.jsonl" --request-rates 5

expect 2 '--tp 2 --pp 2: needs 4 ranks and there are 2: mpirun -n 4' $(ranks 2) bench serving "$model" --tp 2 --pp 2

# Ranks that the program starts itself.
expect 0 '"littles_law"' "$trireme" bench serving "$model" --ranks 2 --num-prompts 8 --max-len 32 --request-rates 200
expect 0 '"ranks": 2' "$trireme" bench mol --ranks 2 --shape 2x2x16 --items 500 --batch 1 --iterations 1
for restarts in 0 2; do
  expect 0 'upon|there|was' "$trireme" generate "$model" --ranks 4 --tp 2 --pp 2 --max-restarts $restarts --prompt "Once upon a time" --max-tokens 20
done
expect 2 '--ranks N instead' $(ranks 2) generate "$model" --prompt x --max-restarts 1
expect 2 '--ranks 2: mpirun or srun' $(ranks 2) generate "$model" --prompt x --ranks 2
expect 1 'vocabulary' "$trireme" generate "$model" --prompt-ids 1,512 --ranks 2 --max-restarts 3
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

# Two jobs at once share no name.
# With restarts their output does not come by mpirun.
two() { "$trireme" generate "$model" --ranks 2 --max-restarts 1 --prompt "Once upon a time" --max-tokens 300 --ignore-eos >"$1" 2>/dev/null; }
two "$work/first" & other=$!
two "$work/second"
wait $other
if [ -s "$work/first" ] && cmp -s "$work/first" "$work/second"; then passed=$((passed + 1)); else fail "two jobs at once"; fi

# Flags that would have no effect.
expect 2 'json' "$trireme" generate "$model" --prompt x --logprobs 2
expect 2 'echo' "$trireme" generate "$model" --prompt x --echo --json

# doctor, and the same lines at the start of a command. Launchers of other kinds: slurm_test.sh, two_hosts_test.sh.
expect 0 'started alone' "$trireme" doctor
expect 0 'Nothing is wrong' $(ranks 4) doctor "$model" --tp 2 --pp 2
expect 0 '"mpi_loaded": "[0-9]' "$trireme" doctor --json
expect_doctor() {  # STATUS 'regex of a line' COMMAND...: its findings are on stdout, and its own last line says what follows
  local status=$1 pattern=$2; shift 2
  timeout 60 "$@" >"$work/out" 2>"$work/err"; local got=$?
  if [ "$got" != "$status" ] || ! grep -qE -e "$pattern" "$work/out" || ! tail -n 1 "$work/out" | grep -q 'This job cannot work'; then
    fail "$* : exit status $got, not $status, or no '$pattern' in: $(head -c 400 "$work/out") $(head -c 200 "$work/err")"; return
  fi
  passed=$((passed + 1))
}
expect_doctor 1 '--tp 2 --pp 2: needs 4 ranks and there are 3: mpirun -n 4, .*\(rank-count\)' $(ranks 3) doctor --tp 2 --pp 2
expect_doctor 1 'and 4096 ranks are wanted.*\(slots\)' env -u OMPI_MCA_rmaps_base_oversubscribe -u PRTE_MCA_rmaps_default_mapping_policy "$trireme" doctor --tp 4096
expect_doctor 1 'mpirun is not on PATH.*\(no-mpirun\)' env PATH=/nowhere "$work/trireme" doctor --tp 2
expect_doctor 1 'nothere/config.json' "$trireme" doctor "$work/nothere"
printf 'localhost slots=2\nno-such-host.invalid slots=2\n' >"$work/hosts"
expect_doctor 1 'hosts:2: host "no-such-host.invalid" has no address.*\(unknown-host\)' "$trireme" doctor --hostfile "$work/hosts"
# Slots are those of the hostfile, and no limit where more ranks than slots may be.
printf 'localhost slots=3\n127.0.0.1 max_slots=2\n' >"$work/hosts"
expect 0 'Nothing is wrong' "$trireme" doctor --hostfile "$work/hosts" --tp 8
expect 0 'Nothing is wrong' env -u OMPI_MCA_rmaps_base_oversubscribe -u PRTE_MCA_rmaps_default_mapping_policy "$trireme" doctor --hostfile "$work/hosts" --tp 5
expect_doctor 1 'hosts has 5 slots in all and 6 ranks are wanted.*\(slots\)' \
  env -u OMPI_MCA_rmaps_base_oversubscribe -u PRTE_MCA_rmaps_default_mapping_policy "$trireme" doctor --hostfile "$work/hosts" --tp 6
expect 0 'mpi_loaded' env "OMPI_X=$(printf '\377')" "$trireme" doctor --json
expect_doctor 1 'nohosts: cannot be read' "$trireme" doctor --hostfile "$work/nohosts"
[ "$(id -u)" != 0 ] || expect_doctor 1 'refuses to run as root.*\(root\)' env -u OMPI_ALLOW_RUN_AS_ROOT "$trireme" doctor --tp 2

# Started in a way that cannot work: a line, before MPI says a page.
slurm_step="SLURM_STEP_ID=0 SLURM_STEPID=0 SLURM_JOB_ID=7 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0"
for command in "generate $model --prompt x" "eval $model --ids $work/ids" "bench latency $model" "inspect $model"; do
  expect 1 'srun started 4 tasks with --mpi=none.*use srun --mpi=pmix' env $slurm_step "$trireme" $command
done
expect_doctor 1 'srun started 4 tasks with --mpi=pmi2' env $slurm_step SLURM_MPI_TYPE=pmi2 "$trireme" doctor
expect 1 'Slurm did not start this process.*unset' env $slurm_step SLURM_TASK_PID=999999999 "$trireme" generate "$model" --prompt x
expect 1 'mpiexec of another MPI' env PMI_RANK=0 PMI_SIZE=4 PMI_FD=9 "$trireme" generate "$model" --prompt x
expect 1 'OMPI_MCA_btl_tcp_if_include=lo is this host alone' env OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_MCA_btl_tcp_if_include=lo "$trireme" generate "$model" --prompt x
expect 1 'mpirun started 2 ranks but MPI sees 1' env OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 "$trireme" inspect "$model"
# One task of a step is a job of its own; a batch script is no step.
expect 0 'first token' env $slurm_step SLURM_STEP_NUM_TASKS=1 "$trireme" generate "$model" --prompt x --max-tokens 2
expect 0 'first token' env SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_PROCID=0 "$trireme" generate "$model" --prompt x --max-tokens 2
# Variables set to anything. Open MPI would read these.
for garbage in banana -1 '' 99999999999999999999 "$(printf '\001\377')"; do
  for name in OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK PMIX_RANK SLURM_PROCID SLURM_STEP_NUM_TASKS; do
    expect 1 "$name is .* and no launcher sets it so" env SLURM_STEP_ID=0 "$name=$garbage" "$trireme" generate "$model" --prompt x --max-tokens 2
  done
  for name in PMI_RANK PMI_FD SLURM_PROCID SLURM_JOB_ID SLURM_NTASKS SLURM_TASKS_PER_NODE SLURM_TASK_PID CUDA_VISIBLE_DEVICES NCCL_SOCKET_IFNAME; do
    expect 0 'first token' env "$name=$garbage" "$trireme" generate "$model" --prompt x --max-tokens 2
  done
done

# Two jobs at once on one machine: no name of one is in the other's way.
"$mpiexec" -np 2 "$trireme" generate "$model" --tp 2 --prompt "Once upon a time" --max-tokens 200 --ignore-eos >"$work/alone" 2>/dev/null
for i in 1 2 3; do
  "$mpiexec" -np 2 "$trireme" generate "$model" --tp 2 --prompt "Once upon a time" --max-tokens 200 --ignore-eos >"$work/job$i" 2>"$work/job$i.err" &
  jobs[i]=$!
done
for i in 1 2 3; do
  if wait "${jobs[i]}" && cmp -s "$work/job$i" "$work/alone"; then passed=$((passed + 1)); else fail "one of three jobs at once: $(head -c 400 "$work/job$i.err")"; fi
done

# bench: every rate beside the ceiling that the same run measured.
expect 0 '"prefill_share_of_matmul"' $(ranks 2) bench throughput "$model" --pp 2 --num-prompts 3 --dtype f16 --input-len 8 --output-len 4 --warmup 0 --iterations 1
for share in decode_share_of_read_bandwidth decode_share_of_matmul; do
  grep -A1 "\"$share\"" "$work/out" | grep -qE '"mean": [0-9.e-]*[1-9]' || fail "bench throughput: no $share in: $(head -c 2000 "$work/out")"
done
# The baseline is read before it is overwritten.
expect 0 'tokens_per_s' "$trireme" bench latency "$model" --input-len 8 --output-len 4 --warmup 0 --iterations 1 --save "$work/bench.json"
sed -i 's/"\(prefill_\|decode_\|\)tokens_per_s": [0-9.e+]*/"\1tokens_per_s": 1e12/' "$work/bench.json"
expect 1 'slower than .*bench.json' "$trireme" bench latency "$model" --input-len 8 --output-len 4 --warmup 0 --iterations 1 --save "$work/bench.json" --compare "$work/bench.json"
expect 1 'compare .*bench.json: its "input_len" is not' "$trireme" bench latency "$model" --input-len 9 --output-len 4 --compare "$work/bench.json"
[ -s "$work/out" ] && fail "--compare with another run's result: measured all the same"
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

# --ranks starts mpirun itself: on this machine, whatever Slurm's variables say, and with the doctor's own words.
expect 0 'upon|there|was' env SLURM_JOB_ID=77 SLURM_JOBID=77 'SLURM_NODELIST=n[1-2]' 'SLURM_TASKS_PER_NODE=1(x2)' SLURM_NNODES=2 \
  SLURM_NTASKS=2 "$trireme" generate "$model" --ranks 2 --prompt "Once upon a time" --max-tokens 20
expect 1 '(no-mpirun)' env PATH=/nonexistent "$trireme" generate "$model" --ranks 2 --max-restarts 2 --prompt x
# Of another MPI: it would be started in vain, again and again. One that prints nothing may be Open MPI's all the same.
mkdir "$work/mpich" "$work/mute"
printf '#!/bin/sh\n[ "$*" = --version ] || echo "$@" >>"%s/started"\nprintf "HYDRA build details:\\n    Version: 4.0.2\\n"\n' "$work" >"$work/mpich/mpirun"
printf '#!/bin/sh\n[ "$*" = --version ] || exec "%s" "$@"\n' "$(command -v "$mpiexec")" >"$work/mute/mpirun"
chmod +x "$work/mpich/mpirun" "$work/mute/mpirun"
expect 1 "^trireme: $work/mpich/mpirun is not Open MPI's mpirun .*HYDRA build details:.*\(foreign-mpirun\)\$" \
  env "PATH=$work/mpich:$PATH" "$trireme" generate "$model" --ranks 2 --max-restarts 3 --prompt x
[ -e "$work/started" ] && fail "another MPI's mpirun was started with $(cat "$work/started")"
expect_doctor 1 "is not Open MPI's mpirun .*\(foreign-mpirun\)" env "PATH=$work/mpich:$PATH" "$trireme" doctor --tp 2
expect 0 'first token' env "PATH=$work/mute:$PATH" "$trireme" generate "$model" --ranks 2 --prompt x --max-tokens 2
# Without a folder for its files MPI would crash, or mpirun end with pages.
for folder in /dev/null /proc "$work/nothere"; do
  expect 1 "MPI keeps files of its own in $folder, .*\(session-folder\)" env TMPDIR="$folder" "$trireme" generate "$model" --prompt x
  expect 1 "MPI keeps files of its own in $folder" env TMPDIR="$folder" "$trireme" generate "$model" --ranks 2 --prompt x
  expect_doctor 1 "MPI keeps files of its own in $folder" env TMPDIR="$folder" "$trireme" doctor
done

# The doctor looks at weights as loading would.
mkdir "$work/short"; cp "$(readlink -f "$model")/config.json" "$work/short/"
expect_doctor 1 'has neither model.safetensors nor' "$trireme" doctor "$work/short"
echo x >"$work/short/model.safetensors"
expect_doctor 1 'model.safetensors' "$trireme" doctor "$work/short"

# What only MPI itself knows is tried: a value that every Open MPI refuses, one of an mpirun, and one that breaks nothing.
refused=OMPI_MCA_hwloc_base_mem_bind_failure_action
expect 1 "MPI does not start with $refused=\"garbage\": unset $refused" env $refused=garbage "$trireme" generate "$model" --prompt x
expect 1 "MPI does not start with $refused=\"garbage\": unset $refused" env $refused=garbage "$trireme" generate "$model" --ranks 2 --prompt x
expect_doctor 1 "MPI does not start with $refused=.*\(garbage-variable\)" env $refused=garbage OMPI_MCA_btl_base_verbose=0 "$trireme" doctor
for agent in OMPI_MCA_rmaps_base_ranking_policy PRTE_MCA_rmaps_default_ranking_policy; do
  env $agent=garbage mpirun -n 1 true >"$work/out" 2>&1 && continue  # of another Open MPI
  expect 1 "MPI does not start with $agent=\"garbage\"" env $agent=garbage "$trireme" generate "$model" --ranks 2 --max-restarts 2 --prompt x
  expect_doctor 1 "MPI does not start with $agent=" env $agent=garbage "$trireme" doctor
done
expect 0 'first token' env OMPI_MCA_btl_base_verbose=0 "$trireme" generate "$model" --ranks 2 --prompt x --max-tokens 2
expect 1 'OMPI_MCA_coll names "garbage"' env OMPI_MCA_coll=garbage "$trireme" generate "$model" --ranks 2 --max-restarts 2 --prompt x
expect 1 'OMPI_MCA_shmem names "garbage"' env OMPI_MCA_shmem=mmap,garbage "$trireme" generate "$model" --ranks 2 --max-restarts 2 --prompt x

# make-checkpoint refuses a folder that holds something, and names the models it knows.
expect 2 'llama-3.2-1b|like' "$trireme" make-checkpoint --like nonsense "$work/new"
expect 1 'empty|not empty|holds' "$trireme" make-checkpoint --like qwen2.5-0.5b --layers 1 "$work/m"

# Ctrl-C and SIGTERM while answers are coming out: one line, every rank leaves. mpirun has an exit status of its own.
yes "Once upon a time" | head -n 2000 >"$work/many.txt"
printf '%s' "$work/many.txt" >"$work/name"  # in a file: a command line with it would find itself
ranks_left() { grep -qsF -f "$work/name" /proc/[0-9]*/cmdline; }
# The mpirun of Open MPI 5 does not forward what ranks say after its own end is decided.
drops_last_words() { [ "$1" = "$mpiexec" ] && "$mpiexec" --version | grep -q 'Open MPI) 5'; }
said_once() {  # COMMAND...
  local lines; lines=$(grep -c '^trireme: interrupted$' "$work/err")
  [ "$lines" = 1 ] || { [ "$lines" = 0 ] && drops_last_words "$1"; }
}
interrupt() {
  local signal=$1 status=$2 got; shift 2
  rm -f "$work/out" "$work/err"  # else the last command's would say that this one has begun
  "$@" generate "$model" ${more:-} --prompts "$work/many.txt" --max-tokens 500 --ignore-eos >"$work/out" 2>"$work/err" & local pid=$!
  for _ in $(seq 200); do [ -s "$work/out" ] && break; sleep 0.05; done
  kill -"$signal" $pid; wait $pid; got=$?
  if [ "$got" != "$status" ] || ! said_once "$@"; then
    fail "$signal to $*: exit status $got, not $status: $(cat "$work/err")"; return
  fi
  for _ in $(seq 100); do ranks_left || break; sleep 0.05; done
  if ranks_left; then fail "$signal to $*: a rank is left"; else passed=$((passed + 1)); fi
}
set -m  # background jobs of a script would ignore SIGINT otherwise
interrupt INT 130 "$trireme"
interrupt TERM 130 "$trireme"
interrupt INT 1 $(ranks 4)
more="--ranks 4" interrupt INT 130 "$trireme"

# What was being written goes, and a folder that was made for it. The interrupt comes when FILE.partial is more than its header.
interrupt_writing() {  # SIGNAL STATUS FILE COMMAND...
  local signal=$1 status=$2 file=$3 got; shift 3
  rm -rf "$work/written"; mkdir "$work/written"
  "$@" >"$work/out" 2>"$work/err" & local pid=$!
  for _ in $(seq 400); do [ "$(stat -c %s "$file.partial" 2>/dev/null || echo 0)" -gt 100000 ] && break; sleep 0.05; done
  [ -e "$file.partial" ] || fail "$*: nothing was written in 20 seconds: $(cat "$work/err")"
  kill -"$signal" $pid; wait $pid; got=$?
  for _ in $(seq 100); do [ -z "$(ls -A "$work/written")" ] && break; sleep 0.05; done
  if [ "$got" != "$status" ] || [ -n "$(ls -A "$work/written")" ] || ! said_once "$@"; then
    fail "$signal to $*: exit status $got, not $status: $(cat "$work/err"), left: $(find "$work/written")"; return
  fi
  passed=$((passed + 1))
}
yes '1 403 407 261 378' | head -n 60000 >"$work/many.ids"
written=$work/written/l.safetensors
interrupt_writing INT 130 "$written" "$trireme" eval "$model" --ids "$work/many.ids" --logits-out "$written"
interrupt_writing TERM 130 "$written" "$trireme" eval "$model" --ids "$work/many.ids" --logits-out "$written"
interrupt_writing INT 1 "$written" $(ranks 2) eval "$model" --pp 2 --ids "$work/many.ids" --logits-out "$written"
# 16 GB: mpirun passes the interrupt on after a second only, which is time for one or two of them.
written=$work/written/new/model-00001-of-00004.safetensors
interrupt_writing INT 130 "$written" "$trireme" make-checkpoint --like llama-3.1-8b "$work/written/new"
interrupt_writing INT 1 "$written" $(ranks 2) make-checkpoint --like llama-3.1-8b "$work/written/new"

printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
