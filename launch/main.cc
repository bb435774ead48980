// trireme: parses the command line on every rank, starts the job's one MPI session and runs the
// command. Exit status: 0 done, 1 failure, 2 usage, 130 interrupted. Rank 0 alone speaks, in one
// line.

#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <iostream>
#include <new>
#include <optional>
#include <string>

#include "CLI/CLI.hpp"
#include "kernels/status.h"
#include "kernels/uncaught.h"
#include "launch/analyze_mol.h"
#include "launch/bench_mol.h"
#include "launch/command_flags.h"
#include "launch/commands.h"
#include "launch/doctor.h"
#include "launch/environment.h"
#include "launch/job_folder.h"
#include "launch/journal.h"
#include "launch/mpi_trial.h"
#include "launch/placement.h"
#include "launch/retrieve.h"
#include "launch/session.h"
#include "launch/start_watch.h"
#include "launch/supervisor.h"
#include "launch/tune_mol.h"
#include "models/checkpoint_maker.h"
#include "models/mol_checkpoint.h"
#include "models/unfinished_path.h"
#include "parallel/failure_detector.h"

namespace trireme {
namespace {

volatile std::sig_atomic_t g_speaks = 1;   // only rank 0 does, or its supervisor
volatile std::sig_atomic_t g_follows = 0;  // a rank that leaves after rank 0

// Where ranks watch each other it is for the failure detector to say what this signal means.
// Everything that was promised is already written: output is flushed as it is produced, and files
// get their names last; those without one yet go. Either way this process ends: mpirun kills it
// soon.
extern "C" void OnInterrupt(int) {
  static const char line[] = "\ntrireme: interrupted\n";
  static const timespec leader_leaves = {.tv_sec = 0, .tv_nsec = 700'000'000};
  RemoveUnfinishedPaths();
  if (ControlPlane::NotifySignal()) return;
  if (g_speaks != 0) {
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line, sizeof(line) - 1);
  }
  // mpirun kills the others as soon as one has left; rank 0 may still be removing its files.
  if (g_follows != 0) nanosleep(&leader_leaves, nullptr);
  _exit(130);
}

// The exit status of the ranks that --ranks asks for.
int StartRanks(const JobFlags& job, SupervisorOptions options) {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  if (rank == nullptr) rank = std::getenv("PMIX_RANK");
  if (rank != nullptr) {
    if (std::atoi(rank) == 0) {
      std::fprintf(stderr,
                   "trireme: --ranks %d: mpirun or srun has started this process already; leave "
                   "out one of the two\n",
                   job.ranks);
    } else {
      LetOthersSpeak();
    }
    return 2;
  }
  options.ranks = job.ranks;
  options.max_restarts = job.max_restarts;
  return RunSupervised(options);
}

// What the supervisor, if there is one, gives its rank 0.
absl::Status OpenJournal(const JobFlags& job, std::unique_ptr<JournalWriter>* journal,
                         JobHistory* history) {
  if (job.journal.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(*journal, JournalWriter::Open(job.journal));
  ASSIGN_OR_RETURN(const std::string bytes, ReadFile(job.history));
  *history = ParseHistory(bytes);
  return absl::OkStatus();
}

// Whether the command spreads its work over the ranks, which then watch each other. The others work
// on rank 0 alone.
bool HasJobFlags(const CLI::App& app) {
  const CLI::App* command = &app;
  while (!command->get_subcommands().empty()) command = command->get_subcommands().front();
  return command->get_option_no_throw("--failure-timeout") != nullptr;
}

// What is wrong with the arguments, and where to read on.
std::string DescribeParseError(const CLI::App& app, const CLI::ParseError& error) {
  std::string path = "trireme";
  const CLI::App* command = &app;
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    path += " " + command->get_name();
  }
  std::string what = error.what(), names;
  for (const CLI::App* next : command->get_subcommands([](const CLI::App*) { return true; }))
    names += (names.empty() ? "" : ", ") + next->get_name();
  if (!names.empty() && command->get_require_subcommand_min() > 0) {
    const std::vector<std::string> rest = app.remaining(/*recurse=*/true);
    const bool unknown = !rest.empty() && rest[0].substr(0, 1) != "-";
    if (unknown) what = "there is no command \"" + rest[0] + "\"; give one of " + names;
    if (rest.empty()) what = "give a command: " + names;
  }
  return what + "; see " + path + " --help";
}

// Exit status of a parse error or of --help / --version; rank 0 prints.
int ReportParse(const CLI::App& app, const CLI::ParseError& error, bool speaks) {
  if (error.get_exit_code() == 0) {
    if (!speaks) return 0;
    app.exit(error);
    if (std::cout.flush()) return 0;
    std::fprintf(stderr, "trireme: standard output cannot be written\n");
    return 1;
  }
  if (speaks) std::fprintf(stderr, "trireme: %s\n", DescribeParseError(app, error).c_str());
  return 2;
}

// What comes before a command: the doctor's checks, and a rank with a GPU goes to where that is
// attached. `model` is null for a command that runs none.
absl::Status Prepare(ControlPlane& control, const Environment& environment,
                     const ModelFlags* model) {
  RETURN_IF_ERROR(CheckOneWorld(control, environment));
  if (model == nullptr) return absl::OkStatus();
  RETURN_IF_ERROR(CheckAtStart(control, environment, *model));
  // "auto" uses the GPUs where there are any.
  if (model->device != "cpu" && environment.cuda_runtime > 0) {
    const std::optional<Placement> placement =
        PlacementOf(environment, control.local_rank(), /*root=*/"");
    if (placement) BindTo(*placement);  // false: the launcher bound it, and it knows better
  }
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  CLI::App app("Trireme: distributed inference, tensor x pipeline x data parallel over MPI ranks",
               "trireme");
  app.set_version_flag("--version", std::string("trireme ") + TRIREME_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(36);
  GenerateFlags generate;
  EvalFlags eval;
  InspectFlags inspect;
  MakeCheckpointFlags make;
  BenchFlags bench;
  BenchMolFlags bench_mol;
  AnalyzeMolFlags analyze_mol;
  TuneMolFlags tune_mol;
  RetrieveFlags retrieve;
  DoctorFlags doctor;
  JobFlags job;
  AddGenerate(app, &generate, &job);
  AddEval(app, &eval, &job);
  AddRetrieve(app, &retrieve, &job);
  const CLI::App* analyze = AddAnalyzeMol(app, &analyze_mol);
  const CLI::App* tune = AddTuneMol(app, &tune_mol);
  CLI::App* inspect_command = app.add_subcommand(
      "inspect", "Show a checkpoint's architecture and the bytes each rank will hold");
  AddRunFlags(inspect_command, &inspect.model);
  inspect_command->option_defaults()->group("Output");
  inspect_command->add_flag("--ledger", inspect.ledger,
                            "Bytes of every owner on each rank, as a run would plan them");
  inspect_command->add_flag("--json", inspect.json, "Print a JSON object");
  CLI::App* make_command = app.add_subcommand(
      "make-checkpoint", "Write random weights in the shapes of a well-known model");
  make_command->add_option("--like", make.like, "One of: " + RecipeNames())->required();
  make_command->add_option("--layers", make.layers, "Layers (default: the model's)")
      ->check(PositiveNumber());
  make_command->add_option("--dtype", make.dtype, "bf16, f16 or f32")->capture_default_str();
  make_command->add_option("--seed", make.seed, "Same seed, same bytes")
      ->capture_default_str()
      ->transform(SeedNumber());
  make_command->add_option("OUT", make.out_dir, "Folder to write; must not hold anything")
      ->required();
  CLI::App* bench_command =
      app.add_subcommand("bench", "Measure speed against the machine's own ceilings");
  bench_command->require_subcommand(1);
  CLI::App* latency = bench_command->add_subcommand(
      "latency", "One batch at a time: time to first token and per token");
  AddBench(latency, &bench, &job);
  latency->add_option("--batch-size", bench.batch_size, "Sequences of the batch")
      ->capture_default_str()
      ->check(PositiveNumber());
  CLI::App* throughput =
      bench_command->add_subcommand("throughput", "Many requests at once: tokens per second");
  AddBench(throughput, &bench, &job);
  throughput->add_option("--num-prompts", bench.num_prompts, "Requests")
      ->capture_default_str()
      ->check(PositiveNumber());
  const CLI::App* mol = AddBenchMol(bench_command, &bench_mol, &job);

  BenchServingFlags serving;
  CLI::App* serving_command = bench_command->add_subcommand(
      "serving", "Requests of mixed lengths as they arrive: latencies, goodput, utilisation");
  AddBenchServing(serving_command, &serving, &job);
  BenchSchedulerFlags scheduler;
  CLI::App* scheduler_command = bench_command->add_subcommand(
      "scheduler", "Cost of planning and committing a step, without a model");
  scheduler_command->add_option("--running", scheduler.running, "Requests running at once")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536));
  scheduler_command->add_option("--steps", scheduler.steps, "Steps to measure")
      ->capture_default_str()
      ->check(PositiveNumber());
  const CLI::App* doctor_command = AddDoctor(app, &doctor);

  // Parsing comes before MPI so that the arguments are the program's own; only rank 0 may speak of
  // errors, though.
  std::function<int(bool)> parse_failure;
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    parse_failure = [&app, error](bool speaks) { return ReportParse(app, error, speaks); };
  }
  if (StartedBySupervisor()) job.ranks = job.max_restarts = 0;  // are its own
  const ModelFlags* const model = app.got_subcommand("generate")              ? &generate.model
                                  : app.got_subcommand("eval")                ? &eval.model
                                  : latency->parsed() || throughput->parsed() ? &bench.model
                                  : serving_command->parsed()                 ? &serving.model
                                                                              : nullptr;
  if (!parse_failure && job.ranks > 0) {
    const bool cuda = model != nullptr && model->device == "cuda";
    return StartRanks(job,
                      {.cuda = cuda, .json = generate.json, .arguments = {argv + 1, argv + argc}});
  }
  const bool doctors = !parse_failure && doctor_command->parsed();
  Environment environment = CollectEnvironment({.programs = doctors, .root = {}});
  const Launch launch = IdentifyLaunch(environment);
  if (parse_failure && launch.launcher == Launcher::kAlone) return parse_failure(true);
  if (launch.launcher == Launcher::kAlone) {
    TryMpiVariables(&environment, /*mpirun=*/false);
    if (doctors) TryMpiVariables(&environment, /*mpirun=*/true);
  }
  if (HasError(CheckLaunch(environment))) {
    if (doctors) return RunDoctor(nullptr, environment, doctor);
    return parse_failure ? parse_failure(launch.rank == 0) : SayWhyNotStarted(environment);
  }
  PrepareEnvironment(environment);
  // Until the ranks watch each other a launcher's SIGTERM mostly means that another rank has
  // failed.
  g_speaks = launch.launcher == Launcher::kAlone;
  std::signal(SIGINT, OnInterrupt);
  // All ranks fail alike when the arguments do, and mpirun ends the others when the first has left:
  // rank 0 has a line to say before.
  std::signal(SIGTERM, parse_failure ? SIG_IGN : OnInterrupt);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);    // a write that is too much fails, and that is said
  std::optional<StartWatch> start;  // until the ranks watch each other
  if (launch.launcher != Launcher::kAlone && launch.ranks != 1 && job.failure_timeout > 0.0)
    start.emplace(StartWatchOptions{job.start_timeout, launch.rank, launch.ranks});
  if (trireme_fault_point != nullptr) trireme_fault_point(launch.rank, "start", -1, nullptr);
  if (start) start->EnterMpi();
  absl::StatusOr<std::unique_ptr<ControlPlane>> control = ControlPlane::Start(nullptr, nullptr);
  if (!control.ok()) {
    std::fprintf(stderr, "trireme: %s\n", std::string(control.status().message()).c_str());
    return 1;
  }
  g_speaks = (*control)->rank() == 0 && !StartedBySupervisor();
  g_follows = (*control)->rank() != 0;
  if (parse_failure) return parse_failure((*control)->rank() == 0);

  if (doctors) {
    start.reset();
    return RunDoctor(control->get(), environment, doctor);
  }
  EndOnUncaughtExceptions();
  if (!HasJobFlags(app)) job.failure_timeout = 0.0;
  const auto run = [&](ControlPlane& plane) -> absl::Status {
    RETURN_IF_ERROR(Prepare(plane, environment, model));
    if (app.got_subcommand("generate")) return RunGenerate(plane, generate);
    if (app.got_subcommand("eval")) return RunEval(plane, eval);
    if (app.got_subcommand("retrieve")) return RunRetrieve(plane, retrieve);
    if (app.got_subcommand("inspect")) return RunInspect(plane, inspect);
    if (app.got_subcommand("make-checkpoint")) return RunMakeCheckpoint(plane, make);
    if (analyze->parsed()) return RunAnalyzeMol(plane, analyze_mol);
    if (tune->parsed()) return RunTuneMol(plane, tune_mol);
    if (mol->parsed()) return RunBenchMol(plane, bench_mol);
    if (serving_command->parsed()) return RunBenchServing(plane, serving);
    if (scheduler_command->parsed()) return RunBenchScheduler(plane, scheduler);
    return latency->parsed() ? RunBenchLatency(plane, bench) : RunBenchThroughput(plane, bench);
  };
  std::unique_ptr<JournalWriter> journal;
  JobHistory history;
  absl::Status status = WatchRanks(**control, job);
  if ((*control)->detector() != nullptr) {
    (*control)->detector()->AddHook([](const absl::Status&) { RemoveUnfinishedPaths(); });
  }
  start.reset();
  if (status.ok() && job.max_restarts > 0)
    status = UsageError(
        "--max-restarts: only who starts the ranks can start them again; add "
        "--ranks N instead of mpirun");
  if (status.ok() && (*control)->rank() == 0) status = OpenJournal(job, &journal, &history);
  if (status.ok() && journal != nullptr) {
    generate.journal = journal.get();
    generate.history = &history;
  }
  // Before the first call that all ranks make: one of them may have failed already.
  status = (*control)->Agree(status);
  if (status.ok()) {
    try {
      status = run(**control);
    } catch (const std::bad_alloc&) {
      // The other ranks may be waiting for this one.
      if ((*control)->detector() == nullptr)
        std::fprintf(stderr, "trireme: rank %d: out of memory\n", (*control)->rank());
      (*control)->Abort(1, "out of memory");
    }
  }
  if (status.ok()) status = (*control)->EnterPhase(Phase::kShutdown);
  // Commands agree on their status already; an error of the last line may be one rank's alone.
  if (!(*control)->agreed_on_error()) status = (*control)->Agree(status);
  // Of a failed job the detector has said everything.
  if (!(*control)->JobStatus().ok()) (*control)->detector()->WaitForEnd();
  const int exit_status = status.ok() ? 0 : IsUsageError(status) ? 2 : 1;
  if (journal != nullptr) {
    // Nobody is there to read it when the supervisor is gone.
    journal
        ->Append({.kind = JournalEntry::Kind::kVerdict, .id = static_cast<uint64_t>(exit_status)})
        .IgnoreError();
  }
  if (status.ok()) return exit_status;
  // mpirun terminates the others as soon as one rank has left: no second line for that.
  std::signal(SIGTERM, SIG_IGN);
  if ((*control)->detector() != nullptr) (*control)->detector()->SayNothingMore();
  if ((*control)->rank() == 0 && !status.message().empty())
    std::fprintf(stderr, "trireme: %s\n", std::string(status.message()).c_str());
  return exit_status;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) {
  // Where one is closed, the next file to be opened would get its number, and what is printed.
  // Nothing can be written to this one.
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(stream, F_GETFD) < 0) [[maybe_unused]]
      const int nothing = open("/dev/null", O_RDONLY);
  }
  if (argc == 2 && std::string(argv[1]) == trireme::kMpiTrial) return trireme::TrialMain();
  const int exit_status = trireme::Main(argc, argv);
  trireme::RemoveJobFolder();
  return exit_status;
}
