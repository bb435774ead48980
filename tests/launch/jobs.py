"""Jobs of four ranks that fail: starting one, waiting for its end, looking for what it leaves, running several at a time.
For failure_test.py and restart_test.py."""
import concurrent.futures
import glob
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

# What a machine busy with other tests may add to any time.
SLACK = 20.0


# The mpirun of Open MPI 5 loses part or all of what ranks print, now and then on a busy machine; so a case may fail that has
# done all it should.
LOSES_OUTPUT = "Open MPI) 5." in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout


def state(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return "?"


def processes(tag):
    """Those whose command line holds the tag, and that have not ended."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            if tag.encode() in open(path, "rb").read():
                found.append(int(path.split("/")[2]))
        except OSError:
            pass
    return [pid for pid in found if pid != os.getpid() and state(pid) not in "ZX?"]


def process_of_rank(tag, rank):
    """Of a job that mpirun started."""
    for pid in processes(tag):
        try:
            if f"OMPI_COMM_WORLD_RANK={rank}".encode() in open(f"/proc/{pid}/environ", "rb").read().split(b"\0"):
                return pid
        except OSError:
            pass
    return None


def shared_memory(pids):
    """Files in /dev/shm that these processes map."""
    found = set()
    for pid in pids:
        try:
            found |= {line.split(None, 5)[5].strip() for line in open(f"/proc/{pid}/maps") if "/dev/shm/" in line}
        except (OSError, IndexError):
            pass
    return found


class Job:
    """`command` must hold `tag`, the path of a file in `work` that no other job has. `once`: only the first attempt fails.
    `pipe`: standard output is a pipe that nobody reads before the end."""

    def __init__(self, work, tag, command, fault="", seconds=None, once=False, pipe=False):
        self.tag = tag
        self.fault_path = tag + ".fault"
        environment = dict(os.environ, TRIREME_FAULT=fault, TRIREME_FAULT_TIME=self.fault_path, TMPDIR=work)
        if seconds:
            environment["TRIREME_FAULT_SECONDS"] = str(seconds)
        if once:
            environment["TRIREME_FAULT_ONCE"] = tag + ".once"
        # Files: a test that is busy killing does not read.
        self.out_path, self.err_path = tag + ".out", tag + ".err"
        self.begin = time.monotonic()
        with open(self.out_path, "w") as out, open(self.err_path, "w") as err:
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.PIPE if pipe else out, stderr=err, text=True)
        self.segments, self.leftover, self.problems = set(), [], []
        self.delay = 0.0  # what the machine has added to a sleep of 50 ms, at most

    def fault_time(self):
        """When the rank has failed, as of time.monotonic(); None before."""
        try:
            return float(open(self.fault_path).read())
        except OSError:
            return None

    def seconds_after_fault(self):
        """From the fault until the job was over and nothing was left."""
        return self.clean - self.fault_time()

    def patience(self):
        """Seconds after the end within which nothing may be left."""
        return 5 + SLACK

    def wait(self, limit):
        """The exit status."""
        end = self.begin + limit
        reader = None
        if self.process.stdout:
            reader = threading.Thread(target=lambda: open(self.out_path, "w").write(self.process.stdout.read()))
            reader.start()
        while self.process.poll() is None and time.monotonic() < end:
            # The names while they are mapped; mpirun removes the files in most cases.
            self.segments |= shared_memory(processes(self.tag))
            asleep = time.monotonic()
            time.sleep(0.05)
            self.delay = max(self.delay, time.monotonic() - asleep - 0.05)
        status = self.process.poll()
        self.seconds = time.monotonic() - self.begin
        if status is None:
            self.problems.append(f"not over in time: {[(pid, state(pid)) for pid in processes(self.tag)]}")
            self.process.kill()
            self.process.wait()
        if reader:
            reader.join()
        end = time.monotonic() + self.patience()
        self.leftover = self.remaining()
        while self.leftover and time.monotonic() < end:
            time.sleep(0.05)
            self.leftover = self.remaining()
        self.clean = time.monotonic()
        for pid in processes(self.tag):
            os.kill(pid, signal.SIGKILL)
        self.out, self.err = open(self.out_path).read(), open(self.err_path).read()
        return status

    def remaining(self):
        return processes(self.tag) + [path for path in self.segments if os.path.exists(path)]


class Cases:
    """Verdicts, and a pool that runs cases side by side: they mostly wait."""

    def __init__(self, at_once):
        self.passed, self.failed = 0, []
        self.lock = threading.Lock()
        self.pool = concurrent.futures.ThreadPoolExecutor(at_once)
        self.futures, self.last = [], []
        self.current = threading.local()  # the case that a thread runs

    def run(self, case, *arguments):
        """case(work, *arguments) in a folder of its own."""

        self.futures.append(self.pool.submit(self.call, case, arguments, LOSES_OUTPUT))

    def run_alone(self, case, *arguments):
        """As above, one after the other when all the others are over."""
        self.last.append((case, arguments, LOSES_OUTPUT))

    def call(self, case, arguments, second_try):
        self.current.again = (case, arguments, False) if second_try else None
        with tempfile.TemporaryDirectory() as work:
            case(work, *arguments)

    def verdict(self, name, job, problems):
        problems = problems + job.problems
        if job.leftover:
            problems.append(f"left: {job.leftover}")
        if "random kills" not in name and re.search(r"(Thread|Address|Leak)Sanitizer|runtime error:", job.err):
            problems.append("a sanitizer's report")
        with self.lock:
            again = getattr(self.current, "again", None)
            if problems and again:
                self.last.append(again)
                print(f"once more {name}, because this mpirun loses output: {'; '.join(problems)[:3000]}")
            elif problems:
                self.failed.append(name)
                print(f"FAILED {name} ({job.seconds:.1f} s): {'; '.join(problems)[:3000]}\n--- stdout\n{job.out[-1000:]}\n"
                      f"--- stderr\n{job.err[-4000:]}\n---")
            else:
                self.passed += 1
                print(f"passed {name} ({job.seconds:.1f} s)")
            sys.stdout.flush()

    def wait(self):
        """For the cases that run side by side. What one of them throws is a failure."""
        for future in self.futures:
            future.result()

    def finish(self):
        """Waits for all cases and ends the program with the verdict."""
        self.wait()
        for case, arguments, second_try in self.last:  # which may add to it
            self.call(case, arguments, second_try)
        print(f"{self.passed} passed, {len(self.failed)} failed")
        sys.exit(1 if self.failed else 0)
