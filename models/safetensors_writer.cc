#include <nlohmann/json.hpp>

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
    case DType::kF64:
      return "F64";
    case DType::kE4M3:
      return "F8_E4M3";
  }
  return "?";
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
  ASSIGN_OR_RETURN(writer->file_, OutputFile::Create(path));
  RETURN_IF_ERROR(writer->file_->Write(&length, sizeof(length)));
  RETURN_IF_ERROR(writer->file_->Write(text.data(), static_cast<int64_t>(text.size())));
  return writer;
}

absl::Status SafetensorsWriter::Append(const void* data, int64_t bytes) {
  CHECK_LE(bytes, declared_bytes_ - appended_bytes_) << path_;
  RETURN_IF_ERROR(file_->Write(data, bytes));
  appended_bytes_ += bytes;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  CHECK_EQ(appended_bytes_, declared_bytes_) << path_;
  return file_->Finish();
}

}  // namespace trireme
