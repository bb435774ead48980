// trireme make-checkpoint: random weights in the real shapes of well-known models, for benches.

#include <unistd.h>

#include <cstdio>

#include "kernels/status.h"
#include "launch/session.h"
#include "models/checkpoint_maker.h"

namespace trireme {
namespace {

absl::Status Make(const MakeCheckpointFlags& flags) {
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
  return WriteOut(flags.out_dir + "\n");
}

}  // namespace

absl::Status RunMakeCheckpoint(ControlPlane& control, const MakeCheckpointFlags& flags) {
  return control.Agree(control.rank() == 0 ? Make(flags) : absl::OkStatus());
}

}  // namespace trireme
