// Flags, model and table of the retrieval commands.

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "launch/command_flags.h"
#include "launch/retrieve.h"
#include "launch/session.h"
#include "parallel/process_groups.h"

namespace trireme {
namespace {

bool IsDirectory(const std::string& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

}  // namespace

absl::StatusOr<MolStorage> ParseMolStorage(const std::string& text) {
  if (text == "f32") return MolStorage::kF32;
  if (text == "bf16") return MolStorage::kBF16;
  if (text == "int8") return MolStorage::kInt8;
  return UsageError(absl::StrCat("--storage ", text, ": must be f32, bf16 or int8"));
}

void AddRetrievalFlags(CLI::App* app, RetrievalFlags* flags) {
  app->option_defaults()->group("Model and table");
  app->add_option("--model", flags->model_dir,
                  "Folder with config.json and model.safetensors of a Mixture-of-Logits head")
      ->required();
  app->add_option("--items", flags->items,
                  "Item embeddings, .npy or .safetensors; or a folder with a snapshot")
      ->required();
  app->add_option("--storage", flags->storage,
                  "How items are held: f32, bf16 or int8 (a snapshot's are as they were saved)")
      ->capture_default_str();
  app->add_option("--capacity", flags->capacity, "Items the table can hold (default: the file's)")
      ->check(NotNegativeNumber());
  app->add_flag("--means", flags->means, "Hold mean components, for a faster stage \"average\"");
  app->add_option("--device", flags->device, "auto, cpu or cuda")->capture_default_str();
  app->add_option("--threads", flags->threads,
                  "Threads a rank (default: cores of the host / ranks on it)")
      ->check(PositiveNumber());
  app->option_defaults()->group("Search");
  app->add_option("--k", flags->k, "Items to answer a query with, at most 2048")
      ->capture_default_str();
  app->add_option("--mode", flags->mode,
                  "exact, pruned (the same answer, less work) or two-stage (approximate)")
      ->capture_default_str();
  app->add_option("--first-stage", flags->first_stage,
                  "Two-stage: average, per-embedding or combined")
      ->capture_default_str();
  app->add_option("--average-k", flags->average_k, "Two-stage: candidates by the mean logit")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, kMaxFirstStageK));
  app->add_option("--each-k", flags->each_k, "Two-stage: candidates by each logit")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, kMaxFirstStageK));
  app->add_flag("--exact-or-certified", flags->exact_or_certified,
                "Two-stage: search again where the answer is not proven exact");
}

absl::StatusOr<RetrievalOptions> ParseRetrievalOptions(const RetrievalFlags& flags) {
  RetrievalOptions options;
  options.k = flags.k;
  options.average_k = flags.average_k;
  options.each_k = flags.each_k;
  options.exact_or_certified = flags.exact_or_certified;
  if (flags.mode == "exact") {
    options.mode = RetrievalMode::kExact;
  } else if (flags.mode == "pruned") {
    options.mode = RetrievalMode::kPruned;
  } else if (flags.mode == "two-stage") {
    options.mode = RetrievalMode::kTwoStage;
  } else {
    return UsageError(absl::StrCat("--mode ", flags.mode, ": must be exact, pruned or two-stage"));
  }
  if (flags.first_stage == "average") {
    options.first_stage = FirstStage::kAverage;
  } else if (flags.first_stage == "per-embedding") {
    options.first_stage = FirstStage::kPerEmbedding;
  } else if (flags.first_stage == "combined") {
    options.first_stage = FirstStage::kCombined;
  } else {
    return UsageError(absl::StrCat("--first-stage ", flags.first_stage,
                                   ": must be average, per-embedding or combined"));
  }
  if (options.exact_or_certified && options.mode != RetrievalMode::kTwoStage)
    return UsageError("--exact-or-certified: the other modes are exact; add --mode two-stage");
  if (const absl::Status status = CheckRetrievalOptions(options); !status.ok())
    return UsageError(absl::StrCat("--", std::string(status.message())));
  return options;
}

absl::StatusOr<std::unique_ptr<RetrievalJob>> RetrievalJob::Start(ControlPlane& control,
                                                                  const RetrievalFlags& flags) {
  std::unique_ptr<RetrievalJob> job(new RetrievalJob);
  RETURN_IF_ERROR(control.EnterPhase(Phase::kLoad));
  DeviceOptions options;
  options.name = flags.device == "auto" ? "cpu" : flags.device;
  const int fair_threads = ThreadsPerRank(control);
  options.threads = flags.threads > 0 ? flags.threads : fair_threads;
  options.local_index = control.local_rank();
  auto device = OpenDevice(options);
  RETURN_IF_ERROR(control.Agree(device.status()));
  job->device_ = std::move(device).value();
  auto stream = job->device_->NewStream();
  RETURN_IF_ERROR(control.Agree(stream.status()));
  job->stream_ = std::move(stream).value();
  RETURN_IF_ERROR(control.Agree(RequireMol(*job->stream_)));
  ASSIGN_OR_RETURN(ProcessGroups groups,
                   CreateProcessGroups(control, {.tp_size = control.size()}, *job->device_));
  job->communicator_ = std::move(groups.tp);
  auto model = MolModel::Load(flags.model_dir, *job->stream_);
  RETURN_IF_ERROR(control.Agree(model.status()));
  job->model_ = std::move(model).value();
  job->group_ = {&control, job->communicator_.get(), job->stream_.get()};
  return job;
}

absl::StatusOr<std::unique_ptr<RetrievalTable>> RetrievalJob::Table(
    const RetrievalFlags& flags) const {
  RetrievalTableOptions options;
  ASSIGN_OR_RETURN(options.storage, ParseMolStorage(flags.storage));
  options.capacity = flags.capacity;
  options.means = flags.means;
  bool shown = false;
  if (group_.rank() == 0 && isatty(STDERR_FILENO) != 0) {
    options.progress = [&shown](int64_t done, int64_t total) {
      std::fprintf(stderr, "\ritems %lld of %lld   ", static_cast<long long>(done),
                   static_cast<long long>(total));
      std::fflush(stderr);
      shown = true;
    };
  }
  const bool snapshot = IsDirectory(flags.items);
  auto table = snapshot ? RetrievalTable::LoadSnapshot(group_, *model_, flags.items, options)
                        : RetrievalTable::Build(group_, *model_, flags.items, options);
  if (shown) std::fputc('\n', stderr);
  return table;
}

}  // namespace trireme
