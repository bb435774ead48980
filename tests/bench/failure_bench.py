#!/usr/bin/env python3
"""What watching costs, and how soon a failure is over.

  failure_bench.py BUILD_DIR [--pairs N]     with the Open MPI settings of launch/mpi_env.sh in the environment

Cost: decode throughput of stories260K on 4 ranks with the failure detector, its beats and the flight recorder (the
default) and without any of them (--failure-timeout 0), in turns, ABBA, so that a machine that slows down slows both. The
share lost is the median over the pairs, with the middle half of them beside it: on a busy machine that is wider than the
target of 0.5 %, and says nothing. Detection: from the signal to the line that names the rank."""
import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

parser = argparse.ArgumentParser()
parser.add_argument("build")
parser.add_argument("--pairs", type=int, default=12)
options = parser.parse_args()
root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
model = os.path.join(root, "examples/models/stories260K")
program = os.path.join(options.build, "bin/trireme")


def ranks(*arguments):
    return ["mpirun", "-n", "4", program, *arguments, "--tp", "2", "--pp", "2", "--threads", "1"]


def throughput(work, timeout):
    path = os.path.join(work, "bench.json")
    subprocess.run(ranks("bench", "throughput", model, "--num-prompts", "16", "--input-len", "16", "--output-len", "400",
                         "--warmup", "1", "--iterations", "3", "--failure-timeout", str(timeout), "--save", path),
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.load(open(path))["decode_tokens_per_s"]


def detection(work, how, timeout):
    """Seconds until the failed rank is named and until mpirun has ended."""
    prompts = os.path.join(work, "prompts.txt")
    with open(prompts, "w") as out:
        out.write("Once upon a time\n" * 2000)
    answers = os.path.join(work, "answers.txt")
    with open(answers, "w") as out:
        job = subprocess.Popen(ranks("generate", model, "--prompts", prompts, "--max-tokens", "400", "--ignore-eos",
                                     "--failure-timeout", str(timeout), "--flight-records", work),
                               stdout=out, stderr=subprocess.PIPE, text=True)
    while os.path.getsize(answers) == 0 and job.poll() is None:  # until it is well under way
        time.sleep(0.05)
    children = open(f"/proc/{job.pid}/task/{job.pid}/children").read().split()
    begin = time.monotonic()
    os.kill(int(children[2]), how)
    named = None
    for line in job.stderr:
        if re.match("trireme: rank 2 ", line):
            named = time.monotonic() - begin
            break
    job.stderr.read()
    job.wait()
    return named, time.monotonic() - begin


with tempfile.TemporaryDirectory() as work:
    shares, rates = [], []
    for pair in range(options.pairs):
        order = (0, 5, 5, 0) if pair % 2 == 0 else (5, 0, 0, 5)
        seen = {0: [], 5: []}
        for timeout in order:
            seen[timeout].append(throughput(work, timeout))
        without, watched = statistics.mean(seen[0]), statistics.mean(seen[5])
        shares.append(1.0 - watched / without)
        rates.append(without)
    quarters = statistics.quantiles(shares, n=4)
    print(f"decode tokens/s without {statistics.median(rates):.0f}; lost with detector and recorder: median "
          f"{100 * quarters[1]:+.2f} %, middle half {100 * quarters[0]:+.2f} to {100 * quarters[2]:+.2f} % "
          f"({options.pairs} pairs; target < 0.5 %); load {os.getloadavg()[0]:.1f}")
    for name, how in (("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)):
        times = [detection(work, how, 5) for _ in range(3)]
        if any(named is None for named, _ in times):
            sys.exit(f"{name}: a job ended without naming rank 2: {times}")
        print(f"{name}: named after {max(t[0] for t in times):.2f} s, all over after {max(t[1] for t in times):.2f} s (worst of 3, "
              f"--failure-timeout 5)")
