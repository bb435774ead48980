#include "runtime/retrieval_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "kernels/status.h"
#include "models/float_convert.h"
#include "models/json_file.h"
#include "models/safetensors.h"

namespace trireme {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr int64_t kMagicBytes = 6;
constexpr int64_t kMaxNpyHeader = 1 << 16;

// The value after 'key': in numpy's header, a Python dict.
absl::string_view ValueOf(absl::string_view dict, absl::string_view key) {
  const std::string quoted = absl::StrCat("'", key, "':");
  const size_t at = dict.find(quoted);
  if (at == absl::string_view::npos) return "";
  absl::string_view rest = dict.substr(at + quoted.size());
  while (!rest.empty() && rest[0] == ' ') rest.remove_prefix(1);
  return rest;
}

// The names in metadata "attributes": at most 64 a word.
absl::Status ParseAttributeNames(const std::string& text, int64_t words, const std::string& path,
                                 std::vector<std::string>* names) {
  *names = absl::StrSplit(text, ',', absl::SkipEmpty());
  std::vector<std::string> sorted = *names;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": metadata \"attributes\" names ", Quoted(*twice), " twice"));
  }
  if (static_cast<int64_t>(names->size()) <= words * 64) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(path, ": metadata \"attributes\" has ",
                                                 names->size(), " names; item_attributes has ",
                                                 words, " words of 64 bits"));
}

absl::StatusOr<std::string> FindMatrix(const SafetensorsHeader& header, const std::string& wanted,
                                       const std::string& path) {
  if (header.tensors.count(wanted) > 0) return wanted;
  std::vector<std::string> matrices;
  for (const auto& [name, entry] : header.tensors) {
    const bool floats =
        entry.foreign_dtype == "F64" || (entry.foreign_dtype.empty() && IsFloat(entry.dtype));
    if (entry.dims.size() == 2 && floats) matrices.push_back(name);
  }
  if (matrices.size() == 1) return matrices[0];
  return absl::NotFoundError(absl::StrCat(path, ": has no tensor \"", wanted, "\" and ",
                                          matrices.empty() ? "no" : "more than one",
                                          " float matrix"));
}

}  // namespace

absl::StatusOr<NpyHeader> ParseNpyHeader(const std::string& bytes, const std::string& name) {
  const auto invalid = [&](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", what...));
  };
  if (bytes.size() < 10 || bytes.compare(0, kMagicBytes, kMagic) != 0)
    return invalid("is no .npy file");
  const int major = static_cast<unsigned char>(bytes[6]);
  const size_t prefix = major == 1 ? 10 : 12;
  if (major < 1 || major > 3 || bytes.size() < prefix)
    return invalid("has .npy version ", major, "; 1 to 3 are known");
  uint32_t length = 0;
  std::memcpy(&length, bytes.data() + 8, major == 1 ? 2 : 4);
  if (length > kMaxNpyHeader || bytes.size() < prefix + length)
    return invalid("its header of ", length, " bytes is cut short");
  const absl::string_view dict(bytes.data() + prefix, length);
  NpyHeader header;
  header.data_offset = static_cast<int64_t>(prefix + length);
  const absl::string_view descr = ValueOf(dict, "descr");
  const size_t descr_end = descr.find('\'', 1);
  if (descr.empty() || descr[0] != '\'' || descr_end == absl::string_view::npos)
    return invalid("its header names no plain type");
  header.descr = std::string(descr.substr(1, descr_end - 1));
  if (!absl::StartsWith(ValueOf(dict, "fortran_order"), "False"))
    return invalid("is in Fortran order; save numpy.ascontiguousarray of it");
  const absl::string_view shape = ValueOf(dict, "shape");
  const size_t shape_end = shape.find(')');
  if (shape.empty() || shape[0] != '(' || shape_end == absl::string_view::npos)
    return invalid("its header has no shape");
  for (absl::string_view part :
       absl::StrSplit(shape.substr(1, shape_end - 1), ',', absl::SkipWhitespace())) {
    int64_t extent = 0;
    if (!absl::SimpleAtoi(part, &extent) || extent < 0)
      return invalid("its header's shape is malformed");
    header.shape.push_back(extent);
  }
  return header;
}

std::string NpyHeaderBytes(const std::string& descr, const std::vector<int64_t>& shape) {
  std::string dict = absl::StrCat("{'descr': '", descr, "', 'fortran_order': False, 'shape': (",
                                  absl::StrJoin(shape, ", "), shape.size() == 1 ? "," : "", "), }");
  dict.append((64 - (10 + dict.size() + 1) % 64) % 64, ' ');
  dict += '\n';
  std::string out(kMagic, kMagicBytes);
  out += '\x01';
  out += '\0';
  out += static_cast<char>(dict.size() & 0xff);
  out += static_cast<char>(dict.size() >> 8);
  return out + dict;
}

absl::StatusOr<std::unique_ptr<EmbeddingFile>> EmbeddingFile::Open(const std::string& path,
                                                                   Kind kind) {
  std::unique_ptr<EmbeddingFile> file(new EmbeddingFile);
  file->path_ = path;
  // Non-blocking, so that a FIFO of this name is refused below instead of waited for.
  file->fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file->fd_ < 0) return absl::ErrnoToStatus(errno, path);
  struct stat info {};
  if (fstat(file->fd_, &info) != 0) return absl::ErrnoToStatus(errno, path);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(path + ": is not a regular file");
  file->file_bytes_ = info.st_size;
  posix_fadvise(file->fd_, 0, 0, POSIX_FADV_SEQUENTIAL);
  const bool npy = path.size() > 4 && path.compare(path.size() - 4, 4, ".npy") == 0;
  RETURN_IF_ERROR(npy ? file->OpenNpy() : file->OpenSafetensors(kind));
  return file;
}

EmbeddingFile::~EmbeddingFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status EmbeddingFile::OpenNpy() {
  std::string head(std::min<int64_t>(file_bytes_, kMaxNpyHeader + 12), '\0');
  RETURN_IF_ERROR(Read(0, static_cast<int64_t>(head.size()), head.data()));
  ASSIGN_OR_RETURN(const NpyHeader header, ParseNpyHeader(head, path_));
  if (header.shape.size() != 2) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": has ", header.shape.size(),
                                                   " dimensions; must be a matrix [rows, dim]"));
  }
  int64_t size = 0;
  if (header.descr == "<f4") size = 4;
  if (header.descr == "<f2") size = 2, dtype_ = DType::kF16;
  if (header.descr == "<f8") size = 8, f64_ = true;
  if (size == 0) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": has type ", Quoted(header.descr),
                                                   "; must be float16, float32 or float64"));
  }
  rows_ = header.shape[0], dim_ = header.shape[1], offset_ = header.data_offset;
  int64_t bytes = 0;
  if (__builtin_mul_overflow(rows_, dim_, &bytes) || __builtin_mul_overflow(bytes, size, &bytes) ||
      bytes > file_bytes_ - offset_) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": is cut short: [", rows_, ", ", dim_,
                                                   "] does not fit its ", file_bytes_, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status EmbeddingFile::OpenSafetensors(Kind kind) {
  const bool items = kind == Kind::kItems;
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path_));
  const SafetensorsHeader& header = file->header();
  ASSIGN_OR_RETURN(const std::string name,
                   FindMatrix(header, items ? "item_embeddings" : "query_embeddings", path_));
  const auto invalid = [&](const std::string& tensor, const auto&... what) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": tensor ", Quoted(tensor), ": ", what...));
  };
  const TensorEntry& matrix = header.tensors.at(name);
  if (matrix.dims.size() != 2) return invalid(name, "must be a matrix [rows, dim]");
  f64_ = matrix.foreign_dtype == "F64";
  if (!f64_ && (!matrix.foreign_dtype.empty() || !IsFloat(matrix.dtype)))
    return invalid(name, "must be F16, BF16, F32 or F64");
  rows_ = matrix.dims[0], dim_ = matrix.dims[1], offset_ = matrix.begin, dtype_ = matrix.dtype;
  const std::string ids = items ? "item_ids" : "user_ids";
  if (const auto it = header.tensors.find(ids); it != header.tensors.end()) {
    if (it->second.dtype != DType::kI64 || it->second.dims != std::vector<int64_t>{rows_})
      return invalid(ids, "must be I64 [", rows_, "], one for each row of ", name);
    ids_offset_ = it->second.begin;
  }
  const auto words = header.tensors.find("item_attributes");
  if (!items || words == header.tensors.end()) return absl::OkStatus();
  const TensorEntry& entry = words->second;
  if (entry.dtype != DType::kI64 || entry.dims.size() != 2 || entry.dims[0] != rows_ ||
      entry.dims[1] < 1 || entry.dims[1] > 64)
    return invalid("item_attributes", "must be I64 [", rows_, ", words], 1 to 64 words");
  attributes_offset_ = entry.begin, attribute_words_ = entry.dims[1];
  const auto names = header.metadata.find("attributes");
  if (names == header.metadata.end())
    return invalid("item_attributes", "the metadata must name its bits under \"attributes\"");
  return ParseAttributeNames(names->second, attribute_words_, path_, &attributes_);
}

absl::Status EmbeddingFile::Read(int64_t offset, int64_t bytes, void* out) const {
  char* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t n = pread(fd_, to, bytes, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::ErrnoToStatus(errno, absl::StrCat(path_, ": reading"));
    if (n == 0) {
      return absl::DataLossError(
          absl::StrCat(path_, ": ends at byte ", offset, ": it became shorter while it was read"));
    }
    to += n, offset += n, bytes -= n;
  }
  return absl::OkStatus();
}

absl::Status EmbeddingFile::ReadRows(int64_t first, int64_t count, float* out) const {
  const int64_t elements = count * dim_;
  if (f64_) {
    std::vector<double> wide(elements);
    RETURN_IF_ERROR(Read(offset_ + first * dim_ * 8, elements * 8, wide.data()));
    std::transform(wide.begin(), wide.end(), out, [](double v) { return static_cast<float>(v); });
    return absl::OkStatus();
  }
  const int64_t size = static_cast<int64_t>(SizeOf(dtype_));
  if (dtype_ == DType::kF32) return Read(offset_ + first * dim_ * size, elements * size, out);
  std::vector<uint16_t> half(elements);
  RETURN_IF_ERROR(Read(offset_ + first * dim_ * size, elements * size, half.data()));
  ConvertFloats(dtype_, half.data(), DType::kF32, out, elements);
  return absl::OkStatus();
}

absl::Status EmbeddingFile::ReadIds(int64_t first, int64_t count, int64_t* out) const {
  if (has_ids()) return Read(ids_offset_ + first * 8, count * 8, out);
  for (int64_t i = 0; i < count; ++i) out[i] = first + i;
  return absl::OkStatus();
}

absl::Status EmbeddingFile::ReadAttributes(int64_t first, int64_t count, uint64_t* out) const {
  if (attribute_words_ == 0) return absl::OkStatus();
  return Read(attributes_offset_ + first * attribute_words_ * 8, count * attribute_words_ * 8, out);
}

}  // namespace trireme
