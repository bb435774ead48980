// trireme make-checkpoint: random weights in the real shapes of well-known models and
// Mixture-of-Logits heads, for benches.

#include <unistd.h>

#include <cstdio>

#include "kernels/status.h"
#include "launch/session.h"
#include "models/checkpoint_maker.h"
#include "models/mol_checkpoint.h"

namespace trireme {
namespace {

absl::Status MakeMol(ControlPlane& control, const MakeCheckpointFlags& flags) {
  const absl::StatusOr<MolConfig> config = MolRecipeConfig(flags.like);
  if (!config.ok()) return UsageError(std::string(config.status().message()));
  if (flags.layers > 0) return UsageError("--layers: a Mixture-of-Logits head has none");
  RETURN_IF_ERROR(MakeMolCheckpoint(*config, flags.out_dir, flags.seed));
  return WriteOut(control, flags.out_dir + "\n");
}

absl::Status Make(ControlPlane& control, const MakeCheckpointFlags& flags) {
  if (flags.like.rfind("mol-", 0) == 0) return MakeMol(control, flags);
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseDType(flags.dtype));
  if (const auto known = CheckpointRecipeConfig(flags.like); !known.ok()) {
    return UsageError(std::string(known.status().message()));
  }
  CheckpointRecipe recipe;
  recipe.like = flags.like;
  recipe.layers = flags.layers;
  recipe.dtype = dtype.value_or(DType::kBF16);
  recipe.out_dir = flags.out_dir;
  recipe.seed = flags.seed;
  const bool terminal = isatty(STDERR_FILENO) != 0;
  RETURN_IF_ERROR(MakeCheckpoint(recipe, [&](int64_t done, int64_t total) {
    if (!terminal) return;
    std::fprintf(stderr, "\rwriting %s of %s%s", HumanBytes(done).c_str(),
                 HumanBytes(total).c_str(), done == total ? "\n" : "   ");
    std::fflush(stderr);
  }));
  return WriteOut(control, flags.out_dir + "\n");
}

}  // namespace

absl::Status RunMakeCheckpoint(ControlPlane& control, const MakeCheckpointFlags& flags) {
  return control.Agree(control.rank() == 0 ? Make(control, flags) : absl::OkStatus());
}

}  // namespace trireme
