// Matrix products of cuBLAS as launches on the handle's stream, and collectives of NCCL between ranks that never meet.
#include <cstring>

#include "device.h"

namespace fake {
namespace {

struct Handle {
  void *stream = nullptr;
};

struct Communicator {
  int rank, size;
};

int product(void *handle, const char *name, int m, int n, int k) {
  std::string shape = " m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k);
  return work(((Handle *)handle)->stream, "product", name + shape) == cudaSuccess ? 0 : 13;  // CUBLAS_STATUS_EXECUTION_FAILED
}

// Data types by NCCL's numbers.
const char *TYPES[] = {"int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bfloat16"};

int collective(const char *name, size_t count, int type, void *stream) {
  std::string detail = std::string(name) + " " + std::to_string(count) + " " + (type >= 0 && type < 10 ? TYPES[type] : "?");
  return work(stream, "collective", detail) == cudaSuccess ? 0 : 1;  // ncclUnhandledCudaError
}

}  // namespace
}  // namespace fake

using namespace fake;

// --- cuBLAS, cuBLASLt and cuDNN ---

EXPORT int cublasCreate_v2(void **handle) {
  *handle = new Handle;
  return 0;
}
EXPORT int cublasDestroy_v2(void *handle) {
  delete (Handle *)handle;
  return 0;
}
EXPORT int cublasSetStream_v2(void *handle, void *stream) {
  ((Handle *)handle)->stream = stream;
  return 0;
}
EXPORT int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }
EXPORT int cublasSetMathMode(void *, int) { return 0; }
EXPORT int cublasSetPointerMode_v2(void *, int) { return 0; }
EXPORT int cublasGetMathMode(void *, int *mode) {
  *mode = 0;
  return 0;
}
EXPORT int cublasGetPointerMode_v2(void *, int *mode) {
  *mode = 0;
  return 0;
}
#define PRODUCT(name) \
  EXPORT int name(void *handle, int, int, int m, int n, int k) { return product(handle, #name, m, n, k); }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)

EXPORT size_t cublasLtGetVersion() { return 130100; }
EXPORT int cublasLtMatmulDescCreate(void **handle, int, int) {
  *handle = new Handle;
  return 0;
}
EXPORT int cublasLtMatmulDescDestroy(void *handle) {
  delete (Handle *)handle;
  return 0;
}
EXPORT int cublasLtMatmulDescSetAttribute(void *, int, const void *, size_t) { return 0; }
EXPORT int cublasLtMatmulPreferenceCreate(void **handle) { return cublasLtMatmulDescCreate(handle, 0, 0); }
EXPORT int cublasLtMatmulPreferenceDestroy(void *handle) { return cublasLtMatmulDescDestroy(handle); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t) { return 0; }
EXPORT int cublasLtMatrixLayoutCreate(void **handle, int, uint64_t, uint64_t, int64_t) { return cublasLtMatmulDescCreate(handle, 0, 0); }
EXPORT int cublasLtMatrixLayoutDestroy(void *handle) { return cublasLtMatmulDescDestroy(handle); }
EXPORT int cublasLtMatrixLayoutSetAttribute(void *, int, const void *, size_t) { return 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *results, int *found) {
  memset(results, 0, 64 + sizeof(size_t) + 2 * sizeof(int) + 4 * sizeof(int));  // one cublasLtMatmulHeuristicResult_t
  *found = 1;
  return 0;
}
EXPORT int cublasLtMatmul(void *, void *, const void *, const void *, void *, const void *, void *, const void *, const void *, void *, void *,
                          void *, const void *, void *, size_t, void *stream) {
  return work(stream, "product", "cublasLtMatmul") == cudaSuccess ? 0 : 13;
}

EXPORT size_t cudnnGetVersion() { return 92000; }
EXPORT size_t cudnnGetCudartVersion() { return 13000; }

// --- NCCL ---

struct ncclUniqueId {
  char bytes[128];
};

EXPORT int ncclGetVersion(int *version) {
  *version = 22907;
  return 0;
}
EXPORT int ncclGetUniqueId(ncclUniqueId *id) {
  memset(id, 1, sizeof *id);
  return 0;
}
EXPORT int ncclCommInitRankConfig(void **communicator, int size, ncclUniqueId, int rank, void *) {
  *communicator = new Communicator{rank, size};
  return 0;
}
EXPORT int ncclCommInitRank(void **communicator, int size, ncclUniqueId, int rank) {
  *communicator = new Communicator{rank, size};
  return 0;
}
EXPORT int ncclCommUserRank(void *communicator, int *rank) {
  *rank = ((Communicator *)communicator)->rank;
  return 0;
}
EXPORT int ncclCommCount(void *communicator, int *size) {
  *size = ((Communicator *)communicator)->size;
  return 0;
}
EXPORT int ncclCommGetAsyncError(void *, int *error) {
  *error = 0;
  return 0;
}
EXPORT int ncclCommDestroy(void *) { return 0; }
EXPORT int ncclCommAbort(void *) { return 0; }
EXPORT int ncclCommFinalize(void *) { return 0; }
EXPORT const char *ncclGetErrorString(int) { return "error of the fake NCCL"; }
EXPORT const char *ncclGetLastError(void *) { return ""; }
EXPORT int ncclGroupStart() { return 0; }
EXPORT int ncclGroupEnd() { return 0; }
EXPORT int ncclAllReduce(const void *, void *, size_t count, int type, int, void *, void *stream) {
  return collective("all_reduce", count, type, stream);
}
EXPORT int ncclBroadcast(const void *, void *, size_t count, int type, int, void *, void *stream) {
  return collective("broadcast", count, type, stream);
}
EXPORT int ncclBcast(void *, size_t count, int type, int, void *, void *stream) { return collective("broadcast", count, type, stream); }
EXPORT int ncclAllGather(const void *, void *, size_t count, int type, void *, void *stream) {
  return collective("all_gather", count, type, stream);
}
EXPORT int ncclReduceScatter(const void *, void *, size_t count, int type, int, void *, void *stream) {
  return collective("reduce_scatter", count, type, stream);
}
EXPORT int ncclSend(const void *, size_t count, int type, int, void *, void *stream) { return collective("send", count, type, stream); }
EXPORT int ncclRecv(void *, size_t count, int type, int, void *, void *stream) { return collective("receive", count, type, stream); }
