// Device memory, pinned memory and copies. Device memory is address space without pages: it costs nothing and reads as zeros.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "device.h"

namespace fake {
namespace {

using Ranges = std::map<uintptr_t, size_t>;
constexpr size_t PAGE = 4096;
// What a context of the driver takes on a real GPU, about.
constexpr size_t CONTEXT = 450ull << 20;
// The real allocator hands out whole pages of this size.
constexpr size_t GRANULE = 2ull << 20;

Ranges device_ranges, pinned_ranges;
size_t used = 0;

bool contains(const Ranges &ranges, const void *address) {
  auto after = ranges.upper_bound((uintptr_t)address);
  if (after == ranges.begin()) return false;
  --after;
  return (uintptr_t)address < after->first + after->second;
}

size_t rounded(size_t bytes) { return (bytes + GRANULE - 1) / GRANULE * GRANULE; }

cudaError_t allocate(void **pointer, size_t bytes) {
  Lock lock(mutex);
  size_t taken = rounded(bytes);
  *pointer = nullptr;
  if (used + taken + CONTEXT > gpu().memory) return fail(cudaErrorMemoryAllocation);
  void *range = mmap(nullptr, taken, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  device_ranges[(uintptr_t)range] = taken;
  used += taken;
  note("malloc", std::to_string(taken));
  *pointer = range;
  return cudaSuccess;
}

cudaError_t release(void *pointer) {
  if (!pointer) return cudaSuccess;
  Lock lock(mutex);
  auto range = device_ranges.find((uintptr_t)pointer);
  if (range == device_ranges.end()) return fail(cudaErrorInvalidValue);
  munmap(pointer, range->second);
  used -= range->second;
  note("free", std::to_string(range->second));
  device_ranges.erase(range);
  return cudaSuccess;
}

// `waits`: a call that returns only when the copy is done.
cudaError_t copy(void *to, const void *from, size_t bytes, void *stream, bool waits) {
  Place target, source;
  {
    Lock lock(mutex);
    target = place_of(to);
    source = place_of(from);
  }
  bool pageable = target == Place::pageable || source == Place::pageable;
  std::string kind = target == Place::device  ? source == Place::device   ? "D2D"
                                                : source == Place::pinned ? "H2D pinned"
                                                                          : "H2D pageable"
                     : source == Place::device ? target == Place::pinned ? "D2H pinned" : "D2H pageable"
                                               : "H2H";
  cudaError_t error = work(stream, "copy", kind + " " + std::to_string(bytes), !pageable);
  if (error != cudaSuccess) return error;
  if (waits) note("synchronize", "copy");
  if (target == Place::device) return cudaSuccess;
  if (source == Place::device) memset(to, 0, bytes);
  else memcpy(to, from, bytes);
  return cudaSuccess;
}

}  // namespace

Place place_of(const void *address) {
  return contains(device_ranges, address)   ? Place::device
         : contains(pinned_ranges, address) ? Place::pinned
                                            : Place::pageable;
}

}  // namespace fake

using namespace fake;

EXPORT size_t fake_used_memory() { return used; }

EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  Lock lock(mutex);
  *total = gpu().memory;
  *free_bytes = used + CONTEXT < *total ? *total - used - CONTEXT : 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  cudaError_t error = unsafe("cudaMalloc");
  return error == cudaSuccess ? allocate(pointer, bytes) : error;
}
EXPORT cudaError_t cudaFree(void *pointer) {
  if (!pointer) return cudaSuccess;
  cudaError_t error = unsafe("cudaFree");
  return error == cudaSuccess ? release(pointer) : error;
}
EXPORT cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t) { return allocate(pointer, bytes); }
EXPORT cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return release(pointer); }

EXPORT cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
  cudaError_t error = unsafe("cudaHostAlloc");
  if (error != cudaSuccess) return error;
  Lock lock(mutex);
  *pointer = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
  pinned_ranges[(uintptr_t)*pointer] = bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void *pointer) {
  Lock lock(mutex);
  pinned_ranges.erase((uintptr_t)pointer);
  free(pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned) {
  Lock lock(mutex);
  pinned_ranges[(uintptr_t)pointer] = bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void *pointer) {
  Lock lock(mutex);
  pinned_ranges.erase((uintptr_t)pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
  Lock lock(mutex);
  memset(attributes, 0, sizeof *attributes);
  Place place = place_of(address);
  attributes->type = place == Place::device   ? cudaMemoryTypeDevice
                     : place == Place::pinned ? cudaMemoryTypeHost
                                              : cudaMemoryTypeUnregistered;
  if (place != Place::pageable) attributes->devicePointer = (void *)address;
  if (place == Place::pinned) attributes->hostPointer = (void *)address;
  return cudaSuccess;
}
EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute, CUdeviceptr address) {
  Lock lock(mutex);
  if (place_of((void *)address) == Place::pageable) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream, false);
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
  cudaError_t error = unsafe("cudaMemcpy");
  return error == cudaSuccess ? copy(to, from, bytes, nullptr, true) : error;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, stream, false);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                                     cudaMemcpyKind, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t row = 0; row < height && error == cudaSuccess; row++)
    error = copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, stream, false);
  return error;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
EXPORT cudaError_t cudaGetSymbolAddress(void **pointer, const void *) {
  static void *symbols = nullptr;
  if (!symbols) allocate(&symbols, GRANULE);
  *pointer = symbols;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void *, int, size_t bytes, cudaStream_t stream) {
  return work(stream, "memset", std::to_string(bytes));
}
EXPORT cudaError_t cudaMemset(void *, int, size_t bytes) { return work(nullptr, "memset", std::to_string(bytes)); }
