// What the files of convolutions share: vectors, the units of their sums, and buffers.
//
// A sum runs over *units* of 32 bits: a float, or two bfloat16 that the processor multiplies and
// adds in one instruction. Operands are packed into panels in the order in which the products read
// them. Weights come in float and are rounded when they are packed; sums are float.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "vector.h"

// With AMX torch's own are made for it.
#define HAS_BFLOAT16 (defined(__AVX512BF16__) && !defined(__AMX_BF16__))
#if HAS_BFLOAT16
#include <immintrin.h>
#endif

extern "C" struct Convolution {
  int64_t images, in_channels, height, width;        // of the input
  int64_t out_channels, out_height, out_width;       // of the output
  int64_t kernel, stride, padding, threads;          // channels are multiples of 32
};

namespace {

inline Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

struct Float32 {
  using Value = float;
  using Unit = float;
  using Units = Vector;  // kLanes of them
  static constexpr int64_t kValues = 1;  // in a unit

  static Units load_units(const Unit* from) { return load(from); }
  static Units repeat(Unit unit) { return Units{} + unit; }
  static Vector add_product(Vector sum, Units a, Units b) { return sum + a * b; }
  static Vector load_values(const Value* from) { return load(from); }
  static void store_values(Value* to, Vector left, Vector right) {
    store(to, left);
    store(to + kLanes, right);
  }
  // kLanes rows, which begin `step` apart, of kLanes units as columns.
  static void transposed(const float* from, int64_t step, Unit* to, int64_t to_step) {
    for (int64_t u = 0; u < kLanes; u++) {
      for (int64_t row = 0; row < kLanes; row++) to[u * to_step + row] = from[row * step + u];
    }
  }
  // Units of values that lie `step` apart.
  static void stacked(const float* from, int64_t, Unit* to, int64_t num) {
    std::copy_n(from, num, to);
  }
  // Units of the values of two images; the second may be missing.
  static void joined(const Value* image, const Value*, Unit* to, int64_t num) {
    std::copy_n(image, num, to);
  }
};

#if HAS_BFLOAT16
struct Bfloat16 {
  using Value = uint16_t;
  using Unit = uint32_t;
  using Units = __m512bh;
  static constexpr int64_t kValues = 2;

  static Units load_units(const Unit* from) { return (Units)_mm512_loadu_si512(from); }
  static Units repeat(Unit unit) { return (Units)_mm512_set1_epi32(int32_t(unit)); }
  static Vector add_product(Vector sum, Units a, Units b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
  static Vector load_values(const Value* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return (Vector)_mm512_slli_epi32(wide, 16);
  }
  static void store_values(Value* to, Vector left, Vector right) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left));
  }
  static void transposed(const float* from, int64_t step, Unit* to, int64_t to_step) {
    __m512i a[16], b[16];
    for (int64_t row = 0; row < 16; row++, from += step) {
      const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
      a[row] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    }
    for (int64_t i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int64_t i = 0; i < 16; i += 4) {  // in a[i + j]: units j, 4 + j, 8 + j, 12 + j of 4 rows
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int64_t j = 0; j < 4; j++) {
      const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
      const __m512i odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
      const __m512i more_even = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
      const __m512i more_odd = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
      _mm512_storeu_si512(to + j * to_step, _mm512_shuffle_i32x4(even, more_even, 0x88));
      _mm512_storeu_si512(to + (4 + j) * to_step, _mm512_shuffle_i32x4(odd, more_odd, 0x88));
      _mm512_storeu_si512(to + (8 + j) * to_step, _mm512_shuffle_i32x4(even, more_even, 0xdd));
      _mm512_storeu_si512(to + (12 + j) * to_step, _mm512_shuffle_i32x4(odd, more_odd, 0xdd));
    }
  }
  static void stacked(const float* from, int64_t step, Unit* to, int64_t num) {
    for (int64_t i = 0; i < num; i += kLanes) {
      const __m512i low = rounded(from + i), high = rounded(from + step + i);
      _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  static void joined(const Value* image, const Value* next, Unit* to, int64_t num) {
    if (next) {
      for (int64_t i = 0; i < num; i++) to[i] = image[i] | uint32_t(next[i]) << 16;
    } else {
      for (int64_t i = 0; i < num; i++) to[i] = image[i];
    }
  }
  static __m512i rounded(const float* from) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
  }
};
#endif

// Memory for packed operands that is kept for the next call: it stays in the cache, and the system
// is not asked for it hundreds of times a step. A call that meets another one gets its own.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : kept_(kept().free.exchange(false)) {
    if (!kept_) {
      own_.reset(allocate(bytes));
    } else if (kept().size < bytes) {
      kept().memory.reset();  // first, so that both never exist
      kept().memory.reset(allocate(bytes));
      kept().size = bytes;
    }
  }
  ~Scratch() {
    if (kept_) kept().free = true;
  }
  Scratch(const Scratch&) = delete;

  void* get() const { return kept_ ? kept().memory.get() : own_.get(); }

 private:
  using Memory = std::unique_ptr<void, decltype(&std::free)>;
  struct Kept {
    std::atomic<bool> free{true};
    Memory memory{nullptr, &std::free};
    size_t size = 0;
  };

  static Kept& kept() {
    static Kept kept;
    return kept;
  }
  static void* allocate(size_t bytes) {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return memory;
  }

  bool kept_;
  Memory own_{nullptr, &std::free};
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

Range share(int64_t num, int64_t part, int64_t parts) {
  return {num * part / parts, num * (part + 1) / parts};
}

}  // namespace
