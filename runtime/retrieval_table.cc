#include "runtime/retrieval_table.h"

#include <algorithm>
#include <future>
#include <limits>
#include <numeric>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

// Rows read ahead while the last ones are projected: 4 MB of f32 at 256 elements a row.
constexpr int64_t kReadRows = 4096;
constexpr int kIdChannel = 30;  // of the control plane

std::vector<int64_t> RowBegins(const std::vector<int64_t>& asked, int64_t rows, int ranks) {
  if (!asked.empty()) {
    CHECK_EQ(static_cast<int64_t>(asked.size()), ranks + 1);
    CHECK(asked.front() == 0 && asked.back() == rows);
    return asked;
  }
  std::vector<int64_t> begins(ranks + 1);
  for (int r = 0; r <= ranks; ++r) begins[r] = rows * r / ranks;
  return begins;
}

// One chunk of a file on its way into the shard.
struct Chunk {
  absl::Status status;
  int64_t first = 0, count = 0;
  std::vector<float> embeddings;
  std::vector<int64_t> ids;
  std::vector<uint32_t> order;
  std::vector<uint64_t> attributes;
};

absl::Status FillChunk(const EmbeddingFile& file, Chunk* chunk) {
  chunk->embeddings.resize(chunk->count * file.dim());
  chunk->ids.resize(chunk->count);
  chunk->order.resize(chunk->count);
  chunk->attributes.resize(chunk->count * file.attribute_words());
  for (int64_t i = 0; i < chunk->count; ++i) {
    chunk->order[i] = static_cast<uint32_t>(chunk->first + i);
  }
  RETURN_IF_ERROR(file.ReadRows(chunk->first, chunk->count, chunk->embeddings.data()));
  RETURN_IF_ERROR(file.ReadIds(chunk->first, chunk->count, chunk->ids.data()));
  return file.ReadAttributes(chunk->first, chunk->count, chunk->attributes.data());
}

Chunk ReadChunk(const EmbeddingFile& file, int64_t first, int64_t count) {
  Chunk chunk;
  chunk.first = first;
  chunk.count = count;
  chunk.status = FillChunk(file, &chunk);
  return chunk;
}

absl::Status CheckFile(const EmbeddingFile& file, const MolModel& model,
                       const RetrievalTableOptions& options) {
  if (file.dim() != model.config().item_dim) {
    return absl::InvalidArgumentError(absl::StrCat(file.path(), ": items have ", file.dim(),
                                                   " elements; the model's item_dim is ",
                                                   model.config().item_dim));
  }
  if (options.capacity > 0 && file.rows() > options.capacity) {
    return absl::ResourceExhaustedError(absl::StrCat(
        file.path(), ": has ", file.rows(), " items; the table's capacity is ", options.capacity));
  }
  if (std::max(file.rows(), options.capacity) > kMaxTableItems) {
    return absl::ResourceExhaustedError(
        absl::StrCat(file.path(), ": a table holds at most ", kMaxTableItems, " items"));
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<int64_t> RetrievalTable::AllGather(const std::vector<int64_t>& mine) const {
  if (group_.control == nullptr) return mine;
  ByteWriter out;
  out.PutVector(mine);
  std::vector<int64_t> all;
  for (const std::string& bytes : group_.control->AllGather(out.Take())) {
    const std::vector<int64_t> part = ByteReader(bytes).GetVector<int64_t>();
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

void RetrievalTable::CountItems() {
  const std::vector<int64_t> all =
      AllGather({shard_->size(), shard_->options().capacity, shard_->not_finite()});
  size_ = capacity_ = not_finite_ = 0;
  for (size_t i = 0; i < all.size(); i += 3) {
    size_ += all[i];
    capacity_ += all[i + 1];
    not_finite_ += all[i + 2];
  }
}

int64_t RetrievalTable::ShardCapacity(const RetrievalGroup& group, int64_t rows, int64_t total_rows,
                                      int64_t capacity) {
  const int64_t spare = capacity - total_rows;
  return rows + spare * (group.rank() + 1) / group.size() - spare * group.rank() / group.size();
}

absl::StatusOr<std::unique_ptr<RetrievalTable>> RetrievalTable::CreateShards(
    const RetrievalGroup& group, const MolModel& model, const std::vector<std::string>& attributes,
    const RetrievalTableOptions& options, int64_t shard_capacity) {
  if (std::max(shard_capacity, options.capacity) > kMaxTableItems) {
    return absl::ResourceExhaustedError(absl::StrCat("retrieval table: a capacity of ",
                                                     options.capacity, " items: a table holds at ",
                                                     "most ", kMaxTableItems));
  }
  ItemShardOptions shard_options;
  shard_options.storage = options.storage;
  shard_options.capacity = shard_capacity;
  shard_options.means = options.means;
  shard_options.attributes = attributes;
  if (group.control != nullptr && group.stream->device().spec().host_memory)
    shard_options.sharing = group.control->local_size();
  auto shard = ItemShard::Create(model, *group.stream, std::move(shard_options));
  RETURN_IF_ERROR(group.Agree(shard.status()));
  std::unique_ptr<RetrievalTable> table(new RetrievalTable(group, std::move(shard).value()));
  table->CountItems();
  return table;
}

absl::StatusOr<std::unique_ptr<RetrievalTable>> RetrievalTable::Create(
    const RetrievalGroup& group, const MolModel& model, const std::vector<std::string>& attributes,
    const RetrievalTableOptions& options) {
  return CreateShards(group, model, attributes, options,
                      ShardCapacity(group, 0, 0, options.capacity));
}

absl::StatusOr<std::unique_ptr<RetrievalTable>> RetrievalTable::Build(
    const RetrievalGroup& group, const MolModel& model, const std::string& items_path,
    const RetrievalTableOptions& options) {
  auto file = EmbeddingFile::Open(items_path, EmbeddingFile::Kind::kItems);
  absl::Status status = file.status();
  if (status.ok()) status = CheckFile(**file, model, options);
  RETURN_IF_ERROR(group.Agree(status));
  const int64_t rows = (*file)->rows();
  const std::vector<int64_t> begins = RowBegins(options.row_begins, rows, group.size());
  const int64_t begin = begins[group.rank()], end = begins[group.rank() + 1];
  ASSIGN_OR_RETURN(
      std::unique_ptr<RetrievalTable> table,
      CreateShards(group, model, (*file)->attributes(), options,
                   ShardCapacity(group, end - begin, rows, std::max(rows, options.capacity))));
  if ((*file)->has_ids()) {
    RETURN_IF_ERROR(group.Agree(table->CheckDistinct(**file, begin, end)));
  }
  RETURN_IF_ERROR(group.Agree(table->ReadRows(**file, begin, end, options)));
  table->next_order_ = rows;
  table->CountItems();
  return table;
}

absl::Status RetrievalTable::ReadRows(const EmbeddingFile& file, int64_t begin, int64_t end,
                                      const RetrievalTableOptions& options) {
  const auto read = [&](int64_t first) {
    return std::async(std::launch::async, [&file, first, end] {
      return ReadChunk(file, first, std::min(kReadRows, end - first));
    });
  };
  std::future<Chunk> next;
  if (begin < end) next = read(begin);
  for (int64_t first = begin; first < end; first += kReadRows) {
    const Chunk chunk = next.get();
    RETURN_IF_ERROR(chunk.status);
    if (first + kReadRows < end) next = read(first + kReadRows);
    // The file's words may be more than its names need.
    const int64_t words = shard_->attribute_words(), stored = file.attribute_words();
    std::vector<uint64_t> attributes(chunk.count * words);
    for (int64_t i = 0; i < chunk.count; ++i) {
      for (int64_t w = 0; w < words; ++w) {
        attributes[i * words + w] = chunk.attributes[i * stored + w];
      }
    }
    const ItemShard::Items items{.embeddings = chunk.embeddings.data(),
                                 .ids = chunk.ids.data(),
                                 .order = chunk.order.data(),
                                 .attributes = words > 0 ? attributes.data() : nullptr,
                                 .count = chunk.count};
    RETURN_IF_ERROR(shard_->Put(*group_.stream, items).status());
    if (options.progress) options.progress(first + chunk.count - begin, end - begin);
  }
  return absl::OkStatus();
}

// Every id goes to the rank its hash names, which sees all rows that have it.
absl::Status RetrievalTable::CheckDistinct(const EmbeddingFile& file, int64_t begin,
                                           int64_t end) const {
  const int ranks = group_.size();
  std::vector<std::vector<int64_t>> by_rank(ranks);
  absl::Status status;
  std::vector<int64_t> ids(kReadRows);
  for (int64_t first = begin; first < end && status.ok(); first += kReadRows) {
    const int64_t count = std::min(kReadRows, end - first);
    status = file.ReadIds(first, count, ids.data());
    for (int64_t i = 0; i < count && status.ok(); ++i) {
      const uint64_t mixed = static_cast<uint64_t>(ids[i]) * 0x9e3779b97f4a7c15u >> 32;
      by_rank[mixed % static_cast<uint64_t>(ranks)].push_back(ids[i]);
      if (ids[i] < 0) {
        status = absl::InvalidArgumentError(absl::StrCat(file.path(), ": item_ids: row ", first + i,
                                                         " has the id ", ids[i],
                                                         "; ids are 0 or larger"));
      }
    }
  }
  if (group_.control != nullptr) {
    for (int r = 0; r < ranks; ++r) {
      ByteWriter out;
      out.PutVector(by_rank[r]);
      group_.control->Send(r, kIdChannel, out.Take());
    }
    by_rank.clear();
    for (int r = 0; r < ranks; ++r) {
      by_rank.push_back(ByteReader(group_.control->Receive(r, kIdChannel)).GetVector<int64_t>());
    }
  }
  std::vector<int64_t> all;
  for (const auto& part : by_rank) all.insert(all.end(), part.begin(), part.end());
  std::sort(all.begin(), all.end());
  const auto twice = std::adjacent_find(all.begin(), all.end());
  if (status.ok() && twice != all.end()) {
    status = absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": item_ids: ", *twice, " appears more than once"));
  }
  return status;
}

absl::StatusOr<int64_t> RetrievalTable::Upsert(const RetrievalItems& items) {
  const auto n = static_cast<int64_t>(items.ids.size());
  const int64_t dim = model().config().item_dim, words = shard_->attribute_words();
  if (static_cast<int64_t>(items.embeddings.size()) != n * dim) {
    return absl::InvalidArgumentError(absl::StrCat("upsert: ", n, " items need ", n * dim,
                                                   " embedding elements (item_dim ", dim, "), not ",
                                                   items.embeddings.size()));
  }
  if (!items.attributes.empty() && static_cast<int64_t>(items.attributes.size()) != n * words) {
    return absl::InvalidArgumentError(absl::StrCat("upsert: ", n, " items need ", n * words,
                                                   " attribute words, not ",
                                                   items.attributes.size()));
  }
  absl::flat_hash_set<int64_t> distinct;
  for (const int64_t id : items.ids) {
    if (id < 0 || !distinct.insert(id).second) {
      return absl::InvalidArgumentError(absl::StrCat(
          "upsert: item id ", id, id < 0 ? " is negative" : " appears more than once"));
    }
  }
  // Which rank has an item, and how many each can take.
  std::vector<int64_t> mine(n + 1);
  mine[n] = shard_->free_slots();
  for (int64_t i = 0; i < n; ++i) mine[i] = shard_->Find(items.ids[i]).has_value() ? 1 : 0;
  const std::vector<int64_t> all = AllGather(mine);
  std::vector<int64_t> free(group_.size());
  for (int r = 0; r < group_.size(); ++r) free[r] = all[r * (n + 1) + n];
  std::vector<int> owner(n, -1);
  int64_t added = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int r = 0; r < group_.size(); ++r) {
      if (all[r * (n + 1) + i] != 0) owner[i] = r;
    }
    if (owner[i] < 0) ++added;
  }
  if (added > std::accumulate(free.begin(), free.end(), int64_t{0})) {
    return absl::ResourceExhaustedError(
        absl::StrCat("upsert: ", added, " new items do not fit: ", size_, " of the capacity of ",
                     capacity_, " are taken; nothing was changed"));
  }
  if (next_order_ + added > kMaxTableItems) {
    return absl::ResourceExhaustedError("upsert: 2^32 items were added; rebuild the table");
  }
  RetrievalItems own;
  std::vector<uint32_t> order;
  for (int64_t i = 0; i < n; ++i) {
    const bool is_new = owner[i] < 0;
    if (is_new) {
      owner[i] = static_cast<int>(std::max_element(free.begin(), free.end()) - free.begin());
      --free[owner[i]];
    }
    const auto place = static_cast<uint32_t>(is_new ? next_order_++ : 0);
    if (owner[i] != group_.rank()) continue;
    own.ids.push_back(items.ids[i]);
    order.push_back(place);
    const auto row = items.embeddings.begin() + i * dim;
    own.embeddings.insert(own.embeddings.end(), row, row + dim);
    if (items.attributes.empty()) continue;
    const auto word = items.attributes.begin() + i * words;
    own.attributes.insert(own.attributes.end(), word, word + words);
  }
  const absl::StatusOr<int64_t> bad = shard_->Put(
      *group_.stream, {.embeddings = own.embeddings.data(),
                       .ids = own.ids.data(),
                       .order = order.data(),
                       .attributes = own.attributes.empty() ? nullptr : own.attributes.data(),
                       .count = static_cast<int64_t>(own.ids.size())});
  CountItems();
  RETURN_IF_ERROR(group_.Agree(bad.status()));
  const std::vector<int64_t> all_bad = AllGather({*bad});
  return std::accumulate(all_bad.begin(), all_bad.end(), int64_t{0});
}

int64_t RetrievalTable::Delete(const std::vector<int64_t>& ids) {
  const int64_t before = size_;
  for (const int64_t id : ids) shard_->Erase(id);
  CountItems();
  return before - size_;
}

}  // namespace trireme
