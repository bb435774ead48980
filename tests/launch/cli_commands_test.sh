#!/usr/bin/env bash
# The commands as a user sees them: what they print, in which layouts, and their exit status.
# Usage: cli_commands_test.sh TRIREME MPIEXEC MODELS_DIR
. "$(dirname "$0")/cli_expect.sh"

expect 0 '^trireme [0-9]' "$trireme" --version
expect 0 'generate' "$trireme" --help
expect 0 'temperature' "$trireme" generate --help
expect 0 'little girl named Lily|little' "$trireme" generate "$model" --prompt "Once upon a time" --max-tokens 40
expect 0 'first token' "$trireme" generate "$model" --prompt "Once upon a time" --max-tokens 4
expect 0 'first token' "$trireme" generate "$model" --prompt x --max-tokens 2 --matmul cublaslt
expect 0 '"token_ids"' "$trireme" generate "$model" --prompt "Once upon a time" --max-tokens 4 --json --logprobs 2
expect 0 '"index":1' "$trireme" generate "$model" --prompt "Once" --prompt "Tom" --max-tokens 4 --json
expect 0 '"prompt_tokens":2' "$trireme" generate "$model" --prompt-ids 1,403 --max-tokens 4 --json
expect 0 'LlamaForCausalLM' "$trireme" inspect "$model" --tp 2 --pp 2
expect 0 'linear layers e4m3$' "$trireme" inspect "$model" --quantization fp8
expect 0 'linear layers e4m3 with e4m3 activations' "$trireme" inspect "$model" --quantization fp8-dynamic
for layout in "1 1 1" "2 2 1" "2 1 2"; do
  set -- $layout
  expect 0 'upon|there|was' $(ranks "$1") generate "$model" --tp "$2" --pp "$3" --quantization fp8 --prompt "Once upon a time" --max-tokens 20
done
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
  # Weights in 8 bits cost 0.0066 here; all layouts compute with the same ones.
  for layout in "1 1 1" "2 2 1" "4 2 2"; do
    set -- $layout
    expect 0 'nll 1\.5457' $(ranks "$1") eval "$model" --ids "$work/ids" --tp "$2" --pp "$3" --quantization fp8
    # Activations too: 0.0130. The order of sums over ranks rounds some of them to the next code.
    expect 0 'nll 1\.55[12]' $(ranks "$1") eval "$model" --ids "$work/ids" --tp "$2" --pp "$3" --quantization fp8-dynamic
  done
  mkdir "$work/folder"; mkfifo "$work/pipe"; ln -s target "$work/link"
  expect 1 'nowhere/x' $(ranks 4) eval "$model" --ids "$work/ids" --logits-out "$work/nowhere/x"
  expect 1 'folder: cannot be written: Is a directory' $(ranks 2) eval "$model" --ids "$work/ids" --logits-out "$work/folder"
  # A pipe is written to, however long its reader takes; a link stays one.
  { sleep 1; head -c 10000; sleep 1; cat; } <"$work/pipe" >"$work/read" &
  expect 0 'nll' $(ranks 2) eval "$model" --ids "$work/ids" --pp 2 --failure-timeout 0.5 --logits-out "$work/pipe"; wait $!
  expect 0 'nll' $(ranks 2) eval "$model" --ids "$work/ids" --pp 2 --logits-out "$work/link"
  cmp "$work/read" "$work/target" && [ -p "$work/pipe" ] && [ -L "$work/link" ] || fail "logits through a pipe and a link"
fi

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
expect 0 'KV cache +planned +1\.' "$trireme" inspect "$model" --tp 2 --pp 2 --ledger --memory-limit 4MiB
expect 0 'workspace +planned +3[2-9]\.' "$trireme" inspect "$model" --ledger --device cuda --matmul cublaslt --dtype bf16
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

finish
