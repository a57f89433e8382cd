// Convolutions and their transposes, the gradients to the input, for channels-last tensors of float
// or bfloat16: output[pixel, k] = sum over places (r, s) of the kernel and channels c of
// input[pixel's input at (r, s), c] * weight[k, r, s, c].
//
// The weights are rounded and packed in one pass; pixels are read where they lie.
//
// moco/kernels/convolution.py and residual.cpp call this file.

#include <vector>

#include "convolution.h"

namespace {

// A tile of sums is kRows pixels x kColumns output channels. More pixels (up to 14 have registers)
// need more addresses than there are registers for, and were slower.
constexpr int64_t kRows = kVectorBytes == 64 ? 8 : 6, kColumns = 2 * kLanes;
constexpr int64_t kCacheBytes = 1 << 18;  // a part of a core's second-level cache

// Where a tile's pixels and those they are made from lie: behind each other, as in a 1x1
// convolution without stride ...
template <class Value>
struct Adjacent {
  const Value* input;
  Value* output;
  int64_t in_step, out_step;

  int64_t taps() const { return 1; }
  int64_t place(int64_t) const { return 0; }
  const Value* from(int64_t, int64_t m) const { return input + m * in_step; }
  Value* to(int64_t m) const { return output + m * out_step; }
};

// ... or anywhere, in a list. A place of the kernel that is beside the image is a pixel of zeros,
// and is left out where it is that for the whole tile.
template <class Value>
struct Listed {
  const int64_t* head;         // how many places there are, and which of the panel's they are
  const Value* const* inputs;  // [places][kRows]
  Value* const* outputs;       // [kRows]

  int64_t taps() const { return head[0]; }
  int64_t place(int64_t tap) const { return head[1 + tap]; }
  const Value* from(int64_t tap, int64_t m) const { return inputs[tap * kRows + m]; }
  Value* to(int64_t m) const { return outputs[m]; }
};

// M pixels x kColumns output channels, from `first` on. panels: [places][units][kColumns]. Not
// inlined, or what its caller keeps in registers would be missing here.
template <class T, int M, class Tile>
__attribute__((noinline)) void multiply_pixels(const Tile& tile, const typename T::Unit* panels,
                                               int64_t units, int64_t first, int64_t channels,
                                               bool add) {
  using Value = typename T::Value;
  for (int m = 0; m < M; m++) __builtin_prefetch(tile.to(m) + first + M * channels, 1);
  Vector sums[M][2] = {};
  for (int64_t t = 0; t < tile.taps(); t++) {
    const typename T::Unit* panel = panels + tile.place(t) * units * kColumns;
    const Value* from[M];
    for (int m = 0; m < M; m++) from[m] = tile.from(t, m);
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
  }
  for (int m = 0; m < M; m++) {
    Value* to = tile.to(m) + first;
    if (add) {
      sums[m][0] += T::load_values(to);
      sums[m][1] += T::load_values(to + kLanes);
    }
    T::store_values(to, sums[m][0], sums[m][1]);
  }
}

template <class T, int M, class Tile>
void multiply_some_pixels(int64_t num, const Tile& tile, const typename T::Unit* panels,
                          int64_t units, int64_t first, int64_t channels, bool add) {
  if (num >= M) return multiply_pixels<T, M>(tile, panels, units, first, channels, add);
  if constexpr (M > 1) {
    multiply_some_pixels<T, M - 1>(num, tile, panels, units, first, channels, add);
  }
}

// Weights come from main memory, from places that the processor does not foresee.
inline void prefetch_weights(const float* from) {
  __builtin_prefetch(from);
  __builtin_prefetch(from + 16);
}

// The part of a panel for `inputs` weights of each of kColumns outputs, which begin `step` after
// the last one's.
template <class T>
void pack_outputs(const float* weight, int64_t inputs, int64_t step, typename T::Unit* panel) {
  constexpr int64_t kValues = kLanes * T::kValues;
  for (int64_t i = 0; i < inputs; i += kValues) {
    const float* next = weight + (i + kValues < inputs ? i + kValues : kColumns * step);
    for (int64_t k = 0; k < kColumns; k++) prefetch_weights(next + k * step);
    for (int64_t k = 0; k < kColumns; k += kLanes) {
      T::transposed(weight + k * step + i, step, panel + k, kColumns);
    }
    panel += kLanes * kColumns;
  }
}

// The same of transposed weights: an input's begin `step` after the last one's.
template <class T>
void pack_outputs_transposed(const float* weight, int64_t inputs, int64_t step,
                             typename T::Unit* panel) {
  constexpr int64_t kAhead = 32;
  for (int64_t i = 0; i < inputs; i += T::kValues) {
    for (int64_t j = 0; j < T::kValues; j++) prefetch_weights(weight + (i + j + kAhead) * step);
    T::stacked(weight + i * step, step, panel, kColumns);
    panel += kColumns;
  }
}

// A place (r, s) of the kernel, `place` = r * kernel + s, and how far from its output it looks.
// Those that see no pixel of any image are left out: of a 3x3 kernel on single pixels all but one.
struct Tap {
  int64_t place, down, right, offset;  // offset: in values
};

// Pixels of the output that use the same places of the kernel: `height` x `width` of them, from
// (top, left) on, every `stride`-th. Only a transpose with a stride has more than one such phase.
struct Phase {
  int64_t top, left, height, width;
  std::vector<Tap> taps;
  Range rows, columns;  // of pixels whose places are all inside the image
};

// Where a walk through the pixels of `num` images is.
struct Pixel {
  int64_t first, num;  // of the images
  int64_t image, row, column;
};

// Cache lines of what a thread reads next.
inline void prefetch(const void* from, Range lines) {
  for (int64_t i = lines.begin; i < lines.end; i++) {
    __builtin_prefetch(static_cast<const char*>(from) + 64 * i);
  }
}

template <class T>
class Product {
  using Value = typename T::Value;
  using Unit = typename T::Unit;

 public:
  // transposed: the weight is [inputs, kernel, kernel, outputs] of this product.
  // add: to what the output holds, before that sum is rounded.
  Product(const Convolution& c, bool transposed, bool add, const Value* input, const float* weight,
          Value* output)
      : c_(c),
        transposed_(transposed),
        add_(add),
        plain_(c.kernel == 1 && c.stride == 1 && c.padding == 0),
        units_(c.in_channels / T::kValues),
        panels_(c.out_channels / kColumns),
        in_step_(transposed ? 1 : c.stride),
        out_step_(transposed ? c.stride : 1),
        input_(input),
        weight_(weight),
        output_(output) {
    for (int64_t top = 0; top < std::min(out_step_, c.out_height); top++) {
      for (int64_t left = 0; left < std::min(out_step_, c.out_width); left++) {
        phases_.push_back(describe(top, left));
        taps_ += phases_.back().taps.size();
      }
    }
  }

  void compute() const {
    const int64_t panel_units = taps_ * units_ * kColumns;
    const int64_t pixel_bytes = c_.in_channels * sizeof(Value);
    // A thread takes a block of pixels through all panels. Where those stay in its cache, few
    // pixels, so that its writes lie together; else as many as stay there themselves.
    const int64_t weight_bytes = taps_ * c_.out_channels * pixel_bytes;
    const int64_t kept = weight_bytes > kCacheBytes ? kCacheBytes / 2 / pixel_bytes : 1;
    const int64_t block = std::max<int64_t>(1, kept / kRows);  // tiles
    // What is larger is divided. The same thread has the same images in all layers, so that it
    // finds in its cache what it wrote: dynamic scheduling was slower.
    const bool divide_pixels = c_.images * c_.out_height * c_.out_width >= c_.out_channels;
    const int64_t listed = block * list_size(taps_);
    const Scratch scratch(panels_ * panel_units * sizeof(Unit) + pixel_bytes +
                          c_.threads * listed * sizeof(void*));
    auto* const packed = static_cast<Unit*>(scratch.get());
    auto* const zeros = reinterpret_cast<Value*>(packed + panels_ * panel_units);
    auto* const lists = reinterpret_cast<const Value**>(zeros + c_.in_channels);
    std::fill_n(zeros, c_.in_channels, Value(0));
#pragma omp parallel num_threads(c_.threads)
    {
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const Range to_pack = share(panels_, thread, threads);
      for (int64_t k = to_pack.begin; k < to_pack.end; k++) pack(k, packed + k * panel_units);
#pragma omp barrier
      const Unit* panels = packed;
      for (const Phase& phase : phases_) {
        if (add_ && phase.taps.empty()) continue;  // nothing to add
        const int64_t tiles = (num_pixels(phase) + kRows - 1) / kRows;
        const Range own_tiles = divide_pixels ? share(tiles, thread, threads) : Range{0, tiles};
        const Range own_panels = divide_pixels ? Range{0, panels_} : to_pack;
        multiply(phase, own_tiles, own_panels, block, panels, panel_units, zeros,
                 lists + thread * listed);
        panels += phase.taps.size() * units_ * kColumns;
      }
    }
  }

 private:
  Phase describe(int64_t top, int64_t left) const {
    Phase phase{top, left, (c_.out_height - top + out_step_ - 1) / out_step_,
                (c_.out_width - left + out_step_ - 1) / out_step_, {}, {}, {}};
    int64_t up = 0, down = 0, before = 0, after = 0;
    for (int64_t r = 0; r < c_.kernel; r++) {
      for (int64_t s = 0; s < c_.kernel; s++) {
        int64_t y = transposed_ ? top + c_.padding - r : r - c_.padding;
        int64_t x = transposed_ ? left + c_.padding - s : s - c_.padding;
        if (y % out_step_ || x % out_step_) continue;
        y /= out_step_, x /= out_step_;
        if (!meets(y, phase.height, c_.height) || !meets(x, phase.width, c_.width)) continue;
        phase.taps.push_back({r * c_.kernel + s, y, x, (y * c_.width + x) * c_.in_channels});
        up = std::max(up, -y), down = std::max(down, y);
        before = std::max(before, -x), after = std::max(after, x);
      }
    }
    const auto divided = [this](int64_t size) { return (size + in_step_ - 1) / in_step_; };
    phase.rows = {divided(up), divided(c_.height - down)};
    phase.columns = {divided(before), divided(c_.width - after)};
    return phase;
  }

  // Whether of `num` pixels of the output one has its input, `offset` further, among `inputs`.
  bool meets(int64_t offset, int64_t num, int64_t inputs) const {
    const int64_t first = offset < 0 ? (-offset + in_step_ - 1) / in_step_ : 0;
    return first < num && first * in_step_ + offset < inputs;
  }

  int64_t num_pixels(const Phase& phase) const { return c_.images * phase.height * phase.width; }

  // The panel of kColumns outputs, for the places of the kernel in the order of the phases.
  void pack(int64_t number, Unit* panel) const {
    const int64_t first = number * kColumns, places = c_.kernel * c_.kernel;
    const int64_t inputs = c_.in_channels, outputs = c_.out_channels;
    if (!transposed_ && taps_ == places) {  // they lie behind each other
      return pack_outputs<T>(weight_ + first * places * inputs, places * inputs, places * inputs,
                             panel);
    }
    for (const Phase& phase : phases_) {
      for (const Tap& tap : phase.taps) {
        if (transposed_) {
          pack_outputs_transposed<T>(weight_ + tap.place * outputs + first, inputs,
                                     places * outputs, panel);
        } else {
          pack_outputs<T>(weight_ + (first * places + tap.place) * inputs, inputs,
                          places * inputs, panel);
        }
        panel += units_ * kColumns;
      }
    }
  }

  // block: of how many tiles one after the other is taken through the panels.
  void multiply(const Phase& phase, Range tiles, Range panels, int64_t block, const Unit* packed,
                int64_t panel_units, const Value* zeros, const Value** list) const {
    const int64_t taps = phase.taps.size(), pixels = num_pixels(phase);
    const int64_t lines = kRows * c_.in_channels * sizeof(Value) / 64;
    Pixel next = pixel_at(phase, tiles.begin * kRows);
    for (int64_t begin = tiles.begin; begin < tiles.end; begin += block) {
      const int64_t end = std::min(tiles.end, begin + block);
      for (int64_t t = begin; t < end && !plain_; t++) {
        const int64_t num = std::min(kRows, pixels - t * kRows);
        find_pixels(phase, next, num, zeros, list + (t - begin) * list_size(taps));
      }
      for (int64_t k = panels.begin; k < panels.end; k++) {
        for (int64_t t = begin; t < end; t++) {
          if (block == 1) {
            prefetch(input_ + (t + 1) * kRows * c_.in_channels,
                     share(lines, k - panels.begin, panels.size()));
          }
          const int64_t num = std::min(kRows, pixels - t * kRows);
          const auto multiply_tile = [&](const auto& tile) {
            multiply_some_pixels<T, kRows>(num, tile, packed + k * panel_units, units_,
                                           k * kColumns, c_.out_channels, add_);
          };
          if (plain_) {
            multiply_tile(Adjacent<Value>{input_ + t * kRows * c_.in_channels,
                                          output_ + t * kRows * c_.out_channels, c_.in_channels,
                                          c_.out_channels});
          } else {
            multiply_tile(listed(list + (t - begin) * list_size(taps), taps));
          }
        }
      }
    }
  }

  // Words of a list: see `Listed`.
  static int64_t list_size(int64_t taps) { return 1 + taps + (taps + 1) * kRows; }

  static Listed<Value> listed(const Value** list, int64_t taps) {
    const Value** const inputs = list + 1 + taps;
    return {reinterpret_cast<const int64_t*>(list), inputs,
            const_cast<Value**>(inputs + taps * kRows)};
  }

  // The order of the pixels: a tile has the same pixel of kRows images where it can, so that a
  // place of the kernel is beside all of them or of none. In 1x1 convolutions that is of no use.
  Pixel pixel_at(const Phase& phase, int64_t number) const {
    const int64_t group = c_.kernel > 1 ? kRows : 1, size = phase.height * phase.width;
    const int64_t first = number / (group * size) * group, num = std::min(group, c_.images - first);
    const int64_t within = number - first * size, at = num > 0 ? within / num : 0;
    return {first, num, num > 0 ? first + within % num : first, at / phase.width,
            at % phase.width};
  }

  void advance(const Phase& phase, Pixel& pixel) const {
    if (++pixel.image < pixel.first + pixel.num) return;
    pixel.image = pixel.first;
    if (++pixel.column < phase.width) return;
    pixel.column = 0;
    if (++pixel.row < phase.height) return;
    pixel = pixel_at(phase, (pixel.first + pixel.num) * phase.height * phase.width);
  }

  // Lists `num` pixels of a phase from `pixel` on, which becomes the one after them.
  void find_pixels(const Phase& phase, Pixel& pixel, int64_t num, const Value* zeros,
                   const Value** list) const {
    const int64_t taps = phase.taps.size();
    auto* const head = reinterpret_cast<int64_t*>(list);
    const Value** const inputs = list + 1 + taps;
    Value** const outputs = const_cast<Value**>(inputs + taps * kRows);
    std::fill_n(head, 1 + taps, 0);
    for (int64_t m = 0; m < num; m++) {
      const int64_t h = pixel.row * in_step_, w = pixel.column * in_step_;
      const Value* at = input_ + ((pixel.image * c_.height + h) * c_.width + w) * c_.in_channels;
      const bool all = holds(phase.rows, pixel.row) && holds(phase.columns, pixel.column);
      for (int64_t t = 0; t < taps; t++) {
        const Tap& tap = phase.taps[t];
        const bool inside = all || (holds({0, c_.height}, h + tap.down) &&
                                    holds({0, c_.width}, w + tap.right));
        inputs[t * kRows + m] = inside ? at + tap.offset : zeros;
        head[1 + t] |= inside;
      }
      const int64_t out_h = phase.top + pixel.row * out_step_;
      const int64_t out_w = phase.left + pixel.column * out_step_;
      const int64_t row = pixel.image * c_.out_height + out_h;
      outputs[m] = output_ + (row * c_.out_width + out_w) * c_.out_channels;
      advance(phase, pixel);
    }
    for (int64_t t = 0; t < taps; t++) {
      if (!head[1 + t]) continue;
      const int64_t place = head[0]++;  // at most t
      head[1 + place] = t;
      std::copy_n(inputs + t * kRows, kRows, inputs + place * kRows);
    }
  }

  static bool holds(Range range, int64_t number) {
    return range.begin <= number && number < range.end;
  }

  Convolution c_;
  bool transposed_, add_, plain_;
  int64_t units_, panels_, in_step_, out_step_, taps_ = 0;  // taps_: of all phases
  const Value* input_;
  const float* weight_;
  Value* output_;
  std::vector<Phase> phases_;
};

}  // namespace

extern "C" {

#if HAS_FLOAT32
void convolution_float32(const Convolution* c, int64_t transposed, int64_t add, const void* input,
                         const float* weight, void* output) {
  Product<Float32>(*c, transposed, add, static_cast<const float*>(input), weight,
                   static_cast<float*>(output))
      .compute();
}
#endif

#if HAS_BFLOAT16
void convolution_bfloat16(const Convolution* c, int64_t transposed, int64_t add, const void* input,
                          const float* weight, void* output) {
  Product<Bfloat16>(*c, transposed, add, static_cast<const uint16_t*>(input), weight,
                    static_cast<uint16_t*>(output))
      .compute();
}
#endif
}
