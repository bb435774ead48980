// TP x PP x DP coordinates of a rank, the pieces of a dimension a rank holds, and the layers of a
// stage. Pure functions: no MPI, no device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace trireme {

// rank = (dp * pp_size + pp) * tp_size + tp, so that TP peers are neighbours and share a node.
struct Topology {
  int tp_size = 1;
  int pp_size = 1;
  int dp_size = 1;

  int world_size() const { return tp_size * pp_size * dp_size; }
  int TpIndex(int rank) const { return rank % tp_size; }
  int PpIndex(int rank) const { return rank / tp_size % pp_size; }
  int DpIndex(int rank) const { return rank / (tp_size * pp_size); }
  int RankOf(int dp, int pp, int tp) const { return (dp * pp_size + pp) * tp_size + tp; }
  bool operator==(const Topology&) const = default;
};

// Fills in what the user left at 0 so that the product is world_size: --tp takes what --pp and --dp
// leave, limited to divisors of `attention_heads` that `tp_fits` (if given); what then remains goes
// to --pp (limited to `layers`), then --dp. InvalidArgument names the flags and the world size when
// they do not fit.
absl::StatusOr<Topology> ResolveTopology(int tp, int pp, int dp, int world_size,
                                         int64_t attention_heads, int64_t layers,
                                         const std::function<bool(int tp)>& tp_fits = nullptr);

// Half-open range [begin, end).
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

// Piece `part` of `parts` nearly equal contiguous pieces of [0, n), cut at multiples of `unit`.
// Pieces cover [0, n) without overlap; the first ones are the larger ones, the last ones may be
// empty or short.
Range PieceOf(int64_t n, int parts, int part, int64_t unit = 1);

// Contiguous layer ranges of the stages that minimise the most expensive stage, exactly (dynamic
// program). layer_costs has one entry a layer; first_extra is added to stage 0 (embedding),
// last_extra to the last stage (final norm, head). Every stage gets at least one layer. REQUIRES:
// layer_costs.size() >= stages >= 1.
std::vector<Range> SplitLayers(const std::vector<double>& layer_costs, int stages,
                               double first_extra, double last_extra);

}  // namespace trireme
