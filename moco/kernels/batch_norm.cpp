// Batch norm over groups of images, with the shortcut and the ReLU that follow it
// in a residual network, forward and backward, for channels-last tensors of float or bfloat16.
//
// A tensor is rows (pixels of all images) x channels; image i belongs to group i % groups. What
// costs time is reading and writing these rows, so each pass over them does all it can. Sums are
// kept in double across blocks of rows, and of differences to the group's first pixel, so that a
// large mean takes no digits from a small variance.
//
// moco/kernels/norm.py and residual.cpp call this file.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "batch_norm.h"
#include "bfloat16.h"

namespace {

// A NaN as `store` keeps it.
inline float plain(double value) { return value != value ? NAN : float(value); }

constexpr int64_t kRowsPerBlock = 256;

// Calls work(thread, group, first row, end row) for blocks of rows that lie within an image.
template <class Work>
void for_blocks(const Norm& l, Work work) {
#pragma omp parallel num_threads(l.threads)
  {
    const int64_t rows = l.images * l.pixels, thread = omp_get_thread_num();
    const int64_t threads = omp_get_num_threads();
    int64_t row = rows * thread / threads;
    const int64_t last = rows * (thread + 1) / threads;
    while (row < last) {
      const int64_t image = row / l.pixels;
      const int64_t end = std::min({last, (image + 1) * l.pixels, row + kRowsPerBlock});
      work(thread, image % l.groups, row, end);
      row = end;
    }
  }
}

// Two sums for each group and channel, gathered by the threads of `for_blocks`.
class Sums {
 public:
  explicit Sums(const Norm& l)
      : channels_(l.channels),
        size_(l.groups * l.channels),
        threads_(l.threads),
        blocks_(2 * l.threads * l.channels),
        totals_(2 * l.threads * size_, 0.0) {}

  float* block(int64_t thread) {  // [2, channels] for one block, zero
    float* sums = &blocks_[2 * thread * channels_];
    std::fill(sums, sums + 2 * channels_, 0.0f);
    return sums;
  }

  void add_block(int64_t thread, int64_t group) {
    const float* sums = &blocks_[2 * thread * channels_];
    for (int64_t which = 0; which < 2; which++) {
      double* totals = &totals_[(2 * thread + which) * size_ + group * channels_];
      for (int64_t c = 0; c < channels_; c++) totals[c] += sums[which * channels_ + c];
    }
  }

  double total(int64_t which, int64_t index) const {  // index: of [groups, channels]
    double sum = 0.0;
    for (int64_t t = 0; t < threads_; t++) sum += totals_[(2 * t + which) * size_ + index];
    return sum;
  }

 private:
  int64_t channels_, size_, threads_;
  std::vector<float> blocks_;
  std::vector<double> totals_;
};

// Calls add(element, channel, first sum, second sum) for all elements of some rows. A tile of sums
// stays in registers over some rows; in memory they would be read and written for every element.
constexpr int64_t kTile = 64, kRowsPerTile = 32;

template <class Add>
void sum_rows(int64_t channels, int64_t begin, int64_t end, float* first, float* second, Add add) {
  for (int64_t top = begin; top < end; top += kRowsPerTile) {
    const int64_t bottom = std::min(end, top + kRowsPerTile);
    int64_t c = 0;
    for (; c + kTile <= channels; c += kTile) {
      float a[kTile], b[kTile];
      std::copy(first + c, first + c + kTile, a);
      std::copy(second + c, second + c + kTile, b);
      for (int64_t row = top; row < bottom; row++) {
#pragma omp simd
        for (int64_t j = 0; j < kTile; j++) add(row * channels + c + j, c + j, a[j], b[j]);
      }
      std::copy(a, a + kTile, first + c);
      std::copy(b, b + kTile, second + c);
    }
    for (int64_t row = top; row < bottom; row++) {
#pragma omp simd
      for (int64_t j = c; j < channels; j++) add(row * channels + j, j, first[j], second[j]);
    }
  }
}

double values_per_group(const Norm& l) { return double(l.images / l.groups) * l.pixels; }

template <class T>
void measure(const Norm& l, const T* x) {
  const int64_t C = l.channels;
  std::vector<float> first(l.groups * C);
  for (int64_t g = 0; g < l.groups; g++)
    for (int64_t c = 0; c < C; c++) first[g * C + c] = load(x[g * l.pixels * C + c]);
  Sums sums(l);
  for_blocks(l, [&](int64_t thread, int64_t group, int64_t begin, int64_t end) {
    float *sum = sums.block(thread), *squares = sum + C;
    const float* origin = &first[group * C];
    sum_rows(C, begin, end, sum, squares, [=](int64_t i, int64_t c, float& a, float& b) {
      const float d = load(x[i]) - origin[c];
      a += d;
      b += d * d;
    });
    sums.add_block(thread, group);
  });
  const double n = values_per_group(l);
  for (int64_t i = 0; i < l.groups * C; i++) {
    const double offset = sums.total(0, i) / n, mean = first[i] + offset;
    const double square = sums.total(1, i) / n - offset * offset;
    const double var = square < 0.0 ? 0.0 : square;  // a NaN stays one
    const double scale = l.weight[i % C] / std::sqrt(var + l.eps);
    l.mean[i] = float(mean);
    l.var[i] = float(var);
    l.scale[i] = plain(scale);
    l.shift[i] = plain(l.bias[i % C] - mean * scale);
  }
}

// The running statistics move towards the mean of the groups', with the unbiased variance.
void track(const Norm& l) {
  const double n = values_per_group(l), unbiased = n / (n - 1.0) / l.groups;
  for (int64_t c = 0; c < l.channels; c++) {
    double mean = 0.0, var = 0.0;
    for (int64_t g = 0; g < l.groups; g++) {
      mean += l.mean[g * l.channels + c];
      var += l.var[g * l.channels + c];
    }
    l.running_mean[c] += float(l.momentum * (mean / l.groups - l.running_mean[c]));
    l.running_var[c] += float(l.momentum * (var * unbiased - l.running_var[c]));
  }
}

// y may be x.
template <class T>
void normalise(const Norm& l, const T* x, const T* shortcut, T* y) {
  const int64_t C = l.channels;
  const float lowest = l.relu ? 0.0f : -INFINITY;
  for_blocks(l, [&](int64_t, int64_t group, int64_t begin, int64_t end) {
    const float *scale = l.scale + group * C, *shift = l.shift + group * C;
    for (int64_t row = begin; row < end; row++) {
      const T* in = x + row * C;
      T* out = y + row * C;
      if (shortcut) {
        const T* added = shortcut + row * C;
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          const float v = load(in[c]) * scale[c] + shift[c] + load(added[c]);
          store(out[c], v < lowest ? lowest : v);  // a NaN stays one
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          const float v = load(in[c]) * scale[c] + shift[c];
          store(out[c], v < lowest ? lowest : v);
        }
      }
    }
  });
}

void use_running(const Norm& l) {
  for (int64_t c = 0; c < l.channels; c++) {
    const double scale = l.weight[c] / std::sqrt(double(l.running_var[c]) + l.eps);
    l.scale[c] = plain(scale);
    l.shift[c] = plain(l.bias[c] - l.running_mean[c] * scale);
  }
}

template <class T>
void forward(const Norm& l, const T* x, const T* shortcut, T* y) {
  if (l.evaluating) {
    use_running(l);
  } else {
    measure(l, x);
    track(l);
    ++*l.tracked;
  }
  normalise(l, x, shortcut, y);
}

// The gradient behind the ReLU, of an element: `up` where the ReLU let its value through. Without a
// shortcut that is computed again from the input, which is read anyway.
struct Gate {
  bool operator()(float in, float scale, float shift) const { return in * scale + shift > 0.0f; }
};
struct Open {
  bool operator()(float, float, float) const { return true; }
};

template <class Passes, class T>
void sum_gradients(const Norm& l, const T* x, const T* dy, Sums& sums) {
  const int64_t C = l.channels;
  for_blocks(l, [&](int64_t thread, int64_t group, int64_t begin, int64_t end) {
    float *sum = sums.block(thread), *products = sum + C;
    const float *mean = l.mean + group * C, *scale = l.scale + group * C;
    const float* shift = l.shift + group * C;
    sum_rows(C, begin, end, sum, products, [=](int64_t i, int64_t c, float& a, float& b) {
      const float v = load(x[i]), up = load(dy[i]);
      const float g = Passes()(v, scale[c], shift[c]) ? up : 0.0f;
      a += g;
      b += g * (v - mean[c]);
    });
    sums.add_block(thread, group);
  });
}

// With a shortcut the output y tells what passed; the gated gradient is the shortcut's own. Four
// tensors at once are best read row by row: in tiles their lines would displace each other.
template <class T>
void sum_gated_gradients(const Norm& l, const T* x, const T* y, const T* dy, T* gated,
                         Sums& sums) {
  const int64_t C = l.channels;
  for_blocks(l, [&](int64_t thread, int64_t group, int64_t begin, int64_t end) {
    float *sum = sums.block(thread), *products = sum + C;
    const float* mean = l.mean + group * C;
    for (int64_t row = begin; row < end; row++) {
      const T *in = x + row * C, *out = y + row * C, *up = dy + row * C;
      T* kept = gated + row * C;
#pragma omp simd
      for (int64_t c = 0; c < C; c++) {
        const float u = load(up[c]), g = load(out[c]) > 0.0f ? u : 0.0f;
        store(kept[c], g);
        sum[c] += g;
        products[c] += g * (load(in[c]) - mean[c]);
      }
    }
    sums.add_block(thread, group);
  });
}

// dx = scale * (g - mean(g) - (x - mean) * mean(g * (x - mean)) / (var + eps)), g behind the gate.
template <class Passes, class T>
void input_gradient(const Norm& l, const T* x, const T* dy, const float* slope,
                    const float* constant, T* dx) {
  const int64_t C = l.channels;
  for_blocks(l, [&](int64_t, int64_t group, int64_t begin, int64_t end) {
    const float *scale = l.scale + group * C, *shift = l.shift + group * C;
    const float *a = slope + group * C, *b = constant + group * C;
    for (int64_t row = begin; row < end; row++) {
      const T *in = x + row * C, *up = dy + row * C;
      T* out = dx + row * C;
#pragma omp simd
      for (int64_t c = 0; c < C; c++) {
        const float v = load(in[c]), u = load(up[c]);
        const float g = Passes()(v, scale[c], shift[c]) ? u : 0.0f;
        store(out[c], scale[c] * g + a[c] * v + b[c]);
      }
    }
  });
}

// y, gated: where a shortcut was added before the ReLU; else null. dweight, dbias: [channels].
template <class T>
void backward(const Norm& l, const T* x, const T* y, const T* dy, T* dx, T* gated,
              float* dweight, float* dbias) {
  Sums sums(l);
  if (gated) {
    sum_gated_gradients(l, x, y, dy, gated, sums);
  } else if (l.relu) {
    sum_gradients<Gate>(l, x, dy, sums);
  } else {
    sum_gradients<Open>(l, x, dy, sums);
  }
  const int64_t C = l.channels;
  const double n = values_per_group(l);
  std::vector<float> slope(l.groups * C), constant(l.groups * C);
  std::vector<double> weight(C, 0.0), bias(C, 0.0);
  for (int64_t i = 0; i < l.groups * C; i++) {
    const double sum = sums.total(0, i), product = sums.total(1, i);
    const double inverse = 1.0 / std::sqrt(double(l.var[i]) + l.eps);
    bias[i % C] += sum;
    weight[i % C] += product * inverse;
    const double a = -l.scale[i] * product * inverse * inverse / n;
    slope[i] = plain(a);
    constant[i] = plain(-l.scale[i] * sum / n - a * l.mean[i]);
  }
  for (int64_t c = 0; c < C; c++) {
    dweight[c] = float(weight[c]);
    dbias[c] = float(bias[c]);
  }
  if (gated) {
    input_gradient<Open>(l, x, gated, slope.data(), constant.data(), dx);
  } else if (l.relu) {
    input_gradient<Gate>(l, x, dy, slope.data(), constant.data(), dx);
  } else {
    input_gradient<Open>(l, x, dy, slope.data(), constant.data(), dx);
  }
}

}  // namespace

extern "C" {

void forward_float32(const Norm* l, const void* x, const void* shortcut, void* y) {
  forward(*l, static_cast<const float*>(x), static_cast<const float*>(shortcut),
          static_cast<float*>(y));
}

void forward_bfloat16(const Norm* l, const void* x, const void* shortcut, void* y) {
  forward(*l, static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(shortcut),
          static_cast<bfloat16*>(y));
}

void backward_float32(const Norm* l, const void* x, const void* y, const void* dy, void* dx,
                      void* gated, float* dweight, float* dbias) {
  backward(*l, static_cast<const float*>(x), static_cast<const float*>(y),
           static_cast<const float*>(dy), static_cast<float*>(dx), static_cast<float*>(gated),
           dweight, dbias);
}

void backward_bfloat16(const Norm* l, const void* x, const void* y, const void* dy, void* dx,
                       void* gated, float* dweight, float* dbias) {
  backward(*l, static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(y),
           static_cast<const bfloat16*>(dy), static_cast<bfloat16*>(dx),
           static_cast<bfloat16*>(gated), dweight, dbias);
}
}
