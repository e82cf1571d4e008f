// A CUDA device that accepts every call and computes nothing: what its parts share.
//
// It knows which memory exists, which stream is being captured, and what was asked of it, in order. Its memory reads as zeros, and only the
// device may touch it: a host that follows a device pointer crashes, as it would on a GPU. Nothing here takes device time.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

// The GPU that is played, from FAKE_* environment variables. See gpus.py.
struct Gpu {
  std::string name;
  int count, capability, multiprocessors;
  size_t memory, shared_memory_optin, shared_memory_per_multiprocessor;
};
const Gpu &gpu();

// One mutex for all state: calls are short.
extern std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

// The record of calls, which Python reads: "<kind> <detail>", see fake_device.py. Off until fake_record(1).
void note(const char *kind, const std::string &detail = "");
// A call that only has a generated stand-in. Always recorded.
extern "C" void fake_note_unknown(const char *name);

cudaError_t fail(cudaError_t error);

// Memory.
enum class Place { device, pinned, pageable };
Place place_of(const void *address);

// Streams and capture. `work` is a launch, copy, memset or collective on a stream: it goes into the graph if the stream is being captured, and
// into the record otherwise. It fails if the work is not allowed in a capture.
cudaError_t work(void *stream, const char *kind, const std::string &detail, bool allowed_in_capture = true);
// For calls that CUDA calls unsafe while a stream is being captured (cudaMalloc, synchronizing, loading a module).
cudaError_t unsafe(const char *what);

// Launches, by the runtime or the driver.
cudaError_t launch(const std::string &name, dim3 grid, dim3 block, size_t shared_memory, void *stream);
int attribute(int which);

}  // namespace fake
