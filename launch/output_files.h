// Files that a command writes: looked at before the work that fills them.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace trireme {

// A file that a flag names; an empty path: it was not given.
struct NamedFile {
  std::string flag, path;
};

// Whether all of `outputs` can be written without losing anything that is read: an output is no
// input, no file of the checkpoint in `model_dir` ("" = none) and no other output. Creates nothing.
// Unavailable or InvalidArgument names flag and file. For the rank that opens them.
absl::Status CheckOutputFiles(const std::vector<NamedFile>& outputs,
                              const std::vector<NamedFile>& inputs, const std::string& model_dir);

}  // namespace trireme
