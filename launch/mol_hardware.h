// The machine that trireme analyze and tune reckon with: this one, measured, or a profile.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "kernels/mol_ops.h"

namespace trireme {

// A machine's two ceilings and its memory.
struct MolHardware {
  std::string name;
  double flops = 0;         // multiply-adds counted as two, a second
  double read_bytes = 0;    // of memory, a second
  double memory_bytes = 0;  // 0 = unknown
  // The share of the floor's speed that an exact search reaches; 0 = unknown. The floor is the
  // longer of the time for the FLOPs and the time for the bytes.
  double efficiency = 0;

  double Floor(const OpCost& cost) const;  // seconds
};

inline constexpr char kMolHardwareHelp[] =
    "this (measured now), or a JSON file with flops, read_bytes_per_s and, optionally, name, "
    "memory_bytes and efficiency (the share of the roofline that a search reaches)";

// "this" measures this process's CPU (all but the efficiency); else a file as described above.
absl::StatusOr<MolHardware> FindMolHardware(const std::string& name);

}  // namespace trireme
