#!/usr/bin/env bash
# Ctrl-C and SIGTERM: one line, every rank leaves, nothing half written stays.
# Usage: cli_interrupt_test.sh TRIREME MPIEXEC MODELS_DIR
. "$(dirname "$0")/cli_expect.sh"

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

finish
