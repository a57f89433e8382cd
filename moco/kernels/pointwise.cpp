// 1x1 convolutions for channels-last tensors of float or bfloat16:
// output[pixel, k] = sum over c of input[pixel, c] * weight[k, c].
//
// The weights are rounded and packed in one pass; pixels are read where they lie.
//
// moco/kernels/convolution.py calls this file.

#include "convolution.h"

namespace {

// A tile of sums is kRows pixels x kColumns output channels. More pixels (up to 14 have registers)
// need more addresses than there are registers for, and were slower.
constexpr int64_t kRows = kVectorBytes == 64 ? 8 : 6, kColumns = 2 * kLanes;
constexpr int64_t kCacheBytes = 1 << 18;  // a part of a core's second-level cache

// M pixels x kColumns output channels; a pixel's channels begin `step` after the last one's.
// panel: [units][kColumns].
template <class T, int M>
void multiply_pixels(const typename T::Value* pixels, int64_t step, const typename T::Unit* panel,
                     int64_t units, typename T::Value* out, int64_t out_step, bool add) {
  const typename T::Value* from[M];
  for (int m = 0; m < M; m++) from[m] = pixels + m * step;
  for (int m = 0; m < M; m++) __builtin_prefetch(out + (M + m) * out_step, 1);
  Vector sums[M][2] = {};
  for (int64_t u = 0; u < units; u++) {
    const auto left = T::load_units(panel), right = T::load_units(panel + kLanes);
    panel += kColumns;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      typename T::Unit unit;
      std::memcpy(&unit, from[m] + u * T::kValues, sizeof unit);
      const auto repeated = T::repeat(unit);
      sums[m][0] = T::add_product(sums[m][0], repeated, left);
      sums[m][1] = T::add_product(sums[m][1], repeated, right);
    }
  }
  for (int m = 0; m < M; m++) {
    typename T::Value* to = out + m * out_step;
    if (add) {
      sums[m][0] += T::load_values(to);
      sums[m][1] += T::load_values(to + kLanes);
    }
    T::store_values(to, sums[m][0], sums[m][1]);
  }
}

template <class T, int M>
void multiply_some_pixels(int64_t num, const typename T::Value* pixels, int64_t step,
                          const typename T::Unit* panel, int64_t units, typename T::Value* out,
                          int64_t out_step, bool add) {
  if (num >= M) return multiply_pixels<T, M>(pixels, step, panel, units, out, out_step, add);
  if constexpr (M > 1) {
    multiply_some_pixels<T, M - 1>(num, pixels, step, panel, units, out, out_step, add);
  }
}

// The panel of output channels `first` .. + kColumns, of weight [outputs, inputs].
template <class T>
void pack_outputs(const float* weight, int64_t inputs, int64_t first, typename T::Unit* panel) {
  constexpr int64_t kTile = 16;
  typename T::Unit tile[kColumns][kTile];
  for (int64_t u = 0; u < inputs / T::kValues; u += kTile) {
    for (int64_t k = 0; k < kColumns; k++) {
      T::adjacent(weight + (first + k) * inputs + u * T::kValues, tile[k], kTile);
    }
    for (int64_t i = 0; i < kTile; i++) {
      for (int64_t k = 0; k < kColumns; k++) panel[(u + i) * kColumns + k] = tile[k][i];
    }
  }
}

// The same of the transposed weight, given as [inputs, outputs].
template <class T>
void pack_outputs_transposed(const float* weight, int64_t inputs, int64_t outputs, int64_t first,
                             typename T::Unit* panel) {
  for (int64_t u = 0; u < inputs / T::kValues; u++) {
    const float* from = weight + u * T::kValues * outputs + first;
    T::stacked(from, outputs, panel + u * kColumns, kColumns);
  }
}

// Where pixel `p` of `height` x `width` lies in an image that has `stride` times as many.
struct Strided {
  int64_t height, width, stride, full_height, full_width;

  int64_t operator()(int64_t p) const {
    const int64_t w = p % width, h = p / width % height, image = p / width / height;
    return (image * full_height + h * stride) * full_width + w * stride;
  }
};

// Cache lines of what a thread reads next.
inline void prefetch(const void* from, Range lines) {
  for (int64_t i = lines.begin; i < lines.end; i++) {
    __builtin_prefetch(static_cast<const char*>(from) + 64 * i);
  }
}

// transposed: weight is [inputs, outputs] of this product, as for the gradient to the input. With a
// stride that gradient is added to some pixels of the output; the others' is 0.
// add: to what the output holds, before that sum is rounded.
template <class T>
void pointwise(const Convolution& c, bool transposed, bool add, const typename T::Value* input,
               const float* weight, typename T::Value* output) {
  using Value = typename T::Value;
  using Unit = typename T::Unit;
  const int64_t inputs = c.in_channels, outputs = c.out_channels, units = inputs / T::kValues;
  const int64_t panels = outputs / kColumns;
  const bool gathers = c.stride > 1 && !transposed, scatters = c.stride > 1 && transposed;
  const Strided place = transposed ? Strided{c.height, c.width, c.stride, c.out_height, c.out_width}
                                   : Strided{c.out_height, c.out_width, c.stride, c.height, c.width};
  const int64_t pixels = c.images * place.height * place.width;
  const int64_t moved = gathers ? pixels * inputs : scatters ? pixels * outputs : 0;
  const Scratch scratch(units * outputs * sizeof(Unit) + moved * sizeof(Value));
  auto* const packed = static_cast<Unit*>(scratch.get());
  auto* const dense = reinterpret_cast<Value*>(packed + units * outputs);
  const Value* const from = gathers ? dense : input;
  Value* const to = scatters ? dense : output;
  const bool add_at_once = add && !scatters;
  const int64_t pixel_bytes = inputs * sizeof(Value);
  // A thread takes a block of pixels through all panels. Where those stay in its cache, few pixels,
  // so that its writes lie together; else as many as stay there themselves.
  const int64_t kept = outputs * pixel_bytes > kCacheBytes ? kCacheBytes / 2 / pixel_bytes : 1;
  const int64_t block = std::max<int64_t>(1, kept / kRows) * kRows;
  // What is larger is divided. The same thread has the same images in all layers, so that it finds
  // in its cache what it wrote: dynamic scheduling was slower.
  const bool divide_pixels = pixels >= outputs;
#pragma omp parallel num_threads(c.threads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const Range to_pack = share(panels, thread, threads);
    for (int64_t k = to_pack.begin; k < to_pack.end; k++) {
      Unit* panel = packed + k * units * kColumns;
      if (transposed) {
        pack_outputs_transposed<T>(weight, inputs, outputs, k * kColumns, panel);
      } else {
        pack_outputs<T>(weight, inputs, k * kColumns, panel);
      }
    }
    const Range to_move = share(pixels, thread, threads);
    for (int64_t p = to_move.begin; gathers && p < to_move.end; p++) {
      std::copy_n(input + place(p) * inputs, inputs, dense + p * inputs);
    }
#pragma omp barrier
    Range own_pixels{0, pixels}, own_panels = to_pack;
    if (divide_pixels) {
      const Range tiles = share((pixels + kRows - 1) / kRows, thread, threads);
      own_pixels = {tiles.begin * kRows, std::min(pixels, tiles.end * kRows)};
      own_panels = {0, panels};
    }
    for (int64_t begin = own_pixels.begin; begin < own_pixels.end; begin += block) {
      const int64_t end = std::min(own_pixels.end, begin + block);
      for (int64_t k = own_panels.begin; k < own_panels.end; k++) {
        for (int64_t p = begin; p < end; p += kRows) {
          if (block == kRows) {
            prefetch(from + (p + kRows) * inputs,
                     share(kRows * pixel_bytes / 64, k - own_panels.begin, own_panels.size()));
          }
          multiply_some_pixels<T, kRows>(std::min(kRows, end - p), from + p * inputs, inputs,
                                         packed + k * units * kColumns, units,
                                         to + p * outputs + k * kColumns, outputs, add_at_once);
        }
      }
    }
    if (scatters) {
#pragma omp barrier
      for (int64_t p = to_move.begin; p < to_move.end; p++) {
        Value* sum = output + place(p) * outputs;
        for (int64_t k = 0; k < outputs; k += 2 * kLanes) {
          const Value* added = dense + p * outputs + k;
          T::store_values(sum + k, T::load_values(sum + k) + T::load_values(added),
                          T::load_values(sum + k + kLanes) + T::load_values(added + kLanes));
        }
      }
    }
  }
}

}  // namespace

extern "C" {

#if HAS_FLOAT32
void pointwise_float32(const Convolution* c, int64_t transposed, int64_t add, const float* input,
                       const float* weight, float* output) {
  pointwise<Float32>(*c, transposed, add, input, weight, output);
}
#endif

#if HAS_BFLOAT16
void pointwise_bfloat16(const Convolution* c, int64_t transposed, int64_t add, const uint16_t* input,
                        const float* weight, uint16_t* output) {
  pointwise<Bfloat16>(*c, transposed, add, input, weight, output);
}
#endif
}
