// RetrievalTable: items sharded by rows over the ranks of a retrieval group. Every call but the
// const getters is collective: all ranks make it with the same arguments, from one thread, and get
// the same result. What a search answers depends on the items and their order alone, not on how
// many ranks hold them or on which one each item lies.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/mol_model.h"
#include "parallel/communicator.h"
#include "parallel/control_plane.h"
#include "runtime/retrieval_memory.h"
#include "runtime/retrieval_shard.h"
#include "runtime/retrieval_source.h"

namespace trireme {

// This rank's way to the others. All outlive the tables, and so do the models.
struct RetrievalGroup {
  ControlPlane* control = nullptr;       // null: this rank alone
  Communicator* communicator = nullptr;  // over the ranks of `control`
  Stream* stream = nullptr;
  int rank() const { return communicator->rank(); }
  int size() const { return communicator->size(); }
  absl::Status Agree(const absl::Status& status) const {
    return control == nullptr ? status : control->Agree(status);
  }
};

// The order of a table's items is 32 bits.
inline constexpr int64_t kMaxTableItems = std::numeric_limits<uint32_t>::max();

struct RetrievalTableOptions {
  MolStorage storage = MolStorage::kF32;
  int64_t capacity = 0;  // items of the whole table; 0 = as many as the file has
  bool means = false;    // memory for a faster first stage "average"
  // First row of every rank and the end, [ranks + 1]; empty: even shares.
  std::vector<int64_t> row_begins;
  // Rows of this rank done so far and in all.
  std::function<void(int64_t done, int64_t total)> progress;
};

// Items to add or replace.
struct RetrievalItems {
  std::vector<int64_t> ids;
  std::vector<float> embeddings;     // [n, D_x]
  std::vector<uint64_t> attributes;  // [n, words], or empty: none set
};

class RetrievalTable {
 public:
  // Streams the file: each rank reads its rows alone. An id that appears twice is an error.
  static absl::StatusOr<std::unique_ptr<RetrievalTable>> Build(
      const RetrievalGroup& group, const MolModel& model, const std::string& items_path,
      const RetrievalTableOptions& options);
  // An empty table of this capacity.
  static absl::StatusOr<std::unique_ptr<RetrievalTable>> Create(
      const RetrievalGroup& group, const MolModel& model,
      const std::vector<std::string>& attributes, const RetrievalTableOptions& options);

  // A folder with table.json and one file of rows a rank; any number of ranks reads it back. Files
  // have a checksum; table.json gets its name last, so a job that dies leaves the old snapshot
  // whole. A folder with a table.json that is no snapshot of this version is refused
  // (FailedPrecondition), and so is one that another job is saving to (Unavailable).
  absl::Status SaveSnapshot(const std::string& dir) const;
  // `options`: capacity (0 = as when saved) and progress; the rest is the snapshot's. The model
  // must be the one it was saved with.
  static absl::StatusOr<std::unique_ptr<RetrievalTable>> LoadSnapshot(
      const RetrievalGroup& group, const MolModel& model, const std::string& dir,
      const RetrievalTableOptions& options);

  // New items come last in the order; known ones keep their place. All or nothing:
  // ResourceExhausted when they do not all fit. Gives how many are not finite (kept, never
  // answered).
  absl::StatusOr<int64_t> Upsert(const RetrievalItems& items);
  // Gives how many there were.
  int64_t Delete(const std::vector<int64_t>& ids);

  int64_t size() const { return size_; }
  // Places in the order given out so far: those of a file, and one for each item added later.
  int64_t rows() const { return next_order_; }
  int64_t capacity() const { return capacity_; }
  int64_t not_finite() const { return not_finite_; }
  const ItemShard& shard() const { return *shard_; }
  const RetrievalGroup& group() const { return group_; }
  const MolModel& model() const { return shard_->model(); }
  // What searches of this table work in; may grow with each, never shrinks.
  ArenaPool& search_memory() const { return search_memory_; }

 private:
  RetrievalTable(const RetrievalGroup& group, std::unique_ptr<ItemShard> shard)
      : group_(group), shard_(std::move(shard)) {}
  static absl::StatusOr<std::unique_ptr<RetrievalTable>> CreateShards(
      const RetrievalGroup& group, const MolModel& model,
      const std::vector<std::string>& attributes, const RetrievalTableOptions& options,
      int64_t shard_capacity);
  absl::Status ReadRows(const EmbeddingFile& file, int64_t begin, int64_t end,
                        const RetrievalTableOptions& options);
  absl::Status CheckDistinct(const EmbeddingFile& file, int64_t begin, int64_t end) const;
  // This rank's share of the capacity: its rows and an even part of what is left.
  static int64_t ShardCapacity(const RetrievalGroup& group, int64_t rows, int64_t total_rows,
                               int64_t capacity);
  // Sums over ranks, after the shard has changed.
  void CountItems();
  std::vector<int64_t> AllGather(const std::vector<int64_t>& mine) const;

  RetrievalGroup group_;
  std::unique_ptr<ItemShard> shard_;
  mutable ArenaPool search_memory_;
  int64_t size_ = 0, capacity_ = 0, not_finite_ = 0;
  int64_t next_order_ = 0;
};

}  // namespace trireme
