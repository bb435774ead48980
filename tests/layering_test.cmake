# The rules of the house that a grep can check: layers include downwards only; no file is called after nothing in
# particular; the environment is read in launch/ only; MPI's header stays in a few sources; files stay readable; what is
# used of Abseil's strings is included, because which header brings which along differs between its releases.
#   cmake -DSOURCE_DIR=<repository> -P layering_test.cmake
set(layers launch runtime models parallel kernels)  # top first: each may include itself and those after it
set(environment_files "launch/.*|parallel/mpi_environment\\.cc")
set(mpi_files "parallel/(control_plane|mpi_communicator|mpi_environment|send_queue|shared_window)\\.cc|launch/environment_collector\\.cc")
set(forbidden_names "util|utils|common|misc|helper|helpers|base")
set(max_lines 500)  # of what people read: a *_table.cc is data

set(absl_strings  # name | header
  "Str(Cat|Append)\\(|absl/strings/str_cat.h" "Str(Append)?Format\\(|absl/strings/str_format.h"
  "StrJoin\\(|absl/strings/str_join.h" "StrSplit\\(|absl/strings/str_split.h"
  "StrReplaceAll\\(|absl/strings/str_replace.h" "SimpleAto|absl/strings/numbers.h"
  "(StartsWith|EndsWith|StrContains)(IgnoreCase)?\\(|absl/strings/match.h" "string_view|absl/strings/string_view.h")

set(violations "")
# Adds every line of grep's output (file:line:text) whose file does not match `allowed`.
function(forbid why pattern allowed)
  if(NOT ARGN)
    return()
  endif()
  execute_process(COMMAND grep -nHE "${pattern}" ${ARGN} WORKING_DIRECTORY ${SOURCE_DIR} OUTPUT_VARIABLE hits
    RESULT_VARIABLE code)
  if(code GREATER 1)
    message(FATAL_ERROR "grep failed: ${code}")
  endif()
  # Brackets and semicolons mean something in CMake lists.
  string(REGEX REPLACE "[][;]" " " hits "${hits}")
  string(REGEX REPLACE "\n+" ";" hits "${hits}")
  foreach(hit IN LISTS hits)
    string(REGEX REPLACE ":.*" "" file "${hit}")
    if(hit AND NOT (allowed AND file MATCHES "^(${allowed})$"))
      string(APPEND violations "${hit}\n    ${why}\n")
    endif()
  endforeach()
  set(violations "${violations}" PARENT_SCOPE)
endfunction()

set(all "")
set(above "")
foreach(layer IN LISTS layers)
  file(GLOB_RECURSE files RELATIVE ${SOURCE_DIR} ${SOURCE_DIR}/${layer}/*.h ${SOURCE_DIR}/${layer}/*.cc
    ${SOURCE_DIR}/${layer}/*.cu ${SOURCE_DIR}/${layer}/*.cuh)
  list(APPEND all ${files})
  if(above)
    string(REPLACE ";" "|" upwards "${above}|tests|examples")
  else()
    set(upwards "tests|examples")
  endif()
  forbid("${layer}/ may not include upwards" "^[[:space:]]*#[[:space:]]*include[[:space:]]*[\"<](${upwards})/" "" ${files})
  # A path relative to the including file would slip past the line above.
  forbid("includes start at the root of the repository" "^[[:space:]]*#[[:space:]]*include[[:space:]]*\"([^/\"]+\"|\\.)" "" ${files})
  list(APPEND above ${layer})
endforeach()
if(NOT all)
  message(FATAL_ERROR "no sources under ${SOURCE_DIR}")
endif()
file(GLOB_RECURSE others RELATIVE ${SOURCE_DIR} ${SOURCE_DIR}/tests/*.h ${SOURCE_DIR}/tests/*.cc ${SOURCE_DIR}/tests/*.cmake
  ${SOURCE_DIR}/examples/*.h ${SOURCE_DIR}/examples/*.cc)

forbid("the environment is read in launch/ only; pass a parameter" "(getenv|setenv|putenv|std::environ)[[:space:]]*\\("
  "${environment_files}" ${all})
forbid("mpi.h only in the sources that talk to MPI" "^[[:space:]]*#[[:space:]]*include[[:space:]]*[\"<]mpi\\.h" "${mpi_files}" ${all})

foreach(file IN LISTS all others)
  get_filename_component(name ${file} NAME_WE)
  if(name MATCHES "^(${forbidden_names})$" OR name MATCHES "_(${forbidden_names})$")
    string(APPEND violations "${file}:1:\n    name it after what is in it\n")
  endif()
  file(READ ${SOURCE_DIR}/${file} text)
  string(REGEX MATCHALL "\n" newlines "${text}")
  string(REGEX REPLACE "//[^\n]*" "" text "${text}")
  string(REGEX REPLACE "\\.cc$" ".h" own_header ${file})
  set(own_text "")
  if(EXISTS ${SOURCE_DIR}/${own_header})
    file(READ ${SOURCE_DIR}/${own_header} own_text)
  endif()
  foreach(pair IN LISTS absl_strings)
    string(REGEX REPLACE "\\|absl/.*" "" used "${pair}")
    string(REGEX REPLACE ".*\\|(absl/)" "\\1" header "${pair}")
    if(text MATCHES "absl::${used}")
      string(FIND "${text}${own_text}" "\"${header}\"" at)
      if(at EQUAL -1)
        string(APPEND violations "${file}:1:\n    uses absl::${used} without \"${header}\"\n")
      endif()
    endif()
  endforeach()
  list(LENGTH newlines lines)
  if(lines GREATER max_lines AND NOT name MATCHES "_table$")
    string(APPEND violations "${file}:${lines}:\n    more than ${max_lines} lines: split it by noun\n")
  endif()
endforeach()

if(violations)
  message(FATAL_ERROR "\n${violations}")
endif()
list(LENGTH all count)
message(STATUS "${count} files keep the rules")
