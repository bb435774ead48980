# shellcheck shell=bash
# build_preset PRESET [--target NAME]... [-DVAR=VALUE]...: configures and builds in build/PRESET below the current folder.
# Sourced by launch/quickstart.sh and tests/run.sh. Needs say and die of launch/packages.sh.

# As many compilers as cores, but no more than memory allows: the largest sources take about 1.5 GB each.
build_jobs() {
  local cores available_kb jobs
  cores=$(nproc)
  available_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo 2>/dev/null)
  jobs=$((${available_kb:-1572864} / 1572864))
  ((jobs < 1)) && jobs=1
  echo $((jobs < cores ? jobs : cores))
}

# What the tools need to be there, where the caller's environment lacks it.
complete_environment() {
  export LC_ALL=C.UTF-8
  export PATH="${PATH:+$PATH:}/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
  # Open MPI 5 does not start without HOME; nothing is written outside of the tree.
  [[ -n "${HOME-}" ]] || export HOME="$PWD/build"
}

# ccache fails, and the compilation with it, when it has no folder to write to.
choose_ccache_folder() {
  [[ -n "${CCACHE_DIR-}" ]] && return
  local home=${HOME-}
  if [[ -z "$home" || ! -w "$home" ]] || { [[ -e "$home/.cache" ]] && [[ ! -w "$home/.cache" ]]; }; then
    export CCACHE_DIR="$PWD/build/ccache"
  fi
}

build_preset() {
  local preset=$1 targets=() definitions=() folder="build/$1" fresh=()
  shift
  while (($#)); do
    case $1 in
      --target) targets+=("$1" "$2"); shift ;;
      *) definitions+=("$1") ;;
    esac
    shift
  done
  choose_ccache_folder
  # A build folder that was copied or moved with the tree: CMake would refuse it.
  if [[ -f "$folder/CMakeCache.txt" ]] &&
    ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" "$folder/CMakeCache.txt"; then
    fresh=(--fresh)
  fi
  command -v cmake >/dev/null || die "cmake is not installed."
  mkdir -p "$folder" || die "Cannot write to $PWD/build."
  local log="$folder/configure.log"
  if ! cmake "${fresh[@]}" --preset "$preset" "${definitions[@]}" >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    return 1
  fi
  cmake --build --preset "$preset" --parallel "$(build_jobs)" "${targets[@]}"
}
