#include "launch/planted_job.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/status.h"
#include "parallel/failure_detector.h"

namespace trireme {

absl::Status ParseMolShape(const std::string& shape, PlantedMolOptions* data) {
  const std::vector<std::string> parts = absl::StrSplit(shape, 'x');
  if (parts.size() != 3 || !absl::SimpleAtoi(parts[0], &data->query_components) ||
      !absl::SimpleAtoi(parts[1], &data->item_components) ||
      !absl::SimpleAtoi(parts[2], &data->component_dim) || data->query_components < 1 ||
      data->item_components < 1 || data->component_dim < 1 || data->query_components > 64 ||
      data->item_components > 64 || data->component_dim > 1024) {
    return UsageError(absl::StrCat("--shape ", shape,
                                   ": must be query components x item components x size, e.g. "
                                   "8x4x64"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<PlantedJob>> PlantedJob::Start(ControlPlane& control,
                                                              const PlantedJobOptions& options) {
  std::unique_ptr<PlantedJob> job(new PlantedJob(control, options.data));
  RETURN_IF_ERROR(
      control.Agree(control.rank() == 0 ? job->MakeFolder(options.scratch) : absl::OkStatus()));
  std::string dir = job->dir_;
  control.Broadcast(&dir);
  job->retrieval_.model_dir = dir + "/model";
  job->retrieval_.items = dir + "/items.npy";
  job->retrieval_.storage = options.storage;
  job->retrieval_.threads = options.threads;
  job->retrieval_.means = true;
  ASSIGN_OR_RETURN(job->job_, RetrievalJob::Start(control, job->retrieval_));
  return job;
}

PlantedJob::~PlantedJob() {
  if (hook_ != 0) control_.detector()->RemoveHook(hook_);
  RemoveFolder();
}

void PlantedJob::RemoveFolder() const {
  std::error_code ignored;
  if (!dir_.empty()) std::filesystem::remove_all(dir_, ignored);
}

absl::Status PlantedJob::MakeFolder(const std::string& scratch) {
  const char* tmp = std::getenv("TMPDIR");
  const std::string parent = !scratch.empty() ? scratch : tmp != nullptr ? tmp : "/tmp";
  std::string pattern = parent + "/trireme-bench-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr)
    return absl::UnavailableError(absl::StrCat("--scratch ", parent, ": cannot be written"));
  dir_ = pattern;
  for (const char* path :
       {"", "/model", "/model/config.json", "/model/model.safetensors", "/items.npy"})
    unfinished_.emplace_back(dir_ + path);
  if (control_.detector() != nullptr)
    hook_ = control_.detector()->AddHook([this](const absl::Status&) { RemoveFolder(); });
  return planted_.WriteModel(dir_ + "/model");
}

absl::Status PlantedJob::WriteItems(int64_t count) const {
  std::ofstream out(retrieval_.items, std::ios::binary);
  const int64_t dim = planted_.config().item_dim;
  out << NpyHeaderBytes("<f4", {count, dim});
  std::vector<float> rows(1024 * dim);
  for (int64_t first = 0; first < count; first += 1024) {
    const int64_t n = std::min<int64_t>(1024, count - first);
    planted_.FillItems(first, n, rows.data());
    out.write(reinterpret_cast<const char*>(rows.data()), n * dim * 4);
  }
  return out.flush() ? absl::OkStatus()
                     : absl::UnavailableError(
                           absl::StrCat("--scratch: ", retrieval_.items, ": cannot be written"));
}

absl::StatusOr<std::unique_ptr<RetrievalTable>> PlantedJob::Table(int64_t items,
                                                                  double* build_seconds) {
  RETURN_IF_ERROR(control_.Agree(control_.rank() == 0 ? WriteItems(items) : absl::OkStatus()));
  const auto begin = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(std::unique_ptr<RetrievalTable> table, job_->Table(retrieval_));
  *build_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return table;
}

std::vector<RetrievalQuery> PlantedJob::Queries(int64_t batch) const {
  std::vector<RetrievalQuery> queries(batch);
  for (int64_t b = 0; b < batch; ++b) {
    queries[b].embedding.resize(planted_.config().query_dim);
    planted_.FillQueries(b, 1, queries[b].embedding.data());
  }
  return queries;
}

}  // namespace trireme
