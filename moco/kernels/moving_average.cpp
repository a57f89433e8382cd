// Moves many tensors towards others: key += weight * (query - key).
//
// moco/kernels/moving_average.py calls this file.

#include <omp.h>

#include <algorithm>
#include <cstdint>

extern "C" void move_float32(int64_t num, int64_t threads, float weight, float* const* keys,
                             const float* const* queries, const int64_t* sizes) {
  constexpr int64_t kBlock = 4096;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), running = omp_get_num_threads();
    for (int64_t t = 0; t < num; t++) {
      const int64_t blocks = (sizes[t] + kBlock - 1) / kBlock;
      const int64_t begin = blocks * thread / running * kBlock;
      const int64_t end = std::min(sizes[t], blocks * (thread + 1) / running * kBlock);
      float* const key = keys[t];
      const float* const query = queries[t];
#pragma omp simd
      for (int64_t i = begin; i < end; i++) key[i] += weight * (query[i] - key[i]);
    }
  }
}
