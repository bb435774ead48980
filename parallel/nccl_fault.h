// Why the NCCL of a host will not do, in one wording: of the module that opens it
// (parallel/nccl/) and of the doctor, who looks before (launch/doctor_checks.h). Inline, as the
// module holds hardly any code of this folder.
#pragma once

#include <optional>
#include <string>

#include "absl/strings/str_cat.h"

namespace trireme {

inline constexpr int kNcclMajor = 2;  // of the interface that this program calls

struct NcclFault {
  const char* name;  // under which docs/operations.md explains it
  std::string text;
  std::string Line() const { return absl::StrCat(text, " (", name, ")"); }
};

// `error` is dlerror()'s, of libnccl.so.2.
inline NcclFault NcclIsMissing(const std::string& error) {
  return {"no-nccl", absl::StrCat("NCCL is missing (", error,
                                  "), and ranks on GPUs talk through it: install libnccl2, put its "
                                  "folder on LD_LIBRARY_PATH, or give --collectives host")};
}

// `version` in NCCL's code: 22809 is 2.28.9; before 2.9, 2804 was 2.8.4. `lacks` is a function that
// was looked for in vain. None when it will do.
inline std::optional<NcclFault> NcclDoesNotFit(int version, const std::string& lacks = "") {
  const bool old_code = version < 10000;
  const int major = version / (old_code ? 1000 : 10000);
  const int minor = version / 100 % (old_code ? 10 : 100);
  if (major == kNcclMajor && lacks.empty()) return std::nullopt;
  return NcclFault{
      "other-nccl",
      absl::StrCat("NCCL ", major, ".", minor, " is found", lacks.empty() ? "" : ", without ",
                   lacks, ", and this program needs ", kNcclMajor,
                   ".x: install libnccl2, correct LD_LIBRARY_PATH, or give "
                   "--collectives host")};
}

}  // namespace trireme
