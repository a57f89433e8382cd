// The sum of all squares of many tensors, for the norm of a step's gradients.
//
// moco/kernels/gradient_norm.py calls this file.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// NaN and infinity pass. Sums are float in blocks and double across them.
extern "C" void squares_float32(int64_t num, int64_t threads, const float* const* tensors,
                                const int64_t* sizes, double* sum) {
  constexpr int64_t kBlock = 4096;
  std::vector<double> sums(threads, 0.0);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), running = omp_get_num_threads();
    double own = 0.0;
    for (int64_t t = 0; t < num; t++) {
      const int64_t blocks = (sizes[t] + kBlock - 1) / kBlock;
      for (int64_t b = blocks * thread / running; b < blocks * (thread + 1) / running; b++) {
        const float* values = tensors[t];
        const int64_t end = std::min(sizes[t], (b + 1) * kBlock);
        float block = 0.0f;
#pragma omp simd reduction(+ : block)
        for (int64_t i = b * kBlock; i < end; i++) block += values[i] * values[i];
        own += block;
      }
    }
    sums[thread] = own;
  }
  *sum = 0.0;
  for (double own : sums) *sum += own;
}
