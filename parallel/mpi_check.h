// MPI_CHECK(MPI_Xxx(...)): MPI's errors are not recoverable, so one ends the job with the call and
// MPI's own text. Usable without mpi.h. Any thread.
#pragma once

namespace trireme::mpi_internal {
[[noreturn]] void FatalMpiError(int code, const char* call, const char* file, int line);
// MPI_Abort, where MPI is up. May hang, with what MPI hangs in.
void AbortMpi(int exit_code);
}  // namespace trireme::mpi_internal

// MPI_SUCCESS is 0 by the standard.
#define MPI_CHECK(call)                                                             \
  do {                                                                              \
    if (const int mpi_code_ = (call); mpi_code_ != 0) [[unlikely]] {                \
      ::trireme::mpi_internal::FatalMpiError(mpi_code_, #call, __FILE__, __LINE__); \
    }                                                                               \
  } while (false)
