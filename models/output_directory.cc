#include "models/output_directory.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"

namespace trireme {
namespace {

// Makes a directory empty that holds nothing but *.partial files.
absl::Status RemoveLeftovers(const std::string& path) {
  std::error_code error;
  std::vector<std::filesystem::path> leftovers;
  for (std::filesystem::directory_iterator at(path, error), end; !error && at != end;
       at.increment(error)) {
    if (at->path().extension() != ".partial" || !at->is_regular_file(error)) {
      return absl::AlreadyExistsError(path + ": is not empty; name a new or an empty directory");
    }
    leftovers.push_back(at->path());
  }
  for (const auto& leftover : leftovers) {
    if (!error) std::filesystem::remove(leftover, error);
  }
  return error ? absl::ErrnoToStatus(error.value(), path) : absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<OutputDirectory>> OutputDirectory::Claim(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  const bool there = std::filesystem::exists(status);
  if (there && !std::filesystem::is_directory(status)) {
    return absl::AlreadyExistsError(path + ": is not a directory; name a new or an empty one");
  }
  if (there) RETURN_IF_ERROR(RemoveLeftovers(path));
  UnfinishedPath unfinished;
  if (!there) {
    unfinished = UnfinishedPath(path);
    std::filesystem::create_directories(path, error);
  }
  if (error) return absl::ErrnoToStatus(error.value(), path);
  return std::unique_ptr<OutputDirectory>(new OutputDirectory(path, !there, std::move(unfinished)));
}

OutputDirectory::~OutputDirectory() {
  if (kept_) return;
  for (const std::string& file : files_) unlink(file.c_str());
  if (made_) rmdir(path_.c_str());
}

std::string OutputDirectory::Add(const std::string& name) {
  files_.push_back(absl::StrCat(path_, "/", name));
  unfinished_files_.emplace_back(files_.back());
  return files_.back();
}

void OutputDirectory::Keep() {
  kept_ = true;
  unfinished_.Finished();
  // config.json, which makes it a checkpoint, is the last.
  for (UnfinishedPath& file : unfinished_files_) file.Finished();
}

absl::Status CheckSpace(const std::string& path, int64_t bytes) {
  std::error_code error;
  const auto space = std::filesystem::space(path, error);
  if (error || space.available >= static_cast<uint64_t>(bytes)) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrFormat(
      "%s: the checkpoint needs %.2f GB, %.2f GB are free", path, static_cast<double>(bytes) * 1e-9,
      static_cast<double>(space.available) * 1e-9));
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) return absl::ErrnoToStatus(errno, path);
  const ssize_t written = write(fd, text.data(), text.size());
  const absl::Status failed = absl::ErrnoToStatus(written < 0 ? errno : ENOSPC, path + ": writing");
  const bool closed = close(fd) == 0;
  return written == static_cast<ssize_t>(text.size()) && closed ? absl::OkStatus() : failed;
}

}  // namespace trireme
