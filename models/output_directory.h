// A directory that a command writes a model into: new or empty, and left as it was found when
// anything goes wrong or the process is interrupted.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/unfinished_path.h"

namespace trireme {

// Files made so far; unless Keep() is called they are removed again, and the directory too when it
// was made here.
class OutputDirectory {
 public:
  // AlreadyExists when `path` is no directory or holds something. Files called *.partial are what
  // an attempt that was killed has left: where there is nothing else, they are removed.
  static absl::StatusOr<std::unique_ptr<OutputDirectory>> Claim(const std::string& path);
  ~OutputDirectory();
  // The full name of a file that is about to be made.
  std::string Add(const std::string& name);
  void Keep();
  const std::string& path() const { return path_; }

 private:
  OutputDirectory(std::string path, bool made, UnfinishedPath unfinished)
      : path_(std::move(path)), made_(made), unfinished_(std::move(unfinished)) {}
  std::string path_;
  bool made_;
  bool kept_ = false;
  std::vector<std::string> files_;
  UnfinishedPath unfinished_;  // the directory, where it was made here
  std::vector<UnfinishedPath> unfinished_files_;
};

// ResourceExhausted when the file system of `path` has less than `bytes` free.
absl::Status CheckSpace(const std::string& path, int64_t bytes);
// A new file with this text.
absl::Status WriteText(const std::string& path, const std::string& text);

}  // namespace trireme
