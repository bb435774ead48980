// Settings that Open MPI and NCCL take from the environment only. The one place outside launch/
// that touches it, because MPI has no other interface for them and every program that starts a
// ControlPlane needs them, tests and benches included.
#pragma once

namespace trireme {

// Sets what makes Open MPI start in 22 ms instead of 225 and keeps it usable with more ranks than
// cores; whatever the user has set already wins (so OMPI_MCA_pml=ucx still selects UCX). Call
// before MPI_Init, from one thread, before other threads are started (setenv is not thread-safe).
// Other MPI implementations ignore it.
void PrepareMpiEnvironment();

// Makes NCCL take the ranks on one GPU for hosts of their own, which it then joins over sockets:
// without it NCCL refuses. Call before the process's first NCCL call.
void LetNcclShareGpus(int rank);

}  // namespace trireme
