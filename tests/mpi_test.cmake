# trireme_test(NAME SOURCES... [TIMEOUT seconds]): an ordinary gtest binary, run as one process.
# trireme_mpi_test(NAME RANKS "1;2;4" SOURCES... [TIMEOUT seconds]): the same binary under mpirun, once per rank count, as
# tests NAME_np1, NAME_np2, ... Its main (tests/mpi_main.cc) all-reduces the verdict. Each test has a timeout.

# Keeps Open MPI quick and quiet with more ranks than cores, and as root; nothing is needed from the user's environment.
include(${PROJECT_SOURCE_DIR}/cmake/single_node.cmake)
find_program(TRIREME_SSH NAMES ssh rsh)
file(STRINGS /proc/self/status seccomp REGEX "^Seccomp:[ \t]*2")
set(TRIREME_MPI_ENVIRONMENT OMPI_MCA_ess_singleton_isolated=1 GTEST_COLOR=no)
foreach(setting IN LISTS TRIREME_SINGLE_NODE_SETTINGS)
  string(REGEX MATCH "^(.*)[|](.*)[|](.*)$" setting "${setting}")
  if(NOT CMAKE_MATCH_3 OR (CMAKE_MATCH_3 STREQUAL "no-remote-shell" AND NOT TRIREME_SSH) OR (CMAKE_MATCH_3 STREQUAL "seccomp" AND seccomp))
    list(APPEND TRIREME_MPI_ENVIRONMENT "${CMAKE_MATCH_1}=${CMAKE_MATCH_2}")
  endif()
endforeach()

# Without detect_stack_use_after_return: GCC 12's fake stacks do not align 64-byte vectors. What Open MPI itself leaks or synchronises out of a sanitizer's sight is listed in the suppression files.
if(TRIREME_SANITIZE MATCHES "address")
  include(CheckCXXSourceRuns)
  set(CMAKE_REQUIRED_FLAGS -fsanitize=address)
  # Some containers forbid the ptrace that the leak check lives on.
  check_cxx_source_runs("int main() { return 0; }" TRIREME_CAN_DETECT_LEAKS)
  unset(CMAKE_REQUIRED_FLAGS)
  set(leaks 0)
  if(TRIREME_CAN_DETECT_LEAKS)
    set(leaks 1)
  endif()
  # At exit Open MPI's plugins are gone, and with them the names of what leaked: tests/parallel/mpi_main.cc looks earlier.
  set(TRIREME_LSAN_OPTIONS "suppressions='${PROJECT_SOURCE_DIR}/tests/lsan.supp':print_suppressions=0")
  list(APPEND TRIREME_MPI_ENVIRONMENT
       "ASAN_OPTIONS=detect_leaks=${leaks}" "UBSAN_OPTIONS=print_stacktrace=1"
       "LSAN_OPTIONS=leak_check_at_exit=0:${TRIREME_LSAN_OPTIONS}")
elseif(TRIREME_SANITIZE MATCHES "thread")
  # Open MPI is not instrumented: how its threads synchronise is not seen, so what it copies must not be either. libgomp is not instrumented: one thread leaves nothing for it to synchronise.
  list(APPEND TRIREME_MPI_ENVIRONMENT OMP_NUM_THREADS=1
       "TSAN_OPTIONS=ignore_noninstrumented_modules=1:suppressions='${PROJECT_SOURCE_DIR}/tests/tsan.supp'")
endif()

# Ends what hangs; not a measure of speed, so it leaves room for a loaded machine.
set(TRIREME_TEST_TIMEOUT 180)
if(TRIREME_SANITIZE)
  set(TRIREME_TEST_TIMEOUT 600)
endif()

function(trireme_test name)
  cmake_parse_arguments(arg "" "TIMEOUT" "SOURCES;LIBRARIES" ${ARGN})
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT ${TRIREME_TEST_TIMEOUT})
  endif()
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE trireme_testing GTest::gtest_main ${arg_LIBRARIES})
  add_test(NAME ${name} COMMAND ${name})
  set(environment ${TRIREME_MPI_ENVIRONMENT})
  list(FILTER environment EXCLUDE REGEX "^LSAN_OPTIONS=")
  set_tests_properties(${name} PROPERTIES TIMEOUT ${arg_TIMEOUT} ENVIRONMENT "${environment}")
endfunction()

function(trireme_mpi_test name)
  cmake_parse_arguments(arg "" "TIMEOUT" "SOURCES;RANKS;LIBRARIES" ${ARGN})
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT ${TRIREME_TEST_TIMEOUT})
  endif()
  add_executable(${name} ${arg_SOURCES} ${PROJECT_SOURCE_DIR}/tests/parallel/mpi_main.cc)
  target_link_libraries(${name} PRIVATE trireme_testing MPI::MPI_CXX ${arg_LIBRARIES})
  foreach(ranks IN LISTS arg_RANKS)
    add_test(NAME ${name}_np${ranks} COMMAND ${MPIEXEC_EXECUTABLE} --timeout ${arg_TIMEOUT} -np ${ranks} $<TARGET_FILE:${name}>)
    math(EXPR limit "${arg_TIMEOUT} + 10")
    set_tests_properties(${name}_np${ranks} PROPERTIES TIMEOUT ${limit} PROCESSORS ${ranks} ENVIRONMENT "${TRIREME_MPI_ENVIRONMENT}")
  endforeach()
endfunction()
