// Reading and writing safetensors files (huggingface/safetensors, format 0.x): u64 little-endian
// header length, JSON header, raw data. Headers are untrusted: every length, offset, dtype and
// shape is checked before use.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "models/output_file.h"

namespace trireme {

struct TensorEntry {
  DType dtype = DType::kF32;
  std::vector<int64_t> dims;
  int64_t begin = 0;  // byte offsets into the file (not into the data part)
  int64_t end = 0;
  // The stored type ("F64", "F8_E4M3", ...) when it is one that DType lacks, else empty: such a
  // tensor may be in the file as long as nobody asks for it. dtype means nothing then.
  std::string foreign_dtype = {};
};

struct SafetensorsHeader {
  std::map<std::string, TensorEntry> tensors;
  std::map<std::string, std::string> metadata;
};

// Parses the JSON header text. data_begin is where the data part starts in the file, file_bytes the
// file's size. Fails on duplicated names, unknown dtypes, sizes that do not match shapes, offsets
// out of range, overlaps and holes.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(const std::string& json,
                                                         int64_t data_begin, int64_t file_bytes,
                                                         const std::string& file_name);

// An open file: header parsed, data read on demand with pread. Thread-safe after Open.
class SafetensorsFile {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  const std::string& path() const { return path_; }
  const SafetensorsHeader& header() const { return header_; }
  // Copies `bytes` bytes at file offset `offset` to dst. A short read (file changed under us) is an
  // error.
  absl::Status Read(int64_t offset, int64_t bytes, void* dst) const;

 private:
  SafetensorsFile() = default;
  std::string path_;
  int fd_ = -1;
  SafetensorsHeader header_;
};

// Streams tensors to a new file: declare all, then append data in the declared order, then Finish.
// An OutputFile: it gets its name in Finish, and a pipe is written to as it is.
class SafetensorsWriter {
 public:
  struct Declared {
    std::string name;
    DType dtype;
    std::vector<int64_t> dims;
  };
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(
      const std::string& path, const std::vector<Declared>& tensors);
  absl::Status Append(const void* data, int64_t bytes);
  absl::Status Finish();

 private:
  SafetensorsWriter() = default;
  std::string path_;
  std::unique_ptr<OutputFile> file_;
  int64_t declared_bytes_ = 0;
  int64_t appended_bytes_ = 0;
};

}  // namespace trireme
