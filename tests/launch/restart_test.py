#!/usr/bin/env python3
"""Jobs under --ranks N --max-restarts K: whatever rank fails, and whenever, every request ends with exactly the tokens of
an undisturbed run, and nothing outlives the process that the user started.
Usage: restart_test.py TRIREME_FAULTS MODEL_DIR CASES [KILLS [SEED]]    (CASES: restarts, supervisor, chaos)"""
import glob
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time

import jobs
from jobs import processes

trireme, model, wanted = sys.argv[1:4]
kills_wanted = int(sys.argv[4]) if len(sys.argv) > 4 else 10
seed = int(sys.argv[5]) if len(sys.argv) > 5 else random.randrange(1 << 30)
LIMIT = 240.0  # of one job, on a machine busy with other tests
LAYOUT = ["--tp", "2", "--pp", "2"]
cases = jobs.Cases(at_once=3)
# Everything that depends on what was produced before: sampling by position, penalties, stop strings, log-probabilities.
PROMPTS = [
    {"prompt": "Once upon a time", "max_tokens": 100, "ignore_eos": True},
    {"prompt": "Tom had a dog", "max_tokens": 80, "temperature": 0.9, "top_k": 40, "seed": 7},
    {"prompt": "The sun", "max_tokens": 90, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 11},
    {"prompt": "A bird", "max_tokens": 110, "presence_penalty": 0.4, "frequency_penalty": 0.2, "ignore_eos": True},
    {"prompt": "Lily", "max_tokens": 120, "stop": [" happy", "zzz"], "logprobs": 2},
    {"prompt": "x", "max_tokens": 1},
]


def parse(out):
    """What an answer is, without its timings."""
    answers = {}
    for line in out.splitlines():
        answer = json.loads(line)
        answer.pop("timings", None)
        if answer["index"] in answers:
            raise ValueError(f"request {answer['index']} is answered twice")
        answers[answer["index"]] = answer
    return answers


class Job(jobs.Job):
    def __init__(self, work, prompts=PROMPTS, fault="", extra=LAYOUT, restarts=5, command=None, once=True):
        tag = os.path.join(work, f"prompts-{time.monotonic_ns()}.jsonl")
        with open(tag, "w") as out:
            out.writelines(json.dumps(prompt) + "\n" for prompt in prompts)
        what = ["--prompts", tag, "--json"] if command is None else [*command, "--flight-records", tag]
        super().__init__(work, tag, [trireme, "generate", model, "--ranks", "4", "--max-restarts", str(restarts), "--threads", "1",
                                     "--failure-timeout", "2", *what, *extra], fault, once=once)

    def wait(self, limit=LIMIT):
        return super().wait(limit)

    def patience(self):
        # A supervisor that comes to an end of its own leaves nothing behind; one that is killed has it end soon.
        return 20 if self.killed() else 0

    def killed(self):
        return self.process.returncode == -signal.SIGKILL

    def remaining(self):
        # A supervisor that is killed may leave its folder, empty.
        folder = f"/dev/shm/trireme-{self.process.pid}-*"
        return processes(self.tag) + glob.glob(folder + "/*" if self.killed() else folder)


def compare(job, status, expected):
    if status != 0:
        return [f"exit status {status}"]
    try:
        answers = parse(job.out)
    except ValueError as error:
        return [f"output: {error}"]
    return [f"request {i} differs: {answers.get(i)} instead of {expected[i]}" for i in expected if answers.get(i) != expected[i]]


def reference(prompts):
    with tempfile.TemporaryDirectory() as work:
        # With restarts output does not come by mpirun.
        job = Job(work, prompts, restarts=1 if jobs.LOSES_OUTPUT else 0)
        if job.wait() != 0:
            sys.exit(f"the undisturbed run failed: {job.err}")
        return parse(job.out)


def started_again(work, expected, rank, phase, how, count):
    job = Job(work, fault=f"{rank}:{phase}:{how}:{count}", extra=[*LAYOUT, "--start-timeout", "10"])
    problems = compare(job, job.wait(), expected)
    if job.err.count("trireme: starting again (1 of 5)") != 1:
        problems.append("not started again once")
    cases.verdict(f"{how} of rank {rank} in {phase}, started again", job, problems)


def killed_in_shutdown(work, expected):
    # All answers are there already or come once more: in both cases they are complete.
    job = Job(work, fault="2:shutdown:kill:1")
    cases.verdict("a kill of rank 2 in shutdown", job, compare(job, job.wait(), expected))


def replicas(work, expected, rank):
    job = Job(work, fault=f"{rank}:decode:kill:50", extra=["--tp", "2", "--dp", "2"])
    cases.verdict(f"a kill of rank {rank} of two replicas", job, compare(job, job.wait(), expected))


def second_replica_goes_on(work, prompts, expected):
    """The first replica's requests are over when the second fails: what goes on is the second's."""
    job = Job(work, prompts, fault="3:decode:kill:60", extra=["--tp", "2", "--dp", "2"])
    problems = compare(job, job.wait(), expected)
    progress = re.search(r"(\d+) of 4 requests are finished, (\d+) go on after (\d+) tokens", job.err)
    if not progress or progress[1] != "2" or progress[2] != "2" or int(progress[3]) < 100:
        problems.append(f"the second replica's requests do not go on: {progress and progress[0]}")
    cases.verdict("the second replica's requests go on with the next token", job, problems)


def stream(work):
    command = ["--prompt", "Once upon a time", "--echo", "--max-tokens", "300", "--ignore-eos", "--temperature", "0.7", "--seed", "3"]
    whole = Job(work, command=command, restarts=0)
    whole.wait()
    job = Job(work, command=command, fault="1:decode:kill:150")
    status = job.wait()
    problems = [] if status == 0 else [f"exit status {status}"]
    if job.out != whole.out or len(job.out) < 500:
        problems.append(f"another text than {whole.out!r}")
    if "1 go on after" not in job.err:
        problems.append("the stream was not continued")
    cases.verdict("a stream goes on with the next token", job, problems)


def error_is_no_failure(work):
    job = Job(work, [{"prompt": "x", "temprature": 1}])
    status = job.wait()
    problems = [] if status == 1 and "starting again" not in job.err and "temprature" in job.err else [f"exit status {status}"]
    cases.verdict("an error is no failure", job, problems)


def given_up(work):
    job = Job(work, fault="1:decode:kill:3", restarts=2, once=False, prompts=PROMPTS * 3)
    status = job.wait()
    problems = [] if status == 1 else [f"exit status {status}"]
    if job.err.count("starting again") != 2 or "given up after 2 restarts: " not in job.err:
        problems.append("not given up after two restarts")
    lines = [json.loads(line) for line in job.out.splitlines()]
    if len(lines) != 18 or sum(line["finish_reason"] == "error" for line in lines) < 12:
        problems.append(f"not every request has an answer or an error: {len(lines)}")
    cases.verdict("given up", job, problems)


def restarts():
    expected = reference(PROMPTS)
    for rank, phase, how, count in (
            (1, "start", "stop", 1), (1, "init", "kill", 1), (2, "load", "throw", 1), (0, "prefill", "kill", 1), (3, "prefill", "error", 1),
            (0, "decode", "error", 30), (0, "decode", "kill", 20), (1, "decode", "stop", 75), (2, "decode", "freeze", 45),
            (3, "decode", "freeze-in-call", 100), (0, "decode", "check", 50), (0, "decode", "freeze", 30)):
        cases.run(started_again, expected, rank, phase, how, count)
    cases.run(killed_in_shutdown, expected)
    for rank in (0, 3):
        cases.run(replicas, expected, rank)
    # Requests are dealt in turn.
    prompts = [PROMPTS[5], PROMPTS[0], PROMPTS[5], PROMPTS[3]]
    cases.run(second_replica_goes_on, prompts, reference(prompts))
    cases.run(stream)
    cases.run(error_is_no_failure)
    cases.run(given_up)


def supervisor_gets(work, name, signum, expected):
    # The first answer comes at once, the last one not for a long time.
    prompts = [PROMPTS[-1]] + [dict(prompt, max_tokens=450, ignore_eos=True) for prompt in PROMPTS[:4]] * 100
    job = Job(work, prompts)
    while os.path.getsize(job.out_path) == 0 and time.monotonic() < job.begin + LIMIT:
        time.sleep(0.02)
    before = processes(job.tag)
    job.process.send_signal(signum)
    sent = time.monotonic()
    status = job.wait(sent - job.begin + 60)
    problems = [] if status == expected else [f"exit status {status}"]
    if len(before) < 6:
        problems.append(f"only {len(before)} processes were there")
    if time.monotonic() - sent > 20:
        problems.append("too late")
    if "starting again" in job.err:
        problems.append("started again")
    cases.verdict(f"the supervisor gets {name}", job, problems)


def stop_mpirun(job):
    """When the first answer is there. Its pid."""
    while os.path.getsize(job.out_path) == 0 and time.monotonic() < job.begin + LIMIT:
        time.sleep(0.02)
    for pid in processes(job.tag):
        if open(f"/proc/{pid}/comm").read().strip() in ("mpirun", "prterun"):
            os.kill(pid, signal.SIGSTOP)
            return pid
    sys.exit(f"no mpirun to stop {time.monotonic() - job.begin:.1f} s after the start: {job.process.poll()}, {job.err}")


def stopped_mpirun(work, prompts, expected):
    """The ranks go on without it until they are at the end of MPI, where the supervisor continues it."""
    job = Job(work, prompts)
    stop_mpirun(job)
    problems = compare(job, job.wait(), expected)
    if "starting again" in job.err:
        problems.append("started again")
    cases.verdict("an mpirun that is stopped while its ranks work", job, problems)


def leftover_mpirun(work, prompts, expected):
    """Whatever keeps an mpirun without ranks from ending: its supervisor ends it."""
    job = Job(work, prompts)
    mpirun = stop_mpirun(job)
    for pid in processes(job.tag):
        if pid not in (mpirun, job.process.pid):
            os.kill(pid, signal.SIGKILL)
    problems = compare(job, job.wait(), expected)
    if job.err.count("trireme: starting again (1 of 5)") != 1:
        problems.append("not started again once")
    cases.verdict("an mpirun that is stopped when all ranks are gone", job, problems)


def supervisor():
    # Seconds of work after the first answer, in which mpirun is stopped.
    prompts = [PROMPTS[-1]] + PROMPTS * 100
    expected = reference(prompts)
    cases.run(leftover_mpirun, prompts, expected)
    cases.run(stopped_mpirun, prompts, expected)
    for name, signum, status in (("SIGKILL", signal.SIGKILL, -9), ("SIGTERM", signal.SIGTERM, 130), ("SIGINT", signal.SIGINT, 130)):
        cases.run(supervisor_gets, name, signum, status)


class Killer(threading.Thread):
    """Kills ranks and mpirun, at random."""

    def __init__(self, job, generator, budget):
        super().__init__(daemon=True)
        self.job, self.generator, self.budget, self.kills, self.stop = job, generator, budget, 0, False

    def run(self):
        while not self.stop and self.kills < self.budget:
            time.sleep(self.generator.uniform(0.0, 2.0))
            victims = [pid for pid in processes(self.job.tag) if pid != self.job.process.pid]
            if self.stop or not victims:
                continue
            how = self.generator.choice([signal.SIGKILL] * 8 + [signal.SIGSTOP, signal.SIGSEGV])
            try:
                os.kill(self.generator.choice(victims), how)
                self.kills += 1
            except ProcessLookupError:
                pass


def chaos():
    generator = random.Random(seed)
    print(f"seed {seed}")
    # Enough work for several kills a job; a longer run kills more in each.
    prompts = [dict(prompt, seed=i) for i, prompt in enumerate(PROMPTS * min(60, 4 * kills_wanted))]
    kills = count = 0
    expected = reference(prompts)
    with tempfile.TemporaryDirectory() as work:
        while kills < kills_wanted and not cases.failed:
            job = Job(work, prompts, extra=[*LAYOUT, "--flight-records", "none"], restarts=1000)
            killer = Killer(job, generator, kills_wanted - kills)
            killer.start()
            status = job.wait(LIMIT + 10 * kills_wanted)
            killer.stop = True
            killer.join()
            kills += killer.kills
            count += 1
            cases.verdict(f"{killer.kills} random kills, {job.err.count('starting again')} restarts", job, compare(job, status, expected))
    print(f"{kills} kills in {count} jobs")


{"restarts": restarts, "supervisor": supervisor, "chaos": chaos}[wanted]()
cases.finish()
