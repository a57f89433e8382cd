// The widest vectors of float of this processor, for the kernels that choose them themselves.

#pragma once

#include <cstdint>

// They exist where they were measured to be faster than torch's.
#define HAS_FLOAT32 (defined(__AVX2__) && defined(__FMA__))

namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#else
constexpr int64_t kVectorBytes = 32;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));
constexpr int64_t kLanes = kVectorBytes / sizeof(float);

}  // namespace
