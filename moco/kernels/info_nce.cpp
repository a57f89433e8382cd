// InfoNCE loss of queries against their keys and a queue of negatives, and its gradient with
// respect to the queries, in one pass over the queue.
//
// The softmax is summed block by block with a running maximum (online softmax, arXiv 1805.02867;
// with the weighted sum that the gradient needs, as in FlashAttention, 2205.14135). Vectors run
// over the queries, a lane for each, so that a softmax needs no sums across lanes. All logits are
// to base 2: the factor log2(e) / temperature goes into the queries.

#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vector.h"

extern "C" struct Sizes {
  int64_t queries, dimensions, negatives, threads;
  double temperature;
};

namespace {

typedef uint32_t Integers __attribute__((vector_size(kVectorBytes)));

// Products are summed in a tile of kRows x 2 registers: as many as leave some of the 32 or 16
// registers for the factors. A block of negatives should stay in the second-level cache, the
// logits of 2 vectors of queries against it in the first.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int64_t kBlock = 256;

inline Vector spread(float value) { return value - Vector{}; }  // to all lanes

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// 2^x for x <= 0, to 2 units in the last place; 0 below 2^-125. A NaN stays one.
inline Vector power_of_2(Vector x) {
  const Vector lowest = spread(-125.0f), shift = spread(0x1.8p23f);
  const Vector clamped = x < lowest ? lowest : x;
  const Vector shifted = clamped + shift;  // rounds; the integer is in the lowest bits
  const Vector r = clamped - (shifted - shift);
  const Vector scale = (Vector)(((Integers)shifted << 23) + 0x3f800000u);
  Vector sum = spread(1.53533605e-4f);  // 2^r for |r| <= 1/2, a minimax fit
  sum = sum * r + 1.33988750e-3f;
  sum = sum * r + 9.61843692e-3f;
  sum = sum * r + 5.55033237e-2f;
  sum = sum * r + 2.40226477e-1f;
  sum = sum * r + 6.93147182e-1f;
  sum = sum * r + 1.0f;
  return x < lowest ? Vector{} : sum * scale;
}

// Negatives of a block in panels [columns / kRows][stride / kRows][kRows], padded by zeros: both
// products of `Part::add` then read them in order. (In the queue, rows lie a power of two
// apart and would displace each other in the cache.)
struct Block {
  const float* queue;  // [dimensions, length]
  int64_t dimensions, length, padded, stride, count = 0;
  std::vector<float> values;

  Block(const Sizes& s, const float* negatives)
      : queue(negatives),
        dimensions(s.dimensions),
        length(s.negatives),
        padded(round_up(s.dimensions, kRows)),
        stride((padded + 2) * kRows),  // not a power of 2, for the cache as well
        values(kBlock / kRows * stride) {}

  int64_t panels() const { return round_up(count, kRows) / kRows; }

  void load(int64_t begin, int64_t end) {
    count = end - begin;
    if (count < kBlock) std::fill(values.begin(), values.end(), 0.0f);
    for (int64_t d = 0; d < dimensions; d++) {
      const float* row = queue + d * length + begin;
      float* out = &values[d * kRows];
      int64_t n = 0;
      for (; n + kRows <= count; n += kRows, out += stride)
        std::copy(row + n, row + n + kRows, out);
      std::copy(row + n, row + count, out);
    }
  }
};

// What a thread knows of its negatives: for each query the largest logit, and relative to it the
// sum of exponentials and the sum of the negatives weighted with them.
struct Part {
  std::vector<Vector> largest, weighted, logits;  // [vectors], [vectors, padded], [kBlock, 2]
  std::vector<double> total;                      // [vectors, kLanes]

  void allocate(int64_t vectors, int64_t padded) {
    largest.assign(vectors, spread(-FLT_MAX));
    weighted.assign(vectors * padded, Vector{});
    logits.resize(2 * kBlock);
    total.assign(vectors * kLanes, 0.0);
  }

  // Adds a block for the queries of kVectors vectors, the first of which is `vector`.
  template <int kVectors>
  void add(const Block& block, const Vector* queries, int64_t vector) {
    const int64_t padded = block.padded, panels = block.panels();
    const Vector* q = queries + vector * padded;
    for (int64_t panel = 0; panel < panels; panel++) {
      const float* negatives = &block.values[panel * block.stride];
      Vector sums[kRows][kVectors] = {};
      for (int64_t d = 0; d < padded; d++)
        for (int i = 0; i < kRows; i++)
          for (int v = 0; v < kVectors; v++)
            sums[i][v] += negatives[d * kRows + i] * q[v * padded + d];
      for (int i = 0; i < kRows; i++)
        for (int v = 0; v < kVectors; v++)
          logits[(panel * kRows + i) * kVectors + v] = sums[i][v];
    }
    Vector shrink[kVectors];
    for (int v = 0; v < kVectors; v++) {
      Vector most = largest[vector + v], sum = {};
      for (int64_t n = 0; n < block.count; n++) {
        const Vector logit = logits[n * kVectors + v];
        most = logit > most ? logit : most;
      }
      for (int64_t n = 0; n < block.count; n++) {
        Vector& logit = logits[n * kVectors + v];
        logit = power_of_2(logit - most);
        sum += logit;
      }
      for (int64_t n = block.count; n < panels * kRows; n++) logits[n * kVectors + v] = Vector{};
      shrink[v] = power_of_2(largest[vector + v] - most);
      largest[vector + v] = most;
      double* totals = &total[(vector + v) * kLanes];
      for (int i = 0; i < kLanes; i++) totals[i] = totals[i] * shrink[v][i] + sum[i];
    }
    for (int64_t d = 0; d < padded; d += kRows) {
      Vector sums[kRows][kVectors] = {};
      for (int64_t panel = 0; panel < panels; panel++) {
        const float* negatives = &block.values[panel * block.stride + d * kRows];
        const Vector* weights = &logits[panel * kRows * kVectors];
        for (int j = 0; j < kRows; j++)
          for (int i = 0; i < kRows; i++)
            for (int v = 0; v < kVectors; v++)
              sums[i][v] += negatives[i * kRows + j] * weights[j * kVectors + v];
      }
      for (int v = 0; v < kVectors; v++) {
        Vector* out = &weighted[(vector + v) * padded + d];
        for (int i = 0; i < kRows; i++) out[i] = out[i] * shrink[v] + sums[i][v];
      }
    }
  }
};

}  // namespace

#if HAS_FLOAT32  // with less, torch's own products are faster
// q, k, gradient: [queries, dimensions]; negatives: [dimensions, negatives]. The loss is the mean.
extern "C" void info_nce_float32(const Sizes* sizes, const float* q, const float* k,
                                 const float* negatives, float* loss, float* gradient) {
  const Sizes& s = *sizes;
  const int64_t D = s.dimensions, padded = round_up(D, kRows);
  const int64_t vectors = round_up(s.queries, kLanes) / kLanes;
  const double scale = 1.0 / (std::log(2.0) * s.temperature);
  std::vector<Vector> queries(vectors * padded);
  for (int64_t b = 0; b < s.queries; b++)
    for (int64_t d = 0; d < D; d++)
      queries[b / kLanes * padded + d][b % kLanes] = float(q[b * D + d] * scale);
  std::vector<Part> parts(s.threads);
  std::vector<double> losses(s.queries);
#pragma omp parallel num_threads(s.threads)
  {
    const int64_t blocks = round_up(s.negatives, kBlock) / kBlock;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Block block(s, negatives);
    Part& part = parts[thread];
    part.allocate(vectors, padded);
    for (int64_t i = blocks * thread / threads; i < blocks * (thread + 1) / threads; i++) {
      const int64_t end = std::min((i + 1) * kBlock, s.negatives);
      block.load(i * kBlock, end);
      int64_t vector = 0;
      for (; vector + 2 <= vectors; vector += 2) part.add<2>(block, queries.data(), vector);
      if (vector < vectors) part.add<1>(block, queries.data(), vector);
    }
    std::vector<double> factors(threads);
#pragma omp barrier
#pragma omp for
    for (int64_t b = 0; b < s.queries; b++) {
      const int64_t vector = b / kLanes, lane = b % kLanes;
      double positive = 0.0;
      for (int64_t d = 0; d < D; d++) positive += double(q[b * D + d]) * k[b * D + d];
      positive *= scale;
      double largest = positive;
      for (int64_t t = 0; t < threads; t++)
        largest = std::max<double>(largest, parts[t].largest[vector][lane]);
      double total = std::exp2(positive - largest);
      for (int64_t t = 0; t < threads; t++) {
        factors[t] = std::exp2(parts[t].largest[vector][lane] - largest);
        total += factors[t] * parts[t].total[b];
      }
      const double others = std::exp2(positive - largest) / total - 1.0;
      double sum = 0.0;
      for (int64_t d = 0; d < D; d++) {
        double value = 0.0;
        for (int64_t t = 0; t < threads; t++)
          value += factors[t] * parts[t].weighted[vector * padded + d][lane];
        value = value / total + others * k[b * D + d];
        gradient[b * D + d] = float(value / (s.temperature * s.queries));
        sum += value;
      }
      // An infinite negative may have weight 0; it shows in the gradient, as infinity times 0.
      losses[b] = (std::log2(total) + largest - positive) * std::log(2.0) + 0.0 * (sum + positive);
    }
  }
  double sum = 0.0;
  for (double value : losses) sum += value;
  *loss = float(sum / s.queries);
}
#endif
