#!/usr/bin/env bash
# Installs into a scratch folder, checks what libtrireme.so exports, and builds the C example against it the two ways a
# user would, pkg-config and find_package.
#   install_test.sh BUILD_DIR SOURCE_DIR MODEL_DIR
set -euo pipefail
build=$1 source=$2 model=$3
prefix=$(mktemp -d "${TMPDIR:-/tmp}/trireme-install.XXXXXX")
trap 'rm -rf "$prefix"' EXIT

fail() { echo "FAILED: $*" >&2; exit 1; }

cmake --install "$build" --prefix "$prefix/usr" >/dev/null
library=$(find "$prefix/usr" -name libtrireme.so)
[[ -n "$library" ]] || fail "libtrireme.so is not installed"
libdir=$(dirname "$library")

# The list is the ABI: a function added is added there, and none is taken away.
nm -D --defined-only --format=posix "$library" | awk '$2 != "A" {sub(/@.*/, "", $1); print $1}' | LC_ALL=C sort >"$prefix/symbols"
diff "$source/tests/runtime/trireme.symbols" "$prefix/symbols" || fail "libtrireme.so exports something else than trireme.symbols"
# The header declares exactly these.
grep -oE 'trireme_[a-z_]+\(' "$prefix/usr/include/trireme.h" | tr -d '(' | LC_ALL=C sort -u | grep -v '^trireme_callback$' >"$prefix/declared"
diff "$source/tests/runtime/trireme.symbols" "$prefix/declared" || fail "trireme.h declares something else than trireme.symbols"

export LD_LIBRARY_PATH="$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
say() { "$1" "$model" "Once upon a time" || fail "$1 does not run"; }

# As docs/embedding.md has it. The .pc file used to know the prefix of the configuration only.
PKG_CONFIG_PATH="$libdir/pkgconfig" pkg-config --cflags --libs trireme >"$prefix/flags"
for flag in $(cat "$prefix/flags"); do
  case $flag in
    -[IL]*) [[ "$(realpath "${flag:2}")" == "$prefix/usr/"* ]] || fail "trireme.pc: $flag is not below $prefix/usr" ;;
  esac
done
# shellcheck disable=SC2046
cc -std=c99 -Wall -Werror "$source/examples/generate.c" $(cat "$prefix/flags") -o "$prefix/by_pkg_config"
say "$prefix/by_pkg_config" >"$prefix/text"
grep -q "Once\|there was\|a little" "$prefix/text" || fail "no story: $(cat "$prefix/text")"

mkdir "$prefix/project"
cat >"$prefix/project/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.20)
project(embedder C)
find_package(Trireme REQUIRED)
add_executable(by_cmake ${EXAMPLE})
target_link_libraries(by_cmake PRIVATE Trireme::trireme)
END
cmake -G Ninja -S "$prefix/project" -B "$prefix/project/build" -DEXAMPLE="$source/examples/generate.c" \
  -DCMAKE_PREFIX_PATH="$prefix/usr" >/dev/null
cmake --build "$prefix/project/build" >/dev/null
say "$prefix/project/build/by_cmake" | diff - "$prefix/text" || fail "the two programs differ"
echo "installed, linked and run"
