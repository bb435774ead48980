// Embedding files: rows of a .npy matrix or of a safetensors file, read a chunk at a time so that a
// file may be larger than memory. Read with pread, not mapped: a file that shrinks under us is an
// error then, not a SIGBUS. Any thread after Open.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace trireme {

class EmbeddingFile {
 public:
  enum class Kind { kItems, kQueries };
  // NAME.npy: a C-ordered matrix of float16, float32 or float64. NAME.safetensors: the matrix is
  // "item_embeddings" or "query_embeddings" (or the file's only float matrix); with it "item_ids"
  // or "user_ids" [N] I64 and "item_attributes" [N, W] I64, whose bits the metadata's "attributes"
  // names, separated by commas.
  static absl::StatusOr<std::unique_ptr<EmbeddingFile>> Open(const std::string& path, Kind kind);
  ~EmbeddingFile();

  const std::string& path() const { return path_; }
  int64_t rows() const { return rows_; }
  int64_t dim() const { return dim_; }
  bool has_ids() const { return ids_offset_ >= 0; }
  // Name of attribute word * 64 + bit.
  const std::vector<std::string>& attributes() const { return attributes_; }
  int64_t attribute_words() const { return attribute_words_; }

  // Rows [first, first + count) as floats [count, dim].
  absl::Status ReadRows(int64_t first, int64_t count, float* out) const;
  // Their ids; row numbers where the file has none.
  absl::Status ReadIds(int64_t first, int64_t count, int64_t* out) const;
  // Their attribute words [count, attribute_words].
  absl::Status ReadAttributes(int64_t first, int64_t count, uint64_t* out) const;

 private:
  EmbeddingFile() = default;
  absl::Status OpenNpy();
  absl::Status OpenSafetensors(Kind kind);
  absl::Status Read(int64_t offset, int64_t bytes, void* out) const;

  std::string path_;
  int fd_ = -1;
  int64_t file_bytes_ = 0;
  int64_t rows_ = 0, dim_ = 0, offset_ = 0;
  DType dtype_ = DType::kF32;
  bool f64_ = false;
  int64_t ids_offset_ = -1;
  int64_t attributes_offset_ = -1, attribute_words_ = 0;
  std::vector<std::string> attributes_;
};

// Where a numpy .npy file's data lies and what it is.
struct NpyHeader {
  std::string descr;  // "<f4", "|b1", ...
  std::vector<int64_t> shape;
  int64_t data_offset = 0;
};
// Parses the first bytes of a .npy file; Fortran order is refused.
absl::StatusOr<NpyHeader> ParseNpyHeader(const std::string& bytes, const std::string& name);

// Header of a .npy file of this type and shape, data to follow.
std::string NpyHeaderBytes(const std::string& descr, const std::vector<int64_t>& shape);

}  // namespace trireme
