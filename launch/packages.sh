# shellcheck shell=bash
# The distribution packages Trireme is built from, and install_packages, which installs those that are missing.
# Sourced by launch/quickstart.sh, tests/run.sh and .ci/run; changes nothing by itself. The names exist in Debian 12,
# Debian 13 and Ubuntu 24.04 alike (Ubuntu: component universe).

# "package: what for"
TRIREME_PACKAGES=(
  "g++: C++20 compiler and OpenMP"
  "cmake: build description"
  "ninja-build: build tool"
  "pkgconf: finds libraries that have no CMake files"
  "ccache: rebuilds without recompiling"
  "openmpi-bin: mpirun"
  "libopenmpi-dev: messages between ranks"
  "libdnnl-dev: oneDNN, what the matmul bench compares with"
  "libabsl-dev: Abseil, status and containers"
  "nlohmann-json3-dev: JSON"
  "libcli11-dev: command line"
  "libsentencepiece-dev: tokenizer.model"
  "libpcre2-dev: patterns of tokenizer.json"
  "libgtest-dev: tests"
  "libgmock-dev: tests"
  "libbenchmark-dev: benches"
)

# What the tests need besides.
TRIREME_TEST_PACKAGES=(
  "python3: tests that start jobs and break them"
)

# What tests/launch needs to start jobs as on a cluster; without it those tests are skipped.
TRIREME_CLUSTER_PACKAGES=(
  "slurm-wlm: jobs under Slurm"
  "munge: what Slurm's daemons know each other by"
  "iproute2: two hosts made of network namespaces"
)

say() { printf '%s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

package_installed() {
  [[ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$1" 2>/dev/null)" == ?i* ]]
}

# Runs a command as root: directly, or through sudo without a question where that is possible, or with one on a terminal.
as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  else
    sudo "$@"
  fi
}

can_be_root() {
  [[ $(id -u) == 0 ]] && return 0
  command -v sudo >/dev/null || return 1
  sudo -n true 2>/dev/null || [[ -t 0 && -t 2 ]]
}

apt_quietly() {
  as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 LC_ALL=C.UTF-8 \
    apt-get -qq -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@" </dev/null
}

# Whether apt's lists know a version of every package named.
apt_knows_all() {
  local package
  for package in "$@"; do
    [[ "$(LC_ALL=C apt-cache policy "$package" 2>/dev/null)" == *"Candidate: "[!\(]* ]] || return 1
  done
}

# Downloads and installs; refreshes apt's lists first only when they lack a package, or afterwards when they were stale.
apt_install() {
  local log=$1
  shift
  if ! apt_knows_all "$@"; then
    apt_quietly update >"$log" 2>&1 || return 1
  fi
  apt_quietly install -y --no-install-recommends "$@" >"$log" 2>&1 && return 0
  apt_quietly update >>"$log" 2>&1 && apt_quietly install -y --no-install-recommends "$@" >>"$log" 2>&1
}

# install_packages ["package: what for"...]: all arguments that are not installed. Does nothing, and calls no apt, when
# nothing is missing. Where it cannot install it says what is wanted and returns 0: the libraries may be there in another
# form, and CMake names the one that is not.
install_packages() {
  local entry missing=()
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    say "This system has no apt. Trireme needs what these Debian packages hold; if the build misses one, install it by hand:"
    printf '  %s\n' "$@" >&2
    return 0
  fi
  for entry in "$@"; do
    package_installed "${entry%%:*}" || missing+=("$entry")
  done
  ((${#missing[@]})) || return 0
  if ! can_be_root; then
    say "Missing packages, and neither root nor sudo to install them. If the build misses one, have it installed:"
    say "  apt-get install -y --no-install-recommends ${missing[*]%%:*}"
    return 0
  fi
  say "Installing ${#missing[@]} missing packages (a minute or two):"
  printf '  %s\n' "${missing[@]}" >&2
  local log
  log=$(mktemp "${TMPDIR:-/tmp}/trireme-apt.XXXXXX") || die "Cannot write to ${TMPDIR:-/tmp}."
  if ! apt_install "$log" "${missing[@]%%:*}"; then
    tail -n 20 "$log" >&2
    say "apt-get could not install the packages; the whole log is $log."
    say "(On Ubuntu they need the component universe: add-apt-repository universe.)"
    return 1
  fi
  rm -f "$log"
}
