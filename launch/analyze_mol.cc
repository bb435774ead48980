#include "launch/analyze_mol.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "launch/mol_hardware.h"
#include "launch/retrieve.h"
#include "launch/session.h"
#include "models/mol_config.h"

namespace trireme {
namespace {

using Json = nlohmann::ordered_json;

// FLOPs that one item's side takes when it is not cached.
double ItemFlops(const MolConfig& config) {
  const auto n = [](int64_t x) { return static_cast<double>(x); };
  const double out = n(config.item_components * config.component_dim), in = n(config.item_dim);
  double flops = config.item_hidden > 0
                     ? 4.0 * in * n(config.item_hidden) + 2.0 * n(config.item_hidden) * out
                     : 2.0 * in * out;
  if (config.gating == MolGating::kConcatRelu) return flops + 2.0 * in * n(config.gating_hidden);
  return flops + 2.0 * n(config.gating_item_hidden) * (in + n(config.shape().logits()));
}

struct Row {
  const char* what;
  double flops, bytes;
  double special = 0;  // exponentials and the like
};

class Analysis {
 public:
  Analysis(const AnalyzeMolFlags& flags, const MolConfig& config, MolStorage storage,
           const MolHardware& hardware)
      : flags_(flags), config_(config), storage_(storage), hardware_(hardware) {}

  std::string Text() const {
    const MolShape shape = config_.shape();
    std::string out = absl::StrFormat(
        "%s: %.3g FLOP/s, %.3g byte/s, balance %.0f FLOP/byte\n"
        "%d items, %s: %.2f GB of components and gates%s; %d logits a pair\n\n"
        "%-6s %-30s %11s %11s %10s %8s %11s\n",
        hardware_.name, hardware_.flops, hardware_.read_bytes,
        hardware_.flops / hardware_.read_bytes, flags_.items, flags_.storage, TableBytes() * 1e-9,
        Fits(), shape.logits(), "batch", "search", "FLOP", "bytes", "FLOP/byte", "bound",
        "floor ms");
    for (const int64_t batch : flags_.batch) {
      for (const Row& row : Rows(batch)) {
        absl::StrAppendFormat(&out, "%-6d %-30s %11.3g %11.3g %10.1f %8s %11.3f\n", batch, row.what,
                              row.flops, row.bytes, row.flops / row.bytes, Bound(row),
                              Floor(row) * 1e3);
      }
    }
    return out;
  }

  std::string JsonText() const {
    Json out;
    out["hardware"] = {{"name", hardware_.name},
                       {"flops", hardware_.flops},
                       {"read_bytes_per_s", hardware_.read_bytes}};
    out["items"] = flags_.items;
    out["storage"] = flags_.storage;
    out["table_bytes"] = TableBytes();
    out["rows"] = Json::array();
    for (const int64_t batch : flags_.batch) {
      for (const Row& row : Rows(batch)) {
        out["rows"].push_back({{"batch", batch},
                               {"search", row.what},
                               {"flops", row.flops},
                               {"bytes", row.bytes},
                               {"flops_per_byte", row.flops / row.bytes},
                               {"bound", Bound(row)},
                               {"floor_s", Floor(row)}});
      }
    }
    return out.dump(2) + "\n";
  }

 private:
  double TableBytes() const {
    return static_cast<double>(MolSlotBytes(config_.shape(), storage_, false)) *
           static_cast<double>(flags_.items);
  }
  const char* Fits() const {
    return hardware_.memory_bytes > 0 && TableBytes() > hardware_.memory_bytes
               ? " (more than its memory)"
               : "";
  }
  std::vector<Row> Rows(int64_t batch) const {
    const MolShape shape = config_.shape();
    const double items = static_cast<double>(flags_.items), b = static_cast<double>(batch);
    const double element = storage_ == MolStorage::kF32 ? 4 : storage_ == MolStorage::kBF16 ? 2 : 1;
    const double d = static_cast<double>(shape.component_dim);
    const OpCost pairs = MolScoreCost(shape, storage_, flags_.items, flags_.items * batch);
    const double dots = 2.0 * static_cast<double>(shape.logits()) * d * items * b;
    const double special = MolSpecialFunctions(shape, items * b);
    const double raw_bytes = static_cast<double>(config_.item_dim) * std::max(element, 2.0) * items;
    return {{"dot product, one vector of d", 2.0 * d * items * b, d * element * items},
            {"MoL, item side cached", pairs.flops, pairs.bytes, special},
            {"MoL, all pairs pruned", dots, pairs.bytes},
            {"MoL, items projected each time", pairs.flops + ItemFlops(config_) * items, raw_bytes,
             special}};
  }
  const char* Bound(const Row& row) const {
    if (Floor(row) > hardware_.Floor({row.flops, row.bytes}, 0)) return "special";
    return row.flops / hardware_.flops > row.bytes / hardware_.read_bytes ? "FLOPs" : "bytes";
  }
  double Floor(const Row& row) const {
    return hardware_.Floor({row.flops, row.bytes}, row.special);
  }

  const AnalyzeMolFlags& flags_;
  const MolConfig& config_;
  const MolStorage storage_;
  const MolHardware& hardware_;
};

absl::Status Analyze(ControlPlane& control, const AnalyzeMolFlags& flags) {
  ASSIGN_OR_RETURN(const MolStorage storage, ParseMolStorage(flags.storage));
  ASSIGN_OR_RETURN(const MolConfig config, LoadMolConfig(flags.model_dir));
  ASSIGN_OR_RETURN(const MolHardware hardware, FindMolHardware(flags.hardware));
  const Analysis analysis(flags, config, storage, hardware);
  return WriteOut(control, flags.json ? analysis.JsonText() : analysis.Text());
}

}  // namespace

CLI::App* AddAnalyzeMol(CLI::App& app, AnalyzeMolFlags* flags) {
  CLI::App* analyze = app.add_subcommand("analyze", "FLOPs, bytes and floor of a workload");
  analyze->require_subcommand(1);
  CLI::App* command = analyze->add_subcommand(
      "mol", "Mixture-of-Logits search against a plain dot product, on a machine's roofline");
  command->add_option("--model", flags->model_dir, "Folder with the head's config.json")
      ->required();
  command->add_option("--items", flags->items, "Items of the table")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command->add_option("--batch", flags->batch, "Queries searched together (several: a sweep)")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  command->add_option("--storage", flags->storage, "How items are held: f32, bf16 or int8")
      ->capture_default_str();
  command->add_option("--hardware", flags->hardware, kMolHardwareHelp)->capture_default_str();
  command->add_flag("--json", flags->json, "Print a JSON object");
  return command;
}

absl::Status RunAnalyzeMol(ControlPlane& control, const AnalyzeMolFlags& flags) {
  return control.Agree(control.rank() == 0 ? Analyze(control, flags) : absl::OkStatus());
}

}  // namespace trireme
