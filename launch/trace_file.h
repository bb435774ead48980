// --trace FILE: the spans of all ranks in one Chrome trace.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "parallel/control_plane.h"

namespace trireme {

// Starts tracing on this rank when `path` is not empty.
void BeginTraceFile(const std::string& path);
// Gathers all ranks' spans, brings their clocks together and writes the file on rank 0. Does
// nothing for an empty path. Collective, with the same status everywhere.
absl::Status EndTraceFile(ControlPlane& control, const std::string& path);

}  // namespace trireme
