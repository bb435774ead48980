#!/usr/bin/env bash
# shellcheck disable=SC2317  # parts are called by name
# Runs the GPU tests and benches of a bundle (launch/bundle.sh) on the machine it lies on: FOLDER/gpu.sh [options] RESULTS [part...]
#   --time-limit S   S seconds after the start the step that runs is ended, and those left are named (default 470: with what
#                    ending a step may take, all of it is done within 8 minutes)
#   --help           this text
# Parts, in this order when none is named: ops models graphs nccl sanitizer bench peer.
# RESULTS gets a log of each step, tests.json (each step, how it ended or why it did not run, seconds), a JSON file of each bench
# and speed.json (shares of what the same run measured the GPU to be able to).
# The exit status is 0 when every step passed or lacked what its line names (a GPU at all, a second one, torch, ...), 1 when one
# failed or there was no time for it, 2 for usage, 130 after Ctrl-C.
set -uo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
all_parts=(ops models graphs nccl sanitizer bench peer)
usage() { echo "gpu.sh: $*" >&2; exit 2; }

time_limit=470
while [[ ${1-} == -* ]]; do
  case $1 in
    --help | -h) sed -n '3,/^[^#]/s/^# \{0,1\}//p' "$here/gpu.sh" >&2; exit 0 ;;
    --time-limit)
      time_limit=${2-}
      [[ $time_limit =~ ^[1-9][0-9]{0,5}$ ]] || usage "--time-limit takes seconds, not '$time_limit'"
      shift 2
      ;;
    *) usage "unknown option $1; see gpu.sh --help" ;;
  esac
done
[[ -n ${1-} ]] || usage "RESULTS is missing: gpu.sh [options] RESULTS [part...]"
results=$1
shift
parts=("$@")
((${#parts[@]})) || parts=("${all_parts[@]}")
for part in "${parts[@]}"; do
  [[ " ${all_parts[*]} " == *" $part "* ]] || usage "unknown part $part; there are ${all_parts[*]}"
done
[[ -f "$here/env.sh" ]] || usage "it runs from a bundle: make one with launch/bundle.sh FOLDER"
if ! mkdir -p "$results" || [[ ! -w "$results" ]]; then usage "$results cannot be written to"; fi
results=$(cd "$results" && pwd)
# shellcheck source=/dev/null
source "$here/env.sh"
# Where a toolkit is, its tools are found behind what PATH names.
export PATH="$PATH:/usr/local/cuda/bin"

SECONDS=0
steps=() failed=0 interrupted='' models=''
not_run=''      # why what comes now does not run; a part may have a reason of its own
part_end=''     # until when the steps of a part may start
gpus=0 chip=''
exec {never}<> <(:)  # nothing is ever read from it: to wait without starting a process

json_text() {
  local text=${1//[[:cntrl:]]/}
  text=${text//\\/\\\\}
  printf '%s' "${text//\"/\\\"}"
}

finish() {
  [[ -z $models ]] || rm -rf "$models"
  { printf '{"chip": "%s", "gpus": %d, "seconds": %d, "steps": [' "$(json_text "$chip")" "$gpus" $SECONDS
    (IFS=,; printf '%s' "${steps[*]}")
    printf ']}\n'; } >"$results/tests.json"
}
trap finish EXIT
trap interrupted=1 INT TERM

pause() { read -r -t "$1" -u "$never"; }

# --- one command, with a limit ---

# Signals all processes of a session: mpirun's ranks have process groups of their own.
signal_session() {
  local file line fields
  kill -s "$2" "$1"
  for file in /proc/[0-9]*/stat; do
    read -r line <"$file" || continue
    # Behind the name, which may hold anything: state, parent, group, session.
    read -r -a fields <<<"${line##*) }"
    [[ ${fields[3]-} != "$1" ]] || kill -s "$2" "${file//[^0-9]/}"
  done
} 2>/dev/null

# Whether a process is gone within tenths of a second.
gone_within() {
  local tenths
  for ((tenths = $2; tenths > 0; --tenths)); do
    kill -0 "$1" 2>/dev/null || return 0
    pause 0.1
  done
  return 1
}

# limited LIMIT_S COMMAND...: in a session of its own, which ends with it, and not beyond the limit of all. `how` says how it
# ended.
limited() {
  local end=$((SECONDS + $1)) child status ticks=0 ended='timed out'
  shift
  ((end <= time_limit)) || { end=$time_limit ended='cut off: time'; }
  setsid "$@" </dev/null &
  child=$!
  how=''
  while kill -0 $child 2>/dev/null; do
    [[ -z $interrupted ]] || how=interrupted
    ((SECONDS < end)) || how=$ended
    [[ -z $how ]] || break
    if ((++ticks < 20)); then pause 0.01; else pause 0.1; fi
  done
  if [[ -n $how ]]; then
    signal_session $child TERM
    gone_within $child 50 || signal_session $child KILL
    # A process that a driver holds cannot be killed, nor waited for.
    gone_within $child 30 || { how="$ended, and cannot be killed"; return 1; }
  fi
  wait $child
  status=$?
  signal_session $child KILL
  [[ -z $how ]] || return 1
  if ((status == 0)); then how=passed; else how="failed ($status)"; fi
  return $status
}

# --- steps ---

# Why the next step does not run; empty when it does.
why_not() {
  if [[ -n $interrupted ]]; then echo interrupted
  elif [[ -n $not_run ]]; then echo "$not_run"
  elif ((SECONDS >= time_limit)); then echo time
  elif [[ -n $part_end ]] && ((SECONDS >= part_end)); then echo "time of its part"; fi
}

# The lines of a log that say what went wrong, or its last ones.
cause() {
  [[ -s "$1" ]] || { echo "    It said nothing."; return; }
  local pattern='^trireme: |^[a-z_]+: .*(error|cannot)|FAILED|Failure|[Ee]rror|must be|CHECK|No such file|Segmentation|Aborted|nothing'
  { grep -aE "$pattern" "$1" || tail -n 4 "$1"; } | head -n 8 | sed 's/^/    /'
}

record() {  # NAME SECONDS
  steps+=("{\"name\": \"$1\", \"result\": \"$(json_text "$how")\", \"seconds\": $2}")
}

# run LIMIT_S NAME WANTED COMMAND...: its output in NAME.log, which must hold WANTED (a regular expression) where that is not empty.
run() {
  local limit=$1 name=$2 wanted=$3 begin=$SECONDS reason
  shift 3
  rm -f "$results/$name.log"
  reason=$(why_not)
  if [[ -n $reason ]]; then
    how="not run: $reason"
    record "$name" 0
    printf '%-32s %s\n' "$name" "$how"
    [[ $reason != time* ]] || failed=1
    return 1
  fi
  limited "$limit" "$@" >"$results/$name.log" 2>&1
  [[ $how != passed || -z $wanted ]] || grep -qaE "$wanted" "$results/$name.log" || how='ran no test'
  record "$name" $((SECONDS - begin))
  printf '%-32s %-12s %4d s\n' "$name" "$how" $((SECONDS - begin))
  [[ $how != passed ]] || return 0
  failed=1
  cause "$results/$name.log"
  [[ $how != *'cannot be killed' ]] || not_run="a process of $name cannot be killed"
  return 1
}

step() { local name=$1 limit=$2; shift 2; run "$limit" "$name" '' "$@"; }
# GoogleTest, which passes a filter that no test matches, and where all are skipped.
tests() { local name=$1 limit=$2; shift 2; run "$limit" "$name" '\[  PASSED  \] [1-9]' "$@"; }
# lost NAME LIMIT_S FAULT WANTED COMMAND...: a job in which a rank is made to fail (tests/launch/fault_points.cc) must fail, and say WANTED.
lost() { run "$2" "$1" "$4" env TRIREME_FAULT="$3" bash -c '! "$@"' - "${@:5}"; }
# saved NAME LIMIT_S FILE COMMAND...: writes FILE, of which none is left of an earlier run.
saved() {
  local file=$3
  rm -f "$file"
  step "$1" "$2" "${@:4}" || return 1
  [[ ! -s "$file" ]] || return 0
  how="wrote no ${file##*/}" failed=1
  record "$1" 0
  printf '%-32s %s\n' "$1" "$how"
  return 1
}
# Files that hold the same, and something.
equal() {
  # shellcheck disable=SC2016
  step "$1" 10 bash -c '[[ -s $1 && -s $2 ]] || { echo "nothing to compare: $1 or $2 is empty"; exit 1; }; cmp "$1" "$2"' - "$2" "$3"
}
# Tokens and text of a step's answers; the times differ.
answers() {
  rm -f "$results/$1.json"
  [[ ! -s "$results/$1.log" ]] || grep '^{' "$results/$1.log" | sed 's/,"timings":.*/}/' | sort >"$results/$1.json"
}

# --- the machine ---

find_gpu() {
  local out=$results/nvidia-smi.txt
  if ! command -v nvidia-smi >/dev/null; then not_run="no GPU (there is no nvidia-smi)"; return; fi
  if ! limited 20 nvidia-smi >"$out" 2>&1; then
    not_run="no GPU (nvidia-smi: $how: $(head -n 1 "$out"))"
    # A driver that does not answer is a GPU that is lost, not one that is not there.
    [[ $how == failed* ]] || { failed=1; not_run="nvidia-smi $how: is the GPU lost?"; }
    return
  fi
  limited 20 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$results/chip.txt" 2>&1
  [[ $how == passed ]] || { failed=1; not_run="nvidia-smi --query-gpu $how"; return; }
  chip=$(head -n 1 "$results/chip.txt")
  gpus=$(grep -c . "$results/chip.txt")
  echo "GPU: $chip (of $gpus)"
}

op_tests=(elementwise_test matmul_test matmul_e4m3_test rope_test attention_test sampling_test mol_test)
gpu_only='*/cuda*'
stories=$here/models/stories260K
trireme=$here/bin/trireme

# First what the kernels are made of: where that fails, nothing behind it says more. Op tests read results as soon as an op
# returns, so launches wait; ranks that share a GPU wait for each other, so theirs must not.
run_ops() {
  local name
  tests gpu_primitives_test 60 "$here/bin/gpu_primitives_test"
  tests gpu_peer_sum_test 90 env -u CUDA_LAUNCH_BLOCKING "$here/bin/gpu_peer_sum_test"
  export CUDA_LAUNCH_BLOCKING=1
  for name in "${op_tests[@]}"; do tests "$name" 60 "$here/bin/$name" --gtest_filter="$gpu_only"; done
  tests decoder_test 60 "$here/bin/decoder_test" --gtest_filter="$gpu_only"
  unset CUDA_LAUNCH_BLOCKING
}

run_models() {
  local ranks
  export TRIREME_TEST_DEVICE=cuda
  for ranks in 1 2 4; do tests "golden_np$ranks" 90 mpirun -np $ranks "$here/bin/golden_test"; done
  # Whole prompts with cuBLASLt's matmuls.
  tests golden_cublaslt 90 env TRIREME_TEST_MATMUL=cublaslt "$here/bin/golden_test" --gtest_filter='*LogitsInBf16*'
  unset TRIREME_TEST_DEVICE
  step story_cublaslt 60 "$trireme" generate "$stories" --device cuda --matmul cublaslt --dtype bf16 \
    --prompt "Once upon a time" --max-tokens 60
  step story_tp2_pp2 60 mpirun -np 4 "$trireme" generate "$stories" --tp 2 --pp 2 --device cuda \
    --allow-shared-gpu --prompt "Once upon a time" --max-tokens 200
}

# Steps bit by bit, then tokens, by replay and by enqueuing every step anew.
run_graphs() {
  tests graph_replay_test 60 "$here/bin/graph_replay_test" --gtest_filter="$gpu_only"
  local how_run flags=(--device cuda --max-tokens 60 --prompt "Once upon a time" --prompt "One day" --prompt "The cat" --ignore-eos
    --temperature 0.8 --json)
  for how_run in graphs eager; do
    [[ $how_run == graphs ]] || flags+=(--no-graphs)
    saved "story_$how_run" 60 "$results/story_$how_run.prom" "$trireme" generate "$stories" "${flags[@]}" \
      --metrics "$results/story_$how_run.prom"
    answers "story_$how_run"
  done
  equal graphs_equal_eager "$results/story_graphs.json" "$results/story_eager.json"
  step graphs_replayed 10 grep -E '^trireme_graph_steps_total [1-9]' "$results/story_graphs.prom"
}

run_nccl() {
  local not_run=$not_run flags=(--device cuda --collectives nccl --allow-shared-gpu --prompt "Once upon a time" --max-tokens 20)
  # The loader itself is asked.
  if [[ -z $not_run ]] && LD_PRELOAD=libnccl.so.2 env true 2>&1 | grep -q 'cannot be preloaded'; then
    not_run="no libnccl.so.2 in LD_LIBRARY_PATH or the system's folders"
  fi
  step nccl_tp2 90 mpirun -np 2 "$trireme" generate "$stories" --tp 2 "${flags[@]}"
  step nccl_pp2 90 mpirun -np 2 "$trireme" generate "$stories" --pp 2 "${flags[@]}"
  # A rank is lost while the other waits for it in NCCL: the job ends by itself, and says which rank it was.
  lost nccl_rank_killed 40 1:decode:kill:3 'rank 1.*died' mpirun -np 2 "$here/bin/trireme_faults" generate "$stories" --tp 2 "${flags[@]}"
  lost nccl_rank_frozen 60 1:decode:freeze:3 'rank 1.*(is stuck|no sign of life)' mpirun -np 2 "$here/bin/trireme_faults" generate "$stories" \
    --tp 2 "${flags[@]}"
  run_peer_sums
}

# The same tokens whether small sums go over peer memory or through NCCL; the log says up to which size they did. NCCL inside
# a graph wants GPUs of its own, too.
run_peer_sums() {
  local not_run=$not_run how_run
  [[ -n $not_run ]] || ((gpus >= 2)) || not_run="one GPU, and it wants two"
  for how_run in auto nccl; do
    saved "sums_$how_run" 90 "$results/sums_$how_run.prom" mpirun -np 2 "$trireme" generate "$stories" --tp 2 --device cuda \
      --collectives $how_run --prompt "Once upon a time" --prompt "One day" --max-tokens 60 --ignore-eos --json \
      --metrics "$results/sums_$how_run.prom"
    answers "sums_$how_run"
  done
  equal sums_over_peers_equal_nccl "$results/sums_auto.json" "$results/sums_nccl.json"
  step sums_over_peers_were_there 10 grep -F 'sums over peer memory' "$results/sums_auto.log"
  step nccl_inside_graphs_replayed 10 grep -E '^trireme_graph_steps_total [1-9]' "$results/sums_nccl.prom"
}

# check TOOL NAME FILTER: a few cases of NAME_test, for the tools make kernels tens of times slower.
check() {
  tests "$1_$2" 30 compute-sanitizer --tool "$1" --error-exitcode 9 "$here/bin/${2}_test" --gtest_filter="$3"
}

run_sanitizer() {
  local tool not_run=$not_run part_end=$((SECONDS + 100))
  [[ -n $not_run ]] || command -v compute-sanitizer >/dev/null || not_run="no compute-sanitizer in PATH or /usr/local/cuda/bin"
  export CUDA_LAUNCH_BLOCKING=1
  for tool in memcheck racecheck; do
    check $tool attention '*SlidingWindowOverSeveral*/cuda_bf16'
    check $tool matmul '*StridedInputAndOutput*/cuda_bf16:*EqualsReference/cuda_bf16'
    check $tool sampling '*/cuda'
    check $tool elementwise '*NormEqualsReference/cuda_bf16'
    check $tool rope '*EqualsTheUnfusedReference/cuda_bf16'
    check $tool mol '*MolEdgeTest.*/cuda:*TiesGoTo*/cuda'
    check $tool matmul_e4m3 '*StridedInputAndOutput*/cuda_bf16:*FusedSwiGlu*/cuda_bf16'
  done
  unset CUDA_LAUNCH_BLOCKING
}

# --- benches ---

# make_model LIKE GB: random weights in `model`, in memory where there is room for them and as much again, else beside the results.
make_model() {
  local need=$(($2 * 1100000)) room
  model=$results/.none
  if [[ -z $(why_not) ]]; then
    room=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
    if ((room > 2 * need)) && room_in /dev/shm $need; then models=$(mktemp -d /dev/shm/trireme-gpu.XXXXXX)
    elif room_in "$results" $need; then models=$(mktemp -d "$results/.models.XXXXXX")
    else not_run="$2 GB for the weights are neither in /dev/shm nor in $results"; fi
    model=$models/$1
  fi
  step "make_$1" 90 "$trireme" make-checkpoint --like "$1" --dtype bf16 "$model" || not_run=${not_run:-"make_$1 did not pass"}
}
room_in() { local kb; kb=$(df -Pk "$1" 2>/dev/null | awk 'NR == 2 {print $4}'); ((${kb:-0} > $2)) && [[ -w $1 ]]; }
remove_model() {
  [[ -z $models ]] || rm -rf "$models"
  models=''
}

# latency NAME LIMIT_S FLAG...: `bench latency` of the model, saved as NAME.json.
latency() {
  local name=$1 limit=$2
  shift 2
  saved "$name" "$limit" "$results/$name.json" "$trireme" bench latency "$model" --device cuda --save "$results/$name.json" "$@"
}

# The same lengths as peer_torch.py's.
decode=(--input-len 512 --output-len 64)
prefill=(--input-len 8192 --output-len 2 --max-num-batched-tokens 8192 --iterations 3)

bench_1b() {
  local not_run=$not_run model='' matmul
  make_model llama-3.2-1b 3
  latency llama-3.2-1b-latency 60 "${decode[@]}"
  latency llama-3.2-1b-latency-eager 60 "${decode[@]}" --no-graphs
  latency llama-3.2-1b-latency-dependent-launches 60 "${decode[@]}" --dependent-launches
  saved llama-3.2-1b-throughput 60 "$results/llama-3.2-1b-throughput.json" \
    "$trireme" bench throughput "$model" --device cuda --save "$results/llama-3.2-1b-throughput.json"
  for matmul in own cublaslt; do latency "llama-3.2-1b-prefill-$matmul" 60 "${prefill[@]}" --matmul $matmul; done
  remove_model
}

bench_8b() {
  local not_run=$not_run model='' matmul
  make_model llama-3.1-8b 17
  latency llama-3.1-8b-latency 90 "${decode[@]}"
  # Prompts come in 16 steps, in which the first of them decode already: 64 steps of all are left.
  latency llama-3.1-8b-batch64 90 --batch-size 64 --input-len 2048 --output-len 80 --max-num-batched-tokens 8192 --iterations 1
  for matmul in own cublaslt; do latency "llama-3.1-8b-prefill-$matmul" 60 "${prefill[@]}" --matmul $matmul; done
  remove_model
}

# Of sums over ranks: on one GPU, and over the links between several.
bench_sums() {
  local not_run=$not_run
  saved gpu_sum_bench 40 "$results/gpu_sum_bench.json" "$here/bin/gpu_sum_bench" --benchmark_min_time=0.02 \
    --benchmark_out="$results/gpu_sum_bench.json" --benchmark_out_format=json
  [[ -n $not_run ]] || ((gpus >= 2)) || not_run="one GPU, and it wants two"
  # One token's hidden states and more; sums over peers are of at most eight ranks.
  saved comm_bench 60 "$results/comm_bench.json" mpirun -np $((gpus < 8 ? gpus : 8)) "$here/bin/comm_bench" --device cuda --dtype bf16 \
    --min-bytes 8192 --seconds 0.1 --save "$results/comm_bench.json"
}

# f32 goes through plain kernels that no model of speed takes, and would take most of the time.
run_bench() {
  saved op_bench 120 "$results/op_bench.json" "$here/bin/op_bench" --device cuda --benchmark_min_time=0.05 \
    --benchmark_filter=-/f32 --benchmark_out="$results/op_bench.json" --benchmark_out_format=json
  bench_sums
  bench_1b
  bench_8b
}

run_peer() {
  local not_run=$not_run like
  if [[ -z $not_run ]]; then
    limited 60 python3 -c 'import torch, transformers' >/dev/null 2>&1 || not_run="no torch and transformers for python3"
  fi
  saved peer-matmul 60 "$results/peer-matmul.json" python3 "$here/peer_torch.py" --matmul --save "$results/peer-matmul.json"
  for like in llama-3.2-1b llama-3.1-8b; do
    saved "peer-$like" 120 "$results/peer-$like.json" python3 "$here/peer_torch.py" --like $like --save "$results/peer-$like.json"
  done
}

# What the benches of these results say, where some ran.
speed_table() {
  local not_run=$not_run
  [[ -n $not_run ]] || compgen -G "$results/llama-*.json" >/dev/null || [[ -s "$results/op_bench.json" ]] || not_run="no bench passed"
  [[ -n $not_run ]] || command -v python3 >/dev/null || not_run="no python3: run speed_table.py RESULTS elsewhere"
  saved speed 20 "$results/speed.json" python3 "$here/speed_table.py" "$results"
  [[ $how != passed ]] || cat "$results/speed.log"
}

find_gpu
[[ -z $not_run ]] || echo "SKIPPED: GPU tests and benches: $not_run"
# One thing that must open the device: tests of a device that is not there are none.
if ! step device 60 "$trireme" generate "$stories" --device cuda --prompt "Once upon a time" --max-tokens 4; then
  not_run=${not_run:-"the device could not be used"}
fi
for part in "${parts[@]}"; do "run_$part"; done
if [[ " ${parts[*]} " =~ \ (bench|peer)\  ]]; then speed_table; fi
passed=$(grep -o '"passed"' <<<"${steps[*]}" | wc -l)
echo "$passed of ${#steps[@]} steps passed in $SECONDS s; see $results/tests.json"
[[ -z $interrupted ]] || exit 130
exit $failed
