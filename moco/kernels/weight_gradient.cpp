// The gradient to a convolution's weights for channels-last tensors of float or bfloat16:
// dw[k, r, s, c] = sum over output pixels of dy[pixel, k] * x[the pixel's input at r, s, c].
//
// The two bfloat16 of a unit are the same pixel of two images: whatever the shift between input and
// output, they stay together. Sums are float and stay so.
//
// moco/kernels/convolution.py and residual.cpp call this file.

#include <vector>

#include "convolution.h"

namespace {

// A tile of sums is kOutputs output channels x 2 or kMostVectors vectors of input channels.
constexpr int64_t kOutputs = 4;
constexpr int kMostVectors = kVectorBytes == 64 ? 4 : 2;  // of 32 or 16 registers

// Of `pairs` of images (of single ones in float) some rows of the output.
struct Chunk {
  Range pairs, rows;
};

// What a gradient to weights is made from. A 1x1 convolution uses only some pixels of x: they are
// packed as if they were all.
struct Shape {
  int64_t pairs, height, width, out_height, out_width, stride, padding, kernel, every;

  Range input_rows(Range rows) const {
    return {std::max<int64_t>(0, rows.begin * stride - padding),
            std::min(height, (rows.end - 1) * stride + kernel - padding)};
  }
  // Of `size` outputs those whose input, `offset` further, is one of `inputs`.
  Range inside(int64_t offset, int64_t inputs, int64_t size) const {
    const int64_t begin = offset >= 0 ? 0 : (-offset + stride - 1) / stride;
    const int64_t end = offset >= inputs ? 0 : (inputs - 1 - offset) / stride + 1;
    return {begin, std::max(begin, std::min(size, end))};
  }
};

// Parts of about `budget` bytes of packed operands; bytes: those of a pair of images.
std::vector<Chunk> divide(const Shape& s, int64_t bytes, int64_t budget, int64_t threads) {
  std::vector<Chunk> chunks;
  if (bytes > budget) {
    const int64_t parts = std::min(s.out_height, (bytes + budget - 1) / budget);
    for (int64_t pair = 0; pair < s.pairs; pair++) {
      for (int64_t i = 0; i < parts; i++) {
        chunks.push_back({{pair, pair + 1}, share(s.out_height, i, parts)});
      }
    }
    return chunks;
  }
  const int64_t fitting = budget / bytes, least = (s.pairs + fitting - 1) / fitting;
  const int64_t parts = std::min(s.pairs, (least + threads - 1) / threads * threads);
  for (int64_t i = 0; i < parts; i++) chunks.push_back({share(s.pairs, i, parts), {0, s.out_height}});
  return chunks;
}

// sums += over `num` pixels; outputs: [num][kOutputs], inputs: V vectors of them, `step` units apart.
template <class T, int V>
inline void add_pixels(const typename T::Unit* outputs, const typename T::Unit* inputs, int64_t num,
                       int64_t step, Vector (&sums)[kOutputs][V]) {
  for (int64_t i = 0; i < num; i++) {
    typename T::Units in[V];
    for (int v = 0; v < V; v++) in[v] = T::load_units(inputs + v * kLanes);
#pragma GCC unroll 4
    for (int64_t m = 0; m < kOutputs; m++) {
      const auto repeated = T::repeat(outputs[m]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[m][v] = T::add_product(sums[m][v], repeated, in[v]);
    }
    outputs += kOutputs;
    inputs += step;
  }
}

// Pixels of two images, each of `channels` values, into panels of kBlock channels that are
// `panel_units` long.
template <class T, int64_t kBlock>
void pack_pixels(const typename T::Value* image, const typename T::Value* next, int64_t num,
                 int64_t step, int64_t channels, int64_t panel_units, typename T::Unit* panels) {
  for (int64_t i = 0; i < num; i++, image += step, panels += kBlock) {
    for (int64_t c = 0; c < channels; c += kBlock) {
      T::joined(image + c, next ? next + i * step + c : nullptr, panels + c / kBlock * panel_units,
                kBlock);
    }
  }
}

// V: vectors of input channels in a tile of sums.
template <class T, int V>
class WeightGradient {
  using Value = typename T::Value;
  using Unit = typename T::Unit;

 public:
  WeightGradient(const Convolution& c, const Value* x, const Value* dy)
      : c_(c), x_(x), dy_(dy), size_(c.out_channels * c.kernel * c.kernel * c.in_channels) {
    const bool some = c.kernel == 1;
    s_ = {(c.images + T::kValues - 1) / T::kValues,
          some ? c.out_height : c.height,
          some ? c.out_width : c.width,
          c.out_height,
          c.out_width,
          some ? 1 : c.stride,
          c.padding,
          c.kernel,
          some ? c.stride : 1};
    pair_units_ = c.out_channels * c.out_height * c.out_width +
                  c.in_channels * s_.height * s_.width;
  }

  void compute(float* dw) const {
    const int64_t pair_bytes = pair_units_ * sizeof(Unit);
    // Where there are more pixels than weights, threads divide the pixels and add their sums;
    // else they pack together, and divide the weights.
    const bool divide_pixels =
        c_.threads > 1 && 4 * size_ * c_.threads <= s_.pairs * pair_bytes;
    const bool alone = divide_pixels || c_.threads == 1;
    const auto chunks = divide(s_, pair_bytes, alone ? kOwnBytes : kSharedBytes,
                               divide_pixels ? c_.threads : 1);
    int64_t units = 0;
    for (const Chunk& chunk : chunks) units = std::max(units, packed_units(chunk));
    const int64_t num_chunks = chunks.size();
    const int64_t threads = divide_pixels ? std::min(c_.threads, num_chunks) : c_.threads;
    const int64_t parts = divide_pixels ? threads : 1;
    const Scratch scratch(sizeof(float) * (parts * units + (parts - 1) * size_));
    auto* const packed = static_cast<Unit*>(scratch.get());
    auto* const others = reinterpret_cast<float*>(packed + parts * units);
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), running = omp_get_num_threads();
      if (divide_pixels) {
        float* sum = thread ? others + (thread - 1) * size_ : dw;
        const Range own = share(num_chunks, thread, running);
        for (int64_t i = own.begin; i < own.end; i++) {
          Unit* to = packed + thread * units;
          pack(chunks[i], 0, 1, to);
          multiply(chunks[i], 0, 1, to, i == own.begin, sum);
        }
#pragma omp barrier
        const Range weights = share(size_, thread, running);
        for (int64_t other = 0; other < running - 1; other++) {
          const float* added = others + other * size_;
          for (int64_t i = weights.begin; i < weights.end; i++) dw[i] += added[i];
        }
      } else {
        for (int64_t i = 0; i < num_chunks; i++) {
          pack(chunks[i], thread, running, packed);
#pragma omp barrier
          multiply(chunks[i], thread, running, packed, i == 0, dw);
#pragma omp barrier
        }
      }
    }
  }

 private:
  static constexpr int64_t kColumns = V * kLanes;
  static constexpr int64_t kOwnBytes = 1 << 19;     // stays in a core's cache
  static constexpr int64_t kSharedBytes = 1 << 24;  // stays in all cores' cache

  int64_t output_pixels(const Chunk& chunk) const {
    return chunk.pairs.size() * chunk.rows.size() * s_.out_width;
  }
  int64_t input_pixels(const Chunk& chunk) const {
    return chunk.pairs.size() * s_.input_rows(chunk.rows).size() * s_.width;
  }
  int64_t packed_units(const Chunk& chunk) const {
    return output_pixels(chunk) * c_.out_channels + input_pixels(chunk) * c_.in_channels;
  }

  // The chunk's rows of dy, then those of x; every thread its share of them.
  void pack(const Chunk& chunk, int64_t thread, int64_t threads, Unit* to) const {
    const Range inputs = s_.input_rows(chunk.rows);
    const int64_t rows = chunk.rows.size(), num_outputs = chunk.pairs.size() * rows;
    const int64_t num_inputs = chunk.pairs.size() * inputs.size();
    const int64_t out_units = output_pixels(chunk), in_units = input_pixels(chunk);
    Unit* to_inputs = to + out_units * c_.out_channels;
    const Range own = share(num_outputs + num_inputs, thread, threads);
    for (int64_t row = own.begin; row < own.end; row++) {
      if (row < num_outputs) {
        const int64_t image = T::kValues * (chunk.pairs.begin + row / rows);
        const int64_t h = chunk.rows.begin + row % rows, step = c_.out_channels;
        const Value* from = dy_ + (image * c_.out_height + h) * c_.out_width * step;
        pack_pixels<T, kOutputs>(from, next(from, image, c_.out_height * c_.out_width * step),
                                 s_.out_width, step, step, kOutputs * out_units,
                                 to + row * s_.out_width * kOutputs);
      } else {
        const int64_t at = row - num_outputs;
        const int64_t image = T::kValues * (chunk.pairs.begin + at / inputs.size());
        const int64_t h = (inputs.begin + at % inputs.size()) * s_.every;
        const Value* from = x_ + (image * c_.height + h) * c_.width * c_.in_channels;
        pack_pixels<T, kColumns>(from, next(from, image, c_.height * c_.width * c_.in_channels),
                                 s_.width, s_.every * c_.in_channels, c_.in_channels,
                                 kColumns * in_units, to_inputs + at * s_.width * kColumns);
      }
    }
  }

  const Value* next(const Value* from, int64_t image, int64_t image_size) const {
    return image + 1 < c_.images ? from + image_size : nullptr;
  }

  // Adds the chunk's part to the thread's share of dw, or sets it.
  void multiply(const Chunk& chunk, int64_t thread, int64_t threads, const Unit* packed, bool set,
                float* dw) const {
    const int64_t blocks = c_.out_channels / kOutputs, taps = c_.kernel * c_.kernel;
    const int64_t out_units = output_pixels(chunk), in_units = input_pixels(chunk);
    const Unit* inputs = packed + out_units * c_.out_channels;
    const Range own = share(c_.in_channels / kColumns * blocks * taps, thread, threads);
    for (int64_t i = own.begin; i < own.end; i++) {
      const int64_t tap = i % taps, block = i / taps % blocks, column = i / taps / blocks;
      float* to = dw + (block * kOutputs * taps + tap) * c_.in_channels + column * kColumns;
      const int64_t to_step = taps * c_.in_channels;
      Vector sums[kOutputs][V] = {};
      add_tap(chunk, tap / c_.kernel, tap % c_.kernel, packed + block * kOutputs * out_units,
              inputs + column * kColumns * in_units, sums);
      for (int64_t m = 0; m < kOutputs; m++) {
        for (int64_t v = 0; v < V; v++) {
          float* at = to + m * to_step + v * kLanes;
          store(at, set ? sums[m][v] : load(at) + sums[m][v]);  // short sums keep their digits
        }
      }
    }
  }

  // The part of one place (r, s) of the kernel; pixels beside the image add nothing.
  void add_tap(const Chunk& chunk, int64_t r, int64_t s, const Unit* outputs, const Unit* inputs,
               Vector (&sums)[kOutputs][V]) const {
    if (c_.kernel == 1) return add_pixels<T, V>(outputs, inputs, output_pixels(chunk), kColumns, sums);
    const Range in_rows = s_.input_rows(chunk.rows);
    const int64_t rows = chunk.rows.size(), down = r - c_.padding, right = s - c_.padding;
    const Range h = s_.inside(down, s_.height, s_.out_height);
    const Range w = s_.inside(right, s_.width, s_.out_width);
    const Range own = {std::max(h.begin, chunk.rows.begin), std::min(h.end, chunk.rows.end)};
    for (int64_t pair = 0; pair < chunk.pairs.size(); pair++) {
      for (int64_t row = own.begin; row < own.end; row++) {
        const int64_t at = (pair * rows + row - chunk.rows.begin) * s_.out_width + w.begin;
        const int64_t in_row = pair * in_rows.size() + row * s_.stride + down - in_rows.begin;
        const int64_t in_at = in_row * s_.width + w.begin * s_.stride + right;
        add_pixels<T, V>(outputs + at * kOutputs, inputs + in_at * kColumns, w.size(),
                      s_.stride * kColumns, sums);
      }
    }
  }

  Convolution c_;
  Shape s_;
  const Value *x_, *dy_;
  int64_t size_, pair_units_;
};

template <class T>
void weight_gradient(const Convolution& c, const typename T::Value* x, const typename T::Value* dy,
                     float* dw) {
  if (c.in_channels % (kMostVectors * kLanes) == 0) {
    WeightGradient<T, kMostVectors>(c, x, dy).compute(dw);
  } else {
    WeightGradient<T, 2>(c, x, dy).compute(dw);
  }
}

}  // namespace

extern "C" {

#if HAS_FLOAT32
void weight_gradient_float32(const Convolution* c, const void* x, const void* dy, float* dw) {
  weight_gradient<Float32>(*c, static_cast<const float*>(x), static_cast<const float*>(dy), dw);
}
#endif

#if HAS_BFLOAT16
void weight_gradient_bfloat16(const Convolution* c, const void* x, const void* dy, float* dw) {
  weight_gradient<Bfloat16>(*c, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(dy),
                            dw);
}
#endif
}
