#include "launch/mol_hardware.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/ceilings.h"
#include "kernels/status.h"
#include "models/json_file.h"

namespace trireme {
namespace {

absl::StatusOr<MolHardware> ReadProfile(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, 1 << 20));
  ASSIGN_OR_RETURN(const nlohmann::json object, ParseJsonObject(text, path));
  MolHardware hardware;
  hardware.name = path;
  for (const auto& [key, value] : object.items()) {
    const bool number = value.is_number() && value.get<double>() > 0;
    if (key == "name" && value.is_string()) {
      hardware.name = value.get<std::string>();
    } else if (key == "flops" && number) {
      hardware.flops = value.get<double>();
    } else if (key == "read_bytes_per_s" && number) {
      hardware.read_bytes = value.get<double>();
    } else if (key == "memory_bytes" && number) {
      hardware.memory_bytes = value.get<double>();
    } else if (key == "special_functions_per_s" && number) {
      hardware.special_functions = value.get<double>();
    } else if (key == "efficiency" && number && value.get<double>() <= 1) {
      hardware.efficiency = value.get<double>();
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", Quoted(key),
                       " must be one of name, flops, read_bytes_per_s, memory_bytes, "
                       "special_functions_per_s and efficiency; numbers must be positive, "
                       "efficiency at most 1"));
    }
  }
  if (hardware.flops <= 0 || hardware.read_bytes <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": needs \"flops\" and \"read_bytes_per_s\""));
  }
  return hardware;
}

}  // namespace

double MolHardware::Floor(const OpCost& cost, double special) const {
  const double seconds = std::max(cost.flops / flops, cost.bytes / read_bytes);
  return special_functions > 0 ? std::max(seconds, special / special_functions) : seconds;
}

double MolSpecialFunctions(const MolShape& shape, double pairs) {
  const auto logits = static_cast<double>(shape.logits());
  if (shape.gating == MolGating::kConcatRelu) return pairs * (logits + 1);
  return pairs * (static_cast<double>(shape.cross_hidden) + 2 * logits + 1);
}

absl::StatusOr<MolHardware> FindMolHardware(const std::string& name) {
  if (name != "this") return ReadProfile(name);
  ASSIGN_OR_RETURN(const std::unique_ptr<Device> device, OpenDevice({.name = "cpu"}));
  ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device->NewStream());
  ASSIGN_OR_RETURN(const Ceilings ceilings, MeasureCeilings(*stream));
  MolHardware hardware;
  hardware.name = absl::StrCat("this machine, ", device->spec().threads, " threads, f32");
  hardware.flops = ceilings.matmul_flops_f32;
  hardware.read_bytes = ceilings.read_bytes_per_s;
  hardware.memory_bytes = static_cast<double>(device->spec().memory_bytes);
  return hardware;
}

}  // namespace trireme
