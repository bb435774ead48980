// The machine that trireme analyze and tune reckon with: this one, measured, or a profile.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "kernels/mol_ops.h"

namespace trireme {

// A machine's ceilings and its memory.
struct MolHardware {
  std::string name;
  double flops = 0;         // multiply-adds counted as two, a second
  double read_bytes = 0;    // of memory, a second
  double memory_bytes = 0;  // 0 = unknown
  // Exponentials and the like, a second; 0 = they bind nowhere (a CPU's are multiply-adds). On GPUs
  // they have units of their own, 16 results a clock and multiprocessor on those of 9.0.
  double special_functions = 0;
  // The share of the floor's speed that an exact search reaches; 0 = unknown. The floor is the
  // longest of the times for the FLOPs, the bytes and the special functions.
  double efficiency = 0;

  double Floor(const OpCost& cost, double special) const;  // seconds
};

// Special functions that scoring so many pairs takes: a tanh for each SiLU, of the hidden units and
// of the gate, an exponential for each weight, and a division.
double MolSpecialFunctions(const MolShape& shape, double pairs);

inline constexpr char kMolHardwareHelp[] =
    "this (measured now), or a JSON file with flops, read_bytes_per_s and, optionally, name, "
    "memory_bytes, special_functions_per_s (a GPU's exponentials) and efficiency (the share of the "
    "roofline that a search reaches)";

// "this" measures this process's CPU (all but the efficiency); else a file as described above.
absl::StatusOr<MolHardware> FindMolHardware(const std::string& name);

}  // namespace trireme
