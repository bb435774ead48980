// A retrieval job on planted data (models/mol_planted.h): what benches and the tuner measure on.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "launch/retrieve.h"
#include "models/mol_planted.h"
#include "models/unfinished_path.h"

namespace trireme {

struct PlantedJobOptions {
  PlantedMolOptions data;
  std::string storage = "f32";
  int threads = 0;      // per rank; 0 = its share of the cores
  std::string scratch;  // parent of the folder for model and items; empty = TMPDIR or /tmp
};

// "8x4x64": query components x item components x size, into `data`.
absl::Status ParseMolShape(const std::string& shape, PlantedMolOptions* data);

// Model and items lie in a folder of rank 0's, which is removed with the job, also when a rank
// fails.
class PlantedJob {
 public:
  // Collective.
  static absl::StatusOr<std::unique_ptr<PlantedJob>> Start(ControlPlane& control,
                                                           const PlantedJobOptions& options);
  ~PlantedJob();
  PlantedJob(const PlantedJob&) = delete;
  PlantedJob& operator=(const PlantedJob&) = delete;

  const PlantedMol& planted() const { return planted_; }
  const RetrievalGroup& group() const { return job_->group(); }
  const std::string& model_dir() const { return retrieval_.model_dir; }

  // The first `items` planted items, with means. Collective. Seconds: of the build alone.
  absl::StatusOr<std::unique_ptr<RetrievalTable>> Table(int64_t items, double* build_seconds);
  std::vector<RetrievalQuery> Queries(int64_t batch) const;

 private:
  PlantedJob(ControlPlane& control, const PlantedMolOptions& data)
      : control_(control), planted_(data) {}
  void RemoveFolder() const;
  absl::Status MakeFolder(const std::string& scratch);
  absl::Status WriteItems(int64_t count) const;

  ControlPlane& control_;
  const PlantedMol planted_;
  std::string dir_;                         // on rank 0
  int hook_ = 0;                            // removes it when the job fails; 0 = none
  std::vector<UnfinishedPath> unfinished_;  // what an interruption removes
  RetrievalFlags retrieval_;
  std::unique_ptr<RetrievalJob> job_;
};

}  // namespace trireme
