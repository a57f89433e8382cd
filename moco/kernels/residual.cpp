// A residual block: which kernels run, in which order, on which tensors.
//
// Between two kernels of a millisecond Python costs more than it looks: what it needs has left the
// cache. Here it is asked once a block.
//
// moco/kernels/residual.py calls this file; the structures have the same fields there.

#include "batch_norm.h"
#include "convolution.h"

extern "C" {

// The other files' functions for the tensors' type.
struct Kernels {
  void (*convolution)(const Convolution*, int64_t transposed, int64_t add, const void* input,
                      const float* weight, void* output);
  void (*weight_gradient)(const Convolution*, const void* x, const void* dy, float* dw);
  void (*norm_forward)(const Norm*, const void* x, const void* shortcut, void* y);
  void (*norm_backward)(const Norm*, const void* x, const void* y, const void* dy, void* dx,
                        void* gated, float* dweight, float* dbias);
};

// `layers` convolutions, each with its norm, and then perhaps that of the shortcut.
struct Block {
  int64_t layers, has_downsample, groups, evaluating;
  const Convolution* convolutions;
  Kernels kernels;
};

// Of a convolution and its norm.
struct Layer {
  double eps, momentum;
  const float* kernel;           // the convolution's weights, [K, R, S, C]
  const float *weight, *bias;    // the norm's
  float *running_mean, *running_var;
  int64_t* tracked;
  void *convolved, *normalised;  // its output before and after the norm; they may be the same
  float* stats;                  // [4, groups, channels]: see Norm
};

struct Gradients {
  float *kernel, *weight, *bias;
  void* convolved;
};

// What the kernels took: convolutions, norms, gradients to inputs, gradients to weights.
double residual_seconds[4];
}

namespace {

enum { kConvolution, kNorm, kInputGradient, kWeightGradient };

template <class Work>
void timed(int what, Work work) {
  const double began = omp_get_wtime();
  work();
  residual_seconds[what] += omp_get_wtime() - began;
}

Norm norm_of(const Block& b, int64_t number, const Layer& l) {
  const Convolution& c = b.convolutions[number];
  const int64_t step = b.groups * c.out_channels;
  const bool relu = number < b.layers;
  return {c.images, c.out_height * c.out_width, c.out_channels, b.groups, c.threads, relu,
          b.evaluating, l.eps, l.momentum, l.weight, l.bias, l.running_mean, l.running_var,
          l.tracked, l.stats, l.stats + step, l.stats + 2 * step, l.stats + 3 * step};
}

void apply(const Block& b, const Layer* layers, int64_t number, const void* x,
           const void* shortcut) {
  const Layer& l = layers[number];
  const Norm norm = norm_of(b, number, l);
  timed(kConvolution, [&] {
    b.kernels.convolution(&b.convolutions[number], 0, 0, x, l.kernel, l.convolved);
  });
  timed(kNorm, [&] { b.kernels.norm_forward(&norm, l.convolved, shortcut, l.normalised); });
}

// Of a layer whose output has the gradient dy; y, gated: of the last one.
void differentiate_norm(const Block& b, const Layer* layers, const Gradients* g, int64_t number,
                        const void* y, const void* dy, void* dx, void* gated) {
  const Norm norm = norm_of(b, number, layers[number]);
  timed(kNorm, [&] {
    b.kernels.norm_backward(&norm, layers[number].convolved, y, dy, dx, gated, g[number].weight,
                            g[number].bias);
  });
}

// Of a convolution of x whose output has the gradient dy; dx is added to where `add` says so.
void differentiate(const Block& b, const Layer* layers, const Gradients* g, int64_t number,
                   const void* x, const void* dy, void* dx, bool add) {
  Convolution c = b.convolutions[number];
  timed(kWeightGradient, [&] { b.kernels.weight_gradient(&c, x, dy, g[number].kernel); });
  std::swap(c.in_channels, c.out_channels);
  std::swap(c.height, c.out_height);
  std::swap(c.width, c.out_width);
  timed(kInputGradient,
        [&] { b.kernels.convolution(&c, 1, add, dy, layers[number].kernel, dx); });
}

}  // namespace

extern "C" {

void residual_forward(const Block* b, const Layer* layers, const void* x) {
  const int64_t last = b->layers - 1;
  const void* shortcut = x;
  if (b->has_downsample) {
    apply(*b, layers, b->layers, x, nullptr);
    shortcut = layers[b->layers].normalised;
  }
  for (int64_t i = 0; i <= last; i++) {
    const void* from = i ? layers[i - 1].normalised : x;
    apply(*b, layers, i, from, i == last ? shortcut : nullptr);
  }
}

// dout is left alone, others may have it too. gated: room for the shortcut's gradient, which
// without a downsample is dx.
void residual_backward(const Block* b, const Layer* layers, const Gradients* g, const void* x,
                       const void* dout, void* gated, void* dx) {
  const int64_t last = b->layers - 1;
  differentiate_norm(*b, layers, g, last, layers[last].normalised, dout, g[last].convolved, gated);
  for (int64_t i = last; i > 0; i--) {
    void* const before = g[i - 1].convolved;
    differentiate(*b, layers, g, i, layers[i - 1].normalised, g[i].convolved, before, false);
    differentiate_norm(*b, layers, g, i - 1, nullptr, before, before, nullptr);
  }
  differentiate(*b, layers, g, 0, x, g[0].convolved, dx, !b->has_downsample);
  if (b->has_downsample) {
    differentiate_norm(*b, layers, g, b->layers, nullptr, gated, gated, nullptr);
    differentiate(*b, layers, g, b->layers, x, gated, dx, true);
  }
}
}
