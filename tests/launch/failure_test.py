#!/usr/bin/env python3
"""A rank fails, in every way and in every phase, at TP 2 x PP 2: the job is over in bounded time, rank 0 (or the lowest
survivor) names the right rank and phase once, the exit status says failure, and nothing is left: no process, no shared
memory. The phase capture, of CUDA graphs, is one of capture_faults, a program beside TRIREME_FAULTS.
Usage: failure_test.py TRIREME_FAULTS MPIEXEC MODEL_DIR CASES [--sanitized] [--seed N]
       (CASES: start, phases, commands, launcher, slow, records, or all; --seed: which ranks fail in which phase, modulo 4;
       drawn and printed unless given)"""
import glob
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time

import jobs
from jobs import SLACK, processes

trireme, mpiexec, model, wanted = sys.argv[1:5]
sanitized = "--sanitized" in sys.argv[5:]  # of no known speed
seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else random.randrange(1 << 30)
capture_faults = os.path.join(os.path.dirname(trireme), "capture_faults")
TIMEOUT = 2.0  # --failure-timeout
PHASES = ["init", "load", "prefill", "decode", "shutdown"]
# Seconds from a fault to the end, at most, on a machine that does nothing else. The dead are noticed at once; a rank that
# stands still after the timeout, and gets 0.7 s to leave; an error that one rank alone has after 2 s.
AT_ONCE, STANDSTILL, ALONE = 1.0, TIMEOUT + 1.0 + 0.7, min(2.0, TIMEOUT) + 1.0
WITHIN = {"kill": AT_ONCE, "exit": AT_ONCE, "throw": AT_ONCE, "check": AT_ONCE, "error": ALONE, "stop": STANDSTILL,
          "freeze": STANDSTILL, "freeze-in-call": STANDSTILL}
# The machine is too slow to say anything about times when it adds this to a sleep.
TOO_SLOW = 0.3
cases = jobs.Cases(at_once=3)


def start(work, fault="", timeout=TIMEOUT, extra=(), tokens=60, supervised=False, **more):
    tag = os.path.join(work, "prompts.jsonl")
    with open(tag, "w") as out:
        for text in ("Once upon a time", "Tom had a dog", "The sun"):
            out.write(json.dumps({"prompt": text, "max_tokens": tokens, "ignore_eos": True}) + "\n")
    launcher = [] if supervised else [mpiexec, "-np", "4"]
    if supervised:
        extra = [*extra, "--ranks", "4", "--max-restarts", "1"]
    command = [*launcher, trireme, "generate", model, "--tp", "2", "--pp", "2", "--prompts", tag, "--json",
               "--threads", "1", "--failure-timeout", str(timeout), *extra]
    return jobs.Job(work, tag, command, fault, **more)


def start_capture(work, fault):
    tag = os.path.join(work, "job")
    os.mkdir(tag)  # of the flight records
    return jobs.Job(work, tag, [mpiexec, "-np", "4", capture_faults, model, tag, str(TIMEOUT)], fault)


def blocks(err):
    """Lines that name a failed rank; a failed CHECK has a line of its own on its rank."""
    return [line for line in err.splitlines() if re.match(r"trireme: (rank|ranks) .*pid", line)]


def measure_undisturbed():
    """Seconds that a job takes in which nothing fails, side by side with others as the cases are."""
    def measure(work):
        job = start(work, tokens=4)
        if job.wait(60) == 0:
            seconds.append(job.seconds)

    seconds, pool = [], jobs.Cases(at_once=3)
    for _ in range(3):
        pool.run(measure)
    pool.wait()
    return max(seconds)


def lateness(job, how):
    """What to say when the job has taken too long to end after its fault; else nothing."""
    limit = WITHIN[how] + undisturbed + 10 * job.delay
    took = job.seconds_after_fault()
    return "" if took <= limit else f"over {took:.1f} s after the fault, not within {limit:.1f} s (sleeps are late by {job.delay:.2f} s)"


def one_phase(work, rank, phase, how, count=1, tries=3):
    job = (start_capture if phase == "capture" else start)(work, f"{rank}:{phase}:{how}:{count}")
    status = job.wait(TIMEOUT + 4 + SLACK)
    problems = []
    if status == 0:
        problems.append("exit status 0")
    named = blocks(job.err)
    if how == "error" and (phase in ("init", "load", "shutdown") or phase == "capture" and not named):
        # All ranks come to an agreement on it: an error like any other, not a failure; in time, that is.
        where = rf"rank {rank} \(\S+\) in {phase}: " if rank else ""
        if len(re.findall(rf"^trireme: {where}an error that a test asked for$", job.err, re.M)) != 1:
            problems.append("the error is not printed")
    elif len(named) != 1:
        problems.append(f"{len(named)} lines name a rank, not one")
    elif not re.search(rf"rank {rank} \(\S+, pid \d+\).* in {phase}\b", named[0]):
        problems.append("the line names another rank or phase")
    want = {"kill": "died", "exit": "died", "stop": "is stopped|no sign of life", "freeze": "is stuck",
            "freeze-in-call": "is stuck", "throw": "thrown by a test", "error": "an error that a test asked for",
            "check": "asked for by a test"}[how]
    if named and not re.search(want, named[0]):
        problems.append(f"the line does not say '{want}'")
    # A dead rank 0 cannot say so; a supervisor does (--max-restarts).
    if phase == "decode" and (rank != 0 or how == "error") and '"finish_reason":"error"' not in job.out:
        problems.append("the requests in flight were not failed")
    name = f"{how} of rank {rank} in {phase}"
    if not sanitized and not job.fault_time():
        problems.append("the rank did not come to the fault")
    elif not sanitized and lateness(job, how):
        if tries > 1:
            print(f"{name}: {lateness(job, how)}: again, alone")
            return cases.run_alone(one_phase, rank, phase, how, count, tries - 1)
        if job.delay > TOO_SLOW:
            print(f"NOT JUDGED: {name}: {lateness(job, how)}: this machine is too slow to tell")
        else:
            problems.append(lateness(job, how))
    if job.fault_time():
        name += f", over {job.seconds_after_fault():.1f} s after it"
    cases.verdict(name, job, problems)


def phases():
    print(f"seed {seed}" if sanitized else f"seed {seed}; an undisturbed job takes {undisturbed:.1f} s")
    for number, phase in enumerate(PHASES):
        for turn, how in enumerate(["kill", "stop", "throw", "error", "freeze", "freeze-in-call"]):
            # Every rank in turn, another one with the next seed; the first phases begin once, prefill and decode many
            # times.
            rank = (number + turn + seed) % 4
            cases.run(one_phase, rank, phase, how, 3 if phase == "decode" else 1)
    if sanitized or not os.path.exists(capture_faults):
        print("SKIPPED: failing ranks in capture:", "only in the preset cpu" if sanitized else "no cuda_bf16.h")
    else:
        for turn, how in enumerate(["kill", "stop", "throw", "error", "freeze", "freeze-in-call"]):
            cases.run(one_phase, (turn + seed) % 4, "capture", how)
    cases.run(one_phase, 0, "decode", "kill", 5)
    cases.run(one_phase, 0, "decode", "stop", 5)
    cases.run(one_phase, 2, "decode", "check", 5)
    cases.run(one_phase, 1, "decode", "exit", 5)
    # A step that returns an error, on every other rank too: the leader, the stage with the results, and those beside them.
    for rank, phase in ((0, "prefill"), (3, "prefill"), (0, "decode"), (1, "decode"), (3, "decode")):
        cases.run(one_phase, rank, phase, "error", 5 if phase == "decode" else 1)


def write_npy(path, rows, dim):
    """Normal random f32, [rows, dim]."""
    header = str({"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}).encode() + b"\n"
    draw = random.Random(1)
    with open(path, "wb") as out:
        out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        out.write(struct.pack(f"<{rows * dim}f", *(draw.gauss(0, 1) for _ in range(rows * dim))))


def command_line(work, command):
    """Of a command other than generate, its ranks, and phases that it comes to. It would take minutes."""
    if command == "serving":
        return 4, ["bench", "serving", model, "--tp", "2", "--pp", "2", "--num-prompts", "20000"]
    if command == "two runs of serving":
        return 4, ["bench", "serving", model, "--tp", "2", "--pp", "2", "--num-prompts", "20", "--request-rates", "1000,0.0001"]
    if command == "mol":
        return 2, ["bench", "mol", "--shape", "2x2x16", "--items", "2000", "--batch", "4", "--iterations", "100000",
                   "--scratch", work]
    head = os.path.join(work, "head")
    subprocess.run([trireme, "make-checkpoint", "--like", "mol-8x4x64", head], check=True, capture_output=True)
    dim = json.load(open(os.path.join(head, "config.json")))
    write_npy(os.path.join(work, "items.npy"), 2000, dim["item_dim"])
    write_npy(os.path.join(work, "queries.npy"), 2000, dim["query_dim"])
    return 2, ["retrieve", "--model", head, "--items", os.path.join(work, "items.npy"), "--queries",
               os.path.join(work, "queries.npy"), "--batch-size", "1"]


def other_command(work, command, fault="", timeout=TIMEOUT, seconds=None):
    ranks, words = command_line(work, command)
    tag = os.path.join(work, "job")
    os.mkdir(tag)  # of the flight records
    return jobs.Job(work, tag, [mpiexec, "-np", str(ranks), trireme, *words, "--threads", "1", "--failure-timeout", str(timeout),
                                "--flight-records", tag], fault, seconds=seconds)


def fails_in(work, command, rank, phase, how, count):
    job = other_command(work, command, f"{rank}:{phase}:{how}:{count}")
    status = job.wait(TIMEOUT + 4 + SLACK)
    problems = [] if status != 0 else ["exit status 0"]
    named = blocks(job.err)
    want = {"kill": "died", "stop": "is stopped|no sign of life", "freeze": "is stuck"}[how]
    if len(named) != 1 or not re.search(rf"rank {rank} \(\S+, pid \d+\).* ({want}).* in {phase}\b", named[0]):
        problems.append(f"not one line that rank {rank} {want} in {phase}")
    if rank != 0 and glob.glob(f"{work}/trireme-bench-*"):
        problems.append("the generated items are left")
    cases.verdict(f"{command}: {how} of rank {rank} in {phase}", job, problems)


def waits_for(work, command, rank, phase):
    """A rank that builds a table or generates data keeps the others waiting for as long as it likes."""
    job = other_command(work, command, f"{rank}:{phase}:slow:1", timeout=1.0, seconds=4)
    while not job.fault_time() and job.process.poll() is None and time.monotonic() < job.begin + SLACK:
        time.sleep(0.05)
    time.sleep(6)
    problems = [] if job.process.poll() in (None, 0) else ["it has not gone on"]
    job.process.send_signal(signal.SIGTERM)
    job.wait(30 + SLACK)
    if not job.fault_time() or blocks(job.err):
        problems.append("nobody was waited for, or a rank was taken for failed")
    cases.verdict(f"{command}: rank {rank} computes for 4 timeouts in {phase}", job, problems)


def stopped_while_idle(work, rank):
    """One run is over, the next waits for its first request, and nobody for the rank that is stopped."""
    job = other_command(work, "two runs of serving")
    while "req/s" not in open(job.err_path).read() and job.process.poll() is None and time.monotonic() < job.begin + SLACK:
        time.sleep(0.05)
    pid = jobs.process_of_rank(job.tag, rank)
    problems = [] if pid else ["the first run did not end"]
    if pid:
        os.kill(pid, signal.SIGSTOP)
    if job.wait(time.monotonic() - job.begin + TIMEOUT + 4 + SLACK) == 0:
        problems.append("exit status 0")
    named = blocks(job.err)
    if len(named) != 1 or not re.search(rf"rank {rank} \(\S+, pid {pid}\) is stopped", named[0]):
        problems.append(f"not one line that rank {rank} is stopped")
    cases.verdict(f"serving: stop of rank {rank} between two runs", job, problems)


def commands():
    for command, phase in (("serving", "decode"), ("mol", "search"), ("retrieve", "search")):
        cases.run(fails_in, command, 1, phase, "stop", 3)
        cases.run(fails_in, command, 0, phase, "freeze", 2)
    cases.run(stopped_while_idle, 0)
    cases.run(stopped_while_idle, 2)
    cases.run(fails_in, "serving", 2, "load", "kill", 1)
    cases.run(fails_in, "retrieve", 1, "load", "kill", 1)
    cases.run(fails_in, "mol", 0, "search", "kill", 3)
    if not sanitized:
        for command, rank, phase in (("serving", 0, "load"), ("mol", 0, "load"), ("retrieve", 1, "search")):
            cases.run(waits_for, command, rank, phase)


def before_mpi(work, rank, how, say):
    job = start(work, f"{rank}:start:{how}:1", extra=["--start-timeout", "2"])
    status = job.wait(2 + 4 + SLACK)
    problems = [] if status != 0 else ["exit status 0"]
    named = blocks(job.err)
    # Who dies there ends the job at once, and mpirun says who; on a busy machine only that somebody has.
    if say and (len(named) != 1 or not re.search(rf"trireme: rank {rank} \(\S+, pid \d+\) {say}: others wait for 2 s", named[0])):
        problems.append(f"not one line that says 'rank {rank} {say}'")
    if not say and not re.search("signal 9|non-zero exit code", job.err):
        problems.append("mpirun does not say that a rank was killed")
    cases.verdict(f"{how} of rank {rank} before MPI_Init", job, problems)


def slow_start(work):
    job = start(work, "2:start:slow:1", seconds=2, extra=["--start-timeout", "30"])
    status = job.wait(30 + SLACK)
    cases.verdict("rank 2 computes before MPI_Init", job, [] if status == 0 else [f"exit status {status}"])


def before_the_start():
    """Nothing connects the ranks yet."""
    cases.run(before_mpi, 1, "stop", r"is stopped \(SIGSTOP, or a debugger\) in init")
    cases.run(before_mpi, 0, "freeze", "has not come to MPI_Init")
    cases.run(before_mpi, 3, "kill", "")
    cases.run(slow_start)


def mpirun_killed(work):
    job = start(work, tokens=400, fault="3:decode:slow:2", seconds=30)
    # Rank 3 computes as soon as there is a second step; the ranks have linked up long before.
    while len(processes(job.tag)) < 5 and time.monotonic() < job.begin + SLACK:
        time.sleep(0.05)
    time.sleep(1.5)
    job.segments |= jobs.shared_memory(processes(job.tag))
    os.kill(job.process.pid, signal.SIGKILL)
    status = job.wait(TIMEOUT + 4 + 2 * SLACK)
    problems = [] if status == -signal.SIGKILL else [f"exit status {status}"]
    # Standard error went through mpirun.
    reports = "".join(open(path).read() for path in glob.glob(f"{work}/trireme-flight-*/failure.txt"))
    if not re.search(r"trireme: \S+ \(pid \d+\), which started this job, is gone", reports):
        problems.append(f"nobody says that mpirun is gone: {reports}")
    cases.verdict("mpirun killed", job, problems)


def mpirun_stopped(work):
    """Ctrl-Z is no failure, also when the ranks come to their end meanwhile, which they cannot without mpirun."""
    job = start(work, tokens=400, fault="3:decode:slow:2", seconds=3)
    while not job.fault_time() and job.process.poll() is None and time.monotonic() < job.begin + SLACK:
        time.sleep(0.05)
    os.kill(job.process.pid, signal.SIGSTOP)
    time.sleep(3 + 3 * TIMEOUT)
    there = len([pid for pid in processes(job.tag) if pid != job.process.pid])
    os.kill(job.process.pid, signal.SIGCONT)
    status = job.wait(60 + SLACK)
    problems = [] if status == 0 else [f"exit status {status}"]
    if there != 4:
        problems.append(f"{there} ranks were there while mpirun was stopped, not 4")
    warning = rf"^trireme: warning: \S+ \(pid {job.process.pid}\) is stopped .* kill -CONT {job.process.pid} continues it"
    if len(re.findall(warning, job.err, re.M)) != 1:
        problems.append("not one warning about mpirun")
    if job.out.count('"finish_reason":"length"') != 3:
        problems.append("not all requests were finished")
    cases.verdict("mpirun stopped for 4 timeouts and continued", job, problems)


def launcher():
    cases.run(mpirun_killed)
    cases.run(mpirun_stopped)


def slow_rank(work, rank, phase):
    job = start(work, f"{rank}:{phase}:slow:1", timeout=1.0, seconds=4)
    status = job.wait(30 + SLACK)
    cases.verdict(f"rank {rank} computes for 4 timeouts in {phase}", job, [] if status == 0 else [f"exit status {status}"])


def slow_reader(work):
    """A reader that stops reading is not a rank that is stuck. mpirun would read on for it; a supervisor does not."""
    job = start(work, timeout=1.0, tokens=400, supervised=True, pipe=True, extra=["--logprobs", "5"])
    time.sleep(6)
    problems = [] if job.process.poll() is None else ["it has not waited for its reader"]
    status = job.wait(30 + SLACK)
    if status != 0 or "starting again" in job.err:
        problems.append(f"exit status {status}")
    cases.verdict("a slow reader", job, problems)


def all_stopped(work):
    job = start(work, timeout=1.0, tokens=400, fault="3:decode:slow:2", seconds=5)
    time.sleep(1.5)
    pids = [pid for pid in processes(job.tag) if pid != job.process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    status = job.wait(30 + SLACK)
    cases.verdict("all ranks stopped for 3 timeouts and continued", job, [] if status == 0 else [f"exit status {status}"])


def slow():
    for rank, phase in ((2, "prefill"), (0, "decode"), (1, "load"), (3, "shutdown")):
        cases.run(slow_rank, rank, phase)
    cases.run(slow_reader)
    cases.run(all_stopped)


def records_written(work):
    job = start(work, "2:decode:kill:4")
    job.wait(TIMEOUT + 4 + SLACK)
    problems = []
    match = re.search(r"flight records: (\S+)/rank-\*\.json", job.err)
    for rank in range(4):
        try:
            ring = json.load(open(f"{match[1]}/rank-{rank}.json"))
            if ring["rank"] != rank or not ring["records"] or ring["phase"] not in PHASES:
                problems.append(f"rank {rank}: an empty or wrong record")
        except (OSError, ValueError, TypeError) as error:
            problems.append(f"rank {rank}: {error}")
    if not re.search(r"(all_reduce|all_gather) #\d+ of tp 2-3: entered by 3, not yet by 2|rank 2", job.err):
        problems.append("no table of who never entered what")
    cases.verdict("flight records, the dead rank's too", job, problems)


def records_lost(work, where, say):
    job = start(work, "2:decode:kill:4", extra=["--flight-records", where])
    status = job.wait(TIMEOUT + 4 + SLACK)
    problems = [] if status != 0 else ["exit status 0"]
    if len(re.findall(rf"flight records: .*({say})", job.err)) != 1:
        problems.append("not one line about the records")
    cases.verdict(f"records to {where}", job, problems)


def full_disk(work):
    """A file system with room for a page: one line, and the failure itself is said as ever."""
    small = os.path.join(work, "small")
    os.mkdir(small)
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", small], capture_output=True).returncode != 0:
        print("SKIPPED: records to a full disk: no leave to mount a file system")
        return
    try:
        job = start(work, "2:decode:kill:4", extra=["--flight-records", small])
        status = job.wait(TIMEOUT + 4 + SLACK)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    problems = [] if status != 0 else ["exit status 0"]
    if len(re.findall(rf"flight records: {small}/\S+: cannot be written: No space left on device", job.err)) != 1:
        problems.append("not one line about the records")
    if len(blocks(job.err)) != 1:
        problems.append("the failure is not said")
    cases.verdict("records to a full disk", job, problems)


def records():
    cases.run(records_written)
    cases.run(full_disk)
    for where, say in (("/dev/null/x", "cannot be made"), ("/proc", "cannot be made|No such file")):
        cases.run(records_lost, where, say)


undisturbed = 0.0 if sanitized or wanted not in ("phases", "all") else measure_undisturbed()
for name, group in (("start", before_the_start), ("phases", phases), ("commands", commands), ("launcher", launcher), ("slow", slow),
                    ("records", records)):
    if wanted in (name, "all"):
        group()
cases.finish()
