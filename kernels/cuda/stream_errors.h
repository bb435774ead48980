// What the GPU or its driver answered to calls that enqueue: kept with the stream, whose owner
// gives it to who waits for the stream. A kernel's launch knows a stream by its handle alone.
// Internal to the CUDA module. Any thread; one stream's calls by one thread at a time.
#pragma once

#include <driver_types.h>

namespace gpu {

// False once an error is kept: what would come behind it is left out.
bool MayEnqueue(cudaStream_t stream);

// Keeps the stream's first error; success changes nothing.
void KeepError(cudaStream_t stream, cudaError_t error);
cudaError_t KeptError(cudaStream_t stream);
// Gives the error and forgets it: that of a capture, or of a stream that ends.
cudaError_t TakeError(cudaStream_t stream);

// Of a launch: KeepError, but an error that says that we asked for what no GPU does is our fault:
// CHECK. A capture that something else has spoilt says so at its end.
void CheckLaunch(cudaStream_t stream, cudaError_t error);

}  // namespace gpu
