// What a library says about itself: the sources it was built from, and how many threads a parallel region gets from the calling thread.
// TRAMONTANE_BUILD_ID and TRAMONTANE_ISA come from build.py.
#include <omp.h>

#include "simd.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// variants.py looks for this text in the file, without loading it.
EXPORTED const char TRAMONTANE_NAME(TRAMONTANE_ISA, build_mark)[];
const char TRAMONTANE_NAME(TRAMONTANE_ISA, build_mark)[] = "TRAMONTANE_BUILD=" TRAMONTANE_BUILD_ID;

EXPORTED int TRAMONTANE_NAME(TRAMONTANE_ISA, max_threads)() { return omp_get_max_threads(); }

// The number of threads that a parallel region really has.
EXPORTED int TRAMONTANE_NAME(TRAMONTANE_ISA, num_threads)() {
    int num_threads = 0;
#pragma omp parallel reduction(+ : num_threads)
    num_threads += 1;
    return num_threads;
}
