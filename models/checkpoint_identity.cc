#include "models/checkpoint_identity.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

// Headers are at most 100 MB by the format's definition; a length beyond is a broken file.
constexpr uint64_t kMostBytes = 100'000'000;

// FNV-1a over words of 8 bytes, the last one filled with zeros.
uint64_t Hash(const std::string& bytes) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < bytes.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min<size_t>(8, bytes.size() - i));
    hash = (hash ^ word) * 0x100000001b3;
    hash ^= hash >> 29;
  }
  return hash;
}

bool IsPart(const std::string& name) {
  return absl::EndsWith(name, ".safetensors") || name == "config.json" ||
         name == "model.safetensors.index.json" || name == "tokenizer.json" ||
         name == "tokenizer.model";
}

// Pages of the weights, the first and the last among them: two trainings of one model have the same
// header, and differ everywhere else.
constexpr uint64_t kSamples = 8, kSampleBytes = 4096;
void AppendSamples(std::ifstream& in, uint64_t begin, uint64_t end, std::string* content) {
  if (end <= begin) return;
  const uint64_t size = std::min(kSampleBytes, end - begin);
  for (uint64_t i = 0; i < kSamples; ++i) {
    std::string sample(size, '\0');
    in.seekg(static_cast<std::streamoff>(begin + (end - begin - size) / (kSamples - 1) * i));
    if (i + 1 == kSamples) in.seekg(static_cast<std::streamoff>(end - size));
    in.read(sample.data(), static_cast<std::streamsize>(size));
    content->append(sample);
  }
}

std::string HashOf(const fs::path& path, uint64_t bytes) {
  std::ifstream in(path, std::ios::binary);
  uint64_t wanted = bytes;
  if (path.extension() == ".safetensors") {
    uint64_t header = 0;
    if (!in.read(reinterpret_cast<char*>(&header), sizeof(header))) return "";
    in.seekg(0);
    wanted = std::min(bytes, header < kMostBytes ? header + sizeof(header) : 0);
  }
  std::string content(std::min(wanted, kMostBytes), '\0');
  if (!in.read(content.data(), static_cast<std::streamsize>(content.size()))) return "";
  if (wanted != 0 && wanted < bytes) AppendSamples(in, wanted, bytes, &content);
  return absl::StrFormat("%016x", Hash(content));
}

}  // namespace

std::vector<std::string> CheckpointIdentity(const std::string& model_dir) {
  std::vector<std::string> files;
  std::error_code error;
  for (fs::directory_iterator it(model_dir, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    std::error_code unreadable;
    const uint64_t bytes = fs::file_size(it->path(), unreadable);
    if (!IsPart(name) || unreadable) continue;
    files.push_back(absl::StrCat(name, " ", bytes, " ", HashOf(it->path(), bytes)));
  }
  std::sort(files.begin(), files.end());
  if (files.empty()) files.push_back("-");
  return files;
}

}  // namespace trireme
