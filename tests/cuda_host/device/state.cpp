// The GPU that is played, the record of calls, and the functions by which Python reads it.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "device.h"

namespace fake {

std::recursive_mutex mutex;

namespace {
std::atomic<bool> recording{false};
std::vector<std::string> record;
std::set<std::string> unknown;
thread_local cudaError_t last_error = cudaSuccess;

size_t number(const char *name, size_t otherwise) {
  const char *value = getenv(name);
  return value ? strtoull(value, nullptr, 10) : otherwise;
}
}  // namespace

const Gpu &gpu() {
  static const Gpu played = {
      getenv("FAKE_GPU_NAME") ? getenv("FAKE_GPU_NAME") : "Fake GPU",
      (int)number("FAKE_GPU_COUNT", 1),
      (int)number("FAKE_GPU_CAPABILITY", 86),
      (int)number("FAKE_GPU_MULTIPROCESSORS", 80),
      number("FAKE_GPU_MEMORY", 24ull << 30),
      number("FAKE_GPU_SHARED_MEMORY_OPTIN", 101376),
      number("FAKE_GPU_SHARED_MEMORY", 102400),
  };
  return played;
}

void note(const char *kind, const std::string &detail) {
  if (!recording.load(std::memory_order_relaxed)) return;
  Lock lock(mutex);
  record.push_back(detail.empty() ? kind : std::string(kind) + " " + detail);
}

extern "C" void fake_note_unknown(const char *name) {
  Lock lock(mutex);
  unknown.insert(name);
}

cudaError_t fail(cudaError_t error) { return last_error = error; }

}  // namespace fake

using namespace fake;

EXPORT void fake_record(int on) {
  Lock lock(mutex);
  if (on) record.clear();
  recording = on != 0;
}
EXPORT int fake_record_size() { return (int)record.size(); }
EXPORT const char *fake_record_at(int i) { return record[i].c_str(); }
EXPORT int fake_unknown_size() { return (int)unknown.size(); }
EXPORT const char *fake_unknown_at(int i) { return std::next(unknown.begin(), i)->c_str(); }

EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char *cudaGetErrorName(cudaError_t error) {
  static thread_local char name[32];
  snprintf(name, sizeof name, "cudaError %d", (int)error);
  return name;
}
EXPORT const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureWrongThread: return "attempt to terminate a thread-local capture sequence from another thread";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: return "error of the fake device";
  }
}
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = cudaGetErrorString((cudaError_t)error);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
  *text = cudaGetErrorName((cudaError_t)error);
  return CUDA_SUCCESS;
}
