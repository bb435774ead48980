#!/usr/bin/env bash
# Makes one relocatable folder of the program, its tests and benches, Open MPI's runtime and the shared libraries that a GPU
# node may lack: launch/bundle.sh [options] FOLDER
#   --arch LIST    GPU architectures as CMake names them, such as 90a-real or '80-real;90a-real' (default: the build's, all
#                  supported chips)
#   --no-tests     the program alone
#   --help         this text
# FOLDER must be new or empty. On the node: FOLDER/trireme ..., FOLDER/mpirun -n 2 FOLDER/trireme ..., FOLDER/gpu.sh RESULTS.
# Not in it: the driver, CUDA's own libraries and NCCL, which are found on the node (LD_LIBRARY_PATH, the system, or Python's
# nvidia packages). The node's glibc must not be older than this machine's.
set -euo pipefail

called_from=$PWD
cd -- "$(cd -- "$(PATH=/usr/bin:/bin dirname -- "${BASH_SOURCE[0]}")" && pwd -P)/.."
# shellcheck source=launch/packages.sh
source launch/packages.sh
# shellcheck source=launch/build.sh
source launch/build.sh
complete_environment

folder=''
tests=ON
definitions=()
usage() { say "$*"; exit 2; }
while (($#)); do
  case $1 in
    --arch)
      [[ ${2-} =~ ^[0-9]{2,3}[af]?(-real|-virtual)?(;[0-9]{2,3}[af]?(-real|-virtual)?)*$ ]] ||
        usage "--arch takes GPU architectures as CMake names them, such as 90a-real or '80-real;90a-real', not '${2-}'."
      definitions+=(-DCMAKE_CUDA_ARCHITECTURES="$2")
      shift
      ;;
    --no-tests) tests=OFF ;;
    --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/bundle.sh >&2; exit 0 ;;
    -*) usage "Unknown option $1; see launch/bundle.sh --help." ;;
    *)
      [[ -z "$folder" ]] || usage "It makes one folder, not $folder and $1."
      folder=$1
      ;;
  esac
  shift
done
[[ -n "$folder" ]] || usage "Which folder? See launch/bundle.sh --help."
[[ $folder == /* ]] || folder=$called_from/$folder
[[ ! -e "$folder" || -d "$folder" ]] || die "$folder is a file; the bundle is a folder."
[[ ! -d "$folder" || -z "$(ls -A "$folder")" ]] || die "$folder is not empty."
if ! mkdir -p "$folder" 2>/dev/null || [[ ! -w "$folder" ]]; then die "$folder: cannot be made, or not written to."; fi
folder=$(cd "$folder" && pwd)

install_packages "${TRIREME_PACKAGES[@]}" || exit 1
say "Building preset cuda."
build_preset cuda -DTRIREME_BUILD_TESTS=$tests "${definitions[@]}" || die "The build failed; see above."
mkdir -p "$folder"/{bin,lib,models}

copy_programs() {
  local from=build/cuda/bin name
  cp "$from/trireme" "$from/libtrireme_cuda.so" "$folder/bin/"
  if [[ $tests == ON ]]; then
    for name in gpu_primitives_test gpu_peer_sum_test attention_test elementwise_test matmul_test matmul_e4m3_test rope_test sampling_test mol_test decoder_test graph_replay_test golden_test op_bench gpu_sum_bench comm_bench trireme_faults; do
      if [[ -x "$from/$name" ]]; then cp "$from/$name" "$folder/bin/"; else say "Not built, and so not in the bundle: $name"; fi
    done
    cp -r tests/golden/. "$folder/models/"
    cp tests/gpu.sh "$folder/"
    cp tests/bench/peer_torch.py tests/bench/speed_table.py "$folder/"
  fi
  cp -r examples/models/. "$folder/models/"
  strip "$folder"/bin/*
}

# Every shared library that the programs and Open MPI's plugins need, but for those of the C++ runtime and CUDA.
copy_libraries() {
  local path
  for path in "$@"; do ldd "$path"; done | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u |
    grep -vE '/(libc|libm|libdl|librt|libpthread|libresolv|libgcc_s|libstdc\+\+|ld-linux[^/]*)\.so|/lib(cuda|cudart|cublas|cublasLt|nccl|nvidia)[^/]*\.so' |
    while read -r path; do
      [[ -e "$folder/lib/${path##*/}" ]] || cp -L "$path" "$folder/lib/"
    done
}

copy_openmpi() {
  local mpirun libraries plugins name
  mpirun=$(readlink -f "$(command -v mpirun)")
  libraries=$(dirname "$(ldconfig -p | awk '/libmpi\.so\.40 / {print $NF; exit}')")
  [[ -n "$libraries" ]] || die "Open MPI 4 is not installed."
  plugins=$(readlink -f "$libraries/openmpi")/lib
  mkdir -p "$folder/share" "$folder/etc"
  cp "$mpirun" "$folder/bin/mpirun"
  ln -sf mpirun "$folder/bin/orterun"
  cp "$(readlink -f "$(command -v orted)")" "$folder/bin/orted"
  # Debian's builds look for plugins below the prefix under the path they were installed to.
  local relative=${plugins#/usr/}
  mkdir -p "$folder/$relative/openmpi3" "$folder/lib/pmix"
  for name in "$plugins"/openmpi3/mca_*.so; do
    case $name in
      *ucx* | *ofi* | *openib* | *psm* | *memheap* | *scoll* | *spml* | *sshmem* | *mca_atomic_* | *monitoring* | *romio* | *flux* | *jsm* | *usnic* | *_crs_* | *netlink*) ;;
      *) cp "$name" "$folder/$relative/openmpi3/" ;;
    esac
  done
  cp "$libraries"/pmix2/lib/pmix/*.so "$folder/lib/pmix/"
  mkdir -p "$folder/share/openmpi"
  cp /usr/share/openmpi/help-*.txt "$folder/share/openmpi/"
  cat >"$folder/etc/openmpi-mca-params.conf" <<'CONF'
btl = self,vader,tcp
pml = ob1
osc = ^ucx,pt2pt
mtl = ^ofi,psm,psm2
btl_base_warn_component_unused = 0
plm_rsh_agent = ssh : rsh : /bin/false
CONF
  copy_libraries "$folder"/bin/mpirun "$folder"/bin/orted "$folder/$relative"/openmpi3/*.so "$folder"/lib/pmix/*.so
}

write_wrappers() {
  # Where this folder lies now; what the user has set comes first.
  cat >"$folder/env.sh" <<'ENV'
# shellcheck shell=bash
# Sourced by the programs of this folder: makes its libraries and Open MPI found wherever it lies.
bundle=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P)
export PATH="$bundle/bin:$PATH"
nvidia=$(python3 - 2>/dev/null <<'PY' || true
import glob, site, sysconfig
places = {sysconfig.get_paths()["purelib"], *site.getsitepackages()}
print(":".join(f for p in places for f in glob.glob(p + "/nvidia/*/lib")))
PY
)
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$bundle/lib${nvidia:+:$nvidia}"
export OPAL_PREFIX="$bundle" OPAL_SYSCONFDIR="$bundle/etc" PMIX_INSTALL_PREFIX="$bundle"
export PMIX_MCA_mca_base_component_path="$bundle/lib/pmix"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
ENV
  local name
  for name in trireme mpirun; do
    printf '#!/usr/bin/env bash\nsource "$(dirname -- "$(readlink -f -- "$0")")/env.sh"\nexec "$bundle/bin/%s" "$@"\n' "$name" >"$folder/$name"
    chmod +x "$folder/$name"
  done
}

copy_programs
copy_libraries "$folder"/bin/*
copy_openmpi
strip --strip-unneeded "$folder"/lib/*.so* 2>/dev/null || true
find "$folder" -path '*openmpi3*' -name '*.so' -exec strip --strip-unneeded {} +
write_wrappers
say "Made $folder: $(du -sh "$folder" | cut -f1)."
