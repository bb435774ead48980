#include "models/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/json_file.h"

namespace trireme {
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little,
              "tensor data is little-endian and read as it is");

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr int64_t kPrefixBytes = 8;

struct StoredType {
  const char* name;
  int64_t bytes;
  std::optional<DType> dtype;  // none: known, sized, but not one of ours
};
constexpr StoredType kStoredTypes[] = {
    {"F32", 4, DType::kF32}, {"BF16", 2, DType::kBF16},
    {"F16", 2, DType::kF16}, {"I32", 4, DType::kI32},
    {"I64", 8, DType::kI64}, {"U8", 1, DType::kU8},
    {"F64", 8, {}},          {"I8", 1, {}},
    {"BOOL", 1, {}},         {"I16", 2, {}},
    {"U16", 2, {}},          {"U32", 4, {}},
    {"U64", 8, {}},          {"F8_E4M3", 1, {}},
    {"F8_E5M2", 1, {}},      {"F8_E8M0", 1, {}},
    {"F8_E4M3FNUZ", 1, {}},  {"F8_E5M2FNUZ", 1, {}},
    {"C64", 8, {}},
};

const StoredType* FindStoredType(const std::string& name) {
  const auto it = std::find_if(std::begin(kStoredTypes), std::end(kStoredTypes),
                               [&](const StoredType& type) { return name == type.name; });
  return it == std::end(kStoredTypes) ? nullptr : it;
}

// A list of non-negative integers that fit int64_t.
std::optional<std::vector<int64_t>> Extents(const Json& value) {
  if (!value.is_array()) return std::nullopt;
  std::vector<int64_t> out;
  for (const Json& item : value) {
    if (!item.is_number_unsigned() || item.get<uint64_t>() > uint64_t{INT64_MAX})
      return std::nullopt;
    out.push_back(static_cast<int64_t>(item.get<uint64_t>()));
  }
  return out;
}

// Bytes of a tensor, or none when the number overflows.
std::optional<int64_t> TensorBytes(const std::vector<int64_t>& dims, int64_t element_bytes) {
  int64_t bytes = element_bytes;
  for (const int64_t dim : dims) {
    if (__builtin_mul_overflow(bytes, dim, &bytes)) return std::nullopt;
  }
  return bytes;
}

absl::StatusOr<TensorEntry> ParseEntry(const Json& value, int64_t data_begin, int64_t data_bytes,
                                       const std::string& where) {
  const auto invalid = [&](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat(where, what...));
  };
  if (!value.is_object()) return invalid("is ", TypeOf(value), "; must be an object");
  const auto dtype = value.find("dtype");
  const auto shape = value.find("shape");
  const auto offsets = value.find("data_offsets");
  if (dtype == value.end() || shape == value.end() || offsets == value.end() || value.size() != 3) {
    return invalid("must have exactly the fields dtype, shape and data_offsets");
  }
  if (!dtype->is_string()) return invalid("dtype must be a string");
  const StoredType* type = FindStoredType(dtype->get<std::string>());
  if (type == nullptr) return invalid("unknown dtype ", Quoted(dtype->get<std::string>()));
  const auto dims = Extents(*shape);
  if (!dims) return invalid("shape must be a list of integers from 0 to 2^63 - 1");
  const auto range = Extents(*offsets);
  if (!range || range->size() != 2)
    return invalid("data_offsets must be two integers from 0 to 2^63 - 1");
  const int64_t begin = (*range)[0], end = (*range)[1];
  if (begin > end || end > data_bytes) {
    return invalid("data_offsets [", begin, ", ", end, "] must be in order and within the ",
                   data_bytes, " bytes of data; the file is cut short or its header is wrong");
  }
  const auto bytes = TensorBytes(*dims, type->bytes);
  if (!bytes) return invalid("the size of its shape overflows");
  if (*bytes != end - begin) {
    return invalid("data_offsets span ", end - begin, " bytes; shape and dtype need ", *bytes);
  }
  TensorEntry entry{type->dtype.value_or(DType::kU8), *dims, data_begin + begin, data_begin + end};
  if (!type->dtype) entry.foreign_dtype = type->name;
  return entry;
}

// The data part must be covered exactly once.
absl::Status CheckCoverage(const SafetensorsHeader& header, int64_t data_begin, int64_t file_bytes,
                           const std::string& file_name) {
  std::vector<std::pair<const TensorEntry*, const std::string*>> order;
  for (const auto& [name, entry] : header.tensors) order.emplace_back(&entry, &name);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->begin, a.first->end) < std::pair(b.first->begin, b.first->end);
  });
  int64_t covered = data_begin;
  for (const auto& [entry, name] : order) {
    if (entry->begin != covered) {
      return absl::InvalidArgumentError(absl::StrCat(
          file_name, ": tensor ", Quoted(*name), ": begins at data offset ",
          entry->begin - data_begin, " where ", covered - data_begin,
          " is due: ", entry->begin < covered ? "tensors overlap" : "there is a hole"));
    }
    covered = entry->end;
  }
  if (covered != file_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file_name, ": ", file_bytes - covered,
                     " bytes follow the last tensor; there must be none"));
  }
  return absl::OkStatus();
}

absl::Status ReadAt(int fd, const std::string& path, int64_t offset, int64_t bytes, void* dst) {
  auto* out = static_cast<char*>(dst);
  while (bytes > 0) {
    const ssize_t n = pread(fd, out, bytes, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::ErrnoToStatus(errno, absl::StrCat(path, ": reading at byte ", offset));
    if (n == 0) {
      return absl::DataLossError(
          absl::StrCat(path, ": ends at byte ", offset, ", ", bytes,
                       " bytes early: the file became shorter while it was read"));
    }
    out += n;
    offset += n;
    bytes -= n;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(const std::string& json,
                                                         int64_t data_begin, int64_t file_bytes,
                                                         const std::string& file_name) {
  CHECK_GE(data_begin, 0);
  CHECK_GE(file_bytes, data_begin);
  ASSIGN_OR_RETURN(const Json object, ParseJsonObject(json, file_name));
  SafetensorsHeader header;
  for (const auto& [name, value] : object.items()) {
    if (name != "__metadata__") {
      ASSIGN_OR_RETURN(header.tensors[name],
                       ParseEntry(value, data_begin, file_bytes - data_begin,
                                  absl::StrCat(file_name, ": tensor ", Quoted(name), ": ")));
      continue;
    }
    bool strings = value.is_object();
    if (strings) {
      for (const auto& [key, text] : value.items()) strings = strings && text.is_string();
    }
    if (!strings) {
      return absl::InvalidArgumentError(
          absl::StrCat(file_name, ": __metadata__: must map strings to strings"));
    }
    for (const auto& [key, text] : value.items()) header.metadata[key] = text.get<std::string>();
  }
  RETURN_IF_ERROR(CheckCoverage(header, data_begin, file_bytes, file_name));
  return header;
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile);
  file->path_ = path;
  // Non-blocking, so that a FIFO of this name is refused below instead of waited for.
  file->fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file->fd_ < 0) return absl::ErrnoToStatus(errno, path);
  struct stat info {};
  if (fstat(file->fd_, &info) != 0) return absl::ErrnoToStatus(errno, path);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(path + ": is not a regular file");
  if (info.st_size < kPrefixBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": has ", info.st_size, " bytes; a safetensors file has at least ", kPrefixBytes));
  }
  uint64_t header_bytes = 0;
  RETURN_IF_ERROR(ReadAt(file->fd_, path, 0, kPrefixBytes, &header_bytes));
  const auto limit =
      static_cast<uint64_t>(std::min<int64_t>(info.st_size - kPrefixBytes, kMaxHeaderBytes));
  if (header_bytes > limit) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": says its header has ", header_bytes, " bytes; at most ", limit,
                     " are possible: not a safetensors file, or cut short"));
  }
  std::string json(header_bytes, '\0');
  RETURN_IF_ERROR(ReadAt(file->fd_, path, kPrefixBytes, header_bytes, json.data()));
  ASSIGN_OR_RETURN(file->header_,
                   ParseSafetensorsHeader(json, kPrefixBytes + static_cast<int64_t>(header_bytes),
                                          info.st_size, path));
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status SafetensorsFile::Read(int64_t offset, int64_t bytes, void* dst) const {
  CHECK_GE(offset, 0);
  CHECK_GE(bytes, 0);
  return ReadAt(fd_, path_, offset, bytes, dst);
}

}  // namespace trireme
