#!/usr/bin/env bash
# From nothing to a running model: installs what is missing, builds, and lets a small model tell a story on four ranks
# (tensor parallel 2 x pipeline parallel 2). Debian 12 and 13, Ubuntu 24.04; root or sudo to install packages. A second
# run installs nothing and builds only what changed.
set -euo pipefail

cd -- "$(cd -- "$(PATH=/usr/bin:/bin dirname -- "${BASH_SOURCE[0]}")" && pwd -P)/.."
# shellcheck source=launch/packages.sh
source launch/packages.sh
# shellcheck source=launch/build.sh
source launch/build.sh
# shellcheck source=launch/mpi_env.sh
source launch/mpi_env.sh
complete_environment

if (($#)); then
  say "usage: launch/quickstart.sh"
  say "Installs missing packages, builds build/cpu/bin/trireme and runs examples/models/stories260K on 4 ranks."
  [[ $1 == --help || $1 == -h ]] && exit 0
  exit 2
fi

install_packages "${TRIREME_PACKAGES[@]}" || exit 1
say "Building build/cpu/bin/trireme with $(build_jobs) jobs."
build_preset cpu --target trireme >&2 || die "The build failed; see above."

command -v mpirun >/dev/null || die "mpirun is not installed (Debian package openmpi-bin)."
mpi_variables_before=$(compgen -e)
single_node_mpi_environment
command=(mpirun -n 4 build/cpu/bin/trireme generate examples/models/stories260K --tp 2 --pp 2
  --prompt "Once upon a time" --max-tokens 200)
say "Running: $(printf '%q ' "${command[@]}")"
say ""
status=0
"${command[@]}" </dev/null || status=$?

say ""
if ((status)); then
  say "The run failed with exit status $status."
else
  say "To repeat it, in $PWD:"
fi
for variable in $(comm -13 <(sort <<<"$mpi_variables_before") <(compgen -e | sort)); do
  case $variable in
    OMPI_* | PRTE_* | OMP_*) say "  export $variable=$(printf '%q' "${!variable}")" ;;
  esac
done
say "  $(printf '%q ' "${command[@]}")"
exit "$status"
