// Snapshots of a RetrievalTable: DIR/table.json names one file of rows for each rank that wrote it.
// A file is chunks of 1,024 rows, each with a checksum behind it. Files of a new snapshot have new
// names and table.json is renamed into place last, so what was there stays whole until the new one
// is.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "models/json_file.h"
#include "models/output_file.h"
#include "runtime/retrieval_table.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kChunkRows = 1024, kChecksumBytes = 8;
// Rows of version 1 are the same, but those of int8, which had gates in bf16.
constexpr int kVersion = 2;
constexpr int64_t kMaxManifestBytes = 16 << 20;
constexpr char kManifest[] = "table.json";

// FNV-1a over words of eight bytes, the last one filled up with zeros.
uint64_t Checksum(const char* data, int64_t bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + i, std::min<int64_t>(8, bytes - i));
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 32;
  }
  return hash;
}

int64_t FileBytes(int64_t rows, int64_t row_bytes) {
  return rows * row_bytes + (rows + kChunkRows - 1) / kChunkRows * kChecksumBytes;
}

const char* StorageName(MolStorage storage) {
  return storage == MolStorage::kF32 ? "f32" : storage == MolStorage::kBF16 ? "bf16" : "int8";
}

absl::Status WriteRows(const ItemShard& shard, Stream& stream, const std::string& path,
                       int64_t* rows) {
  ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> file,
                   OutputFile::Create(path, OutputFile::Sync::kYes));
  const auto lock = shard.ReadLock();
  const std::vector<int32_t> slots = shard.OccupiedSlots();
  const int64_t row_bytes = shard.row_bytes();
  *rows = static_cast<int64_t>(slots.size());
  std::vector<char> chunk(kChunkRows * row_bytes);
  ItemShard::BlockWindow window(shard, stream);
  for (int64_t first = 0; first < *rows; first += kChunkRows) {
    const int64_t count = std::min(kChunkRows, *rows - first);
    for (int64_t i = 0; i < count; ++i) {
      RETURN_IF_ERROR(shard.ExportRow(window, slots[first + i], chunk.data() + i * row_bytes));
    }
    const uint64_t checksum = Checksum(chunk.data(), count * row_bytes);
    RETURN_IF_ERROR(file->Write(chunk.data(), count * row_bytes));
    RETURN_IF_ERROR(file->Write(&checksum, kChecksumBytes));
  }
  return file->Finish();
}

struct ShardFile {
  std::string name;
  int64_t rows = 0;
};

// table.json as fields.
struct Manifest {
  int version = kVersion;
  int64_t generation = 0;
  std::string model, storage;
  bool means = false;
  int64_t row_bytes = 0, capacity = 0, next_order = 0;
  std::vector<std::string> attributes;
  std::vector<ShardFile> shards;

  int64_t rows() const {
    int64_t sum = 0;
    for (const ShardFile& shard : shards) sum += shard.rows;
    return sum;
  }
  std::string Text() const {
    Json out;
    out["format"] = "trireme-retrieval-table";
    out["version"] = version;
    out["generation"] = generation;
    out["model"] = model;
    out["storage"] = storage;
    out["means"] = means;
    out["row_bytes"] = row_bytes;
    out["capacity"] = capacity;
    out["next_order"] = next_order;
    out["attributes"] = attributes;
    out["shards"] = Json::array();
    for (const ShardFile& shard : shards) {
      out["shards"].push_back({{"file", shard.name}, {"rows", shard.rows}});
    }
    // So that an edited or half-written manifest is noticed.
    const std::string body = out.dump();
    out["checksum"] =
        absl::StrFormat("%016x", Checksum(body.data(), static_cast<int64_t>(body.size())));
    return out.dump(2) + "\n";
  }
};

absl::StatusOr<Manifest> ParseManifest(const std::string& text, const std::string& path) {
  ASSIGN_OR_RETURN(const nlohmann::json object, ParseJsonObject(text, path));
  if (object.value("format", nlohmann::json()) != "trireme-retrieval-table")
    return absl::InvalidArgumentError(path + ": is no snapshot of a retrieval table");
  if (const nlohmann::json version = object.value("version", nlohmann::json());
      version != 1 && version != kVersion) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": has version ", version.dump(), "; this program reads versions 1 to ", kVersion));
  }
  Manifest manifest;
  const absl::Status corrupt =
      absl::DataLossError(path + ": is corrupt: its checksum does not fit what it says");
  try {
    manifest.version = object.at("version").get<int>();
    manifest.generation = object.at("generation").get<int64_t>();
    manifest.model = object.at("model").get<std::string>();
    manifest.storage = object.at("storage").get<std::string>();
    manifest.means = object.at("means").get<bool>();
    manifest.row_bytes = object.at("row_bytes").get<int64_t>();
    manifest.capacity = object.at("capacity").get<int64_t>();
    manifest.next_order = object.at("next_order").get<int64_t>();
    manifest.attributes = object.at("attributes").get<std::vector<std::string>>();
    for (const nlohmann::json& shard : object.at("shards")) {
      manifest.shards.push_back(
          {shard.at("file").get<std::string>(), shard.at("rows").get<int64_t>()});
    }
  } catch (const nlohmann::json::exception&) {
    return corrupt;
  }
  bool sound = manifest.row_bytes > 0 && manifest.capacity >= manifest.rows() &&
               manifest.next_order >= manifest.rows();
  for (const ShardFile& shard : manifest.shards) {
    // A name with a slash would lead out of the folder.
    sound = sound && shard.rows >= 0 && shard.rows <= manifest.capacity &&
            shard.name.find('/') == std::string::npos;
  }
  if (!sound || manifest.Text() != text) return corrupt;
  if (manifest.version == 1 && manifest.storage == StorageName(MolStorage::kInt8)) {
    return absl::InvalidArgumentError(
        path +
        ": has version 1, whose int8 rows this program does not read; build the table from "
        "its items and save it again");
  }
  return manifest;
}

absl::StatusOr<Manifest> ReadManifest(const std::string& dir) {
  const std::string path = absl::StrCat(dir, "/", kManifest);
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxManifestBytes));
  return ParseManifest(text, path);
}

std::string RowsName(int64_t generation, int rank, int ranks) {
  return absl::StrFormat("rows-%06d-%05d-of-%05d.bin", generation, rank, ranks);
}

// Whether SaveSnapshot may have made a file of this name: nobody else's is removed.
bool IsRowsName(const std::string& name) {
  long long generation = 0;
  int rank = 0, ranks = 0;
  if (std::sscanf(name.c_str(), "rows-%lld-%d-of-%d.bin", &generation, &rank, &ranks) != 3)
    return false;
  const std::string whole = RowsName(generation, rank, ranks);
  return name == whole || name == whole + ".partial";
}

// Row files that table.json does not name: of the snapshot before, or of one that was cut short.
void RemoveOldFiles(const std::string& dir, const Manifest& manifest) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(dir, ignored)) {
    const std::string name = entry.path().filename().string();
    const bool ours = IsRowsName(name);
    bool named = false;
    for (const ShardFile& shard : manifest.shards) named = named || shard.name == name;
    if (ours && !named) std::filesystem::remove(entry.path(), ignored);
  }
}

// Rows [begin, end) of the files one after the other.
class RowReader {
 public:
  RowReader(const std::string& dir, const Manifest& manifest) : dir_(dir), manifest_(manifest) {}

  template <typename Take>
  absl::Status Read(int64_t begin, int64_t end, Take&& take) {
    int64_t first = 0;  // row of the table that the file begins with
    for (const ShardFile& shard : manifest_.shards) {
      const int64_t from = std::max(begin, first) - first;
      const int64_t to = std::min(end, first + shard.rows) - first;
      if (from < to) RETURN_IF_ERROR(ReadFile(shard, from, to, take));
      first += shard.rows;
    }
    return absl::OkStatus();
  }

 private:
  template <typename Take>
  absl::Status ReadFile(const ShardFile& shard, int64_t from, int64_t to, Take&& take) {
    const std::string path = absl::StrCat(dir_, "/", shard.name);
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // it may be a pipe
    if (fd < 0) return absl::ErrnoToStatus(errno, path);
    absl::Status status = CheckSize(fd, path, shard.rows);
    std::vector<char> chunk(kChunkRows * manifest_.row_bytes + kChecksumBytes);
    for (int64_t c = from / kChunkRows; status.ok() && c * kChunkRows < to; ++c) {
      const int64_t rows = std::min(kChunkRows, shard.rows - c * kChunkRows);
      const int64_t bytes = rows * manifest_.row_bytes;
      status = ReadChunk(fd, path, c, bytes, &chunk);
      for (int64_t r = 0; status.ok() && r < rows; ++r) {
        const int64_t row = c * kChunkRows + r;
        if (row < from || row >= to) continue;
        const absl::StatusOr<bool> taken = take(chunk.data() + r * manifest_.row_bytes);
        if (!taken.ok()) {
          status = taken.status();
        } else if (!*taken) {
          status = absl::DataLossError(absl::StrCat(path, ": row ", row, " repeats an item id"));
        }
      }
    }
    close(fd);
    return status;
  }
  absl::Status CheckSize(int fd, const std::string& path, int64_t rows) const {
    struct stat info {};
    const int64_t expected = FileBytes(rows, manifest_.row_bytes);
    if (fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, path);
    if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(path + ": is not a regular file");
    if (info.st_size == expected) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat(path, ": has ", static_cast<int64_t>(info.st_size),
                                            " bytes; ", rows, " rows take ", expected));
  }
  absl::Status ReadChunk(int fd, const std::string& path, int64_t index, int64_t bytes,
                         std::vector<char>* chunk) const {
    const int64_t offset = index * (kChunkRows * manifest_.row_bytes + kChecksumBytes);
    int64_t done = 0;
    while (done < bytes + kChecksumBytes) {
      const ssize_t n =
          pread(fd, chunk->data() + done, bytes + kChecksumBytes - done, offset + done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return absl::DataLossError(path + ": cannot be read to its end");
      done += n;
    }
    uint64_t stored = 0;
    std::memcpy(&stored, chunk->data() + bytes, kChecksumBytes);
    if (stored == Checksum(chunk->data(), bytes)) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat(path, ": is corrupt: the checksum of rows ", index * kChunkRows, " to ",
                     index * kChunkRows + bytes / manifest_.row_bytes - 1, " does not fit"));
  }

  const std::string& dir_;
  const Manifest& manifest_;
};

absl::Status CheckManifest(const Manifest& manifest, const MolModel& model,
                           const std::string& dir) {
  if (manifest.model != absl::StrFormat("%016x", model.fingerprint())) {
    return absl::InvalidArgumentError(absl::StrCat(
        dir, ": the snapshot was made with another model; its items are projected by that one"));
  }
  return absl::OkStatus();
}

// The folder while a snapshot is saved there: by one job at a time, whose row files have names of
// their own. Rank 0's.
class SnapshotFolder {
 public:
  ~SnapshotFolder() {
    if (fd_ >= 0) close(fd_);  // and unlocks
  }
  // Makes the folder and reads which generation it holds, 0 for none. What is there and is no
  // snapshot that this program reads stays as it is.
  absl::Status Open(const std::string& dir) {
    std::error_code error;
    std::filesystem::create_directories(dir, error);
    if (error) return absl::ErrnoToStatus(error.value(), dir);
    fd_ = open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd_ < 0) return absl::ErrnoToStatus(errno, dir);
    // File systems without locks have no other saver that could be seen.
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
      return absl::UnavailableError(dir + ": another job is saving a snapshot there");
    const absl::StatusOr<Manifest> old = ReadManifest(dir);
    if (absl::IsNotFound(old.status())) return absl::OkStatus();
    if (!old.ok()) {
      return absl::FailedPreconditionError(absl::StrCat(
          old.status().message(), "; a snapshot is not saved over it: name another folder"));
    }
    generation_ = old->generation;
    return absl::OkStatus();
  }
  int64_t generation() const { return generation_; }

 private:
  int fd_ = -1;
  int64_t generation_ = 0;
};

absl::Status WriteManifest(const Manifest& manifest, const std::string& dir) {
  const std::string text = manifest.Text();
  ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> file,
                   OutputFile::Create(absl::StrCat(dir, "/", kManifest), OutputFile::Sync::kYes));
  RETURN_IF_ERROR(file->Write(text.data(), static_cast<int64_t>(text.size())));
  return file->Finish();
}

}  // namespace

absl::Status RetrievalTable::SaveSnapshot(const std::string& dir) const {
  SnapshotFolder folder;
  RETURN_IF_ERROR(group_.Agree(group_.rank() == 0 ? folder.Open(dir) : absl::OkStatus()));
  // Files of the new generation have names of their own.
  const int64_t generation = AllGather({folder.generation()})[0] + 1;
  const auto name = [&](int rank) { return RowsName(generation, rank, group_.size()); };
  const std::string own = absl::StrCat(dir, "/", name(group_.rank()));
  int64_t rows = 0;
  absl::Status status = group_.Agree(WriteRows(*shard_, *group_.stream, own, &rows));
  if (!status.ok()) {  // what the others have written may be what fills the disk
    unlink(own.c_str());
    return status;
  }
  const std::vector<int64_t> all_rows = AllGather({rows});
  if (group_.rank() == 0) {
    Manifest manifest;
    manifest.generation = generation;
    manifest.model = absl::StrFormat("%016x", model().fingerprint());
    manifest.storage = StorageName(shard_->options().storage);
    manifest.means = shard_->options().means;
    manifest.row_bytes = shard_->row_bytes();
    manifest.capacity = capacity_;
    manifest.next_order = next_order_;
    manifest.attributes = shard_->options().attributes;
    for (int r = 0; r < group_.size(); ++r) manifest.shards.push_back({name(r), all_rows[r]});
    status = WriteManifest(manifest, dir);
    if (status.ok()) RemoveOldFiles(dir, manifest);
  }
  // After a failure here table.json may or may not name the new files: the next snapshot tells.
  return group_.Agree(status);
}

absl::StatusOr<std::unique_ptr<RetrievalTable>> RetrievalTable::LoadSnapshot(
    const RetrievalGroup& group, const MolModel& model, const std::string& dir,
    const RetrievalTableOptions& options) {
  auto manifest = ReadManifest(dir);
  absl::Status status = manifest.status();
  if (status.ok()) status = CheckManifest(*manifest, model, dir);
  RETURN_IF_ERROR(group.Agree(status));
  RetrievalTableOptions wanted = options;
  wanted.storage = manifest->storage == "f32"    ? MolStorage::kF32
                   : manifest->storage == "bf16" ? MolStorage::kBF16
                                                 : MolStorage::kInt8;
  wanted.means = manifest->means;
  const int64_t rows = manifest->rows();
  wanted.capacity = options.capacity > 0 ? options.capacity : manifest->capacity;
  if (wanted.capacity < rows) {
    return absl::ResourceExhaustedError(
        absl::StrCat(dir, ": holds ", rows, " items; the table's capacity is ", wanted.capacity));
  }
  if (wanted.capacity > kMaxTableItems) {
    return absl::ResourceExhaustedError(absl::StrCat(dir, ": a capacity of ", wanted.capacity,
                                                     ": a table holds at most ", kMaxTableItems,
                                                     " items"));
  }
  const int64_t begin = rows * group.rank() / group.size();
  const int64_t end = rows * (group.rank() + 1) / group.size();
  ASSIGN_OR_RETURN(std::unique_ptr<RetrievalTable> table,
                   CreateShards(group, model, manifest->attributes, wanted,
                                ShardCapacity(group, end - begin, rows, wanted.capacity)));
  if (table->shard_->row_bytes() != manifest->row_bytes) {
    return absl::DataLossError(absl::StrCat(dir, "/", kManifest, ": row_bytes is ",
                                            manifest->row_bytes, ", must be ",
                                            table->shard_->row_bytes()));
  }
  int64_t done = 0;
  ItemShard::BlockWindow window(*table->shard_, *group.stream);
  status = RowReader(dir, *manifest).Read(begin, end, [&](const char* row) -> absl::StatusOr<bool> {
    if (table->shard_->free_slots() == 0) return false;
    ASSIGN_OR_RETURN(const bool is_new, table->shard_->ImportRow(window, row));
    if (!is_new) return false;
    if (options.progress && ++done % kChunkRows == 0) options.progress(done, end - begin);
    return true;
  });
  if (status.ok()) status = window.Flush();
  RETURN_IF_ERROR(group.Agree(status));
  table->next_order_ = manifest->next_order;
  table->CountItems();
  return table;
}

}  // namespace trireme
