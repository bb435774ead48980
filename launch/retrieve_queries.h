// Files of queries and of row flags, for `trireme retrieve`. For the rank that reads them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/retrieval_search.h"

namespace trireme {

struct QueryFile {
  std::vector<RetrievalQuery> queries;
  // Of each: a line that is no query is one that fails, and the others are answered.
  std::vector<absl::Status> statuses;
};

// .npy and .safetensors: a matrix with a query a row. .jsonl: {"embedding": [...], "user_id": 3,
// "filter": "...", "exclude_ids": []} a line. An error where there is no query at all to answer:
// the file cannot be read, or no line of it.
absl::StatusOr<QueryFile> ReadQueries(const std::string& path);

// A .npy vector of bool or uint8: the rows of the items that may be answered, as bits.
struct RowFlags {
  int64_t count = 0;
  std::vector<uint32_t> bits;
};
absl::StatusOr<RowFlags> ReadRowFlags(const std::string& path);

}  // namespace trireme
