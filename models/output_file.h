// A file that gets its name when it is whole: until then it is `name.partial`, so that neither a
// full disk nor the end of the process leaves half of one under the name that was asked for. When
// the process is interrupted, that goes too (models/unfinished_path.h). One thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/unfinished_path.h"

namespace trireme {

class OutputFile {
 public:
  enum class Sync {
    kNo,
    kYes,  // Finish returns when the file and its name are on the disk
  };
  // A symbolic link is followed: what it names is replaced and the link stays. What is there and is
  // no regular file (a pipe, /dev/stdout, a device) is written to as it is; opening a named pipe
  // waits for its reader. InvalidArgument for a directory; every error names `path`.
  static absl::StatusOr<std::unique_ptr<OutputFile>> Create(const std::string& path,
                                                            Sync sync = Sync::kNo);
  // Without Finish nothing is left.
  ~OutputFile();
  absl::Status Write(const void* data, int64_t bytes);
  // The last call: everything is written, and the file gets its name.
  absl::Status Finish();

 private:
  OutputFile() = default;
  absl::Status CloseAndRename();
  std::string path_;     // as the caller named it, for error lines
  std::string target_;   // the regular file to be
  std::string partial_;  // empty when written to as it is
  UnfinishedPath unfinished_;
  Sync sync_ = Sync::kNo;
  int fd_ = -1;
};

}  // namespace trireme
