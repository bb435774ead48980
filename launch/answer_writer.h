// Answers of `trireme retrieve` on their way out, as they come: JSON lines to standard output or a
// file, or .npy. For the rank that writes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/output_file.h"
#include "parallel/control_plane.h"
#include "runtime/retrieval_search.h"

namespace trireme {

// The scores' file beside an X.npy of ids; "" for any other name.
std::string ScoresPathOf(const std::string& out);

class AnswerWriter {
 public:
  // `out`: "" for lines on standard output, X.jsonl, or X.npy: ids [B, k] i64 there and scores
  // [B, k] f32 in X.scores.npy, -1 and -inf where there is none. Files get their names with Finish;
  // a pipe is written as it is, and waited for.
  static absl::StatusOr<std::unique_ptr<AnswerWriter>> Create(ControlPlane& control,
                                                              const std::string& out,
                                                              int64_t queries, int64_t k);
  // Of the next queries.
  absl::Status Append(const std::vector<RetrievalAnswer>& answers);
  absl::Status Finish();

 private:
  AnswerWriter(ControlPlane& control, int64_t k) : control_(control), k_(k) {}
  absl::Status AppendLines(const std::vector<RetrievalAnswer>& answers);
  absl::Status AppendRows(const std::vector<RetrievalAnswer>& answers);

  ControlPlane& control_;
  const int64_t k_;
  int64_t next_ = 0;  // query
  std::unique_ptr<OutputFile> lines_, ids_, scores_;
};

}  // namespace trireme
