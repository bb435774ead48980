#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/safetensors.h"

namespace trireme {
namespace {

const char* StoredName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kI32:
      return "I32";
    case DType::kI64:
      return "I64";
    case DType::kU8:
      return "U8";
  }
  return "?";
}

absl::Status WriteAll(int fd, const std::string& path, const void* data, int64_t bytes) {
  const auto* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = write(fd, from, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::ErrnoToStatus(errno, absl::StrCat(path, ": writing"));
    from += n;
    bytes -= n;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, const std::vector<Declared>& tensors) {
  nlohmann::json header = nlohmann::json::object();
  header["__metadata__"]["format"] = "pt";  // readers of the transformers library insist on it
  int64_t offset = 0;
  for (const Declared& tensor : tensors) {
    CHECK(!header.contains(tensor.name)) << tensor.name << " is declared twice";
    int64_t bytes = static_cast<int64_t>(SizeOf(tensor.dtype));
    for (const int64_t dim : tensor.dims)
      CHECK(dim >= 0 && !__builtin_mul_overflow(bytes, dim, &bytes));
    header[tensor.name] = {{"dtype", StoredName(tensor.dtype)},
                           {"shape", tensor.dims},
                           {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');  // the data part starts aligned
  const uint64_t length = text.size();

  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  writer->path_ = path;
  writer->declared_bytes_ = offset;
  const std::string partial = path + ".partial";
  writer->fd_ = open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (writer->fd_ < 0) return absl::ErrnoToStatus(errno, absl::StrCat(path, ": cannot be written"));
  RETURN_IF_ERROR(WriteAll(writer->fd_, path, &length, sizeof(length)));
  RETURN_IF_ERROR(WriteAll(writer->fd_, path, text.data(), static_cast<int64_t>(text.size())));
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ < 0) return;
  close(fd_);
  unlink((path_ + ".partial").c_str());
}

absl::Status SafetensorsWriter::Append(const void* data, int64_t bytes) {
  CHECK_LE(bytes, declared_bytes_ - appended_bytes_) << path_;
  RETURN_IF_ERROR(WriteAll(fd_, path_, data, bytes));
  appended_bytes_ += bytes;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  CHECK_EQ(appended_bytes_, declared_bytes_) << path_;
  const std::string partial = path_ + ".partial";
  // Some file systems report a full disk only here.
  const int closed = close(std::exchange(fd_, -1));
  if (closed != 0 || rename(partial.c_str(), path_.c_str()) != 0) {
    const absl::Status status = absl::ErrnoToStatus(errno, absl::StrCat(path_, ": finishing"));
    unlink(partial.c_str());
    return status;
  }
  return absl::OkStatus();
}

}  // namespace trireme
