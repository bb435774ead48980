// What the retrieval commands share: their flags, and the model and table of a job.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "launch/commands.h"
#include "launch/prompt_queries.h"
#include "runtime/retrieval_search.h"

namespace trireme {

struct RetrievalFlags {
  std::string model_dir, items, storage = "f32";
  std::string device = "auto";
  int threads = 0;  // per rank; 0 = cores of the host / ranks on it
  int64_t capacity = 0;
  bool means = false;
  int64_t k = 100;
  std::string mode = "pruned", first_stage = "combined";
  int64_t average_k = 1000, each_k = 100;
  bool exact_or_certified = false;
};
void AddRetrievalFlags(CLI::App* app, RetrievalFlags* flags);
absl::StatusOr<MolStorage> ParseMolStorage(const std::string& text);  // f32, bf16, int8
absl::StatusOr<RetrievalOptions> ParseRetrievalOptions(const RetrievalFlags& flags);

struct RetrieveFlags {
  RetrievalFlags retrieval;
  EmbedderFlags embedder;  // in place of queries
  std::string queries, out, save_snapshot;
  std::vector<std::string> filters;  // --filter, ANDed
  std::string filter_rows;
  int64_t batch_size = 32;
  bool no_graphs = false;
};
void AddRetrieve(CLI::App& app, RetrieveFlags* flags, JobFlags* job);
absl::Status RunRetrieve(ControlPlane& control, const RetrieveFlags& flags);

// Device, group and model of every rank. Collective.
class RetrievalJob {
 public:
  static absl::StatusOr<std::unique_ptr<RetrievalJob>> Start(ControlPlane& control,
                                                             const RetrievalFlags& flags);
  const RetrievalGroup& group() const { return group_; }
  const MolModel& model() const { return *model_; }
  // From a file of embeddings or a folder with a snapshot; a progress line on a terminal.
  absl::StatusOr<std::unique_ptr<RetrievalTable>> Table(const RetrievalFlags& flags) const;

 private:
  RetrievalJob() = default;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Communicator> communicator_;
  std::unique_ptr<MolModel> model_;
  RetrievalGroup group_;
};

}  // namespace trireme
