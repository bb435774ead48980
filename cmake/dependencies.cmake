# Everything comes from the distribution's packages; launch/quickstart.sh installs them.
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)
set(MPI_CXX_SKIP_MPICXX ON)
find_package(MPI REQUIRED COMPONENTS CXX)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)

# SentencePiece: Ubuntu's and Debian 13's pkg-config file asks for a protobuf that its package does not bring.
find_library(SENTENCEPIECE_LIBRARY sentencepiece REQUIRED)
find_path(SENTENCEPIECE_INCLUDE_DIR sentencepiece_processor.h REQUIRED)
add_library(sentencepiece INTERFACE)
target_link_libraries(sentencepiece INTERFACE ${SENTENCEPIECE_LIBRARY})
target_include_directories(sentencepiece SYSTEM INTERFACE ${SENTENCEPIECE_INCLUDE_DIR})

# Abseil, statically: its shared form is 64 libraries and 4 ms of start-up. The CUDA module needs that form, though: the
# archives are not position-independent.
find_package(absl REQUIRED)
get_property(_targets DIRECTORY PROPERTY IMPORTED_TARGETS)
foreach(_target IN LISTS _targets)
  if(_target MATCHES "^absl::" AND NOT TRIREME_CUDA)
    get_target_property(_location ${_target} IMPORTED_LOCATION_NONE)
    if(_location MATCHES "\\.so")
      string(REGEX REPLACE "\\.so[.0-9]*$" ".a" _archive "${_location}")
      if(EXISTS "${_archive}")
        set_target_properties(${_target} PROPERTIES IMPORTED_LOCATION_NONE "${_archive}" IMPORTED_SONAME_NONE ""
                                                    IMPORTED_NO_SONAME_NONE TRUE)
      endif()
    endif()
  endif()
endforeach()
