#include "launch/output_files.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/status.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

absl::Status CheckWritable(const NamedFile& file) {
  struct stat info {};
  int error = 0;
  if (stat(file.path.c_str(), &info) == 0) {
    if (S_ISDIR(info.st_mode)) error = EISDIR;
    if (error == 0 && access(file.path.c_str(), W_OK) != 0) error = errno;
  } else if (errno != ENOENT) {
    error = errno;
  } else {
    const std::string folder = fs::path(file.path).parent_path().string();
    if (access(folder.empty() ? "." : folder.c_str(), W_OK | X_OK) != 0) error = errno;
  }
  if (error == 0) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(file.flag, " ", file.path, ": cannot be written: ", std::strerror(error)));
}

// Pipes and devices may well be read and written.
bool SameFile(const std::string& a, const std::string& b) {
  std::error_code error;
  if (fs::exists(a, error) && fs::exists(b, error))
    return fs::is_regular_file(a, error) && fs::equivalent(a, b, error);
  const fs::path whole_a = fs::weakly_canonical(a, error);
  return !error && whole_a == fs::weakly_canonical(b, error) && !error;
}

bool IsOfCheckpoint(const std::string& path, const std::string& model_dir) {
  std::error_code error;
  const fs::path folder = fs::path(path).parent_path();
  if (model_dir.empty() || !fs::is_regular_file(path, error) ||
      !fs::equivalent(folder.empty() ? "." : folder, model_dir, error)) {
    return false;
  }
  const std::string name = fs::path(path).filename().string();
  for (const char* begin : {"config.json", "generation_config.json", "tokenizer", "model"})
    if (absl::StartsWith(name, begin)) return true;
  return false;
}

}  // namespace

absl::Status CheckOutputFiles(const std::vector<NamedFile>& outputs,
                              const std::vector<NamedFile>& inputs, const std::string& model_dir) {
  std::vector<NamedFile> taken = inputs;
  for (const NamedFile& output : outputs) {
    if (output.path.empty()) continue;
    const std::string name = absl::StrCat(output.flag, " ", output.path);
    RETURN_IF_ERROR(CheckWritable(output));
    if (IsOfCheckpoint(output.path, model_dir)) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": is a file of the model and would be lost; name another"));
    }
    for (const NamedFile& other : taken) {
      if (other.path.empty() || !SameFile(output.path, other.path)) continue;
      return absl::InvalidArgumentError(absl::StrCat(name, ": is the file of ", other.flag,
                                                     " too and would be lost; name another"));
    }
    taken.push_back(output);
  }
  return absl::OkStatus();
}

}  // namespace trireme
